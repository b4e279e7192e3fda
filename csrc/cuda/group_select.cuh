// Exact top-k of each row of bfloat16 scores from the maxima of its groups, reading k groups instead of the row.
//
// A row of F scores is cut into groups of 2^group_log2 neighbours (the last may be short); maxima[g] is the largest
// score of group g, NaN if it holds one. Let tau be the k-th largest maximum, and A the number of maxima above it
// (A < k). Read: every group with a maximum above tau, and the first k - A groups, by index, with a maximum of tau.
//
// The k best scores (value descending, then lowest column) lie in those k groups:
//   - A score below tau is not among them: k groups hold a score of at least tau each.
//   - A score above tau lies in a group with a maximum above tau.
//   - A score equal to tau lies in a group above tau, or in a group of maximum tau. If the latter is not read, then
//     k - A groups of maximum tau come before it, each with a score of tau in a lower column, and A groups hold a
//     score above tau: k scores come first.
// With fewer than k groups, tau is "nothing" and all of them are read. No input makes it read more.
//
// A NaN in any maximum makes the row's values NaN and its indices 0..k-1.
#pragma once

#include "select_common.cuh"

namespace qscope {

constexpr int GROUP_THREADS = 256;
constexpr int GROUP_MAX_K = 256;
// A pass reads 4 scores per thread and so appends at most 1024 candidates; the list is cut to k when fewer than
// that many places are left, hence it cannot overflow.
constexpr int GROUP_PASS = GROUP_THREADS * 4;
constexpr int GROUP_CAPACITY = 2 * GROUP_PASS;
static_assert(GROUP_MAX_K <= GROUP_PASS && GROUP_MAX_K <= GROUP_CAPACITY - GROUP_PASS, "room for one more pass");

// Sum of `count` over the threads before this one, and over the block in `total`. `sums` is shared memory; barriers
// on entry and exit.
__device__ __forceinline__ uint32_t block_exclusive_sum(uint32_t count, uint32_t (&sums)[GROUP_THREADS / WARP],
                                                        uint32_t& total) {
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  uint32_t sum = count;
#pragma unroll
  for (int step = 1; step < WARP; step <<= 1) {
    const uint32_t below = __shfl_up_sync(ALL_LANES, sum, step);
    if (lane >= step) sum += below;
  }
  __syncthreads();
  if (lane == WARP - 1) sums[warp] = sum;
  __syncthreads();
  uint32_t before = 0;
  total = 0;
#pragma unroll
  for (int i = 0; i < GROUP_THREADS / WARP; ++i) {
    if (i < warp) before += sums[i];
    total += sums[i];
  }
  return before + sum - count;
}

// Loads four scores, the `part`-th four of the listed groups one after the other; false beyond them or the row.
__device__ __forceinline__ bool load_part(const uint16_t* row, int64_t features, const int32_t* list, int listed,
                                          int group_log2, int part, uint32_t& column, uint2& words) {
  const int parts_log2 = group_log2 - 2, place = part >> parts_log2;
  if (place >= listed) return false;
  const int64_t first = (static_cast<int64_t>(list[place]) << group_log2) + ((part & ((1 << parts_log2) - 1)) << 2);
  if (first >= features) return false;
  column = static_cast<uint32_t>(first);
  words = *reinterpret_cast<const uint2*>(row + first);
  return true;
}

// One row per block. KEYS * GROUP_THREADS must reach the number of groups. `features` is a multiple of 4, and rows
// are aligned to 8 bytes. values and indices are [rows, k].
template <int KEYS>
__global__ void __launch_bounds__(GROUP_THREADS)
    group_select_rows(const uint16_t* __restrict__ scores, const uint16_t* __restrict__ maxima, int64_t features,
                      int groups, int group_log2, int k, bool relu, uint16_t* __restrict__ values,
                      int32_t* __restrict__ indices) {
  __shared__ uint64_t items[GROUP_CAPACITY];
  __shared__ int32_t list[GROUP_MAX_K];
  __shared__ uint32_t counts[2][GROUP_THREADS / WARP];
  __shared__ uint32_t sums[GROUP_THREADS / WARP];
  __shared__ int filled;
  const int64_t row = blockIdx.x;
  const int tid = threadIdx.x;
  scores += row * features;
  maxima += row * groups;
  values += row * k;
  indices += row * k;

  // A thread owns neighbouring groups, so that one sum over threads ranks them by index.
  uint32_t keys[KEYS];
  bool nan = false;
#pragma unroll
  for (int i = 0; i < KEYS; ++i) {
    const int g = tid * KEYS + i;
    const float top = g < groups ? BFloat16::lane(maxima[g], 0) : 0.0f;
    nan = nan || top != top;
    keys[i] = g < groups ? order_key(top) >> BFloat16::EQUAL_BITS : 0;
  }
  if (tid == 0) filled = 0;
  if (__syncthreads_or(nan)) {
    write_nan_row<BFloat16, GROUP_THREADS>(k, values, indices);
    return;
  }
  const uint32_t tau = kth_largest_key<GROUP_THREADS, KEYS, 32 - BFloat16::EQUAL_BITS>(keys, k, counts);

  uint32_t mine = 0, total;  // groups above tau, and in the upper half groups at tau
#pragma unroll
  for (int i = 0; i < KEYS; ++i) mine += (keys[i] > tau ? 1u : 0u) + (keys[i] == tau ? 1u << 16 : 0u);
  const uint32_t before = block_exclusive_sum(mine, sums, total);
  const int above = total & 0xffff, at = tau == 0 ? 0 : min(static_cast<int>(total >> 16), k - above);
  int next_above = before & 0xffff, next_at = before >> 16;
#pragma unroll
  for (int i = 0; i < KEYS; ++i) {
    if (keys[i] > tau) list[next_above++] = tid * KEYS + i;
    if (keys[i] == tau && next_at < at) list[above + next_at++] = tid * KEYS + i;
  }
  __syncthreads();

  const int listed = above + at, parts = listed << (group_log2 - 2);
  // Candidates above this word are kept: first all that reach tau (the complement of their column is not 0), later
  // those before the k-th found so far.
  uint64_t floor = static_cast<uint64_t>(tau) << (32 + BFloat16::EQUAL_BITS);
  uint32_t column = 0;
  uint2 words{};
  bool here = load_part(scores, features, list, listed, group_log2, tid, column, words);
  for (int pass = 0; pass < parts; pass += GROUP_THREADS) {
    const bool now = here;
    const uint32_t start = column, pair[2] = {words.x, words.y};
    // Under way while this pass is looked at.
    here = load_part(scores, features, list, listed, group_log2, pass + GROUP_THREADS + tid, column, words);
    if (now) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint64_t item = candidate(BFloat16::lane(pair[i / 2], i % 2), start + i);
        if (item > floor) items[atomicAdd(&filled, 1)] = item;
      }
    }
    __syncthreads();
    const int found = filled;
    __syncthreads();  // else a fast thread's next append could be in `found`
    if (found > GROUP_CAPACITY - GROUP_PASS) {
      sort_descending<GROUP_THREADS>(items, found);
      floor = items[k - 1];
      if (tid == 0) filled = k;
      __syncthreads();
    }
  }
  sort_descending<GROUP_THREADS>(items, filled);
  write_row<BFloat16, GROUP_THREADS>(items, k, relu, values, indices);
}

}  // namespace qscope
