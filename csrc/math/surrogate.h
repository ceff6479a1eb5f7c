// One sample's PPO loss and its derivatives: ratio, clipping, KL penalty, value loss (Schulman et al. 2017, eq. 7-9).
#pragma once

#include "scalar.h"

namespace pyppo::math {

// The unclipped objective is the clipped one with infinite bounds, no dual clip is one at infinity, no value clip a
// range of infinity: one formula, no branches.
template <class T>
struct SurrogateOptions {
  T clip_low, clip_high;    // the range outside of which clip_fraction counts: 1 - epsilon, 1 + epsilon
  T bound_low, bound_high;  // what the ratio is clipped to: the same, or -inf, +inf
  T dual_clip;              // Ye et al. 2020, eq. 5; +inf: off
  T value_clip;             // +inf: off
  T kl_coef, ent_coef, vf_coef;
};

template <class T>
struct SurrogateSample {
  T logp, old_logp, advantage, entropy, kl;
  T value, old_value, target;
};

// The terms of the loss, unweighted, and the derivatives of policy + vf_coef value - ent_coef entropy.
template <class T>
struct SurrogateTerms {
  T policy, value, approx_kl, clipped;
  T d_logp, d_entropy, d_kl, d_value;
};

template <class T>
PYPPO_FN T min(T a, T b) {
  return b < a ? b : a;
}

template <class T>
PYPPO_FN T max(T a, T b) {
  return a < b ? b : a;
}

// Advantage normalisation over n >= 2 rows whose squared deviations sum to `squares`: A becomes (A - mean) * scale. In
// double, since the mean may be large against the deviation.
PYPPO_FN double advantage_scale(double squares, double n) { return 1.0 / (sqrt(squares / (n - 1.0)) + 1e-8); }

template <class T>
PYPPO_FN T normalize_advantage(T advantage, double mean, double scale) {
  return T((double(advantage) - mean) * scale);
}

// The loss, of its terms' sums or means.
PYPPO_FN double total_loss(double policy, double value, double entropy, double vf_coef, double ent_coef) {
  return policy + vf_coef * value - ent_coef * entropy;
}

template <class T>
PYPPO_FN SurrogateTerms<T> surrogate(const SurrogateOptions<T>& o, const SurrogateSample<T>& s) {
  SurrogateTerms<T> out;
  const T log_ratio = s.logp - s.old_logp;
  const T ratio = math::exp(log_ratio);
  const T unclipped = ratio * s.advantage;
  const T bounded = math::min(math::max(ratio, o.bound_low), o.bound_high) * s.advantage;
  const bool clip_binds = bounded < unclipped;
  const T pessimistic = clip_binds ? bounded : unclipped;
  const T floor = o.dual_clip * s.advantage;
  const bool dual_binds = s.advantage < T(0) && pessimistic < floor;
  // Where it is only watched, an infinite KL must not make 0 * inf of the loss.
  const T penalty = o.kl_coef > T(0) ? o.kl_coef * s.kl : T(0);
  out.policy = -(dual_binds ? floor : pessimistic) + penalty;
  // d ratio / d logp = ratio, so the derivative of ratio * A is ratio * A itself.
  out.d_logp = (clip_binds || dual_binds) ? T(0) : -unclipped;
  out.d_kl = o.kl_coef;
  out.d_entropy = -o.ent_coef;
  out.approx_kl = (ratio - T(1)) - log_ratio;  // "k3", non-negative (Schulman 2020)
  out.clipped = (ratio < o.clip_low || ratio > o.clip_high) ? T(1) : T(0);

  const T error = s.value - s.target;
  // Bounds on V itself: V_old + clip(V - V_old) would round, and an unclipped value would look clipped.
  const T near = math::min(math::max(s.value, s.old_value - o.value_clip), s.old_value + o.value_clip);
  const T near_error = near - s.target;
  const T loss = T(0.5) * error * error;
  const T near_loss = T(0.5) * near_error * near_error;
  const bool value_clip_binds = near_loss > loss;
  out.value = value_clip_binds ? near_loss : loss;
  out.d_value = value_clip_binds ? T(0) : o.vf_coef * error;
  return out;
}

}  // namespace pyppo::math
