// The action distribution's arguments, as losses and sampling share them.
#pragma once

#include <vector>

#include "common.h"

namespace pyppo::bindings {

enum class Family { categorical, multi_categorical, bernoulli, normal };

// None: a mean makes it normal, an nvec multi_categorical, else categorical.
inline Family family_of(py::handle distribution, bool has_mean, bool has_nvec) {
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

inline std::vector<int64_t> read_nvec(py::handle nvec) {
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

inline void refuse(bool given, const char* name, const char* with) {
  if (given) throw std::invalid_argument(std::string(name) + " is given; it must be None with " + with);
}

inline DistributionInputs check_distribution(py::handle distribution, py::handle logits, py::handle mean,
                                             py::handle log_std, py::handle nvec, py::handle action_mask,
                                             Access access) {
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

inline DistributionArgs distribution_args(const DistributionInputs& in) {
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

}  // namespace pyppo::bindings
