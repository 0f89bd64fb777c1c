// SigLIP's sigmoid loss: every pair is a binary classification by itself, so a tile knows its weights at once.
#include <device.cuh>

#include "numbers.cuh"
#include "product.cuh"
#include "sums.cuh"
#include "tile.cuh"
#include "weights.cuh"

namespace modstruct::cuda {
namespace {

template <class Kind>
struct SigmoidOfTiles {
    using Parameters = SigmoidWeights;
    using Tile = WideTile;
    using Base = typename Kind::Base;
    static constexpr const char* NAME = "sigmoid_weights";
    static constexpr int THREADS = Tile::THREADS;
    static constexpr int SHARED_BYTES = Tile::SHARED_BYTES;

    static __device__ __forceinline__ void run(const Parameters& p, unsigned char* shared) {
        const Panel& panel = p.panel;
        const Place<Tile> place(panel.row_count, panel.column_count);
        Sums<Tile> sums;
        product<Kind>(sums, {panel.rows, panel.row_count, nullptr}, {panel.columns, panel.column_count, nullptr},
                      panel.row_bytes, place, shared);
        // Loss and weight are 0 at -inf, which stands for what is no negative.
        scale_and_mask(sums, place, panel.first, *panel.scale, [](int, float) {});
        const float bias = *p.bias;
        double total = 0.0;
        double weight_total = 0.0;
#pragma unroll
        for (int r = 0; r < ROW_SLOTS; ++r) {
            float losses = 0.0f;
            float weights = 0.0f;
#pragma unroll
            for (int c = 0; c < Tile::COLUMN_SLOTS; ++c) {
                const float logit = sums.at(r, c) + bias;
                const float small = Base::exponential(-fabsf(logit) * Base::PER_NAT);
                const float weight = (logit < 0.0f ? small : 1.0f) / (1.0f + small);
                losses += larger(0.0f, logit) + log1pf(small);
                weights += weight;
                sums.at(r, c) = weight;
            }
            total += static_cast<double>(losses);
            weight_total += static_cast<double>(weights);
        }
        over_block(total, place, shared, [&](double sum) { p.tile_sums[2 * blockIdx.x] = sum; });
        over_block(weight_total, place, shared, [&](double sum) { p.tile_sums[2 * blockIdx.x + 1] = sum; });
        if (p.weights != nullptr) {
            store_weights<Kind>(sums, place, shared, p.weights, p.weights_stride);
        }
    }
};

struct SigmoidOfPanel {
    using Parameters = SigmoidWeights;
    static constexpr const char* NAME = "sigmoid_weights, its sums over tiles";
    static constexpr int THREADS = 256;
    static constexpr int SHARED_BYTES = THREADS * sizeof(double);

    static __device__ __forceinline__ void run(const Parameters& p, unsigned char* shared) {
        const int64_t count = tiles(p.panel.row_count, TILE_ROWS) * tiles(p.panel.column_count, TILE_COLUMNS);
        add_tiles<THREADS>(p.totals, p.tile_sums, count, 2, shared);
        add_tiles<THREADS>(p.totals + 1, p.tile_sums + 1, count, 2, shared);
    }
};

}  // namespace

void sigmoid_weights(const SigmoidWeights& problem, Precision precision, void* stream) {
    const int64_t blocks = tiles(problem.panel.row_count, TILE_ROWS) * tiles(problem.panel.column_count, TILE_COLUMNS);
    with_kind(precision, [&](auto kind) { launch<SigmoidOfTiles<decltype(kind)>>(problem, blocks, stream); });
    launch<SigmoidOfPanel>(problem, 1, stream);
}

}  // namespace modstruct::cuda
