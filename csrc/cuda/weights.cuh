// A tile of weights on its way to global memory, in full 16-byte pieces of consecutive columns.
#pragma once

#include <device.cuh>

#include "numbers.cuh"
#include "tile.cuh"

namespace modstruct::cuda {

// weights: (rows, stride), of the panel. bfloat16 goes through 16 rows of shared memory for each warp, which must be
// free.
template <class Kind, class Tile>
__device__ __forceinline__ void store_weights(Sums<Tile>& sums, const Place<Tile>& place, unsigned char* shared,
                                              void* weights, int64_t stride) {
    if constexpr (Kind::HALF_WEIGHTS) {
        constexpr int PIECES = Tile::FRAGMENTS;  // of 8 columns
        constexpr int ROW_BYTES = PIECES * STORE_BYTES;
        constexpr int SPREAD = 8 / PIECES;  // rows that share the 128 bytes of all banks
        unsigned char* own = shared + place.warp * 16 * ROW_BYTES;
        const auto piece_place = [](int row, int piece) {
            return row * ROW_BYTES + (piece ^ (row / SPREAD % PIECES)) * STORE_BYTES;
        };
        uint16_t* to = static_cast<uint16_t*>(weights) + place.row_start * stride + place.column_start;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
#pragma unroll
                for (int j = 0; j < Tile::FRAGMENTS; ++j) {
                    const uint32_t pair = pack_bf16(sums.at(2 * i + half, 2 * j), sums.at(2 * i + half, 2 * j + 1));
                    const int at = piece_place(8 * half + place.lane / 4, j) + place.lane % 4 * 4;
                    *reinterpret_cast<uint32_t*>(own + at) = pair;
                }
            }
            __syncwarp();
#pragma unroll
            for (int k = 0; k < 16 * PIECES; k += 32) {
                const int row = (k + place.lane) / PIECES;
                const int piece = (k + place.lane) % PIECES;
                if (place.has(16 * i + row, 8 * piece)) {
                    *reinterpret_cast<uint4*>(to + (16 * i + row) * stride + 8 * piece) =
                        *reinterpret_cast<const uint4*>(own + piece_place(row, piece));
                }
            }
            __syncwarp();
        }
    } else {
        float* to = static_cast<float*>(weights) + place.row_start * stride + place.column_start;
#pragma unroll
        for (int r = 0; r < ROW_SLOTS; ++r) {
#pragma unroll
            for (int c = 0; c < Tile::COLUMN_SLOTS; c += 2) {
                if (place.has(place.row(r), place.column(c))) {
                    *reinterpret_cast<float2*>(to + place.row(r) * stride + place.column(c)) =
                        make_float2(Kind::rounded(sums.at(r, c)), Kind::rounded(sums.at(r, c + 1)));
                }
            }
        }
    }
}

}  // namespace modstruct::cuda
