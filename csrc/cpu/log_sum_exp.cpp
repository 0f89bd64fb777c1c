#include "log_sum_exp.h"

#include <cmath>

namespace modstruct::cpu {
namespace {

constexpr int64_t COLUMNS_PER_TASK = 1024;

float log_sum(float maximum, double sum) { return static_cast<float>(static_cast<double>(maximum) + std::log(sum)); }

}  // namespace

void RowSums::finish(int64_t first_block, float* row_lse) const {
    const int64_t rows = sweep_.rows_in_group(first_block);
    parallel_for(block_count(rows), sweep_.threads, [&](int64_t block, int) {
        const float* maxima = maxima_.data() + block * sweep_.column_blocks * BLOCK;
        const float* sums = sums_.data() + block * sweep_.column_blocks * BLOCK;
        for (int64_t j = 0; j < std::min(BLOCK, rows - block * BLOCK); ++j) {
            float maximum = LOWEST;
            for (int64_t c = 0; c < sweep_.column_blocks; ++c) {
                maximum = std::max(maximum, maxima[c * BLOCK + j]);
            }
            double sum = 0;
            for (int64_t c = 0; c < sweep_.column_blocks; ++c) {
                sum += static_cast<double>(sums[c * BLOCK + j] * std::exp(maxima[c * BLOCK + j] - maximum));
            }
            row_lse[block * BLOCK + j] = log_sum(maximum, sum);
        }
    });
}

ColumnSums::ColumnSums(const Sweep& sweep)
    : sweep_(sweep),
      maxima_(sweep.group_blocks * sweep.pairs.columns),
      sums_(sweep.group_blocks * sweep.pairs.columns),
      running_maxima_(sweep.pairs.columns),
      running_sums_(sweep.pairs.columns) {
    std::fill(running_maxima_.data(), running_maxima_.data() + sweep.pairs.columns, LOWEST);
}

void ColumnSums::add_group(int64_t first_block) {
    const int64_t columns = sweep_.pairs.columns;
    const int64_t blocks = block_count(sweep_.rows_in_group(first_block));
    parallel_for(ceil_divide(columns, COLUMNS_PER_TASK), sweep_.threads, [&](int64_t task, int) {
        const int64_t end = std::min(columns, (task + 1) * COLUMNS_PER_TASK);
        for (int64_t block = 0; block < blocks; ++block) {
            for (int64_t k = task * COLUMNS_PER_TASK; k < end; ++k) {
                const float seen = running_maxima_[k];
                const float here = maxima_[block * columns + k];
                const float maximum = std::max(seen, here);
                running_maxima_[k] = maximum;
                running_sums_[k] = running_sums_[k] * static_cast<double>(std::exp(seen - maximum)) +
                                   static_cast<double>(sums_[block * columns + k] * std::exp(here - maximum));
            }
        }
    });
}

void ColumnSums::finish(float* column_lse) const {
    for (int64_t k = 0; k < sweep_.pairs.columns; ++k) {
        column_lse[k] = log_sum(running_maxima_[k], running_sums_[k]);
    }
}

}  // namespace modstruct::cpu
