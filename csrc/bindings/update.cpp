// What an update needs beside its loss, adam and permutation: check, then launch.
#include "module.h"

namespace pyppo::bindings {

namespace {

py::object adam(py::handle params_, py::handle grads_, py::handle exp_avg_, py::handle exp_avg_sq_, py::handle step_,
                py::handle learning_rate, py::handle beta1_, py::handle beta2_, py::handle eps_,
                py::handle weight_decay_, py::handle max_grad_norm, py::handle skip_) {
  const double beta1 = number_of(beta1_, "betas[0]"), beta2 = number_of(beta2_, "betas[1]"),
               eps = number_of(eps_, "eps"), weight_decay = number_of(weight_decay_, "weight_decay");
  const bool number = is_number(learning_rate);
  const Borrow params(params_.ptr(), "params", Access::write), grads(grads_.ptr(), "grads"),
      exp_avg(exp_avg_.ptr(), "exp_avg", Access::write), exp_avg_sq(exp_avg_sq_.ptr(), "exp_avg_sq", Access::write),
      step(step_.ptr(), "step", Access::write),
      skip = Borrow::optional(skip_.ptr(), "skip"),
      rate = number ? Borrow::optional(Py_None, "learning_rate") : Borrow(learning_rate.ptr(), "learning_rate");
  require_float(params);
  require_rank(params, 1, "[P]");
  for (const Borrow* t : {&grads, &exp_avg, &exp_avg_sq}) {
    require_same_dtype(*t, params);
    require_same_shape(*t, params);
  }
  require_dtype(step, {kInt64});
  require_flag(skip);
  require_same_dtype(rate, params);
  for (const Borrow* t : {&step, &skip, &rate})
    if (*t && (*t)->numel() != 1) require_shape(*t, {1}, "one element");
  for (const Borrow* t : {&grads, &exp_avg, &exp_avg_sq, &step, &skip, &rate}) require_same_device(*t, params);
  require_non_negative(rate);
  for (const Borrow* out : {&params, &exp_avg, &exp_avg_sq})
    for (const Borrow* other : {&params, &grads, &exp_avg, &exp_avg_sq})
      if (out != other) require_disjoint(*out, *other);

  AdamArgs args{};
  args.dtype = dtype_of(params);
  args.size = params->numel();
  args.params = params->data;
  args.grads = grads->data;
  args.exp_avg = exp_avg->data;
  args.exp_avg_sq = exp_avg_sq->data;
  args.step = step->as<int64_t>();
  args.learning_rate_ptr = rate->data;
  if (number) {
    args.learning_rate = number_of(learning_rate, "learning_rate");
    require_non_negative(args.learning_rate, "learning_rate");
  }
  require_number(beta1 >= 0 && beta1 < 1, "betas[0]", beta1, "in [0, 1)");
  require_number(beta2 >= 0 && beta2 < 1, "betas[1]", beta2, "in [0, 1)");
  require_non_negative(eps, "eps");
  require_non_negative(weight_decay, "weight_decay");
  args.beta1 = beta1;
  args.beta2 = beta2;
  args.eps = eps;
  args.weight_decay = weight_decay;
  args.max_grad_norm = number_or_infinity(max_grad_norm, "max_grad_norm");
  require_number(args.max_grad_norm > 0, "max_grad_norm", args.max_grad_norm, "greater than 0, or None");
  args.skip = skip->as<uint8_t>();

  const DeviceGuard guard(params);
  OutputBlock out(params);
  const int norm = out.add(params->dtype, {});
  out.allocate();
  args.grad_norm = out.data(norm);
  if (params->is_cuda()) {
    const Workspace workspace(params, cuda::adam_workspace(args));
    cuda::adam(args, workspace.data(), params->stream());
  } else {
    run_cpu(args.size, [&] { cpu::adam(args); });
  }
  return py::reinterpret_steal<py::object>(out.take(norm));
}

// Fills `out` and returns nothing: an integer alone does not say which library's tensor to make.
void permutation(py::handle out_, py::handle seed, py::handle iteration, py::handle epoch) {
  const Borrow out(out_.ptr(), "out", Access::write);
  require_dtype(out, {kInt64});
  require_rank(out, 1, "[n]");
  const PermutationArgs args{out->numel(), integer_of(seed, "seed", UINT64_MAX),
                             uint32_t(integer_of(iteration, "iteration", UINT32_MAX)),
                             uint32_t(integer_of(epoch, "epoch", UINT32_MAX)), out->as<int64_t>()};
  const DeviceGuard guard(out);
  if (out->is_cuda())
    cuda::permutation(args, out->stream());
  else
    run_cpu(args.n, [&] { cpu::permutation(args); });
}

}  // namespace

void bind_update(py::module_& m) {
  define<adam>(
      m, "adam",
      "params, grads, exp_avg, exp_avg_sq, step, learning_rate, beta1, beta2, eps, weight_decay, max_grad_norm, skip");
  define<permutation>(m, "permutation", "out, seed, iteration, epoch");
}

}  // namespace pyppo::bindings
