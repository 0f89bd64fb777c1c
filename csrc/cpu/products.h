// The three products of a tile. One micro-kernel does them all: its BLOCK_HEIGHT x 2 vectors of sums stay in registers
// over the whole depth, and each sum runs over the depth in order, one multiply-add at a time.
//   tile_products   tile[k][j]   = sum_d y[k][d] x[j][d]       a = slabs of y, b = panels of x
//   grad_rows       x_grad[j][d] = sum_k tile[k][j] y[k][d]    a = the tile as it lies, b = slabs of y
//   grad_columns    y_grad[k][d] = sum_j tile[k][j] x[j][d]    a = the tile across, b = slabs of x

constexpr int BLOCK_WIDTH = 2 * VECTOR_WIDTH;
static_assert(BLOCK % BLOCK_HEIGHT == 0 && SLAB % BLOCK_WIDTH == 0, "blocks and slabs hold whole micro-kernel blocks");

// c[i][j] (+)= sum_d a[d][i] b[d][j]. Element i of a lies I_STRIDE on, element d DEPTH_STRIDE; after `depth` steps a
// moves to the next of `segments`, `a_jump` further on. b has 32 numbers for each d, and goes on without a jump.
template <int64_t I_STRIDE, int64_t DEPTH_STRIDE>
INLINE void block_product(const float* a, int64_t a_jump, const float* b, int64_t segments, int64_t depth, float* c,
                          int64_t c_stride, bool accumulate) {
    Vector sum[BLOCK_HEIGHT][2] = {};
    for (int64_t segment = 0; segment < segments; ++segment, a += a_jump) {
        const float* values = a;
        for (int64_t d = 0; d < depth; ++d, b += SLAB, values += DEPTH_STRIDE) {
            const Vector low = load(b);
            const Vector high = load(b + VECTOR_WIDTH);
#pragma GCC unroll 16
            for (int64_t i = 0; i < BLOCK_HEIGHT; ++i) {
                const Vector value = broadcast(values[i * I_STRIDE]);
                sum[i][0] = MULTIPLY_ADD(value, low, sum[i][0]);
                sum[i][1] = MULTIPLY_ADD(value, high, sum[i][1]);
            }
        }
    }
#pragma GCC unroll 16
    for (int64_t i = 0; i < BLOCK_HEIGHT; ++i) {
        float* to = c + i * c_stride;
        store(to, accumulate ? load(to) + sum[i][0] : sum[i][0]);
        store(to + VECTOR_WIDTH, accumulate ? load(to + VECTOR_WIDTH) + sum[i][1] : sum[i][1]);
    }
}

// The same, added to the part of c that exists: `height` x `width` numbers.
template <int64_t I_STRIDE, int64_t DEPTH_STRIDE>
INLINE void add_block_product(const float* a, const float* b, int64_t depth, int64_t height, int64_t width, float* c,
                              int64_t c_stride) {
    if (height >= BLOCK_HEIGHT && width >= BLOCK_WIDTH) {
        block_product<I_STRIDE, DEPTH_STRIDE>(a, 0, b, 1, depth, c, c_stride, true);
        return;
    }
    float whole[BLOCK_HEIGHT * BLOCK_WIDTH];
    block_product<I_STRIDE, DEPTH_STRIDE>(a, 0, b, 1, depth, whole, BLOCK_WIDTH, false);
    for (int64_t i = 0; i < height && i < BLOCK_HEIGHT; ++i) {
        for (int64_t j = 0; j < width && j < BLOCK_WIDTH; ++j) {
            c[i * c_stride + j] += whole[i * BLOCK_WIDTH + j];
        }
    }
}

static void tile_products(const float* panels, const float* slabs, int64_t rows, int64_t columns, int64_t depth,
                          float* tile) {
    for (int64_t start = 0; start < depth; start += DEPTH_AT_ONCE) {
        const int64_t segments = (depth - start < DEPTH_AT_ONCE ? depth - start : DEPTH_AT_ONCE) / SLAB;
        for (int64_t j = 0; j < rows; j += BLOCK_WIDTH) {
            const float* panel = panels + j / SLAB * SLAB * depth + start * SLAB + j % SLAB;
            for (int64_t k = 0; k < columns; k += BLOCK_HEIGHT) {
                block_product<SLAB, 1>(slabs + start * BLOCK + k * SLAB, SLAB_FLOATS, panel, segments, SLAB,
                                       tile + k * BLOCK + j, BLOCK, start > 0);
            }
        }
    }
}

static void grad_rows(const float* tile, const float* y_slabs, int64_t rows, int64_t columns, int64_t width,
                      int64_t dimension, float* x_grad) {
    for (int64_t d = 0; d < width; d += BLOCK_WIDTH) {
        const float* slab = y_slabs + d / SLAB * SLAB_FLOATS + d % SLAB;
        for (int64_t j = 0; j < rows; j += BLOCK_HEIGHT) {
            add_block_product<1, BLOCK>(tile + j, slab, columns, rows - j, width - d, x_grad + j * dimension + d,
                                        dimension);
        }
    }
}

static void grad_columns(const float* tile, const float* x_slabs, int64_t rows, int64_t columns, int64_t width,
                         int64_t dimension, float* y_grad) {
    for (int64_t d = 0; d < width; d += BLOCK_WIDTH) {
        const float* slab = x_slabs + d / SLAB * SLAB_FLOATS + d % SLAB;
        for (int64_t k = 0; k < columns; k += BLOCK_HEIGHT) {
            add_block_product<BLOCK, 1>(tile + k * BLOCK, slab, rows, columns - k, width - d,
                                        y_grad + k * dimension + d, dimension);
        }
    }
}

// In blocks of DEPTH_AT_ONCE that are added up, as tile_products does: the bits are the same.
static void panel_dots(const float* a, const float* b, int64_t depth, float* dots) {
    for (int64_t i = 0; i < SLAB; i += VECTOR_WIDTH) {
        Vector total = {};
        for (int64_t start = 0; start < depth; start += DEPTH_AT_ONCE) {
            const int64_t end = start + DEPTH_AT_ONCE < depth ? start + DEPTH_AT_ONCE : depth;
            Vector sum = {};
            for (int64_t d = start; d < end; ++d) {
                sum = MULTIPLY_ADD(load(a + d * SLAB + i), load(b + d * SLAB + i), sum);
            }
            total = start == 0 ? sum : total + sum;
        }
        store(dots + i, total);
    }
}
