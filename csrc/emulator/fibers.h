// Stack switching for the emulator: every CUDA thread of a block is a fiber on its own stack.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

#if defined(__x86_64__) && !defined(QSCOPE_EMULATOR_UCONTEXT)
#define QSCOPE_EMULATOR_ASSEMBLY
#else
#include <ucontext.h>
#endif

namespace emulator {

constexpr size_t STACK_BYTES = 128 * 1024;
constexpr unsigned MAX_THREADS = 1024;

[[noreturn]] inline void fail(const char* message) {
  std::fprintf(stderr, "emulator: %s\n", message);
  std::fflush(stderr);
  std::abort();
}

inline char* stack_of(unsigned thread) {
  static char* pool = nullptr;
  if (!pool) {
    void* memory = mmap(nullptr, STACK_BYTES * MAX_THREADS, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) fail("no memory for the stacks of a block's threads");
    pool = static_cast<char*>(memory);
  }
  return pool + STACK_BYTES * thread;
}

#ifdef QSCOPE_EMULATOR_ASSEMBLY
// swapcontext would make a system call per switch; a test makes millions of switches.
__attribute__((naked, noinline)) inline void switch_stack(void** /*from*/, void* /*to*/) {
  asm(R"(
    push %rbp
    push %rbx
    push %r12
    push %r13
    push %r14
    push %r15
    mov %rsp, (%rdi)
    mov %rsi, %rsp
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbx
    pop %rbp
    ret)");
}

struct Context {
  void* stack_pointer = nullptr;

  void start_at(void (*entry)(), char* stack) {
    auto top = reinterpret_cast<uintptr_t>(stack + STACK_BYTES - 64) & ~uintptr_t{15};
    auto* word = reinterpret_cast<uint64_t*>(top);
    *--word = 0;  // keeps the stack aligned as after a call
    *--word = reinterpret_cast<uint64_t>(entry);
    for (int saved = 0; saved < 6; ++saved) *--word = 0;
    stack_pointer = word;
  }
  void switch_to(Context& other) { switch_stack(&stack_pointer, other.stack_pointer); }
};
#else
struct Context {
  ucontext_t state;

  void start_at(void (*entry)(), char* stack) {
    getcontext(&state);
    state.uc_stack.ss_sp = stack;
    state.uc_stack.ss_size = STACK_BYTES;
    state.uc_link = nullptr;
    makecontext(&state, entry, 0);
  }
  void switch_to(Context& other) { swapcontext(&state, &other.state); }
};
#endif

}  // namespace emulator
