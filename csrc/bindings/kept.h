// A tensor that outlives the call: kept alive, its address and shape read once.
#pragma once

#include <initializer_list>
#include <vector>

#include "common.h"

namespace pyppo::bindings {

class Kept {
 public:
  Kept(py::handle object, const char* name, DLDataType dtype) : object_(py::reinterpret_borrow<py::object>(object)) {
    const Borrow tensor(object.ptr(), name, Access::write);
    require_dtype(tensor, {dtype});
    read(tensor);
  }
  Kept(py::handle object, const char* name, std::initializer_list<DLDataType> dtypes)
      : object_(py::reinterpret_borrow<py::object>(object)) {
    const Borrow tensor(object.ptr(), name, Access::write);
    require_dtype(tensor, dtypes);
    read(tensor);
  }
  static Kept optional(py::handle object, const char* name, DLDataType dtype) {
    return object.is_none() ? Kept(name) : Kept(object, name, dtype);
  }
  static Kept optional(py::handle object, const char* name, std::initializer_list<DLDataType> dtypes) {
    return object.is_none() ? Kept(name) : Kept(object, name, dtypes);
  }

  explicit operator bool() const { return data_ != nullptr; }
  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }
  void* data() const { return data_; }
  const std::vector<int64_t>& shape() const { return shape_; }
  DLDataType dtype() const { return dtype_; }
  int64_t numel() const {
    int64_t n = 1;
    for (int64_t size : shape_) n *= size;
    return n;
  }

  // Refuses any other shape.
  void require(std::vector<int64_t> shape, const char* symbols) const {
    if (data_ != nullptr && shape_ != shape) fail(shape, symbols);
  }
  // Refuses all but [first, second, ...] with `width` elements in the further dimensions.
  void require_rows(int64_t first, int64_t second, int64_t width, const char* symbols) const {
    if (data_ == nullptr) return;
    const bool leads = shape_.size() >= 2 && shape_[0] == first && shape_[1] == second;
    if (!leads || numel() != first * second * width) fail({first, second, width}, symbols);
  }

 private:
  explicit Kept(const char* name) : name_(name) {}

  void read(const Tensor& t) {
    if (t.is_cuda()) detail::fail(t.name, "is on a GPU", "be on the CPU");
    name_ = t.name;
    data_ = t.data;
    dtype_ = t.dtype;
    shape_.assign(t.shape, t.shape + t.ndim);
  }

  [[noreturn]] void fail(const std::vector<int64_t>& wanted, const char* symbols) const {
    detail::fail(name_, "has shape " + detail::describe(shape_.data(), int(shape_.size())),
                 "be " + detail::describe(wanted.data(), int(wanted.size())) + ", " + symbols);
  }

  py::object object_;
  const char* name_ = "";
  void* data_ = nullptr;
  DLDataType dtype_{};
  std::vector<int64_t> shape_;
};

}  // namespace pyppo::bindings
