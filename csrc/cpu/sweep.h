// All tiles of a problem, a group of row blocks at a time, and their products with the columns and the rows.
#pragma once

#include <algorithm>

#include "pairwise_cpu.h"
#include "kernels.h"
#include "packing.h"

namespace modstruct::cpu {

// The order in which the tiles of a problem are computed. A group has enough row blocks to keep every thread busy; their
// number changes no bit of a result, since all sums run over single blocks in their order.
struct Sweep {
    Sweep(const Pairs& pairs, const Choice& choice);

    int64_t rows_in(int64_t block) const { return std::min(BLOCK, pairs.rows - block * BLOCK); }
    int64_t columns_in(int64_t block) const { return std::min(BLOCK, pairs.columns - block * BLOCK); }
    int64_t rows_in_group(int64_t first_block) const {
        return std::min(group_blocks * BLOCK, pairs.rows - first_block * BLOCK);
    }
    const float* group_rows(const float* rows, int64_t first_block) const {
        return rows + first_block * BLOCK * pairs.dimension;
    }

    // Where the tile of these blocks lies, where all tiles of the row blocks from the first on are kept.
    int64_t tile_place(int64_t row_block, int64_t column_block) const {
        return (row_block * column_blocks + column_block) * TILE_FLOATS;
    }

    // body(row block within the group, column block, thread) for all tiles of the group; where symmetric, only those
    // that are not below the diagonal.
    template <typename Body>
    void for_tiles(int64_t first_block, bool symmetric, const Body& body) const {
        const int64_t blocks = block_count(rows_in_group(first_block));
        parallel_for(blocks * column_blocks, threads, [&](int64_t task, int thread) {
            const int64_t block = task / column_blocks;
            const int64_t column = task % column_blocks;
            if (!symmetric || column >= first_block + block) {
                body(block, column, thread);
            }
        });
    }

    Pairs pairs;
    const Kernels& kernels;
    int threads;
    int64_t depth;          // the padded dimension
    int64_t row_blocks;
    int64_t column_blocks;
    int64_t group_blocks;
};

// The tiles of one group, and what is made of them.
class GroupTiles {
   public:
    GroupTiles(const Sweep& sweep, bool wanted)
        : sweep_(sweep), data_(wanted ? sweep.group_blocks * sweep.column_blocks * TILE_FLOATS : 0, Content::any) {}

    float* tile(int64_t block, int64_t column) { return data_.data() + sweep_.tile_place(block, column); }
    // x_grad += W y for the rows of the group
    void grad_rows(int64_t first_block, bool symmetric, const Slabs& y_slabs, float* x_grad);
    // y_grad += W^T x; where symmetric, without the tiles on the diagonal, which count for their rows alone
    void grad_columns(int64_t first_block, bool symmetric, const Slabs& x_slabs, float* y_grad);

   private:
    const Sweep& sweep_;
    Buffer<float> data_;
};

// Takes the positives out of a tile of logits: their values go to `positive`, (rows), and LOWEST comes in their place.
void take_positives(float* tile, int64_t first_row, int64_t rows, int64_t first_column, int64_t columns, int64_t first,
                    float* positive);
// Puts the rows' values, (rows), at their positives.
void put_positives(float* tile, int64_t first_row, int64_t rows, int64_t first_column, int64_t columns, int64_t first,
                   const float* values);

}  // namespace modstruct::cpu
