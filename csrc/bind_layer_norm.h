// The part of the module updp._C that belongs to operator layer_norm.
#pragma once

#include <pybind11/pybind11.h>

namespace updp {

void bind_layer_norm(pybind11::module_& module);

}  // namespace updp
