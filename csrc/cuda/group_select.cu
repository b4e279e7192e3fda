// Launcher of the select that reads group maxima first; see group_select.cuh.
#include "group_select.cuh"

namespace {

template <int KEYS>
cudaError_t launch(const void* scores, const void* maxima, long long rows, long long features, int groups,
                   int group_log2, int k, int relu, void* values, void* indices, cudaStream_t stream) {
  QSCOPE_LAUNCH(qscope::group_select_rows<KEYS>, dim3(static_cast<unsigned>(rows)), dim3(qscope::GROUP_THREADS), 0,
                stream, static_cast<const uint16_t*>(scores), static_cast<const uint16_t*>(maxima),
                static_cast<int64_t>(features), groups, group_log2, k, relu != 0, static_cast<uint16_t*>(values),
                static_cast<int32_t*>(indices));
  return cudaGetLastError();
}

}  // namespace

// Top-k of scores [rows, features] bfloat16 with maxima [rows, ceil(features / group)] bfloat16, all contiguous.
// values [rows, k] bfloat16, indices [rows, k] int32. `group` is a power of two from 4 on, features a multiple of 4
// below 2^31, scores aligned to 8 bytes, at most 6144 groups, k from 1 to min(256, features).
extern "C" int qscope_group_select(const void* scores, const void* maxima, void* values, void* indices, long long rows,
                                   long long features, int group, int k, int relu, void* stream) {
  int group_log2 = 0;
  while ((1 << group_log2) < group && group_log2 < 30) ++group_log2;
  const long long groups = (features + group - 1) / (group > 0 ? group : 1);
  const bool fits = group >= 4 && (1 << group_log2) == group && features > 0 && features % 4 == 0 &&
                    features < (1ll << 31) && groups <= 24 * qscope::GROUP_THREADS && k >= 1 &&
                    k <= qscope::GROUP_MAX_K && k <= features && rows >= 0 && rows < (1ll << 31) &&
                    reinterpret_cast<uintptr_t>(scores) % 8 == 0;
  if (!fits) return cudaErrorInvalidValue;
  if (rows == 0) return cudaSuccess;
  // As few keys per thread as reach all groups: dictionaries up to 64K, 256K and 384K features with groups of 64.
  const auto call = groups <= 4 * qscope::GROUP_THREADS    ? launch<4>
                    : groups <= 16 * qscope::GROUP_THREADS ? launch<16>
                                                           : launch<24>;
  return call(scores, maxima, rows, features, static_cast<int>(groups), group_log2, k, relu, values, indices,
              static_cast<cudaStream_t>(stream));
}
