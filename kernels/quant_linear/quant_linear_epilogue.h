// What happens to a row of sums: scales, bias, activation, residual, rounding. Included by quant_linear_cpu.inl only.
#pragma once
#include "core/simd/rows.h"
#include "quant_linear/quant_linear_kernels.h"

namespace mlcore::MLC_ISA {
namespace {

inline Vec magnitude(Vec x) { return max(x, Vec::zero() - x); }

// 1 / x for x in [1, 2^127]: AVX-512's division takes longer than the rest of an activation.
inline Vec reciprocal(Vec x) {
#if defined(MLC_ISA_AVX512) && !defined(MLC_EMULATE_AVX512)
  const Vec r{_mm512_rcp14_ps(x.v)};
  return fma(r, fma(Vec::zero() - x, r, Vec::set1(1.0f)), r);
#else
  return Vec::set1(1.0f) / x;
#endif
}

inline Vec sigmoid_times(Vec x, Vec u) {  // x / (1 + e^-u)
  const Vec power = min(Vec::set1(126.0f), u * Vec::set1(-1.442695041f));
  return x * reciprocal(Vec::set1(1.0f) + exp2(power));
}

// max(x, 0) - |x| erfc(|x| / sqrt 2) / 2. erfc(z) = e^(-z^2) t P(t) with t = 1 / (1 + z / 2), P fitted to a relative error of
// 3.7e-7 on [0, 6]; farther out the term is below 1e-15.
inline Vec gelu(Vec x) {
  const Vec a = min(Vec::set1(12.0f), magnitude(x)), z = a * Vec::set1(0.70710678f);
  const Vec t = reciprocal(fma(z, Vec::set1(0.5f), Vec::set1(1.0f)));
  Vec p = Vec::set1(0.0952979883f);
  p = fma(p, t, Vec::set1(-0.3820438323f));
  p = fma(p, t, Vec::set1(0.4253089943f));
  p = fma(p, t, Vec::set1(0.0116859509f));
  p = fma(p, t, Vec::set1(0.2916786746f));
  p = fma(p, t, Vec::set1(0.2755873034f));
  p = fma(p, t, Vec::set1(0.2824852730f));
  const Vec tail = exp2(z * z * Vec::set1(-1.442695041f)) * (p * t);
  return max(Vec::zero(), x) - a * Vec::set1(0.5f) * tail;
}

inline Vec gelu_tanh(Vec x) {
  const Vec u = x * Vec::set1(1.5957691216f) * fma(x * x, Vec::set1(0.044715f), Vec::set1(1.0f));
  return sigmoid_times(x, u);
}

enum Activation : int64_t { kNone, kRelu, kGelu, kGeluTanh, kSilu, kRelu6 };

inline Vec activate(int64_t activation, Vec x) {
  switch (activation) {
    case kRelu: return max(Vec::zero(), x);
    case kGelu: return gelu(x);
    case kGeluTanh: return gelu_tanh(x);
    case kSilu: return sigmoid_times(x, x);
    case kRelu6: return min(Vec::set1(6.0f), max(Vec::zero(), x));
    default: return x;
  }
}

// Columns [n0, n0 + cols) of row r of y (r counted in all of x) from sums c; factor is what sums are multiplied by, or null.
template <class T>
void finish_row(const QuantLinear& p, int64_t r, int64_t n0, int64_t cols, const float* c, const float* factor) {
  T* y = row<T>(p.y, r) + n0;
  const T* residual = p.residual.data ? row<T>(p.residual, r) + n0 : nullptr;
  const Vec scale = Vec::set1(p.int8 ? p.row_scale[r - p.row0] : 1.0f);
  for_row(cols, [&](int64_t i, int n) {
    Vec v = load_some(c + i, n);
    if (p.int8) v = v * scale;
    if (factor) v = v * load_some(factor + i, n);
    if (p.bias) v = v + load_some(p.bias + n0 + i, n);
    v = activate(p.activation, v);
    if (residual) v = v + load_some(residual + i, n);
    store_some(y + i, v, n);
  });
}

}  // namespace
}  // namespace mlcore::MLC_ISA
