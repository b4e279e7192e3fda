// What the update of a row needs besides the row.
#pragma once

namespace qscope {

struct AdamNumbers {
  float scale;         // factor on the gradient
  float rest1, rest2;  // 1 - beta
  float rate;          // lr / (1 - beta1^step)
  float root2;         // sqrt(1 - beta2^step)
  float eps;
};

struct AdamRow {
  float along;           // <g, w> / <w, w>, what is removed from the gradient, in units of w
  float decay1, decay2;  // beta^(steps since the row's last update)
};

}  // namespace qscope
