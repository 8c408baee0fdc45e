#include "core/machine.h"

#include <algorithm>
#include <chrono>
#include <vector>

#include "core/parallel.h"

namespace mlcore {

double fma_peak_gflops(int threads, double seconds) {
  require(threads >= 1, "fma_peak_gflops: threads must be at least 1; got ", threads);
  const MachineKernels& k = machine_kernels_now();
  constexpr int64_t kRounds = 2000;
  const double flops = 2.0 * 12 * 64 * k.width * kRounds * threads;
  volatile float sink = 0;
  double best = 0;
  using Clock = std::chrono::steady_clock;
  const auto start = Clock::now();
  do {
    std::vector<float> out(threads);
    const auto t0 = Clock::now();
    parallel_claim(threads, threads, [&](int64_t i, int) { out[i] = k.fma_loop(kRounds); });
    best = std::max(best, flops / std::chrono::duration<double>(Clock::now() - t0).count());
    for (float x : out) sink = sink + x;
  } while (std::chrono::duration<double>(Clock::now() - start).count() < seconds);
  return best * 1e-9;
}

}  // namespace mlcore
