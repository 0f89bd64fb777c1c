// The CUDA half of modstruct._C as a module of its own, its kernels run on the CPU.
#include <pybind11/pybind11.h>

#include "bindings_cuda.h"
#include "thread_block.h"

PYBIND11_MODULE(cuda_on_cpu, module) {
    bind_cuda(module);
    module.def("set_thread_order", &cuda_on_cpu::set_thread_order, pybind11::arg("order"), pybind11::arg("seed") = 0);
}
