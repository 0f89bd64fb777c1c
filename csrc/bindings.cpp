// modstruct._C: what it holds, and its two parts.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/bindings_cpu.h"
#include "cpu/pairwise_cpu.h"
#include "cuda/bindings_cuda.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, module) {
    module.doc() = "Compiled kernels of modstruct. Called through modstruct.pairwise, which checks the arguments.";

    module.def(
        "features",
        [] {
            py::dict features;
            features["cpu"] = modstruct::cpu::instruction_sets_built();
            features["cpu_here"] = modstruct::cpu::instruction_sets_here();
            features["openmp"] = modstruct::cpu::built_with_openmp();
            features["cuda"] = cuda_architectures_built();
            return features;
        },
        "What this build holds. cpu: instruction sets built, cpu_here: those this machine runs, the fastest last; "
        "openmp: whether it has it; cuda: GPU architectures built, none in a build without nvcc.");

    bind_cpu(module);
    bind_cuda(module);
}
