// Symmetric InfoNCE: log-sum-exps of rows and columns from one pass over the tiles, and their gradients from another.
#include <cmath>

#include "log_sum_exp.h"
#include "sweep.h"

namespace modstruct::cpu {

int64_t kept_logits(int64_t rows, int64_t columns) { return block_count(rows) * block_count(columns) * TILE_FLOATS; }

void contrastive_statistics(const ContrastiveStatistics& problem, const Choice& choice) {
    const Sweep sweep(problem.pairs, choice);
    const Pairs& pairs = problem.pairs;
    Slabs y_slabs(sweep.column_blocks, pairs.dimension);
    y_slabs.pack(pairs.y, pairs.columns, nullptr, sweep.threads);
    Panels x_panels(sweep.group_blocks, pairs.dimension);
    Buffer<float> tiles(sweep.threads * TILE_FLOATS, Content::any);
    RowSums row_sums(sweep);
    ColumnSums column_sums(sweep);

    for (int64_t group = 0; group < sweep.row_blocks; group += sweep.group_blocks) {
        x_panels.pack(sweep.group_rows(pairs.x, group), sweep.rows_in_group(group), nullptr, *problem.scale,
                      sweep.threads);
        sweep.for_tiles(group, false, [&](int64_t block, int64_t column, int thread) {
            const int64_t first_row = (group + block) * BLOCK;
            const int64_t rows = sweep.rows_in(group + block);
            const int64_t columns = sweep.columns_in(column);
            float* tile = problem.logits == nullptr ? tiles.data() + thread * TILE_FLOATS
                                                    : problem.logits + sweep.tile_place(group + block, column);
            sweep.kernels.tile_products(x_panels.block(block), y_slabs.block(column), rows, columns, sweep.depth, tile);
            take_positives(tile, first_row, rows, column * BLOCK, columns, problem.first,
                           problem.positive + first_row);
            for (int64_t k = 0; k < columns; ++k) {  // the lanes behind the last row are no rows
                std::fill(tile + k * BLOCK + rows, tile + (k + 1) * BLOCK, LOWEST);
            }
            sweep.kernels.statistics(tile, rows, columns, true, row_sums.maxima(block, column),
                                     row_sums.sums(block, column), column_sums.maxima(block, column),
                                     column_sums.sums(block, column));
        });
        row_sums.finish(group, problem.row_lse + group * BLOCK);
        column_sums.add_group(group);
    }
    column_sums.finish(problem.column_lse);
}

void contrastive_grad(const ContrastiveGrad& problem, const Choice& choice) {
    const Sweep sweep(problem.pairs, choice);
    const Pairs& pairs = problem.pairs;
    Slabs y_slabs(sweep.column_blocks, pairs.dimension);
    y_slabs.pack(pairs.y, pairs.columns, nullptr, sweep.threads);
    Panels x_panels(sweep.group_blocks, pairs.dimension);
    Slabs x_slabs(sweep.group_blocks, pairs.dimension);
    GroupTiles tiles(sweep, true);
    // A whole number of blocks, for vectors that reach past the last row.
    Buffer<float> row_lse(sweep.row_blocks * BLOCK);
    Buffer<float> row_weight(sweep.row_blocks * BLOCK);
    std::copy(problem.row_values, problem.row_values + pairs.rows, row_lse.data());
    std::copy(problem.row_values + pairs.rows, problem.row_values + 2 * pairs.rows, row_weight.data());
    const float* positive_weight = problem.row_values + 2 * pairs.rows;

    for (int64_t group = 0; group < sweep.row_blocks; group += sweep.group_blocks) {
        const float* x = sweep.group_rows(pairs.x, group);
        if (problem.logits == nullptr) {
            x_panels.pack(x, sweep.rows_in_group(group), nullptr, *problem.scale, sweep.threads);
        }
        x_slabs.pack(x, sweep.rows_in_group(group), nullptr, sweep.threads);
        sweep.for_tiles(group, false, [&](int64_t block, int64_t column, int) {
            const int64_t first_row = (group + block) * BLOCK;
            const int64_t first_column = column * BLOCK;
            const int64_t rows = sweep.rows_in(group + block);
            const int64_t columns = sweep.columns_in(column);
            float* tile = tiles.tile(block, column);
            if (problem.logits == nullptr) {
                sweep.kernels.tile_products(x_panels.block(block), y_slabs.block(column), rows, columns, sweep.depth,
                                            tile);
            } else {
                const float* kept = problem.logits + sweep.tile_place(group + block, column);
                std::copy(kept, kept + columns * BLOCK, tile);
            }
            sweep.kernels.contrastive_weights(
                tile, rows, columns,
                {row_lse.data() + first_row, row_weight.data() + first_row, problem.column_values + first_column,
                 problem.column_values + pairs.columns + first_column});
            put_positives(tile, first_row, rows, first_column, columns, problem.first,
                          positive_weight + first_row);
        });
        tiles.grad_columns(group, false, x_slabs, problem.y_grad);
        tiles.grad_rows(group, false, y_slabs, problem.x_grad);
    }
}

}  // namespace modstruct::cpu
