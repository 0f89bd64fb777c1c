// The closed form of geometric consistency: Gram matrices of A + B and A - B, less centres, and products with them. No
// pair of rows is ever formed. The micro-kernels are those of the tiles; what is a tile of logits there is a block of
// rows here, laid out by groups of 192 dimensions: [dimension / 192][row in block][192].
#include "packing.h"
#include "pairwise_cpu.h"

namespace modstruct::cpu {
namespace {

constexpr int64_t BLOCKS_AT_ONCE = 8;  // row blocks that are packed at a time, and summed in float32 before float64
constexpr int64_t PART = 4 * SLAB;     // dimensions of one task

int thread_count(const Choice& choice) {
#if defined(_OPENMP)
    return choice.threads;
#else
    return 1;
#endif
}

// A block of P or M, by groups of dimensions and, where slabs is not null, as slabs. Each is formed so that the first
// difference is of near numbers, and exact: of a row and its centre for P, of a row and its pair for M.
void pack_combination(const GeometricRows& rows, int64_t block, bool difference, float* groups, float* slabs) {
    const int64_t dimension = rows.dimension;
    const float* a_center = rows.centers;
    const float* b_center = rows.centers + dimension;
    const float* difference_center = rows.centers + 2 * dimension;
    const int64_t count = std::min(BLOCK, rows.rows - block * BLOCK);
    for (int64_t i = 0; i < count; ++i) {
        const float* a = rows.a + (block * BLOCK + i) * dimension;
        const float* b = rows.b + (block * BLOCK + i) * dimension;
        for (int64_t start = 0; start < dimension; start += SLAB) {
            float* in_group = groups + start / BLOCK * TILE_FLOATS + i * BLOCK + start % BLOCK;
            const int64_t width = std::min(SLAB, dimension - start);
            for (int64_t d = 0; d < width; ++d) {
                const int64_t at = start + d;
                in_group[d] = difference ? (a[at] - b[at]) - difference_center[at]
                                         : (a[at] - a_center[at]) + (b[at] - b_center[at]);
            }
            if (slabs != nullptr) {
                std::copy(in_group, in_group + width, slabs + start * BLOCK + i * SLAB);
            }
        }
    }
}

}  // namespace

void geometric_products(const GeometricProducts& problem, const Choice& choice) {
    const Kernels& kernels = kernels_named(choice.instruction_set);
    const int threads = thread_count(choice);
    const GeometricRows& rows = problem.rows;
    const int64_t dimension = rows.dimension;
    const int64_t groups = block_count(dimension);
    const int64_t parts = ceil_divide(dimension, PART);
    const int64_t group_floats = groups * TILE_FLOATS;
    const int64_t slab_floats = BLOCK * padded(dimension);
    const int64_t at_once = std::min(BLOCKS_AT_ONCE, block_count(rows.rows));
    Buffer<float> grouped(2 * at_once * group_floats);
    Buffer<float> slabs(2 * at_once * slab_floats);
    Buffer<float> sums(2 * dimension * dimension);
    Buffer<double> totals(2 * dimension * dimension);

    for (int64_t first = 0; first < block_count(rows.rows); first += at_once) {
        const int64_t blocks = std::min(at_once, block_count(rows.rows) - first);
        parallel_for(2 * blocks, threads, [&](int64_t task, int) {
            pack_combination(rows, first + task / 2, task % 2 == 1,
                             grouped.data() + task * group_floats, slabs.data() + task * slab_floats);
        });
        // Of the symmetric products only what is not left of the group's own dimensions.
        parallel_for(2 * groups * parts, threads, [&](int64_t task, int) {
            const int64_t sign = task % 2;
            const int64_t group = task / 2 % groups;
            const int64_t start = std::max(task / 2 / groups * PART, group * BLOCK);
            const int64_t end = std::min((task / 2 / groups + 1) * PART, dimension);
            if (start >= end) {
                return;
            }
            const int64_t height = std::min(BLOCK, dimension - group * BLOCK);
            float* sum = sums.data() + (sign * dimension + group * BLOCK) * dimension + start;
            for (int64_t i = 0; i < height; ++i) {
                std::fill(sum + i * dimension, sum + i * dimension + end - start, 0.0f);
            }
            for (int64_t block = 0; block < blocks; ++block) {
                const int64_t place = 2 * block + sign;
                kernels.grad_rows(grouped.data() + place * group_floats + group * TILE_FLOATS,
                                  slabs.data() + place * slab_floats + start * BLOCK, height,
                                  std::min(BLOCK, rows.rows - (first + block) * BLOCK), end - start, dimension, sum);
            }
            double* total = totals.data() + (sum - sums.data());
            for (int64_t i = 0; i < height * dimension; i += dimension) {
                for (int64_t d = 0; d < end - start; ++d) {
                    total[i + d] += static_cast<double>(sum[i + d]);
                }
            }
        });
    }
    for (int64_t sign = 0; sign < 2; ++sign) {
        float* products = problem.products + sign * dimension * dimension;
        const double* total = totals.data() + sign * dimension * dimension;
        for (int64_t i = 0; i < dimension; ++i) {
            for (int64_t d = i; d < dimension; ++d) {
                products[i * dimension + d] = products[d * dimension + i] = static_cast<float>(total[i * dimension + d]);
            }
        }
    }
}

void geometric_grad(const GeometricGrad& problem, const Choice& choice) {
    const Kernels& kernels = kernels_named(choice.instruction_set);
    const int threads = thread_count(choice);
    const GeometricRows& rows = problem.rows;
    const int64_t dimension = rows.dimension;
    const int64_t groups = block_count(dimension);
    Slabs plus(groups, dimension);
    Slabs minus(groups, dimension);
    plus.pack(problem.weights, dimension, nullptr, threads);
    minus.pack(problem.weights + dimension * dimension, dimension, nullptr, threads);
    Buffer<float> grouped(threads * groups * TILE_FLOATS);
    Buffer<float> grads(threads * 2 * BLOCK * dimension);

    parallel_for(block_count(rows.rows), threads, [&](int64_t block, int thread) {
        const int64_t count = std::min(BLOCK, rows.rows - block * BLOCK);
        float* block_rows = grouped.data() + thread * groups * TILE_FLOATS;
        float* plus_grad = grads.data() + thread * 2 * BLOCK * dimension;
        float* minus_grad = plus_grad + BLOCK * dimension;
        std::fill(plus_grad, plus_grad + 2 * BLOCK * dimension, 0.0f);
        for (const bool difference : {false, true}) {
            pack_combination(rows, block, difference, block_rows, nullptr);
            for (int64_t group = 0; group < groups; ++group) {
                kernels.grad_columns(block_rows + group * TILE_FLOATS, (difference ? minus : plus).block(group),
                                     std::min(BLOCK, dimension - group * BLOCK), count, dimension, dimension,
                                     difference ? minus_grad : plus_grad);
            }
        }
        const int64_t start = block * BLOCK * dimension;
        for (int64_t i = 0; i < count * dimension; ++i) {
            problem.a_grad[start + i] = plus_grad[i] + minus_grad[i];
            problem.b_grad[start + i] = plus_grad[i] - minus_grad[i];
        }
    });
}

}  // namespace modstruct::cpu
