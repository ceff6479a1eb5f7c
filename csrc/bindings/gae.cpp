// gae: check, then launch.
#include "module.h"

namespace pyppo::bindings {

namespace {

py::tuple gae(py::handle rewards_, py::handle values_, py::handle terminated_, py::handle truncated_, py::handle valid_,
              py::handle final_values_, py::handle advantages_, py::handle returns_, py::handle gamma_,
              py::handle gae_lambda_, py::handle moments_) {
  const double gamma = number_of(gamma_, "gamma"), gae_lambda = number_of(gae_lambda_, "gae_lambda");
  const Borrow rewards(rewards_.ptr(), "rewards"), values(values_.ptr(), "values"),
      terminated(terminated_.ptr(), "terminated"), truncated(truncated_.ptr(), "truncated"),
      valid = Borrow::optional(valid_.ptr(), "valid"),
      final_values = Borrow::optional(final_values_.ptr(), "final_values"),
      given_advantages = Borrow::optional(advantages_.ptr(), "out[0]", Access::write),
      given_returns = Borrow::optional(returns_.ptr(), "out[1]", Access::write),
      moments = Borrow::optional(moments_.ptr(), "moments", Access::write);
  require_float(rewards);
  require_rank(rewards, 2, "[T, N]");
  const int64_t num_steps = rewards->size(0), num_envs = rewards->size(1);
  require_shape(values, {num_steps + 1, num_envs}, "[T + 1, N]");
  for (const Borrow* t : {&terminated, &truncated, &valid, &final_values, &given_advantages, &given_returns})
    require_shape(*t, {num_steps, num_envs}, "[T, N]");
  for (const Borrow* t : {&values, &final_values, &given_advantages, &given_returns}) require_same_dtype(*t, rewards);
  for (const Borrow* t : {&terminated, &truncated, &valid}) require_flag(*t);
  for (const Borrow* t : {&values, &terminated, &truncated, &valid, &final_values, &given_advantages, &given_returns})
    require_same_device(*t, rewards);
  require_dtype(moments, {kFloat64});
  require_shape(moments, {2, num_gae_moments}, "of advantages and returns");
  require_same_device(moments, rewards);
  if (moments)
    for (const Borrow* t :
         {&rewards, &values, &terminated, &truncated, &valid, &final_values, &given_advantages, &given_returns})
      if (*t) require_disjoint(moments, *t);
  require_number(gamma >= 0 && gamma <= 1, "gamma", gamma, "in [0, 1]");
  require_number(gae_lambda >= 0 && gae_lambda <= 1, "gae_lambda", gae_lambda, "in [0, 1]");

  GaeArgs args{dtype_of(rewards),
               num_steps,
               num_envs,
               rewards->data,
               values->data,
               final_values->data,
               terminated->as<uint8_t>(),
               truncated->as<uint8_t>(),
               valid->as<uint8_t>(),
               given_advantages->data,
               given_returns->data,
               gamma,
               gae_lambda,
               moments->as<double>()};
  const bool given = bool(given_advantages);
  if (given != bool(given_returns)) fail_missing(given ? "out[1]" : "out[0]", "with the other output");
  py::object out_advantages, out_returns;
  const DeviceGuard guard(rewards);
  if (given) {
    for (const Borrow* out : {&given_advantages, &given_returns})
      for (const Borrow* in : {&rewards, &values, &terminated, &truncated, &valid, &final_values})
        if (*in) require_disjoint(*out, *in);
    require_disjoint(given_advantages, given_returns);
    out_advantages = py::reinterpret_borrow<py::object>(advantages_);
    out_returns = py::reinterpret_borrow<py::object>(returns_);
  } else {
    OutputBlock out(rewards);
    out.add(rewards->dtype, {num_steps, num_envs});
    out.add(rewards->dtype, {num_steps, num_envs});
    out.allocate();
    args.advantages = out.data(0);
    args.returns = out.data(1);
    out_advantages = py::reinterpret_steal<py::object>(out.take(0));
    out_returns = py::reinterpret_steal<py::object>(out.take(1));
  }
  if (rewards->is_cuda()) {
    const Workspace workspace(rewards, cuda::gae_workspace(args));
    cuda::gae(args, workspace.data(), rewards->stream());
  } else {
    run_cpu(num_steps * num_envs, [&] { cpu::gae(args); });
  }
  return py::make_tuple(std::move(out_advantages), std::move(out_returns));
}

}  // namespace

void bind_gae(py::module_& m) {
  define<gae>(
      m, "gae",
      "rewards, values, terminated, truncated, valid, final_values, advantages, returns, gamma, gae_lambda, moments");
}

}  // namespace pyppo::bindings
