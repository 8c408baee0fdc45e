#include "core/parallel.h"

#include <omp.h>
#if !defined(_WIN32)
#include <pthread.h>
#endif

#include <algorithm>
#include <atomic>

namespace mlcore {
namespace {

// libgomp's pool doesn't survive a fork: a child that opened a parallel region would wait for ever for the parent's threads.
std::atomic<bool> in_forked_child{false};
#if !defined(_WIN32)
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] { in_forked_child.store(true); });
#endif

}  // namespace

int num_threads() {
  if (omp_in_parallel() || in_forked_child.load(std::memory_order_relaxed)) return 1;
  return omp_get_max_threads();
}

namespace detail {

void parallel_ranges(int64_t n, int64_t grain, RangeFn fn, void* body) {
  if (n <= 0) return;
  const int64_t most = (n + std::max<int64_t>(grain, 1) - 1) / std::max<int64_t>(grain, 1);
  const int threads = static_cast<int>(std::min<int64_t>(num_threads(), most));
  if (threads <= 1) return fn(body, 0, n, 0);
#pragma omp parallel num_threads(threads)
  {
    const int64_t team = omp_get_num_threads(), me = omp_get_thread_num();
    const int64_t begin = n * me / team, end = n * (me + 1) / team;
    if (begin < end) fn(body, begin, end, static_cast<int>(me));
  }
}

void parallel_items(int64_t n, int max_threads, RangeFn fn, void* body) {
  const int threads = static_cast<int>(std::min<int64_t>({num_threads(), max_threads, n}));
  if (threads <= 1) {
    for (int64_t i = 0; i < n; ++i) fn(body, i, i + 1, 0);
    return;
  }
  std::atomic<int64_t> next{0};
#pragma omp parallel num_threads(threads)
  {
    const int me = omp_get_thread_num();
    for (int64_t i = next.fetch_add(1, std::memory_order_relaxed); i < n; i = next.fetch_add(1, std::memory_order_relaxed))
      fn(body, i, i + 1, me);
  }
}

void parallel_near_items(int64_t n, int max_threads, RangeFn fn, void* body) {
  constexpr int kMost = 64;
  const int threads = static_cast<int>(std::min<int64_t>({num_threads(), max_threads, n}));
  if (threads <= 1 || threads > kMost) return parallel_items(n, max_threads, fn, body);
  struct alignas(64) Part {
    std::atomic<int64_t> next;
    int64_t end;
  } parts[kMost];
  for (int t = 0; t < threads; ++t) parts[t].next.store(n * t / threads), parts[t].end = n * (t + 1) / threads;
#pragma omp parallel num_threads(threads)
  {
    const int me = omp_get_thread_num();
    for (int t = 0; t < threads; ++t) {
      Part& part = parts[(me + t) % threads];
      for (int64_t i = part.next.fetch_add(1, std::memory_order_relaxed); i < part.end;
           i = part.next.fetch_add(1, std::memory_order_relaxed))
        fn(body, i, i + 1, me);
    }
  }
}

}  // namespace detail
}  // namespace mlcore
