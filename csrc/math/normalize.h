// A number by running statistics, in float: what is learned from sees the same whatever type it was stored in.
#pragma once

#include "scalar.h"

namespace pyppo::math {

// What a feature is multiplied by once its mean is taken off.
PYPPO_FN float normalize_scale(double var, double eps) { return float(1.0 / sqrt(var + eps)); }

// NaN stays NaN.
PYPPO_FN float normalize(float x, float mean, float scale, float clip) {
  const float y = (x - mean) * scale;
  return y < -clip ? -clip : (y > clip ? clip : y);
}

}  // namespace pyppo::math
