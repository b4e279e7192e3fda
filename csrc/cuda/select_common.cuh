// Parts of an exact row selection that several kernels share: the order of candidates, score types, the k-th
// largest of keys held by a block, the sort of a candidate list and the final write.
//
// Order: value descending, then lowest column; -0 equals +0. A candidate is one 64-bit word, order key of the value
// above, complement of the column below, so that "larger word" is "earlier in the result" and no two are equal.
#pragma once

#include "device.cuh"

namespace qscope {

constexpr int WARP = 32;
constexpr uint32_t ALL_LANES = 0xffffffffu;

__device__ __forceinline__ float quiet_nan() { return __uint_as_float(0x7fc00000u); }

// Order-preserving: a < b implies order_key(a) < order_key(b), and both zeros have one key. Not for NaN.
// Every key of a number is larger than 0, so 0 can stand for "nothing".
__device__ __forceinline__ uint32_t order_key(float value) {
  const uint32_t bits = __float_as_uint(value + 0.0f);  // -0 + +0 is +0
  return (bits >> 31) ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float key_value(uint32_t key) {
  return __uint_as_float((key >> 31) ? key & 0x7fffffffu : ~key);
}

// The largest float below a number; NaN for minus infinity. The key between the zeros' and the next one is unused.
__device__ __forceinline__ float just_below(float value) {
  const uint32_t key = order_key(value);
  return key_value(key - (key == 0x80000000u ? 2 : 1));
}

__device__ __forceinline__ uint64_t candidate(float value, uint32_t column) {
  return (static_cast<uint64_t>(order_key(value)) << 32) | static_cast<uint32_t>(~column);
}

__device__ __forceinline__ float candidate_value(uint64_t item) { return key_value(static_cast<uint32_t>(item >> 32)); }

__device__ __forceinline__ uint32_t candidate_column(uint64_t item) { return ~static_cast<uint32_t>(item); }

// Score types. A 32-bit word holds LANES of them; `lane` reads one, `word_max` is elementwise and keeps NaN,
// MINUS_INF fills a word. The EQUAL_BITS lowest bits of a value's order key are all equal: a search may skip them.
struct Float32 {
  using Storage = float;
  static constexpr int LANES = 1;
  static constexpr int EQUAL_BITS = 0;
  static constexpr uint32_t MINUS_INF = 0xff800000u;
  static __device__ __forceinline__ float lane(uint32_t word, int) { return __uint_as_float(word); }
  static __device__ __forceinline__ uint32_t word_max(uint32_t a, uint32_t b) {
    return __float_as_uint(max_nan(__uint_as_float(a), __uint_as_float(b)));
  }
  static __device__ __forceinline__ uint32_t bits(Storage value) { return __float_as_uint(value); }
  static __device__ __forceinline__ Storage store(float value) { return value; }
};

struct Float16 {
  using Storage = uint16_t;
  static constexpr int LANES = 2;
  static constexpr int EQUAL_BITS = 12;  // 13 are equal; an even number of bits is left for the search
  static constexpr uint32_t MINUS_INF = 0xfc00fc00u;
  static __device__ __forceinline__ float lane(uint32_t word, int i) {
    return half_to_float(static_cast<uint16_t>(i ? word >> 16 : word));
  }
  static __device__ __forceinline__ uint32_t word_max(uint32_t a, uint32_t b) { return max_nan_f16x2(a, b); }
  static __device__ __forceinline__ uint32_t bits(Storage value) { return value; }
  static __device__ __forceinline__ Storage store(float value) { return float_to_half(value); }
};

struct BFloat16 {
  using Storage = uint16_t;
  static constexpr int LANES = 2;
  static constexpr int EQUAL_BITS = 16;
  static constexpr uint32_t MINUS_INF = 0xff80ff80u;
  static __device__ __forceinline__ float lane(uint32_t word, int i) {
    return __uint_as_float(i ? word & 0xffff0000u : word << 16);
  }
  static __device__ __forceinline__ uint32_t word_max(uint32_t a, uint32_t b) { return max_nan_bf16x2(a, b); }
  static __device__ __forceinline__ uint32_t bits(Storage value) { return value; }
  static __device__ __forceinline__ Storage store(float value) {  // exact: the value came from a bfloat16
    return static_cast<uint16_t>(__float_as_uint(value) >> 16);
  }
};

// The k-th largest of the block's keys (KEYS per thread, each below 2^BITS), or 0 if fewer than k are not 0.
// Every thread calls it and gets the same answer. `counts` is shared memory; a barrier must lie between this call
// and any earlier use of it. Two bits per step: each step is one barrier, whatever the number of keys.
template <int THREADS, int KEYS, int BITS>
__device__ __forceinline__ uint32_t kth_largest_key(const uint32_t (&keys)[KEYS], int k,
                                                    uint32_t (&counts)[2][THREADS / WARP]) {
  static_assert(BITS % 2 == 0 && BITS <= 32, "two bits per step");
  static_assert(KEYS * WARP < 1024, "a warp's count must fit 10 bits");
  constexpr int WARPS = THREADS / WARP;
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  uint32_t best = 0;
#pragma unroll 1
  for (int bit = BITS - 2; bit >= 0; bit -= 2) {
    const uint32_t one = best | (1u << bit), two = best | (2u << bit), three = best | (3u << bit);
    uint32_t reached = 0;  // how many keys reach each of the three, 10 bits each
#pragma unroll
    for (int i = 0; i < KEYS; ++i) {
      reached += (keys[i] >= one ? 1u : 0u) + (keys[i] >= two ? 1u << 10 : 0u) + (keys[i] >= three ? 1u << 20 : 0u);
    }
    reached = __reduce_add_sync(ALL_LANES, reached);
    // Two sets in turn: a fast warp may write the next step's counts while a slow one still reads this step's.
    uint32_t(&set)[WARPS] = counts[(bit >> 1) & 1];
    if (lane == 0) set[warp] = reached;
    __syncthreads();
    reached = lane < WARPS ? set[lane] : 0;
    const int at_one = __reduce_add_sync(ALL_LANES, reached & 1023);
    const int at_two = __reduce_add_sync(ALL_LANES, (reached >> 10) & 1023);
    const int at_three = __reduce_add_sync(ALL_LANES, reached >> 20);
    best = at_three >= k ? three : at_two >= k ? two : at_one >= k ? one : best;
  }
  return best;
}

__device__ __forceinline__ int next_power_of_two(int n) { return n <= 1 ? 1 : 1 << (WARP - __clz(n - 1)); }

// Sorts items[0 .. count) descending; the array is in shared memory and has room for next_power_of_two(count),
// which is filled up with 0. Every thread of the block calls it. Barriers on entry and on exit.
template <int THREADS>
__device__ __forceinline__ void sort_descending(uint64_t* items, int count) {
  const int size = next_power_of_two(count);
#pragma unroll 1
  for (int i = count + threadIdx.x; i < size; i += THREADS) items[i] = 0;
  __syncthreads();
#pragma unroll 1
  for (int run = 2; run <= size; run <<= 1) {
#pragma unroll 1
    for (int stride = run >> 1; stride > 0; stride >>= 1) {
#pragma unroll 1
      for (int pair = threadIdx.x; pair < size / 2; pair += THREADS) {
        const int low = 2 * pair - (pair & (stride - 1)), high = low + stride;
        const uint64_t a = items[low], b = items[high];
        if ((a < b) == ((low & run) == 0)) {
          items[low] = b;
          items[high] = a;
        }
      }
      // Up to a stride of one warp, a warp's 32 pairs are 64 items in a row that no other warp touches. The step
      // after this one is as narrow unless this is a run's last step and the next run starts wide.
      const int next = stride > 1 ? stride >> 1 : run;
      if (stride <= WARP && next <= WARP) {
        __syncwarp();
      } else {
        __syncthreads();
      }
    }
  }
  __syncthreads();
}

// Writes the k first of a sorted list as one row of the result. relu replaces negative values by 0.
template <typename Score, int THREADS>
__device__ __forceinline__ void write_row(const uint64_t* sorted, int k, bool relu, typename Score::Storage* values,
                                          int32_t* indices) {
#pragma unroll 1
  for (int i = threadIdx.x; i < k; i += THREADS) {
    const float value = candidate_value(sorted[i]);
    values[i] = Score::store(relu && value < 0.0f ? 0.0f : value);
    indices[i] = static_cast<int32_t>(candidate_column(sorted[i]));
  }
}

// The row of a result whose scores held a NaN.
template <typename Score, int THREADS>
__device__ __forceinline__ void write_nan_row(int k, typename Score::Storage* values, int32_t* indices) {
#pragma unroll 1
  for (int i = threadIdx.x; i < k; i += THREADS) {
    values[i] = Score::store(quiet_nan());
    indices[i] = i;
  }
}

}  // namespace qscope
