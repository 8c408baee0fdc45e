// Memory that a kernel is about to fill for the first time: the kernel of the operating system hands it out page by page.
#pragma once
#include <cstddef>
#include <cstdint>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace mlcore {

constexpr size_t kHugePage = size_t{2} << 20;

// Asks for huge pages in [data, data + bytes). Outputs of several MiB come as fresh pages, and 6,000 page faults of 4 KiB took
// longer than the convolution that met them; smaller outputs come from memory that was used before.
inline void prefer_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (bytes < 2 * kHugePage) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kHugePage * kHugePage;
  if (begin < end) (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace mlcore
