// The Python face of the kernels: check, then launch. The only file that knows pybind11.
#include <pybind11/pybind11.h>

#include <cmath>
#include <limits>
#include <vector>

#include "kernels.h"
#include "math/philox.h"
#include "output.h"
#include "tensor.h"

namespace py = pybind11;

namespace pyppo {
namespace {

constexpr int64_t release_gil_above = 32768;  // elements; below, letting other threads in costs more than the kernel

// Runs a CPU kernel, without the GIL when it takes long.
template <class F>
auto run_cpu(int64_t elements, F&& kernel) {
  if (elements < release_gil_above) return kernel();
  py::gil_scoped_release release;
  return kernel();
}

class DeviceGuard {
 public:
  explicit DeviceGuard(const Tensor& t) : previous_(t.is_cuda() ? cuda::set_device(t.device.id) : -1) {}
  ~DeviceGuard() {
    if (previous_ >= 0) cuda::set_device(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_;
};

// Device memory for one launch, from the library's own stream-ordered allocator; freed when the call returns.
class Workspace {
 public:
  Workspace(const Tensor& like, size_t bytes) : block_(like) {
    if (bytes == 0) return;
    block_.add(kUInt8, {int64_t(bytes)});
    block_.allocate();
    data_ = block_.data(0);
  }
  void* data() const { return data_; }

 private:
  OutputBlock block_;
  void* data_ = nullptr;
};

DType dtype_of(const Tensor& t) {
  if (t.is(kFloat64)) return DType::f64;
  if (t.is(kFloat16)) return DType::f16;
  return t.is(kBFloat16) ? DType::bf16 : DType::f32;
}

void require_float(const Tensor& t) { require_dtype(t, {kFloat32, kFloat64}); }

// float32, float64, and on CUDA half precision: what a network may put out.
void require_network_float(const Tensor& t) {
  if (t.is_cuda())
    require_dtype(t, {kFloat32, kFloat64, kFloat16, kBFloat16});
  else
    require_float(t);
}

void require_flag(const Tensor& t) { require_dtype(t, {kBool, kUInt8}); }

DLDataType compute_dtype(const Tensor& network) { return network.is_float64() ? kFloat64 : kFloat32; }

// Everything that is no network output has the arithmetic's dtype.
void require_compute_dtype(const Tensor& t, DLDataType dtype) { require_dtype(t, {dtype}); }

[[noreturn, gnu::cold]] void fail_number(const char* name, double was, const char* must) {
  std::string text = std::to_string(was);
  throw std::invalid_argument(std::string(name) + " is " + text + "; it must be " + must);
}

void require_number(bool holds, const char* name, double value, const char* must) {
  if (!holds) fail_number(name, value, must);
}

void require_non_negative(double value, const char* name) {
  require_number(value >= 0 && std::isfinite(value), name, value, "finite and at least 0");
}

// Python numbers by name: pybind11's own conversion would not say which argument was wrong.
double number_of(py::handle value, const char* name, const char* must = "be a number") {
  const double number = PyFloat_AsDouble(value.ptr());
  if (number == -1.0 && PyErr_Occurred()) {
    const bool too_large = PyErr_ExceptionMatches(PyExc_OverflowError);
    PyErr_Clear();
    if (too_large) detail::fail(name, "is too large", "fit a double");
    detail::fail_type(name, "has type " + detail::type_name(value.ptr()), must);
  }
  return number;
}

// None means "off", which the kernels write as infinity.
double number_or_infinity(py::handle value, const char* name) {
  return value.is_none() ? std::numeric_limits<double>::infinity() : number_of(value, name, "be a number or None");
}

bool flag_of(py::handle value, const char* name) {
  if (!PyBool_Check(value.ptr())) detail::fail_type(name, "has type " + detail::type_name(value.ptr()), "be a bool");
  return value.ptr() == Py_True;
}

// An integer in [0, limit]; Python's have any size.
uint64_t integer_of(py::handle value, const char* name, uint64_t limit) {
  py::object index = py::reinterpret_steal<py::object>(PyNumber_Index(value.ptr()));
  if (!index) {
    PyErr_Clear();
    detail::fail_type(name, "has type " + detail::type_name(value.ptr()), "be an integer");
  }
  const unsigned long long number = PyLong_AsUnsignedLongLong(index.ptr());
  const bool outside = PyErr_Occurred() != nullptr;
  PyErr_Clear();
  if (outside || number > limit)
    detail::fail(name, "is " + py::cast<std::string>(py::repr(index)), "be in [0, " + std::to_string(limit) + "]");
  return number;
}

bool is_text(py::handle value, const char* text) {
  return PyUnicode_Check(value.ptr()) && PyUnicode_CompareWithASCIIString(value.ptr(), text) == 0;
}

std::string text_of(py::handle value) { return py::cast<std::string>(py::repr(value)); }

[[noreturn, gnu::cold]] void fail_missing(const char* name, const char* because) {
  throw std::invalid_argument(std::string(name) + " is None; it must be given " + because);
}

void raise_row_error(const RowErrors& errors) {
  if (errors.action >= 0)
    throw std::invalid_argument("actions has an impossible action in row " + std::to_string(errors.action) +
                                "; each must be in range and allowed by action_mask");
  if (errors.distribution >= 0)
    throw std::invalid_argument(
        "logits, mean or log_std allow no action in row " + std::to_string(errors.distribution) +
        ": action_mask must allow at least one action, and a distribution to draw from must be finite");
}

// Two int64 on a CUDA device that a kernel's row errors go to: what `errors`, given the device's index, returns.
int64_t* error_flags(py::handle errors, const Tensor& like) {
  if (errors.is_none()) return nullptr;
  const py::object object = errors(like.device.id);
  const Borrow flags(object.ptr(), "errors", Access::write);
  require_dtype(flags, {kInt64});
  require_shape(flags, {2});
  require_same_device(flags, like);
  return flags->as<int64_t>();  // the caller keeps it: freed or not, its memory outlives the launch
}

// ---- gae ------------------------------------------------------------------------------------------------------------

py::tuple gae(py::handle rewards_, py::handle values_, py::handle terminated_, py::handle truncated_, py::handle valid_,
              py::handle final_values_, py::handle advantages_, py::handle returns_, py::handle gamma_,
              py::handle gae_lambda_) {
  const double gamma = number_of(gamma_, "gamma"), gae_lambda = number_of(gae_lambda_, "gae_lambda");
  const Borrow rewards(rewards_.ptr(), "rewards"), values(values_.ptr(), "values"),
      terminated(terminated_.ptr(), "terminated"), truncated(truncated_.ptr(), "truncated"),
      valid = Borrow::optional(valid_.ptr(), "valid"),
      final_values = Borrow::optional(final_values_.ptr(), "final_values"),
      given_advantages = Borrow::optional(advantages_.ptr(), "out[0]", Access::write),
      given_returns = Borrow::optional(returns_.ptr(), "out[1]", Access::write);
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
               gae_lambda};
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

// ---- losses ---------------------------------------------------------------------------------------------------------

// The arguments that every loss has, as Python passes them.
struct LossInputs {
  Borrow old_logp, advantages, values, old_values, returns, weights, denominator;
  double denominator_number = std::numeric_limits<double>::quiet_NaN();
};

LossInputs borrow_loss(py::handle old_logp, py::handle advantages, py::handle values, py::handle old_values,
                       py::handle returns, py::handle weights, py::handle denominator, Access network_access) {
  const bool number = PyFloat_Check(denominator.ptr()) || PyLong_Check(denominator.ptr());
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

struct LossOptions {
  py::handle objective, clip_coef, clip_coef_high, dual_clip, value_clip_coef, kl_coef, ent_coef, vf_coef, norm_adv;
};

// Network outputs may require grad where the caller hands the gradients on.
Access network_access(py::handle attached) {
  return flag_of(attached, "attached") ? Access::read_attached : Access::read;
}

Objective objective_of(py::handle value) {
  if (is_text(value, "clip")) return Objective::clip;
  if (is_text(value, "unclipped")) return Objective::unclipped;
  if (is_text(value, "kl")) return Objective::kl;
  throw std::invalid_argument("objective is " + text_of(value) + "; it must be 'clip', 'unclipped' or 'kl'");
}

void read_options(LossArgs& args, const LossOptions& o) {
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

// Results of a loss: [8] metrics, the loss itself, and a gradient for each given input.
class LossOutputs {
 public:
  LossOutputs(const Tensor& network, DLDataType dtype)
      : out_(network), on_cpu_(!network.is_cuda()), itemsize_(dtype.bits / 8) {
    stats_ = out_.add(dtype, {num_loss_stats});
    loss_ = on_cpu_ ? out_.add(dtype, {}) : -1;
  }
  int add_like(const Tensor& t) { return t.present ? out_.add(t.dtype, t.ndim, t.shape) : -1; }
  void allocate() { out_.allocate(); }
  void* data(int i) const { return i < 0 ? nullptr : out_.data(i); }
  void* stats() const { return out_.data(stats_); }

  // (loss, metrics, the gradients asked for). On CUDA the loss is None: the caller makes a view of the metrics.
  py::tuple take_all(std::initializer_list<int> gradients) {
    if (on_cpu_) memcpy(out_.data(loss_), out_.data(stats_), size_t(itemsize_));
    py::tuple results(2 + gradients.size());
    size_t at = 0;
    for (int i : {loss_, stats_}) results[at++] = take(i);
    for (int i : gradients) results[at++] = take(i);
    return results;
  }

 private:
  py::object take(int i) { return i < 0 ? py::none() : py::reinterpret_steal<py::object>(out_.take(i)); }

  OutputBlock out_;
  bool on_cpu_;
  int itemsize_;
  int stats_, loss_;
};

// ---- distributions --------------------------------------------------------------------------------------------------

enum class Family { categorical, multi_categorical, bernoulli, normal };

// None: a mean makes it normal, an nvec multi_categorical, else categorical.
Family family_of(py::handle distribution, bool has_mean, bool has_nvec) {
  if (distribution.is_none())
    return has_mean ? Family::normal : (has_nvec ? Family::multi_categorical : Family::categorical);
  if (is_text(distribution, "categorical")) return Family::categorical;
  if (is_text(distribution, "multi_categorical")) return Family::multi_categorical;
  if (is_text(distribution, "bernoulli")) return Family::bernoulli;
  if (is_text(distribution, "normal")) return Family::normal;
  throw std::invalid_argument("distribution is " + text_of(distribution) +
                              "; it must be 'categorical', 'multi_categorical', 'bernoulli', 'normal' or None");
}

struct DistributionInputs {
  Borrow logits, mean, log_std, action_mask;
  Family family;
  std::vector<int64_t> nvec;

  const Tensor& network() const { return family == Family::normal ? *mean : *logits; }
  int64_t num_actions() const {
    return family == Family::normal || family == Family::bernoulli ? network().size(1) : int64_t(nvec.size());
  }
};

std::vector<int64_t> read_nvec(py::handle nvec) {
  std::vector<int64_t> out;
  py::object sequence = py::reinterpret_steal<py::object>(PySequence_Fast(nvec.ptr(), "not a sequence"));
  if (!sequence) {
    PyErr_Clear();
    detail::fail_type("nvec", "has type " + detail::type_name(nvec.ptr()), "be a sequence of integers");
  }
  const Py_ssize_t count = PySequence_Fast_GET_SIZE(sequence.ptr());
  for (Py_ssize_t i = 0; i < count; ++i) {
    const long long n = PyLong_AsLongLong(PySequence_Fast_GET_ITEM(sequence.ptr(), i));
    if (n == -1 && PyErr_Occurred()) {
      PyErr_Clear();
      detail::fail_type("nvec", "is " + text_of(nvec), "hold integers");
    }
    if (n < 1 || n > (1 << 30)) detail::fail("nvec", "is " + text_of(nvec), "hold integers of at least 1");
    out.push_back(n);
  }
  if (out.empty()) detail::fail("nvec", "is empty", "have an entry for each action");
  return out;
}

void refuse(bool given, const char* name, const char* with) {
  if (given) throw std::invalid_argument(std::string(name) + " is given; it must be None with " + with);
}

DistributionInputs check_distribution(py::handle distribution, py::handle logits, py::handle mean, py::handle log_std,
                                      py::handle nvec, py::handle action_mask, Access access) {
  DistributionInputs in{
      Borrow::optional(logits.ptr(), "logits", access),          Borrow::optional(mean.ptr(), "mean", access),
      Borrow::optional(log_std.ptr(), "log_std", access),        Borrow::optional(action_mask.ptr(), "action_mask"),
      family_of(distribution, !mean.is_none(), !nvec.is_none()), {}};
  const bool normal = in.family == Family::normal;
  if (normal) {
    refuse(bool(in.logits), "logits", "a normal distribution");
    refuse(bool(in.action_mask), "action_mask", "a normal distribution");
    if (!in.mean) fail_missing("mean", "for a normal distribution");
    if (!in.log_std) fail_missing("log_std", "with mean");
  } else {
    refuse(bool(in.mean), "mean", "logits");
    refuse(bool(in.log_std), "log_std", "logits");
    if (!in.logits) fail_missing("logits", "(or mean and log_std)");
  }
  const Tensor& network = in.network();
  require_network_float(network);
  require_rank(network, 2, normal ? "[B, D]" : "[B, A]");
  const int64_t batch = network.size(0), width = network.size(1);
  if (width == 0) detail::fail(network.name, "has shape " + detail::describe(network.shape, 2), "have columns");
  require_same_dtype(in.log_std, in.mean);
  require_same_device(in.log_std, in.mean);
  if (in.log_std && in.log_std->ndim == 1)
    require_shape(in.log_std, {width}, "[D]");
  else
    require_shape(in.log_std, {batch, width}, "[D] or [B, D]");
  require_flag(in.action_mask);
  require_shape(in.action_mask, {batch, width}, "[B, A]");
  require_same_device(in.action_mask, network);
  if (in.family == Family::multi_categorical) {
    if (nvec.is_none()) fail_missing("nvec", "for a multi_categorical distribution");
    in.nvec = read_nvec(nvec);
    int64_t sum = 0;
    for (int64_t n : in.nvec) sum += n;
    if (sum != width)
      detail::fail("nvec", "sums to " + std::to_string(sum), "sum to the logits' columns, " + std::to_string(width));
  } else {
    refuse(!nvec.is_none(), "nvec", "a distribution that is not multi_categorical");
    if (in.family == Family::categorical) in.nvec.push_back(width);
  }
  return in;
}

DistributionArgs distribution_args(const DistributionInputs& in) {
  DistributionArgs args{};
  args.kind = in.family == Family::normal      ? Distribution::normal
              : in.family == Family::bernoulli ? Distribution::bernoulli
                                               : Distribution::categorical;
  args.width = in.network().size(1);
  args.nvec = in.nvec.data();
  args.num_parts = args.kind == Distribution::categorical ? int64_t(in.nvec.size()) : args.width;
  args.logits = in.logits->data;
  args.mean = in.mean->data;
  args.log_std = in.log_std->data;
  args.per_sample_log_std = in.log_std && in.log_std->ndim == 2;
  args.action_mask = in.action_mask->as<uint8_t>();
  return args;
}

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
  LossOutputs out(network, compute_dtype(network));
  const int d_logits = out.add_like(dist.logits), d_mean = out.add_like(dist.mean),
            d_log_std = out.add_like(dist.log_std), d_values = out.add_like(in.values);
  out.allocate();
  args.loss.stats = out.stats();
  args.loss.d_values = out.data(d_values);
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
  return out.take_all({d_logits, d_mean, d_log_std, d_values});
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
  LossOutputs out(logp, compute_dtype(logp));
  const int d_logp = out.add_like(logp), d_entropy = out.add_like(entropy), d_values = out.add_like(in.values),
            d_kl = out.add_like(kl);
  out.allocate();
  args.loss.stats = out.stats();
  args.loss.d_values = out.data(d_values);
  args.d_logp = out.data(d_logp);
  args.d_entropy = out.data(d_entropy);
  args.d_kl = out.data(d_kl);
  if (logp->is_cuda()) {
    const Workspace workspace(logp, cuda::surrogate_loss_workspace(args));
    cuda::surrogate_loss(args, workspace.data(), logp->stream());
  } else {
    run_cpu(args.loss.batch, [&] { cpu::surrogate_loss(args); });
  }
  return out.take_all({d_logp, d_entropy, d_values, d_kl});
}

// ---- sample ---------------------------------------------------------------------------------------------------------

py::tuple sample(py::handle distribution, py::handle logits, py::handle mean, py::handle log_std, py::handle nvec,
                 py::handle action_mask, py::handle seed, py::handle step, py::handle row_offset,
                 py::handle deterministic, py::handle errors) {
  const DistributionInputs dist =
      check_distribution(distribution, logits, mean, log_std, nvec, action_mask, Access::read);
  const Tensor& network = dist.network();
  const int64_t batch = network.size(0);
  if (step.is_none()) fail_missing("step", "as a number or a tensor");
  const bool number = PyLong_Check(step.ptr());
  const Borrow steps = Borrow::optional(number ? Py_None : step.ptr(), "step");
  require_dtype(steps, {kInt64});
  require_shape(steps, {batch}, "[B]");
  require_same_device(steps, network);
  SampleArgs args{};
  if (number) args.step = int64_t(integer_of(step, "step", INT64_MAX));
  const uint64_t max_rows = uint64_t(1) << 32;  // a row's number is one word of the noise's counter
  if (uint64_t(batch) > max_rows) detail::fail(network.name, "has more than 2^32 rows", "have fewer");
  const DLDataType dtype = compute_dtype(network);
  args.dtype = dtype == kFloat64 ? DType::f64 : DType::f32;
  args.network_dtype = dtype_of(network);
  args.batch = batch;
  args.dist = distribution_args(dist);
  args.seed = integer_of(seed, "seed", UINT64_MAX);
  args.row_offset = int64_t(integer_of(row_offset, "row_offset", max_rows - uint64_t(batch)));
  args.steps = steps->as<int64_t>();
  args.deterministic = flag_of(deterministic, "deterministic");

  const DeviceGuard guard(network);
  OutputBlock out(network);
  const int actions = dist.family == Family::categorical
                          ? out.add(kInt64, {batch})
                          : out.add(dist.family == Family::normal ? dtype : kInt64, {batch, dist.num_actions()});
  const int logp = out.add(dtype, {batch}), entropy = out.add(dtype, {batch});
  out.allocate();
  args.actions = out.data(actions);
  args.logp = out.data(logp);
  args.entropy = out.data(entropy);
  if (network.is_cuda())
    cuda::sample(args, error_flags(errors, network), network.stream());
  else
    raise_row_error(run_cpu(network.numel(), [&] { return cpu::sample(args); }));
  py::object a = py::reinterpret_steal<py::object>(out.take(actions));
  py::object l = py::reinterpret_steal<py::object>(out.take(logp));
  py::object e = py::reinterpret_steal<py::object>(out.take(entropy));
  return py::make_tuple(std::move(a), std::move(l), std::move(e));
}

// ---- adam, permutation ----------------------------------------------------------------------------------------------

py::object adam(py::handle params_, py::handle grads_, py::handle exp_avg_, py::handle exp_avg_sq_, py::handle step_,
                py::handle learning_rate, py::handle beta1_, py::handle beta2_, py::handle eps_,
                py::handle weight_decay_, py::handle max_grad_norm, py::handle skip_) {
  const double beta1 = number_of(beta1_, "betas[0]"), beta2 = number_of(beta2_, "betas[1]"),
               eps = number_of(eps_, "eps"), weight_decay = number_of(weight_decay_, "weight_decay");
  const bool number = PyFloat_Check(learning_rate.ptr()) || PyLong_Check(learning_rate.ptr());
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

// ---- the rest -------------------------------------------------------------------------------------------------------

void set_num_threads(py::handle count) {
  const uint64_t threads = integer_of(count, "count", INT32_MAX);
  if (threads == 0) detail::fail("count", "is 0", "be at least 1");
  cpu::set_num_threads(int(threads));
}

py::tuple philox(uint64_t key, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  const math::PhiloxBlock block = math::philox(key, c0, c1, c2, c3);
  return py::make_tuple(block.word[0], block.word[1], block.word[2], block.word[3]);
}

py::dict build_info() {
  const cuda::Info info = cuda::info();
  py::dict out;
  out["version"] = PYPPO_VERSION;
  out["compiler"] = PYPPO_COMPILER;
  out["cpu_isas"] = PYPPO_ISAS;
  out["cuda_status"] = PYPPO_CUDA_STATUS;
  out["cuda_version"] = PYPPO_CUDA_VERSION;
  out["cuda_archs"] = PYPPO_CUDA_ARCHS;
  out["cuda_runtime_version"] = info.runtime_version;
  out["cuda_driver_version"] = info.driver_version;
  out["cuda_device_count"] = info.device_count;
  out["sanitizers"] = PYPPO_SANITIZERS;
  return out;
}

}  // namespace
}  // namespace pyppo

PYBIND11_MODULE(_C, m) {
  using namespace pyppo;
  using namespace py::literals;
  m.doc() = "pyppo's kernels. Arguments are positional; pyppo.ops is the documented face.";
  py::register_local_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const TypeError& error) {
      PyErr_SetString(PyExc_TypeError, error.what());
    } catch (const PythonError&) {
      // already set
    }
  });
  m.def("gae", &gae, "rewards"_a, "values"_a, "terminated"_a, "truncated"_a, "valid"_a, "final_values"_a,
        "advantages"_a, "returns"_a, "gamma"_a, "gae_lambda"_a, py::pos_only());
  m.def("ppo_loss_grad", &ppo_loss_grad, "distribution"_a, "logits"_a, "mean"_a, "log_std"_a, "nvec"_a, "action_mask"_a,
        "actions"_a, "old_logp"_a, "advantages"_a, "values"_a, "old_values"_a, "returns"_a, "weights"_a,
        "denominator"_a, "old_logits"_a, "old_mean"_a, "old_log_std"_a, "objective"_a, "clip_coef"_a,
        "clip_coef_high"_a, "dual_clip"_a, "value_clip_coef"_a, "kl_coef"_a, "ent_coef"_a, "vf_coef"_a, "norm_adv"_a,
        "errors"_a, "attached"_a, py::pos_only());
  m.def("surrogate_loss_grad", &surrogate_loss_grad, "logp"_a, "old_logp"_a, "advantages"_a, "entropy"_a, "values"_a,
        "old_values"_a, "returns"_a, "kl"_a, "weights"_a, "denominator"_a, "objective"_a, "clip_coef"_a,
        "clip_coef_high"_a, "dual_clip"_a, "value_clip_coef"_a, "kl_coef"_a, "ent_coef"_a, "vf_coef"_a, "norm_adv"_a,
        "attached"_a, py::pos_only());
  m.def("sample", &sample, "distribution"_a, "logits"_a, "mean"_a, "log_std"_a, "nvec"_a, "action_mask"_a, "seed"_a,
        "step"_a, "row_offset"_a, "deterministic"_a, "errors"_a, py::pos_only());
  m.def("adam", &adam, "params"_a, "grads"_a, "exp_avg"_a, "exp_avg_sq"_a, "step"_a, "learning_rate"_a, "beta1"_a,
        "beta2"_a, "eps"_a, "weight_decay"_a, "max_grad_norm"_a, "skip"_a, py::pos_only());
  m.def("permutation", &permutation, "out"_a, "seed"_a, "iteration"_a, "epoch"_a, py::pos_only());
  m.def("philox", &philox, "key"_a, "c0"_a, "c1"_a, "c2"_a, "c3"_a, py::pos_only());
  m.def("set_num_threads", &set_num_threads, "count"_a, py::pos_only());
  m.def("get_num_threads", &cpu::get_num_threads);
  m.def("cpu_capability", &cpu::capability);
  m.def("build_info", &build_info);
}
