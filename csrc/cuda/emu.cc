// The scheduler behind emu.h. It is a library of its own beside the emulated kernels, so that the thread-local block of theirs
// holds shared arrays alone. A fault leaves the faulting fiber where it is and ends the launch: kernels own nothing.
#include "cuda/emu.h"

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "core/status.h"
#include "cuda/emu_fiber.h"
#include "cuda/emu_shared.h"

namespace mlcore::emu {

Now now;

namespace {

constexpr size_t kMaxSharedBytes = 227 << 10;  // of a block on sm_90

enum class State { runnable, in_barrier, in_warp, done };

struct Copy {
  char* shared;
  const char* global;
  int bytes, global_bytes, group;
};

struct Fiber {
  Context context;
  State state = State::runnable;
  uint3 thread_idx{};
  unsigned lane = 0, warp = 0;
  const char* name = nullptr;  // of the function that it waits in
  Where where{};
  unsigned mask = 0;
  void* payload = nullptr;
  Complete complete = nullptr;
  std::vector<Copy> copies;  // issued, not yet done
  int groups = 0;            // committed
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<unsigned> live_lanes, runnable_lanes;  // by warp
  std::vector<unsigned> order;                       // of warps: the first that can run does
  unsigned running = 0, live = 0, in_barrier = 0;
};

uint64_t seed_state = [] {
  const char* text = std::getenv("MLCORE_EMU_SEED");
  return text ? std::strtoull(text, nullptr, 0) : 0;
}();
StackPool stacks;
Context scheduler;
Block block;
SharedMemory shared_memory;
std::string fault_text;
const char* kernel_name = "";
void (*kernel_body)(void*) = nullptr;
void* kernel_context = nullptr;
std::mutex launch_mutex;

Fiber& running() { return block.fibers[block.running]; }

std::string name_of(const Fiber& f) {
  char text[64];
  std::snprintf(text, sizeof text, "thread (%u,%u,%u)", f.thread_idx.x, f.thread_idx.y, f.thread_idx.z);
  return text;
}

std::string place_of(const Fiber& f) {
  const char* slash = std::strrchr(f.where.file, '/');
  return std::string(f.name) + " (" + (slash ? slash + 1 : f.where.file) + ":" + std::to_string(f.where.line) + ")";
}

void set_fault(const std::string& text) {
  if (!fault_text.empty()) return;
  char at[64];
  std::snprintf(at, sizeof at, ": block (%u,%u,%u): ", now.block_idx.x, now.block_idx.y, now.block_idx.z);
  fault_text = std::string("emulated ") + kernel_name + at + text;
}

void make_runnable(unsigned i) {
  block.fibers[i].state = State::runnable;
  block.runnable_lanes[i / 32] |= 1u << i % 32;
}

template <class T>
void shuffle(std::vector<T>& v) {
  for (size_t i = v.size(); i > 1; --i) std::swap(v[i - 1], v[random_bits() % i]);
}

// Chooses the next fiber: any lane of the first warp in the order that can run. The order changes with every choice in a fair
// block and seldom in the others, where some warps get as far ahead as barriers let them: that is what finds a missing one
// (the priorities of Burckhardt et al. 2010, "A randomized scheduler with probabilistic guarantees of finding bugs").
bool choose(bool fair) {
  std::vector<unsigned>& order = block.order;
  if (fair || random_bits() % 128 == 0) std::swap(order[0], order[random_bits() % order.size()]);
  for (const unsigned warp : order) {
    unsigned& lanes = block.runnable_lanes[warp];
    if (lanes == 0) continue;
    const unsigned from = random_bits() % 32, at_or_after = lanes >> from << from;
    const unsigned lane = static_cast<unsigned>(__builtin_ctz(at_or_after ? at_or_after : lanes));
    lanes &= ~(1u << lane);
    block.running = warp * 32 + lane;
    return true;
  }
  return false;
}

void wait_here(State state, const char* name, Where where) {
  Fiber& f = running();
  f.state = state;
  f.name = name;
  f.where = where;
}

void perform(const Copy& c) {
  std::memcpy(c.shared, c.global, static_cast<size_t>(c.global_bytes));
  std::memset(c.shared + c.global_bytes, 0, static_cast<size_t>(c.bytes - c.global_bytes));
}

// Releases the barrier once every live thread is in it.
void try_barrier() {
  if (block.in_barrier == 0 || block.in_barrier < block.live) return;
  const Fiber* first = nullptr;
  for (const Fiber& f : block.fibers) {
    if (f.state != State::in_barrier) continue;
    if (first == nullptr) first = &f;
    if (f.where.line != first->where.line || std::strcmp(f.where.file, first->where.file) != 0)
      return set_fault("divergent barrier: " + name_of(*first) + " is in " + place_of(*first) + ", " + name_of(f) + " in " +
                       place_of(f));
  }
  block.in_barrier = 0;
  for (unsigned i = 0; i < block.fibers.size(); ++i)
    if (block.fibers[i].state == State::in_barrier) make_runnable(i);
}

// Completes the warp function that `asker` waits in, once every live lane of its mask waits in it.
void try_warp(const Fiber& asker) {
  const unsigned lanes = asker.mask & block.live_lanes[asker.warp], first = asker.warp * 32;
  void* payload[32] = {};
  for (unsigned lane = 0; lane < 32; ++lane) {
    if (!(lanes >> lane & 1)) continue;
    const Fiber& f = block.fibers[first + lane];
    if (f.state != State::in_warp) return;
    if (f.complete != asker.complete || f.mask != asker.mask || std::strcmp(f.name, asker.name) != 0)
      return set_fault("divergent warp: " + name_of(asker) + " is in " + place_of(asker) + ", " + name_of(f) + " in " +
                       place_of(f) + (f.mask != asker.mask ? " with another mask" : ""));
    payload[lane] = f.payload;
  }
  asker.complete(payload, lanes);
  for (unsigned lane = 0; lane < 32; ++lane)
    if (lanes >> lane & 1) make_runnable(first + lane);
}

void leave(Fiber& f) {
  f.state = State::done;
  f.copies.clear();
  --block.live;
  block.live_lanes[f.warp] &= ~(1u << f.lane);
  try_barrier();
  for (unsigned lane = 0, i = f.warp * 32; lane < 32 && i < block.fibers.size(); ++lane, ++i)
    if (block.fibers[i].state == State::in_warp) try_warp(block.fibers[i]);
}

void fiber_main() {
  kernel_body(kernel_context);
  leave(running());
  running().context.switch_to(scheduler);
  std::abort();
}

std::string deadlock_text() {
  std::string text = "deadlock:";
  int named = 0;
  const Fiber* last = nullptr;
  for (const Fiber& f : block.fibers) {
    if (f.state == State::done) continue;
    if (last && last->state == f.state && last->where.line == f.where.line && last->name == f.name) continue;
    if (++named > 4) return text + " ...";
    text += (last ? "; " : " ") + name_of(f) + " waits in " + place_of(f);
    last = &f;
  }
  if (block.live < block.fibers.size())
    text += "; " + std::to_string(block.fibers.size() - block.live) + " threads have returned";
  return text;
}

void run_block(dim3 size) {
  const unsigned threads = size.x * size.y * size.z;
  const unsigned warps = (threads + 31) / 32;
  block.fibers.resize(threads);
  block.live = threads;
  block.in_barrier = 0;
  block.live_lanes.assign(warps, 0);
  block.runnable_lanes.assign(warps, 0);
  block.order.resize(warps);
  for (unsigned w = 0; w < warps; ++w) block.order[w] = w;
  shuffle(block.order);
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& f = block.fibers[i];
    f.context.start(stacks.get(i), fiber_main);
    f.thread_idx = {i % size.x, i / size.x % size.y, i / (size.x * size.y)};
    f.lane = i % 32;
    f.warp = i / 32;
    f.copies.clear();
    f.groups = 0;
    block.live_lanes[f.warp] |= 1u << f.lane;
    make_runnable(i);
  }
  const bool fair = random_bits() & 1;
  while (fault_text.empty() && choose(fair)) {
    Fiber& f = running();
    now.thread_idx = f.thread_idx;
    now.lane = f.lane;
    scheduler.switch_to(f.context);
  }
  if (fault_text.empty() && block.live > 0) set_fault(deadlock_text());
}

}  // namespace

uint64_t random_bits() {  // splitmix64
  uint64_t z = (seed_state += 0x9e3779b97f4a7c15u);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

void fault(const char* format, ...) {
  char text[512];
  va_list args;
  va_start(args, format);
  std::vsnprintf(text, sizeof text, format, args);
  va_end(args);
  set_fault(name_of(running()) + ": " + text);
  running().context.switch_to(scheduler);
  std::abort();
}

void block_barrier(Where where) {
  wait_here(State::in_barrier, "__syncthreads", where);
  ++block.in_barrier;
  try_barrier();
  running().context.switch_to(scheduler);
}

void warp_meet(const char* name, unsigned mask, void* payload, Complete complete, Where where) {
  Fiber& f = running();
  if (!(mask >> f.lane & 1)) fault("%s: lane %u is not in its own mask 0x%08x", name, f.lane, mask);
  wait_here(State::in_warp, name, where);
  f.mask = mask;
  f.payload = payload;
  f.complete = complete;
  try_warp(f);
  f.context.switch_to(scheduler);
}

void complete_vote(Vote* const (&p)[32], unsigned lanes) {
  unsigned ballot = 0;
  for (int lane = 0; lane < 32; ++lane)
    if (lanes >> lane & 1) ballot |= static_cast<unsigned>(p[lane]->predicate) << lane;
  for (int lane = 0; lane < 32; ++lane)
    if (lanes >> lane & 1) p[lane]->ballot = ballot, p[lane]->lanes = lanes;
}

void check_shared(const char* what, const void* p, size_t bytes, size_t alignment) {
  if (!shared_memory.holds(p, bytes)) fault("%s: %p is not in shared memory", what, p);
  if (reinterpret_cast<uintptr_t>(p) % alignment) fault("%s: shared address %p is no multiple of %zu", what, p, alignment);
}

void copy_async(void* shared, const void* global, int bytes, int global_bytes) {
  check_shared("cp_async", shared, static_cast<size_t>(bytes), static_cast<size_t>(bytes));
  if (reinterpret_cast<uintptr_t>(global) % static_cast<unsigned>(bytes))
    fault("cp_async: global address %p is no multiple of %d", global, bytes);
  if (global_bytes < 0 || global_bytes > bytes) fault("cp_async: source size %d is outside [0, %d]", global_bytes, bytes);
  const Copy copy{static_cast<char*>(shared), static_cast<const char*>(global), bytes, global_bytes, running().groups};
  if (random_bits() & 1)
    perform(copy);
  else
    running().copies.push_back(copy);
}

void copy_async_commit() { ++running().groups; }

void copy_async_wait(int groups_left) {
  Fiber& f = running();
  size_t done = 0;
  while (done < f.copies.size() && f.copies[done].group < f.groups - groups_left) perform(f.copies[done++]);
  f.copies.erase(f.copies.begin(), f.copies.begin() + static_cast<std::ptrdiff_t>(done));
}

void launch(const char* name, dim3 grid, dim3 size, size_t dynamic_smem, const void* anchor, void (*body)(void*),
            void* context) {
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z, threads = uint64_t{size.x} * size.y * size.z;
  if (blocks == 0 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535 || threads == 0 || threads > 1024 || size.z > 64)
    fail(MLC_RUNTIME_ERROR, "emulated ", name, ": invalid configuration: grid (", grid.x, ",", grid.y, ",", grid.z,
         "), block (", size.x, ",", size.y, ",", size.z, ")");
  require(dynamic_smem <= kMaxSharedBytes, "emulated ", name, ": ", dynamic_smem,
          " bytes of shared memory; a block has at most ", kMaxSharedBytes);
  const std::lock_guard<std::mutex> lock(launch_mutex);
  kernel_name = name;
  kernel_body = body;
  kernel_context = context;
  fault_text.clear();
  now.block_dim = size;
  now.grid_dim = grid;
  now.dynamic_smem = shared_memory.prepare(anchor, dynamic_smem);
  std::vector<uint64_t> order(blocks);
  for (uint64_t i = 0; i < blocks; ++i) order[i] = i;
  shuffle(order);
  for (const uint64_t b : order) {
    now.block_idx = {static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                     static_cast<unsigned>(b / (uint64_t{grid.x} * grid.y))};
    shared_memory.poison();
    run_block(size);
    const std::string damage = shared_memory.damage();
    if (!damage.empty()) set_fault(damage);
    if (!fault_text.empty()) fail(MLC_RUNTIME_ERROR, fault_text);
  }
}

}  // namespace mlcore::emu

extern "C" {

MLC_EXPORT void mlc_emu_set_seed(uint64_t seed) { mlcore::emu::seed_state = seed; }

// GCC's -fsanitize=bounds,alignment call these; the first field of their data is the place in the source.
struct MlcEmuSourcePlace {
  const char* file;
  uint32_t line, column;
};
MLC_EXPORT void __ubsan_handle_out_of_bounds(const MlcEmuSourcePlace* at, unsigned long index) {
  mlcore::emu::fault("index %ld is outside the array (%s:%u)", static_cast<long>(index), at->file, at->line);
}
MLC_EXPORT void __ubsan_handle_type_mismatch_v1(const MlcEmuSourcePlace* at, unsigned long pointer) {
  mlcore::emu::fault("address %#lx is misaligned for its type (%s:%u)", pointer, at->file, at->line);
}

}  // extern "C"
