// Working memory of kernels on the CPU: one growing 64-byte aligned block per thread, kept between calls so that a call
// doesn't pay for fresh pages. Blocks above kKeepBytes are returned when the call ends (release_scratch()).
#pragma once
#include <cstddef>
#include <cstdlib>
#include <new>

#include "core/pages.h"

namespace mlcore {

class Scratch {
 public:
  static constexpr size_t kKeepBytes = size_t{32} << 20;

  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(block_); }

  // At least `floats` floats, contents undefined; valid until the next call. Throws std::bad_alloc.
  float* floats(size_t floats) {
    const size_t wanted = floats * sizeof(float), page = wanted < 2 * kHugePage ? 4096 : kHugePage;
    const size_t bytes = (wanted + page - 1) / page * page;
    if (bytes > bytes_) {
      std::free(block_);
      bytes_ = 0;
      block_ = std::aligned_alloc(page, bytes);
      if (block_ == nullptr) throw std::bad_alloc();
      bytes_ = bytes;
      prefer_huge_pages(block_, bytes);
    }
    return static_cast<float*>(block_);
  }
  void release_if_large() {
    if (bytes_ <= kKeepBytes) return;
    std::free(block_);
    block_ = nullptr;
    bytes_ = 0;
  }

 private:
  void* block_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace mlcore
