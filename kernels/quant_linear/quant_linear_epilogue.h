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

// gelu(x) = max(x, 0) - a Q(a), a = |x|, Q(a) = erfc(a / sqrt 2) / 2.
#if defined(MLC_ISA_AVX512) && !defined(MLC_EMULATE_AVX512)
// Q around j * 0.4, highest degree first, in r = a / 0.4 - j: error 6e-9. Beyond 5.8, where a Q is below 2e-8, it is 0. A
// permutation finds a coefficient for each lane: half of the operations that the other levels' formula takes.
alignas(64) constexpr float kGeluTail[6][16] = {
    {-9.93566573e-05f, -6.44256361e-05f, 1.02701024e-05f, 5.84172449e-05f, 5.4622953e-05f, 2.31309332e-05f, -2.86548038e-06f,
     -1.16392894e-05f, -9.42227507e-06f, -4.88878777e-06f, -1.88235356e-06f, -5.67020948e-07f, -1.37151858e-07f,
     -2.70442015e-08f, -4.38971703e-09f, 0.0f},
    {-2.09085306e-06f, -0.000442050397f, -0.000578965584f, -0.000386421219f, -8.48117488e-05f, 0.000113116039f, 0.000157150134f,
     0.000114327348f, 5.91987591e-05f, 2.36534142e-05f, 7.55014935e-06f, 1.96134624e-06f, 4.19357633e-07f, 7.43497708e-08f,
     1.0987657e-08f, 0.0f},
    {0.00425599888f, 0.00329962838f, 0.00111247029f, -0.00091127929f, -0.00184567284f, -0.00172772491f, -0.00113707839f,
     -0.000577530591f, -0.00023497887f, -7.80590854e-05f, -2.14097417e-05f, -4.88323076e-06f, -9.30765452e-07f,
     -1.48777062e-07f, -1.99952517e-08f, 0.0f},
    {-7.76781022e-08f, 0.0117842518f, 0.0185398441f, 0.0186417364f, 0.0141980089f, 0.00863874797f, 0.00429985113f,
     0.00177306996f, 0.000610300223f, 0.000176204296f, 4.28137573e-05f, 8.77541243e-06f, 1.51992515e-06f, 2.22749435e-07f,
     2.76496959e-08f, 0.0f},
    {-0.159576908f, -0.147308052f, -0.115876622f, -0.0776744261f, -0.0443683341f, -0.0215963852f, -0.0089578107f,
     -0.00316617987f, -0.000953635143f, -0.000244760915f, -5.35322106e-05f, -9.97704774e-06f, -1.58453975e-06f,
     -2.14446601e-07f, -2.47315324e-08f, 0.0f},
    {0.5f, 0.344578266f, 0.211855412f, 0.115069672f, 0.0547992885f, 0.0227501299f, 0.00819753483f, 0.00255513028f,
     0.000687138294f, 0.000159108909f, 3.16714068e-05f, 5.41260397e-06f, 7.93345009e-07f, 9.96480125e-08f, 1.07182645e-08f,
     0.0f},
};
inline Vec gelu(Vec x) {
  const Vec a = min(Vec::set1(6.0f), magnitude(x)), magic = Vec::set1(12582912.0f);  // 3 * 2^22: adding it rounds
  const Vec shifted = fma(a, Vec::set1(2.5f), magic), r{_mm512_fmsub_ps(a.v, Vec::set1(2.5f).v, (shifted - magic).v)};
  const __m512i j = _mm512_castps_si512(shifted.v);
  Vec q{_mm512_permutexvar_ps(j, Vec::load(kGeluTail[0]).v)};
#pragma GCC unroll 5
  for (int i = 1; i < 6; ++i) q = fma(q, r, {_mm512_permutexvar_ps(j, Vec::load(kGeluTail[i]).v)});
  return {_mm512_fnmadd_ps(a.v, q.v, max(Vec::zero(), x).v)};
}
#else
// erfc(z) = e^(-z^2) t P(t) with t = 1 / (1 + z / 2), P fitted to a relative error of 3.7e-7 on [0, 6]; farther out the term is
// below 1e-15.
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
#endif

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
