// The emulated multiprocessor: fibers for the threads of a block, their scheduler and barriers; see cuda_emulator.h.
#pragma once

#include <link.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <vector>

#include "fibers.h"

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace emulator {

constexpr unsigned WARP = 32;
constexpr unsigned char POISON = 0xA5;

enum class Wait { none, block, warp };

struct Fiber {
  Context context;
  bool done = false;
  Wait wait = Wait::none;
  uint32_t mask = 0;        // lanes of a warp barrier
  const char* site = "";    // which barrier
  int line = 0;
  int predicate = 0;        // for __syncthreads_count and its kin
};

struct Machine {
  std::vector<Fiber> fibers;
  Context scheduler;
  std::function<void()> kernel;
  unsigned current = 0, threads = 0;
  uint32_t seed = 1;
  dim3 thread, block, block_size, grid;
  unsigned char* dynamic_shared = nullptr;
  uint64_t exchange[MAX_THREADS] = {};  // what each lane offers to its warp
  int count = 0, all = 0;               // results of the last block barrier

  uint32_t random() {
    seed = seed * 1664525u + 1013904223u;
    return seed >> 8;
  }
};

inline Machine& machine() {
  static Machine the_machine;
  return the_machine;
}

[[noreturn]] inline void fail_at(const char* what) {
  const Machine& m = machine();
  char text[512];
  std::snprintf(text, sizeof text, "%s (block %u,%u,%u, thread %u of %u)", what, m.block.x, m.block.y, m.block.z,
                m.current, m.threads);
  fail(text);
}

inline void hand_over() { machine().fibers[machine().current].context.switch_to(machine().scheduler); }

inline void select_thread(unsigned i) {
  Machine& m = machine();
  m.current = i;
  m.thread = dim3(i % m.block_size.x, i / m.block_size.x % m.block_size.y, i / (m.block_size.x * m.block_size.y));
}

inline void fiber_main() {
  machine().kernel();
  machine().fibers[machine().current].done = true;
  hand_over();
  fail("a finished thread was resumed");
}

inline void block_barrier(const char* site, int line, int predicate = 0) {
  Fiber& self = machine().fibers[machine().current];
  self.wait = Wait::block;
  self.site = site;
  self.line = line;
  self.predicate = predicate;
  hand_over();
}

inline void warp_barrier(uint32_t mask, const char* site, int line) {
  Fiber& self = machine().fibers[machine().current];
  if (!(mask >> (machine().current % WARP) & 1)) fail_at("a lane waits at a warp barrier whose mask leaves it out");
  self.wait = Wait::warp;
  self.mask = mask;
  self.site = site;
  self.line = line;
  hand_over();
}

// Another thread may run between two atomics of this one.
inline void maybe_preempt() {
  if (machine().random() % 4 == 0) hand_over();
}

inline bool same_barrier(const Fiber& a, const Fiber& b) {
  return a.wait == b.wait && a.mask == b.mask && a.line == b.line && std::strcmp(a.site, b.site) == 0;
}

// Lets go the warp barriers at which every lane of the mask has arrived.
inline bool release_warps() {
  Machine& m = machine();
  bool released = false;
  for (unsigned i = 0; i < m.threads; ++i) {
    if (m.fibers[i].done || m.fibers[i].wait != Wait::warp) continue;
    const Fiber arrived = m.fibers[i];
    const unsigned base = i / WARP * WARP;
    bool complete = true;
    for (unsigned lane = 0; lane < WARP && complete; ++lane) {
      if (!(arrived.mask >> lane & 1)) continue;
      if (base + lane >= m.threads || m.fibers[base + lane].done) {
        select_thread(i);
        fail_at("a warp barrier names a lane that does not exist or has returned");
      }
      complete = same_barrier(m.fibers[base + lane], arrived);
    }
    if (!complete) continue;
    for (unsigned lane = 0; lane < WARP; ++lane) {
      if (arrived.mask >> lane & 1) m.fibers[base + lane].wait = Wait::none;
    }
    released = true;
  }
  return released;
}

// All threads stand still: let go the block barrier, or say why it cannot be completed.
inline void release_block() {
  Machine& m = machine();
  m.count = 0;
  const Fiber* first = nullptr;
  for (unsigned i = 0; i < m.threads; ++i) {
    Fiber& fiber = m.fibers[i];
    select_thread(i);
    if (fiber.done) fail_at("deadlock: this thread has returned while others wait at a barrier");
    if (fiber.wait == Wait::warp) fail_at("deadlock: this thread waits for its warp, others for the block");
    if (!first) first = &fiber;
    if (!same_barrier(*first, fiber)) {
      char text[256];
      std::snprintf(text, sizeof text, "barrier divergence: lines %d and %d", first->line, fiber.line);
      fail_at(text);
    }
    m.count += fiber.predicate != 0;
  }
  m.all = m.count == static_cast<int>(m.threads);
  for (Fiber& fiber : m.fibers) fiber.wait = Wait::none;
}

inline void shuffle(std::vector<unsigned>& order) {
  for (size_t i = order.size() - 1; i > 0; --i) std::swap(order[i], order[machine().random() % (i + 1)]);
}

// Puts some warps to sleep until the others can do no more: barriers apart, warps may drift as far as that.
inline void choose_sleepers(std::vector<char>& asleep) {
  const unsigned warps = static_cast<unsigned>(asleep.size()), one = machine().random() % warps;
  const unsigned kind = machine().random() % 3;
  for (unsigned warp = 0; warp < warps; ++warp) {
    asleep[warp] = kind == 0 ? warp == one : kind == 1 ? warp != one : machine().random() % 2;
  }
}

inline void run_block() {
  Machine& m = machine();
  m.fibers.assign(m.threads, Fiber{});
  std::vector<unsigned> order(m.threads);
  for (unsigned i = 0; i < m.threads; ++i) {
    m.fibers[i].context.start_at(fiber_main, stack_of(i));
    order[i] = i;
  }
  std::vector<char> asleep((m.threads + WARP - 1) / WARP);
  bool anyone_asleep = false;
  while (true) {
    shuffle(order);
    bool ran = false;
    for (unsigned i : order) {
      Fiber& fiber = m.fibers[i];
      if (fiber.done || fiber.wait != Wait::none || asleep[i / WARP]) continue;
      select_thread(i);
      m.scheduler.switch_to(fiber.context);
      ran = true;
    }
    if (!release_warps() && !ran) {
      if (anyone_asleep) {
        std::fill(asleep.begin(), asleep.end(), 0);
        anyone_asleep = false;
        continue;
      }
      if (std::all_of(m.fibers.begin(), m.fibers.end(), [](const Fiber& f) { return f.done; })) return;
      release_block();
    }
    if (!anyone_asleep && m.random() % 3 == 0) {
      choose_sleepers(asleep);
      anyone_asleep = true;
    }
  }
}

// Finds the thread-local data of the library that holds this code, that is its shared variables.
inline int poison_if_ours(dl_phdr_info* info, size_t, void*) {
  const auto here = reinterpret_cast<uintptr_t>(&poison_if_ours);
  bool ours = false;
  size_t bytes = 0;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& segment = info->dlpi_phdr[i];
    const uintptr_t start = info->dlpi_addr + segment.p_vaddr;
    if (segment.p_type == PT_LOAD && here >= start && here < start + segment.p_memsz) ours = true;
    if (segment.p_type == PT_TLS) bytes = segment.p_memsz;
  }
  if (ours && info->dlpi_tls_data) std::memset(info->dlpi_tls_data, POISON, bytes);
  return ours;
}

// Memory that ends at an inaccessible page (the first byte has one before it when bytes is a multiple of a page).
inline unsigned char* guarded_memory(size_t bytes) {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  const size_t body = (bytes + page - 1) / page * page;
  void* memory = mmap(nullptr, body + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) fail("no memory for a guarded buffer");
  auto* start = static_cast<unsigned char*>(memory) + page;
  if (body && mprotect(start, body, PROT_READ | PROT_WRITE)) fail("cannot open a guarded buffer");
  return start + (body - bytes);
}

inline void guarded_release(unsigned char* memory, size_t bytes) {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  const size_t body = (bytes + page - 1) / page * page;
  munmap(memory - (body - bytes) - page, body + 2 * page);
}

inline void on_fault(int, siginfo_t*, void*) { fail_at("out of bounds: a kernel touched memory outside its buffers"); }

// Kernels of one library are launched from one thread at a time.
template <typename Kernel>
void launch(dim3 grid, dim3 block, size_t shared_bytes, Kernel kernel) {
  Machine& m = machine();
  m.grid = grid;
  m.block_size = block;
  m.threads = block.x * block.y * block.z;
  if (m.threads == 0 || m.threads > MAX_THREADS) fail("a block has 1 to 1024 threads");
  m.kernel = kernel;
  struct sigaction ours = {}, before_segv, before_bus;
  ours.sa_sigaction = on_fault;
  ours.sa_flags = SA_SIGINFO;
  sigaction(SIGSEGV, &ours, &before_segv);
  sigaction(SIGBUS, &ours, &before_bus);
  const size_t rounded = (shared_bytes + 15) / 16 * 16;
  m.dynamic_shared = guarded_memory(rounded);
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        m.block = dim3(x, y, z);
        std::memset(m.dynamic_shared, POISON, rounded);
        dl_iterate_phdr(poison_if_ours, nullptr);
        run_block();
      }
    }
  }
  guarded_release(m.dynamic_shared, rounded);
  sigaction(SIGSEGV, &before_segv, nullptr);
  sigaction(SIGBUS, &before_bus, nullptr);
}

// One warp instruction: every lane of the mask offers a value, then reads what it wants from the others.
template <typename T, typename Read>
auto exchange(uint32_t mask, T value, int line, Read read) {
  static_assert(sizeof(T) <= 8, "a lane exchanges at most 64 bits");
  Machine& m = machine();
  const unsigned base = m.current / WARP * WARP;
  std::memcpy(&m.exchange[m.current], &value, sizeof(T));
  warp_barrier(mask, "offer", line);
  const auto offered = [&m, base](unsigned lane) {
    T other;
    std::memcpy(&other, &m.exchange[base + lane], sizeof(T));
    return other;
  };
  auto result = read(offered, m.current % WARP);
  warp_barrier(mask, "taken", line);
  return result;
}

template <typename T, typename Combine>
T reduce(uint32_t mask, T value, int line, Combine combine) {
  return exchange(mask, value, line, [&](auto offered, unsigned self) {
    T total = offered(self);
    for (unsigned lane = 0; lane < WARP; ++lane) {
      if (lane != self && (mask >> lane & 1)) total = combine(total, offered(lane));
    }
    return total;
  });
}

template <typename T, typename Update>
T atomic(T* address, Update update) {
  maybe_preempt();
  const T before = *address;
  *address = update(before);
  maybe_preempt();
  return before;
}

}  // namespace emulator
