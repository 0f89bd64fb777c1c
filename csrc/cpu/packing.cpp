#include "packing.h"

#include <new>
#include <vector>

namespace modstruct::cpu {
namespace {

constexpr std::align_val_t CACHE_LINE{64};
constexpr size_t MOST_KEPT = size_t{64} << 20;

struct Block {
    size_t bytes;
    void* data;
};

// Of one thread, which therefore needs no lock. The block that was given back last is the last.
class KeptMemory {
   public:
    ~KeptMemory() { drop_oldest_until(0); }

    // The smallest block that holds so many bytes and is not twice as large, else a fresh one.
    Block take(size_t bytes) {
        auto best = blocks_.end();
        for (auto block = blocks_.begin(); block != blocks_.end(); ++block) {
            const bool fits = block->bytes >= bytes && block->bytes / 2 <= bytes;
            if (fits && (best == blocks_.end() || block->bytes < best->bytes)) {
                best = block;
            }
        }
        if (best == blocks_.end()) {
            return {bytes, ::operator new(bytes, CACHE_LINE)};
        }
        const Block found = *best;
        blocks_.erase(best);
        total_ -= found.bytes;
        return found;
    }

    void give(Block block) {
        blocks_.push_back(block);
        total_ += block.bytes;
        drop_oldest_until(MOST_KEPT);
    }

   private:
    void drop_oldest_until(size_t bytes) {
        while (!blocks_.empty() && total_ > bytes) {
            ::operator delete(blocks_.front().data, CACHE_LINE);
            total_ -= blocks_.front().bytes;
            blocks_.erase(blocks_.begin());
        }
    }

    std::vector<Block> blocks_;
    size_t total_ = 0;
};

thread_local KeptMemory kept_memory;

}  // namespace

Memory::Memory(size_t bytes) {
    const Block block = kept_memory.take(bytes);
    bytes_ = block.bytes;
    data_ = block.data;
}

Memory::~Memory() { kept_memory.give({bytes_, data_}); }

void Slabs::pack(const float* vectors, int64_t count, const float* center, int threads) {
    const int64_t slabs = padded(dimension_) / SLAB;
    parallel_for(block_count(count) * slabs, threads, [&](int64_t task, int) {
        const int64_t block = task / slabs;
        const int64_t start = task % slabs * SLAB;
        const int64_t width = std::min(SLAB, dimension_ - start);
        float* to = data_.data() + task * SLAB_FLOATS;
        for (int64_t i = 0; i < std::min(BLOCK, count - block * BLOCK); ++i, to += SLAB) {
            const float* from = vectors + (block * BLOCK + i) * dimension_ + start;
            for (int64_t d = 0; d < width; ++d) {
                to[d] = center == nullptr ? from[d] : from[d] - center[start + d];
            }
            std::fill(to + width, to + SLAB, 0.0f);
        }
    });
}

void Panels::pack(const float* vectors, int64_t count, const float* center, float scale, int threads) {
    parallel_for(ceil_divide(count, SLAB), threads, [&](int64_t task, int) {
        const auto vector = [&](int64_t i) { return vectors + (task * SLAB + i) * dimension_; };
        pack_panel(vector, count - task * SLAB, dimension_, center, scale,
                   data_.data() + task * SLAB * padded(dimension_));
    });
}

}  // namespace modstruct::cpu
