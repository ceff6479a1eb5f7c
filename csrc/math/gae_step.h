// One backward step of generalized advantage estimation (Schulman et al. 2016, eq. 16), with termination, truncation
// and rows that are no experience told apart. Selects, not products: a NaN behind a cut must not pass it.
#pragma once

#include "scalar.h"

namespace pyppo::math {

// The TD error. `next_value` is that of the next valid row, `truncated_value` that of the episode's final observation.
template <class T>
PYPPO_FN T gae_delta(T reward, T value, T next_value, T truncated_value, bool terminated, bool truncated, T gamma) {
  const T bootstrap = truncated ? truncated_value : next_value;
  const T target = terminated ? reward : reward + gamma * bootstrap;
  return target - value;
}

// The advantage, from the one of the next valid row; `cut` where an episode ends, by termination or truncation.
template <class T>
PYPPO_FN T gae_advantage(T delta, T next_advantage, bool cut, T gamma_lambda) {
  return cut ? delta : delta + gamma_lambda * next_advantage;
}

// What the recursion carries from later rows: the value of the next valid row and its advantage.
template <class T>
struct GaeCarry {
  T next_value;
  T trace;
};

// Returns the advantage of one row, 0 where it is not valid, and moves `carry` to it.
template <class T>
PYPPO_FN T gae_step(GaeCarry<T>& carry, T reward, T value, T truncated_value, bool terminated, bool truncated,
                    bool valid, T gamma, T gamma_lambda) {
  const T delta = gae_delta(reward, value, carry.next_value, truncated_value, terminated, truncated, gamma);
  const T advantage = gae_advantage(delta, carry.trace, terminated || truncated, gamma_lambda);
  carry.next_value = valid ? value : carry.next_value;
  carry.trace = valid ? advantage : carry.trace;
  return valid ? advantage : T(0);
}

}  // namespace pyppo::math
