// Terms over all pairs of two sets of vectors, tile by tile: what the kernels offer to the bindings.
// Every array is row-major without gaps. Nothing here knows torch or Python.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace modstruct {

// sums[j] = sum_k exp(-t |rows[j] - columns[k]|^2)
// pull[j] = sum_k exp(-t |rows[j] - columns[k]|^2) (columns[k] - rows[j]), so the gradient of sums[j] is 2 t pull[j]
struct GaussianPotential {
    const float* rows;  // (row_count, dimension)
    int64_t row_count;
    const float* columns;  // (column_count, dimension)
    int64_t column_count;
    int64_t dimension;
    float t;      // positive
    float* sums;  // (row_count)
    float* pull;  // (row_count, dimension), or null where no gradient is needed
};

// Memory O((rows + columns) * dimension). The bits of the result do not depend on the number of threads.
// instruction_set: one of cpu_instruction_sets_here(). Throws std::invalid_argument on any other.
void gaussian_potential_sums_cpu(const GaussianPotential& problem, const std::string& instruction_set, int threads);

std::vector<std::string> cpu_instruction_sets_built();
std::vector<std::string> cpu_instruction_sets_here();  // what this machine can run of those built, the fastest last
bool built_with_openmp();

}  // namespace modstruct
