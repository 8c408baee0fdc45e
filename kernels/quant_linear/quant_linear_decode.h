// Codes to what the products take: units of bytes (integer mode) or of floats. Included by quant_linear_cpu.inl only.
#pragma once
#include "quant_linear/quant_linear_ivec.h"
#include "quant_linear/quant_linear_kernels.h"

namespace mlcore::MLC_ISA {
namespace {

constexpr int kUnit = 64;  // bytes

// Units are shifted and masked as eight words, in loops that compilers turn into an instruction or two.
constexpr uint64_t bytes_of(uint64_t byte) { return byte * 0x0101010101010101u; }
constexpr int largest_power(int bits) { return bits >= 8 ? 8 : bits >= 4 ? 4 : bits >= 2 ? 2 : 1; }

// ORs one plane of kPower bits a code, then the planes of the remaining bits, into the units of a block.
template <int kBits, int kUnits, int kShift = 0>
inline void add_planes(const uint64_t* plane, uint64_t* out) {
  if constexpr (kBits > 0) {
    constexpr int kPower = largest_power(kBits), kPerVector = 8 / kPower;
    constexpr uint64_t kMask = bytes_of((1u << kPower) - 1);
#pragma GCC unroll 8
    for (int u = 0; u < kUnits; ++u)
      for (int i = 0; i < 8; ++i) {
        const uint64_t part = ((plane[u / kPerVector * 8 + i] >> (u % kPerVector * kPower)) & kMask) << kShift;
        out[u * 8 + i] = kShift == 0 ? part : out[u * 8 + i] | part;
      }
    add_planes<kBits - kPower, kUnits, kShift + kPower>(plane + kUnits / kPerVector * 8, out);
  }
}

template <int kBits>
void unpack(const uint8_t* codes, int64_t blocks, uint8_t* out) {
  constexpr int kUnits = 8 / (kBits & -kBits);
  for (int64_t b = 0; b < blocks; ++b) {
    alignas(64) uint64_t in[kUnits * kBits], units[kUnits * 8];
    static_assert(sizeof in == kUnits * kUnit * kBits / 8);
    memcpy(in, codes + b * sizeof in, sizeof in);
    add_planes<kBits, kUnits>(in, units);
    memcpy(out + b * sizeof units, units, sizeof units);
  }
}

// Codes [k, k + length) of a panel as units of bytes; both are multiples of the block.
inline void unpack_codes(const QuantWeight& w, int64_t panel, int64_t k, int64_t length, uint8_t* out) {
  const uint8_t* from = w.panel(panel) + k * 2 * w.bits;
  const int64_t blocks = length / w.block;
  switch (w.bits) {
    case 1: return unpack<1>(from, blocks, out);
    case 2: return unpack<2>(from, blocks, out);
    case 3: return unpack<3>(from, blocks, out);
    case 4: return unpack<4>(from, blocks, out);
    case 5: return unpack<5>(from, blocks, out);
    case 6: return unpack<6>(from, blocks, out);
    case 7: return unpack<7>(from, blocks, out);
    default: memcpy(out, from, static_cast<size_t>(length) * 16);
  }
}

// Bytes that the integer mode multiplies: the codes, or what the codebook has for them.
inline void decode_bytes(const QuantWeight& w, int64_t panel, int64_t k, int64_t length, uint8_t* out) {
  unpack_codes(w, panel, k, length, out);
  if (!w.codebook8) return;
  int64_t table[16];
  for (int i = 0; i < 16; ++i) table[i] = w.table(panel * 16 + i);
#if defined(MLC_ISA_AVX512)
  if (w.bits <= 4 && table[0] == table[15]) {
    alignas(16) uint8_t entries[16] = {};
    memcpy(entries, w.codebook8 + table[0], size_t{1} << w.bits);
    const __m512i lookup = _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(entries)));
    for (int64_t i = 0; i < length * 16; i += kUnit)
      _mm512_storeu_si512(out + i, _mm512_shuffle_epi8(lookup, _mm512_loadu_si512(out + i)));
    return;
  }
#endif
  for (int64_t u = 0; u < length * 16; u += kUnit)
    for (int i = 0; i < kUnit; ++i) out[u + i] = w.codebook8[table[i / 4] + out[u + i]];
}

#if defined(MLC_ISA_AVX512)
// Codes of at most 4 bits, kPer units a vector: a permutation of 16 floats by index looks values up, and reads only the lowest
// 4 bits of an index; the table repeats itself where codes have fewer.
template <int kPer, bool kZeros>
void look_up_units(const uint8_t* codes, int64_t vectors, __m512 table, __m512 zero, float* out) {
  for (int64_t v = 0; v < vectors; ++v) {
    const __m512i word = _mm512_loadu_si512(codes + v * kUnit);
#pragma GCC unroll 8
    for (int u = 0; u < kPer; ++u)
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const __m512i index = _mm512_srli_epi32(word, static_cast<unsigned>(8 * i + 8 / kPer * u));
        const __m512 value = _mm512_permutexvar_ps(index, table);
        _mm512_storeu_ps(out + ((v * kPer + u) * 4 + i) * 16, kZeros ? _mm512_sub_ps(value, zero) : value);
      }
  }
}
template <int kPer>
void look_up(const uint8_t* codes, int64_t vectors, __m512 table, const float* zeros, float* out) {
  if (zeros) return look_up_units<kPer, true>(codes, vectors, table, _mm512_loadu_ps(zeros), out);
  look_up_units<kPer, false>(codes, vectors, table, table, out);
}
#endif

#if defined(MLC_ISA_AVX512)
// What codes of at most 4 bits stand for, by their lowest 4 bits; zero points are left to be subtracted.
inline __m512 value_table(const QuantWeight& w, int64_t table) {
  alignas(64) float values[16];
  for (int i = 0; i < 16; ++i) {
    const int q = i & ((1 << w.bits) - 1);
    values[i] = w.codebook && !w.codebook8 ? w.codebook[table + q] : static_cast<float>(w.zeros ? q : q - w.offset);
  }
  return _mm512_load_ps(values);
}
#endif

// Values of codes [k, k + length) of a panel, before they are scaled: out (length, 16). They lie within group g.
inline void decode_floats(const QuantWeight& w, int64_t panel, int64_t k, int64_t length, int64_t g, uint8_t* bytes,
                          float* out) {
  int32_t table[16], zero[16];
  for (int i = 0; i < 16; ++i) {
    table[i] = static_cast<int32_t>(w.table(panel * 16 + i));
    zero[i] = w.codebook ? 0 : w.zeros ? w.zeros[(panel * w.groups + g) * 16 + i] : w.offset;
  }
#if defined(MLC_ISA_AVX512)
  if (w.bits <= 4 && table[0] == table[15]) {
    alignas(64) float zeros[16];
    for (int i = 0; i < 16; ++i) zeros[i] = static_cast<float>(zero[i]);
    const __m512 lookup = value_table(w, table[0]);
    const float* subtract = w.zeros ? zeros : nullptr;
    const uint8_t* from = w.panel(panel) + k * 2 * w.bits;
    const int64_t vectors = length * 2 * w.bits / kUnit;
    switch (w.bits) {
      case 4: return look_up<2>(from, vectors, lookup, subtract, out);
      case 2: return look_up<4>(from, vectors, lookup, subtract, out);
      case 1: return look_up<8>(from, vectors, lookup, subtract, out);
      default: unpack_codes(w, panel, k, length, bytes); return look_up<1>(bytes, length / 4, lookup, subtract, out);
    }
  }
#endif
  const uint8_t* units = bytes;
  if (w.bits == 8)
    units = w.panel(panel) + k * 16;
  else
    unpack_codes(w, panel, k, length, bytes);
  for (int64_t u = 0; u < length / 4; ++u) {
    float* to = out + u * kUnit;
    if (!w.codebook) {
      for (int c = 0; c < 16; c += Vec::W) {
        const IVec word = IVec::load(units + u * kUnit + 4 * c);
        const Vec minus = IVec::load(zero + c).to_float();
        (word.byte<0>().to_float() - minus).store(to + c);
        (word.byte<8>().to_float() - minus).store(to + 16 + c);
        (word.byte<16>().to_float() - minus).store(to + 32 + c);
        (word.byte<24>().to_float() - minus).store(to + 48 + c);
      }
      continue;
    }
    for (int i = 0; i < kUnit; ++i) to[i % 4 * 16 + i / 4] = w.codebook[table[i / 4] + units[u * kUnit + i]];
  }
}

}  // namespace
}  // namespace mlcore::MLC_ISA
