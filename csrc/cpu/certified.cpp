// Exact encode: a low-precision pass lists, for each row, the features that may belong to its k best; those are scored
// in float64. A row whose list grows too long, or whose numbers are out of range, is scored in full.
#include "certified.h"
#include "certified_encode.h"

#define QSCOPE_BODY "certified_kernels.h"
#include "for_each_isa.h"

#if defined(__x86_64__) && (defined(__clang__) || __GNUC__ >= 11)
#define QSCOPE_HAS_BF16 1
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512bf16,avx512f,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512bf16,avx512f,avx2,fma,f16c")
#endif
namespace qscope::avx512 {
#include "certified_bf16.h"
}  // namespace qscope::avx512
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#else
#define QSCOPE_HAS_BF16 0
#endif

#include "topk_select.h"

namespace qscope {
namespace {

constexpr int64_t kBlockRows = 516;          // rows per pass over the weights; each pass rounds them once more
constexpr int64_t kDirectRows = 4;           // so few rows are bound by reading W: they are scored in full at once
constexpr int64_t kListMemory = 64ll << 20;  // contenders of all threads together
constexpr int64_t kFullGroup = 64;           // rows scored in full per pass over the weights
constexpr int64_t kFeatureTask = 64;

std::atomic<double> bound_scale{1.0};
std::atomic<bool> bf16_wanted{true};

bool bf16_supported() {
#if QSCOPE_HAS_BF16
  static const bool supported = best_isa() == Isa::kAvx512 && __builtin_cpu_supports("avx512bf16");
  return supported;
#else
  return false;
#endif
}

// Subnormal numbers and rounding to nearest, whatever the calling thread has set.
class PlainArithmetic {
#if defined(__x86_64__)
 public:
  PlainArithmetic() : before_(_mm_getcsr()) { _mm_setcsr(before_ & ~0xe040u); }
  ~PlainArithmetic() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#endif
};

template <typename F>
void share(int64_t tasks, int64_t slots, const F& f) {
  share_out(tasks, slots, [&](int64_t slot, int64_t task) {
    [[maybe_unused]] const PlainArithmetic plain;
    f(slot, task);
  });
}

template <typename TW>
struct ExactEncoder {
  int64_t N, D, F, k, slots, capacity, block_rows;
  const TW* W;
  const float* bias;
  float* values;
  int32_t* indices;
  Certificate certificate;
  bool bf16_pass;
  int64_t tile_bytes;

  ExactEncoder(int64_t N, int64_t D, int64_t F, int64_t k, const TW* W, const float* bias, float* values,
               int32_t* indices, Certificate certificate)
      : N(N), D(D), F(F), k(k), slots(num_threads()), W(W), bias(bias), values(values), indices(indices),
        certificate(certificate) {
    bf16_pass = bf16_wanted && isa() == Isa::kAvx512 && bf16_supported();
    capacity = list_capacity(k, F, kPanel);
    const int64_t fit = kListMemory / (slots * capacity * static_cast<int64_t>(sizeof(Contender)));
    block_rows = std::clamp<int64_t>(std::min(fit, N) / kTileRows * kTileRows + kTileRows, kTileRows, kBlockRows);
    tile_bytes = kTileRows * (bf16_pass ? (D + 31) / 32 * 64 : D * 4);
  }

  template <typename TX>
  void run(const TX* x) const {
    Buffer<float> wide(std::is_same_v<TX, float> ? 0 : block_rows * D);
    for (int64_t n0 = 0; n0 < N; n0 += block_rows) {
      const int64_t rows = std::min(block_rows, N - n0);
      if constexpr (std::is_same_v<TX, float>) {
        encode_block(x + n0 * D, rows, n0);
      } else {
        share(rows, slots, [&](int64_t, int64_t r) {
          for (int64_t d = 0; d < D; ++d) wide.get()[r * D + d] = widen(x[(n0 + r) * D + d]);
        });
        encode_block(wide.get(), rows, n0);
      }
    }
  }

  void encode_block(const float* x, int64_t rows, int64_t n0) const {
    std::vector<char> full(static_cast<size_t>(rows), rows <= kDirectRows);
    if (rows > kDirectRows) certify(x, rows, n0, full);
    std::vector<int64_t> left;
    for (int64_t r = 0; r < rows; ++r) {
      if (full[static_cast<size_t>(r)]) left.push_back(r);
    }
    for (size_t begin = 0; begin < left.size(); begin += kFullGroup) {
      const size_t count = std::min(left.size() - begin, static_cast<size_t>(kFullGroup));
      encode_full(x, left.data() + begin, static_cast<int64_t>(count), n0);
    }
  }

  // The mean of the rows of ordinary norm: sinks would pull it away from all others. Zero if there is none.
  std::vector<float> centre(const float* x, int64_t rows) const {
    std::vector<double> norms(static_cast<size_t>(rows));
    share(rows, slots, [&](int64_t, int64_t r) {
      double sum = 0;
      for (int64_t d = 0; d < D; ++d) sum += static_cast<double>(x[r * D + d]) * x[r * D + d];
      norms[static_cast<size_t>(r)] = sum <= kLargest * kLargest ? sum : std::numeric_limits<double>::infinity();
    });
    std::vector<double> sorted = norms;
    std::nth_element(sorted.begin(), sorted.begin() + rows / 2, sorted.end());
    const double most = 16 * sorted[static_cast<size_t>(rows / 2)];
    std::vector<double> sum(static_cast<size_t>(D));
    std::vector<float> mean(static_cast<size_t>(D));
    int64_t count = 0;
    for (int64_t r = 0; r < rows; ++r) {
      if (!(norms[static_cast<size_t>(r)] <= most && std::isfinite(most))) continue;
      ++count;
      for (int64_t d = 0; d < D; ++d) sum[static_cast<size_t>(d)] += x[r * D + d];
    }
    for (size_t d = 0; count > 0 && d < mean.size(); ++d) mean[d] = static_cast<float>(sum[d] / count);
    return mean;
  }

  void certify(const float* x, int64_t rows, int64_t n0, std::vector<char>& full) const {
    const std::vector<float> mu = centre(x, rows);
    double mean = 0;
    for (const float m : mu) mean += static_cast<double>(m) * m;
    const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
    Buffer<char> packed(tiles * tile_bytes);
    std::vector<RowBound> bounds(static_cast<size_t>(rows));
    std::vector<std::atomic<float>> thresholds(static_cast<size_t>(rows));
    for (std::atomic<float>& threshold : thresholds) threshold = -std::numeric_limits<float>::infinity();
    const PassBlock block{packed.get(), mu.data(), bias, bounds.data(), thresholds.data(), rows, D, F, k,
                          static_cast<size_t>(std::max<int64_t>(4096, F / 8)),
                          BoundTerms(D, std::sqrt(mean) * kSafe, bound_scale)};
    pack(x, block, packed.get(), bounds.data(), full);
    std::vector<Contenders> lists(static_cast<size_t>(slots * rows));
    for (size_t i = 0; i < lists.size(); ++i) {
      lists[i].reset(k);
      lists[i].overflow = full[i % static_cast<size_t>(rows)];
    }
    pass(block, lists.data());
    settle(block, lists.data(), full);
    std::vector<int64_t> done(static_cast<size_t>(rows), 0);
    score(x, block, lists.data(), done);
    narrow(block, lists.data(), done);
    score(x, block, lists.data(), done);
    share(rows, slots, [&](int64_t, int64_t r) {
      if (full[static_cast<size_t>(r)]) return;
      choose(lists[static_cast<size_t>(r)].items, thresholds[static_cast<size_t>(r)], n0 + r);
    });
  }

  void pack(const float* x, const PassBlock& block, char* packed, RowBound* bounds, std::vector<char>& full) const {
    share(block.tiles(), slots, [&](int64_t, int64_t t) {
      char* tile = packed + t * tile_bytes;
      std::memset(tile, 0, static_cast<size_t>(tile_bytes));
      for (int64_t r = 0; r < kTileRows && t * kTileRows + r < block.rows; ++r) {
        const int64_t n = t * kTileRows + r;
        const Sums sums = pack_row(x + n * D, block.mu, r, tile);
        full[static_cast<size_t>(n)] = !block.terms.row(sums, D, bounds[n]);
      }
    });
  }

  Sums pack_row(const float* x, const float* mu, int64_t r, void* tile) const {
#if QSCOPE_HAS_BF16
    if (bf16_pass) return avx512::round_row(x, mu, D, r, tile);
#endif
    return QSCOPE_DISPATCH(pack_row(x, mu, D, r, tile));
  }

  void pass(const PassBlock& block, Contenders* lists) const {
    const int64_t depth = std::min(D, kDepth) + 32;
    Buffer<uint32_t> panels(slots * depth * kPanel);
    Buffer<float> products(slots * block.tiles() * kTileRows * kPanel);
    std::vector<std::vector<float>> scratch(static_cast<size_t>(slots));
    share((F + kPanel - 1) / kPanel, slots, [&](int64_t slot, int64_t panel) {
      uint32_t* weights = panels.get() + slot * depth * kPanel;
      float* c = products.get() + slot * block.tiles() * kTileRows * kPanel;
      Contenders* list = lists + slot * block.rows;
      std::vector<float>& own = scratch[static_cast<size_t>(slot)];
#if QSCOPE_HAS_BF16
      if (bf16_pass) return avx512::pass_panel_bf16(block, W, panel, weights, c, list, own);
#endif
      QSCOPE_DISPATCH(pass_panel(block, W, panel, reinterpret_cast<float*>(weights), c, list, own));
    });
  }

  // Merges the threads' lists under the final threshold; the k features of largest lower bound come first.
  void settle(const PassBlock& block, Contenders* lists, std::vector<char>& full) const {
    std::vector<std::vector<float>> scratch(static_cast<size_t>(slots));
    share(block.rows, slots, [&](int64_t slot, int64_t r) {
      std::vector<Contender>& all = lists[r].items;
      char& dead = full[static_cast<size_t>(r)];
      for (int64_t s = 0; s < slots; ++s) {
        const Contenders& list = lists[s * block.rows + r];
        dead = dead || list.overflow;
        if (s > 0) all.insert(all.end(), list.items.begin(), list.items.end());
      }
      raise(block.thresholds[r], kth_low(all, k, scratch[static_cast<size_t>(slot)]));
      drop(all, block.thresholds[r]);
      dead = dead || all.size() > block.limit;
      if (dead) return all.clear();
      std::nth_element(all.begin(), all.begin() + (k - 1), all.end(),
                       [](const Contender& a, const Contender& b) { return a.low > b.low; });
    });
  }

  // Scores items done[r].. of each row, the first time only its first k; the score replaces the lower bound.
  // Pairs are grouped by feature: a row of W is read once for all the rows of x that need it.
  void score(const float* x, const PassBlock& block, Contenders* lists, std::vector<int64_t>& done) const {
    std::vector<int64_t> offset(static_cast<size_t>(F + 1), 0);
    const auto each = [&](const auto& f) {
      for (int64_t r = 0; r < block.rows; ++r) {
        std::vector<Contender>& items = lists[r].items;
        const size_t begin = static_cast<size_t>(done[static_cast<size_t>(r)]);
        const size_t end = begin == 0 ? std::min(items.size(), static_cast<size_t>(k)) : items.size();
        for (size_t i = begin; i < end; ++i) f(r, items[i]);
      }
    };
    each([&](int64_t, Contender& item) { ++offset[static_cast<size_t>(item.index) + 1]; });
    for (size_t f = 0; f < static_cast<size_t>(F); ++f) offset[f + 1] += offset[f];
    std::vector<const float*> from(static_cast<size_t>(offset.back() + kScoreAhead), x);
    std::vector<float*> to(static_cast<size_t>(offset.back()));
    std::vector<int64_t> next(offset.begin(), offset.end() - 1);
    each([&](int64_t r, Contender& item) {
      const size_t at = static_cast<size_t>(next[static_cast<size_t>(item.index)]++);
      from[at] = x + r * D;
      to[at] = &item.low;
    });
    share((F + kFeatureTask - 1) / kFeatureTask, slots, [&](int64_t, int64_t task) {
      const int64_t end = std::min(F, (task + 1) * kFeatureTask);
      const auto wanted = [&](int64_t f) {  // the first feature from f on that a row needs
        while (f < end && offset[static_cast<size_t>(f)] == offset[static_cast<size_t>(f) + 1]) ++f;
        return f;
      };
      for (int64_t f = wanted(task * kFeatureTask); f < end;) {
        const int64_t begin = offset[static_cast<size_t>(f)], count = offset[static_cast<size_t>(f) + 1] - begin;
        const int64_t after = wanted(f + 1);
        QSCOPE_DISPATCH(score_rows(from.data() + begin, count, W + f * D, 1, W + after * D,
                                   bias == nullptr ? nullptr : bias + f, D, to.data() + begin));
        f = after;
      }
    });
    for (int64_t r = 0; r < block.rows; ++r) {
      done[static_cast<size_t>(r)] = std::min<int64_t>(k, static_cast<int64_t>(lists[r].items.size()));
    }
  }

  // The smallest of k exact scores is a better threshold than the k-th lower bound. What stays in `thresholds` bounds
  // every feature that is dropped.
  void narrow(const PassBlock& block, Contenders* lists, const std::vector<int64_t>& done) const {
    share(block.rows, slots, [&](int64_t, int64_t r) {
      std::vector<Contender>& items = lists[r].items;
      const size_t scored = static_cast<size_t>(done[static_cast<size_t>(r)]);
      if (scored == 0) return;
      float least = std::numeric_limits<float>::infinity();
      for (size_t i = 0; i < scored; ++i) {
        if (std::isnan(items[i].low)) return;
        least = std::min(least, items[i].low);
      }
      size_t kept = scored;
      for (size_t i = scored; i < items.size(); ++i) {
        if (items[i].high >= least) {
          items[kept++] = items[i];
        } else {
          block.thresholds[r] = std::max(block.thresholds[r].load(), items[i].high);
        }
      }
      items.resize(kept);
    });
  }

  // `bound` is not below any score that is not among the items.
  void choose(const std::vector<Contender>& items, float bound, int64_t n) const {
    std::vector<Candidate> all;
    bool nan = false;
    for (const Contender& item : items) {
      all.push_back({item.low, item.index});
      nan = nan || std::isnan(item.low);
    }
    const int64_t count = static_cast<int64_t>(all.size());
    if (nan) return write_row(nullptr, n, count, std::numeric_limits<float>::quiet_NaN());
    std::partial_sort(all.begin(), all.begin() + k, all.end(), before);
    const float gap = static_cast<float>(static_cast<double>(all[static_cast<size_t>(k - 1)].value) - bound);
    const float margin = std::max(0.0f, std::nextafter(gap, -std::numeric_limits<float>::infinity()));
    write_row(all.data(), n, count, count == F ? std::numeric_limits<float>::infinity() : margin);
  }

  // The row's k best, or null for a row with a NaN among its scores.
  void write_row(const Candidate* best, int64_t n, int64_t candidates, float margin) const {
    if (certificate.candidates != nullptr) certificate.candidates[n] = static_cast<int32_t>(candidates);
    if (certificate.margin != nullptr) certificate.margin[n] = margin;
    if (best == nullptr) return write_nan_row(k, values + n * k, indices + n * k);
    for (int64_t j = 0; j < k; ++j) {
      values[n * k + j] = best[j].value > 0.0f ? best[j].value : 0.0f;
      indices[n * k + j] = best[j].index;
    }
  }

  // Every score of the rows given.
  void encode_full(const float* x, const int64_t* chosen, int64_t count, int64_t n0) const {
    std::vector<const float*> from;
    for (int64_t i = 0; i < count; ++i) from.push_back(x + chosen[i] * D);
    from.insert(from.end(), kScoreAhead, x);
    Buffer<Candidate> items(slots * count * capacity);
    Buffer<float> scores(slots * count * kPanel);
    std::vector<TopList> lists(static_cast<size_t>(slots * count));
    for (size_t i = 0; i < lists.size(); ++i) reset(lists[i], items.get() + static_cast<int64_t>(i) * capacity);
    share((F + kPanel - 1) / kPanel, slots, [&](int64_t slot, int64_t panel) {
      const int64_t first = panel * kPanel;
      QSCOPE_DISPATCH(score_panel(from.data(), count, W, first, std::min<int64_t>(kPanel, F - first), bias, D, k,
                                  static_cast<int32_t>(capacity), scores.get() + slot * count * kPanel,
                                  lists.data() + slot * count));
    });
    share(count, slots, [&](int64_t, int64_t i) {
      std::vector<Candidate> all;
      bool nan = false;
      for (int64_t s = 0; s < slots; ++s) {
        const TopList& list = lists[static_cast<size_t>(s * count + i)];
        nan = nan || list.nan;
        all.insert(all.end(), list.items, list.items + list.count);
      }
      if (nan) return write_row(nullptr, n0 + chosen[i], F, std::numeric_limits<float>::quiet_NaN());
      std::partial_sort(all.begin(), all.begin() + k, all.end(), before);
      write_row(all.data(), n0 + chosen[i], F, std::numeric_limits<float>::infinity());
    });
  }
};

}  // namespace

void encode_exact(const Tensor& x, const Tensor& W, const std::optional<Tensor>& bias, int64_t k, float* values,
                  int32_t* indices, Certificate certificate) {
  [[maybe_unused]] const PlainArithmetic plain;
  with_float_type(W, "W_enc", [&](auto* tw) {
    using TW = std::remove_cvref_t<decltype(*tw)>;
    const ExactEncoder<TW> encoder(x.size(0), x.size(1), W.size(0), k, data<TW>(W),
                                   bias ? data<float>(*bias) : nullptr, values, indices, certificate);
    with_float_type(x, "x", [&](auto* tx) { encoder.run(data<std::remove_cvref_t<decltype(*tx)>>(x)); });
  });
}

}  // namespace qscope

// For tests: weakens the bound (1 restores it), and switches the bfloat16 pass off or on; each returns what holds now.
extern "C" double qscope_exact_bound_scale(double scale) { return qscope::bound_scale = scale; }
extern "C" int qscope_exact_bf16(int wanted) { return (qscope::bf16_wanted = wanted != 0) && qscope::bf16_supported(); }
