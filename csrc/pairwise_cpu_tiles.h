// The tiles of the pairwise CPU kernels. pairwise_cpu.cpp includes this file once for each instruction set, inside a
// namespace and a target region of its own, after defining VECTOR_WIDTH, BLOCK_HEIGHT and MULTIPLY_ADD. So there is no
// include guard, and nothing of the standard library may be called: its templates are shared by the whole program and
// would be compiled for one processor only.
//
// One micro-kernel does all products; its BLOCK_HEIGHT x BLOCK_WIDTH sums stay in registers over the whole depth:
//   distances   tile[k][j] = sum_d y[k][d] x[j][d]     a = panels of columns y, b = panels of rows x
//   pull        pull[j][d] = sum_k G[k][j] y[k][d]     a = the tile as it lies, b = slabs of columns y
// Panels lie as [panel][d][vector in the panel], slabs as [tile][slab][k][dimension in the slab of BLOCK_WIDTH].

typedef float Vector __attribute__((vector_size(4 * VECTOR_WIDTH)));
typedef int32_t Mask __attribute__((vector_size(4 * VECTOR_WIDTH)));
typedef uint32_t Word __attribute__((vector_size(4 * VECTOR_WIDTH)));

constexpr int BLOCK_WIDTH = 2 * VECTOR_WIDTH;
static_assert(TILE_COLUMNS % BLOCK_HEIGHT == 0 && TILE_ROWS % BLOCK_HEIGHT == 0, "tiles are whole blocks");
static_assert(TILE_ROWS % BLOCK_WIDTH == 0 && DIMENSION_STEP % BLOCK_WIDTH == 0, "tiles are whole blocks");
static_assert(VECTOR_WIDTH <= READ_AHEAD, "a panel's last vector may be read past its end");

INLINE Vector load(const float* from) {
    Vector value;
    __builtin_memcpy(&value, from, sizeof value);
    return value;
}

INLINE void store(float* to, Vector value) { __builtin_memcpy(to, &value, sizeof value); }

INLINE Vector broadcast(float value) { return Vector{} + value; }

// `yes` where the mask is set, else `no`.
INLINE Vector choose(Mask mask, Vector yes, Vector no) { return (Vector)((mask & (Mask)yes) | (~mask & (Mask)no)); }

// exp(x) of x <= 0 to about one unit in the last place; exactly 1 at 0, 0 below the normal numbers, NaN at NaN.
INLINE Vector exp_nonpositive(Vector x) {
    const Vector lowest = broadcast(-87.33f);
    const Mask underflow = x < lowest;  // false at NaN
    x = choose(underflow, lowest, x);
    // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits: no conversion that NaN could upset.
    const Vector magic = broadcast(12582912.0f);
    const Vector shifted = MULTIPLY_ADD(x, broadcast(1.44269504f), magic);
    const Vector whole = shifted - magic;
    Vector r = MULTIPLY_ADD(whole, broadcast(-0.693359375f), x);  // ln 2 in two parts; times the first is exact
    r = MULTIPLY_ADD(whole, broadcast(2.12194440e-4f), r);
    Vector value = broadcast(1.0f / 5040);  // Taylor series: |r| <= ln 2 / 2, so the first term left out is below 6e-9
    value = MULTIPLY_ADD(value, r, broadcast(1.0f / 720));
    value = MULTIPLY_ADD(value, r, broadcast(1.0f / 120));
    value = MULTIPLY_ADD(value, r, broadcast(1.0f / 24));
    value = MULTIPLY_ADD(value, r, broadcast(1.0f / 6));
    value = MULTIPLY_ADD(value, r, broadcast(0.5f));
    value = MULTIPLY_ADD(value, r, broadcast(1.0f));
    value = MULTIPLY_ADD(value, r, broadcast(1.0f));
    const Word power = ((Word)shifted - (Word)magic + 127u) << 23;
    return choose(underflow, Vector{}, value * (Vector)power);
}

// c[i][j] (+)= sum_d a[d][i] b[d][j]; the sums run over d in order, one multiply-add each.
INLINE void block_product(const float* a, int64_t a_stride, const float* b, int64_t depth, float* c, int64_t c_stride,
                          bool accumulate) {
    Vector sum[BLOCK_HEIGHT][2] = {};
    for (int64_t d = 0; d < depth; ++d) {
        const Vector low = load(b + d * BLOCK_WIDTH);
        const Vector high = load(b + d * BLOCK_WIDTH + VECTOR_WIDTH);
        const float* values = a + d * a_stride;
#pragma GCC unroll 16
        for (int i = 0; i < BLOCK_HEIGHT; ++i) {
            const Vector value = broadcast(values[i]);
            sum[i][0] = MULTIPLY_ADD(value, low, sum[i][0]);
            sum[i][1] = MULTIPLY_ADD(value, high, sum[i][1]);
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < BLOCK_HEIGHT; ++i) {
        float* to = c + i * c_stride;
        store(to, accumulate ? load(to) + sum[i][0] : sum[i][0]);
        store(to + VECTOR_WIDTH, accumulate ? load(to + VECTOR_WIDTH) + sum[i][1] : sum[i][1]);
    }
}

// Vectors first..first+count of `source`, minus the centre, as one panel; missing vectors are zero.
INLINE void pack_panel(const float* source, const float* center, int64_t dimension, int64_t first, int64_t count,
                       int width, float* panel) {
    for (int i = 0; i < width; ++i) {
        const float* from = source + (first + i) * dimension;
        for (int64_t d = 0; d < dimension; ++d) {
            panel[d * width + i] = i < count ? from[d] - center[d] : 0.0f;
        }
    }
}

// Squared lengths, summed in the very order of the distance products: so a vector's distance to itself is exactly 0.
INLINE void panel_norms(const float* panel, int64_t dimension, int width, float* norms) {
    for (int i = 0; i < width; i += VECTOR_WIDTH) {
        Vector norm = {};
        for (int64_t start = 0; start < dimension; start += DEPTH_BLOCK) {
            const int64_t end = smaller(start + DEPTH_BLOCK, dimension);
            Vector sum = {};
            for (int64_t d = start; d < end; ++d) {
                const Vector value = load(panel + d * width + i);
                sum = MULTIPLY_ADD(value, value, sum);
            }
            norm = start == 0 ? sum : norm + sum;
        }
        for (int lane = 0; lane < VECTOR_WIDTH && i + lane < width; ++lane) {
            norms[i + lane] = norm[lane];
        }
    }
}

static void pack_columns(const GaussianPotential& problem, const PackedColumns& packed, int64_t tile) {
    const int64_t dimension = problem.dimension;
    const int64_t first = tile * TILE_COLUMNS;
    const int64_t count = smaller(TILE_COLUMNS, problem.column_count - first);
    for (int64_t k = 0; k < count; k += BLOCK_HEIGHT) {
        float* panel = packed.panels + (first + k) * dimension;
        pack_panel(problem.columns, packed.center, dimension, first + k, count - k, BLOCK_HEIGHT, panel);
        panel_norms(panel, dimension, BLOCK_HEIGHT, packed.norms + first + k);
    }
    if (problem.pull == nullptr) {
        return;
    }
    float* slabs = packed.slabs + first * packed.padded_dimension;
    for (int64_t d = 0; d < packed.padded_dimension; ++d) {
        float* slab = slabs + d / BLOCK_WIDTH * BLOCK_WIDTH * TILE_COLUMNS + d % BLOCK_WIDTH;
        for (int64_t k = 0; k < count; ++k) {
            slab[k * BLOCK_WIDTH] =
                d < dimension ? problem.columns[(first + k) * dimension + d] - packed.center[d] : 0.0f;
        }
    }
}

// tile[k][j]: inner products become Gaussian potentials; sums[j] grows by their sum over k.
// Where a vector meets itself the tile and `others` get 0, not 1: such a pair has no pull, and in the difference that
// makes the pull its two terms, by far the largest, would cancel and leave their rounding.
INLINE void exponentiate(float* tile, int64_t columns, int64_t rows, const float* row_norms, const float* column_norms,
                         float t, double* sums, double* others) {
    constexpr int64_t FLOAT_TERMS = 16;  // so many are added in float32 before they join the float64 sum
    for (int64_t j = 0; j < rows; j += VECTOR_WIDTH) {
        const Vector row_norm = load(row_norms + j);
        for (int64_t start = 0; start < columns; start += FLOAT_TERMS) {
            Vector sum = {};
            Vector other = {};
            for (int64_t k = start; k < smaller(start + FLOAT_TERMS, columns); ++k) {
                float* place = tile + k * TILE_ROWS + j;
                Vector square = MULTIPLY_ADD(broadcast(-2.0f), load(place), row_norm + column_norms[k]);
                square = choose(square < Vector{}, Vector{}, square);  // NaN stays
                Vector potential = exp_nonpositive(square * -t);
                sum += potential;
                potential = choose(square == Vector{}, Vector{}, potential);
                other += potential;
                store(place, potential);
            }
            for (int lane = 0; lane < VECTOR_WIDTH; ++lane) {
                sums[j + lane] += static_cast<double>(sum[lane]);
                others[j + lane] += static_cast<double>(other[lane]);
            }
        }
    }
}

static void sum_rows(const GaussianPotential& problem, const PackedColumns& packed, int64_t first, int64_t count,
                     const Scratch& scratch) {
    const int64_t dimension = problem.dimension;
    const int64_t padded_dimension = packed.padded_dimension;
    const int64_t padded_rows = (count + BLOCK_WIDTH - 1) / BLOCK_WIDTH * BLOCK_WIDTH;
    for (int64_t j = 0; j < padded_rows; j += BLOCK_WIDTH) {
        float* panel = scratch.panels + j * dimension;
        pack_panel(problem.rows, packed.center, dimension, first + j, count - j, BLOCK_WIDTH, panel);
        panel_norms(panel, dimension, BLOCK_WIDTH, scratch.norms + j);
    }
    for (int64_t j = 0; j < TILE_ROWS; ++j) {
        scratch.sums[j] = scratch.others[j] = 0;
    }
    for (int64_t i = 0; problem.pull != nullptr && i < TILE_ROWS * padded_dimension; ++i) {
        scratch.pull[i] = 0;
    }

    for (int64_t start = 0; start < problem.column_count; start += TILE_COLUMNS) {
        const int64_t columns = smaller(TILE_COLUMNS, problem.column_count - start);
        for (int64_t d = 0; d < dimension; d += DEPTH_BLOCK) {
            const int64_t depth = smaller(DEPTH_BLOCK, dimension - d);
            for (int64_t j = 0; j < padded_rows; j += BLOCK_WIDTH) {
                for (int64_t k = 0; k < columns; k += BLOCK_HEIGHT) {
                    block_product(packed.panels + (start + k) * dimension + d * BLOCK_HEIGHT, BLOCK_HEIGHT,
                                  scratch.panels + j * dimension + d * BLOCK_WIDTH, depth,
                                  scratch.tile + k * TILE_ROWS + j, TILE_ROWS, d > 0);
                }
            }
        }
        exponentiate(scratch.tile, columns, padded_rows, scratch.norms, packed.norms + start, problem.t, scratch.sums,
                     scratch.others);
        for (int64_t d = 0; problem.pull != nullptr && d < padded_dimension; d += BLOCK_WIDTH) {
            for (int64_t j = 0; j < count; j += BLOCK_HEIGHT) {
                block_product(scratch.tile + j, TILE_ROWS, packed.slabs + start * padded_dimension + d * TILE_COLUMNS,
                              columns, scratch.pull + j * padded_dimension + d, padded_dimension, true);
            }
        }
    }

    for (int64_t j = 0; j < count; ++j) {
        problem.sums[first + j] = static_cast<float>(scratch.sums[j]);
        const float* row = problem.rows + (first + j) * dimension;
        for (int64_t d = 0; problem.pull != nullptr && d < dimension; ++d) {
            const double centered = static_cast<double>(row[d] - packed.center[d]);
            const double pulled = static_cast<double>(scratch.pull[j * padded_dimension + d]);
            problem.pull[(first + j) * dimension + d] = static_cast<float>(pulled - scratch.others[j] * centered);
        }
    }
}

#undef VECTOR_WIDTH
#undef BLOCK_HEIGHT
#undef MULTIPLY_ADD
