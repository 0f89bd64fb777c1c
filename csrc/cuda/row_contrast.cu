// One-way contrast with a momentum model's soft targets: two products of a tile at once, S of the rows and M of the
// momentum rows. Without the momentum model contrastive.cu does, with the columns left out.
#include <device.cuh>

#include "numbers.cuh"
#include "product.cuh"
#include "sums.cuh"
#include "tile.cuh"
#include "weights.cuh"

namespace modstruct::cuda {
namespace {

// Both products, in units of Base and masked.
template <class Kind, class Tile>
__device__ __forceinline__ void two_products(Sums<Tile>& sums, Sums<Tile>& momentum, const Panel& panel,
                                             const void* momentum_rows, const Place<Tile>& place,
                                             unsigned char* shared) {
    const Operand columns = {panel.columns, panel.column_count, nullptr};
    const float factor = *panel.scale * Kind::Base::PER_NAT;
    product<Kind>(momentum, {momentum_rows, panel.row_count, nullptr}, columns, panel.row_bytes, place, shared);
    scale_and_mask(momentum, place, panel.first, factor, [](int, float) {});
    product<Kind>(sums, {panel.rows, panel.row_count, nullptr}, columns, panel.row_bytes, place, shared);
    scale_and_mask(sums, place, panel.first, factor, [](int, float) {});
}

template <class Kind>
struct StatisticsOfTiles {
    using Parameters = MomentumStatistics;
    using Tile = NarrowTile;
    using Base = typename Kind::Base;
    static constexpr const char* NAME = "momentum_statistics";
    static constexpr int THREADS = Tile::THREADS;
    static constexpr int SHARED_BYTES = Tile::SHARED_BYTES + Tile::ROWS * sizeof(float);

    static __device__ __forceinline__ void run(const Parameters& p, unsigned char* shared) {
        const Panel& panel = p.panel;
        const Place<Tile> place(panel.row_count, panel.column_count);
        float* positives = reinterpret_cast<float*>(shared + Tile::SHARED_BYTES);
        share<Tile>(positives, Tile::ROWS, p.positive, place.row_tile, panel.row_count);
        Sums<Tile> sums;
        Sums<Tile> momentum;
        two_products<Kind>(sums, momentum, panel, p.momentum_rows, place, shared);

        LogSum<Base> rows[ROW_SLOTS];
        WeightedLogSum<Base> momentum_rows[ROW_SLOTS];
#pragma unroll
        for (int r = 0; r < ROW_SLOTS; ++r) {
            const float positive = positives[place.warp_row() + place.row(r)];
            rows[r] = LogSum<Base>::none();
            momentum_rows[r] = WeightedLogSum<Base>::none();
#pragma unroll
            for (int c = 0; c < Tile::COLUMN_SLOTS; ++c) {
                rows[r].max = larger(rows[r].max, sums.at(r, c));
                momentum_rows[r].max = larger(momentum_rows[r].max, momentum.at(r, c));
            }
#pragma unroll
            for (int c = 0; c < Tile::COLUMN_SLOTS; ++c) {
                const float logit = sums.at(r, c);
                rows[r].sum += Base::exponential(logit - rows[r].max);
                const float part = Base::exponential(momentum.at(r, c) - momentum_rows[r].max);
                momentum_rows[r].sum += part;
                // A masked logit is -inf, and 0 * inf would be NaN; a NaN logit must come through.
                const float gap = logit == -INFINITY ? 0.0f : positive - logit * Base::NATS;
                momentum_rows[r].weighted += part * gap;
            }
        }
        const int64_t start = place.row_tile * Tile::ROWS;
        const int64_t partials = place.column_tile * panel.row_count + start;
        over_columns(rows, place, shared, [&](int row, const LogSum<Base>& value) {
            if (start + row < panel.row_count) {
                reinterpret_cast<LogSum<Base>*>(p.partials)[partials + row] = value;
            }
        });
        over_columns(momentum_rows, place, shared, [&](int row, const WeightedLogSum<Base>& value) {
            if (start + row < panel.row_count) {
                reinterpret_cast<WeightedLogSum<Base>*>(p.momentum_partials)[partials + row] = value;
            }
        });
    }
};

template <class Kind>
struct StatisticsOfPanel {
    using Parameters = MomentumStatistics;
    using Base = typename Kind::Base;
    static constexpr const char* NAME = "momentum_statistics, its sums over tiles";
    static constexpr int THREADS = 64;
    static constexpr int SHARED_BYTES = 0;

    static __device__ __forceinline__ void run(const Parameters& p, unsigned char*) {
        const int64_t rows = p.panel.row_count;
        const int64_t row = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
        if (row >= rows) {
            return;
        }
        const int64_t count = tiles(p.panel.column_count, NARROW_TILE_COLUMNS);
        p.row_lse[row] = combine_all(reinterpret_cast<const LogSum<Base>*>(p.partials) + row, count, rows).log();
        const auto* partials = reinterpret_cast<const WeightedLogSum<Base>*>(p.momentum_partials) + row;
        const WeightedLogSum<Base> total = combine_all(partials, count, rows);
        p.momentum_lse[row] = total.log();
        p.gap[row] = total.sum == 0.0f ? 0.0f : total.weighted / total.sum;
    }
};

template <class Kind>
struct WeightsOfTiles {
    using Parameters = MomentumWeights;
    using Tile = NarrowTile;
    using Base = typename Kind::Base;
    static constexpr const char* NAME = "momentum_weights";
    static constexpr int THREADS = Tile::THREADS;
    static constexpr int SHARED_BYTES = Tile::SHARED_BYTES + 4 * Tile::ROWS * sizeof(float);

    static __device__ __forceinline__ void run(const Parameters& p, unsigned char* shared) {
        const Panel& panel = p.panel;
        const Place<Tile> place(panel.row_count, panel.column_count);
        float* row_lse = reinterpret_cast<float*>(shared + Tile::SHARED_BYTES);
        float* row_weight = row_lse + Tile::ROWS;
        float* momentum_lse = row_weight + Tile::ROWS;
        float* momentum_weight = momentum_lse + Tile::ROWS;
        share<Tile>(row_lse, Tile::ROWS, p.row_lse, place.row_tile, panel.row_count);
        share<Tile>(row_weight, Tile::ROWS, p.row_weight, place.row_tile, panel.row_count);
        share<Tile>(momentum_lse, Tile::ROWS, p.momentum_lse, place.row_tile, panel.row_count);
        share<Tile>(momentum_weight, Tile::ROWS, p.momentum_weight, place.row_tile, panel.row_count);
        Sums<Tile> sums;
        Sums<Tile> momentum;
        two_products<Kind>(sums, momentum, panel, p.momentum_rows, place, shared);
#pragma unroll
        for (int r = 0; r < ROW_SLOTS; ++r) {
            const int row = place.warp_row() + place.row(r);
            const float lse = Base::from_nats(row_lse[row]);
            const float lse_of_momentum = Base::from_nats(momentum_lse[row]);
#pragma unroll
            for (int c = 0; c < Tile::COLUMN_SLOTS; ++c) {
                sums.at(r, c) = row_weight[row] * Base::exponential(sums.at(r, c) - lse) -
                                momentum_weight[row] * Base::exponential(momentum.at(r, c) - lse_of_momentum);
            }
        }
        store_weights<Kind>(sums, place, shared, p.weights, p.weights_stride);
    }
};

int64_t block_count(const Panel& panel) {
    return tiles(panel.row_count, TILE_ROWS) * tiles(panel.column_count, NARROW_TILE_COLUMNS);
}

}  // namespace

void momentum_statistics(const MomentumStatistics& problem, Precision precision, void* stream) {
    with_kind(precision, [&](auto kind) {
        using Panels = StatisticsOfPanel<decltype(kind)>;
        launch<StatisticsOfTiles<decltype(kind)>>(problem, block_count(problem.panel), stream);
        launch<Panels>(problem, tiles(problem.panel.row_count, Panels::THREADS), stream);
    });
}

void momentum_weights(const MomentumWeights& problem, Precision precision, void* stream) {
    with_kind(precision, [&](auto kind) {
        launch<WeightsOfTiles<decltype(kind)>>(problem, block_count(problem.panel), stream);
    });
}

}  // namespace modstruct::cuda
