// row_adam_: Adam on the touched rows, in place, rows in parallel. Each row is read from memory once.
#include "adam.h"
#define QSCOPE_BODY "adam_kernels.h"
#include "for_each_isa.h"

#include "common.h"

namespace qscope {
namespace {

constexpr int64_t kElementsPerTask = 8192;

void check_arguments(const Tensor& W, const Tensor& grad, const Tensor& exp_avg, const Tensor& exp_avg_sq,
                     const Tensor& last_step, const Tensor& touched, const std::optional<Tensor>& shadow) {
  const auto is_matrix = [&](const Tensor& t, ScalarType dtype) {
    return t.dim() == 2 && t.size(0) == W.size(0) && t.size(1) == W.size(1) && t.scalar_type() == dtype &&
           t.is_contiguous();
  };
  const auto is_column = [&](const Tensor& t, ScalarType dtype) {
    return t.dim() == 1 && t.size(0) == W.size(0) && t.scalar_type() == dtype && t.is_contiguous();
  };
  require(W.dim() == 2 && is_matrix(W, ScalarType::Float) && is_matrix(exp_avg, ScalarType::Float) &&
              is_matrix(exp_avg_sq, ScalarType::Float),
          "W, exp_avg and exp_avg_sq must be [F, D] float32, contiguous");
  require(is_matrix(grad, grad.scalar_type()), "grad must be [F, D], contiguous");
  require(!shadow || is_matrix(*shadow, ScalarType::BFloat16), "shadow must be [F, D] bfloat16, contiguous");
  require(is_column(last_step, ScalarType::Int), "last_step must be [F] int32, contiguous");
  require(is_column(touched, ScalarType::Bool), "touched must be [F] bool, contiguous");
}

int64_t integer(const Tensor& t) {
  require(t.numel() == 1, "step must be one number");
  if (t.scalar_type() == ScalarType::Int) return *data<int32_t>(t);
  require(t.scalar_type() == ScalarType::Long, "step must be int32 or int64");
  return *data<int64_t>(t);
}

float number(const Tensor& t) {
  require(t.numel() == 1 && t.scalar_type() == ScalarType::Float, "lr and grad_scale must be one float32 number");
  return *data<float>(t);
}

// 1 - beta^step
double correction(double beta, int64_t step) {
  return beta == 0 ? 1.0 : -std::expm1(static_cast<double>(step) * std::log(beta));
}

// beta^elapsed, remembered: most rows of a batch were last updated in the same step.
class Powers {
 public:
  Powers(double beta1, double beta2) : beta1_(beta1), beta2_(beta2) {}

  AdamRow row(int64_t elapsed, float along) {
    if (elapsed != elapsed_) {
      elapsed_ = elapsed;
      decay1_ = static_cast<float>(std::pow(beta1_, static_cast<double>(elapsed)));
      decay2_ = static_cast<float>(std::pow(beta2_, static_cast<double>(elapsed)));
    }
    return {along, decay1_, decay2_};
  }

 private:
  double beta1_, beta2_;
  int64_t elapsed_ = -1;
  float decay1_ = 0, decay2_ = 0;
};

struct Rows {
  int64_t D;
  float *W, *exp_avg, *exp_avg_sq;
  int32_t* last_step;
  bf16* shadow;  // or null
  bool unit;
};

// A row whose gradient is out of range is left as it is.
template <typename T>
void update_row(const Rows& rows, int64_t f, const T* grad, int64_t step, const AdamNumbers& numbers, Powers& powers) {
  const int64_t D = rows.D;
  float *w = rows.W + f * D, *m = rows.exp_avg + f * D, *v = rows.exp_avg_sq + f * D;
  grad += f * D;
  float gg, gw, ww, along = 0;
  QSCOPE_DISPATCH(adam_sums(grad, w, D, numbers.scale, &gg, &gw, &ww));
  if (rows.unit && ww > 0) along = gw / ww;
  if (!std::isfinite(gg) || !std::isfinite(along)) return;
  const AdamRow row = powers.row(std::max<int64_t>(0, step - rows.last_step[f]), along);
  QSCOPE_DISPATCH(adam_move(grad, w, m, v, D, numbers, row, rows.unit));
  if (rows.unit) {
    QSCOPE_DISPATCH(adam_sums(w, w, D, 1.0f, &gg, &gw, &ww));
    if (ww > 0 && std::isfinite(ww)) QSCOPE_DISPATCH(scale_row(w, D, 1.0f / std::sqrt(ww)));
  }
  if (rows.shadow != nullptr) QSCOPE_DISPATCH(round_row(w, D, rows.shadow + f * D));
  rows.last_step[f] = static_cast<int32_t>(step);
}

std::vector<int64_t> touched_rows(const Tensor& touched) {
  std::vector<int64_t> rows;
  for (int64_t f = 0; f < touched.numel(); ++f) {
    if (data<bool>(touched)[f]) rows.push_back(f);
  }
  return rows;
}

void row_adam_(Tensor W, Tensor grad, Tensor exp_avg, Tensor exp_avg_sq, Tensor last_step, Tensor touched, Tensor step,
               Tensor lr, double beta1, double beta2, double eps, std::optional<Tensor> grad_scale, bool unit_rows,
               std::optional<Tensor> shadow) {
  check_arguments(W, grad, exp_avg, exp_avg_sq, last_step, touched, shadow);
  const int64_t D = W.size(1), now = integer(step);
  if (now < 1 || D == 0) return;
  const AdamNumbers numbers{grad_scale ? number(*grad_scale) : 1.0f,
                            static_cast<float>(1 - beta1),
                            static_cast<float>(1 - beta2),
                            number(lr) / static_cast<float>(correction(beta1, now)),
                            static_cast<float>(std::sqrt(correction(beta2, now))),
                            static_cast<float>(eps)};
  const Rows rows{D,
                  mutable_data<float>(W),
                  mutable_data<float>(exp_avg),
                  mutable_data<float>(exp_avg_sq),
                  mutable_data<int32_t>(last_step),
                  shadow ? mutable_data<bf16>(*shadow) : nullptr,
                  unit_rows};
  const std::vector<int64_t> ids = touched_rows(touched);
  const int64_t count = static_cast<int64_t>(ids.size()), share = std::max<int64_t>(1, kElementsPerTask / D);
  with_float_type(grad, "grad", [&](auto* t) {
    using T = std::remove_cvref_t<decltype(*t)>;
    share_out((count + share - 1) / share, num_threads(), [&](int64_t, int64_t task) {
      Powers powers(beta1, beta2);
      for (int64_t i = task * share; i < std::min(count, (task + 1) * share); ++i) {
        update_row(rows, ids[i], data<T>(grad), now, numbers, powers);
      }
    });
  });
}

}  // namespace
}  // namespace qscope

STABLE_TORCH_LIBRARY_IMPL(qscope, CPU, m) { m.impl("row_adam_", TORCH_BOX(&qscope::row_adam_)); }
