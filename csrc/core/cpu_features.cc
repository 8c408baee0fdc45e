#include "core/cpu_features.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

namespace mlcore {
namespace {

constexpr Isa kAll[] = {Isa::scalar, Isa::avx2, Isa::avx512};

Isa detect() {
#if defined(MLC_BUILD_X86)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx2 && (avx512 || avx512_is_emulated())) return Isa::avx512;
  if (avx2) return Isa::avx2;
#endif
  return Isa::scalar;
}

Isa parse(const char* name, const char* source) {
  for (Isa isa : kAll) {
    if (std::strcmp(name, name_of(isa)) != 0) continue;
    if (isa > best_isa()) fail(MLC_UNSUPPORTED, source, "=", name, ": this machine's highest level is ", name_of(best_isa()));
    return isa;
  }
  fail(MLC_INVALID_ARGUMENT, source, " must be scalar, avx2 or avx512; got \"", name, "\"");
}

constexpr int kUnset = -1;
std::atomic<int> chosen{kUnset};
std::atomic<bool> vpopcntdq_allowed{true};

}  // namespace

const char* name_of(Isa isa) {
  constexpr const char* names[] = {"scalar", "avx2", "avx512"};
  return names[static_cast<int>(isa)];
}

bool avx512_is_emulated() {
#if defined(MLC_EMULATE_AVX512)
  return true;
#else
  return false;
#endif
}

bool has_vpopcntdq() {
#if defined(MLC_BUILD_X86)
  static const bool has = __builtin_cpu_supports("avx512vpopcntdq") && !avx512_is_emulated();
  return has && vpopcntdq_allowed.load(std::memory_order_relaxed);
#else
  return false;
#endif
}

void allow_vpopcntdq(bool allow) { vpopcntdq_allowed.store(allow); }

Isa best_isa() {
  static const Isa best = detect();
  return best;
}

Isa current_isa() {
  int isa = chosen.load(std::memory_order_relaxed);
  if (isa == kUnset) {
    const char* asked = std::getenv("MLCORE_ISA");
    isa = static_cast<int>(asked && *asked ? parse(asked, "MLCORE_ISA") : best_isa());
    chosen.store(isa, std::memory_order_relaxed);
  }
  return static_cast<Isa>(isa);
}

void set_isa(const char* name) {
  chosen.store(*name ? static_cast<int>(parse(name, "isa")) : kUnset, std::memory_order_relaxed);
}

}  // namespace mlcore
