// Which kernels this build holds and this machine runs.
#include <stdexcept>

#include "pairwise_cpu.h"
#include "kernels.h"

namespace modstruct::cpu {
namespace {

const Kernels* const KERNELS[] = {  // the fastest last
    &portable_kernels,
#if defined(__x86_64__)
    &avx2_kernels,
    &avx512_kernels,
#endif
};

}  // namespace

const Kernels& kernels_named(const std::string& instruction_set) {
    for (const Kernels* kernels : KERNELS) {
        if (instruction_set == kernels->name && kernels->runs_here()) {
            return *kernels;
        }
    }
    throw std::invalid_argument("instruction_set = '" + instruction_set +
                                "': this build or this machine has no such kernels");
}

std::vector<std::string> instruction_sets_built() {
    std::vector<std::string> names;
    for (const Kernels* kernels : KERNELS) {
        names.push_back(kernels->name);
    }
    return names;
}

std::vector<std::string> instruction_sets_here() {
    std::vector<std::string> names;
    for (const Kernels* kernels : KERNELS) {
        if (kernels->runs_here()) {
            names.push_back(kernels->name);
        }
    }
    return names;
}

bool built_with_openmp() {
#if defined(_OPENMP)
    return true;
#else
    return false;
#endif
}

}  // namespace modstruct::cpu
