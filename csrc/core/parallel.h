// Loops over threads. Only parallel.cc knows OpenMP; it is the runtime that torch loaded, so torch.set_num_threads governs
// these loops. Bodies must not throw and must not nest parallel loops. No result may depend on the number of threads.
#pragma once
#include <cstdint>
#include <type_traits>

namespace mlcore {

int num_threads();

namespace detail {
using RangeFn = void (*)(void* body, int64_t begin, int64_t end, int thread);
void parallel_ranges(int64_t n, int64_t grain, RangeFn fn, void* body);
void parallel_items(int64_t n, int threads, RangeFn fn, void* body);
void parallel_near_items(int64_t n, int threads, RangeFn fn, void* body);
}  // namespace detail

// body(begin, end): [0, n) in one contiguous range per thread. Ranges of fewer than grain items are not split further.
template <class F>
void parallel_for(int64_t n, int64_t grain, F&& body) {
  using Body = std::remove_reference_t<F>;
  detail::parallel_ranges(
      n, grain, [](void* b, int64_t begin, int64_t end, int) { (*static_cast<Body*>(b))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

// body(item, thread): threads claim items one by one in increasing order, so an item may wait for one with a smaller number.
// At most max_threads take part; thread < max_threads.
template <class F>
void parallel_claim(int64_t n, int max_threads, F&& body) {
  using Body = std::remove_reference_t<F>;
  detail::parallel_items(
      n, max_threads, [](void* b, int64_t item, int64_t, int thread) { (*static_cast<Body*>(b))(item, thread); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

// The same, but a thread begins with a contiguous part of the items and helps the others when it is done: what neighbouring
// items share, and what the same part of an earlier loop left in this core's caches, is found there. Items are in no order.
template <class F>
void parallel_near(int64_t n, int max_threads, F&& body) {
  using Body = std::remove_reference_t<F>;
  detail::parallel_near_items(
      n, max_threads, [](void* b, int64_t item, int64_t, int thread) { (*static_cast<Body*>(b))(item, thread); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

}  // namespace mlcore
