// Which instruction set the kernels use: read from the CPU once, lowered by MLCORE_ISA or set_isa(). It never exceeds what
// the machine has.
#pragma once
#include "core/status.h"

namespace mlcore {

enum class Isa { scalar = 0, avx2 = 1, avx512 = 2 };

const char* name_of(Isa isa);
Isa best_isa();                  // the highest level this machine and this build have
Isa current_isa();               // best_isa(), or what MLCORE_ISA or set_isa() asked for; throws when that can't be had
void set_isa(const char* name);  // "" returns to the default; for tests and comparisons, not while kernels run

// True when the AVX-512 kernels are compiled to emulated instructions (a build for tests on machines without AVX-512).
bool avx512_is_emulated();

// Instructions that some machines of the AVX-512 level have: kernels choose by them at run time.
enum class Extension { vnni, vpopcntdq };

bool has(Extension extension);               // the machine has it, and it is allowed
void allow(const char* extension, bool on);  // by its name, like set_isa(); to run what machines without it would

}  // namespace mlcore

// MLC_KERNEL_TABLE(Type, name) declares name, an instance of Type compiled once per ISA, and name##_now(), the current one.
#if defined(MLC_BUILD_X86)
#define MLC_KERNEL_TABLE(Type, name)         \
  namespace scalar {                         \
  extern const Type name;                    \
  }                                          \
  namespace avx2 {                           \
  extern const Type name;                    \
  }                                          \
  namespace avx512 {                         \
  extern const Type name;                    \
  }                                          \
  inline const Type& name##_now() {          \
    switch (current_isa()) {                 \
      case Isa::avx512: return avx512::name; \
      case Isa::avx2: return avx2::name;     \
      default: return scalar::name;          \
    }                                        \
  }
#else
#define MLC_KERNEL_TABLE(Type, name) \
  namespace scalar {                 \
  extern const Type name;            \
  }                                  \
  inline const Type& name##_now() {  \
    (void)current_isa();             \
    return scalar::name;             \
  }
#endif
