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

constexpr const char* kExtensions[] = {"vnni", "vpopcntdq"};
std::atomic<bool> allowed[] = {true, true};

bool detect(Extension extension) {
#if defined(MLC_BUILD_X86)
  if (avx512_is_emulated()) return false;
  return extension == Extension::vnni ? __builtin_cpu_supports("avx512vnni") : __builtin_cpu_supports("avx512vpopcntdq");
#else
  return (void)extension, false;
#endif
}

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

bool has(Extension extension) {
  static const bool found[] = {detect(Extension::vnni), detect(Extension::vpopcntdq)};
  const int i = static_cast<int>(extension);
  return found[i] && allowed[i].load(std::memory_order_relaxed);
}

void allow(const char* extension, bool on) {
  for (int i = 0; i < 2; ++i)
    if (std::strcmp(extension, kExtensions[i]) == 0) return allowed[i].store(on);
  fail(MLC_INVALID_ARGUMENT, "extension must be vnni or vpopcntdq; got \"", extension, "\"");
}

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
