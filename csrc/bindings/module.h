// One function a file of bindings, which adds what the file has to the module; and how it adds it.
#pragma once

#include <algorithm>
#include <type_traits>

#include "common.h"

namespace pyppo::bindings {

void bind_gae(py::module_& m);
void bind_losses(py::module_& m);
void bind_sample(py::module_& m);
void bind_update(py::module_& m);
void bind_minibatch(py::module_& m);
void bind_normalize(py::module_& m);
void bind_mlp(py::module_& m);
void bind_envpool(py::module_& m);

// Called within a handler: the C++ exception as Python's.
void set_python_error();

// Of a function of handles alone: how it is called from Python. pybind11's dispatcher takes 20 ns an argument to find
// an overload and convert; here is nothing to find, and the functions check what they are given by name.
template <auto function>
struct Entry;

template <class R, class... Handles, R (*function)(Handles...)>
struct Entry<function> {
  static constexpr Py_ssize_t arity = sizeof...(Handles);
  static constexpr const char* result = std::is_void_v<R> ? "None" : std::is_same_v<R, py::tuple> ? "tuple" : "object";

  static PyObject* call(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
    if (count != arity) return PyErr_Format(PyExc_TypeError, "%zd arguments are given; it must be %zd", count, arity);
    try {
      return call(arguments, std::make_index_sequence<arity>());
    } catch (...) {
      set_python_error();
      return nullptr;
    }
  }

  template <size_t... i>
  static PyObject* call(PyObject* const* arguments, std::index_sequence<i...>) {
    if constexpr (std::is_void_v<R>) {
      function(Handles(arguments[i])...);
      return py::none().release().ptr();
    } else {
      return function(Handles(arguments[i])...).release().ptr();
    }
  }
};

// Adds a function. Its docstring begins with its signature, as pybind11's do.
template <auto function>
void define(py::module_& m, const char* name, const char* arguments) {
  using E = Entry<function>;
  const std::string names = arguments;
  if (std::count(names.begin(), names.end(), ',') + 1 != E::arity)
    throw std::logic_error(std::string(name) + "'s arguments are not as many as their names");
  static const std::string doc = std::string(name) + "(" + names + ", /) -> " + E::result;
  static PyMethodDef method{name,
                            reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(
                                static_cast<PyObject* (*)(PyObject*, PyObject* const*, Py_ssize_t)>(&E::call))),
                            METH_FASTCALL, doc.c_str()};
  const py::object module_name = m.attr("__name__");
  m.attr(name) = py::reinterpret_steal<py::object>(PyCFunction_NewEx(&method, nullptr, module_name.ptr()));
}

}  // namespace pyppo::bindings
