#include "packing.h"

namespace modstruct::cpu {

void Slabs::pack(const float* vectors, int64_t count, const float* center, int threads) {
    const int64_t slabs = padded(dimension_) / SLAB;
    parallel_for(block_count(count) * slabs, threads, [&](int64_t task, int) {
        const int64_t block = task / slabs;
        const int64_t start = task % slabs * SLAB;
        const int64_t width = std::min(SLAB, dimension_ - start);
        float* to = data_.data() + task * SLAB_FLOATS;
        std::fill(to, to + SLAB_FLOATS, 0.0f);
        for (int64_t i = 0; i < std::min(BLOCK, count - block * BLOCK); ++i, to += SLAB) {
            const float* from = vectors + (block * BLOCK + i) * dimension_ + start;
            for (int64_t d = 0; d < width; ++d) {
                to[d] = center == nullptr ? from[d] : from[d] - center[start + d];
            }
        }
    });
}

void Panels::pack(const float* vectors, int64_t count, const float* center, float scale, int threads) {
    parallel_for(block_count(count) * BLOCK / SLAB, threads, [&](int64_t task, int) {
        const auto vector = [&](int64_t i) { return vectors + (task * SLAB + i) * dimension_; };
        pack_panel(vector, count - task * SLAB, dimension_, center, scale,
                   data_.data() + task * SLAB * padded(dimension_));
    });
}

}  // namespace modstruct::cpu
