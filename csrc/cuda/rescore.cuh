// Certified encode, part 3: the candidates' scores in float64 and the k best of them.
//
// Score: s = float32(S64 + b). S64 sums x[d] w[d], both widened exactly, in 16 float64 chains: chain j takes d = j,
// j + 16, ... with one fused multiply-add each, from 0; then chain i takes in chain i + h, for h = 8, 4, 2, 1. Its
// bits depend on x, w and b alone, and are those of the CPU kernels.
//
// Pairs (row, feature) are grouped by feature with a counting sort, so that a row of W is widened once, into shared
// memory, for all rows of x that need it; x comes from L2. Per pair: D elements of x read, converted and multiplied.
// The order of pairs within a feature depends on the run; a pair's score does not, and the final order of a row
// compares score and feature, so that the result does not either.
//
// A flagged row (counts < 0) is scored in full: its part of the pass's scores is overwritten and selected from.
#pragma once

#include "certify_bounds.cuh"
#include "topk_select.cuh"

namespace qscope {

constexpr int RESCORE_THREADS = 256;
constexpr int CHAINS = 16;
constexpr int SLOTS = RESCORE_THREADS / CHAINS;  // pairs in work at a time
constexpr int SEGMENT = 6144;                    // columns of W held at a time: 48 KiB, what a launch gets unasked
constexpr int PART = 256;                        // pairs of one feature that a block scores
constexpr int FULL_SLICE = 64;                   // features of one row that a block scores at a time
constexpr int CHOOSE_THREADS = 256;
static_assert(SEGMENT % CHAINS == 0, "a chain continues where it left off");

// The weights meant, as float64.
template <typename Type>
struct WholeWeights {
  const typename Type::Storage* W;
  __device__ __forceinline__ double at(int64_t i) const { return widen<Type>(W, i); }
};

struct PairWeights {
  const uint16_t *high, *low;
  __device__ __forceinline__ double at(int64_t i) const {  // exact: 16 bits and a gap
    return static_cast<double>(from_bfloat16(high[i])) + static_cast<double>(from_bfloat16(low[i]));
  }
};

template <typename Type, typename Source>
struct ScoreArguments {
  const typename Type::Storage* x;  // row n starts at n * row_stride
  int64_t row_stride, D;
  Source W;           // [F, D]
  const float* bias;  // [F] or null
};

// Halving tree over the 16 lanes of a slot, plus the bias, rounded once. All lanes of the warp call it; lane 0 of each
// slot has the score.
__device__ __forceinline__ float finish_score(double sum, const float* bias, int64_t f) {
#pragma unroll
  for (int step = CHAINS / 2; step > 0; step >>= 1) sum += __shfl_down_sync(ALL_LANES, sum, step, CHAINS);
  return static_cast<float>(sum + (bias == nullptr ? 0.0 : static_cast<double>(bias[f])));
}

// places[f] .. places[f + 1] becomes the range of feature f in `pairs`; places comes in as the end of each range. A
// pair is n * capacity + its position in row n's list.
__global__ void __launch_bounds__(RESCORE_THREADS)
    group_pairs(const int32_t* __restrict__ list_column, const int32_t* __restrict__ counts, int capacity,
                int32_t* __restrict__ places, int32_t* __restrict__ pairs) {
  const int64_t n = blockIdx.x;
  const int count = counts[n];
  for (int i = threadIdx.x; i < count; i += RESCORE_THREADS) {
    const int64_t at = n * capacity + i;
    pairs[atomicAdd(&places[list_column[at]], -1) - 1] = static_cast<int32_t>(at);
  }
}

// Which pairs a block scores: blocks 0 .. features - 1 the first PART of each feature, the others what comes after
// those in PART places of `pairs`. That is one feature's: the first PART of any other fill the places up to the end.
struct Share {
  int feature, begin, end;

  __device__ __forceinline__ Share(const int32_t* places, int features) {
    if (blockIdx.x < static_cast<unsigned>(features)) {
      feature = static_cast<int>(blockIdx.x);
      begin = places[feature];
      end = min(places[feature + 1], begin + PART);
      return;
    }
    const int64_t start = static_cast<int64_t>(blockIdx.x - static_cast<unsigned>(features)) * PART;
    feature = begin = end = 0;
    if (start >= places[features]) return;
    int above = features;  // the last feature that starts at or before `start`
    while (above - feature > 1) {
      const int middle = (feature + above) / 2;
      if (places[middle] <= start) {
        feature = middle;
      } else {
        above = middle;
      }
    }
    begin = max(static_cast<int>(start), places[feature] + PART);
    end = min(places[feature + 1], static_cast<int>(start) + PART);
  }
};

template <typename Type, typename Source>
__global__ void __launch_bounds__(RESCORE_THREADS)
    score_pairs(const ScoreArguments<Type, Source> args, int features, const int32_t* __restrict__ places,
                const int32_t* __restrict__ pairs, int capacity, float* __restrict__ list_score) {
  QSCOPE_DYNAMIC_SHARED(dynamic);
  auto* weights = reinterpret_cast<double*>(dynamic);
  const Share share(places, features);
  const int64_t f = share.feature;
  const int begin = share.begin, end = share.end;
  const int slot = threadIdx.x / CHAINS, chain = threadIdx.x % CHAINS;
  const bool whole = args.D <= SEGMENT;
#pragma unroll 1
  for (int first = begin; first < end; first += SLOTS) {
    const bool here = first + slot < end;
    const int pair = here ? pairs[first + slot] : 0;
    const auto* x = args.x + pair / capacity * args.row_stride;
    double sum = 0;
#pragma unroll 1
    for (int64_t start = 0; start < args.D; start += SEGMENT) {
      const int length = static_cast<int>(min(args.D - start, int64_t{SEGMENT}));
      if (!whole || first == begin) {
        __syncthreads();
        for (int d = threadIdx.x; d < length; d += RESCORE_THREADS) weights[d] = args.W.at(f * args.D + start + d);
        __syncthreads();
      }
      if (!here) continue;
#pragma unroll 8
      for (int d = chain; d < length; d += CHAINS) {
        sum = fma(static_cast<double>(widen<Type>(x, start + d)), weights[d], sum);
      }
    }
    const float score = finish_score(sum, args.bias, f);
    if (here && chain == 0) list_score[pair] = score;
  }
}

// All scores of the flagged rows, into their rows of `scores`; `columns` features from first_column on.
template <typename Type, typename Source>
__global__ void __launch_bounds__(RESCORE_THREADS)
    score_flagged(const ScoreArguments<Type, Source> args, const int32_t* __restrict__ flagged, int64_t columns,
                  int64_t first_column, float* __restrict__ scores, int64_t stride) {
  const int64_t rows = flagged[0], slices = (columns + FULL_SLICE - 1) / FULL_SLICE;
  const int slot = threadIdx.x / CHAINS, chain = threadIdx.x % CHAINS;
  // Neighbouring blocks take the same features of different rows: W comes from L2 for all but one of them.
#pragma unroll 1
  for (int64_t item = blockIdx.x; item < rows * slices; item += gridDim.x) {
    const int64_t n = flagged[1 + item % rows], start = item / rows * FULL_SLICE;
    const auto* x = args.x + n * args.row_stride;
#pragma unroll 1
    for (int i = slot; i < FULL_SLICE; i += SLOTS) {
      const int64_t column = start + i, f = first_column + column;
      double sum = 0;
      if (column < columns) {
#pragma unroll 4
        for (int64_t d = chain; d < args.D; d += CHAINS) {
          sum = fma(static_cast<double>(widen<Type>(x, d)), args.W.at(f * args.D + d), sum);
        }
      }
      const float score = finish_score(sum, column < columns ? args.bias : nullptr, f);
      if (column < columns && chain == 0) scores[n * stride + column] = score;
    }
  }
}

// What a caller is told about a row: how many features were scored in float64, and by how much, at least, every other
// one stays below the k-th score (infinite if there is no other, NaN in a row with a NaN).
__device__ __forceinline__ void certify_row(int64_t n, int32_t scored, float margin, int32_t* candidates,
                                            float* margins) {
  if (threadIdx.x != 0 || candidates == nullptr) return;
  candidates[n] = scored;
  margins[n] = margin;
}

// The k best of the flagged rows, from the scores above. `args` is that of topk_select_kernel.
template <int THREADS>
__global__ void __launch_bounds__(THREADS)
    select_flagged(const SelectArguments<Float32> args, const int32_t* __restrict__ counts, int32_t features,
                   int32_t* candidates, float* margins) {
  using Selector = RowSelector<Float32, THREADS, 4>;
  QSCOPE_DYNAMIC_SHARED(dynamic);
  auto* list = reinterpret_cast<uint64_t*>(dynamic);
  __shared__ typename Selector::Shared shared;
  const int64_t n = blockIdx.x;
  if (counts[n] >= 0) return;
  if (threadIdx.x == 0) {
    shared.appended = 0;
    shared.result = n * args.k;
  }
  __syncthreads();
  const Row<Float32> row(args.scores + n * args.row_stride, args.columns);
  Selector selector{row, args, list, shared};
  const bool known = (!args.merge || selector.seed()) && selector.scan();
  if (known) {
    const int count = static_cast<int>(min(shared.appended, args.capacity));
    sort_descending<THREADS>(list, count);
    write_row<Float32, THREADS>(list, args.k, args.relu, args.values + shared.result, args.indices + shared.result);
  } else {
    write_nan_row<Float32, THREADS>(args.k, args.values + shared.result, args.indices + shared.result);
  }
  certify_row(n, features, known ? infinity() : quiet_nan(), candidates, margins);
}

// The k best of each row's candidates, ReLU, and the certificate. `capacity` is a power of two.
__global__ void __launch_bounds__(CHOOSE_THREADS)
    choose_rows(const int32_t* __restrict__ list_column, const float* __restrict__ list_score,
                const int32_t* __restrict__ counts, const float* __restrict__ taus, int capacity, int32_t features,
                int k, float* __restrict__ values, int32_t* __restrict__ indices, int32_t* candidates,
                float* margins) {
  QSCOPE_DYNAMIC_SHARED(dynamic);
  auto* items = reinterpret_cast<uint64_t*>(dynamic);
  const int64_t n = blockIdx.x;
  const int count = counts[n];
  if (count < 0) return;
  bool nan = false;
  for (int i = threadIdx.x; i < count; i += CHOOSE_THREADS) {
    const float score = list_score[n * capacity + i];
    nan = nan || score != score;
    items[i] = candidate(score, static_cast<uint32_t>(list_column[n * capacity + i]));
  }
  if (__syncthreads_or(nan)) {
    write_nan_row<Float32, CHOOSE_THREADS>(k, values + n * k, indices + n * k);
    certify_row(n, count, quiet_nan(), candidates, margins);
    return;
  }
  sort_descending<CHOOSE_THREADS>(items, count);
  write_row<Float32, CHOOSE_THREADS>(items, k, true, values + n * k, indices + n * k);
  // The others score less than tau: at most the float below it. The difference is rounded towards 0.
  const float others = just_below(taus[n]), last = candidate_value(items[k - 1]);
  const float gap = static_cast<float>(static_cast<double>(last) - static_cast<double>(others));
  const float margin = gap > 0.0f ? fmaxf(just_below(gap), 0.0f) : 0.0f;
  certify_row(n, count, count == features ? infinity() : margin, candidates, margins);
}

}  // namespace qscope
