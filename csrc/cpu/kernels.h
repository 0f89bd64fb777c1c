// What is compiled once for each instruction set, as a table of functions, and the layouts that they share.
//
// Rows and columns come in blocks of BLOCK = 192. A tile is one block of rows against one block of columns, stored
// [column][row], the row contiguous: 147 KB, which a second-level cache holds. Vectors are packed in two layouts:
//   slabs   [dimension / 32][vector in block][32]   one block of rows or columns
//   panels  [vector in block / 32][dimension][32]   one block of rows
// Both pad the dimension to a multiple of 32 with zeros, and panels the missing vectors of the last panel likewise. What
// else a block has behind its last vector is of any content: sums of it are formed and read by nobody.
#pragma once

#include <cstdint>
#include <string>

namespace modstruct::cpu {

constexpr int64_t BLOCK = 192;  // a multiple of every micro-kernel's height and width
constexpr int64_t TILE_FLOATS = BLOCK * BLOCK;
constexpr int64_t SLAB = 32;
constexpr int64_t SLAB_FLOATS = BLOCK * SLAB;
constexpr int64_t DEPTH_AT_ONCE = 256;  // of one panel: what a first-level cache holds
constexpr float LOWEST = -3.40282347e+38f;

// What the tile functions need of the rows and columns of one tile. Arrays of rows are BLOCK long.
struct ContrastiveWeights {
    const float* row_lse;
    const float* row_weight;
    const float* column_lse;
    const float* column_weight;
};

struct SoftWeights {
    const float* row_lse;           // of the negatives
    const float* row_weight;        // sigmoid(m_j)
    const float* momentum_lse;      // likewise of the momentum rows; null without them
    const float* momentum_weight;   // alpha sigmoid(m'_j)
    const float* positive;          // S_j,positive
    float* soft_loss;               // becomes alpha sum P_jk (S_j,positive - S_jk) of the tile
};

struct SigmoidSums {  // of one tile, along its columns
    float* losses;   // (BLOCK), softplus of the logits
    float* weights;  // (BLOCK), their sigmoids
};

struct GaussianSums {  // of one tile
    double total;          // with the pairs at distance 0
    float* row_others;     // (BLOCK), sums of a row's potentials without the pairs at distance 0
    float* column_others;
};

struct Kernels {
    const char* name;
    bool (*runs_here)();

    // tile[k][j] = sum_d slabs[k][d] panels[j][d], summed over d in order, DEPTH_AT_ONCE at a time
    void (*tile_products)(const float* panels, const float* slabs, int64_t rows, int64_t columns, int64_t depth,
                          float* tile);
    // x_grad[j] += sum_k tile[k][j] y[k], for `width` dimensions from the first of the slabs given; a row of x_grad has
    // `dimension` numbers
    void (*grad_rows)(const float* tile, const float* y_slabs, int64_t rows, int64_t columns, int64_t width,
                      int64_t dimension, float* x_grad);
    // y_grad[k] += sum_j tile[k][j] x[j], likewise
    void (*grad_columns)(const float* tile, const float* x_slabs, int64_t rows, int64_t columns, int64_t width,
                         int64_t dimension, float* y_grad);

    // Maximum and sum of exp(S - maximum) along rows and columns; any number at least as large may stand for a maximum.
    // Without columns_too the columns' arrays are not touched.
    void (*statistics)(const float* tile, int64_t rows, int64_t columns, bool columns_too, float* row_max,
                       float* row_sum, float* column_max, float* column_sum);
    // Logits become weights, in place.
    void (*contrastive_weights)(float* tile, int64_t rows, int64_t columns, const ContrastiveWeights& weights);
    void (*soft_weights)(float* tile, const float* momentum_tile, int64_t rows, int64_t columns,
                         const SoftWeights& weights);
    // Logits less the bias become weights, in place.
    void (*sigmoid_weights)(float* tile, int64_t rows, int64_t columns, float bias, const SigmoidSums& sums);
    // Inner products become potentials, in place; 0 where a pair is at distance 0. Such a pair has no gradient, and in
    // the difference that makes the gradient its two terms, by far the largest, would cancel and leave their rounding.
    // The norms of missing rows are infinite.
    void (*gaussian)(float* tile, int64_t rows, int64_t columns, const float* row_norms, const float* column_norms,
                     float t, GaussianSums& sums);
    // Counts for up to `rows` queries, one threshold each: above[j] += number of tile[k][j] that are not <= threshold.
    void (*count)(const float* tile, int64_t rows, int64_t columns, const float* thresholds, int32_t* above,
                  int32_t* ties);
    // dots[i] = <a_i, b_i> of two panels' 32 vectors, with the bits that tile_products gives.
    void (*panel_dots)(const float* a, const float* b, int64_t depth, float* dots);
};

#define MODSTRUCT_KERNELS(name)                                                                          \
    {#name, name::runs_here, name::tile_products, name::grad_rows, name::grad_columns, name::statistics, \
     name::contrastive_weights, name::soft_weights, name::sigmoid_weights, name::gaussian, name::count,  \
     name::panel_dots}

extern const Kernels portable_kernels;
#if defined(__x86_64__)
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
#endif

const Kernels& kernels_named(const std::string& instruction_set);

}  // namespace modstruct::cpu
