// A block's shared memory, for emu.cc: where it is, its poison, and what a kernel did to the bytes around it.
#pragma once
#include <link.h>

#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

namespace mlcore::emu {

struct Range {
  char* begin = nullptr;
  size_t size = 0;
  bool holds(const void* p, size_t bytes) const {
    const char* c = static_cast<const char*>(p);
    return c >= begin && c + bytes <= begin + size;
  }
};

// The TLS block that the thread-local variable at `anchor` lies in: the __shared__ arrays of its library.
inline Range tls_block_of(const void* anchor) {
  struct Search {
    const void* anchor;
    Range found;
  } search{anchor, {}};
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* data) {
        Search& s = *static_cast<Search*>(data);
        for (int i = 0; i < info->dlpi_phnum; ++i) {
          const Range tls{static_cast<char*>(info->dlpi_tls_data), info->dlpi_phdr[i].p_memsz};
          if (info->dlpi_phdr[i].p_type == PT_TLS && tls.begin != nullptr && tls.holds(s.anchor, 1)) s.found = tls;
        }
        return s.found.begin != nullptr ? 1 : 0;
      },
      &search);
  return search.found;
}

class SharedMemory {
 public:
  // Finds the static arrays (see tls_block_of) and makes room for dynamic_bytes more, whose address it returns.
  void* prepare(const void* anchor, size_t dynamic_bytes) {
    static_ = tls_block_of(anchor);
    storage_.assign(dynamic_bytes + 2 * kRedZone + kAlignment, kRedByte);
    const uintptr_t first = reinterpret_cast<uintptr_t>(storage_.data()) + kRedZone;
    dynamic_ = {reinterpret_cast<char*>((first + kAlignment - 1) / kAlignment * kAlignment), dynamic_bytes};
    return dynamic_.begin;
  }

  // Every float, half and bfloat16 of such bytes is NaN.
  void poison() {
    std::memset(dynamic_.begin, 0xff, dynamic_.size);
    if (static_.begin != nullptr) std::memset(static_.begin, 0xff, static_.size);
  }

  bool holds(const void* p, size_t bytes) const { return dynamic_.holds(p, bytes) || static_.holds(p, bytes); }

  // What was written beside dynamic shared memory; empty if nothing was.
  std::string damage() const {
    for (size_t i = 0; i < kRedZone; ++i) {
      if (dynamic_.begin[-1 - static_cast<std::ptrdiff_t>(i)] != kRedByte)
        return "wrote " + std::to_string(i + 1) + " bytes before dynamic shared memory";
      if (dynamic_.begin[dynamic_.size + i] != kRedByte)
        return "wrote byte " + std::to_string(dynamic_.size + i) + " of dynamic shared memory, which has " +
               std::to_string(dynamic_.size);
    }
    return {};
  }

 private:
  static constexpr size_t kRedZone = 1024, kAlignment = 128;
  static constexpr char kRedByte = 0x5a;

  Range static_, dynamic_;
  std::vector<char> storage_;
};

}  // namespace mlcore::emu
