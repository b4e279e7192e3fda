// Element types and the standard headers that the per-instruction-set kernels use.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "toplist.h"

#define QSCOPE_INLINE inline __attribute__((always_inline))
#define QSCOPE_UNROLL _Pragma("GCC unroll 32")

namespace qscope {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

QSCOPE_INLINE float from_bits(uint32_t u) {
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

QSCOPE_INLINE uint32_t to_bits(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  return u;
}

QSCOPE_INLINE float widen(float v) { return v; }
QSCOPE_INLINE float widen(bf16 v) { return from_bits(uint32_t{v.bits} << 16); }
QSCOPE_INLINE float widen(f16 v) {
  const uint32_t magnitude = uint32_t{v.bits & 0x7fffu} << 13;
  const uint32_t sign = uint32_t{v.bits & 0x8000u} << 16;
  if (magnitude >= 0x0f800000u) return from_bits(sign | magnitude | 0x7f800000u);  // infinity and NaN
  return from_bits(sign | to_bits(from_bits(magnitude) * 0x1p112f));              // exact, subnormals included
}

// Rounds to nearest even, as torch does.
QSCOPE_INLINE void narrow(float v, float* out) { *out = v; }
QSCOPE_INLINE void narrow(float v, bf16* out) {
  const uint32_t u = to_bits(v);
  out->bits = v != v ? 0x7fc0 : static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}
QSCOPE_INLINE void narrow(float v, f16* out) {
  const uint32_t u = to_bits(v), sign = (u >> 16) & 0x8000u;
  const float magnitude = std::fabs(v);
  uint32_t bits;
  if (v != v) {
    bits = 0x7e00u;
  } else if (magnitude >= 65520.0f) {
    bits = 0x7c00u;
  } else if (magnitude < 0x1p-14f) {
    bits = to_bits(magnitude + 0.5f) - to_bits(0.5f);  // the addition rounds at the subnormal step 2^-24
  } else {
    const uint32_t m = to_bits(magnitude);
    bits = (m - 0x38000000u + 0xfffu + ((m >> 13) & 1u)) >> 13;
  }
  out->bits = static_cast<uint16_t>(sign | bits);
}

}  // namespace qscope
