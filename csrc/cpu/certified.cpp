// Exact encode: a low-precision pass lists, for each row, the features that may belong to its k best; float16 rows
// narrow the list, and what is left is scored in float64. A row whose list grows too long goes to the next finer pass,
// and at last, as one whose numbers are out of range, is scored in full.
#include "certified.h"
#include "certified_encode.h"

#define QSCOPE_BODY "certified_kernels.h"
#include "for_each_isa.h"

#if defined(__x86_64__) && (defined(__clang__) || __GNUC__ >= 11)
#define QSCOPE_HAS_DOTS 1
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512bf16,avx512vnni,avx512f,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512bf16,avx512vnni,avx512f,avx2,fma,f16c")
#endif
namespace qscope::avx512 {
#include "certified_bf16.h"
#include "certified_int8.h"
}  // namespace qscope::avx512
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#else
#define QSCOPE_HAS_DOTS 0
#endif

#include "certified_pairs.h"
#include "topk_select.h"

namespace qscope {
namespace {

constexpr int64_t kBlockRows = 516;          // rows per pass over the weights; each pass rounds them once more
constexpr int64_t kDirectRows = 4;           // so few rows are bound by reading W: they are scored in full at once
constexpr int64_t kListMemory = 64ll << 20;  // what k entries per row and thread may take: large k, fewer rows at once
constexpr int64_t kContenders = 11ll << 20;  // of all rows together, 12 bytes each; threads hold half as many again
constexpr int64_t kMostWanted = 3;           // dictionaries of at most so many times k are scored in full
constexpr int64_t kFullGroup = 64;           // rows scored in full per pass over the weights
// Rows whose rounding to int8 loses more than this part of their norm, over sqrt(D), would list most of F.
constexpr double kMostLost = 0.8;

enum Pass : int { kFloat32 = 0, kBf16 = 1, kInt8 = 2 };

std::atomic<double> bound_scale{1.0};
std::atomic<int> passes_wanted{kBf16 | kInt8};

// The low-precision passes that this CPU has, as flags.
int passes_supported() {
#if QSCOPE_HAS_DOTS
  static const int supported = best_isa() != Isa::kAvx512 ? 0
                               : (__builtin_cpu_supports("avx512bf16") ? kBf16 : 0) |
                                     (__builtin_cpu_supports("avx512vnni") ? kInt8 : 0);
  return supported;
#else
  return 0;
#endif
}

bool have(Pass pass, int64_t D) {
  return isa() == Isa::kAvx512 && (passes_wanted & passes_supported() & pass) != 0 &&
         (pass != kInt8 || D <= kMostCodedColumns);
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

struct Row {
  const float* x;
  int64_t n;  // of the output
};

template <typename TW>
struct ExactEncoder {
  int64_t N, D, F, k, slots, capacity, block_rows;
  const TW* W;
  const float* bias;
  CodedWeights coded;
  float* values;
  int32_t* indices;
  Certificate certificate;
  bool codes_pay = true;
  mutable std::atomic<bool> out_of_bounds{false};

  ExactEncoder(int64_t N, int64_t D, int64_t F, int64_t k, const TW* W, const float* bias, CodedWeights coded,
               float* values, int32_t* indices, Certificate certificate)
      : N(N), D(D), F(F), k(k), slots(num_threads()), W(W), bias(bias), coded(coded), values(values),
        indices(indices), certificate(certificate) {
    capacity = list_capacity(k, F, kPanel);
    const int64_t fit = kListMemory / (slots * capacity * static_cast<int64_t>(sizeof(Candidate)));
    block_rows = std::clamp<int64_t>(std::min(fit, N) / kTileRows * kTileRows + kTileRows, kTileRows, kBlockRows);
  }

  template <typename TX>
  void run(const TX* x) {
    Buffer<float> wide(std::is_same_v<TX, float> ? 0 : block_rows * D);
    for (int64_t n0 = 0; n0 < N; n0 += block_rows) {
      std::vector<Row> rows(static_cast<size_t>(std::min(block_rows, N - n0)));
      for (size_t i = 0; i < rows.size(); ++i) rows[i].n = n0 + static_cast<int64_t>(i);
      if constexpr (std::is_same_v<TX, float>) {
        for (Row& row : rows) row.x = x + row.n * D;
      } else {
        share(static_cast<int64_t>(rows.size()), slots, [&](int64_t, int64_t r) {
          float* to = wide.get() + r * D;
          for (int64_t d = 0; d < D; ++d) to[d] = widen(x[(n0 + r) * D + d]);
          rows[static_cast<size_t>(r)].x = to;
        });
      }
      encode_block(std::move(rows));
    }
  }

  void encode_block(std::vector<Row> rows) {
    const size_t all = rows.size();
    const bool choice = D > 0 && F > kMostWanted * k;  // otherwise nearly every feature would be scored after all
    if (choice && codes_pay && have(kInt8, D) && (coded.codes != nullptr || all > kDirectRows)) {
      rows = certify(kInt8, rows);
      codes_pay = rows.size() <= all / 2;
    }
    if (choice && rows.size() > kDirectRows) rows = certify(have(kBf16, D) ? kBf16 : kFloat32, rows);
    for (size_t begin = 0; begin < rows.size(); begin += kFullGroup) {
      encode_full(rows.data() + begin, static_cast<int64_t>(std::min<size_t>(rows.size() - begin, kFullGroup)));
    }
  }

  // The mean of the rows of ordinary norm: sinks would pull it away from all others. Zero if there is none.
  std::vector<float> centre(const std::vector<Row>& rows) const {
    std::vector<double> norms(rows.size());
    share(static_cast<int64_t>(rows.size()), slots, [&](int64_t, int64_t r) {
      const float* x = rows[static_cast<size_t>(r)].x;
      double sum = 0;
      for (int64_t d = 0; d < D; ++d) sum += static_cast<double>(x[d]) * x[d];
      norms[static_cast<size_t>(r)] = sum <= kLargest * kLargest ? sum : std::numeric_limits<double>::infinity();
    });
    std::vector<double> sorted = norms;
    std::nth_element(sorted.begin(), sorted.begin() + static_cast<int64_t>(rows.size() / 2), sorted.end());
    const double most = 16 * sorted[rows.size() / 2];
    std::vector<double> sum(static_cast<size_t>(D));
    std::vector<float> mean(static_cast<size_t>(D));
    int64_t count = 0;
    for (size_t r = 0; r < rows.size(); ++r) {
      if (!(norms[r] <= most && std::isfinite(most))) continue;
      ++count;
      for (int64_t d = 0; d < D; ++d) sum[static_cast<size_t>(d)] += rows[r].x[d];
    }
    for (size_t d = 0; count > 0 && d < mean.size(); ++d) mean[d] = static_cast<float>(sum[d] / count);
    return mean;
  }

  // Writes the answers of the rows that the pass can decide; returns the others.
  std::vector<Row> certify(Pass kind, const std::vector<Row>& rows) const {
    const bool given = kind == kInt8 && coded.codes != nullptr;
    const std::vector<float> mu = given ? std::vector<float>(coded.mu, coded.mu + D) : centre(rows);
    double mean = 0;
    for (const float m : mu) mean += static_cast<double>(m) * m;
    const int64_t count = static_cast<int64_t>(rows.size());
    std::vector<char> left(rows.size());
    std::vector<RowBound> bounds(rows.size());
    std::vector<std::atomic<float>> thresholds(rows.size());
    for (std::atomic<float>& threshold : thresholds) threshold = -std::numeric_limits<float>::infinity();
    const int64_t limit = std::min(std::max<int64_t>(4096, F / 2), std::max<int64_t>(4096, kContenders / count));
    const int64_t thread_limit = std::min(limit, 1024 + 4 * k + 3 * limit / (2 * slots));
    PassBlock block{nullptr, mu.data(), bias, bounds.data(), thresholds.data(), count, D, F, k, limit, thread_limit,
                    BoundTerms(D, std::sqrt(mean) * kSafe, bound_scale)};
    const int64_t tile_bytes = kTileRows * (kind == kInt8 ? padded_codes(D) : kind == kBf16 ? (D + 31) / 32 * 64 : D * 4);
    Buffer<char> packed(block.tiles() * tile_bytes);
    block.x = packed.get();
    pack(kind, rows, block, packed.get(), tile_bytes, bounds.data(), left);
    const auto undecided = [&] {
      std::vector<Row> out;
      for (size_t r = 0; r < rows.size(); ++r) {
        if (left[r]) out.push_back(rows[r]);
      }
      return out;
    };
    if (std::all_of(left.begin(), left.end(), [](char c) { return c != 0; })) return rows;
    std::vector<Contenders> lists(static_cast<size_t>(slots * count));
    for (size_t i = 0; i < lists.size(); ++i) {
      lists[i].trigger = k + 128;
      lists[i].overflow = left[i % rows.size()];
    }
    std::vector<PanelBound> panels(static_cast<size_t>((F + kPanel - 1) / kPanel));
    pass(kind, block, panels.data(), lists.data());
    settle(block, lists.data(), left);
    std::vector<int64_t> end(rows.size()), done(rows.size(), 0), scored(rows.size());
    for (size_t r = 0; r < rows.size(); ++r) scored[r] = end[r] = lists[r].first;
    score(rows, lists.data(), done, end);
    tighten(block, lists.data(), done = end);
    if (kind != kFloat32) refine(rows, block, bounds.data(), panels.data(), lists.data(), done, end);
    for (size_t r = 0; r < rows.size(); ++r) scored[r] += (end[r] = lists[r].count) - done[r];
    score(rows, lists.data(), done, end);
    if (out_of_bounds && given && bound_scale == 1) {
      throw std::invalid_argument("a score lies outside the bounds that its codes give: the weights were written to after "
                                  "pack_encoder; pack them again");
    }
    share(count, slots, [&](int64_t, int64_t r) {
      if (left[static_cast<size_t>(r)]) return;
      const size_t i = static_cast<size_t>(r);
      choose(lists[i], scored[i], thresholds[i], rows[i].n);
    });
    return undecided();
  }

  // left[r] is set for rows that this pass cannot bound, or not well.
  void pack(Pass kind, const std::vector<Row>& rows, const PassBlock& block, char* packed, int64_t tile_bytes,
            RowBound* bounds, std::vector<char>& left) const {
    share(block.tiles(), slots, [&](int64_t, int64_t t) {
      char* tile = packed + t * tile_bytes;
      std::memset(tile, 0, static_cast<size_t>(tile_bytes));
      for (int64_t r = 0; r < kTileRows && t * kTileRows + r < block.rows; ++r) {
        const size_t i = static_cast<size_t>(t * kTileRows + r);
        const Sums sums = pack_row(kind, rows[i].x, block.mu, r, tile, bounds[i].scale);
        left[i] = !block.terms.row(sums, D, bounds[i]) ||
                  (kind == kInt8 && sums.lost * static_cast<double>(D) > kMostLost * kMostLost * sums.kept);
      }
    });
  }

  Sums pack_row(Pass kind, const float* x, const float* mu, int64_t r, void* tile, float& scale) const {
    scale = 1;
#if QSCOPE_HAS_DOTS
    if (kind == kInt8) {
      std::vector<int8_t> codes(static_cast<size_t>(padded_codes(D)));
      const avx512::Coded coded_row = avx512::encode_x(x, mu, D, r, codes.data(), tile);
      scale = coded_row.scale;
      return coded_row.sums;
    }
    if (kind == kBf16) return avx512::round_row(x, mu, D, r, tile);
#endif
    return QSCOPE_DISPATCH(pack_row(x, mu, D, r, tile));
  }

  void pass(Pass kind, const PassBlock& block, PanelBound* panels, Contenders* lists) const {
    const int64_t depth = std::min(D, kDepth) + 32, room = block.tiles() * kTileRows * kPanel;
    const int64_t bytes = kind == kInt8 ? coded_panel_bytes(D) + 16 * (padded_codes(D) + 64) : depth * kPanel * 4;
    const int64_t panel_room = (bytes + 63) / 64 * 64;
    Buffer<char> weights(slots * panel_room);
    Buffer<float> products(slots * kGroup * room);
    share((F + kGroup * kPanel - 1) / (kGroup * kPanel), slots, [&](int64_t slot, int64_t group) {
      float* c = products.get() + slot * kGroup * room;
      PanelBound* bounds = panels + group * kGroup;
      for (int64_t g = 0; g < kGroup && (group * kGroup + g) * kPanel < F; ++g) {
        multiply(kind, block, group * kGroup + g, weights.get() + slot * panel_room, c + g * room, bounds[g]);
      }
      QSCOPE_DISPATCH(contend_panels(block, c, bounds, group * kGroup * kPanel, lists + slot * block.rows));
    });
  }

  // Products of all rows with one panel, and its bounds. `weights`: scratch.
  void multiply(Pass kind, const PassBlock& block, int64_t panel, char* weights, float* c, PanelBound& bound) const {
    const int64_t first = panel * kPanel;
#if QSCOPE_HAS_DOTS
    if (kind == kInt8) {
      const int64_t width = std::min<int64_t>(kPanel, F - first), bytes = coded_panel_bytes(D);
      const TW* rows = W + first * D;
      const auto* codes = reinterpret_cast<const CodedPanel*>(coded.codes + panel * bytes);
      const char* next = coded.codes + (panel + 1) * bytes;
      int64_t ahead = bytes;
      if (coded.codes == nullptr) {
        auto* own = reinterpret_cast<CodedPanel*>(weights);
        avx512::encode_panel(rows, width, bias == nullptr ? nullptr : bias + first, block.mu, block.terms, D,
                             reinterpret_cast<int8_t*>(weights + bytes), *own);
        codes = own;
        next = reinterpret_cast<const char*>(rows + width * D);
        ahead = kPanel * D * static_cast<int64_t>(sizeof(TW));
      }
      avx512::multiply_panel_int8(block, *codes, c, next, ahead);
      bound = codes->bound;
      return;
    }
    if (kind == kBf16) {
      return avx512::pass_panel_bf16(block, W, first, reinterpret_cast<uint32_t*>(weights), c, bound);
    }
#endif
    QSCOPE_DISPATCH(pass_panel(block, W, first, reinterpret_cast<float*>(weights), c, bound));
  }

  // Merges the threads' lists under the final threshold.
  void settle(const PassBlock& block, Contenders* lists, std::vector<char>& left) const {
    share(block.rows, slots, [&](int64_t, int64_t r) {
      Contenders& all = lists[r];
      char& dead = left[static_cast<size_t>(r)];
      for (int64_t s = 0; s < slots; ++s) {
        Contenders& list = lists[s * block.rows + r];
        dead = dead || list.overflow;
        if (s == 0) continue;
        append(all, list, block.thresholds[r]);
        list.clear();
      }
      raise(block.thresholds[r], QSCOPE_DISPATCH(kth_low(all, k)));
      QSCOPE_DISPATCH(drop(all, block.thresholds[r], std::numeric_limits<float>::infinity()));
      dead = dead || all.count > block.limit;
      if (dead) return all.clear();
      all.first = QSCOPE_DISPATCH(split(all, block.thresholds[r]));
    });
  }

  void append(Contenders& all, Contenders& list, float threshold) const {
    QSCOPE_DISPATCH(drop(list, threshold, std::numeric_limits<float>::infinity()));
    all.room(list.count + 16);
    std::copy_n(list.high.begin(), list.count, all.high.begin() + all.count);
    std::copy_n(list.low.begin(), list.count, all.low.begin() + all.count);
    std::copy_n(list.index.begin(), list.count, all.index.begin() + all.count);
    all.count += list.count;
  }

  template <typename T, typename E>
  void share_features(const Pairs<T>& pairs, const E& f) const {
    share((F + kFeatureTask - 1) / kFeatureTask, slots, [&](int64_t, int64_t task) { for_features(pairs, task, f); });
  }

  // Replaces the bounds of items done[r]..end[r] of each row by their score. First for about k items of largest lower
  // bound, whose scores are a threshold that drops most of the others; at last for what is left.
  void score(const std::vector<Row>& rows, Contenders* lists, const std::vector<int64_t>& done,
             const std::vector<int64_t>& end) const {
    std::vector<const float*> xs;
    for (const Row& row : rows) xs.push_back(row.x);
    const Pairs<float> pairs = group(F, xs, lists, done, end);
    share_features(pairs, [&](int64_t f, int64_t begin, int64_t count, int64_t after) {
      const Place* places = pairs.to.data() + begin;
      std::vector<float*> to(static_cast<size_t>(count));
      std::vector<float> low(to.size());
      for (size_t i = 0; i < to.size(); ++i) {
        to[i] = &lists[places[i].row].low[static_cast<size_t>(places[i].position)];
        low[i] = *to[i];
      }
      QSCOPE_DISPATCH(score_rows(pairs.from.data() + begin, count, W + f * D, 1, W + after * D,
                                 bias == nullptr ? nullptr : bias + f, D, to.data()));
      for (size_t i = 0; i < to.size(); ++i) {
        if (!QSCOPE_DISPATCH(settle_item(lists[places[i].row], places[i].position, low[i]))) out_of_bounds = true;
      }
    });
  }

  // Narrows the intervals of the other items: float16 rows with the features as they are lose a hundredth of what int8
  // loses, in half of float32's bytes.
  void refine(const std::vector<Row>& rows, const PassBlock& block, RowBound* bounds, const PanelBound* panels,
              Contenders* lists, std::vector<int64_t>& done, std::vector<int64_t>& end) const {
    Buffer<f16> halves(block.rows * D);
    std::vector<const f16*> at(rows.size());
    share(block.rows, slots, [&](int64_t, int64_t r) {
      const size_t i = static_cast<size_t>(r);
      at[i] = halves.get() + r * D;
      end[i] = lists[r].count;
      const Sums sums =
          QSCOPE_DISPATCH(halve_row(rows[i].x, block.mu, D, halves.get() + r * D, bounds[r].half_scale));
      bounds[r].half_A = block.terms.half(sums, D);
    });
    const Pairs<f16> pairs = group(F, at, lists, done, end);
    share_features(pairs, [&](int64_t f, int64_t begin, int64_t count, int64_t after) {
      QSCOPE_DISPATCH(refine_rows(pairs.from.data() + begin, pairs.to.data() + begin, count, W + f * D, W + after * D,
                                  block, panels[f / kPanel], f % kPanel, lists));
    });
    tighten(block, lists, done);
  }

  // Drops what the k-th largest lower bound excludes. What stays in `thresholds` bounds every feature that is dropped.
  // The first done[r] items are scored; those of them that remain still come first.
  void tighten(const PassBlock& block, Contenders* lists, std::vector<int64_t>& done) const {
    share(block.rows, slots, [&](int64_t, int64_t r) {
      Contenders& list = lists[r];
      const float tau = below(QSCOPE_DISPATCH(kth_low(list, k)));
      int64_t& scored = done[static_cast<size_t>(r)];
      scored = std::count_if(list.high.begin(), list.high.begin() + scored, [&](float high) { return high > tau; });
      block.thresholds[r] = QSCOPE_DISPATCH(drop(list, tau, block.thresholds[r]));
    });
  }

  // `count` features were scored; `bound` is not below any score that is not among the items.
  void choose(const Contenders& list, int64_t count, float bound, int64_t n) const {
    std::vector<Candidate> all;
    bool nan = false;
    for (size_t i = 0; i < static_cast<size_t>(list.count); ++i) {
      all.push_back({list.low[i], list.index[i]});
      nan = nan || list.high[i] > list.low[i];  // only a NaN's bounds still differ, now that all are scored
    }
    if (nan) return write_row(nullptr, n, count, std::numeric_limits<float>::quiet_NaN());
    sort_best(all.data(), static_cast<int64_t>(all.size()), k);
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
  void encode_full(const Row* rows, int64_t count) const {
    std::vector<const float*> from;
    for (int64_t i = 0; i < count; ++i) from.push_back(rows[i].x);
    from.insert(from.end(), kScoreAhead, rows[0].x);
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
      if (nan) return write_row(nullptr, rows[i].n, F, std::numeric_limits<float>::quiet_NaN());
      sort_best(all.data(), static_cast<int64_t>(all.size()), k);
      write_row(all.data(), rows[i].n, F, std::numeric_limits<float>::infinity());
    });
  }
};

}  // namespace

void encode_exact(const Tensor& x, const Tensor& W, const std::optional<Tensor>& bias, CodedWeights coded, int64_t k,
                  float* values, int32_t* indices, Certificate certificate) {
  [[maybe_unused]] const PlainArithmetic plain;
  with_float_type(W, "W_enc", [&](auto* tw) {
    using TW = std::remove_cvref_t<decltype(*tw)>;
    ExactEncoder<TW> encoder(x.size(0), x.size(1), W.size(0), k, data<TW>(W), bias ? data<float>(*bias) : nullptr,
                             coded, values, indices, certificate);
    with_float_type(x, "x", [&](auto* tx) { encoder.run(data<std::remove_cvref_t<decltype(*tx)>>(x)); });
  });
}

int64_t coded_bytes(int64_t F, int64_t D) {
  return D > 0 && have(kInt8, D) ? (F + kPanel - 1) / kPanel * coded_panel_bytes(D) : 0;
}

void encode_weights([[maybe_unused]] const Tensor& W, [[maybe_unused]] const std::optional<Tensor>& bias,
                    [[maybe_unused]] const float* mu, [[maybe_unused]] char* codes) {
#if QSCOPE_HAS_DOTS
  [[maybe_unused]] const PlainArithmetic plain;
  const int64_t F = W.size(0), D = W.size(1), slots = num_threads(), scratch = 16 * (padded_codes(D) + 64);
  double mean = 0;
  for (int64_t d = 0; d < D; ++d) mean += static_cast<double>(mu[d]) * mu[d];
  const BoundTerms terms(D, std::sqrt(mean) * kSafe, bound_scale);
  const float* b = bias ? data<float>(*bias) : nullptr;
  Buffer<int8_t> rows(slots * scratch);
  with_float_type(W, "W_enc", [&](auto* tw) {
    using TW = std::remove_cvref_t<decltype(*tw)>;
    share((F + kPanel - 1) / kPanel, slots, [&](int64_t slot, int64_t panel) {
      const int64_t first = panel * kPanel;
      avx512::encode_panel(data<TW>(W) + first * D, std::min<int64_t>(kPanel, F - first), b ? b + first : nullptr, mu,
                           terms, D, rows.get() + slot * scratch,
                           *reinterpret_cast<CodedPanel*>(codes + panel * coded_panel_bytes(D)));
    });
  });
#endif
}

}  // namespace qscope

// For tests: weakens the bound (1 restores it); allows low-precision passes (1: bfloat16, 2: int8). Each returns what
// holds now.
extern "C" double qscope_exact_bound_scale(double scale) { return qscope::bound_scale = scale; }
extern "C" int qscope_exact_passes(int wanted) {
  return (qscope::passes_wanted = wanted) & qscope::passes_supported();
}
