// The part of the module updp._C that belongs to operators conv and conv_program.
#pragma once

#include <pybind11/pybind11.h>

namespace updp {

void bind_conv(pybind11::module_& module);
void bind_program(pybind11::module_& module);

}  // namespace updp
