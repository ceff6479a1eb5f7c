// The losses: check, then launch.
#include "distribution.h"
#include "loss_arguments.h"
#include "module.h"

namespace pyppo::bindings {

namespace {

// The arguments that every loss has, as Python passes them.
struct LossInputs {
  Borrow old_logp, advantages, values, old_values, returns, weights, denominator;
  double denominator_number = std::numeric_limits<double>::quiet_NaN();
};

LossInputs borrow_loss(py::handle old_logp, py::handle advantages, py::handle values, py::handle old_values,
                       py::handle returns, py::handle weights, py::handle denominator, Access network_access) {
  const bool number = is_number(denominator);
  LossInputs in{Borrow(old_logp.ptr(), "old_logp"),
                Borrow(advantages.ptr(), "advantages"),
                Borrow::optional(values.ptr(), "values", network_access),
                Borrow::optional(old_values.ptr(), "old_values"),
                Borrow::optional(returns.ptr(), "returns"),
                Borrow::optional(weights.ptr(), "weights"),
                Borrow::optional(number ? Py_None : denominator.ptr(), "denominator")};
  if (number) {
    in.denominator_number = number_of(denominator, "denominator");
    require_non_negative(in.denominator_number, "denominator");
  }
  return in;
}

// Network outputs may require grad where the caller hands the gradients on.
Access network_access(py::handle attached) {
  return flag_of(attached, "attached") ? Access::read_attached : Access::read;
}

// `network` is the tensor whose device and dtype lead, `rows` the one whose shape does.
LossArgs check_loss(const LossInputs& in, const LossOptions& options, const Tensor& network, int64_t batch,
                    void (*require_rows)(const Tensor&, const Tensor&), const Tensor& rows) {
  const DLDataType dtype = compute_dtype(network);
  for (const Borrow* t : {&in.old_logp, &in.advantages, &in.old_values, &in.returns}) require_compute_dtype(*t, dtype);
  require_same_dtype(in.values, network);
  if (in.weights && !in.weights->is_flag()) require_dtype(in.weights, {dtype, kBool, kUInt8});
  require_compute_dtype(in.denominator, dtype);
  if (in.denominator && in.denominator->numel() != 1) require_shape(in.denominator, {}, "a scalar");
  for (const Borrow* t : {&in.old_logp, &in.advantages, &in.values, &in.old_values, &in.returns, &in.weights})
    require_rows(*t, rows);
  for (const Borrow* t :
       {&in.old_logp, &in.advantages, &in.values, &in.old_values, &in.returns, &in.weights, &in.denominator})
    require_same_device(*t, network);
  require_non_negative(in.denominator);

  LossArgs args{};
  read_options(args, options);
  if (in.values && !in.returns) fail_missing("returns", "with values");
  if (in.returns && !in.values) fail_missing("values", "with returns");
  if (in.values && std::isfinite(args.value_clip) && !in.old_values) fail_missing("old_values", "with value_clip_coef");
  const bool flags = in.weights && in.weights->is_flag();
  args.dtype = dtype == kFloat64 ? DType::f64 : DType::f32;
  args.network_dtype = dtype_of(network);
  args.batch = batch;
  args.old_logp = in.old_logp->data;
  args.advantages = in.advantages->data;
  args.values = in.values->data;
  args.old_values = in.old_values->data;
  args.returns = in.returns->data;
  args.row_mask = flags ? in.weights->as<uint8_t>() : nullptr;
  args.weights = flags ? nullptr : in.weights->data;
  args.denominator_ptr = in.denominator->data;
  args.denominator = in.denominator_number;
  return args;
}

void require_batch_rows(const Tensor& t, const Tensor& network) { require_shape(t, {network.size(0)}, "[B]"); }

// Results of a loss: [8] metrics, the loss itself, and a gradient for each given input, of which the first is `values`.
class LossOutputs {
 public:
  LossOutputs(const Tensor& network, const Tensor& values) : out_(network), on_cpu_(!network.is_cuda()) {
    const DLDataType dtype = compute_dtype(network);
    itemsize_ = dtype.bits / 8;
    stats_ = out_.add(dtype, {num_loss_stats});
    loss_ = on_cpu_ ? out_.add(dtype, {}) : -1;
    d_values = add_like(values);
  }
  int add_like(const Tensor& t) { return t.present ? out_.add(t.dtype, t.ndim, t.shape) : -1; }
  void allocate(LossArgs& args) {
    out_.allocate();
    args.stats = out_.data(stats_);
    args.d_values = data(d_values);
  }
  void* data(int i) const { return i < 0 ? nullptr : out_.data(i); }

  int d_values;

  // (loss, metrics, (the gradients asked for)). On CUDA the loss is None: the caller makes a view of the metrics.
  py::tuple take_all(std::initializer_list<int> gradients) {
    if (on_cpu_) memcpy(out_.data(loss_), out_.data(stats_), size_t(itemsize_));
    py::tuple results(3), grads(gradients.size());
    size_t at = 0;
    for (int i : gradients) grads[at++] = take(i);
    results[0] = take(loss_);
    results[1] = take(stats_);
    results[2] = std::move(grads);
    return results;
  }

 private:
  py::object take(int i) { return i < 0 ? py::none() : py::reinterpret_steal<py::object>(out_.take(i)); }

  OutputBlock out_;
  bool on_cpu_;
  int itemsize_;
  int stats_, loss_;
};

void check_actions(const Tensor& actions, const DistributionInputs& in) {
  const Tensor& network = in.network();
  require_same_device(actions, network);
  const int64_t batch = network.size(0);
  if (in.family == Family::normal) {
    require_dtype(actions, {compute_dtype(network)});
    require_shape(actions, {batch, network.size(1)}, "[B, D]");
    return;
  }
  if (in.family == Family::bernoulli)
    require_dtype(actions, {kInt64, kInt32, kBool, kUInt8});
  else
    require_dtype(actions, {kInt64, kInt32});
  if (in.family == Family::categorical)
    require_shape(actions, {batch}, "[B]");
  else
    require_shape(actions, {batch, in.num_actions()}, "[B, K]");
}

// Old distribution parameters: for the exact KL, of the shapes of the new ones.
void check_old(const Tensor& old, const Tensor& now, bool may_be_given) {
  if (!may_be_given) {
    refuse(old.present, old.name, "this distribution");
    return;
  }
  require_same_shape(old, now);
  require_same_dtype(old, now);
  require_same_device(old, now);
}

py::tuple ppo_loss_grad(py::handle distribution, py::handle logits, py::handle mean, py::handle log_std,
                        py::handle nvec, py::handle action_mask, py::handle actions_, py::handle old_logp,
                        py::handle advantages, py::handle values, py::handle old_values, py::handle returns,
                        py::handle weights, py::handle denominator, py::handle old_logits_, py::handle old_mean_,
                        py::handle old_log_std_, py::handle objective, py::handle clip_coef, py::handle clip_coef_high,
                        py::handle dual_clip, py::handle value_clip_coef, py::handle kl_coef, py::handle ent_coef,
                        py::handle vf_coef, py::handle norm_adv, py::handle errors, py::handle attached) {
  const Access access = network_access(attached);
  const DistributionInputs dist = check_distribution(distribution, logits, mean, log_std, nvec, action_mask, access);
  const Tensor& network = dist.network();
  const bool normal = dist.family == Family::normal;
  const LossInputs in = borrow_loss(old_logp, advantages, values, old_values, returns, weights, denominator, access);
  const Borrow actions(actions_.ptr(), "actions"), old_logits = Borrow::optional(old_logits_.ptr(), "old_logits"),
                                                   old_mean = Borrow::optional(old_mean_.ptr(), "old_mean"),
                                                   old_log_std = Borrow::optional(old_log_std_.ptr(), "old_log_std");
  check_actions(actions, dist);
  check_old(old_logits, dist.logits, !normal);
  check_old(old_mean, dist.mean, normal);
  check_old(old_log_std, dist.log_std, normal);
  const LossOptions options{objective, clip_coef, clip_coef_high, dual_clip, value_clip_coef,
                            kl_coef,   ent_coef,  vf_coef,        norm_adv};
  PpoLossArgs args{};
  args.loss = check_loss(in, options, network, network.size(0), require_batch_rows, network);
  args.dist = distribution_args(dist);
  if (old_mean && !old_log_std) fail_missing("old_log_std", "with old_mean");
  if (old_log_std && !old_mean) fail_missing("old_mean", "with old_log_std");
  if (args.loss.objective == Objective::kl && !(normal ? old_mean : old_logits))
    fail_missing(normal ? "old_mean" : "old_logits", "with objective 'kl'");
  args.actions = actions->data;
  args.action_bytes = int(actions->itemsize());
  args.old_logits = old_logits->data;
  args.old_mean = old_mean->data;
  args.old_log_std = old_log_std->data;

  const DeviceGuard guard(network);
  LossOutputs out(network, in.values);
  const int d_logits = out.add_like(dist.logits), d_mean = out.add_like(dist.mean),
            d_log_std = out.add_like(dist.log_std);
  out.allocate(args.loss);
  args.d_logits = out.data(d_logits);
  args.d_mean = out.data(d_mean);
  args.d_log_std = out.data(d_log_std);
  if (network.is_cuda()) {
    int64_t* flags = error_flags(errors, network);
    const Workspace workspace(network, cuda::ppo_loss_workspace(args));
    cuda::ppo_loss(args, workspace.data(), flags, network.stream());
  } else {
    raise_row_error(run_cpu(network.numel(), [&] { return cpu::ppo_loss(args); }));
  }
  return out.take_all({d_logits, d_mean, d_log_std, out.d_values});
}

py::tuple surrogate_loss_grad(py::handle logp_, py::handle old_logp, py::handle advantages, py::handle entropy_,
                              py::handle values, py::handle old_values, py::handle returns, py::handle kl_,
                              py::handle weights, py::handle denominator, py::handle objective, py::handle clip_coef,
                              py::handle clip_coef_high, py::handle dual_clip, py::handle value_clip_coef,
                              py::handle kl_coef, py::handle ent_coef, py::handle vf_coef, py::handle norm_adv,
                              py::handle attached) {
  const Access access = network_access(attached);
  const Borrow logp(logp_.ptr(), "logp", access), entropy = Borrow::optional(entropy_.ptr(), "entropy", access),
                                                  kl = Borrow::optional(kl_.ptr(), "kl", access);
  require_network_float(logp);
  for (const Borrow* t : {&entropy, &kl}) {
    require_same_shape(*t, logp);
    require_same_dtype(*t, logp);
    require_same_device(*t, logp);
  }
  const LossInputs in = borrow_loss(old_logp, advantages, values, old_values, returns, weights, denominator, access);
  const LossOptions options{objective, clip_coef, clip_coef_high, dual_clip, value_clip_coef,
                            kl_coef,   ent_coef,  vf_coef,        norm_adv};
  SurrogateLossArgs args{};
  args.loss = check_loss(in, options, logp, logp->numel(), require_same_shape, logp);
  if (args.loss.ent_coef != 0 && !entropy) fail_missing("entropy", "with ent_coef");
  if (args.loss.objective == Objective::kl && !kl) fail_missing("kl", "with objective 'kl'");
  args.logp = logp->data;
  args.entropy = entropy->data;
  args.kl = kl->data;

  const DeviceGuard guard(logp);
  LossOutputs out(logp, in.values);
  const int d_logp = out.add_like(logp), d_entropy = out.add_like(entropy), d_kl = out.add_like(kl);
  out.allocate(args.loss);
  args.d_logp = out.data(d_logp);
  args.d_entropy = out.data(d_entropy);
  args.d_kl = out.data(d_kl);
  if (logp->is_cuda()) {
    const Workspace workspace(logp, cuda::surrogate_loss_workspace(args));
    cuda::surrogate_loss(args, workspace.data(), logp->stream());
  } else {
    run_cpu(args.loss.batch, [&] { cpu::surrogate_loss(args); });
  }
  return out.take_all({d_logp, d_entropy, out.d_values, d_kl});
}

// Whether a floating scalar is exactly 1; false where that cannot be read, or not without waiting for a device.
py::bool_ is_one(py::handle scalar_) {
  try {
    const Borrow scalar(scalar_.ptr(), "scalar", Access::read_attached);
    if (scalar->is_cuda() || scalar->numel() != 1) return false;
    return scalar->is_float64() ? *scalar->as<double>() == 1 : scalar->is_float32() && *scalar->as<float>() == 1;
  } catch (const TypeError&) {
  } catch (const std::invalid_argument&) {
  }
  return false;
}

}  // namespace

void bind_losses(py::module_& m) {
  define<ppo_loss_grad>(
      m, "ppo_loss_grad",
      "distribution, logits, mean, log_std, nvec, action_mask, actions, old_logp, advantages, values, old_values, "
      "returns, weights, denominator, old_logits, old_mean, old_log_std, objective, clip_coef, clip_coef_high, "
      "dual_clip, value_clip_coef, kl_coef, ent_coef, vf_coef, norm_adv, errors, attached");
  define<surrogate_loss_grad>(
      m, "surrogate_loss_grad",
      "logp, old_logp, advantages, entropy, values, old_values, returns, kl, weights, denominator, objective, "
      "clip_coef, clip_coef_high, dual_clip, value_clip_coef, kl_coef, ent_coef, vf_coef, norm_adv, attached");
  define<is_one>(m, "is_one", "scalar");
}

}  // namespace pyppo::bindings
