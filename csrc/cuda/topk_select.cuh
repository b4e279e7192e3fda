// The k largest scores of every row, exactly, reading the row once. One block per row.
//
// The row passes by in chunks that the block holds in registers; the next chunk is loading while one is examined.
// A gate says what can still matter, and a bounded list in shared memory collects candidates:
//
//   * The first chunk is cut into groups of 4 scores. The k-th largest of the groups' maxima is the level: k different
//     scores reach it, so nothing below it can be selected. Fewer than k groups exceed it, so fewer than 4 k scores
//     do; of those equal to it only the lowest columns are wanted. What is collected is bounded.
//   * A later score must be strictly above the level: an equal one loses the tie against k scores in earlier columns.
//     The test is one comparison per 16-byte vector, of the largest of its scores, and any NaN fails it.
//   * A list that is half full is sorted and cut to k; its last value is the new level.
//   * A chunk that does not fit (scores that rise along the row) is taken back, still being in registers: the list
//     is cut to k and the chunk is treated like a first one. So no input makes the kernel read a row again.
//
// Threads append in any order. The list is a set, and its final sort has no equal keys: the result is deterministic.
#pragma once

#include "select_common.cuh"

namespace qscope {

constexpr int GROUP = 4;

// Entries of the candidate list: a list cut to k and one chunk's worst case, 4 (k - 1) above the level and k at it,
// must fit. A power of two, for the sort. At 8 bytes each, four blocks of 2048 fit the smallest SM (100 KB, sm_89).
inline uint32_t list_capacity(int k) { return k <= 128 ? 1024 : 2048; }

template <typename Score>
struct SelectArguments {
  const typename Score::Storage* scores;  // row n starts at n * row_stride
  int64_t row_stride;
  uint32_t columns;
  int k;
  uint32_t capacity;
  bool relu;
  bool merge;             // values and indices hold the result for earlier columns
  uint32_t first_column;  // of this call, in the numbering of the result
  typename Score::Storage* values;
  int32_t* indices;
};

// A row as 16-byte vectors on 16-byte boundaries. Its first vector starts up to one vector early, the last ends late.
template <typename Score>
struct Row {
  static constexpr int WIDTH = 16 / sizeof(typename Score::Storage);

  const uint4* base;
  uint32_t shift;  // scores of the first vector that lie before the row
  uint32_t columns;

  __device__ __forceinline__ Row(const typename Score::Storage* start, uint32_t count) : columns(count) {
    const auto address = reinterpret_cast<uintptr_t>(start);
    base = reinterpret_cast<const uint4*>(address & ~uintptr_t{15});
    shift = static_cast<uint32_t>(address & 15) / sizeof(typename Score::Storage);
  }

  __device__ __forceinline__ uint32_t vectors() const { return (shift + columns + WIDTH - 1) / WIDTH; }

  // Vectors from first_whole() to before end_whole() lie inside the row.
  __device__ __forceinline__ uint32_t first_whole() const { return shift ? 1 : 0; }
  __device__ __forceinline__ uint32_t end_whole() const { return (shift + columns) / WIDTH; }

  // Of the vector's first score. Wraps to a large number for scores before the row: one comparison tests both ends.
  __device__ __forceinline__ uint32_t column(uint32_t vector) const { return vector * WIDTH - shift; }

  // One bit for each score of a vector that belongs to the row.
  __device__ __forceinline__ uint32_t inside(uint32_t first) const {
    uint32_t bits = (1u << WIDTH) - 1;
    if (first >= columns) {
      const uint32_t before = 0u - first;
      bits = before < WIDTH ? bits << before & bits : 0;
    }
    const uint32_t left = columns - first;  // from the vector's first score to the row's end
    return left < WIDTH ? bits & ((1u << left) - 1) : bits;
  }

  __device__ __forceinline__ uint4 load(uint32_t vector) const {
    if (vector >= first_whole() && vector < end_whole()) return __ldcs(base + vector);
    uint32_t words[4] = {Score::MINUS_INF, Score::MINUS_INF, Score::MINUS_INF, Score::MINUS_INF};
    if (vector < vectors()) {  // an end of the row: only its own scores may be touched
      const auto* start = reinterpret_cast<const typename Score::Storage*>(base) + shift;
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) {
        const uint32_t at = column(vector) + i;
        if (at < columns) {
          const int position = i % Score::LANES * 16;
          const uint32_t keep = Score::LANES == 1 ? 0u : 0xffff0000u >> position;
          words[i / Score::LANES] = (words[i / Score::LANES] & keep) | Score::bits(start[at]) << position;
        }
      }
    }
    return {words[0], words[1], words[2], words[3]};
  }
};

__device__ __forceinline__ uint32_t word_of(const uint4& v, int i) {
  return i & 2 ? (i & 1 ? v.w : v.z) : (i & 1 ? v.y : v.x);
}

template <typename Score>
__device__ __forceinline__ float word_value(uint32_t word) {
  const float low = Score::lane(word, 0);
  return Score::LANES == 1 ? low : max_nan(low, Score::lane(word, 1));
}

template <typename Score, int THREADS, int VECTORS>
struct RowSelector {
  static constexpr int WIDTH = Row<Score>::WIDTH;
  static constexpr int GROUPS = VECTORS * WIDTH / GROUP;  // per thread
  static constexpr uint32_t CHUNK = THREADS * VECTORS;    // vectors
  static constexpr int WARPS = THREADS / WARP;

  static constexpr int SEEN_NAN = 1, SEEN_HALF_FULL = 2;

  struct Shared {
    uint32_t counts[2][WARPS];
    uint32_t appended;  // candidates offered; the list holds at most `capacity` of them
    // Needed late or by one thread only: they would occupy registers of every thread.
    uint32_t kept;   // candidates before the chunk that is being certified
    int64_t result;  // where this row's result starts
  };

  const Row<Score>& row;
  const SelectArguments<Score>& args;
  uint64_t* list;
  Shared& shared;
  float gate = quiet_nan();  // candidates are the scores not <= gate: all of them while it is NaN
  uint32_t seen = 0;  // what this thread came across: SEEN_*, one register for both

  __device__ __forceinline__ void load(uint4 (&chunk)[VECTORS], uint32_t begin) const {
    const uint32_t mine = begin + threadIdx.x;
    if (begin >= row.first_whole() && begin + CHUNK <= row.end_whole()) {  // without tests, all loads start at once
#pragma unroll
      for (int j = 0; j < VECTORS; ++j) chunk[j] = __ldcs(row.base + mine + j * THREADS);
    } else {
#pragma unroll
      for (int j = 0; j < VECTORS; ++j) chunk[j] = row.load(mine + j * THREADS);
    }
  }

  __device__ __forceinline__ void prefetch(uint32_t begin) const {
#pragma unroll
    for (int j = 0; j < VECTORS; ++j) {
      const uint32_t vector = begin + threadIdx.x + j * THREADS;
      if (vector < row.end_whole()) prefetch_l2(row.base + vector);
    }
  }

  __device__ __forceinline__ uint32_t real_column(uint32_t column) const { return column + args.first_column; }

  __device__ __forceinline__ void put(uint32_t position, float value, uint32_t column) {
    if (position < args.capacity) list[position] = candidate(value, real_column(column));
  }

  // Appends the scores above the gate; notes NaN and a list that is half full.
  __device__ __forceinline__ void append(const uint4 (&chunk)[VECTORS], uint32_t begin) {
#pragma unroll
    for (int j = 0; j < VECTORS; ++j) {
      const uint4 v = chunk[j];
      const float best = word_value<Score>(Score::word_max(Score::word_max(v.x, v.y), Score::word_max(v.z, v.w)));
      if (best <= gate) continue;
      if (best != best) {  // the row's result is NaN, whatever else this vector holds
        seen |= SEEN_NAN;
        continue;
      }
      uint32_t taken = 0;
      const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) {
        if (!(Score::lane(words[i / Score::LANES], i % Score::LANES) <= gate)) taken |= 1u << i;
      }
      const uint32_t column = row.column(begin + threadIdx.x + j * THREADS);
      taken &= row.inside(column);
      const uint32_t more = __popc(taken);
      if (more == 0) continue;
      uint32_t position = atomicAdd(&shared.appended, more);
      if (position + more > args.capacity / 2) seen |= SEEN_HALF_FULL;
      // Rarely more than one: a loop that looks each score up again is shorter than WIDTH predicated stores.
#pragma unroll 1
      for (; taken != 0; taken &= taken - 1) {
        const int i = __ffs(static_cast<int>(taken)) - 1;
        put(position++, Score::lane(word_of(v, i / Score::LANES), i % Score::LANES), column + i);
      }
    }
  }

  // Of the chunk's scores equal to `level`, appends the k in the lowest columns behind the `have` candidates.
  __device__ __forceinline__ void append_lowest_ties(const uint4 (&chunk)[VECTORS], uint32_t begin, float level) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const uint32_t wanted = static_cast<uint32_t>(args.k), have = shared.appended;
    uint32_t found = 0;
#pragma unroll
    for (int j = 0; j < VECTORS; ++j) {
      const uint4 v = chunk[j];
      const uint32_t words[4] = {v.x, v.y, v.z, v.w};
      const uint32_t column = row.column(begin + threadIdx.x + j * THREADS);
      uint32_t equal = 0;
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) {
        if (Score::lane(words[i / Score::LANES], i % Score::LANES) == level) equal |= 1u << i;
      }
      equal &= row.inside(column);
      uint32_t up_to_here = __popc(equal);  // ties in this warp, up to and including this thread
#pragma unroll
      for (int delta = 1; delta < WARP; delta *= 2) {
        const uint32_t other = __shfl_up_sync(ALL_LANES, up_to_here, delta);
        if (lane >= delta) up_to_here += other;
      }
      if (lane == WARP - 1) shared.counts[j & 1][warp] = up_to_here;
      __syncthreads();
      const uint32_t of_warp = lane < WARPS ? shared.counts[j & 1][lane] : 0;
      uint32_t rank = found + up_to_here - __popc(equal) + __reduce_add_sync(ALL_LANES, lane < warp ? of_warp : 0);
      found += __reduce_add_sync(ALL_LANES, of_warp);
#pragma unroll 1
      for (; equal != 0 && rank < wanted; equal &= equal - 1) {
        put(have + rank++, level, column + __ffs(static_cast<int>(equal)) - 1);
      }
    }
    __syncthreads();
    if (threadIdx.x == 0) shared.appended = have + min(found, wanted);
    __syncthreads();
  }

  // Treats the chunk like a first one. The list must be cut to k; all threads must know `appended` to be settled.
  __device__ __forceinline__ void append_certified(const uint4 (&chunk)[VECTORS], uint32_t begin) {
    uint32_t keys[GROUPS];
#pragma unroll
    for (int j = 0; j < VECTORS; ++j) {
      const uint4 v = chunk[j];
      const uint32_t column = row.column(begin + threadIdx.x + j * THREADS);
#pragma unroll
      for (int g = 0; g < WIDTH / GROUP; ++g) {
        uint32_t top;
        if (Score::LANES == 1) {
          top = Score::word_max(Score::word_max(v.x, v.y), Score::word_max(v.z, v.w));
        } else {
          top = g ? Score::word_max(v.z, v.w) : Score::word_max(v.x, v.y);
        }
        const float best = word_value<Score>(top);
        // A group reaches into the row if its first or its last column does: it is shorter than any row counted here.
        const bool inside = column + g * GROUP < row.columns || column + g * GROUP + GROUP - 1 < row.columns;
        // `append` looks at every score of this chunk again, and sees a NaN.
        keys[j * (WIDTH / GROUP) + g] = inside && best == best ? order_key(best) >> Score::EQUAL_BITS : 0;
      }
    }
    constexpr int BITS = 32 - Score::EQUAL_BITS;
    if (threadIdx.x == 0) shared.kept = shared.appended;
    const uint32_t key = kth_largest_key<THREADS, GROUPS, BITS>(keys, args.k, shared.counts);
    // The bits left out are ones below a negative value's key and zeros below a positive one's.
    const uint32_t low_bits = key >> (BITS - 1) ? 0u : (1u << Score::EQUAL_BITS) - 1;
    const float level = key_value(key << Score::EQUAL_BITS | low_bits);
    // Fewer than k groups, or a chunk that does not reach the gate: there is no new level, and all above the gate fit.
    bool with_ties = key != 0 && !(level <= gate);
    const bool raised = with_ties;
    if (raised) gate = just_below(level);
#pragma unroll 1
    while (true) {
      append(chunk, begin);
      __syncthreads();
      const bool again = with_ties && shared.appended > args.capacity;
      __syncthreads();
      if (raised) gate = level;
      if (!again) break;
      if (threadIdx.x == 0) shared.appended = shared.kept;
      __syncthreads();
      with_ties = false;
    }
    if (raised && !with_ties) append_lowest_ties(chunk, begin, level);
  }

  // Sorts the list and cuts it to k; the gate rises to its last value. Candidates from `limit` on, in the numbering of
  // the result, are dropped first.
  __device__ __forceinline__ void compact(uint32_t limit) {
    const int count = static_cast<int>(min(shared.appended, args.capacity));
#pragma unroll 1
    for (int i = threadIdx.x; i < count; i += THREADS) {
      if (candidate_column(list[i]) >= limit) list[i] = 0;
    }
    sort_descending<THREADS>(list, count);
    int mine = 0;
#pragma unroll 1
    for (int i = threadIdx.x; i < min(count, args.k); i += THREADS) mine += list[i] != 0;
    const uint32_t of_warp = __reduce_add_sync(ALL_LANES, static_cast<uint32_t>(mine));
    if (threadIdx.x % WARP == 0) shared.counts[0][threadIdx.x / WARP] = of_warp;
    __syncthreads();
    uint32_t left = threadIdx.x % WARP < WARPS ? shared.counts[0][threadIdx.x % WARP] : 0;
    left = __reduce_add_sync(ALL_LANES, left);
    if (threadIdx.x == 0) shared.appended = left;
    if (left == static_cast<uint32_t>(args.k)) gate = candidate_value(list[args.k - 1]);
    __syncthreads();
  }

  // Starts the list with the result for earlier columns, which is sorted. False if that row held a NaN.
  __device__ __forceinline__ bool seed() {
    const auto* values = args.values + shared.result;
    const auto* indices = args.indices + shared.result;
#pragma unroll 1
    for (int i = threadIdx.x; i < args.k; i += THREADS) {
      const float value = Score::lane(Score::bits(values[i]), 0);
      if (value != value) seen |= SEEN_NAN;
      list[i] = candidate(value, static_cast<uint32_t>(indices[i]));
    }
    if (threadIdx.x == 0) shared.appended = args.k;
    if (__syncthreads_or(seen & SEEN_NAN)) return false;
    gate = candidate_value(list[args.k - 1]);
    return true;
  }

  // Collects the candidates of the whole row. False if it holds a NaN.
  __device__ __forceinline__ bool scan() {
    uint4 chunk[VECTORS], next[VECTORS];
    bool first = !args.merge, loaded = false;
#pragma unroll 1
    for (uint32_t begin = 0; begin < row.vectors(); begin += CHUNK) {
      if (!loaded) load(chunk, begin);
      seen = 0;
      if (!first) {
        load(next, begin + CHUNK);
        append(chunk, begin);
        bool fits = true;
        if (__syncthreads_or(seen)) {
          if (__syncthreads_or(seen & SEEN_NAN)) return false;
          // `appended` has settled: every thread is here, and none writes it before a barrier inside compact.
          fits = shared.appended <= args.capacity;
          const uint32_t chunk_start = begin == 0 ? 0 : row.column(begin);
          compact(fits ? 0xffffffffu : real_column(chunk_start));
        }
        if (fits) {
#pragma unroll
          for (int j = 0; j < VECTORS; ++j) chunk[j] = next[j];
          loaded = true;
          continue;
        }
      }
      // The keys need the registers of the next chunk: it waits in L2 meanwhile.
      prefetch(begin + CHUNK);
      append_certified(chunk, begin);
      if (__syncthreads_or(seen & SEEN_NAN)) return false;
      first = false;
      loaded = false;
    }
    return true;
  }
};

template <typename Score, int THREADS, int VECTORS, int BLOCKS_PER_SM>
__global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM) topk_select_kernel(const SelectArguments<Score> args) {
  using Selector = RowSelector<Score, THREADS, VECTORS>;
  QSCOPE_DYNAMIC_SHARED(dynamic);
  auto* list = reinterpret_cast<uint64_t*>(dynamic);
  __shared__ typename Selector::Shared shared;

  const int64_t n = blockIdx.x;
  if (threadIdx.x == 0) {
    shared.appended = 0;
    shared.result = n * args.k;
  }
  __syncthreads();
  const Row<Score> row(args.scores + n * args.row_stride, args.columns);
  Selector selector{row, args, list, shared};
  if ((!args.merge || selector.seed()) && selector.scan()) {
    const int count = static_cast<int>(min(shared.appended, args.capacity));
    sort_descending<THREADS>(list, count);
    write_row<Score, THREADS>(list, args.k, args.relu, args.values + shared.result, args.indices + shared.result);
  } else {
    write_nan_row<Score, THREADS>(args.k, args.values + shared.result, args.indices + shared.result);
  }
}

}  // namespace qscope
