// C entry points of the certified encode from its candidates on; see rescore.cuh. Each returns a cudaError_t, never
// waits and never allocates. dtypes: 0 float32, 1 float16, 2 bfloat16; for weights also 3, a pair of bfloat16.
#include "rescore.cuh"

namespace {

using namespace qscope;

bool countable(int64_t count) { return count >= 0 && count < (int64_t{1} << 31); }

bool known(int x_dtype, int W_dtype, const void* low) {
  return x_dtype >= 0 && x_dtype <= 2 && W_dtype >= 0 && W_dtype <= 3 && (W_dtype != 3 || low != nullptr);
}

// Calls f(ScoreArguments) for the dtypes given.
template <typename F>
void with_types(const void* x, int x_dtype, int64_t row_stride, int64_t D, const void* W, const void* low, int W_dtype,
                const float* bias, const F& f) {
  const auto with_source = [&](auto type, auto source) {
    using Type = decltype(type);
    f(ScoreArguments<Type, decltype(source)>{static_cast<const typename Type::Storage*>(x), row_stride, D, source,
                                             bias});
  };
  const auto with_x = [&](auto type) {
    const auto* bits = static_cast<const uint16_t*>(W);
    if (W_dtype == 0) with_source(type, WholeWeights<Float32>{static_cast<const float*>(W)});
    if (W_dtype == 1) with_source(type, WholeWeights<Float16>{bits});
    if (W_dtype == 2) with_source(type, WholeWeights<BFloat16>{bits});
    if (W_dtype == 3) with_source(type, PairWeights{bits, static_cast<const uint16_t*>(low)});
  };
  if (x_dtype == 0) with_x(Float32{});
  if (x_dtype == 1) with_x(Float16{});
  if (x_dtype == 2) with_x(BFloat16{});
}

template <typename Type, typename Source>
void launch_pairs(const ScoreArguments<Type, Source>& args, int64_t rows, int64_t F, const int32_t* places,
                  const int32_t* pairs, int capacity, float* list_score, cudaStream_t stream) {
  const int64_t blocks = F + (rows * capacity + PART - 1) / PART;
  const size_t shared = static_cast<size_t>(args.D < SEGMENT ? args.D : SEGMENT) * sizeof(double);
  const auto kernel = score_pairs<Type, Source>;
  QSCOPE_LAUNCH(kernel, dim3(static_cast<unsigned>(blocks)), dim3(RESCORE_THREADS), shared, stream, args,
                static_cast<int>(F), places, pairs, capacity, list_score);
}

template <typename Type, typename Source>
void launch_flagged(const ScoreArguments<Type, Source>& args, const int32_t* flagged, int64_t columns,
                    int64_t first_column, float* scores, int64_t stride, int blocks, cudaStream_t stream) {
  const auto kernel = score_flagged<Type, Source>;
  QSCOPE_LAUNCH(kernel, dim3(static_cast<unsigned>(blocks)), dim3(RESCORE_THREADS), 0, stream, args, flagged, columns,
                first_column, scores, stride);
}

}  // namespace

// pairs [places[F]]: the listed candidates grouped by feature. places [F + 1] comes in as the inclusive sum of the
// features' counts and leaves as the start of each feature's pairs. rows * capacity is below 2^31.
extern "C" int qscope_exact_group(const int32_t* list_column, const int32_t* counts, int64_t rows, int capacity,
                                  int32_t* places, int32_t* pairs, void* stream) {
  if (!countable(rows) || capacity < 1 || !countable(rows * capacity)) return cudaErrorInvalidValue;
  if (rows == 0) return cudaSuccess;
  QSCOPE_LAUNCH(group_pairs, dim3(static_cast<unsigned>(rows)), dim3(RESCORE_THREADS), 0,
                static_cast<cudaStream_t>(stream), list_column, counts, capacity, places, pairs);
  return cudaGetLastError();
}

// list_score [rows, capacity]: scores of the pairs.
extern "C" int qscope_exact_score(const void* x, int x_dtype, int64_t row_stride, int64_t D, const void* W,
                                  const void* low, int W_dtype, const float* bias, int64_t rows, int64_t F,
                                  const int32_t* places, const int32_t* pairs, int capacity, float* list_score,
                                  void* stream) {
  const bool good = countable(rows) && countable(F) && D >= 0 && capacity >= 1 && countable(rows * capacity) &&
                    known(x_dtype, W_dtype, low);
  if (!good) return cudaErrorInvalidValue;
  if (F == 0) return cudaSuccess;
  with_types(x, x_dtype, row_stride, D, W, low, W_dtype, bias, [&](const auto& args) {
    launch_pairs(args, rows, F, places, pairs, capacity, list_score, static_cast<cudaStream_t>(stream));
  });
  return cudaGetLastError();
}

// scores [rows, stride]: all of the flagged rows. W is all of [F, D]; columns and first_column say which part of it.
extern "C" int qscope_exact_score_flagged(const void* x, int x_dtype, int64_t row_stride, int64_t D, const void* W,
                                          const void* low, int W_dtype, const float* bias, const int32_t* flagged,
                                          int64_t columns, int64_t first_column, float* scores, int64_t stride,
                                          int blocks, void* stream) {
  const bool good = countable(columns) && first_column >= 0 && countable(first_column + columns) && blocks >= 1 &&
                    D >= 0 && stride >= columns && known(x_dtype, W_dtype, low);
  if (!good) return cudaErrorInvalidValue;
  with_types(x, x_dtype, row_stride, D, W, low, W_dtype, bias, [&](const auto& args) {
    launch_flagged(args, flagged, columns, first_column, scores, stride, blocks, static_cast<cudaStream_t>(stream));
  });
  return cudaGetLastError();
}

// values and indices [rows, k] of the flagged rows; merge and last as in qscope_topk_select. features: the number of
// scores that the row was chosen from in total. candidates and margins [rows], both or neither null.
extern "C" int qscope_exact_select_flagged(const float* scores, int64_t rows, int64_t stride, int64_t columns, int k,
                                           int merge, int last, int64_t first_column, int64_t features,
                                           const int32_t* counts, float* values, int32_t* indices, int32_t* candidates,
                                           float* margins, void* stream) {
  const bool good = countable(rows) && k >= 1 && k <= 256 && columns >= (merge ? 1 : k) && first_column >= 0 &&
                    countable(first_column + columns) && countable(features);
  if (!good) return cudaErrorInvalidValue;
  if (rows == 0) return cudaSuccess;
  const SelectArguments<Float32> args = {scores, stride, static_cast<uint32_t>(columns), k, list_capacity(k),
                                         last != 0, merge != 0, static_cast<uint32_t>(first_column), values, indices};
  QSCOPE_LAUNCH(select_flagged<256>, dim3(static_cast<unsigned>(rows)), dim3(256), args.capacity * sizeof(uint64_t),
                static_cast<cudaStream_t>(stream), args, counts, static_cast<int32_t>(features), candidates, margins);
  return cudaGetLastError();
}

// values and indices [rows, k] of the other rows, from their candidates. capacity: a power of two up to 4096.
extern "C" int qscope_exact_choose(const int32_t* list_column, const float* list_score, const int32_t* counts,
                                   const float* taus, int64_t rows, int capacity, int64_t features, int k,
                                   float* values, int32_t* indices, int32_t* candidates, float* margins,
                                   void* stream) {
  const bool good = countable(rows) && capacity >= 1 && capacity <= 4096 && (capacity & (capacity - 1)) == 0 &&
                    countable(features) && k >= 1 && k <= 256 && k <= capacity;
  if (!good) return cudaErrorInvalidValue;
  if (rows == 0) return cudaSuccess;
  QSCOPE_LAUNCH(choose_rows, dim3(static_cast<unsigned>(rows)), dim3(CHOOSE_THREADS), capacity * sizeof(uint64_t),
                static_cast<cudaStream_t>(stream), list_column, list_score, counts, taus, capacity,
                static_cast<int32_t>(features), k, values, indices, candidates, margins);
  return cudaGetLastError();
}
