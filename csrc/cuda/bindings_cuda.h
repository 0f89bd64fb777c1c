// What csrc/bindings.cpp takes from the CUDA half, where that is built (MODSTRUCT_WITH_CUDA).
#pragma once

#include <string>
#include <vector>

#include <pybind11/pybind11.h>

void bind_cuda(pybind11::module_& module);

std::vector<std::string> cuda_architectures_built();  // such as sm_90a, or compute_80 for PTX
