// What csrc/bindings.cpp takes from the CUDA half; without it (no MODSTRUCT_WITH_CUDA) there is nothing to take.
#pragma once

#include <string>
#include <vector>

#include <pybind11/pybind11.h>

#if defined(MODSTRUCT_WITH_CUDA)
void bind_cuda(pybind11::module_& module);

std::vector<std::string> cuda_architectures_built();  // such as sm_90a, or compute_80 for PTX
#else
inline void bind_cuda(pybind11::module_&) {}

inline std::vector<std::string> cuda_architectures_built() { return {}; }
#endif
