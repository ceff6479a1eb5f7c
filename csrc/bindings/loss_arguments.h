// The options that every loss has, as Python passes them.
#pragma once

#include "common.h"

namespace pyppo::bindings {

struct LossOptions {
  py::handle objective, clip_coef, clip_coef_high, dual_clip, value_clip_coef, kl_coef, ent_coef, vf_coef, norm_adv;
};

inline Objective objective_of(py::handle value) {
  if (is_text(value, "clip")) return Objective::clip;
  if (is_text(value, "unclipped")) return Objective::unclipped;
  if (is_text(value, "kl")) return Objective::kl;
  throw std::invalid_argument("objective is " + text_of(value) + "; it must be 'clip', 'unclipped' or 'kl'");
}

inline void read_options(LossArgs& args, const LossOptions& o) {
  args.objective = objective_of(o.objective);
  args.clip_low = number_of(o.clip_coef, "clip_coef");
  require_non_negative(args.clip_low, "clip_coef");
  args.clip_high = o.clip_coef_high.is_none() ? args.clip_low : number_of(o.clip_coef_high, "clip_coef_high");
  require_non_negative(args.clip_high, "clip_coef_high");
  args.dual_clip = number_or_infinity(o.dual_clip, "dual_clip");
  require_number(args.dual_clip > 1, "dual_clip", args.dual_clip, "greater than 1, or None");
  if (!o.dual_clip.is_none() && args.objective != Objective::clip)
    throw std::invalid_argument("dual_clip is given; objective must be 'clip' then, and it is " + text_of(o.objective));
  args.value_clip = number_or_infinity(o.value_clip_coef, "value_clip_coef");
  require_number(args.value_clip >= 0, "value_clip_coef", args.value_clip, "at least 0, or None");
  args.kl_coef = number_of(o.kl_coef, "kl_coef");
  args.ent_coef = number_of(o.ent_coef, "ent_coef");
  args.vf_coef = number_of(o.vf_coef, "vf_coef");
  require_non_negative(args.kl_coef, "kl_coef");
  require_number(std::isfinite(args.ent_coef), "ent_coef", args.ent_coef, "finite");
  require_non_negative(args.vf_coef, "vf_coef");
  args.normalize_advantages = flag_of(o.norm_adv, "norm_adv");
}

}  // namespace pyppo::bindings
