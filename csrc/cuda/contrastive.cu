// Contrastive terms: log-sum-exps of the logits along rows and columns, and the weights of the gradient.
#include <device.cuh>

#include "numbers.cuh"
#include "product.cuh"
#include "sums.cuh"
#include "tile.cuh"
#include "weights.cuh"

namespace modstruct::cuda {
namespace {

template <class Kind>
struct StatisticsOfTiles {
    using Parameters = ContrastiveStatistics;
    using Tile = WideTile;
    using Value = LogSum<typename Kind::Base>;
    static constexpr const char* NAME = "contrastive_statistics";
    static constexpr int THREADS = Tile::THREADS;
    static constexpr int SHARED_BYTES = Tile::SHARED_BYTES + Tile::ROWS * sizeof(float);

    static __device__ __forceinline__ void run(const Parameters& p, unsigned char* shared) {
        using Base = typename Kind::Base;
        const Panel& panel = p.panel;
        const Place<Tile> place(panel.row_count, panel.column_count);
        const float factor = *panel.scale * Base::PER_NAT;
        Sums<Tile> sums;
        product<Kind>(sums, {panel.rows, panel.row_count, nullptr}, {panel.columns, panel.column_count, nullptr},
                      panel.row_bytes, place, shared);
        float* positives = reinterpret_cast<float*>(shared + Tile::SHARED_BYTES);
        scale_and_mask(sums, place, panel.first, factor,
                       [&](int row, float logit) { positives[place.warp_row() + row] = logit * Base::NATS; });

        Value rows[ROW_SLOTS];
#pragma unroll
        for (int r = 0; r < ROW_SLOTS; ++r) {
            rows[r] = Value::none();
#pragma unroll
            for (int c = 0; c < Tile::COLUMN_SLOTS; ++c) {
                rows[r].max = larger(rows[r].max, sums.at(r, c));
            }
#pragma unroll
            for (int c = 0; c < Tile::COLUMN_SLOTS; ++c) {
                rows[r].sum += Base::exponential(sums.at(r, c) - rows[r].max);
            }
        }
        const int64_t row_start = place.row_tile * Tile::ROWS;
        const int64_t column_start = place.column_tile * Tile::COLUMNS;
        Value* row_partials = reinterpret_cast<Value*>(p.row_partials) + place.column_tile * panel.row_count;
        over_columns(rows, place, shared, [&](int row, const Value& value) {
            if (row_start + row < panel.row_count) {
                row_partials[row_start + row] = value;
                const int64_t column = panel.first + row_start + row;
                if (column >= column_start && column < column_start + Tile::COLUMNS) {
                    p.positive[row_start + row] = positives[row];
                }
            }
        });
        if (p.column_lse == nullptr) {
            return;
        }

        Value columns[Tile::COLUMN_SLOTS];
#pragma unroll
        for (int c = 0; c < Tile::COLUMN_SLOTS; ++c) {
            columns[c] = Value::none();
#pragma unroll
            for (int r = 0; r < ROW_SLOTS; ++r) {
                columns[c].max = larger(columns[c].max, sums.at(r, c));
            }
#pragma unroll
            for (int r = 0; r < ROW_SLOTS; ++r) {
                columns[c].sum += Base::exponential(sums.at(r, c) - columns[c].max);
            }
        }
        Value* column_partials = reinterpret_cast<Value*>(p.column_partials) + place.row_tile * panel.column_count;
        over_rows(columns, place, shared, [&](int column, const Value& value) {
            if (column_start + column < panel.column_count) {
                column_partials[column_start + column] = value;
            }
        });
    }
};

// A thread for each row and each column of the panel.
template <class Kind>
struct StatisticsOfPanel {
    using Parameters = ContrastiveStatistics;
    using Value = LogSum<typename Kind::Base>;
    static constexpr const char* NAME = "contrastive_statistics, its sums over tiles";
    static constexpr int THREADS = 128;
    static constexpr int SHARED_BYTES = 0;

    static __device__ __forceinline__ void run(const Parameters& p, unsigned char*) {
        const int64_t rows = p.panel.row_count;
        const int64_t columns = p.panel.column_count;
        const int64_t thread = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
        if (thread < rows) {
            const Value* partials = reinterpret_cast<const Value*>(p.row_partials) + thread;
            p.row_lse[thread] = combine_all(partials, tiles(columns, TILE_COLUMNS), rows).log();
            return;
        }
        const int64_t column = thread - rows;
        if (p.column_lse == nullptr || column >= columns) {
            return;
        }
        const Value* partials = reinterpret_cast<const Value*>(p.column_partials) + column;
        Value* running = reinterpret_cast<Value*>(p.column_running) + column;
        Value total = combine_all(partials, tiles(rows, TILE_ROWS), columns);
        if (!p.first_panel) {
            total = Value::combine(*running, total);
        }
        *running = total;
        if (p.last_panel) {
            p.column_lse[column] = total.log();
        }
    }
};

template <class Kind>
struct WeightsOfTiles {
    using Parameters = ContrastiveWeights;
    using Tile = WideTile;
    static constexpr const char* NAME = "contrastive_weights";
    static constexpr int THREADS = Tile::THREADS;
    static constexpr int SHARED_BYTES = Tile::SHARED_BYTES + 2 * (Tile::ROWS + Tile::COLUMNS) * sizeof(float);

    static __device__ __forceinline__ void run(const Parameters& p, unsigned char* shared) {
        using Base = typename Kind::Base;
        const Panel& panel = p.panel;
        const Place<Tile> place(panel.row_count, panel.column_count);
        const bool with_columns = p.column_lse != nullptr;
        float* row_lse = reinterpret_cast<float*>(shared + Tile::SHARED_BYTES);
        float* row_weight = row_lse + Tile::ROWS;
        float* column_lse = row_weight + Tile::ROWS;
        float* column_weight = column_lse + Tile::COLUMNS;
        share<Tile>(row_lse, Tile::ROWS, p.row_lse, place.row_tile, panel.row_count);
        share<Tile>(row_weight, Tile::ROWS, p.row_weight, place.row_tile, panel.row_count);
        if (with_columns) {
            share<Tile>(column_lse, Tile::COLUMNS, p.column_lse, place.column_tile, panel.column_count);
            share<Tile>(column_weight, Tile::COLUMNS, p.column_weight, place.column_tile, panel.column_count);
        }
        const float factor = *panel.scale * Base::PER_NAT;
        Sums<Tile> sums;
        product<Kind>(sums, {panel.rows, panel.row_count, nullptr}, {panel.columns, panel.column_count, nullptr},
                      panel.row_bytes, place, shared);
        scale_and_mask(sums, place, panel.first, factor, [](int, float) {});

#pragma unroll
        for (int c = 0; c < Tile::COLUMN_SLOTS; ++c) {
            const int column = place.warp_column() + place.column(c);
            const float lse_of_column = with_columns ? Base::from_nats(column_lse[column]) : 0.0f;
            const float weight_of_column = with_columns ? column_weight[column] : 0.0f;
#pragma unroll
            for (int r = 0; r < ROW_SLOTS; ++r) {
                const int row = place.warp_row() + place.row(r);
                const float logit = sums.at(r, c);
                float weight = row_weight[row] * Base::exponential(logit - Base::from_nats(row_lse[row]));
                if (with_columns) {
                    weight += weight_of_column * Base::exponential(logit - lse_of_column);
                }
                sums.at(r, c) = weight;
            }
        }
        store_weights<Kind>(sums, place, shared, p.weights, p.weights_stride);
    }
};

}  // namespace

void contrastive_statistics(const ContrastiveStatistics& problem, Precision precision, void* stream) {
    const int64_t rows = problem.panel.row_count;
    const int64_t columns = problem.panel.column_count;
    with_kind(precision, [&](auto kind) {
        using Kind = decltype(kind);
        launch<StatisticsOfTiles<Kind>>(problem, tiles(rows, TILE_ROWS) * tiles(columns, TILE_COLUMNS), stream);
        const int64_t threads = rows + (problem.column_lse ? columns : 0);
        launch<StatisticsOfPanel<Kind>>(problem, tiles(threads, StatisticsOfPanel<Kind>::THREADS), stream);
    });
}

void contrastive_weights(const ContrastiveWeights& problem, Precision precision, void* stream) {
    const int64_t blocks = tiles(problem.panel.row_count, TILE_ROWS) * tiles(problem.panel.column_count, TILE_COLUMNS);
    with_kind(precision, [&](auto kind) { launch<WeightsOfTiles<decltype(kind)>>(problem, blocks, stream); });
}

}  // namespace modstruct::cuda
