// Mean and squared deviations of numbers that come in parts, in double, without the cancellation of a sum of squares
// (Chan, Golub and LeVeque 1979).
#pragma once

#include "scalar.h"

namespace pyppo::math {

struct Moments {
  double count, mean, squares;  // squares: the sum of squared deviations from the mean
};

// The squared deviations of a part, of `count` numbers, from the mean of the whole.
PYPPO_FN double squares_about(const Moments& part, double mean) {
  return part.squares + part.count * (part.mean - mean) * (part.mean - mean);
}

// Both parts together.
PYPPO_FN Moments merge(const Moments& a, const Moments& b) {
  const double count = a.count + b.count;
  if (count == 0) return a;
  const double mean = a.mean + (b.mean - a.mean) * (b.count / count);
  return {count, mean, squares_about(a, mean) + squares_about(b, mean)};
}

}  // namespace pyppo::math
