// From a loss's launch arguments to what math::surrogate reads.
#pragma once

#include "kernels.h"
#include "math/surrogate.h"

namespace pyppo {

template <class T>
PYPPO_FN math::SurrogateOptions<T> surrogate_options(const LossArgs& args) {
  const T infinity = T(__builtin_inff());
  math::SurrogateOptions<T> o;
  o.clip_low = T(1 - args.clip_low);
  o.clip_high = T(1 + args.clip_high);
  o.clips = args.objective == Objective::clip;
  o.dual_clip = T(args.dual_clip);
  o.value_clip = T(args.value_clip);
  o.kl_coef = args.objective == Objective::kl ? T(args.kl_coef) : T(0);
  o.extras = o.dual_clip < infinity || o.value_clip < infinity || o.kl_coef > T(0);
  o.ent_coef = T(args.ent_coef);
  o.vf_coef = args.values != nullptr ? T(args.vf_coef) : T(0);
  return o;
}

}  // namespace pyppo
