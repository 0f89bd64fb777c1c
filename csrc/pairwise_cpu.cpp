// Gaussian-potential sums on the CPU: columns are packed once, then each thread takes tiles of rows over all columns.
//
// Squared distances come from |x|^2 + |y|^2 - 2 <x, y>, with the mean of the columns taken off both first. That changes
// no distance, and it keeps the digits when all embeddings lie in a narrow cone, as those of one modality do: the error
// of an exponent is about 2e-7 t (|x|^2 + |y|^2) with lengths measured from that mean.
//
// A row's result depends on the tiles of columns alone, never on which thread or tile of rows it fell to.
#include <algorithm>
#include <new>
#include <stdexcept>

#include "pairwise.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif
#if defined(_OPENMP)
#include <omp.h>
#endif

#define INLINE static inline __attribute__((always_inline))

namespace modstruct {
namespace {

// One tile of rows, its pull and one tile of columns fit a cache of 1 MB at dimension 512.
constexpr int64_t TILE_ROWS = 96;
constexpr int64_t TILE_COLUMNS = 144;
constexpr int64_t DEPTH_BLOCK = 256;     // a block of depth of one panel fits the first-level cache
constexpr int64_t DIMENSION_STEP = 32;   // slabs are padded to a multiple of the widest block
constexpr int64_t READ_AHEAD = 16;       // floats behind the last panel that a vector load may touch
constexpr int64_t ALIGNMENT_BYTES = 64;  // a cache line, and the widest vector

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

template <typename Number>
class Buffer {
   public:
    explicit Buffer(int64_t size)
        : data_(static_cast<Number*>(::operator new(size * sizeof(Number), std::align_val_t{ALIGNMENT_BYTES}))) {
        std::fill(data_, data_ + size, Number{0});
    }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() { ::operator delete(data_, std::align_val_t{ALIGNMENT_BYTES}); }
    Number* data() const { return data_; }

   private:
    Number* data_;
};

struct PackedColumns {
    const float* center;  // (dimension)
    float* panels;        // whole tiles of columns, see pairwise_cpu_tiles.h
    float* slabs;         // likewise
    float* norms;         // one for each column, from the centre
    int64_t padded_dimension;
};

struct Scratch {    // of one thread
    float* panels;  // the tile's rows
    float* norms;   // (TILE_ROWS)
    float* tile;    // (TILE_COLUMNS, TILE_ROWS)
    float* pull;    // (TILE_ROWS, padded dimension), towards the columns' positions, the row's own not yet taken off
    double* sums;   // (TILE_ROWS)
    double* others;  // (TILE_ROWS), the sums without the pairs at distance 0
};

namespace portable {
#define VECTOR_WIDTH 4
#if defined(__aarch64__)
#define BLOCK_HEIGHT 12
#define MULTIPLY_ADD(a, b, c) ((Vector)vfmaq_f32((float32x4_t)(c), (float32x4_t)(a), (float32x4_t)(b)))
#else
#define BLOCK_HEIGHT 6
#define MULTIPLY_ADD(a, b, c) ((a) * (b) + (c))
#endif
#include "pairwise_cpu_tiles.h"
}  // namespace portable

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
namespace avx2 {
#define VECTOR_WIDTH 8
#define BLOCK_HEIGHT 6
#define MULTIPLY_ADD(a, b, c) ((Vector)_mm256_fmadd_ps((__m256)(a), (__m256)(b), (__m256)(c)))
#include "pairwise_cpu_tiles.h"
}  // namespace avx2
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx2,fma")
#endif
namespace avx512 {
#define VECTOR_WIDTH 16
#define BLOCK_HEIGHT 12
#define MULTIPLY_ADD(a, b, c) ((Vector)_mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(c)))
#include "pairwise_cpu_tiles.h"
}  // namespace avx512
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

bool machine_has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool machine_has_avx512() { return machine_has_avx2() && __builtin_cpu_supports("avx512f"); }

#endif  // __x86_64__

bool any_machine() { return true; }

struct Kernel {
    const char* name;
    bool (*runs_here)();
    void (*pack_columns)(const GaussianPotential&, const PackedColumns&, int64_t tile);
    void (*sum_rows)(const GaussianPotential&, const PackedColumns&, int64_t first, int64_t count, const Scratch&);
};

const Kernel KERNELS[] = {  // the fastest last
    {"portable", any_machine, portable::pack_columns, portable::sum_rows},
#if defined(__x86_64__)
    {"avx2", machine_has_avx2, avx2::pack_columns, avx2::sum_rows},
    {"avx512", machine_has_avx512, avx512::pack_columns, avx512::sum_rows},
#endif
};

const Kernel& kernel_named(const std::string& name) {
    for (const Kernel& kernel : KERNELS) {
        if (name == kernel.name && kernel.runs_here()) {
            return kernel;
        }
    }
    throw std::invalid_argument("instruction_set = '" + name + "': this build or this machine has no such kernel");
}

int this_thread() {
#if defined(_OPENMP)
    return omp_get_thread_num();
#else
    return 0;
#endif
}

// Tiles of equal size for all threads, as far as whole blocks allow.
int64_t rows_per_task(int64_t rows, int threads) {
    const int64_t share = (rows + threads - 1) / threads;
    const int64_t tasks = (share + TILE_ROWS - 1) / TILE_ROWS;
    return round_up((share + tasks - 1) / tasks, DIMENSION_STEP);
}

}  // namespace

void gaussian_potential_sums_cpu(const GaussianPotential& problem, const std::string& instruction_set, int threads) {
    const Kernel& kernel = kernel_named(instruction_set);
#if !defined(_OPENMP)
    threads = 1;
#endif
    const bool with_pull = problem.pull != nullptr;
    const int64_t dimension = problem.dimension;
    const int64_t padded_dimension = round_up(dimension, DIMENSION_STEP);
    const int64_t tiles = (problem.column_count + TILE_COLUMNS - 1) / TILE_COLUMNS;

    Buffer<float> center(dimension);
    Buffer<float> panels(tiles * TILE_COLUMNS * dimension + READ_AHEAD);
    Buffer<float> slabs(with_pull ? tiles * TILE_COLUMNS * padded_dimension : 0);
    Buffer<float> norms(tiles * TILE_COLUMNS);
    const PackedColumns packed = {center.data(), panels.data(), slabs.data(), norms.data(), padded_dimension};

#if defined(_OPENMP)
#pragma omp parallel for num_threads(threads)
#endif
    for (int64_t start = 0; start < dimension; start += DIMENSION_STEP) {
        const int64_t width = smaller(DIMENSION_STEP, dimension - start);
        double sum[DIMENSION_STEP] = {};
        for (int64_t k = 0; k < problem.column_count; ++k) {
            for (int64_t d = 0; d < width; ++d) {
                sum[d] += static_cast<double>(problem.columns[k * dimension + start + d]);
            }
        }
        for (int64_t d = 0; d < width; ++d) {
            center.data()[start + d] = static_cast<float>(sum[d] / static_cast<double>(problem.column_count));
        }
    }

#if defined(_OPENMP)
#pragma omp parallel for num_threads(threads)
#endif
    for (int64_t tile = 0; tile < tiles; ++tile) {
        kernel.pack_columns(problem, packed, tile);
    }

    // All memory is taken before the threads start: an exception cannot leave a parallel region.
    const int64_t panel_floats = TILE_ROWS * dimension;
    const int64_t tile_floats = TILE_COLUMNS * TILE_ROWS;
    const int64_t pull_floats = with_pull ? TILE_ROWS * padded_dimension : 0;
    const int64_t thread_floats = panel_floats + TILE_ROWS + tile_floats + pull_floats;
    Buffer<float> floats(threads * thread_floats);
    Buffer<double> sums(threads * 2 * TILE_ROWS);

    const int64_t step = rows_per_task(problem.row_count, threads);
#if defined(_OPENMP)
#pragma omp parallel for num_threads(threads) schedule(dynamic)
#endif
    for (int64_t first = 0; first < problem.row_count; first += step) {
        float* base = floats.data() + this_thread() * thread_floats;
        double* own_sums = sums.data() + this_thread() * 2 * TILE_ROWS;
        const Scratch scratch = {base,
                                 base + panel_floats,
                                 base + panel_floats + TILE_ROWS,
                                 base + panel_floats + TILE_ROWS + tile_floats,
                                 own_sums,
                                 own_sums + TILE_ROWS};
        kernel.sum_rows(problem, packed, first, smaller(step, problem.row_count - first), scratch);
    }
}

std::vector<std::string> cpu_instruction_sets_built() {
    std::vector<std::string> names;
    for (const Kernel& kernel : KERNELS) {
        names.push_back(kernel.name);
    }
    return names;
}

std::vector<std::string> cpu_instruction_sets_here() {
    std::vector<std::string> names;
    for (const Kernel& kernel : KERNELS) {
        if (kernel.runs_here()) {
            names.push_back(kernel.name);
        }
    }
    return names;
}

bool built_with_openmp() {
#if defined(_OPENMP)
    return true;
#else
    return false;
#endif
}

}  // namespace modstruct
