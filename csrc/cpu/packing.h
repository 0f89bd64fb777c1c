// Memory, threads, and vectors packed into the layouts of kernels.h.
#pragma once

#include <algorithm>
#include <cstddef>
#include <new>

#include "kernels.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace modstruct::cpu {

// body(task, thread) for every task. All memory is allocated before the threads start: no exception may leave them.
template <typename Body>
void parallel_for(int64_t tasks, int threads, const Body& body) {
#if defined(_OPENMP)
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t task = 0; task < tasks; ++task) {
        body(task, omp_get_thread_num());
    }
#else
    (void)threads;
    for (int64_t task = 0; task < tasks; ++task) {
        body(task, 0);
    }
#endif
}

// Zeros, on the boundary of a cache line.
template <typename Number>
class Buffer {
   public:
    explicit Buffer(int64_t size) : data_(static_cast<Number*>(::operator new(size * sizeof(Number), ALIGNMENT))) {
        std::fill(data_, data_ + size, Number{0});
    }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() { ::operator delete(data_, ALIGNMENT); }
    Number* data() { return data_; }
    const Number* data() const { return data_; }
    Number& operator[](int64_t index) { return data_[index]; }
    const Number& operator[](int64_t index) const { return data_[index]; }

   private:
    static constexpr std::align_val_t ALIGNMENT{64};
    Number* data_;
};

inline int64_t ceil_divide(int64_t value, int64_t step) { return (value + step - 1) / step; }
inline int64_t block_count(int64_t vectors) { return ceil_divide(vectors, BLOCK); }
inline int64_t padded(int64_t dimension) { return ceil_divide(dimension, SLAB) * SLAB; }

// Vectors less `center` (nothing, where it is null), as slabs.
class Slabs {
   public:
    Slabs(int64_t blocks, int64_t dimension) : dimension_(dimension), data_(blocks * BLOCK * padded(dimension)) {}
    void pack(const float* vectors, int64_t count, const float* center, int threads);
    const float* block(int64_t block) const { return data_.data() + block * BLOCK * padded(dimension_); }

   private:
    int64_t dimension_;
    Buffer<float> data_;
};

// Vectors less `center`, times `scale`, as panels.
class Panels {
   public:
    Panels(int64_t blocks, int64_t dimension) : dimension_(dimension), data_(blocks * BLOCK * padded(dimension)) {}
    void pack(const float* vectors, int64_t count, const float* center, float scale, int threads);
    const float* block(int64_t block) const { return data_.data() + block * BLOCK * padded(dimension_); }

   private:
    int64_t dimension_;
    Buffer<float> data_;
};

// One panel of up to 32 vectors, `vector(i)` being where the i-th lies.
template <typename Vector>
void pack_panel(const Vector& vector, int64_t count, int64_t dimension, const float* center, float scale,
                float* panel) {
    constexpr int64_t AT_ONCE = 16;  // keeps the lines that are written in the first-level cache
    for (int64_t start = 0; start < padded(dimension); start += AT_ONCE) {
        for (int64_t i = 0; i < SLAB; ++i) {
            const float* from = i < count ? vector(i) : nullptr;
            for (int64_t d = start; d < start + AT_ONCE; ++d) {
                const float value = from == nullptr || d >= dimension ? 0.0f : from[d] - (center ? center[d] : 0.0f);
                panel[d * SLAB + i] = value * scale;
            }
        }
    }
}

}  // namespace modstruct::cpu
