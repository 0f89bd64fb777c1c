#include "sweep.h"

namespace modstruct::cpu {
namespace {

constexpr int64_t TASKS_PER_THREAD = 32;
constexpr int64_t SLABS_AT_ONCE = 4;  // of one task: a tile stays in the second-level cache for all of them

}  // namespace

Sweep::Sweep(const Pairs& pairs, const Choice& choice)
    : pairs(pairs),
      kernels(kernels_named(choice.instruction_set)),
#if defined(_OPENMP)
      threads(choice.threads),
#else
      threads(1),
#endif
      depth(padded(pairs.dimension)),
      row_blocks(block_count(pairs.rows)),
      column_blocks(block_count(pairs.columns)),
      group_blocks(std::min(row_blocks, ceil_divide(TASKS_PER_THREAD * threads, column_blocks))) {
}

void GroupTiles::grad_rows(int64_t first_block, bool symmetric, const Slabs& y_slabs, float* x_grad) {
    const int64_t dimension = sweep_.pairs.dimension;
    const int64_t parts = ceil_divide(dimension, SLABS_AT_ONCE * SLAB);
    parallel_for(block_count(sweep_.rows_in_group(first_block)) * parts, sweep_.threads, [&](int64_t task, int) {
        const int64_t block = task / parts;
        const int64_t start = task % parts * SLABS_AT_ONCE * SLAB;
        const int64_t row_block = first_block + block;
        for (int64_t column = symmetric ? row_block : 0; column < sweep_.column_blocks; ++column) {
            sweep_.kernels.grad_rows(tile(block, column), y_slabs.block(column) + start * BLOCK,
                                     sweep_.rows_in(row_block), sweep_.columns_in(column),
                                     std::min(SLABS_AT_ONCE * SLAB, dimension - start), dimension,
                                     x_grad + row_block * BLOCK * dimension + start);
        }
    });
}

void GroupTiles::grad_columns(int64_t first_block, bool symmetric, const Slabs& x_slabs, float* y_grad) {
    const int64_t dimension = sweep_.pairs.dimension;
    const int64_t parts = ceil_divide(dimension, SLABS_AT_ONCE * SLAB);
    const int64_t blocks = block_count(sweep_.rows_in_group(first_block));
    parallel_for(sweep_.column_blocks * parts, sweep_.threads, [&](int64_t task, int) {
        const int64_t column = task / parts;
        const int64_t start = task % parts * SLABS_AT_ONCE * SLAB;
        for (int64_t block = 0; block < blocks && (!symmetric || column > first_block + block); ++block) {
            sweep_.kernels.grad_columns(tile(block, column), x_slabs.block(block) + start * BLOCK,
                                        sweep_.rows_in(first_block + block), sweep_.columns_in(column),
                                        std::min(SLABS_AT_ONCE * SLAB, dimension - start), dimension,
                                        y_grad + column * BLOCK * dimension + start);
        }
    });
}

void take_positives(float* tile, int64_t first_row, int64_t rows, int64_t first_column, int64_t columns, int64_t first,
                    float* positive) {
    for (int64_t j = 0; j < rows; ++j) {
        const int64_t k = first + first_row + j - first_column;
        if (k >= 0 && k < columns) {
            positive[j] = tile[k * BLOCK + j];
            tile[k * BLOCK + j] = LOWEST;
        }
    }
}

void put_positives(float* tile, int64_t first_row, int64_t rows, int64_t first_column, int64_t columns, int64_t first,
                   const float* values) {
    for (int64_t j = 0; j < rows; ++j) {
        const int64_t k = first + first_row + j - first_column;
        if (k >= 0 && k < columns) {
            tile[k * BLOCK + j] = values[j];
        }
    }
}

}  // namespace modstruct::cpu
