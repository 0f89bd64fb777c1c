// A block's tile of all pairs, and who holds what of it.
//
// A warp computes 64 rows by 8 FRAGMENTS columns, and its threads hold the sums as mma.sync leaves them: lane l has
// rows 8 r + l / 4 (r = 0..7) and columns 8 j + 2 (l % 4) + {0, 1}. The float32 loop keeps to the same places, so
// what follows a product is written once.
#pragma once

#include <device.cuh>

#include "pairwise_cuda.h"

namespace modstruct::cuda {

constexpr int WARP_ROWS = 64;
constexpr int ROW_SLOTS = 8;  // rows a thread has a part of
constexpr int STAGES = 4;     // slices of depth on their way, one of them in use

template <int WARPS_DOWN_, int WARPS_ACROSS_, int FRAGMENTS_>
struct Tile {
    static constexpr int WARPS_DOWN = WARPS_DOWN_;
    static constexpr int WARPS_ACROSS = WARPS_ACROSS_;
    static constexpr int FRAGMENTS = FRAGMENTS_;
    static constexpr int COLUMN_SLOTS = 2 * FRAGMENTS;  // columns a thread has a part of
    static constexpr int WARP_COLUMNS = 8 * FRAGMENTS;
    static constexpr int ROWS = WARPS_DOWN * WARP_ROWS;
    static constexpr int COLUMNS = WARPS_ACROSS * WARP_COLUMNS;
    static constexpr int THREADS = 32 * WARPS_DOWN * WARPS_ACROSS;
    static constexpr int STAGE_BYTES = (ROWS + COLUMNS) * DEPTH_BYTES;
    static constexpr int SHARED_BYTES = STAGES * STAGE_BYTES;
};

using WideTile = Tile<2, 4, 8>;
using NarrowTile = Tile<2, 4, 4>;
static_assert(WideTile::ROWS == TILE_ROWS && WideTile::COLUMNS == TILE_COLUMNS, "as pairwise_cuda.h says");
static_assert(NarrowTile::ROWS == TILE_ROWS && NarrowTile::COLUMNS == NARROW_TILE_COLUMNS, "as pairwise_cuda.h says");

__host__ __device__ constexpr int64_t tiles(int64_t count, int64_t size) { return (count + size - 1) / size; }

// One thread's sums.
template <class Tile>
struct Sums {
    float fragment[4][Tile::FRAGMENTS][4];

    __device__ __forceinline__ float& at(int row_slot, int column_slot) {
        return fragment[row_slot / 2][column_slot / 2][row_slot % 2 * 2 + column_slot % 2];
    }
    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int r = 0; r < ROW_SLOTS; ++r) {
#pragma unroll
            for (int c = 0; c < Tile::COLUMN_SLOTS; ++c) {
                at(r, c) = 0.0f;
            }
        }
    }
};

// Where the thread is. Consecutive blocks go down the panel's rows first: they share their columns, and the whole
// panel stays in the L2 cache.
template <class Tile>
struct Place {
    int64_t row_tile, column_tile;
    int64_t row_start, column_start;  // of the warp, in the panel
    int rows_left, columns_left;      // of the warp's rows and columns, those that exist; 0 or less: none
    int warp, lane;

    __device__ __forceinline__ Place(int64_t row_count, int64_t column_count) {
        const int64_t row_tiles = tiles(row_count, Tile::ROWS);
        warp = threadIdx.x / 32;
        lane = threadIdx.x % 32;
        row_tile = blockIdx.x % row_tiles;
        column_tile = blockIdx.x / row_tiles;
        row_start = row_tile * Tile::ROWS + warp_row();
        column_start = column_tile * Tile::COLUMNS + warp_column();
        rows_left = static_cast<int>(row_count - row_start < WARP_ROWS ? row_count - row_start : WARP_ROWS);
        columns_left = static_cast<int>(column_count - column_start < Tile::WARP_COLUMNS ? column_count - column_start
                                                                                         : Tile::WARP_COLUMNS);
    }
    __device__ __forceinline__ int warp_row() const { return warp / Tile::WARPS_ACROSS * WARP_ROWS; }  // in the tile
    __device__ __forceinline__ int warp_column() const { return warp % Tile::WARPS_ACROSS * Tile::WARP_COLUMNS; }
    __device__ __forceinline__ int row(int slot) const { return 8 * slot + lane / 4; }  // in the warp's rows
    __device__ __forceinline__ int column(int slot) const { return slot / 2 * 8 + slot % 2 + lane % 4 * 2; }
    __device__ __forceinline__ bool has(int row, int column) const { return row < rows_left && column < columns_left; }
    __device__ __forceinline__ bool whole() const {
        return rows_left == WARP_ROWS && columns_left == Tile::WARP_COLUMNS;
    }

    // Whether any of the warp's rows has its positive among the warp's columns.
    __device__ __forceinline__ bool on_diagonal(int64_t first) const {
        const int64_t column = first + row_start - column_start;
        return column > -WARP_ROWS && column < Tile::WARP_COLUMNS;
    }
};

constexpr int64_t NO_POSITIVES = -(int64_t{1} << 62);  // a `first` that puts them outside

// A tile's part of a vector to shared memory, zeros behind the vector's end. Called before the product, whose barriers
// then make it visible: read after it from global memory, it would cost registers that the sums need, and time.
template <class Tile>
__device__ __forceinline__ void share(float* to, int size, const float* vector, int64_t tile, int64_t count) {
    for (int i = threadIdx.x; i < size; i += Tile::THREADS) {
        to[i] = tile * size + i < count ? vector[tile * size + i] : 0.0f;
    }
}

// Puts -inf where there is no pair, and `instead` in place of each positive after handing it to take(row, sum).
// Everything is compared with numbers known to the compiler: a comparison per sum would need too many registers.
template <class Tile, class Take>
__device__ __forceinline__ void mask(Sums<Tile>& sums, const Place<Tile>& place, int64_t first, float instead,
                                     Take take) {
    const bool on_diagonal = place.on_diagonal(first);
    if (place.whole() && !on_diagonal) {
        return;
    }
    const int rows = place.rows_left - place.row(0);
    const int columns = place.columns_left - place.column(0);
    const int64_t positive_column = first + place.row_start + place.row(0) - place.column_start - place.column(0);
    const int diagonal = on_diagonal ? static_cast<int>(positive_column) : 4 * Tile::COLUMNS;
#pragma unroll
    for (int r = 0; r < ROW_SLOTS; ++r) {
#pragma unroll
        for (int c = 0; c < Tile::COLUMN_SLOTS; ++c) {
            const int row = 8 * r;
            const int column = c / 2 * 8 + c % 2;
            const bool exists = row < rows && column < columns;
            const bool positive = column - row == diagonal;
            if (exists && positive) {
                take(place.row(r), sums.at(r, c));
            }
            sums.at(r, c) = exists ? (positive ? instead : sums.at(r, c)) : -INFINITY;
        }
    }
}

// Sums to logits, and -inf for all that is no negative.
template <class Tile, class Take>
__device__ __forceinline__ void scale_and_mask(Sums<Tile>& sums, const Place<Tile>& place, int64_t first, float factor,
                                               Take take) {
#pragma unroll
    for (int r = 0; r < ROW_SLOTS; ++r) {
#pragma unroll
        for (int c = 0; c < Tile::COLUMN_SLOTS; ++c) {
            sums.at(r, c) *= factor;
        }
    }
    mask(sums, place, first, -INFINITY, take);
}

}  // namespace modstruct::cuda
