// Ranks by counting: how many items score above a query's positive, and how many tie, with the items streamed through.
#include <vector>

#include "packing.h"
#include "sweep.h"

namespace modstruct::cpu {
namespace {

constexpr int64_t ITEM_BLOCKS_AT_ONCE = 16;  // 3,072 items packed at a time: 6 MB at dimension 512
constexpr int64_t TASKS_PER_THREAD = 8;

// Scores of 32 pairs, with the bits that a tile would give.
void pair_scores(const NearestCounts& problem, const Sweep& sweep, float* scores) {
    const int64_t dimension = problem.pairs.dimension;
    Buffer<float> panels(sweep.threads * 2 * sweep.depth * SLAB);
    parallel_for(ceil_divide(problem.count, SLAB), sweep.threads, [&](int64_t task, int thread) {
        float* queries = panels.data() + thread * 2 * sweep.depth * SLAB;
        float* items = queries + sweep.depth * SLAB;
        const int64_t start = task * SLAB;
        const int64_t count = std::min(SLAB, problem.count - start);
        const auto query = [&](int64_t i) { return problem.pairs.x + problem.query[start + i] * dimension; };
        const auto item = [&](int64_t i) { return problem.pairs.y + problem.item[start + i] * dimension; };
        pack_panel(query, count, dimension, nullptr, 1.0f, queries);
        pack_panel(item, count, dimension, nullptr, 1.0f, items);
        float dots[SLAB];
        sweep.kernels.panel_dots(queries, items, sweep.depth, dots);
        std::copy(dots, dots + count, scores + start);
    });
}

}  // namespace

void nearest_counts(const NearestCounts& problem, const Choice& choice) {
    const Sweep sweep(problem.pairs, choice);
    const Pairs& pairs = problem.pairs;
    Buffer<float> scores(problem.count);
    pair_scores(problem, sweep, scores.data());
    std::fill(problem.above, problem.above + problem.count, 0);
    std::fill(problem.ties, problem.ties + problem.count, 0);

    std::vector<int64_t> first_pair(pairs.rows + 1, 0);  // of each query
    for (int64_t p = 0; p < problem.count; ++p) {
        ++first_pair[problem.query[p] + 1];
    }
    for (int64_t q = 0; q < pairs.rows; ++q) {
        first_pair[q + 1] += first_pair[q];
    }

    const int64_t most_blocks = std::min(ITEM_BLOCKS_AT_ONCE, sweep.column_blocks);
    Slabs items(most_blocks, pairs.dimension);
    const int64_t panel_floats = BLOCK * sweep.depth;
    Buffer<float> panels(sweep.threads * panel_floats, Content::any);
    Buffer<float> tiles(sweep.threads * TILE_FLOATS, Content::any);
    Buffer<int32_t> counts(sweep.threads * 2 * BLOCK);

    for (int64_t start = 0; start < sweep.column_blocks; start += most_blocks) {
        const int64_t blocks = std::min(most_blocks, sweep.column_blocks - start);
        items.pack(pairs.y + start * BLOCK * pairs.dimension,
                   std::min(blocks * BLOCK, pairs.columns - start * BLOCK), nullptr, sweep.threads);
        // Few queries: the item blocks are shared out among threads too. Counts are integers, whatever their order.
        const int64_t parts =
            std::min(blocks, ceil_divide(TASKS_PER_THREAD * sweep.threads, sweep.row_blocks));
        parallel_for(sweep.row_blocks * parts, sweep.threads, [&](int64_t task, int thread) {
            const int64_t row_block = task / parts;
            const int64_t first_row = row_block * BLOCK;
            const int64_t rows = sweep.rows_in(row_block);
            const int64_t* first = first_pair.data() + first_row;
            int64_t rounds = 0;  // pairs of the query that has most
            for (int64_t j = 0; j < rows; ++j) {
                rounds = std::max(rounds, first[j + 1] - first[j]);
            }
            if (rounds == 0) {
                return;
            }
            float* queries = panels.data() + thread * panel_floats;
            float* tile = tiles.data() + thread * TILE_FLOATS;
            int32_t* above = counts.data() + thread * 2 * BLOCK;
            int32_t* ties = above + BLOCK;
            for (int64_t j = 0; j < rows; j += SLAB) {
                const auto query = [&](int64_t i) { return pairs.x + (first_row + j + i) * pairs.dimension; };
                pack_panel(query, rows - j, pairs.dimension, nullptr, 1.0f, queries + j * sweep.depth);
            }
            for (int64_t block = task % parts; block < blocks; block += parts) {
                const int64_t columns = sweep.columns_in(start + block);
                sweep.kernels.tile_products(queries, items.block(block), rows, columns, sweep.depth, tile);
                for (int64_t round = 0; round < rounds; ++round) {
                    float thresholds[BLOCK] = {};
                    for (int64_t j = 0; j < rows; ++j) {
                        thresholds[j] = first[j] + round < first[j + 1] ? scores[first[j] + round] : 0.0f;
                    }
                    sweep.kernels.count(tile, rows, columns, thresholds, above, ties);
                    for (int64_t j = 0; j < rows; ++j) {
                        const int64_t pair = first[j] + round;
                        if (pair < first[j + 1]) {
#if defined(_OPENMP)
#pragma omp atomic
#endif
                            problem.above[pair] += above[j];
#if defined(_OPENMP)
#pragma omp atomic
#endif
                            problem.ties[pair] += ties[j];
                        }
                    }
                }
            }
        });
    }
    for (int64_t p = 0; p < problem.count; ++p) {
        // Every item counted as above a NaN score; any other score ties with itself once.
        problem.ties[p] -= scores[p] == scores[p] ? 1 : 0;
    }
}

}  // namespace modstruct::cpu
