// The main loop: a tile of rows times columns, <row_j, column_k> summed over the whole depth.
//
// Slices of 64 bytes of depth come by cp.async into STAGES slots of shared memory. In a slot a row's four 16-byte
// chunks are permuted, chunk c of row r at place c ^ (r / 2 % 4), so the eight rows an instruction reads lie in
// different banks.
#pragma once

#include <device.cuh>

#include "numbers.cuh"
#include "tile.cuh"

namespace modstruct::cuda {

constexpr int CHUNK_BYTES = 16;
constexpr int CHUNKS = DEPTH_BYTES / CHUNK_BYTES;

// Rows or columns; in an indexed product, row i is data[index[i]].
struct Operand {
    const void* data;
    int64_t count;
    const int64_t* index;
};

__device__ __forceinline__ int chunk_place(int row, int chunk) {
    return row * DEPTH_BYTES + (chunk ^ (row / 2 % CHUNKS)) * CHUNK_BYTES;
}

// What one thread copies of an operand's rows: its chunk of every ROWS_AT_ONCE-th row.
template <int ROWS, int THREADS, bool INDEXED>
class Copies {
   public:
    __device__ __forceinline__ Copies(const Operand& operand, int64_t start, int64_t row_bytes)
        : step_(ROWS_AT_ONCE * row_bytes), valid_(0) {
        const unsigned char* chunk = static_cast<const unsigned char*>(operand.data) + lane_chunk() * CHUNK_BYTES;
        from_[0] = chunk + (start + place(0)) * row_bytes;
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            const int64_t row = start + place(i);
            const bool exists = row < operand.count;
            valid_ |= static_cast<unsigned>(exists) << i;
            if (INDEXED) {
                from_[i % ADDRESSES] = exists ? chunk + operand.index[row] * row_bytes : chunk;
            }
        }
    }
    // Slices must be requested in order.
    __device__ __forceinline__ void next(unsigned char* slot) {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            // Behind the last row the address is past the end, and not read.
            const unsigned char* from = INDEXED ? from_[i % ADDRESSES] : from_[0] + i * step_;
            copy_start(slot + chunk_place(place(i), lane_chunk()), from, valid_ >> i & 1);
        }
#pragma unroll
        for (int i = 0; i < ADDRESSES; ++i) {
            from_[i] += DEPTH_BYTES;
        }
    }

   private:
    static constexpr int ROWS_AT_ONCE = THREADS / CHUNKS;
    static constexpr int COUNT = ROWS / ROWS_AT_ONCE;
    static constexpr int ADDRESSES = INDEXED ? COUNT : 1;
    static_assert(COUNT * ROWS_AT_ONCE == ROWS, "each thread copies as many chunks");
    static __device__ __forceinline__ int place(int i) { return threadIdx.x / CHUNKS + i * ROWS_AT_ONCE; }
    static __device__ __forceinline__ int lane_chunk() { return threadIdx.x % CHUNKS; }

    const unsigned char* from_[ADDRESSES];
    int64_t step_;
    unsigned valid_;
};

// A warp's operands of 32 bytes of depth, as mma.sync takes them: 16 bfloat16 or 8 tf32, in either case two chunks.
template <class Tile>
struct Fragments {
    uint32_t rows[4][4];                      // 16 rows each
    uint32_t columns[Tile::FRAGMENTS / 2][4];  // 16 columns each

    __device__ __forceinline__ void load(const unsigned char* slot, const Place<Tile>& place, int half) {
        const int line = place.lane % 8;
        const int matrix = place.lane / 8;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int row = place.warp_row() + i * 16 + matrix % 2 * 8 + line;
            load_matrices(rows[i], slot + chunk_place(row, half * 2 + matrix / 2));
        }
#pragma unroll
        for (int j = 0; j < Tile::FRAGMENTS / 2; ++j) {
            const int column = place.warp_column() + j * 16 + matrix / 2 * 8 + line;
            load_matrices(columns[j], slot + chunk_place(Tile::ROWS + column, half * 2 + matrix % 2));
        }
    }
};

template <class Kind, class Tile>
__device__ __forceinline__ void multiply(Sums<Tile>& sums, const Fragments<Tile>& fragments) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < Tile::FRAGMENTS; ++j) {
            Kind::multiply(sums.fragment[i][j], fragments.rows[i], fragments.columns[j / 2][j % 2 * 2],
                           fragments.columns[j / 2][j % 2 * 2 + 1]);
        }
    }
}

// Four float32 of depth by ordinary multiply-adds. Every sum runs over the depth in order, one multiply-add each: its
// bits depend on the row and the column alone.
template <class Tile>
__device__ __forceinline__ void multiply_chunk(Sums<Tile>& sums, const unsigned char* slot, const Place<Tile>& place,
                                               int chunk) {
    float4 rows[ROW_SLOTS];
#pragma unroll
    for (int r = 0; r < ROW_SLOTS; ++r) {
        rows[r] = *reinterpret_cast<const float4*>(slot + chunk_place(place.warp_row() + place.row(r), chunk));
    }
#pragma unroll
    for (int c = 0; c < Tile::COLUMN_SLOTS; ++c) {
        const int at = chunk_place(Tile::ROWS + place.warp_column() + place.column(c), chunk);
        const float4 column = *reinterpret_cast<const float4*>(slot + at);
#pragma unroll
        for (int r = 0; r < ROW_SLOTS; ++r) {
            float sum = sums.at(r, c);
            sum = fmaf(rows[r].x, column.x, sum);
            sum = fmaf(rows[r].y, column.y, sum);
            sum = fmaf(rows[r].z, column.z, sum);
            sums.at(r, c) = fmaf(rows[r].w, column.w, sum);
        }
    }
}

// On return the shared memory is free again.
template <class Kind, bool INDEXED = false, class Tile>
__device__ __forceinline__ void product(Sums<Tile>& sums, const Operand& rows, const Operand& columns,
                                        int64_t row_bytes, const Place<Tile>& place, unsigned char* shared) {
    Copies<Tile::ROWS, Tile::THREADS, INDEXED> row_copies(rows, place.row_tile * Tile::ROWS, row_bytes);
    Copies<Tile::COLUMNS, Tile::THREADS, INDEXED> column_copies(columns, place.column_tile * Tile::COLUMNS, row_bytes);
    const int slices = static_cast<int>(row_bytes / DEPTH_BYTES);
    int write = 0;
    const auto copy_slice = [&](int slice) {
        if (slice < slices) {
            unsigned char* slot = shared + write * Tile::STAGE_BYTES;
            row_copies.next(slot);
            column_copies.next(slot + Tile::ROWS * DEPTH_BYTES);
            write = write + 1 == STAGES ? 0 : write + 1;
        }
        copies_end_group();  // empty groups at the end keep the count that copies_wait relies on
    };

    sums.clear();
    for (int slice = 0; slice < STAGES - 1; ++slice) {
        copy_slice(slice);
    }
    copies_wait<STAGES - 2>();
    __syncthreads();
    int read = 0;
    if constexpr (Kind::TENSOR_CORES) {
        // While one half of a slice is multiplied the next is read, across the barrier too: it stands where all warps
        // have read the slice to its end, and behind it that slot is free.
        Fragments<Tile> fragments[2];
        fragments[0].load(shared, place, 0);
#pragma unroll 1
        for (int slice = 0; slice < slices; ++slice) {
            fragments[1].load(shared + read * Tile::STAGE_BYTES, place, 1);
            copy_slice(slice + STAGES - 1);
            multiply<Kind>(sums, fragments[0]);
            copies_wait<STAGES - 2>();
            __syncthreads();
            read = read + 1 == STAGES ? 0 : read + 1;
            if (slice + 1 < slices) {
                fragments[0].load(shared + read * Tile::STAGE_BYTES, place, 0);
            }
            multiply<Kind>(sums, fragments[1]);
        }
    } else {
#pragma unroll 1
        for (int slice = 0; slice < slices; ++slice) {
            copy_slice(slice + STAGES - 1);
#pragma unroll 1
            for (int chunk = 0; chunk < CHUNKS; ++chunk) {
                multiply_chunk(sums, shared + read * Tile::STAGE_BYTES, place, chunk);
            }
            copies_wait<STAGES - 2>();
            __syncthreads();
            read = read + 1 == STAGES ? 0 : read + 1;
        }
    }
}

}  // namespace modstruct::cuda
