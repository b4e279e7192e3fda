// Which instruction set the CPU kernels use, chosen at run time so that one library serves every machine.
#pragma once

#include <atomic>

namespace qscope {

enum class Isa : int { kPortable = 0, kAvx2 = 1, kAvx512 = 2 };

inline Isa best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (avx2 && __builtin_cpu_supports("avx512f")) return Isa::kAvx512;
  if (avx2) return Isa::kAvx2;
#endif
  return Isa::kPortable;
}

// Tests lower it to compare the paths; it is never raised above best_isa().
extern std::atomic<int> isa_in_use;

inline Isa isa() { return static_cast<Isa>(isa_in_use.load(std::memory_order_relaxed)); }

}  // namespace qscope

// Calls NAMESPACE::expression for the instruction set in use.
#if defined(__x86_64__)
#define QSCOPE_DISPATCH(call)                                \
  (qscope::isa() == qscope::Isa::kAvx512 ? qscope::avx512::call \
   : qscope::isa() == qscope::Isa::kAvx2 ? qscope::avx2::call   \
                                         : qscope::portable::call)
#else
#define QSCOPE_DISPATCH(call) qscope::portable::call
#endif
