// modstruct._C. Python hands over addresses, sizes and the number of threads; it has checked dtype, device and layout.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cuda/bindings_cuda.h"
#include "pairwise.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, module) {
    module.doc() = "Compiled kernels of modstruct. Called through modstruct.pairwise, which checks the arguments.";

    module.def(
        "features",
        [] {
            py::dict features;
            features["cpu"] = modstruct::cpu_instruction_sets_built();
            features["cpu_here"] = modstruct::cpu_instruction_sets_here();
            features["openmp"] = modstruct::built_with_openmp();
            features["cuda"] = cuda_architectures_built();
            return features;
        },
        "What this build holds. cpu: instruction sets built, cpu_here: those this machine runs, the fastest last; "
        "openmp: whether it has it; cuda: architectures built, empty without CUDA.");

    bind_cuda(module);

    module.def(
        "gaussian_potential_sums",
        [](std::uintptr_t rows, std::int64_t row_count, std::uintptr_t columns, std::int64_t column_count,
           std::int64_t dimension, double t, std::uintptr_t sums, std::uintptr_t pull, int threads,
           const std::string& instruction_set) {
            if (row_count < 1 || column_count < 1 || dimension < 1 || threads < 1) {
                throw py::value_error("row_count, column_count, dimension and threads must be at least 1");
            }
            if (rows == 0 || columns == 0 || sums == 0) {
                throw py::value_error("rows, columns and sums must be addresses, not 0");
            }
            const modstruct::GaussianPotential problem = {reinterpret_cast<const float*>(rows),
                                                          row_count,
                                                          reinterpret_cast<const float*>(columns),
                                                          column_count,
                                                          dimension,
                                                          static_cast<float>(t),
                                                          reinterpret_cast<float*>(sums),
                                                          reinterpret_cast<float*>(pull)};
            py::gil_scoped_release release;
            modstruct::gaussian_potential_sums_cpu(problem, instruction_set, threads);
        },
        py::arg("rows"), py::arg("row_count"), py::arg("columns"), py::arg("column_count"), py::arg("dimension"),
        py::arg("t"), py::arg("sums"), py::arg("pull"), py::arg("threads"), py::arg("instruction_set"),
        "Row sums of Gaussian potentials, and their pull unless its address is 0 (csrc/pairwise.h). float32 arrays.");
}
