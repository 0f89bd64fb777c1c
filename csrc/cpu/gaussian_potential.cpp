// Gaussian potentials of all pairs, and their gradient.
//
// Squared distances come from |x|^2 + |y|^2 - 2 <x, y>, with the mean of the columns subtracted from both. That changes
// no distance, and it keeps the digits when all embeddings lie in a narrow cone, as those of one modality do: the error
// of an exponent is about 2e-7 t (|x|^2 + |y|^2) with lengths measured from that mean.
#include <cmath>
#include <limits>

#include "sweep.h"

namespace modstruct::cpu {
namespace {

void mean(const float* vectors, int64_t count, int64_t dimension, int threads, float* center) {
    parallel_for(ceil_divide(dimension, SLAB), threads, [&](int64_t task, int) {
        const int64_t start = task * SLAB;
        const int64_t width = std::min(SLAB, dimension - start);
        double sum[SLAB] = {};
        for (int64_t k = 0; k < count; ++k) {
            for (int64_t d = 0; d < width; ++d) {
                sum[d] += static_cast<double>(vectors[k * dimension + start + d]);
            }
        }
        for (int64_t d = 0; d < width; ++d) {
            center[start + d] = static_cast<float>(sum[d] / static_cast<double>(count));
        }
    });
}

// Squared lengths from the centre, with the bits of a tile's products: so a vector's distance to itself is exactly 0.
// Infinite behind the last vector.
class Norms {
   public:
    Norms(const Sweep& sweep, const float* vectors, int64_t count, const float* center)
        : data_(block_count(count) * BLOCK) {
        std::fill(data_.data() + count, data_.data() + block_count(count) * BLOCK,
                  std::numeric_limits<float>::infinity());
        Buffer<float> panels(sweep.threads * sweep.depth * SLAB);
        const int64_t dimension = sweep.pairs.dimension;
        parallel_for(ceil_divide(count, SLAB), sweep.threads, [&](int64_t task, int thread) {
            float* panel = panels.data() + thread * sweep.depth * SLAB;
            float norms[SLAB];
            const auto vector = [&](int64_t i) { return vectors + (task * SLAB + i) * dimension; };
            pack_panel(vector, count - task * SLAB, dimension, center, 1.0f, panel);
            sweep.kernels.panel_dots(panel, panel, sweep.depth, norms);
            std::copy(norms, norms + std::min(SLAB, count - task * SLAB), data_.data() + task * SLAB);
        });
    }
    const float* block(int64_t block) const { return data_.data() + block * BLOCK; }

   private:
    Buffer<float> data_;
};

// grad_j -= others_j (x_j - center), what the tiles' products with the columns leave out.
void take_off_own(const Sweep& sweep, const float* vectors, int64_t count, const float* center, const double* others,
                  float* grad) {
    const int64_t dimension = sweep.pairs.dimension;
    parallel_for(block_count(count), sweep.threads, [&](int64_t block, int) {
        for (int64_t j = block * BLOCK; j < std::min(count, (block + 1) * BLOCK); ++j) {
            for (int64_t d = 0; d < dimension; ++d) {
                const double own = others[j] * static_cast<double>(vectors[j * dimension + d] - center[d]);
                grad[j * dimension + d] = static_cast<float>(static_cast<double>(grad[j * dimension + d]) - own);
            }
        }
    });
}

}  // namespace

void gaussian_potential(const GaussianPotential& problem, const Choice& choice) {
    const Sweep sweep(problem.pairs, choice);
    const Pairs& pairs = problem.pairs;
    const bool symmetric = problem.symmetric;
    const bool with_grad = problem.x_grad != nullptr;
    Buffer<float> center(pairs.dimension);
    mean(pairs.y, pairs.columns, pairs.dimension, sweep.threads, center.data());
    Slabs y_slabs(sweep.column_blocks, pairs.dimension);
    y_slabs.pack(pairs.y, pairs.columns, center.data(), sweep.threads);
    Panels x_panels(sweep.group_blocks, pairs.dimension);
    Slabs x_slabs(with_grad ? sweep.group_blocks : 0, pairs.dimension);
    const Norms row_norms(sweep, pairs.x, pairs.rows, center.data());
    const Norms column_norms(sweep, pairs.y, pairs.columns, center.data());
    GroupTiles tiles(sweep, true);

    const int64_t tiles_in_group = sweep.group_blocks * sweep.column_blocks;
    Buffer<double> totals(tiles_in_group);
    Buffer<float> row_others(tiles_in_group * BLOCK);
    Buffer<float> column_others(tiles_in_group * BLOCK);
    Buffer<double> x_others(pairs.rows);
    Buffer<double> y_others(pairs.columns);
    double* const columns_side = symmetric ? x_others.data() : y_others.data();
    double total = 0;

    for (int64_t group = 0; group < sweep.row_blocks; group += sweep.group_blocks) {
        const int64_t count = sweep.rows_in_group(group);
        x_panels.pack(sweep.group_rows(pairs.x, group), count, center.data(), 1.0f, sweep.threads);
        sweep.for_tiles(group, symmetric, [&](int64_t block, int64_t column, int) {
            const int64_t rows = sweep.rows_in(group + block);
            const int64_t columns = sweep.columns_in(column);
            const int64_t place = block * sweep.column_blocks + column;
            float* tile = tiles.tile(block, column);
            sweep.kernels.tile_products(x_panels.block(block), y_slabs.block(column), rows, columns, sweep.depth, tile);
            GaussianSums sums = {0, row_others.data() + place * BLOCK, column_others.data() + place * BLOCK};
            sweep.kernels.gaussian(tile, rows, columns, row_norms.block(group + block), column_norms.block(column),
                                   problem.t, sums);
            totals[place] = sums.total;
        });
        // In the order of the tiles, so that no bit depends on which thread was the first.
        for (int64_t block = 0; block < block_count(count); ++block) {
            const int64_t row_block = group + block;
            for (int64_t column = symmetric ? row_block : 0; column < sweep.column_blocks; ++column) {
                const int64_t place = block * sweep.column_blocks + column;
                const bool serves_both = symmetric && column > row_block;
                total += serves_both ? 2 * totals[place] : totals[place];
                for (int64_t j = 0; j < sweep.rows_in(row_block); ++j) {
                    x_others[row_block * BLOCK + j] += static_cast<double>(row_others[place * BLOCK + j]);
                }
                for (int64_t k = 0; (serves_both || !symmetric) && k < sweep.columns_in(column); ++k) {
                    columns_side[column * BLOCK + k] += static_cast<double>(column_others[place * BLOCK + k]);
                }
            }
        }
        if (with_grad) {
            x_slabs.pack(sweep.group_rows(pairs.x, group), count, center.data(), sweep.threads);
            tiles.grad_columns(group, symmetric, x_slabs, symmetric ? problem.x_grad : problem.y_grad);
            tiles.grad_rows(group, symmetric, y_slabs, problem.x_grad);
        }
    }
    *problem.total = total;
    if (with_grad) {
        take_off_own(sweep, pairs.x, pairs.rows, center.data(), x_others.data(), problem.x_grad);
        if (!symmetric) {
            take_off_own(sweep, pairs.y, pairs.columns, center.data(), y_others.data(), problem.y_grad);
        }
    }
}

}  // namespace modstruct::cpu
