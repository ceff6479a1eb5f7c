// One step of Adam (Kingma and Ba 2015, algorithm 1) with decoupled weight decay (Loshchilov and Hutter 2019) and
// global-norm clipping.
#pragma once

#include <cmath>

#include "scalar.h"

namespace pyppo::math {

// What all parameters of one step share.
template <class T>
struct AdamStep {
  T clip;  // the factor on the gradient
  T beta1, one_minus_beta1, beta2, one_minus_beta2, eps;
  T decay;                    // 1 - learning_rate * weight_decay
  T step_size;                // learning_rate / (1 - beta1^t)
  T inverse_sqrt_correction;  // 1 / sqrt(1 - beta2^t)
};

// min(1, max_grad_norm / (norm + 1e-6)), as torch.nn.utils.clip_grad_norm_: a NaN norm is not hidden, it makes every
// gradient NaN. An infinite max_grad_norm clips nothing, whatever the norm.
PYPPO_FN double adam_clip(double norm, double max_grad_norm) {
  const double factor = max_grad_norm > 1.7976931348623157e308 ? 1.0 : max_grad_norm / (norm + 1e-6);
  return factor > 1.0 ? 1.0 : factor;
}

// `t` counts from 1.
template <class T>
PYPPO_FN AdamStep<T> adam_step(double t, double clip, double learning_rate, double beta1, double beta2, double eps,
                               double weight_decay) {
  AdamStep<T> s;
  s.clip = T(clip);
  s.beta1 = T(beta1);
  s.one_minus_beta1 = T(1.0 - beta1);  // from double: 1 - float(0.999) is 5e-5 off
  s.beta2 = T(beta2);
  s.one_minus_beta2 = T(1.0 - beta2);
  s.eps = T(eps);
  s.decay = T(1.0 - learning_rate * weight_decay);
  s.step_size = T(learning_rate / (1.0 - pow(beta1, t)));
  s.inverse_sqrt_correction = T(1.0 / sqrt(1.0 - pow(beta2, t)));
  return s;
}

PYPPO_FN float square_root(float x) { return sqrtf(x); }
PYPPO_FN double square_root(double x) { return sqrt(x); }

template <class T>
PYPPO_FN void adam_update(const AdamStep<T>& s, T gradient, T& parameter, T& exp_avg, T& exp_avg_sq) {
  const T g = gradient * s.clip;
  exp_avg = s.beta1 * exp_avg + s.one_minus_beta1 * g;
  exp_avg_sq = s.beta2 * exp_avg_sq + s.one_minus_beta2 * g * g;
  const T denominator = square_root(exp_avg_sq) * s.inverse_sqrt_correction + s.eps;
  parameter = parameter * s.decay - s.step_size * (exp_avg / denominator);
}

}  // namespace pyppo::math
