// The module _C: what the bindings files add, and what says how it was built.
#include "module.h"

#include "../math/philox.h"

namespace pyppo::bindings {
namespace {

void set_num_threads(py::handle count) {
  const uint64_t threads = integer_of(count, "count", INT32_MAX);
  if (threads == 0) detail::fail("count", "is 0", "be at least 1");
  cpu::set_num_threads(int(threads));
}

py::tuple philox(uint64_t key, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  const math::PhiloxBlock block = math::philox(key, c0, c1, c2, c3);
  return py::make_tuple(block.word[0], block.word[1], block.word[2], block.word[3]);
}

py::dict build_info() {
  const cuda::Info info = cuda::info();
  py::dict out;
  out["version"] = PYPPO_VERSION;
  out["compiler"] = PYPPO_COMPILER;
  out["cpu_isas"] = PYPPO_ISAS;
  out["cuda_status"] = PYPPO_CUDA_STATUS;
  out["cuda_version"] = PYPPO_CUDA_VERSION;
  out["cuda_archs"] = PYPPO_CUDA_ARCHS;
  out["cuda_runtime_version"] = info.runtime_version;
  out["cuda_driver_version"] = info.driver_version;
  out["cuda_device_count"] = info.device_count;
  out["sanitizers"] = PYPPO_SANITIZERS;
  return out;
}

}  // namespace

void set_python_error() {
  try {
    throw;
  } catch (const PythonError&) {
    // already set
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const TypeError& error) {
    PyErr_SetString(PyExc_TypeError, error.what());
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
}

}  // namespace pyppo::bindings

PYBIND11_MODULE(_C, m) {
  using namespace pyppo;
  using namespace pyppo::bindings;
  using namespace py::literals;
  // Of what pybind11 calls itself, the exceptions that it does not know; the rest is left to it.
  py::register_local_exception_translator([](std::exception_ptr thrown) {
    try {
      if (thrown) std::rethrow_exception(thrown);
    } catch (const PythonError&) {
      // already set
    } catch (const TypeError& error) {
      PyErr_SetString(PyExc_TypeError, error.what());
    }
  });
  m.doc() = "pyppo's kernels. Arguments are positional; pyppo.ops is the documented face.";
  bind_gae(m);
  bind_losses(m);
  bind_sample(m);
  bind_update(m);
  bind_minibatch(m);
  bind_normalize(m);
  bind_mlp(m);
  bind_envpool(m);
  m.def("philox", &philox, "key"_a, "c0"_a, "c1"_a, "c2"_a, "c3"_a, py::pos_only());
  define<set_num_threads>(m, "set_num_threads", "count");
  m.def("get_num_threads", &cpu::get_num_threads);
  m.def("set_alone", &cpu::set_alone, "on"_a, py::pos_only());
  m.def("cpu_capability", &cpu::capability);
  m.def("build_info", &build_info);
}
