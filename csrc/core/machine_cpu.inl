// Twelve independent FMA chains: enough to hide the latency of two FMA pipes.
#include "core/machine.h"
#include "core/simd/vec.h"

namespace mlcore::MLC_ISA {
namespace {

float fma_loop(int64_t rounds) {
  Vec acc[12];
  for (int i = 0; i < 12; ++i) acc[i] = Vec::set1(static_cast<float>(i));
  const Vec a = Vec::set1(0.999f), b = Vec::set1(0.001f);
  for (int64_t r = 0; r < rounds * 64; ++r)
    for (int i = 0; i < 12; ++i) acc[i] = fma(acc[i], a, b);
  Vec total = acc[0];
  for (int i = 1; i < 12; ++i) total = total + acc[i];
  return sum(total);
}

}  // namespace

extern const MachineKernels machine_kernels = {fma_loop, Vec::W};

}  // namespace mlcore::MLC_ISA
