// Terms over all pairs on the GPU: what the kernels offer to the bindings. The caller owns all memory, workspace too,
// and loops over panels of rows: so many rows at a time against all columns that the workspace stays small.
//
// Operands are copies made for the kernels: row-major, bfloat16 or float32, each row padded with zeros to a multiple
// of DEPTH_BYTES, its address a multiple of 16. For tf32 the caller has rounded them. Pointers are to device memory,
// that of the current device; nothing here waits for the device. Each function throws std::runtime_error with the
// kernel's name.
#pragma once

#include <cstdint>

namespace modstruct::cuda {

enum class Precision { float32, tf32, bf16 };

constexpr int TILE_ROWS = 128;
constexpr int TILE_COLUMNS = 256;
constexpr int NARROW_TILE_COLUMNS = 128;  // of kernels that hold two products at once
constexpr int DEPTH_BYTES = 64;           // a row's length is a multiple of it
constexpr int STORE_BYTES = 16;           // a row of weights is a multiple of it

// A panel of rows against all columns. S_jk = scale <rows_j, columns_k>; the positive of row j is column first + j.
struct Panel {
    const void* rows;
    int64_t row_count;
    const void* columns;
    int64_t column_count;
    int64_t row_bytes;  // of one row or column, padded
    int64_t first;
    const float* scale;  // one number
};

// Log-sum-exps over the negatives. Workspace: row_partials (column tiles, row_count, 2), column_partials (row tiles,
// column_count, 2), column_running (column_count, 2), kept from the first panel to the last.
struct ContrastiveStatistics {
    Panel panel;
    float* row_lse;     // (row_count)
    float* positive;    // (row_count)
    float* column_lse;  // (column_count), written with the last panel; null: rows only
    float* row_partials;
    float* column_partials;
    float* column_running;
    bool first_panel, last_panel;
};
void contrastive_statistics(const ContrastiveStatistics& problem, Precision precision, void* stream);

// weights_jk = row_weight_j exp(S_jk - row_lse_j) + column_weight_k exp(S_jk - column_lse_k), 0 at the positive.
struct ContrastiveWeights {
    Panel panel;
    const float* row_lse;
    const float* row_weight;
    const float* column_lse;  // null: rows only
    const float* column_weight;
    void* weights;           // (row_count, stride), bfloat16 or float32; columns from column_count on are undefined
    int64_t weights_stride;  // in numbers
};
void contrastive_weights(const ContrastiveWeights& problem, Precision precision, void* stream);

// S as above, M_jk = scale <momentum_rows_j, columns_k>; all sums over the negatives.
struct MomentumStatistics {
    Panel panel;
    const void* momentum_rows;
    const float* positive;  // (row_count), S at the positive
    float* row_lse;         // (row_count), of S
    float* momentum_lse;    // (row_count), of M
    float* gap;             // (row_count), the mean of positive_j - S_jk under weights exp(M_jk); 0 without negatives
    float* partials;        // workspace (column tiles, narrow, row_count, 2)
    float* momentum_partials;  // workspace (column tiles, narrow, row_count, 3)
};
void momentum_statistics(const MomentumStatistics& problem, Precision precision, void* stream);

// weights_jk = row_weight_j exp(S_jk - row_lse_j) - momentum_weight_j exp(M_jk - momentum_lse_j), 0 at the positive.
struct MomentumWeights {
    Panel panel;
    const void* momentum_rows;
    const float* row_lse;
    const float* row_weight;
    const float* momentum_lse;
    const float* momentum_weight;
    void* weights;
    int64_t weights_stride;
};
void momentum_weights(const MomentumWeights& problem, Precision precision, void* stream);

// Every pair but the positives by itself, S as above plus the bias. Adds sum softplus(S) and sum sigmoid(S) to totals.
struct SigmoidWeights {
    Panel panel;
    const float* bias;  // one number
    double* totals;     // (2)
    void* weights;      // (row_count, stride): sigmoid(S), 0 at the positive; null without gradients
    int64_t weights_stride;
    double* tile_sums;  // workspace (row tiles * column tiles, 2)
};
void sigmoid_weights(const SigmoidWeights& problem, Precision precision, void* stream);

// Squared lengths of `count` rows of an operand, summed in the order of the float32 products.
void squared_norms(const void* rows, int64_t count, int64_t row_bytes, Precision precision, float* norms,
                        void* stream);

// G_jk = exp(-t |row_j - column_k|^2). Adds to total, row_others and column_others.
struct GaussianPanel {
    Panel panel;             // scale and first are not read
    bool own;                // columns begin with the panel's rows: those from row_count on stand for two pairs each
    const float* row_norms;  // squared lengths
    const float* column_norms;
    float t;
    double* total;          // one number
    double* row_others;     // (row_count), sums of weights; null without gradients
    double* column_others;  // (column_count), likewise; with `own` only from row_count on
    void* weights;          // (row_count, stride): G, and 0 where row and column are equal; null without gradients
    int64_t weights_stride;
    double* tile_sums;       // workspace (row tiles * column tiles)
    float* row_partials;     // workspace (column tiles, row_count)
    float* column_partials;  // workspace (row tiles, column_count)
};
void gaussian_potential(const GaussianPanel& problem, Precision precision, void* stream);

// Scores are inner products. Pairs are ordered by query: row j has those from pair_offsets[j] up to the next offset.
struct PairScores {
    const void* queries;
    const void* gallery;
    int64_t row_bytes;
    const int64_t* pair_query;
    const int64_t* pair_gallery;
    int64_t pair_count;
    float* scores;  // (pair_count)
};
void pair_scores(const PairScores& problem, Precision precision, void* stream);

struct NearestCounts {
    Panel panel;                  // queries against the gallery; scale and first are not read
    const int64_t* pair_offsets;  // (row_count + 1)
    const int64_t* pair_gallery;  // of all pairs, as scores, above and ties
    const float* scores;
    int32_t* above;  // added to
    int32_t* ties;   // added to
};
void nearest_counts(const NearestCounts& problem, Precision precision, void* stream);

}  // namespace modstruct::cuda
