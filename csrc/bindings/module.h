// One function a file of bindings, which adds what the file has to the module.
#pragma once

#include "common.h"

namespace pyppo::bindings {

void bind_gae(py::module_& m);
void bind_losses(py::module_& m);
void bind_sample(py::module_& m);
void bind_update(py::module_& m);
void bind_mlp(py::module_& m);

}  // namespace pyppo::bindings
