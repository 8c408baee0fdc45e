// The machine's measured arithmetic peak, the yardstick of the benchmarks.
#pragma once
#include "core/cpu_features.h"

namespace mlcore {

struct MachineKernels {
  float (*fma_loop)(int64_t rounds);  // 12 * 64 fused multiply-adds of one Vec a round
  int width;
};
MLC_KERNEL_TABLE(MachineKernels, machine_kernels)

double fma_peak_gflops(int threads, double seconds);

}  // namespace mlcore
