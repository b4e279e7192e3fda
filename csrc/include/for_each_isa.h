// Includes QSCOPE_BODY once per instruction set, each time inside its own namespace and with that set enabled, so
// that a kernel is written once. The body must have included every standard header before (their inline functions
// must not be compiled for a set that the machine may lack): they stand in vec16_common.h.
#include "vec16_common.h"

#define QSCOPE_ISA 0
namespace qscope::portable {
#include "vec16.h"
#include QSCOPE_BODY
}  // namespace qscope::portable
#undef QSCOPE_ISA

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#define QSCOPE_ISA 1
namespace qscope::avx2 {
#include "vec16.h"
#include QSCOPE_BODY
}  // namespace qscope::avx2
#undef QSCOPE_ISA
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx2,fma,f16c")
#endif
#define QSCOPE_ISA 2
namespace qscope::avx512 {
#include "vec16.h"
#include QSCOPE_BODY
}  // namespace qscope::avx512
#undef QSCOPE_ISA
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // __x86_64__
#undef QSCOPE_BODY
