// What kernel sources include instead of the CUDA headers. The same kernel compiles under nvcc and, with
// QSCOPE_EMULATED defined, under a C++ compiler against the emulator: this header is the only place that differs.
#pragma once

#include <cstdint>

#ifdef QSCOPE_EMULATED
#include "../emulator/cuda_emulator.h"
#else
#include <cuda_runtime.h>

#define QSCOPE_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  (kernel)<<<(grid), (block), (shared_bytes), (stream)>>>(__VA_ARGS__)
#define QSCOPE_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]

namespace qscope {

// Larger of two values, elementwise in packed words; NaN if either is NaN.
__device__ __forceinline__ uint32_t max_nan_bf16x2(uint32_t a, uint32_t b) {
  uint32_t out;
  asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
  return out;
}

__device__ __forceinline__ uint32_t max_nan_f16x2(uint32_t a, uint32_t b) {
  uint32_t out;
  asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
  return out;
}

__device__ __forceinline__ float max_nan(float a, float b) {
  float out;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(out) : "f"(a), "f"(b));
  return out;
}

__device__ __forceinline__ float half_to_float(uint16_t bits) {
  float out;
  asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(bits));
  return out;
}

// To nearest even; exact where the value came from a half.
__device__ __forceinline__ uint16_t float_to_half(float value) {
  uint16_t out;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out) : "f"(value));
  return out;
}

__device__ __forceinline__ void prefetch_l2(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(address)));
}

}  // namespace qscope
#endif
