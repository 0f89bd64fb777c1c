// Gaussian potentials of all pairs: their sum, and the weights of its gradient.
//
// Squared distances come from |x|^2 + |y|^2 - 2 <x, y> of centred copies, cut at 0. Where a row meets an equal column
// the weight is 0, not 1: such a pair has no gradient, and in the difference that makes the gradient its two terms
// would cancel and leave their rounding. In float32 an equal pair's distance is exactly 0. The tensor cores add in an
// order of their own, so there any distance below their rounding counts as 0.
#include <device.cuh>

#include "numbers.cuh"
#include "product.cuh"
#include "sums.cuh"
#include "tile.cuh"
#include "weights.cuh"

namespace modstruct::cuda {
namespace {

constexpr float TENSOR_CORE_ROUNDING = 1.0f / (1 << 20);  // of |x|^2 + |y|^2

// A thread sums one row in order, as multiply_chunk does.
template <class Kind>
struct SquaredNorms {
    struct Parameters {
        const void* rows;
        int64_t count;
        int64_t row_bytes;
        float* norms;
    };
    static constexpr const char* NAME = "squared_norms";
    static constexpr int THREADS = 64;
    static constexpr int SHARED_BYTES = 0;

    static __device__ __forceinline__ void run(const Parameters& p, unsigned char*) {
        const int64_t row = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
        if (row >= p.count) {
            return;
        }
        const unsigned char* bytes = static_cast<const unsigned char*>(p.rows) + row * p.row_bytes;
        float norm = 0.0f;
        for (int64_t at = 0; at < p.row_bytes; at += CHUNK_BYTES) {
            const uint4 chunk = *reinterpret_cast<const uint4*>(bytes + at);
#pragma unroll
            for (int i = 0; i < Kind::VALUES; ++i) {
                const float value = Kind::value(chunk, i);
                norm = fmaf(value, value, norm);
            }
        }
        p.norms[row] = norm;
    }
};

template <class Kind>
struct PotentialsOfTiles {
    using Parameters = GaussianPanel;
    using Tile = WideTile;
    using Base = typename Kind::Base;
    static constexpr const char* NAME = "gaussian_potential";
    static constexpr int THREADS = Tile::THREADS;
    static constexpr int SHARED_BYTES = Tile::SHARED_BYTES + (Tile::ROWS + Tile::COLUMNS) * sizeof(float);

    static __device__ __forceinline__ void run(const Parameters& p, unsigned char* shared) {
        const Panel& panel = p.panel;
        const Place<Tile> place(panel.row_count, panel.column_count);
        float* row_norms = reinterpret_cast<float*>(shared + Tile::SHARED_BYTES);
        float* column_norms = row_norms + Tile::ROWS;
        share<Tile>(row_norms, Tile::ROWS, p.row_norms, place.row_tile, panel.row_count);
        share<Tile>(column_norms, Tile::COLUMNS, p.column_norms, place.column_tile, panel.column_count);
        Sums<Tile> sums;
        product<Kind>(sums, {panel.rows, panel.row_count, nullptr}, {panel.columns, panel.column_count, nullptr},
                      panel.row_bytes, place, shared);

        // An inner product of inf is a distance of 0, one of -inf a potential of 0; NaN norms come through both.
        mask(sums, place, p.own ? 0 : NO_POSITIVES, INFINITY, [](int, float) {});
        const float factor = -p.t * Base::PER_NAT;
        row_norms += place.warp_row();
        column_norms += place.warp_column();
        double total = 0.0;
#pragma unroll
        for (int r = 0; r < ROW_SLOTS; ++r) {
            const float row_norm = row_norms[place.row(r)];
            float potentials = 0.0f;
#pragma unroll
            for (int c = 0; c < Tile::COLUMN_SLOTS; ++c) {
                const float norms = row_norm + column_norms[place.column(c)];
                const float square = larger(0.0f, fmaf(-2.0f, sums.at(r, c), norms));
                const float potential = Base::exponential(square * factor);
                potentials += potential;
                const bool equal = square <= (Kind::TENSOR_CORES ? norms * TENSOR_CORE_ROUNDING : 0.0f);
                sums.at(r, c) = equal ? 0.0f : Kind::rounded(potential);
            }
            total += static_cast<double>(potentials);
        }
        // A panel is a multiple of a tile's columns or the last, so a tile right of it has all its columns there.
        const bool twice = p.own && place.column_tile * Tile::COLUMNS >= p.panel.row_count;
        over_block(total, place, shared, [&](double sum) { p.tile_sums[blockIdx.x] = twice ? 2.0 * sum : sum; });
        if (p.weights != nullptr) {
            add_others(p, place, sums, shared);
            store_weights<Kind>(sums, place, shared, p.weights, p.weights_stride);
        }
    }

    static __device__ __forceinline__ void add_others(const Parameters& p, const Place<Tile>& place,
                                                      Sums<Tile>& weights, unsigned char* shared) {
        Sum rows[ROW_SLOTS];
#pragma unroll
        for (int r = 0; r < ROW_SLOTS; ++r) {
            rows[r] = Sum::none();
#pragma unroll
            for (int c = 0; c < Tile::COLUMN_SLOTS; ++c) {
                rows[r].sum += weights.at(r, c);
            }
        }
        const int64_t row_start = place.row_tile * Tile::ROWS;
        over_columns(rows, place, shared, [&](int row, const Sum& value) {
            if (row_start + row < p.panel.row_count) {
                p.row_partials[place.column_tile * p.panel.row_count + row_start + row] = value.sum;
            }
        });
        Sum columns[Tile::COLUMN_SLOTS];
#pragma unroll
        for (int c = 0; c < Tile::COLUMN_SLOTS; ++c) {
            columns[c] = Sum::none();
#pragma unroll
            for (int r = 0; r < ROW_SLOTS; ++r) {
                columns[c].sum += weights.at(r, c);
            }
        }
        const int64_t column_start = place.column_tile * Tile::COLUMNS;
        over_rows(columns, place, shared, [&](int column, const Sum& value) {
            if (column_start + column < p.panel.column_count) {
                p.column_partials[place.row_tile * p.panel.column_count + column_start + column] = value.sum;
            }
        });
    }
};

// The first block adds up the tiles; a thread of the others has one row or column of the panel.
struct PotentialsOfPanel {
    using Parameters = GaussianPanel;
    static constexpr const char* NAME = "gaussian_potential, its sums over tiles";
    static constexpr int THREADS = 256;
    static constexpr int SHARED_BYTES = THREADS * sizeof(double);

    static __device__ __forceinline__ double sum(const float* values, int64_t count, int64_t stride) {
        double total = 0.0;
        for (int64_t i = 0; i < count; ++i) {
            total += static_cast<double>(values[i * stride]);
        }
        return total;
    }

    static __device__ __forceinline__ void run(const Parameters& p, unsigned char* shared) {
        const int64_t rows = p.panel.row_count;
        const int64_t columns = p.panel.column_count;
        if (blockIdx.x == 0) {
            add_tiles<THREADS>(p.total, p.tile_sums, tiles(rows, TILE_ROWS) * tiles(columns, TILE_COLUMNS), 1, shared);
            return;
        }
        const int64_t thread = static_cast<int64_t>(blockIdx.x - 1) * THREADS + threadIdx.x;
        if (thread < rows) {
            p.row_others[thread] += sum(p.row_partials + thread, tiles(columns, TILE_COLUMNS), rows);
            return;
        }
        const int64_t column = thread - rows;
        if (column < columns && !(p.own && column < rows)) {
            p.column_others[column] += sum(p.column_partials + column, tiles(rows, TILE_ROWS), columns);
        }
    }
};

}  // namespace

void squared_norms(const void* rows, int64_t count, int64_t row_bytes, Precision precision, float* norms,
                        void* stream) {
    with_kind(precision, [&](auto kind) {
        using Kernel = SquaredNorms<decltype(kind)>;
        launch<Kernel>({rows, count, row_bytes, norms}, tiles(count, Kernel::THREADS), stream);
    });
}

void gaussian_potential(const GaussianPanel& problem, Precision precision, void* stream) {
    const int64_t rows = problem.panel.row_count;
    const int64_t columns = problem.panel.column_count;
    const int64_t blocks = tiles(rows, TILE_ROWS) * tiles(columns, TILE_COLUMNS);
    with_kind(precision, [&](auto kind) { launch<PotentialsOfTiles<decltype(kind)>>(problem, blocks, stream); });
    const int64_t threads = problem.weights ? rows + columns : 0;
    launch<PotentialsOfPanel>(problem, 1 + tiles(threads, PotentialsOfPanel::THREADS), stream);
}

}  // namespace modstruct::cuda
