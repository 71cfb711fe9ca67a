// The part of the module updp._C that belongs to operator attention.
#pragma once

#include <pybind11/pybind11.h>

namespace updp {

void bind_attention(pybind11::module_& module);

}  // namespace updp
