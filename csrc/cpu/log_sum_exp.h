// Log-sum-exps of rows and of columns, combined from the maxima and sums of single tiles in the order of the tiles.
#pragma once

#include "sweep.h"

namespace modstruct::cpu {

// Of the rows of one group: a row is complete once all tiles of its block are there.
class RowSums {
   public:
    explicit RowSums(const Sweep& sweep)
        : sweep_(sweep),
          maxima_(sweep.group_blocks * sweep.column_blocks * BLOCK),
          sums_(sweep.group_blocks * sweep.column_blocks * BLOCK) {}

    float* maxima(int64_t block, int64_t column) { return maxima_.data() + (block * sweep_.column_blocks + column) * BLOCK; }
    float* sums(int64_t block, int64_t column) { return sums_.data() + (block * sweep_.column_blocks + column) * BLOCK; }
    void finish(int64_t first_block, float* row_lse) const;  // row_lse: of the group's rows

   private:
    const Sweep& sweep_;
    Buffer<float> maxima_;
    Buffer<float> sums_;
};

// Of all columns, over one group of rows after the other.
class ColumnSums {
   public:
    explicit ColumnSums(const Sweep& sweep);

    float* maxima(int64_t block, int64_t column) { return maxima_.data() + block * sweep_.pairs.columns + column * BLOCK; }
    float* sums(int64_t block, int64_t column) { return sums_.data() + block * sweep_.pairs.columns + column * BLOCK; }
    void add_group(int64_t first_block);
    void finish(float* column_lse) const;  // (columns)

   private:
    const Sweep& sweep_;
    Buffer<float> maxima_;  // of the group: (group_blocks, columns)
    Buffer<float> sums_;
    Buffer<float> running_maxima_;  // (columns)
    Buffer<double> running_sums_;
};

}  // namespace modstruct::cpu
