// normalize: check, then launch.
#include "module.h"

namespace pyppo::bindings {

namespace {

constexpr DLDataType kInt8{kDLInt, 8, 1}, kInt16{kDLInt, 16, 1};

NumberType number_type_of(const Tensor& t) {
  require_dtype(t, {kFloat32, kFloat64, kUInt8, kBool, kInt8, kInt16, kInt32, kInt64});
  if (t.is_flag()) return NumberType::u8;
  if (t.dtype.code == kDLFloat) return t.is_float64() ? NumberType::f64 : NumberType::f32;
  return t.itemsize() == 1   ? NumberType::i8
         : t.itemsize() == 2 ? NumberType::i16
         : t.itemsize() == 4 ? NumberType::i32
                             : NumberType::i64;
}

// x is [n, ...] and the statistics [...]: no copy and no reshape at the caller's.
void require_features(const Tensor& statistic, const Tensor& x) {
  require_dtype(statistic, {kFloat64});
  bool same = statistic.ndim == x.ndim - 1;
  for (int i = 0; same && i < statistic.ndim; ++i) same = statistic.shape[i] == x.shape[i + 1];
  if (!same)
    detail::fail(statistic.name, "has shape " + detail::describe(statistic.shape, statistic.ndim),
                 "be that of a row of x, " + detail::describe(x.shape + 1, x.ndim - 1));
  require_same_device(statistic, x);
}

py::object normalize(py::handle x_, py::handle mean_, py::handle var_, py::handle eps_, py::handle clip_,
                     py::handle out_) {
  const double eps = number_of(eps_, "eps"), clip = number_or_infinity(clip_, "clip");
  const Borrow x(x_.ptr(), "x"), mean(mean_.ptr(), "mean"), var(var_.ptr(), "var"),
      given = Borrow::optional(out_.ptr(), "out", Access::write);
  const NumberType type = number_type_of(x);
  if (x->ndim < 1) detail::fail_rank(x, "[n, ...]");
  require_features(mean, x);
  require_features(var, x);
  require_non_negative(eps, "eps");
  require_number(clip > 0, "clip", clip, "greater than 0, or None");
  require_dtype(given, {kFloat32});
  require_same_shape(given, x);
  require_same_device(given, x);
  if (given)
    for (const Borrow* t : {&x, &mean, &var}) require_disjoint(given, *t);
  NormalizeArgs args{type, x->size(0),  mean->numel(),     x->data, mean->as<double>(), var->as<double>(),
                     eps,  float(clip), given->as<float>()};
  const DeviceGuard guard(x);
  py::object result = py::reinterpret_borrow<py::object>(out_);
  if (!given) {
    OutputBlock out(x);
    const int made = out.add(kFloat32, x->ndim, x->shape);
    out.allocate();
    args.out = out.data<float>(made);
    result = py::reinterpret_steal<py::object>(out.take(made));
  }
  if (x->is_cuda())
    cuda::normalize(args, x->stream());
  else
    run_cpu(x->numel(), [&] { cpu::normalize(args); });
  return result;
}

}  // namespace

void bind_normalize(py::module_& m) { define<normalize>(m, "normalize", "x, mean, var, eps, clip, out"); }

}  // namespace pyppo::bindings
