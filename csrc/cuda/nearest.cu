// Ranks in retrieval: how many gallery items score higher than a pair's own, or the same.
//
// A pair's score is formed by the very products that form all scores, a tile of pairs against themselves of which only
// the diagonal is read: so its bits are those it has in the tile of its query, and equal items tie exactly.
#include <device.cuh>

#include "numbers.cuh"
#include "product.cuh"
#include "tile.cuh"

namespace modstruct::cuda {
namespace {

template <class Kind>
struct ScoresOfPairs {
    using Parameters = PairScores;
    using Tile = NarrowTile;
    static constexpr const char* NAME = "pair_scores";
    static constexpr int THREADS = Tile::THREADS;
    static constexpr int SHARED_BYTES = Tile::SHARED_BYTES;
    static_assert(Tile::ROWS == Tile::COLUMNS, "a tile's diagonal holds its pairs");

    static __device__ __forceinline__ void run(const Parameters& p, unsigned char* shared) {
        Place<Tile> place(p.pair_count, p.pair_count);
        place.row_tile = place.column_tile = blockIdx.x;
        place.row_start = place.row_tile * Tile::ROWS + place.warp_row();
        Sums<Tile> sums;
        product<Kind, true>(sums, {p.queries, p.pair_count, p.pair_query}, {p.gallery, p.pair_count, p.pair_gallery},
                            p.row_bytes, place, shared);
#pragma unroll
        for (int r = 0; r < ROW_SLOTS; ++r) {
#pragma unroll
            for (int c = 0; c < Tile::COLUMN_SLOTS; ++c) {
                const int64_t pair = place.row_start + place.row(r);
                const bool diagonal = place.warp_row() + place.row(r) == place.warp_column() + place.column(c);
                if (diagonal && pair < p.pair_count) {
                    p.scores[pair] = sums.at(r, c);
                }
            }
        }
    }
};

template <class Kind>
struct CountsOfTiles {
    using Parameters = NearestCounts;
    using Tile = WideTile;
    static constexpr const char* NAME = "nearest_counts";
    static constexpr int THREADS = Tile::THREADS;
    static constexpr int SHARED_BYTES = Tile::SHARED_BYTES;

    // Among the thread's columns, the one of a gallery item; -1 where another thread has it.
    static __device__ __forceinline__ int slot_of(int64_t item, const Place<Tile>& place) {
        const int64_t column = item - place.column_start;
        const bool own = column >= 0 && column < Tile::WARP_COLUMNS && column % 8 / 2 == place.lane % 4;
        return own ? static_cast<int>(column / 8 * 2 + column % 2) : -1;
    }

    static __device__ __forceinline__ void run(const Parameters& p, unsigned char* shared) {
        const Panel& panel = p.panel;
        const Place<Tile> place(panel.row_count, panel.column_count);
        Sums<Tile> sums;
        product<Kind>(sums, {panel.rows, panel.row_count, nullptr}, {panel.columns, panel.column_count, nullptr},
                      panel.row_bytes, place, shared);
        const unsigned quad = 0xfu << (place.lane & ~3);  // the lanes that share the rows
#pragma unroll
        for (int r = 0; r < ROW_SLOTS; ++r) {
            const bool exists = place.row(r) < place.rows_left;
            const int64_t row = place.row_start + place.row(r);
            const int64_t begin = exists ? p.pair_offsets[row] : 0;
            const int64_t end = exists ? p.pair_offsets[row + 1] : 0;
            for (int64_t pair = begin; pair < end; ++pair) {
                const float own_score = p.scores[pair];
                const int own_slot = slot_of(p.pair_gallery[pair], place);
                unsigned counts = 0;  // above in the low half, ties in the high: at most 64 each
#pragma unroll
                for (int c = 0; c < Tile::COLUMN_SLOTS; ++c) {
                    const bool column_exists = place.column(c) < place.columns_left;
                    // A NaN score counts as above, and every score as above a NaN.
                    counts += column_exists && !(sums.at(r, c) <= own_score) ? 1u : 0u;
                    counts += column_exists && sums.at(r, c) == own_score && c != own_slot ? 1u << 16 : 0u;
                }
                counts += __shfl_xor_sync(quad, counts, 1);
                counts += __shfl_xor_sync(quad, counts, 2);
                // Sums of whole numbers: their order does not matter.
                if (place.lane % 4 == 0 && (counts & 0xffffu) != 0) {
                    atomicAdd(p.above + pair, static_cast<int>(counts & 0xffffu));
                }
                if (place.lane % 4 == 1 && counts >> 16 != 0) {
                    atomicAdd(p.ties + pair, static_cast<int>(counts >> 16));
                }
            }
        }
    }
};

}  // namespace

void pair_scores(const PairScores& problem, Precision precision, void* stream) {
    const int64_t blocks = tiles(problem.pair_count, NarrowTile::ROWS);
    with_kind(precision, [&](auto kind) { launch<ScoresOfPairs<decltype(kind)>>(problem, blocks, stream); });
}

void nearest_counts(const NearestCounts& problem, Precision precision, void* stream) {
    const int64_t blocks = tiles(problem.panel.row_count, TILE_ROWS) * tiles(problem.panel.column_count, TILE_COLUMNS);
    with_kind(precision, [&](auto kind) { launch<CountsOfTiles<decltype(kind)>>(problem, blocks, stream); });
}

}  // namespace modstruct::cuda
