// Certified encode, part 2: the features of each row that may be among its k best.
//
// A feature's score lies in [low, high] = p + beta -+ (A |w| + B |w - v| + C); see certify_bounds.cuh. Let tau be the
// k-th largest low. Then k scores are at least tau, and a feature with high < tau scores less than all of them: the
// candidates {f : high >= tau} hold the k best in any order of ties.
//
// One block per row, one read of the scores. A gate that never exceeds tau lets features pass into a list in shared
// memory. The owners of the k largest lows pass every gate, so the list's k-th largest low is the row's: tau is exact.
//   * The first columns raise the gate from nothing: groups of 4 features each have a largest low, and the k-th
//     largest of these, together with the lows in the list, is reached by k different features.
//   * A list that is half full raises the gate to its own k-th largest low, and is cut.
//   * A chunk that does not fit is taken back and treated like a first one. If it still does not fit, the row is read
//     a second time, the gate starting at the k-th largest of every thread's best; and if that fails, the row is
//     flagged: it is scored in full. So are rows out of range.
//   * The test that almost every score fails uses the largest bound of 64 features, so that of a feature only beta is
//     read. `!(high < gate)` keeps what is not a number: it belongs to a feature out of range, which is a candidate.
// A row may come in column blocks; its list then waits in memory between the calls.
#pragma once

#include "certify_bounds.cuh"

namespace qscope {

struct CertifyArguments {
  const float* scores;  // [rows, stride], aligned to 16 bytes, stride a multiple of 4; `columns` of each row count
  int64_t stride;
  int64_t columns, first_column;  // first_column a multiple of 64
  int k;
  bool last;                   // the last column block
  const RowBound* rows;        // [rows]
  const FeatureBound* bounds;  // [F]
  const float* beta;           // [F], padded to a multiple of 4
  const FeatureBound* groups;  // [ceil(F / 64)]: the largest norm, lost and constant of each 64 features
  int32_t* list_column;        // [rows, capacity]: candidates, in any order
  float* list_low;             // [rows, capacity], used between column blocks
  float* list_high;
  int32_t* counts;             // [rows]: candidates, -1 for a flagged row
  float* taus;                 // [rows]
  int32_t* feature_counts;     // [F + 1]: increased by the last call
  int32_t* flagged;            // [rows + 1]: how many are flagged, then which
};

struct Interval {
  float low, high;
};

__device__ __forceinline__ float half_width(const RowBound& row, const FeatureBound& feature) {
  return fmaf(row.B, feature.lost, fmaf(row.A, feature.norm, feature.constant));
}

__device__ __forceinline__ Interval interval(float p, const RowBound& row, const FeatureBound& feature) {
  const float middle = p + feature.beta, width = half_width(row, feature);
  const Interval out = {middle - width, middle + width};
  const bool known = is_finite(out.low) && is_finite(out.high);
  return known ? out : Interval{-infinity(), infinity()};
}

template <int THREADS>
struct Certifier {
  static constexpr int WARPS = THREADS / WARP;
  static constexpr int VECTORS = 4;                      // of 4 scores, per thread and chunk
  static constexpr int CHUNK = THREADS * VECTORS * 4;    // scores
  static constexpr int ITEMS = 8;                        // of the list, per thread
  static constexpr int CAPACITY = THREADS * ITEMS;
  static constexpr int KEYS = VECTORS + ITEMS;

  struct Shared {
    int32_t column[CAPACITY];
    float low[CAPACITY], high[CAPACITY];
    uint32_t counts[2][WARPS];
    int appended;  // offered to the list; it holds at most CAPACITY of them
  };

  const CertifyArguments& args;
  Shared& shared;
  const float* scores;  // of this row
  RowBound row;
  float gate;
  int kept;  // items in the list before the chunk at hand; every thread knows

  __device__ __forceinline__ int64_t column_of(int64_t begin, int vector) const {
    return begin + (vector * THREADS + static_cast<int>(threadIdx.x)) * 4;
  }

  __device__ __forceinline__ void put(int32_t column, float low, float high) {
    const int position = atomicAdd(&shared.appended, 1);
    if (position >= CAPACITY) return;
    shared.column[position] = column;
    shared.low[position] = low;
    shared.high[position] = high;
  }

  // Appends the features of a chunk that pass the gate. Returns how many were offered to the list in total.
  __device__ __forceinline__ int append(int64_t begin) {
    float4 p[VECTORS], b[VECTORS];
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
      const int64_t at = column_of(begin, v);
      if (at >= args.columns) continue;
      p[v] = __ldcs(reinterpret_cast<const float4*>(scores + at));
      b[v] = __ldg(reinterpret_cast<const float4*>(args.beta + args.first_column + at));
    }
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
      const int64_t at = column_of(begin, v);
      if (at >= args.columns) continue;
      const float width = half_width(row, args.groups[(args.first_column + at) / BOUND_GROUP]);
      const bool below = p[v].x + b[v].x + width < gate && p[v].y + b[v].y + width < gate &&
                         p[v].z + b[v].z + width < gate && p[v].w + b[v].w + width < gate;
      if (below) continue;
      const int inside = static_cast<int>(min(args.columns - at, int64_t{4}));
#pragma unroll 1
      for (int i = 0; i < inside; ++i) {
        const int64_t f = args.first_column + at + i;
        const Interval s = interval(scores[at + i], row, args.bounds[f]);
        if (!(s.high < gate)) put(static_cast<int32_t>(f), s.low, s.high);
      }
    }
    __syncthreads();
    const int offered = shared.appended;
    __syncthreads();  // else a fast thread's next append could be in it
    return offered;
  }

  // The largest low of up to four features.
  __device__ __forceinline__ float best_low(int64_t at) const {
    float best = -infinity();
    const int inside = static_cast<int>(min(args.columns - at, int64_t{4}));
#pragma unroll 1
    for (int i = 0; i < inside; ++i) {
      best = fmaxf(best, interval(scores[at + i], row, args.bounds[args.first_column + at + i]).low);
    }
    return best;
  }

  // Raises the gate to the k-th largest of `keys` (per thread; 0 for none) and of the lows of the kept items, and cuts
  // the list by it, and by `limit`, a column from which on items are dropped. What was appended since is taken back.
  __device__ __forceinline__ void raise(uint32_t (&keys)[KEYS], int64_t limit) {
    __syncthreads();
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
      const int at = i * THREADS + threadIdx.x;
      keys[VECTORS + i] = at < kept && shared.column[at] < limit ? order_key(shared.low[at]) : 0;
    }
    if (threadIdx.x == 0) shared.appended = 0;
    const uint32_t tau = kth_largest_key<THREADS, KEYS, 32>(keys, args.k, shared.counts);
    if (tau != 0) gate = fmaxf(gate, key_value(tau));
    // In place: a round writes no further than where all threads have read.
#pragma unroll 1
    for (int first = 0; first < kept; first += THREADS) {
      const int at = first + threadIdx.x;
      const bool here = at < kept;
      const int32_t column = here ? shared.column[at] : 0;
      const float low = here ? shared.low[at] : 0.0f, high = here ? shared.high[at] : 0.0f;
      __syncthreads();
      if (here && column < limit && !(high < gate)) put(column, low, high);
    }
    __syncthreads();
    kept = shared.appended;
    __syncthreads();
  }

  __device__ __forceinline__ void raise_by_list(int64_t limit) {
    uint32_t keys[KEYS];
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) keys[v] = 0;
    raise(keys, limit);
  }

  __device__ __forceinline__ void raise_by_chunk(int64_t begin) {
    uint32_t keys[KEYS];
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
      const int64_t at = column_of(begin, v);
      keys[v] = at < args.columns ? order_key(best_low(at)) : 0;
    }
    raise(keys, int64_t{1} << 31);
  }

  // As if each thread's best, in each of its VECTORS places, had been seen before the row. Drops this call's items.
  __device__ __forceinline__ void raise_by_row() {
    uint32_t keys[KEYS];
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
      keys[v] = 0;
#pragma unroll 1
      for (int64_t begin = 0; begin < args.columns; begin += CHUNK) {
        const int64_t at = column_of(begin, v);
        if (at < args.columns) keys[v] = max(keys[v], order_key(best_low(at)));
      }
    }
    raise(keys, args.first_column);
  }

  // Lists the candidates of the columns at hand. False if they do not fit.
  __device__ __forceinline__ bool scan() {
    bool certain = args.first_column == 0, again = false;  // whether the next chunk raises the gate first
#pragma unroll 1
    for (int64_t begin = 0; begin < args.columns; begin += CHUNK) {
      if (certain) raise_by_chunk(begin);
      int offered = append(begin);
      if (offered > CAPACITY && !certain) {
        raise_by_chunk(begin);
        offered = append(begin);
      }
      certain = false;
      if (offered > CAPACITY) {
        if (again) return false;
        again = true;
        raise_by_row();
        begin = -CHUNK;
        continue;
      }
      kept = offered;
      if (kept > CAPACITY / 2) raise_by_list(int64_t{1} << 31);
    }
    return true;
  }
};

template <int THREADS>
__global__ void __launch_bounds__(THREADS, 3) certify_rows(const CertifyArguments args) {
  using Self = Certifier<THREADS>;
  __shared__ typename Self::Shared shared;
  const int64_t n = blockIdx.x, list = n * Self::CAPACITY;
  const bool first = args.first_column == 0;
  const RowBound row = args.rows[n];
  const int before = first ? 0 : args.counts[n];
  if (before < 0) return;
  bool fits = row.A < infinity();
  if (fits) {
    Self certifier{args, shared, args.scores + n * args.stride, row, first ? -infinity() : args.taus[n], before};
    for (int i = threadIdx.x; i < before; i += THREADS) {
      shared.column[i] = args.list_column[list + i];
      shared.low[i] = args.list_low[list + i];
      shared.high[i] = args.list_high[list + i];
    }
    if (threadIdx.x == 0) shared.appended = before;
    __syncthreads();
    fits = certifier.scan();
    if (fits) {
      certifier.raise_by_list(int64_t{1} << 31);
      for (int i = threadIdx.x; i < certifier.kept; i += THREADS) {
        args.list_column[list + i] = shared.column[i];
        if (args.last) {
          atomicAdd(&args.feature_counts[shared.column[i]], 1);
        } else {
          args.list_low[list + i] = shared.low[i];
          args.list_high[list + i] = shared.high[i];
        }
      }
      if (threadIdx.x == 0) {
        args.counts[n] = certifier.kept;
        args.taus[n] = certifier.gate;
      }
    }
  }
  if (!fits && threadIdx.x == 0) {
    args.counts[n] = -1;
    args.taus[n] = -infinity();
    args.flagged[1 + atomicAdd(&args.flagged[0], 1)] = static_cast<int32_t>(n);
  }
}

}  // namespace qscope
