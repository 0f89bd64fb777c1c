// The CUDA half of modstruct._C as a module of its own, its kernels run on the CPU.
#include "thread_block.h"

#include <pybind11/pybind11.h>

void bind_cuda(pybind11::module_& module);

PYBIND11_MODULE(cuda_on_cpu, module) {
    bind_cuda(module);
    module.def("set_thread_order", &cuda_on_cpu::set_thread_order, pybind11::arg("order"), pybind11::arg("seed") = 0);
}
