// A tiny extension around csrc/tensor.h and csrc/output.h, compiled by test_dlpack.py: what they accept, refuse and
// own.
#include <vector>

#include "output.h"

namespace {

using namespace pyppo;

template <class F>
PyObject* guarded(F&& body) {
  try {
    return body();
  } catch (const PythonError&) {
    return nullptr;
  } catch (const TypeError& error) {
    PyErr_SetString(PyExc_TypeError, error.what());
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  }
  return nullptr;
}

PyObject* describe(const Tensor& t) {
  if (!t.present) Py_RETURN_NONE;
  PyObject* values = PyList_New(0);
  for (int64_t i = 0; i < t.numel() && t.is_float64() && !t.is_cuda(); ++i) {
    PyObject* value = PyFloat_FromDouble(t.as<double>()[i]);
    PyList_Append(values, value);
    Py_DECREF(value);
  }
  return Py_BuildValue("(siLN)", detail::describe(t.dtype).c_str(), t.ndim, (long long)t.numel(), values);
}

PyObject* read(PyObject*, PyObject* x) {
  return guarded([&] { return describe(Borrow(x, "rewards")); });
}
PyObject* read_attached(PyObject*, PyObject* x) {
  return guarded([&] { return describe(Borrow(x, "rewards", Access::read_attached)); });
}
PyObject* read_optional(PyObject*, PyObject* x) {
  return guarded([&] { return describe(Borrow::optional(x, "rewards")); });
}
PyObject* write(PyObject*, PyObject* x) {
  return guarded([&] { return describe(Borrow(x, "out", Access::write)); });
}

// Each check once: x must be float [2, 3]; y, if given, must match it in dtype, shape and device and not overlap it.
PyObject* check(PyObject*, PyObject* args) {
  PyObject *x_object, *y_object = Py_None;
  if (!PyArg_ParseTuple(args, "O|O", &x_object, &y_object)) return nullptr;
  return guarded([&]() -> PyObject* {
    Borrow x(x_object, "rewards"), y = Borrow::optional(y_object, "values");
    require_dtype(x, {kFloat32, kFloat64});
    require_rank(x, 2, "[T, N]");
    require_shape(x, {2, 3}, "[T, N]");
    require_same_dtype(y, x);
    require_same_device(y, x);
    require_same_shape(y, x);
    if (y) require_disjoint(y, x);
    Py_RETURN_NONE;
  });
}

// make(like, sizes): one float64 tensor of each size, each filled with its index; those of odd index are dropped
// unused.
PyObject* make(PyObject*, PyObject* args) {
  PyObject *like, *sizes;
  if (!PyArg_ParseTuple(args, "OO!", &like, &PyList_Type, &sizes)) return nullptr;
  return guarded([&] {
    Borrow borrowed(like, "like");
    OutputBlock out(*borrowed);
    const int count = static_cast<int>(PyList_GET_SIZE(sizes));
    for (int i = 0; i < count; ++i) out.add(kFloat64, {PyLong_AsLongLong(PyList_GET_ITEM(sizes, i)), 1});
    out.allocate();
    PyObject* result = PyList_New(0);
    for (int i = 0; i < count; i += 2) {
      std::fill_n(out.data<double>(i), PyLong_AsLongLong(PyList_GET_ITEM(sizes, i)), i);
      PyObject* tensor = out.take(i);
      PyList_Append(result, tensor);
      Py_DECREF(tensor);
    }
    return result;
  });
}

PyMethodDef methods[] = {{"read", read, METH_O, nullptr},
                         {"read_attached", read_attached, METH_O, nullptr},
                         {"read_optional", read_optional, METH_O, nullptr},
                         {"write", write, METH_O, nullptr},
                         {"check", check, METH_VARARGS, nullptr},
                         {"make", make, METH_VARARGS, nullptr},
                         {nullptr, nullptr, 0, nullptr}};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "dlpack_probe", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit_dlpack_probe() { return PyModule_Create(&module); }
