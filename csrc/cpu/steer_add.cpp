// steer_add_: directions added to the residual in place, each token by itself: its bits do not depend on the others.
#define QSCOPE_BODY "steer_kernels.h"
#include "for_each_isa.h"

#include "common.h"

namespace qscope {
namespace {

constexpr int64_t kRowsPerTask = 8;
constexpr int64_t kWorkPerThread = 1 << 20;  // elements read: about a quarter of a millisecond

// A row of `settings`: the fields of qscope.ops.SteerSetting.
struct Setting {
  float constant, slope, reader_bias, rectify, gate_on, gate_bias, gate_threshold, enabled;
};

struct Steering {
  Tensor directions;
  std::optional<Tensor> readers, gates;
  const Setting* settings;
  const uint8_t* mask;  // null: all
  int64_t mask_width;   // 1 or S
  uint8_t* fired;       // may be null
  int64_t S, D;
};

// What one thread works with.
struct Scratch {
  std::vector<float> x, delta, dots, values, last_values;
  std::vector<int32_t> live, chosen, ids, last_ids;
  bool widened = false;

  Scratch(int64_t S, int64_t D)
      : x(static_cast<size_t>(D)), delta(static_cast<size_t>(D)), dots(static_cast<size_t>(S)) {}
};

// dots[i] = <h, rows[chosen[i]]>
template <typename T>
void dot_chosen(const T* h, const Tensor& rows, int64_t D, Scratch& w) {
  if (w.chosen.empty()) return;
  if (!w.widened) QSCOPE_DISPATCH(widen_row(h, D, w.x.data()));
  w.widened = true;
  const int64_t count = static_cast<int64_t>(w.chosen.size());
  with_float_type(rows, "readers and gates", [&](auto* t) {
    using R = std::remove_cvref_t<decltype(*t)>;
    QSCOPE_DISPATCH(dot_rows(w.x.data(), w.chosen.data(), count, count, data<R>(rows), D, w.dots.data()));
  });
}

// The directions that this token's mask and gates let through.
template <typename T>
void find_live(const T* h, const uint8_t* mask, const Steering& p, Scratch& w) {
  w.live.clear();
  w.chosen.clear();
  for (int32_t s = 0; s < p.S; ++s) {
    if (p.settings[s].enabled == 0.0f || (mask != nullptr && mask[p.mask_width == 1 ? 0 : s] == 0)) continue;
    w.live.push_back(s);
    if (p.gates && p.settings[s].gate_on != 0.0f) w.chosen.push_back(s);
  }
  if (w.chosen.empty()) return;
  dot_chosen(h, *p.gates, p.D, w);
  size_t i = 0;
  std::erase_if(w.live, [&](int32_t s) {
    const Setting& rule = p.settings[s];
    return rule.gate_on != 0.0f && !(w.dots[i++] + rule.gate_bias > rule.gate_threshold);
  });
}

// The pairs whose coefficient is not 0, in ascending s.
template <typename T>
void find_coefficients(const T* h, const Steering& p, Scratch& w) {
  w.ids.clear();
  w.values.clear();
  w.chosen.clear();
  for (int32_t s : w.live) {
    if (p.readers && p.settings[s].slope != 0.0f) w.chosen.push_back(s);
  }
  if (p.readers) dot_chosen(h, *p.readers, p.D, w);
  size_t i = 0;
  for (int32_t s : w.live) {
    const Setting& rule = p.settings[s];
    float c = rule.constant;
    if (p.readers && rule.slope != 0.0f) {
      float read = w.dots[i++] + rule.reader_bias;
      if (rule.rectify != 0.0f && read < 0.0f) read = 0.0f;  // a NaN stays
      c += rule.slope * read;
    }
    if (c == 0.0f) continue;
    w.ids.push_back(s);
    w.values.push_back(c);
  }
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

template <typename T>
void steer_row(T* h, const uint8_t* mask, uint8_t* fired, const Steering& p, Scratch& w) {
  w.widened = false;
  find_live(h, mask, p, w);
  find_coefficients(h, p, w);
  if (fired != nullptr) {
    std::memset(fired, 0, static_cast<size_t>(p.S));
    for (int32_t s : w.ids) fired[s] = 1;
  }
  if (w.ids.empty()) return;
  if (w.ids != w.last_ids || !same_bits(w.values, w.last_values)) {  // often the same for all tokens
    const int64_t count = static_cast<int64_t>(w.ids.size());
    with_float_type(p.directions, "directions", [&](auto* t) {
      using V = std::remove_cvref_t<decltype(*t)>;
      QSCOPE_DISPATCH(weighted_rows(w.values.data(), w.ids.data(), count, count, data<V>(p.directions), p.D,
                                    w.delta.data()));
    });
    w.last_ids = w.ids;
    w.last_values = w.values;
  }
  QSCOPE_DISPATCH(add_to_row(w.delta.data(), p.D, h));
}

template <typename T>
void steer_all(T* h, int64_t N, int64_t stride, const Steering& p) {
  const int64_t dots = (p.readers ? p.S : 0) + (p.gates ? p.S : 0);
  const int64_t slots = std::min(num_threads(), 1 + N * p.D * (1 + dots) / kWorkPerThread);
  std::vector<Scratch> scratch(static_cast<size_t>(slots), Scratch(p.S, p.D));
  share_out((N + kRowsPerTask - 1) / kRowsPerTask, slots, [&](int64_t slot, int64_t task) {
    for (int64_t n = task * kRowsPerTask; n < std::min(N, (task + 1) * kRowsPerTask); ++n) {
      steer_row(h + n * stride, p.mask == nullptr ? nullptr : p.mask + n * p.mask_width,
                p.fired == nullptr ? nullptr : p.fired + n * p.S, p, scratch[static_cast<size_t>(slot)]);
    }
  });
}

bool is_rows(const Tensor& t, int64_t S, int64_t D) {
  const auto type = t.scalar_type();
  return t.dim() == 2 && t.size(0) == S && t.size(1) == D && t.is_contiguous() &&
         (type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half);
}

bool is_flags(const Tensor& t) { return t.scalar_type() == ScalarType::Bool || t.scalar_type() == ScalarType::Byte; }

void steer_add(Tensor h, Tensor directions, Tensor settings, std::optional<Tensor> readers,
               std::optional<Tensor> gates, std::optional<Tensor> mask, std::optional<Tensor> fired) {
  require(h.dim() == 2 && directions.dim() == 2, "h must be [N, D] and directions [S, D]");
  const int64_t N = h.size(0), D = h.size(1), S = directions.size(0);
  require((D < 2 || h.stride(1) == 1) && (N < 2 || h.stride(0) >= D),
          "the rows of h must be contiguous and must not overlap");
  require(is_rows(directions, S, D) && (!readers || is_rows(*readers, S, D)) && (!gates || is_rows(*gates, S, D)),
          "directions, readers and gates must be contiguous [S, D]: float32, bfloat16 or float16");
  require(settings.dim() == 2 && settings.size(0) == S && settings.size(1) == 8 && settings.is_contiguous() &&
              settings.scalar_type() == ScalarType::Float,
          "settings must be contiguous [S, 8] float32");
  require(!fired || (fired->numel() == N * S && fired->is_contiguous() && fired->scalar_type() == ScalarType::Byte),
          "fired must be contiguous [N, S] uint8");
  require(!mask || (is_flags(*mask) && (mask->numel() == N || mask->numel() == N * S)),
          "mask must be [N] or [N, S], bool or uint8");
  if (N == 0 || S == 0) return;
  if (mask) mask = torch::stable::contiguous(*mask);
  const Steering steering{directions, readers, gates,
                          static_cast<const Setting*>(settings.const_data_ptr()),
                          mask ? data<uint8_t>(*mask) : nullptr,
                          mask ? mask->numel() / N : 1,
                          fired ? mutable_data<uint8_t>(*fired) : nullptr, S, D};
  with_float_type(h, "h", [&](auto* t) {
    using T = std::remove_cvref_t<decltype(*t)>;
    steer_all(mutable_data<T>(h), N, h.stride(0), steering);
  });
}

}  // namespace
}  // namespace qscope

STABLE_TORCH_LIBRARY_IMPL(qscope, CPU, m) { m.impl("steer_add_", TORCH_BOX(&qscope::steer_add)); }
