// A borrowed tensor (pointer, shape, strides, dtype, device) and its named checks.
//
// Tensors arrive by DLPack's C exchange API (torch >= 2.10: about 40 ns each, nothing is owned, and it hands over the
// current CUDA stream) or, for other arrays such as numpy's, by the `__dlpack__` capsule, which is kept until the
// borrow ends. Everything here needs the GIL, destructors included. Failures throw: std::invalid_argument (ValueError),
// pyppo::TypeError (TypeError), pyppo::PythonError (a Python exception is already set).
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstdint>
#include <exception>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <utility>

#include "dlpack_abi.h"

namespace pyppo {

struct TypeError : std::logic_error {
  using std::logic_error::logic_error;
};

struct PythonError : std::exception {
  const char* what() const noexcept override { return "a Python exception is set"; }
};

inline constexpr DLDataType kFloat16{kDLFloat, 16, 1}, kBFloat16{kDLBfloat, 16, 1}, kFloat32{kDLFloat, 32, 1},
    kFloat64{kDLFloat, 64, 1}, kInt32{kDLInt, 32, 1}, kInt64{kDLInt, 64, 1}, kUInt8{kDLUInt, 8, 1},
    kBool{kDLBool, 8, 1};

constexpr bool operator==(DLDataType a, DLDataType b) {
  return a.code == b.code && a.bits == b.bits && a.lanes == b.lanes;
}
constexpr bool operator!=(DLDataType a, DLDataType b) { return !(a == b); }
constexpr bool operator==(DLDevice a, DLDevice b) { return a.type == b.type && a.id == b.id; }
constexpr bool operator!=(DLDevice a, DLDevice b) { return !(a == b); }

// An absent optional argument is a Tensor with `present` false: NULL data, no shape, and every check passes.
struct Tensor {
  void* data = nullptr;
  int ndim = 0;
  const int64_t* shape = nullptr;
  const int64_t* strides = nullptr;  // in elements; may be NULL, since a borrowed tensor is always C-contiguous
  DLDataType dtype{};
  DLDevice device{};  // pinned host memory is kDLCPU, and a CPU's id is always 0
  const DLExchangeAPI* api = nullptr;
  const char* name = "";
  bool present = false;

  explicit operator bool() const { return present; }
  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
  bool is(DLDataType type) const { return dtype == type; }
  bool is_float32() const { return is(kFloat32); }
  bool is_float64() const { return is(kFloat64); }
  bool is_flag() const { return is(kBool) || is(kUInt8); }
  bool is_cuda() const { return device.type == kDLCUDA; }
  int64_t size(int axis) const { return shape[axis < 0 ? axis + ndim : axis]; }
  int64_t itemsize() const { return dtype.bits / 8; }
  int64_t numel() const {
    int64_t n = present;
    for (int i = 0; i < ndim; ++i) n *= shape[i];
    return n;
  }
  int64_t nbytes() const { return numel() * itemsize(); }

  // The CUDA stream that the tensor's library works on now; NULL on the CPU, and for a library that does not say.
  void* stream() const {
    void* current = nullptr;
    if (is_cuda() && api && api->current_work_stream(device.type, device.id, &current)) throw PythonError();
    return current;
  }
};

// ---- messages: never built unless something is wrong --------------------------------------------------------------

namespace detail {

#define PYPPO_COLD [[gnu::cold, gnu::noinline]] inline

PYPPO_COLD std::string describe(DLDataType t) {
  static constexpr const char* names[] = {"int", "uint", "float", "handle", "bfloat", "complex", "bool"};
  std::string name = t.code < 7 ? names[t.code] : "float8 or smaller, code " + std::to_string(t.code) + ", bits ";
  if (t.code != kDLBool) name += std::to_string(t.bits);
  return t.lanes == 1 ? name : name + "x" + std::to_string(t.lanes);
}

PYPPO_COLD std::string describe(DLDevice d) {
  if (d.type == kDLCPU) return "cpu";
  return (d.type == kDLCUDA ? "cuda:" : "device type " + std::to_string(d.type) + ":") + std::to_string(d.id);
}

PYPPO_COLD std::string describe(const int64_t* shape, int ndim) {
  std::string text = "[";
  for (int i = 0; i < ndim; ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

PYPPO_COLD std::string type_name(PyObject* object) { return Py_TYPE(object)->tp_name; }

// str(object.name), or "" where that fails; clears the Python error.
PYPPO_COLD std::string attribute(PyObject* object, const char* name) {
  PyObject* value = PyObject_GetAttrString(object, name);
  PyObject* text = value ? PyObject_Str(value) : nullptr;
  const char* bytes = text ? PyUnicode_AsUTF8(text) : nullptr;
  std::string result = bytes ? bytes : "";
  Py_XDECREF(text);
  Py_XDECREF(value);
  PyErr_Clear();
  return result;
}

// The first line of the pending Python exception, which is cleared; KeyboardInterrupt and its like go through.
PYPPO_COLD std::string take_python_error() {
  if (!PyErr_ExceptionMatches(PyExc_Exception) || PyErr_ExceptionMatches(PyExc_MemoryError)) throw PythonError();
  PyObject *type, *value, *trace;
  PyErr_Fetch(&type, &value, &trace);
  PyObject* text = value ? PyObject_Str(value) : nullptr;
  const char* bytes = text ? PyUnicode_AsUTF8(text) : nullptr;
  std::string line = bytes ? bytes : "no message";
  Py_XDECREF(text);
  Py_XDECREF(type);
  Py_XDECREF(value);
  Py_XDECREF(trace);
  PyErr_Clear();
  return line.substr(0, line.find('\n'));
}

[[noreturn]] PYPPO_COLD void fail(const char* name, const std::string& was, const std::string& must) {
  throw std::invalid_argument(std::string(name) + " " + was + "; it must " + must);
}

[[noreturn]] PYPPO_COLD void fail_type(const char* name, const std::string& was, const std::string& must) {
  throw TypeError(std::string(name) + " " + was + "; it must " + must);
}

[[noreturn]] PYPPO_COLD void fail_export(PyObject* object, const char* name) {
  const std::string why = take_python_error();
  const std::string dtype = attribute(object, "dtype"), layout = attribute(object, "layout"),
                    device = attribute(object, "device");
  std::string was = "has type " + type_name(object);
  if (!dtype.empty()) was += ", dtype " + dtype;
  if (!layout.empty()) was += ", layout " + layout;
  if (!device.empty()) was += ", device " + device;
  fail_type(name, was + " and gives no memory (" + why + ")", "be a dense tensor on the CPU or a CUDA device");
}

[[noreturn]] PYPPO_COLD void fail_dtype(const Tensor& t, std::initializer_list<DLDataType> allowed) {
  std::string must = "be ";
  size_t i = 0;
  for (DLDataType type : allowed) {
    if (i) must += i + 1 == allowed.size() ? " or " : ", ";
    must += describe(type);
    ++i;
  }
  fail_type(t.name, "has dtype " + describe(t.dtype), must);
}

[[noreturn]] PYPPO_COLD void fail_shape(const Tensor& t, std::initializer_list<int64_t> shape, const char* symbols) {
  const std::string must = describe(shape.begin(), static_cast<int>(shape.size()));
  fail(t.name, "has shape " + describe(t.shape, t.ndim), "be " + (*symbols ? symbols + (" = " + must) : must));
}

[[noreturn]] PYPPO_COLD void fail_rank(const Tensor& t, const char* symbols) {
  fail(t.name, "has shape " + describe(t.shape, t.ndim), std::string("have the shape ") + symbols);
}

// ---- the exchange -------------------------------------------------------------------------------------------------

inline PyObject* interned(const char* text) {
  PyObject* name = PyUnicode_InternFromString(text);
  if (!name) throw PythonError();
  return name;
}

PYPPO_COLD const DLExchangeAPI* find_exchange_api(PyTypeObject* type) {
  PyObject* capsule = PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__");
  const void* pointer = capsule ? PyCapsule_GetPointer(capsule, "dlpack_exchange_api") : nullptr;
  Py_XDECREF(capsule);  // the table outlives its capsule: DLPack says that it lives as long as the process
  PyErr_Clear();
  auto* api = static_cast<const DLExchangeAPI*>(pointer);
  while (api && api->version.major != 1) api = api->previous;
  return api && api->tensor_from_object ? api : nullptr;
}

// A flag of an array, by its attribute or its method without arguments of that name. Where C implements it, as in
// torch, the C function is called at once: the attribute protocol around it costs as much again, for each argument.
struct Flag {
  PyObject* name = nullptr;
  bool is_method = false;
  getter get = nullptr;
  void* closure = nullptr;
  PyCFunction method = nullptr;

  bool of(PyObject* object) const {
    PyObject* value = get         ? get(object, closure)
                      : method    ? method(object, nullptr)
                      : is_method ? PyObject_CallMethodNoArgs(object, name)
                                  : PyObject_GetAttr(object, name);
    if (!value) PyErr_Clear();  // another library's tensor, without the attribute
    const bool result = value == Py_True;
    Py_XDECREF(value);
    return result;
  }
};

PYPPO_COLD Flag find_flag(PyTypeObject* type, const char* name, bool is_method) {
  Flag flag{interned(name), is_method};
  PyObject* found = PyObject_GetAttr(reinterpret_cast<PyObject*>(type), flag.name);
  if (!found) {
    PyErr_Clear();
  } else if (!is_method && Py_IS_TYPE(found, &PyGetSetDescr_Type)) {
    const PyGetSetDef* def = reinterpret_cast<PyGetSetDescrObject*>(found)->d_getset;
    flag.get = def->get;
    flag.closure = def->closure;
  } else if (is_method && Py_IS_TYPE(found, &PyMethodDescr_Type)) {
    const PyMethodDef* def = reinterpret_cast<PyMethodDescrObject*>(found)->d_method;
    if (def->ml_flags == METH_NOARGS) flag.method = def->ml_meth;
  }
  Py_XDECREF(found);
  return flag;
}

// What is known of a type of arrays. `api` is NULL where it has no exchange API of major version 1.
struct ArrayType {
  PyTypeObject* type;
  const DLExchangeAPI* api;
  Flag requires_grad, is_neg;
};

// The cache holds its types, so that no address is reused, nor a C function freed.
inline const ArrayType& array_type(PyTypeObject* type) {
  static ArrayType cache[4] = {};
  static unsigned next = 0;
  for (const ArrayType& entry : cache)
    if (entry.type == type) return entry;
  const ArrayType found{type, find_exchange_api(type), find_flag(type, "requires_grad", false),
                        find_flag(type, "is_neg", true)};
  ArrayType& entry = cache[next++ % 4];
  Py_INCREF(type);
  Py_XDECREF(reinterpret_cast<PyObject*>(entry.type));
  return entry = found;
}

inline bool is_contiguous(const DLTensor& t) {
  if (!t.strides) return true;  // before DLPack 1.2 that meant C order
  int64_t expected = 1;
  bool ordered = true;
  for (int i = t.ndim - 1; i >= 0; --i) {
    if (t.shape[i] == 0) return true;
    ordered &= t.shape[i] == 1 || t.strides[i] == expected;
    expected *= t.shape[i];
  }
  return ordered;
}

}  // namespace detail

// What is read must not require grad, lest a gradient be lost in silence, unless the caller hands gradients on
// (read_attached).
enum class Access { read, read_attached, write };

// Borrows a Python object's memory for one call. What is read is C-contiguous afterwards (strided input is copied);
// what is written must be so already, and writable. The object itself must stay alive: call arguments do.
class Borrow {
 public:
  Borrow(PyObject* object, const char* name, Access access = Access::read) : Borrow(name) {
    if (object == Py_None) detail::fail_type(name, "is None", "be a tensor");
    borrow(object, access);
  }
  // None gives an absent tensor.
  static Borrow optional(PyObject* object, const char* name, Access access = Access::read) {
    return object == Py_None || !object ? Borrow(name) : Borrow(object, name, access);
  }
  Borrow(Borrow&& other) noexcept : tensor_(other.tensor_), keep_(std::exchange(other.keep_, nullptr)) {}
  Borrow& operator=(Borrow&&) = delete;
  ~Borrow() { Py_XDECREF(keep_); }

  const Tensor& operator*() const { return tensor_; }
  const Tensor* operator->() const { return &tensor_; }
  operator const Tensor&() const { return tensor_; }
  explicit operator bool() const { return tensor_.present; }

 private:
  explicit Borrow(const char* name) { tensor_.name = name; }

  void borrow(PyObject* object, Access access) {
    DLTensor view = exchange(object);
    if (tensor_.api) check_torch_state(object, view, access);
    if (access == Access::write && read_only_)
      detail::fail(tensor_.name, "is read-only", "be writable: it is an output");
    if (!detail::is_contiguous(view) || !is_aligned(view)) {
      if (access == Access::write) fail_strided(view);
      PyObject* copy = contiguous_copy(object);
      Py_XDECREF(std::exchange(keep_, copy));
      view = exchange(copy);  // for arrays the capsule replaces the copy in keep_, and holds it
      if (!detail::is_contiguous(view) || !is_aligned(view)) fail_strided(view);
    }
    adopt(view);
  }

  DLTensor exchange(PyObject* object) {
    tensor_.api = detail::array_type(Py_TYPE(object)).api;
    if (!tensor_.api) return exchange_capsule(object);
    DLTensor view;
    if (tensor_.api->tensor_from_object(object, &view)) detail::fail_export(object, tensor_.name);
    return view;
  }

  // What torch's exchange lets through. A lazily negated tensor shows its memory un-negated; a strided one is copied,
  // and negated then.
  void check_torch_state(PyObject* object, const DLTensor& view, Access access) {
    if (view.dtype.code != kDLFloat && view.dtype.code != kDLBfloat) return;
    const detail::ArrayType& type = detail::array_type(Py_TYPE(object));
    if (access != Access::read_attached && type.requires_grad.of(object))
      detail::fail(tensor_.name, "requires grad", "not, since no gradient flows to it: detach it");
    if (detail::is_contiguous(view) && type.is_neg.of(object))
      detail::fail(tensor_.name, "is a lazily negated view", "be materialised, by resolve_neg()");
  }

  [[gnu::noinline]] DLTensor exchange_capsule(PyObject* object) {
    PyObject* capsule = call_dlpack(object);
    Py_XDECREF(std::exchange(keep_, capsule));  // unrenamed, so dropping the capsule runs the producer's deleter
    if (auto* managed = get<DLManagedTensorVersioned>(capsule, "dltensor_versioned")) {
      if (managed->version.major != 1)
        detail::fail_type(tensor_.name, "speaks DLPack " + std::to_string(managed->version.major), "speak DLPack 1");
      read_only_ = managed->flags & kDLReadOnly;
      return managed->tensor;
    }
    if (auto* managed = get<DLManagedTensor>(capsule, "dltensor")) return managed->tensor;
    detail::fail_type(tensor_.name, "gives no DLPack capsule", "be a tensor or an array");
  }

  template <class Managed>
  static Managed* get(PyObject* capsule, const char* name) {
    if (!PyCapsule_IsValid(capsule, name)) return nullptr;
    return static_cast<Managed*>(PyCapsule_GetPointer(capsule, name));
  }

  PyObject* call_dlpack(PyObject* object) {
    static PyObject* const method = detail::interned("__dlpack__");
    static PyObject* const keywords = Py_BuildValue("(s)", "max_version");
    static PyObject* const version = Py_BuildValue("(ii)", 1, 0);
    if (!PyObject_HasAttr(object, method))
      detail::fail_type(tensor_.name, "has type " + detail::type_name(object), "be a tensor or an array");
    PyObject* arguments[] = {object, version};
    PyObject* capsule = PyObject_VectorcallMethod(method, arguments, 1, keywords);
    if (!capsule && PyErr_ExceptionMatches(PyExc_TypeError)) {  // a producer from before DLPack 1
      PyErr_Clear();
      capsule = PyObject_CallMethodNoArgs(object, method);
    }
    if (!capsule) detail::fail_export(object, tensor_.name);
    return capsule;
  }

  // The object is seen as it is under the producer's own rules: torch's `.contiguous()`, else numpy's `.copy("C")`.
  [[gnu::noinline]] PyObject* contiguous_copy(PyObject* object) {
    PyObject* copy = tensor_.api ? PyObject_CallMethod(object, "contiguous", nullptr)
                                 : PyObject_CallMethod(object, "copy", "s", "C");
    if (!copy) throw PythonError();
    return copy;
  }

  static bool is_aligned(const DLTensor& view) {
    const uint64_t itemsize = view.dtype.bits / 8;
    return itemsize < 2 || (reinterpret_cast<uintptr_t>(view.data) + view.byte_offset) % itemsize == 0;
  }

  [[noreturn, gnu::cold, gnu::noinline]] void fail_strided(const DLTensor& view) {
    if (!is_aligned(view)) detail::fail(tensor_.name, "is not aligned to its elements", "be aligned");
    detail::fail(tensor_.name,
                 "has shape " + detail::describe(view.shape, view.ndim) + " and strides " +
                     detail::describe(view.strides, view.ndim),
                 "be C-contiguous: it is an output");
  }

  void adopt(const DLTensor& view) {
    tensor_.data = static_cast<char*>(view.data) + view.byte_offset;
    tensor_.ndim = view.ndim;
    tensor_.shape = view.shape;
    tensor_.strides = view.strides;
    tensor_.dtype = view.dtype;
    tensor_.device = view.device;
    tensor_.present = true;
    if (view.device.type == kDLCPU || view.device.type == kDLCUDAHost)
      tensor_.device = {kDLCPU, 0};
    else if (view.device.type != kDLCUDA)
      detail::fail(tensor_.name, "is on " + detail::describe(view.device), "be on the CPU or a CUDA device");
    if (view.dtype.lanes != 1)
      detail::fail_type(tensor_.name, "has dtype " + detail::describe(view.dtype), "have one lane");
    if (!view.data && tensor_.numel() != 0)
      detail::fail(tensor_.name, "has elements but no memory (a fake, zero or freed tensor)", "hold its data");
  }

  Tensor tensor_;
  PyObject* keep_ = nullptr;  // a contiguous copy or a capsule
  bool read_only_ = false;
};

// ---- checks: absent tensors pass ----------------------------------------------------------------------------------

inline void require_dtype(const Tensor& t, std::initializer_list<DLDataType> allowed) {
  if (!t.present) return;
  for (DLDataType type : allowed)
    if (t.dtype == type) return;
  detail::fail_dtype(t, allowed);
}

// `symbols` says the shape in words: require_rank(values, 2, "[T + 1, N]").
inline void require_rank(const Tensor& t, int ndim, const char* symbols) {
  if (t.present && t.ndim != ndim) detail::fail_rank(t, symbols);
}

// require_shape(values, {T + 1, N}, "[T + 1, N]"); a scalar: require_shape(step, {}, "a scalar").
inline void require_shape(const Tensor& t, std::initializer_list<int64_t> shape, const char* symbols = "") {
  if (!t.present) return;
  bool same = t.ndim == static_cast<int>(shape.size());
  for (int i = 0; same && i < t.ndim; ++i) same = t.shape[i] == shape.begin()[i];
  if (!same) detail::fail_shape(t, shape, symbols);
}

inline void require_same_shape(const Tensor& t, const Tensor& other) {
  if (!t.present || !other.present) return;
  bool same = t.ndim == other.ndim;
  for (int i = 0; same && i < t.ndim; ++i) same = t.shape[i] == other.shape[i];
  if (!same)
    detail::fail(t.name, "has shape " + detail::describe(t.shape, t.ndim),
                 std::string("have ") + other.name + "'s " + detail::describe(other.shape, other.ndim));
}

inline void require_same_dtype(const Tensor& t, const Tensor& other) {
  if (t.present && other.present && t.dtype != other.dtype)
    detail::fail_type(t.name, "has dtype " + detail::describe(t.dtype),
                      std::string("have ") + other.name + "'s " + detail::describe(other.dtype));
}

inline void require_same_device(const Tensor& t, const Tensor& other) {
  if (t.present && other.present && t.device != other.device)
    detail::fail(t.name, "is on " + detail::describe(t.device),
                 std::string("be on ") + other.name + "'s device, " + detail::describe(other.device));
}

// For an output against each input and each other output.
inline void require_disjoint(const Tensor& output, const Tensor& other) {
  const auto a = reinterpret_cast<uintptr_t>(output.data), b = reinterpret_cast<uintptr_t>(other.data);
  if (output.device == other.device && a < b + other.nbytes() && b < a + output.nbytes())
    detail::fail(output.name, std::string("shares memory with ") + other.name, "have its own");
}

}  // namespace pyppo
