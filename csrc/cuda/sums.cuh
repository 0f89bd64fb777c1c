// Sums along the rows and columns of a tile, in an order that is fixed: over a thread's own numbers, then over the
// lanes that share a row or column, then over the warps. A Value knows combine(a, b) and shuffle(value, lane mask).
#pragma once

#include <device.cuh>

#include "numbers.cuh"
#include "tile.cuh"

namespace modstruct::cuda {

// sum exp(x - max) beside max; of nothing it is (LOWEST, 0), which no rounding turns into NaN.
template <class Base>
struct alignas(8) LogSum {
    float max, sum;

    static __device__ __forceinline__ LogSum none() { return {LOWEST, 0.0f}; }
    static __device__ __forceinline__ LogSum combine(LogSum a, LogSum b) {
        const float max = larger(a.max, b.max);
        return {max, a.sum * Base::exponential(a.max - max) + b.sum * Base::exponential(b.max - max)};
    }
    static __device__ __forceinline__ LogSum shuffle(LogSum value, int mask) {
        return {__shfl_xor_sync(0xffffffffu, value.max, mask), __shfl_xor_sync(0xffffffffu, value.sum, mask)};
    }
    // In nats; the lowest finite number for a sum over nothing.
    __device__ __forceinline__ float log() const {
        return sum == 0.0f ? LOWEST : (max + Base::logarithm(sum)) * Base::NATS;
    }
};

// With a second sum, of exp(x - max) times something.
template <class Base>
struct WeightedLogSum {
    float max, sum, weighted;

    static __device__ __forceinline__ WeightedLogSum none() { return {LOWEST, 0.0f, 0.0f}; }
    static __device__ __forceinline__ WeightedLogSum combine(WeightedLogSum a, WeightedLogSum b) {
        const float max = larger(a.max, b.max);
        const float a_part = Base::exponential(a.max - max);
        const float b_part = Base::exponential(b.max - max);
        return {max, a.sum * a_part + b.sum * b_part, a.weighted * a_part + b.weighted * b_part};
    }
    static __device__ __forceinline__ WeightedLogSum shuffle(WeightedLogSum value, int mask) {
        return {__shfl_xor_sync(0xffffffffu, value.max, mask), __shfl_xor_sync(0xffffffffu, value.sum, mask),
                __shfl_xor_sync(0xffffffffu, value.weighted, mask)};
    }
    __device__ __forceinline__ float log() const { return LogSum<Base>{max, sum}.log(); }
};

struct Sum {
    float sum;

    static __device__ __forceinline__ Sum none() { return {0.0f}; }
    static __device__ __forceinline__ Sum combine(Sum a, Sum b) { return {a.sum + b.sum}; }
    static __device__ __forceinline__ Sum shuffle(Sum value, int mask) {
        return {__shfl_xor_sync(0xffffffffu, value.sum, mask)};
    }
};

// Two lanes whose numbers differ in `bit` combine 2 HALF values: the lower keeps the first half, the upper the second.
template <int HALF, class Value>
__device__ __forceinline__ void fold(Value* values, int lane, int bit) {
    const bool upper = (lane & bit) != 0;
#pragma unroll
    for (int i = 0; i < HALF; ++i) {
        const Value keep = upper ? values[i + HALF] : values[i];
        const Value send = upper ? values[i] : values[i + HALF];
        values[i] = Value::combine(keep, Value::shuffle(send, bit));
    }
}

// values[r] of each thread -> finish(row in the tile, value) once for each row. Needs shared memory that is free; all
// threads of the block must come.
template <class Tile, class Value, class Finish>
__device__ __forceinline__ void over_columns(Value (&values)[ROW_SLOTS], const Place<Tile>& place,
                                             unsigned char* shared, Finish finish) {
    Value* sides = reinterpret_cast<Value*>(shared);  // (WARPS_ACROSS, ROWS)
    fold<4>(values, place.lane, 1);
    fold<2>(values, place.lane, 2);
    const int slot = place.lane % 2 * 4 + place.lane / 2 % 2 * 2;
    Value* side = sides + place.warp % Tile::WARPS_ACROSS * Tile::ROWS + place.warp_row();
    side[place.row(slot)] = values[0];
    side[place.row(slot + 1)] = values[1];
    __syncthreads();
    for (int row = threadIdx.x; row < Tile::ROWS; row += Tile::THREADS) {
        Value total = sides[row];
        for (int warp = 1; warp < Tile::WARPS_ACROSS; ++warp) {
            total = Value::combine(total, sides[warp * Tile::ROWS + row]);
        }
        finish(row, total);
    }
    __syncthreads();
}

// The same along the columns: finish(column in the tile, value).
template <class Tile, class Value, class Finish>
__device__ __forceinline__ void over_rows(Value (&values)[Tile::COLUMN_SLOTS], const Place<Tile>& place,
                                          unsigned char* shared, Finish finish) {
    static_assert(Tile::COLUMN_SLOTS == 16, "three folds leave each lane two columns");
    Value* sides = reinterpret_cast<Value*>(shared);  // (WARPS_DOWN, COLUMNS)
    fold<8>(values, place.lane, 16);
    fold<4>(values, place.lane, 8);
    fold<2>(values, place.lane, 4);
    const int slot = place.lane / 4 * 2;
    Value* side = sides + place.warp / Tile::WARPS_ACROSS * Tile::COLUMNS + place.warp_column();
    side[place.column(slot)] = values[0];
    side[place.column(slot + 1)] = values[1];
    __syncthreads();
    for (int column = threadIdx.x; column < Tile::COLUMNS; column += Tile::THREADS) {
        Value total = sides[column];
        for (int warp = 1; warp < Tile::WARPS_DOWN; ++warp) {
            total = Value::combine(total, sides[warp * Tile::COLUMNS + column]);
        }
        finish(column, total);
    }
    __syncthreads();
}

// total of each thread -> finish(sum) once, lanes and then warps in order. Needs free shared memory; all threads of the
// block must come.
template <class Tile, class Finish>
__device__ __forceinline__ void over_block(double total, const Place<Tile>& place, unsigned char* shared,
                                           Finish finish) {
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) {
        total += __shfl_xor_sync(0xffffffffu, total, mask);
    }
    double* of_warps = reinterpret_cast<double*>(shared);
    if (place.lane == 0) {
        of_warps[place.warp] = total;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        double sum = 0.0;
        for (int warp = 0; warp < Tile::THREADS / 32; ++warp) {
            sum += of_warps[warp];
        }
        finish(sum);
    }
    __syncthreads();
}

// total += the sum of `count` values that lie `stride` apart, by one block of THREADS with as many doubles shared.
template <int THREADS>
__device__ __forceinline__ void add_tiles(double* total, const double* values, int64_t count, int64_t stride,
                                          unsigned char* shared) {
    double* of_threads = reinterpret_cast<double*>(shared);
    double own = 0.0;
    for (int64_t tile = threadIdx.x; tile < count; tile += THREADS) {
        own += values[tile * stride];
    }
    of_threads[threadIdx.x] = own;
    __syncthreads();
    if (threadIdx.x == 0) {
        double sum = *total;
        for (int i = 0; i < THREADS; ++i) {
            sum += of_threads[i];
        }
        *total = sum;
    }
    __syncthreads();
}

// Combines `count` values that lie `stride` apart.
template <class Value>
__device__ __forceinline__ Value combine_all(const Value* values, int64_t count, int64_t stride) {
    Value total = values[0];
    for (int64_t i = 1; i < count; ++i) {
        total = Value::combine(total, values[i * stride]);
    }
    return total;
}

}  // namespace modstruct::cuda
