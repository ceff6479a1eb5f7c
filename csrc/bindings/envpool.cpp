// What a step of EnvPool costs beside the environments and the policy: writing its answer down, and checking and
// sending the actions. Not in Python, whose code is slow where a simulator has just emptied the caches, and meanwhile
// keeps other groups from being served.
#include <pybind11/numpy.h>
#include <pybind11/stl.h>
#include <sched.h>

#include <cstring>
#include <utility>
#include <vector>

#include "module.h"

namespace pyppo::bindings {

using namespace py::literals;

namespace {

bool is_contiguous(const py::array& x) { return (x.flags() & py::array::c_style) != 0; }

int number_of_type(const py::array& x) { return x.dtype().num(); }

template <class T>
int number_of_type() {
  return py::dtype::of<T>().num();
}

// Whether the elements are plain numbers as this machine has them; objects, strings and swapped bytes are NumPy's.
bool has_native_numbers(const py::array& x) {
  const char kind = x.dtype().kind(), order = x.dtype().byteorder();
  return strchr("biuf", kind) != nullptr && (order == '=' || order == '|');
}

// Where one of EnvPool's arrays goes, step by step: an ndarray [T, ...], or anything that takes `column[t] = array`.
class Column {
 public:
  explicit Column(py::object column) : object_(std::move(column)) {
    if (!py::isinstance<py::array>(object_)) return;
    const auto array = py::reinterpret_borrow<py::array>(object_);
    if (array.ndim() == 0 || !array.writeable() || !has_native_numbers(array)) return;
    py::ssize_t packed = array.itemsize();
    for (py::ssize_t d = array.ndim() - 1; d > 0; --d) {
      if (array.strides(d) != packed && array.shape(d) != 1) return;  // a step's rows do not lie together
      packed *= array.shape(d);
    }
    data_ = static_cast<char*>(py::array(array).mutable_data());
    steps_ = array.shape(0);
    stride_ = array.strides(0);
    count_ = packed / array.itemsize();
    type_ = number_of_type(array);
    item_ = size_t(array.itemsize());
  }

  void write(py::ssize_t t, py::handle value) const {
    if (t < 0 || (data_ != nullptr && t >= steps_)) throw py::index_error("step " + std::to_string(t));
    if (data_ == nullptr || !copy(data_ + t * stride_, value)) {
      const py::int_ index(t);
      if (PyObject_SetItem(object_.ptr(), index.ptr(), value.ptr()) != 0) throw py::error_already_set();
    }
  }

 private:
  bool copy(char* to, py::handle value) const {
    if (!py::isinstance<py::array>(value)) return false;
    const auto array = py::reinterpret_borrow<py::array>(value);
    if (!is_contiguous(array) || array.size() != count_ || !has_native_numbers(array)) return false;
    const int type = number_of_type(array);
    if (type == type_) {
      memcpy(to, array.data(), size_t(count_) * item_);
      return true;
    }
    if (type != number_of_type<double>() || type_ != number_of_type<float>()) return false;
    const double* from = static_cast<const double*>(array.data());
    float* floats = reinterpret_cast<float*>(to);
    for (py::ssize_t i = 0; i < count_; ++i) floats[i] = float(from[i]);
    return true;
  }

  py::object object_;
  char* data_ = nullptr;  // null: only `object_` knows how
  py::ssize_t steps_ = 0, stride_ = 0, count_ = 0;
  int type_ = 0;
  size_t item_ = 0;
};

bool any_of(py::handle flags) {
  const auto array = py::reinterpret_borrow<py::array>(flags);
  if (!py::isinstance<py::array>(flags) || number_of_type(array) != number_of_type<bool>() || !is_contiguous(array))
    return py::bool_(flags.attr("any")());
  return memchr(array.data(), 1, size_t(array.size())) != nullptr;
}

class PoolReader {
 public:
  using Places = std::vector<std::pair<py::object, py::ssize_t>>;

  PoolReader(py::object receive, const Places& flags, const Places& observations, py::ssize_t done,
             py::object finite_ends)
      : receive_(std::move(receive)), finite_ends_(std::move(finite_ends)), done_(done) {
    for (const auto& [column, index] : flags) flags_.push_back({Column(column), index});
    for (const auto& [column, index] : observations) observations_.push_back({Column(column), index});
  }

  py::object read(py::ssize_t t) const {
    const py::object state = receive_();
    const py::object fast = py::reinterpret_steal<py::object>(PySequence_Fast(state.ptr(), "an answer is a sequence"));
    if (!fast) throw py::error_already_set();
    for (const Place& place : flags_) place.column.write(t, at(fast, place.index));
    const bool ends = any_of(at(fast, done_));
    for (const Place& place : observations_) {
      const py::handle x = at(fast, place.index);
      place.column.write(t + 1, ends ? finite_ends_(x, state) : py::reinterpret_borrow<py::object>(x));
    }
    return state;
  }

 private:
  struct Place {
    Column column;
    py::ssize_t index;
  };

  static py::handle at(const py::object& fast, py::ssize_t index) {
    if (index < 0 || index >= PySequence_Fast_GET_SIZE(fast.ptr()))
      throw py::index_error("EnvPool's answer is shorter");
    return PySequence_Fast_GET_ITEM(fast.ptr(), index);
  }

  const py::object receive_, finite_ends_;
  const py::ssize_t done_;
  std::vector<Place> flags_, observations_;
};

class PoolSender {
 public:
  PoolSender(py::object send, py::object message, py::array buffer, py::array_t<double, py::array::c_style> low,
             py::array_t<double, py::array::c_style> high)
      : send_(std::move(send)), message_(std::move(message)), buffer_(std::move(buffer)) {
    if (!is_contiguous(buffer_) || buffer_.ndim() == 0 || !has_native_numbers(buffer_))
      throw std::invalid_argument("buffer must be contiguous rows of numbers");
    data_ = buffer_.mutable_data();
    rows_ = buffer_.shape(0);
    width_ = 1;
    for (py::ssize_t d = 1; d < buffer_.ndim(); ++d) width_ *= buffer_.shape(d);
    if (low.size() != width_ || high.size() != width_)
      throw std::invalid_argument("low and high must have one bound for each component of an action");
    low_.assign(low.data(), low.data() + width_);
    high_.assign(high.data(), high.data() + width_);
  }

  // False: these cannot be sent as they are, and nothing was.
  bool send(py::handle actions, bool one_core) {
    if (!take(actions)) return false;
    send_(message_);
    if (one_core) {  // or the wait spins for some 20 us before the pool's thread may run
      py::gil_scoped_release release;
      sched_yield();
    }
    return true;
  }

 private:
  bool take(py::handle actions) {
    if (!py::isinstance<py::array>(actions)) return false;
    const auto array = py::reinterpret_borrow<py::array>(actions);
    if (!is_contiguous(array) || array.ndim() != buffer_.ndim() || !has_native_numbers(array)) return false;
    for (py::ssize_t d = 0; d < array.ndim(); ++d)
      if (array.shape(d) != buffer_.shape(d)) return false;
    const int type = number_of_type(array);
    if (type == number_of_type<float>()) return take_as<float, float, double>(array);
    if (type == number_of_type<double>()) return take_as<double, float, double>(array);
    if (type == number_of_type<int32_t>()) return take_as<int32_t, int32_t, int64_t>(array);
    if (type == number_of_type<int64_t>()) return take_as<int64_t, int32_t, int64_t>(array);
    return false;
  }

  template <class From, class A, class B>
  bool take_as(const py::array& array) {
    const From* from = static_cast<const From*>(array.data());
    const int type = number_of_type(buffer_);
    if (type == number_of_type<A>()) return copy(from, static_cast<A*>(data_));
    if (type == number_of_type<B>()) return copy(from, static_cast<B*>(data_));
    return false;
  }

  template <class From, class To>
  bool copy(const From* from, To* to) const {
    for (py::ssize_t i = 0; i < rows_; ++i)
      for (py::ssize_t j = 0; j < width_; ++j) {
        const double x = double(from[i * width_ + j]);
        if (!(x >= low_[size_t(j)] && x <= high_[size_t(j)])) return false;  // NaN too
      }
    for (py::ssize_t i = 0; i < rows_ * width_; ++i) to[i] = To(from[i]);
    return true;
  }

  const py::object send_, message_;
  py::array buffer_;
  void* data_ = nullptr;
  py::ssize_t rows_ = 0, width_ = 1;
  std::vector<double> low_, high_;
};

}  // namespace

void bind_envpool(py::module_& m) {
  py::class_<PoolReader>(m, "PoolReader")
      .def(py::init<py::object, const PoolReader::Places&, const PoolReader::Places&, py::ssize_t, py::object>(),
           "receive"_a, "flags"_a, "observations"_a, "done"_a, "finite_ends"_a)
      .def("read", &PoolReader::read, "t"_a, py::pos_only());
  py::class_<PoolSender>(m, "PoolSender")
      .def(py::init<py::object, py::object, py::array, py::array_t<double, py::array::c_style>,
                    py::array_t<double, py::array::c_style>>(),
           "send"_a, "message"_a, "buffer"_a, "low"_a, "high"_a)
      .def("send", &PoolSender::send, "actions"_a, "one_core"_a, py::pos_only());
}

}  // namespace pyppo::bindings
