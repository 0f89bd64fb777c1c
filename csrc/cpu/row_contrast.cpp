// One-sided contrasts of rows against columns: cross entropy with one-hot or softened targets, and the sigmoid loss. A
// row is complete within its group, so the group's logits are kept and become weights in place: one pass, and no product
// is formed twice.
#include <cmath>

#include "log_sum_exp.h"
#include "sweep.h"

namespace modstruct::cpu {
namespace {

// What is known of each row of the group once its log-sum-exps are.
struct RowValues {
    explicit RowValues(int64_t rows) : positive(rows), lse(rows), weight(rows) {}
    Buffer<float> positive;
    Buffer<float> lse;     // of the negatives
    Buffer<float> weight;  // sigmoid(margin), of the momentum rows times alpha
};

float sigmoid(float x) { return x < 0 ? std::exp(x) / (1 + std::exp(x)) : 1 / (1 + std::exp(-x)); }
float softplus(float x) { return x < 0 ? std::log1p(std::exp(x)) : x + std::log1p(std::exp(-x)); }

}  // namespace

void row_contrast(const RowContrast& problem, const Choice& choice) {
    const Sweep sweep(problem.pairs, choice);
    const Pairs& pairs = problem.pairs;
    const int64_t first = problem.first;
    const bool soft = problem.momentum != nullptr;
    Slabs y_slabs(sweep.column_blocks, pairs.dimension);
    y_slabs.pack(pairs.y, pairs.columns, nullptr, sweep.threads);
    Panels panels(sweep.group_blocks, pairs.dimension);
    Slabs x_slabs(problem.y_grad != nullptr ? sweep.group_blocks : 0, pairs.dimension);
    GroupTiles tiles(sweep, true);
    GroupTiles momentum_tiles(sweep, soft);
    RowSums sums(sweep);
    const int64_t group_rows = sweep.group_blocks * BLOCK;
    RowValues rows(group_rows);
    RowValues momentum(group_rows);
    Buffer<float> soft_losses(soft ? sweep.group_blocks * sweep.column_blocks * BLOCK : 0);
    Buffer<float> positive_weight(group_rows);

    for (int64_t group = 0; group < sweep.row_blocks; group += sweep.group_blocks) {
        const int64_t count = sweep.rows_in_group(group);
        const auto log_sum_exps = [&](const float* vectors, GroupTiles& logits, RowValues& values) {
            panels.pack(sweep.group_rows(vectors, group), count, nullptr, *problem.scale, sweep.threads);
            sweep.for_tiles(group, false, [&](int64_t block, int64_t column, int) {
                float* tile = logits.tile(block, column);
                const int64_t columns = sweep.columns_in(column);
                const int64_t block_rows = sweep.rows_in(group + block);
                sweep.kernels.tile_products(panels.block(block), y_slabs.block(column), block_rows, columns,
                                            sweep.depth, tile);
                take_positives(tile, (group + block) * BLOCK, block_rows, column * BLOCK, columns, first,
                               values.positive.data() + block * BLOCK);
                sweep.kernels.statistics(tile, block_rows, columns, false, sums.maxima(block, column),
                                         sums.sums(block, column), nullptr, nullptr);
            });
            sums.finish(group, values.lse.data());
        };
        log_sum_exps(pairs.x, tiles, rows);
        if (soft) {
            log_sum_exps(problem.momentum, momentum_tiles, momentum);
        }
        for (int64_t j = 0; j < count; ++j) {
            const float margin = rows.lse[j] - rows.positive[j];
            problem.losses[group * BLOCK + j] = softplus(margin);
            rows.weight[j] = sigmoid(margin);
            momentum.weight[j] = soft ? problem.alpha * sigmoid(momentum.lse[j] - momentum.positive[j]) : 0.0f;
            positive_weight[j] = momentum.weight[j] - rows.weight[j];
        }
        if (!soft && problem.x_grad == nullptr) {
            continue;
        }

        sweep.for_tiles(group, false, [&](int64_t block, int64_t column, int) {
            const int64_t at = block * BLOCK;
            const int64_t columns = sweep.columns_in(column);
            const int64_t block_rows = sweep.rows_in(group + block);
            float* tile = tiles.tile(block, column);
            const SoftWeights weights = {rows.lse.data() + at,
                                         rows.weight.data() + at,
                                         soft ? momentum.lse.data() + at : nullptr,
                                         momentum.weight.data() + at,
                                         rows.positive.data() + at,
                                         soft_losses.data() + (soft ? (block * sweep.column_blocks + column) * BLOCK : 0)};
            const float* momentum_tile = soft ? momentum_tiles.tile(block, column) : nullptr;
            sweep.kernels.soft_weights(tile, momentum_tile, block_rows, columns, weights);
            put_positives(tile, group * BLOCK + at, block_rows, column * BLOCK, columns, first,
                          positive_weight.data() + at);
        });
        for (int64_t j = 0; soft && j < count; ++j) {
            double loss = problem.losses[group * BLOCK + j];
            for (int64_t column = 0; column < sweep.column_blocks; ++column) {
                loss += static_cast<double>(
                    soft_losses[(j / BLOCK * sweep.column_blocks + column) * BLOCK + j % BLOCK]);
            }
            problem.losses[group * BLOCK + j] = static_cast<float>(loss);
        }
        if (problem.x_grad != nullptr) {
            tiles.grad_rows(group, false, y_slabs, problem.x_grad);
        }
        if (problem.y_grad != nullptr) {
            x_slabs.pack(sweep.group_rows(pairs.x, group), count, nullptr, sweep.threads);
            tiles.grad_columns(group, false, x_slabs, problem.y_grad);
        }
    }
}

void sigmoid_contrast(const SigmoidContrast& problem, const Choice& choice) {
    const Sweep sweep(problem.pairs, choice);
    const Pairs& pairs = problem.pairs;
    const float bias = problem.affine[1];
    Slabs y_slabs(sweep.column_blocks, pairs.dimension);
    y_slabs.pack(pairs.y, pairs.columns, nullptr, sweep.threads);
    Panels panels(sweep.group_blocks, pairs.dimension);
    Slabs x_slabs(problem.y_grad != nullptr ? sweep.group_blocks : 0, pairs.dimension);
    GroupTiles tiles(sweep, true);
    Buffer<float> positive(sweep.group_blocks * BLOCK);
    const int64_t sums = sweep.group_blocks * sweep.column_blocks * BLOCK;
    Buffer<float> losses(sums);
    Buffer<float> weights(sums);
    double total = 0;
    double weight_total = 0;

    for (int64_t group = 0; group < sweep.row_blocks; group += sweep.group_blocks) {
        const int64_t count = sweep.rows_in_group(group);
        panels.pack(sweep.group_rows(pairs.x, group), count, nullptr, problem.affine[0], sweep.threads);
        sweep.for_tiles(group, false, [&](int64_t block, int64_t column, int) {
            float* tile = tiles.tile(block, column);
            const int64_t columns = sweep.columns_in(column);
            const int64_t block_rows = sweep.rows_in(group + block);
            const int64_t at = (block * sweep.column_blocks + column) * BLOCK;
            float* positives = positive.data() + block * BLOCK;
            sweep.kernels.tile_products(panels.block(block), y_slabs.block(column), block_rows, columns, sweep.depth,
                                        tile);
            // In a positive's place comes the lowest number, whose loss and weight are 0.
            take_positives(tile, (group + block) * BLOCK, block_rows, column * BLOCK, columns, problem.first, positives);
            sweep.kernels.sigmoid_weights(tile, block_rows, columns, bias, {losses.data() + at, weights.data() + at});
        });
        // In the order of the rows and tiles, so that no bit depends on which thread was the first.
        for (int64_t j = 0; j < count; ++j) {
            for (int64_t column = 0; column < sweep.column_blocks; ++column) {
                const int64_t at = (j / BLOCK * sweep.column_blocks + column) * BLOCK + j % BLOCK;
                total += static_cast<double>(losses[at]);
                weight_total += static_cast<double>(weights[at]);
            }
            const float margin = -(positive[j] + bias);
            total += static_cast<double>(softplus(margin));
            positive[j] = -sigmoid(margin);
            weight_total += static_cast<double>(positive[j]);
        }
        if (problem.x_grad == nullptr) {
            continue;
        }
        sweep.for_tiles(group, false, [&](int64_t block, int64_t column, int) {
            put_positives(tiles.tile(block, column), (group + block) * BLOCK, sweep.rows_in(group + block),
                          column * BLOCK, sweep.columns_in(column), problem.first, positive.data() + block * BLOCK);
        });
        tiles.grad_rows(group, false, y_slabs, problem.x_grad);
        if (problem.y_grad != nullptr) {
            x_slabs.pack(sweep.group_rows(pairs.x, group), count, nullptr, sweep.threads);
            tiles.grad_columns(group, false, x_slabs, problem.y_grad);
        }
    }
    problem.totals[0] = total;
    problem.totals[1] = weight_total;
}

}  // namespace modstruct::cpu
