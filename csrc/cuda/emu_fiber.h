// Stacks and the switch between them, for emu.cc. On x86-64 a switch saves seven registers; elsewhere it is ucontext's.
#pragma once
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <new>
#include <vector>

#if !defined(__x86_64__) || defined(MLC_EMU_UCONTEXT)
#define MLC_EMU_USE_UCONTEXT 1
#include <ucontext.h>
#endif

namespace mlcore::emu {

constexpr size_t kStackBytes = 128 << 10;

// Stacks with an unmapped page below each, kept for the life of the process.
class StackPool {
 public:
  char* get(size_t i) {
    while (stacks_.size() <= i) {
      const size_t guard = static_cast<size_t>(sysconf(_SC_PAGESIZE));
      void* p = mmap(nullptr, kStackBytes + guard, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (p == MAP_FAILED || mprotect(p, guard, PROT_NONE) != 0) throw std::bad_alloc();
      stacks_.push_back(static_cast<char*>(p) + guard);
    }
    return stacks_[i];
  }

 private:
  std::vector<char*> stacks_;
};

#ifdef MLC_EMU_USE_UCONTEXT

class Context {
 public:
  void start(char* stack, void (*entry)()) {
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack;
    context_.uc_stack.ss_size = kStackBytes;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
  }
  void switch_to(Context& to) { swapcontext(&context_, &to.context_); }

 private:
  ucontext_t context_;
};

#else

// Pushes the callee-saved registers, keeps the stack pointer in *from, and goes on where `to` was kept.
__attribute__((naked, noinline)) inline void switch_stack(void** /*from*/, void* /*to*/) {
  asm volatile(
      "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret");
}

class Context {
 public:
  void start(char* stack, void (*entry)()) {
    void** top = reinterpret_cast<void**>(stack + kStackBytes);
    *--top = nullptr;  // entry's return address, never used; after `ret` the stack is aligned as at a call
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    sp_ = top;
  }
  void switch_to(Context& to) { switch_stack(&sp_, to.sp_); }

 private:
  void* sp_ = nullptr;
};

#endif

}  // namespace mlcore::emu
