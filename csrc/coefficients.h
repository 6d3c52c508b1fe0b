// The scalars of the operations, rounded to float once from double values.
#pragma once

namespace sap_fast {

// What AdamW multiplies by.
struct AdamWCoefficients {
  float decay;            // 1 − lr·weight_decay
  float gradient_weight;  // 1 − β₁
  float beta2;
  float square_weight;    // 1 − β₂
  float negative_step;    // −lr / (1 − β₁ᵗ)
  float root_correction;  // √(1 − β₂ᵗ)
  float eps;
};

// How the gradient is made from the stored one: scale·(sign·g + c·d).
struct GradientCoefficients {
  float sign;   // −1 to ascend the task objective
  float blend;  // c, of any sign; zero leaves g, whatever d holds
  float scale;  // clipping and unscaling
};

}  // namespace sap_fast
