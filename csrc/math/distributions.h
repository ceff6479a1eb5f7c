// Action distributions, one element at a time: what a kernel sums over actions or dimensions, and the derivatives.
// Kernels own the loops (the CPU's run over tiles of samples, CUDA's over threads); every formula stands here once.
#pragma once

#include "philox.h"
#include "scalar.h"

namespace pyppo::math {

// Categorical, from logits l_j with m = max l_j: S = sum e^(l_j - m), U = sum e^(l_j - m) (l_j - m).
//   log p_j = l_j - m - log S        H = log S - U / S

// e^(l - m) times (l - m); a masked action (l = -inf) contributes 0, not 0 * -inf.
template <class T>
PYPPO_FN T categorical_weighted(T exponential, T shifted) {
  return exponential > T(0) ? exponential * shifted : T(0);
}

template <class T>
PYPPO_FN T categorical_entropy(T log_sum, T weighted_mean) {
  return log_sum - weighted_mean;
}

// One action's share of KL(old || new) = sum q_j (log q_j - log p_j).
template <class T>
PYPPO_FN T categorical_kl(T old_probability, T old_logp, T logp) {
  return old_probability > T(0) ? old_probability * (old_logp - logp) : T(0);
}

// d/dl_j of  g_logp log p_a + g_entropy H.
template <class T>
PYPPO_FN T categorical_gradient(T probability, T logp, bool chosen, T entropy, T g_logp, T g_entropy) {
  const T from_all = probability > T(0) ? probability * (g_logp + g_entropy * (logp + entropy)) : T(0);
  return (chosen ? g_logp : T(0)) - from_all;
}

// d/dl_j of  g_logp log p_a + g_entropy H + g_kl KL(old || new).
template <class T>
PYPPO_FN T categorical_gradient(T probability, T logp, bool chosen, T entropy, T old_probability, T g_logp, T g_entropy,
                                T g_kl) {
  return categorical_gradient(probability, logp, chosen, entropy, g_logp, g_entropy) +
         g_kl * (probability - old_probability);
}

// Bernoulli, one bit from its logit l: log p(1) = -softplus(-l), log p(0) = -softplus(l). Infinite logits are sure
// bits.
template <class T>
PYPPO_FN T bernoulli_logp(T logit, bool bit) {
  return -math::softplus(bit ? -logit : logit);
}

template <class T>
PYPPO_FN T bernoulli_entropy(T logit) {
  const T magnitude = math::abs(logit);  // the entropy is even in the logit
  const T q = math::sigmoid(-magnitude);
  return math::softplus(-magnitude) + (q > T(0) ? q * magnitude : T(0));
}

// q1 (log q1 - log p1) + q0 (log q0 - log p0): each difference of logarithms from its own softplus, since the closed
// form in the logits cancels where they are large. A bit that was surely the other has no term.
template <class T>
PYPPO_FN T bernoulli_kl(T old_logit, T logit) {
  const T q1 = math::sigmoid(old_logit), q0 = math::sigmoid(-old_logit);
  const T one = q1 > T(0) ? q1 * (math::softplus(-logit) - math::softplus(-old_logit)) : T(0);
  const T zero = q0 > T(0) ? q0 * (math::softplus(logit) - math::softplus(old_logit)) : T(0);
  return one + zero;
}

template <class T>
PYPPO_FN T bernoulli_gradient(T logit, bool bit, T old_probability, T g_logp, T g_entropy, T g_kl) {
  const T p = math::sigmoid(logit), complement = math::sigmoid(-logit);
  const T variance = p * complement;
  const T from_entropy = variance > T(0) ? -g_entropy * logit * variance : T(0);
  return g_logp * (bit ? complement : -p) + from_entropy + g_kl * (p - old_probability);
}

// Whether a normal can be drawn from.
template <class T>
PYPPO_FN bool normal_is_finite(T mean, T log_std) {
  const T infinity = T(__builtin_inff());
  return math::abs(mean) < infinity && math::abs(log_std) < infinity;
}

// Normal, one dimension, by its log standard deviation.
template <class T>
PYPPO_FN T normal_logp(T z, T log_std) {
  return T(-0.5) * z * z - log_std - T(0.91893853320467274178);  // log(2 pi) / 2
}

template <class T>
PYPPO_FN T normal_entropy(T log_std) {
  return log_std + T(1.41893853320467274178);  // log(2 pi e) / 2
}

// KL(old || new) = log s - log s_old + (s_old^2 + (m_old - m)^2) / (2 s^2) - 1/2.
template <class T>
PYPPO_FN T normal_kl(T mean, T log_std, T old_mean, T old_log_std) {
  const T ratio = math::exp(old_log_std - log_std);
  const T shift = (old_mean - mean) * math::exp(-log_std);
  return log_std - old_log_std + T(0.5) * (ratio * ratio + shift * shift) - T(0.5);
}

template <class T>
struct NormalGradient {
  T mean, log_std;
};

template <class T>
PYPPO_FN NormalGradient<T> normal_gradient(T z, T inverse_std, T g_logp, T g_entropy) {
  return {g_logp * z * inverse_std, g_logp * (z * z - T(1)) + g_entropy};
}

template <class T>
PYPPO_FN NormalGradient<T> normal_kl_gradient(T mean, T log_std, T old_mean, T old_log_std, T g_kl) {
  const T inverse_std = math::exp(-log_std);
  const T ratio = math::exp(old_log_std - log_std);
  const T shift = (mean - old_mean) * inverse_std;
  return {g_kl * shift * inverse_std, g_kl * (T(1) - (ratio * ratio + shift * shift))};
}

}  // namespace pyppo::math
