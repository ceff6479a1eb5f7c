// One sample's PPO loss and its derivatives: ratio, clipping, KL penalty, value loss (Schulman et al. 2017, eq. 7-9).
#pragma once

#include "scalar.h"

namespace pyppo::math {

// No dual clip is one at infinity, no value clip a range of infinity: one formula, no branches but on `clips` and
// `extras`, which a caller may fix at compile time.
template <class T>
struct SurrogateOptions {
  T clip_low, clip_high;  // 1 - epsilon, 1 + epsilon
  bool clips;             // whether the ratio is clipped to that range, or clip_fraction only counts
  bool extras;            // whether a dual clip, a value clip or a KL penalty is on
  T dual_clip;            // Ye et al. 2020, eq. 5; +inf: off
  T value_clip;           // +inf: off
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

// Advantage normalisation over n >= 2 rows whose squared deviations sum to `squares`: A becomes (A - mean) * scale.
PYPPO_FN double advantage_scale(double squares, double n) { return 1.0 / (sqrt(squares / (n - 1.0)) + 1e-8); }

// The mean may be large against the deviation, so what a T cannot hold of it is subtracted in its turn: the first
// difference is exact where it is small against the mean.
template <class T>
PYPPO_FN T normalize_advantage(T advantage, double mean, double scale) {
  const T most = T(mean), rest = T(mean - double(most));
  return ((advantage - most) - rest) * T(scale);
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
  const T clamped = math::min(math::max(ratio, o.clip_low), o.clip_high);
  const T unclipped = ratio * s.advantage;
  const T bounded = (o.clips ? clamped : ratio) * s.advantage;
  const bool clip_binds = bounded < unclipped;
  const T pessimistic = clip_binds ? bounded : unclipped;
  out.policy = -pessimistic;
  // d ratio / d logp = ratio, so the derivative of ratio * A is ratio * A itself.
  out.d_logp = clip_binds ? T(0) : -unclipped;
  out.d_kl = o.kl_coef;
  out.d_entropy = -o.ent_coef;
  out.approx_kl = (ratio - T(1)) - log_ratio;  // "k3", non-negative (Schulman 2020)
  out.clipped = (ratio < clamped || ratio > clamped) ? T(1) : T(0);

  const T error = s.value - s.target;
  out.value = T(0.5) * error * error;
  out.d_value = o.vf_coef * error;
  if (!o.extras) return out;

  const T floor = o.dual_clip * s.advantage;
  const bool dual_binds = s.advantage < T(0) && pessimistic < floor;
  // Where it is only watched, an infinite KL must not make 0 * inf of the loss.
  const T penalty = o.kl_coef > T(0) ? o.kl_coef * s.kl : T(0);
  out.policy = -(dual_binds ? floor : pessimistic) + penalty;
  out.d_logp = dual_binds ? T(0) : out.d_logp;
  // Bounds on V itself: V_old + clip(V - V_old) would round, and an unclipped value would look clipped.
  const T near = math::min(math::max(s.value, s.old_value - o.value_clip), s.old_value + o.value_clip);
  const T near_error = near - s.target;
  const T near_loss = T(0.5) * near_error * near_error;
  const bool value_clip_binds = near_loss > out.value;
  out.value = value_clip_binds ? near_loss : out.value;
  out.d_value = value_clip_binds ? T(0) : out.d_value;
  return out;
}

}  // namespace pyppo::math
