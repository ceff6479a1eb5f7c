// MlpEngine: a multilayer perceptron's parameters, its optimiser and a rollout, bound together once, so that a step
// costs little more than its arithmetic.
#include <pybind11/stl.h>

#include <vector>

#include "distribution.h"
#include "kept.h"
#include "loss_arguments.h"
#include "module.h"

namespace pyppo::bindings {

using namespace py::literals;

namespace {

Activation activation_of(py::handle value) {
  if (is_text(value, "tanh")) return Activation::tanh;
  if (is_text(value, "relu")) return Activation::relu;
  if (is_text(value, "elu")) return Activation::elu;
  if (is_text(value, "silu")) return Activation::silu;
  throw std::invalid_argument("activation is " + text_of(value) + "; it must be 'tanh', 'relu', 'elu' or 'silu'");
}

NumberType action_type_of(const Kept& t) {
  const DLDataType d = t.dtype();
  if (d.code == kDLFloat) return d.bits == 64 ? NumberType::f64 : NumberType::f32;
  if (d.code == kDLUInt) return NumberType::u8;
  return d.bits == 8    ? NumberType::i8
         : d.bits == 16 ? NumberType::i16
         : d.bits == 32 ? NumberType::i32
                        : NumberType::i64;
}

constexpr DLDataType kInt8{kDLInt, 8, 1}, kInt16{kDLInt, 16, 1};

template <class F>
auto without_gil(F&& kernel) {
  py::gil_scoped_release release;
  return kernel();
}

class MlpEngine {
 public:
  explicit MlpEngine(const py::kwargs& given)
      : params_(given["params"], "params", {kFloat32, kFloat64}),
        grads_(given["grads"], "grads", params_.dtype()),
        exp_avg_(given["exp_avg"], "exp_avg", params_.dtype()),
        exp_avg_sq_(given["exp_avg_sq"], "exp_avg_sq", params_.dtype()),
        step_(given["step"], "step", kInt64),
        obs_(given["obs"], "obs", kFloat32),
        action_mask_(Kept::optional(given["action_mask"], "action_mask", {kBool, kUInt8, kInt8})),
        obs_mean_(Kept::optional(given["obs_mean"], "obs_mean", kFloat32)),
        obs_scale_(Kept::optional(given["obs_scale"], "obs_scale", kFloat32)),
        actions_(given["actions"], "actions", {kInt64, kFloat32}),
        logp_(given["logp"], "logp", kFloat32),
        values_(given["values"], "values", kFloat32),
        advantages_(given["advantages"], "advantages", kFloat32),
        returns_(given["returns"], "returns", kFloat32),
        steps_(given["steps"], "steps", kInt64),
        old_params_(Kept::optional(given["old_params"], "old_params", kFloat32)),
        old_log_std_(Kept::optional(given["old_log_std"], "old_log_std", kFloat32)),
        env_actions_(given["env_actions"], "env_actions", {kInt8, kUInt8, kInt16, kInt32, kInt64, kFloat32, kFloat64}),
        action_start_(Kept::optional(given["action_start"], "action_start", kInt64)),
        action_low_(Kept::optional(given["action_low"], "action_low", kFloat64)),
        action_high_(Kept::optional(given["action_high"], "action_high", kFloat64)),
        rescale_(flag_of(given["rescale"], "rescale")),
        noise_seed_(integer_of(given["noise_seed"], "noise_seed", UINT64_MAX)),
        order_seed_(integer_of(given["order_seed"], "order_seed", UINT64_MAX)) {
    read_network(given);
    read_distribution(given);
    check_shapes();
  }

  void act(py::handle t_, py::handle first_, py::handle count_) {
    const int64_t t = int64_t(integer_of(t_, "t", uint64_t(num_steps_ - 1)));
    const int64_t first = int64_t(integer_of(first_, "first", uint64_t(num_envs_)));
    const int64_t count = int64_t(integer_of(count_, "count", uint64_t(num_envs_ - first)));
    const int64_t at = t * num_envs_ + first;
    MlpActArgs a{};
    a.mlp = mlp_;
    a.dist = dist_;
    a.rows = count;
    a.obs = obs_.as<float>() + at * width_;
    if (action_mask_) a.action_mask = action_mask_.as<uint8_t>() + at * num_params();
    a.seed = noise_seed_;
    a.row_offset = first;
    a.steps = steps_.as<int64_t>() + first;
    a.actions = actions_.as<char>() + at * parts() * (is_normal() ? 4 : 8);
    a.logp = logp_.as<float>() + at;
    a.values = values_.as<float>() + at;
    if (old_params_) a.old_params = old_params_.as<float>() + at * num_params();
    if (old_log_std_) a.old_log_std = old_log_std_.as<float>() + at * num_params();
    a.env_type = action_type_of(env_actions_);
    a.env_actions = env_actions_.as<char>() + first * parts() * (env_actions_.dtype().bits / 8);
    a.action_start = action_start_.as<int64_t>();
    a.action_low = action_low_.as<double>();
    a.action_high = action_high_.as<double>();
    a.rescale = rescale_;
    RowErrors errors = run_cpu(count * multiplications_ / 64, [&] { return cpu::mlp_act(a); });
    if (errors.distribution >= 0) errors.distribution += first;
    raise_row_error(errors);
  }

  py::object value(py::handle obs_) {
    const Borrow obs(obs_.ptr(), "obs");
    require_dtype(obs, {kFloat32});
    require_rank(obs, 2, "[n, F]");
    require_shape(obs, {obs->size(0), width_}, "[n, F]");
    if (obs->is_cuda()) detail::fail("obs", "is on a GPU", "be on the CPU");
    OutputBlock out(obs);
    const int values = out.add(kFloat32, {obs->size(0)});
    out.allocate();
    run_value(obs->as<float>(), obs->size(0), out.data<float>(values));
    return py::reinterpret_steal<py::object>(out.take(values));
  }

  void bootstrap() {
    const int64_t at = num_steps_ * num_envs_;
    run_value(obs_.as<float>() + at * width_, num_envs_, values_.as<float>() + at);
  }

  py::object update(py::handle rows, py::handle iteration, py::handle epochs, py::handle num_minibatches,
                    const py::kwargs& given) {
    const Borrow index(rows.ptr(), "rows");
    MlpUpdateArgs a = update_args(index);
    a.seed = order_seed_;
    a.iteration = uint32_t(integer_of(iteration, "iteration", UINT32_MAX));
    a.epochs = int64_t(integer_of(epochs, "epochs", INT32_MAX));
    a.num_minibatches = int64_t(integer_of(num_minibatches, "num_minibatches", INT32_MAX));
    if (a.num_minibatches == 0) detail::fail("num_minibatches", "is 0", "be at least 1");
    read_options(a.loss,
                 {given["objective"], given["clip_coef"], given["clip_coef_high"], given["dual_clip"],
                  given["value_clip_coef"], given["kl_coef"], given["ent_coef"], given["vf_coef"], given["norm_adv"]});
    if (a.loss.objective == Objective::kl && !old_params_)
      throw std::invalid_argument("objective is 'kl'; old_params must have been given then");
    a.adam.learning_rate = number_of(given["learning_rate"], "learning_rate");
    require_non_negative(a.adam.learning_rate, "learning_rate");
    a.adam.eps = number_of(given["eps"], "eps");
    require_non_negative(a.adam.eps, "eps");
    a.adam.max_grad_norm = number_or_infinity(given["max_grad_norm"], "max_grad_norm");
    require_number(a.adam.max_grad_norm > 0, "max_grad_norm", a.adam.max_grad_norm, "greater than 0, or None");
    a.kl_limit = number_or_infinity(given["kl_limit"], "kl_limit");
    std::vector<double> stats(size_t(a.epochs * a.num_minibatches * mlp_stats));
    int64_t seen = 0;
    a.stats = stats.data();
    a.seen = &seen;
    raise_row_error(without_gil([&] { return cpu::mlp_update(a); }));
    OutputBlock out(index);
    const int table = out.add(kFloat64, {seen, mlp_stats});
    out.allocate();
    std::copy_n(stats.data(), seen * mlp_stats, out.data<double>(table));
    return py::reinterpret_steal<py::object>(out.take(table));
  }

  double exact_kl(py::handle rows) {
    const Borrow index(rows.ptr(), "rows");
    if (!old_params_) throw std::invalid_argument("old_params is None; the KL is that of the distribution kept there");
    MlpUpdateArgs a = update_args(index);
    if (a.num_rows == 0) return std::numeric_limits<double>::quiet_NaN();
    a.loss.dual_clip = a.loss.value_clip = std::numeric_limits<double>::infinity();
    double kl = 0;
    a.stats = &kl;
    raise_row_error(without_gil([&] { return cpu::mlp_kl(a); }));
    return kl;
  }

 private:
  bool is_normal() const { return dist_.kind == Distribution::normal; }
  int64_t parts() const { return dist_.num_parts; }
  int64_t num_params() const { return dist_.width; }

  void run_value(const float* obs, int64_t rows, float* values) {
    const MlpValueArgs a{mlp_, rows, obs, values};
    run_cpu(rows * multiplications_ / 64, [&] { cpu::mlp_value(a); });
  }

  void read_network(const py::kwargs& given) {
    for (py::handle layer : py::reinterpret_borrow<py::object>(given["layers"])) {
      const auto numbers = py::cast<std::vector<int64_t>>(layer);
      if (numbers.size() != 4)
        detail::fail("layers", "has " + text_of(layer), "hold (inputs, outputs, weight offset, bias offset)");
      layers_.push_back({numbers[0], numbers[1], numbers[2], numbers[3]});
    }
    const int64_t count = int64_t(layers_.size());
    const auto part = [&](const char* name, int64_t least) {
      const int64_t n = int64_t(integer_of(given[name], name, uint64_t(count)));
      if (n < least) detail::fail(name, "is " + std::to_string(n), "be at least " + std::to_string(least));
      return n;
    };
    mlp_.num_trunk = part("num_trunk", 0);
    mlp_.num_actor = part("num_actor", 1);
    mlp_.num_critic = part("num_critic", 1);
    if (mlp_.num_trunk + mlp_.num_actor + mlp_.num_critic != count)
      detail::fail("layers", "has " + std::to_string(count) + " layers",
                   "have the trunk's, the actor's and the critic's");
    mlp_.dtype = params_.dtype() == kFloat64 ? DType::f64 : DType::f32;
    mlp_.activation = activation_of(given["activation"]);
    mlp_.layers = layers_.data();
    mlp_.params = params_.data();
    mlp_.obs_mean = obs_mean_.as<float>();
    mlp_.obs_scale = obs_scale_.as<float>();
    mlp_.obs_clip = float(number_or_infinity(given["obs_clip"], "obs_clip"));
    width_ = layers_[0].inputs;
    for (int64_t l = 0; l < count; ++l) check_layer(l);
    for (const DenseLayer& layer : layers_) multiplications_ += layer.inputs * layer.outputs;
  }

  void check_layer(int64_t l) const {
    const DenseLayer& layer = layers_[size_t(l)];
    const bool first = l == mlp_.num_trunk || l == mlp_.num_trunk + mlp_.num_actor;
    const int64_t source = first ? mlp_.num_trunk - 1 : l - 1;
    const int64_t inputs = source < 0 ? width_ : layers_[size_t(source)].outputs;
    const auto inside = [&](int64_t offset, int64_t size) { return offset >= 0 && offset + size <= params_.numel(); };
    const bool sized =
        layer.inputs >= 1 && layer.outputs >= 1 && layer.inputs <= (1 << 24) && layer.outputs <= (1 << 24);
    if (!sized || layer.inputs != inputs || !inside(layer.weight, layer.inputs * layer.outputs) ||
        !inside(layer.bias, layer.outputs))
      detail::fail("layers", "has at " + std::to_string(l) + " a layer of " + std::to_string(layer.inputs) + " inputs",
                   "have " + std::to_string(inputs) + " there, with weight and bias inside params");
  }

  void read_distribution(const py::kwargs& given) {
    const Family family = family_of(given["distribution"], false, false);
    dist_.kind = family == Family::normal      ? Distribution::normal
                 : family == Family::bernoulli ? Distribution::bernoulli
                                               : Distribution::categorical;
    const int64_t outputs = layers_[size_t(mlp_.num_trunk + mlp_.num_actor - 1)].outputs;
    dist_.width = outputs;
    if (is_normal()) read_log_std(given["log_std_offset"], given["log_std_limit"]);
    if (family == Family::multi_categorical)
      nvec_ = read_nvec(given["nvec"]);
    else if (family == Family::categorical)
      nvec_.push_back(outputs);
    int64_t sum = 0;
    for (int64_t n : nvec_) sum += n;
    if (!nvec_.empty() && sum != outputs)
      detail::fail("nvec", "sums to " + std::to_string(sum), "sum to the actor's outputs, " + std::to_string(outputs));
    dist_.nvec = nvec_.data();
    dist_.num_parts = nvec_.empty() ? num_params() : int64_t(nvec_.size());
  }

  void read_log_std(py::handle offset, py::handle limit) {
    if (offset.is_none()) {
      dist_.log_std_limit = number_of(limit, "log_std_limit");
      require_number(dist_.log_std_limit > 0 && std::isfinite(dist_.log_std_limit), "log_std_limit",
                     dist_.log_std_limit, "finite and greater than 0");
      if (dist_.width % 2 != 0)
        detail::fail("layers", "ends the actor with " + std::to_string(dist_.width) + " outputs",
                     "have as many log standard deviations as means where log_std_offset is None");
      dist_.width /= 2;
      dist_.log_std = -1;
      return;
    }
    dist_.log_std = int64_t(integer_of(offset, "log_std_offset", uint64_t(params_.numel())));
    if (dist_.log_std + dist_.width > params_.numel())
      detail::fail("log_std_offset", "is " + std::to_string(dist_.log_std), "lie inside params with all of log_std");
  }

  void check_shapes() {
    if (obs_.shape().size() != 3 || obs_.shape()[0] < 2)
      detail::fail("obs", "has shape " + detail::describe(obs_.shape().data(), int(obs_.shape().size())),
                   "be [T + 1, N, F]");
    num_steps_ = obs_.shape()[0] - 1;
    num_envs_ = obs_.shape()[1];
    const int64_t t = num_steps_, n = num_envs_;
    if (params_.shape().size() != 1) detail::fail("params", "has more than one dimension", "be [P]");
    for (const Kept* flat : {&grads_, &exp_avg_, &exp_avg_sq_}) flat->require(params_.shape(), "as params");
    step_.require({1}, "[1]");
    obs_.require({t + 1, n, width_}, "[T + 1, N, F]");
    obs_mean_.require({width_}, "[F]");
    obs_scale_.require({width_}, "[F]");
    if (bool(obs_mean_) != bool(obs_scale_))
      detail::fail("obs_scale", obs_scale_ ? "is given" : "is None", "be given with obs_mean, and only then");
    const DLDataType stored = is_normal() ? kFloat32 : kInt64;
    if (!(actions_.dtype() == stored))
      detail::fail_type("actions", "has another dtype", is_normal() ? "be float32" : "be int64");
    actions_.require_rows(t, n, parts(), "[T, N, ...]");
    for (const Kept* column : {&logp_, &advantages_, &returns_}) column->require({t, n}, "[T, N]");
    values_.require({t + 1, n}, "[T + 1, N]");
    steps_.require({n}, "[N]");
    action_mask_.require({t + 1, n, num_params()}, "[T + 1, N, A]");
    if (is_normal()) refuse(bool(action_mask_), "action_mask", "a normal distribution");
    old_params_.require({t, n, num_params()}, "[T, N, A]");
    old_log_std_.require({t, n, num_params()}, "[T, N, A]");
    if (is_normal() && bool(old_params_) != bool(old_log_std_))
      detail::fail("old_log_std", old_log_std_ ? "is given" : "is None", "be given with old_params, and only then");
    if (env_actions_.shape().empty() || env_actions_.shape()[0] != n || env_actions_.numel() != n * parts())
      detail::fail("env_actions",
                   "has shape " + detail::describe(env_actions_.shape().data(), int(env_actions_.shape().size())),
                   "have N rows of one action each");
    action_start_.require({parts()}, "[K]");
    action_low_.require({parts()}, "[D]");
    action_high_.require({parts()}, "[D]");
    if (is_normal() && !(action_low_ && action_high_))
      detail::fail("action_low", "or action_high is None", "be given for a normal distribution");
  }

  MlpUpdateArgs update_args(const Borrow& rows) const {
    require_dtype(rows, {kInt64});
    require_rank(rows, 1, "[n]");
    if (rows->is_cuda()) detail::fail("rows", "is on a GPU", "be on the CPU");
    const int64_t* index = rows->as<int64_t>();
    for (int64_t i = 0; i < rows->numel(); ++i)
      if (index[i] < 0 || index[i] >= num_steps_ * num_envs_)
        detail::fail("rows", "has " + std::to_string(index[i]) + " at " + std::to_string(i),
                     "lie in [0, " + std::to_string(num_steps_ * num_envs_) + ")");
    MlpUpdateArgs a{};
    a.mlp = mlp_;
    a.dist = dist_;
    a.rollout = {obs_.as<float>(),    action_mask_.as<uint8_t>(), actions_.data(),
                 logp_.as<float>(),   advantages_.as<float>(),    returns_.as<float>(),
                 values_.as<float>(), old_params_.as<float>(),    old_log_std_.as<float>()};
    a.rows = index;
    a.num_rows = rows->numel();
    a.loss.denominator = std::numeric_limits<double>::quiet_NaN();
    a.adam.dtype = mlp_.dtype;
    a.adam.size = params_.numel();
    a.adam.params = params_.data();
    a.adam.grads = a.grads = grads_.data();
    a.adam.exp_avg = exp_avg_.data();
    a.adam.exp_avg_sq = exp_avg_sq_.data();
    a.adam.step = step_.as<int64_t>();
    a.adam.beta1 = 0.9;
    a.adam.beta2 = 0.999;
    return a;
  }

  Kept params_, grads_, exp_avg_, exp_avg_sq_, step_, obs_, action_mask_, obs_mean_, obs_scale_, actions_, logp_,
      values_, advantages_, returns_, steps_, old_params_, old_log_std_, env_actions_, action_start_, action_low_,
      action_high_;
  bool rescale_;
  uint64_t noise_seed_, order_seed_;
  std::vector<DenseLayer> layers_;
  std::vector<int64_t> nvec_;
  Mlp mlp_{};
  MlpDistribution dist_{};
  int64_t width_ = 0, num_steps_ = 0, num_envs_ = 0, multiplications_ = 0;
};

}  // namespace

void bind_mlp(py::module_& m) {
  py::class_<MlpEngine>(m, "MlpEngine")
      .def(py::init<const py::kwargs&>())
      .def("act", &MlpEngine::act, "t"_a, "first"_a, "count"_a, py::pos_only())
      .def("value", &MlpEngine::value, "obs"_a, py::pos_only())
      .def("bootstrap", &MlpEngine::bootstrap)
      .def("update", &MlpEngine::update, "rows"_a, "iteration"_a, "epochs"_a, "num_minibatches"_a)
      .def("exact_kl", &MlpEngine::exact_kl, "rows"_a, py::pos_only());
}

}  // namespace pyppo::bindings
