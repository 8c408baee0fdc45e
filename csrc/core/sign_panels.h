// A weight of signs with a scale a row, as binary ops take it: checked once, handed to kernels as plain pointers. The order of
// the bits is simd/xnor.h's. No kernel code.
#pragma once
#include "core/tensor.h"

namespace mlcore {

// The bits of a group's last word that hold signs.
inline uint32_t sign_tail(int64_t terms) {
  uint32_t bits = 0;
  for (int64_t k = 0; k <= (terms + 31) % 32; ++k) bits |= 1u << (8 * (k % 4) + k / 4);
  return bits;
}

struct SignPanels {
  const uint8_t* codes = nullptr;  // (panels, words, 16) words of 32 bits
  const float* scales = nullptr;   // (panels * 16)
  const float* bias = nullptr;     // (N) or null
  int64_t N = 0, panels = 0, words = 0, panel_bytes = 0;
  bool popcount = false;  // CPU: by VPOPCNTDQ

  SignPanels() = default;
  // groups of `terms` signs along K, each padded to whole words.
  SignPanels(const char* op, const DLTensor* codes_, const DLTensor* scales_, const DLTensor* bias_, int64_t N, int64_t groups,
             int64_t terms, DLDeviceType device)
      : N(N), panels((N + 15) / 16), words(groups * ((terms + 31) / 32)), panel_bytes(words * 64) {
    const Tensor codes_view(codes_, op, "codes"), scales_view(scales_, op, "scales"), bias_view(bias_, op, "bias");
    require(N >= 0 && terms >= 0 && groups >= 0, op, ": sizes must be at least 0; got N = ", N, ", ", groups, " groups of ",
            terms);
    require(groups * terms < (int64_t{1} << 30), op, ": K must be below 2^30; got ", groups * terms);
    codes_view.on(device).dtype_in({Dtype::u8}).shape_is({panels, panel_bytes}, "(P, panel bytes)").contiguous();
    scales_view.on(device).dtype_in({Dtype::f32}).shape_is({panels, 1, 16}, "(P, 1, 16)").contiguous();
    if (bias_view.present()) bias = bias_view.on(device).dtype_in({Dtype::f32}).shape_is({N}, "(N)").contiguous().data<float>();
    codes = codes_view.data<uint8_t>(), scales = scales_view.data<float>();
    if (device == kDLCPU && terms % 32 != 0) check_padding(op, groups, terms);
  }

 private:
  // Bits beyond the last sign of a group must be 0, as those of activations are: others would be counted. GPU kernels, whose
  // host would have to wait for the bits, leave them out of their counts.
  void check_padding(const char* op, int64_t groups, int64_t terms) const {
    uint8_t used[4] = {};  // sign k is bit k / 4 of byte k % 4
    for (int64_t k = 0; k < terms % 32; ++k) used[k % 4] = static_cast<uint8_t>(used[k % 4] | 1u << (k / 4));
    const int64_t per_group = words / (groups > 0 ? groups : 1);
    for (int64_t p = 0; p < panels; ++p)
      for (int64_t g = 1; g <= groups; ++g) {
        const uint8_t* last = codes + p * panel_bytes + (g * per_group - 1) * 64;
        uint8_t stray = 0;
        for (int i = 0; i < 64; ++i) stray = static_cast<uint8_t>(stray | (last[i] & ~used[i % 4]));
        require(stray == 0, op, ": codes must be 0 in the padding of K = ", terms, "; got other bits in panel ", p);
      }
  }
};

}  // namespace mlcore
