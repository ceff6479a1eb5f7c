// sample: check, then launch.
#include "distribution.h"
#include "module.h"

namespace pyppo::bindings {

namespace {

py::tuple sample(py::handle distribution, py::handle logits, py::handle mean, py::handle log_std, py::handle nvec,
                 py::handle action_mask, py::handle seed, py::handle step, py::handle row_offset,
                 py::handle deterministic, py::handle errors) {
  const DistributionInputs dist =
      check_distribution(distribution, logits, mean, log_std, nvec, action_mask, Access::read);
  const Tensor& network = dist.network();
  const int64_t batch = network.size(0);
  if (step.is_none()) fail_missing("step", "as a number or a tensor");
  const bool number = is_number(step);
  const Borrow steps = Borrow::optional(number ? Py_None : step.ptr(), "step");
  require_dtype(steps, {kInt64});
  require_shape(steps, {batch}, "[B]");
  require_same_device(steps, network);
  if (!steps->is_cuda())
    for (int64_t row = 0; row < steps->numel(); ++row)
      if (steps->as<int64_t>()[row] < 0)
        detail::fail("step", "is negative in row " + std::to_string(row), "be at least 0");
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

}  // namespace

void bind_sample(py::module_& m) {
  define<sample>(
      m, "sample",
      "distribution, logits, mean, log_std, nvec, action_mask, seed, step, row_offset, deterministic, errors");
}

}  // namespace pyppo::bindings
