// Memory, threads, and vectors packed into the layouts of kernels.h.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstring>

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

// Memory of any content on the boundary of a cache line. It is kept for the next call of the same thread, up to 64 MiB
// in all: for a few hundred rows the system takes a third as long to clear fresh pages as the products take.
class Memory {
   public:
    explicit Memory(size_t bytes);
    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;
    ~Memory();
    void* data() const { return data_; }

   private:
    size_t bytes_;  // at least as many as asked for
    void* data_;
};

enum class Content { zeros, any };

template <typename Number>
class Buffer {
   public:
    explicit Buffer(int64_t size, Content content = Content::zeros) : memory_(size * sizeof(Number)) {
        if (content == Content::zeros) {
            std::fill(data(), data() + size, Number{0});
        }
    }
    Number* data() { return static_cast<Number*>(memory_.data()); }
    const Number* data() const { return static_cast<const Number*>(memory_.data()); }
    Number& operator[](int64_t index) { return data()[index]; }
    const Number& operator[](int64_t index) const { return data()[index]; }

   private:
    Memory memory_;
};

inline int64_t ceil_divide(int64_t value, int64_t step) { return (value + step - 1) / step; }
inline int64_t block_count(int64_t vectors) { return ceil_divide(vectors, BLOCK); }
inline int64_t padded(int64_t dimension) { return ceil_divide(dimension, SLAB) * SLAB; }

// Vectors less `center` (nothing, where it is null), as slabs; of any content behind the last vector.
class Slabs {
   public:
    Slabs(int64_t blocks, int64_t dimension)
        : dimension_(dimension), data_(blocks * BLOCK * padded(dimension), Content::any) {}
    void pack(const float* vectors, int64_t count, const float* center, int threads);
    const float* block(int64_t block) const { return data_.data() + block * BLOCK * padded(dimension_); }

   private:
    int64_t dimension_;
    Buffer<float> data_;
};

// Vectors less `center`, times `scale`, as panels; of any content behind the last panel that holds a vector.
class Panels {
   public:
    Panels(int64_t blocks, int64_t dimension)
        : dimension_(dimension), data_(blocks * BLOCK * padded(dimension), Content::any) {}
    void pack(const float* vectors, int64_t count, const float* center, float scale, int threads);
    const float* block(int64_t block) const { return data_.data() + block * BLOCK * padded(dimension_); }

   private:
    int64_t dimension_;
    Buffer<float> data_;
};

// One panel of up to 32 vectors, `vector(i)` being where the i-th lies; zeros behind the last.
template <typename Vector>
void pack_panel(const Vector& vector, int64_t count, int64_t dimension, const float* center, float scale,
                float* panel) {
    constexpr int64_t AT_ONCE = 64;  // dimensions: keeps the lines that are written in the first-level cache
    constexpr int64_t SIDE = 4;      // of the squares that are turned over in registers
    typedef float Four __attribute__((vector_size(4 * SIDE)));
    const auto four = [](const float* from, int64_t width) {
        Four values = {};
        if (width >= SIDE) {
            std::memcpy(&values, from, sizeof values);
        } else {
            std::copy(from, from + std::max<int64_t>(width, 0), reinterpret_cast<float*>(&values));
        }
        return values;
    };
    for (int64_t start = 0; start < padded(dimension); start += AT_ONCE) {
        const int64_t end = std::min(start + AT_ONCE, padded(dimension));
        for (int64_t i = 0; i < SLAB; i += SIDE) {
            const float* from[SIDE];
            for (int64_t r = 0; r < SIDE; ++r) {
                from[r] = vector(std::min(i + r, count - 1));  // the last where there is none
            }
            for (int64_t d = start; d < end; d += SIDE) {
                const Four less = center == nullptr ? Four{} : four(center + d, dimension - d);
                Four rows[SIDE];
                for (int64_t r = 0; r < SIDE; ++r) {
                    rows[r] = i + r < count ? (four(from[r] + d, dimension - d) - less) * scale : Four{};
                }
                for (int64_t e = 0; e < SIDE; ++e) {
                    const Four column = {rows[0][e], rows[1][e], rows[2][e], rows[3][e]};
                    std::memcpy(panel + (d + e) * SLAB + i, &column, sizeof column);
                }
            }
        }
    }
}

}  // namespace modstruct::cpu
