// Runs CUDA kernels on a CPU, one block after the other, so that a machine without a GPU can test their meaning.
//
// Every thread of a block is a fiber. Threads run in an order drawn from a seed, one at a time, until each waits at a
// barrier or is done; atomics may hand over to another thread in between, and whole warps sleep until the others can
// go no further. That exposes missing barriers: a warp may be as far ahead of its neighbours as barriers allow. Shared memory is poisoned when a block starts. The emulator stops the
// process with a message when a barrier cannot be completed, when threads of a block wait at different barriers,
// and when a kernel touches memory that does not exist (give it buffers from emulator_guarded_alloc).
//
// Not covered: the memory model inside a phase (a thread sees every earlier write), asynchronous copies, tensor cores.
// `__shared__` becomes thread_local, and a library that includes this header must have no other thread_local data:
// that is how shared variables are found and poisoned.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <tuple>

#include "machine.h"

struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
constexpr cudaError_t cudaErrorInvalidValue = 1;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __restrict__
#define __align__(n) alignas(n)
#define __launch_bounds__(...)
#define __shared__ static thread_local
#define threadIdx emulator::machine().thread
#define blockIdx emulator::machine().block
#define blockDim emulator::machine().block_size
#define gridDim emulator::machine().grid

#define QSCOPE_DYNAMIC_SHARED(name) unsigned char* const name = emulator::machine().dynamic_shared
#define QSCOPE_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)               \
  do {                                                                              \
    auto launch_arguments = std::make_tuple(__VA_ARGS__);                           \
    (void)(stream);                                                                 \
    emulator::launch((grid), (block), (shared_bytes), [=] { std::apply((kernel), launch_arguments); }); \
  } while (0)

using std::max;
using std::min;

inline void __syncthreads(int line = __builtin_LINE(), const char* file = __builtin_FILE()) {
  emulator::block_barrier(file, line);
}
inline int __syncthreads_count(int p, int line = __builtin_LINE(), const char* file = __builtin_FILE()) {
  emulator::block_barrier(file, line, p);
  return emulator::machine().count;
}
inline int __syncthreads_or(int p, int line = __builtin_LINE(), const char* file = __builtin_FILE()) {
  emulator::block_barrier(file, line, p);
  return emulator::machine().count != 0;
}
inline int __syncthreads_and(int p, int line = __builtin_LINE(), const char* file = __builtin_FILE()) {
  emulator::block_barrier(file, line, p);
  return emulator::machine().all;
}
inline void __syncwarp(uint32_t mask = ~0u, int line = __builtin_LINE()) { emulator::warp_barrier(mask, "warp", line); }

template <typename T>
T __shfl_sync(uint32_t mask, T value, int source, int width = 32, int line = __builtin_LINE()) {
  return emulator::exchange(mask, value, line, [=](auto offered, unsigned self) {
    return offered((self & ~(width - 1u)) | (static_cast<unsigned>(source) & (width - 1u)));
  });
}
template <typename T>
T __shfl_xor_sync(uint32_t mask, T value, int lanes, int width = 32, int line = __builtin_LINE()) {
  return emulator::exchange(mask, value, line, [=](auto offered, unsigned self) {
    const unsigned other = self ^ static_cast<unsigned>(lanes);
    return offered(other / width > self / width ? self : other);
  });
}
template <typename T>
T __shfl_up_sync(uint32_t mask, T value, unsigned delta, int width = 32, int line = __builtin_LINE()) {
  return emulator::exchange(mask, value, line, [=](auto offered, unsigned self) {
    return offered((self & (width - 1u)) >= delta ? self - delta : self);
  });
}
template <typename T>
T __shfl_down_sync(uint32_t mask, T value, unsigned delta, int width = 32, int line = __builtin_LINE()) {
  return emulator::exchange(mask, value, line, [=](auto offered, unsigned self) {
    return offered((self & (width - 1u)) + delta < static_cast<unsigned>(width) ? self + delta : self);
  });
}
inline uint32_t __ballot_sync(uint32_t mask, int p, int line = __builtin_LINE()) {
  const uint32_t bit = p ? 1u << (emulator::machine().current % 32) : 0u;
  return emulator::reduce(mask, bit, line, [](uint32_t a, uint32_t b) { return a | b; });
}
inline int __any_sync(uint32_t mask, int p, int line = __builtin_LINE()) { return __ballot_sync(mask, p, line) != 0; }
inline int __all_sync(uint32_t mask, int p, int line = __builtin_LINE()) { return __ballot_sync(mask, p, line) == mask; }
template <typename T>
T __reduce_add_sync(uint32_t mask, T value, int line = __builtin_LINE()) {
  return emulator::reduce(mask, value, line, [](T a, T b) { return a + b; });
}
template <typename T>
T __reduce_max_sync(uint32_t mask, T value, int line = __builtin_LINE()) {
  return emulator::reduce(mask, value, line, [](T a, T b) { return std::max(a, b); });
}
template <typename T>
T __reduce_min_sync(uint32_t mask, T value, int line = __builtin_LINE()) {
  return emulator::reduce(mask, value, line, [](T a, T b) { return std::min(a, b); });
}
inline uint32_t __reduce_or_sync(uint32_t mask, uint32_t value, int line = __builtin_LINE()) {
  return emulator::reduce(mask, value, line, [](uint32_t a, uint32_t b) { return a | b; });
}

template <typename T, typename V>
T atomicAdd(T* address, V value) {
  return emulator::atomic(address, [=](T old) { return static_cast<T>(old + value); });
}
template <typename T, typename V>
T atomicOr(T* address, V value) {
  return emulator::atomic(address, [=](T old) { return static_cast<T>(old | value); });
}
template <typename T, typename V>
T atomicMax(T* address, V value) {
  return emulator::atomic(address, [=](T old) { return std::max(old, static_cast<T>(value)); });
}
template <typename T, typename V>
T atomicMin(T* address, V value) {
  return emulator::atomic(address, [=](T old) { return std::min(old, static_cast<T>(value)); });
}

template <typename T>
T __ldg(const T* address) {
  return *address;
}
template <typename T>
T __ldcs(const T* address) {
  return *address;
}
inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// The instructions that device.cuh wraps.
namespace qscope {

inline float max_nan(float a, float b) { return a != a || b != b ? __uint_as_float(0x7fffffffu) : a > b ? a : b; }

inline float half_to_float(uint16_t bits) {
  const uint32_t sign = (bits & 0x8000u) << 16, exponent = bits >> 10 & 31, mantissa = bits & 1023;
  if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | mantissa << 13);
  if (exponent == 0) return (sign ? -1.0f : 1.0f) * std::ldexp(static_cast<float>(mantissa), -24);
  return __uint_as_float(sign | (exponent + 112) << 23 | mantissa << 13);
}

inline uint16_t float_to_half(float value) {
  if (value != value) return 0x7fff;
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const float size = std::fabs(value);
  if (size >= 65520.0f) return sign | 0x7c00;
  const int exponent = std::max(size == 0.0f ? -14 : std::ilogb(size), -14);
  // Units of the last place; adding the exponent lets a mantissa that rounds up to 2 carry into it.
  const auto units = static_cast<int>(std::nearbyint(std::ldexp(size, 10 - exponent)));
  return static_cast<uint16_t>(sign | (((exponent + 14) << 10) + units));
}

inline void prefetch_l2(const void*) {}

inline uint32_t max_nan_bf16x2(uint32_t a, uint32_t b) {
  const float high = max_nan(__uint_as_float(a & 0xffff0000u), __uint_as_float(b & 0xffff0000u));
  const float low = max_nan(__uint_as_float(a << 16), __uint_as_float(b << 16));
  return (__float_as_uint(high) & 0xffff0000u) | __float_as_uint(low) >> 16;
}

inline uint32_t max_nan_f16x2(uint32_t a, uint32_t b) {
  const float high = max_nan(half_to_float(a >> 16), half_to_float(b >> 16));
  const float low = max_nan(half_to_float(a), half_to_float(b));
  return static_cast<uint32_t>(float_to_half(high)) << 16 | float_to_half(low);
}

}  // namespace qscope

#define QSCOPE_EMULATOR_EXPORT extern "C" __attribute__((used, visibility("default"))) inline
QSCOPE_EMULATOR_EXPORT void emulator_seed(unsigned seed) { emulator::machine().seed = seed; }
QSCOPE_EMULATOR_EXPORT void* emulator_guarded_alloc(size_t bytes) { return emulator::guarded_memory(bytes); }
QSCOPE_EMULATOR_EXPORT void emulator_guarded_free(void* memory, size_t bytes) {
  emulator::guarded_release(static_cast<unsigned char*>(memory), bytes);
}
