// What every binding needs: launches on the right device, and Python numbers checked by name.
#pragma once

#include <pybind11/pybind11.h>

#include <cmath>
#include <cstdio>
#include <limits>
#include <string>

#include "../kernels.h"
#include "../output.h"
#include "../tensor.h"

namespace pyppo::bindings {

namespace py = pybind11;

constexpr int64_t release_gil_above = 32768;  // elements; below, letting other threads in costs more than the kernel

// Runs a CPU kernel, without the GIL when it takes long.
template <class F>
inline auto run_cpu(int64_t elements, F&& kernel) {
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

inline DType dtype_of(const Tensor& t) {
  if (t.is(kFloat64)) return DType::f64;
  if (t.is(kFloat16)) return DType::f16;
  return t.is(kBFloat16) ? DType::bf16 : DType::f32;
}

inline void require_float(const Tensor& t) { require_dtype(t, {kFloat32, kFloat64}); }

// float32, float64, and on CUDA half precision: what a network may put out.
inline void require_network_float(const Tensor& t) {
  if (t.is_cuda())
    require_dtype(t, {kFloat32, kFloat64, kFloat16, kBFloat16});
  else
    require_float(t);
}

inline void require_flag(const Tensor& t) { require_dtype(t, {kBool, kUInt8}); }

inline DLDataType compute_dtype(const Tensor& network) { return network.is_float64() ? kFloat64 : kFloat32; }

// Everything that is no network output has the arithmetic's dtype.
inline void require_compute_dtype(const Tensor& t, DLDataType dtype) { require_dtype(t, {dtype}); }

[[noreturn, gnu::cold]] inline void fail_number(const char* name, double was, const char* must) {
  char text[32];
  snprintf(text, sizeof(text), "%.17g", was);
  throw std::invalid_argument(std::string(name) + " is " + text + "; it must be " + must);
}

inline void require_number(bool holds, const char* name, double value, const char* must) {
  if (!holds) fail_number(name, value, must);
}

inline void require_non_negative(double value, const char* name) {
  require_number(value >= 0 && std::isfinite(value), name, value, "finite and at least 0");
}

// The same of a floating scalar where it can be read without waiting for a device.
inline void require_non_negative(const Tensor& scalar) {
  if (!scalar.present || scalar.is_cuda()) return;
  require_non_negative(scalar.is_float64() ? *scalar.as<double>() : double(*scalar.as<float>()), scalar.name);
}

// Python numbers by name: pybind11's own conversion would not say which argument was wrong.
inline double number_of(py::handle value, const char* name, const char* must = "be a number") {
  const double number = PyFloat_AsDouble(value.ptr());
  if (number == -1.0 && PyErr_Occurred()) {
    const bool too_large = PyErr_ExceptionMatches(PyExc_OverflowError);
    PyErr_Clear();
    if (too_large) detail::fail(name, "is too large", "fit a double");
    detail::fail_type(name, "has type " + detail::type_name(value.ptr()), must);
  }
  return number;
}

// Python's and NumPy's scalars; not tensors, which may convert to a number as well.
inline bool is_number(py::handle value) {
  if (PyFloat_Check(value.ptr()) || PyLong_Check(value.ptr())) return true;
  return PyNumber_Check(value.ptr()) && !PyObject_HasAttrString(value.ptr(), "__dlpack__");
}

// None means "off", which the kernels write as infinity.
inline double number_or_infinity(py::handle value, const char* name) {
  return value.is_none() ? std::numeric_limits<double>::infinity() : number_of(value, name, "be a number or None");
}

inline bool flag_of(py::handle value, const char* name) {
  if (!PyBool_Check(value.ptr())) detail::fail_type(name, "has type " + detail::type_name(value.ptr()), "be a bool");
  return value.ptr() == Py_True;
}

// An integer in [0, limit]; Python's have any size.
inline uint64_t integer_of(py::handle value, const char* name, uint64_t limit) {
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

inline bool is_text(py::handle value, const char* text) {
  return PyUnicode_Check(value.ptr()) && PyUnicode_CompareWithASCIIString(value.ptr(), text) == 0;
}

inline std::string text_of(py::handle value) { return py::cast<std::string>(py::repr(value)); }

[[noreturn, gnu::cold]] inline void fail_missing(const char* name, const char* because) {
  throw std::invalid_argument(std::string(name) + " is None; it must be given " + because);
}

inline void raise_row_error(const RowErrors& errors) {
  if (errors.action >= 0)
    throw std::invalid_argument("actions has an impossible action in row " + std::to_string(errors.action) +
                                "; each must be in range and allowed by action_mask");
  if (errors.distribution >= 0)
    throw std::invalid_argument(
        "logits, mean or log_std allow no action in row " + std::to_string(errors.distribution) +
        ": action_mask must allow at least one action, and a distribution to draw from must be finite");
}

// Three int64 on a CUDA device that a kernel's row errors go to: what `errors`, given the device's index, returns.
inline int64_t* error_flags(py::handle errors, const Tensor& like) {
  if (errors.is_none()) return nullptr;
  const py::object object = errors(like.device.id);
  const Borrow flags(object.ptr(), "errors", Access::write);
  require_dtype(flags, {kInt64});
  require_shape(flags, {3});
  require_same_device(flags, like);
  return flags->as<int64_t>();  // the caller keeps it: freed or not, its memory outlives the launch
}

}  // namespace pyppo::bindings
