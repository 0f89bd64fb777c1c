// Terms over all pairs of two sets of vectors, tile by tile: what the CPU kernels offer to the bindings.
// Every array is row-major, float32, without gaps. Nothing here knows torch or Python.
//
// x: (rows, dimension), y: (columns, dimension), S_jk = scale <x_j, y_k>. The positive of row j is column first + j.
// Memory O((rows + columns) dimension), but for logits that the caller asks to keep. The bits of a result do not depend
// on the number of threads. A log-sum-exp over nothing is the lowest finite number.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace modstruct::cpu {

struct Pairs {
    const float* x;
    int64_t rows;
    const float* y;
    int64_t columns;
    int64_t dimension;
};

// row_lse[j] = log sum exp S_jk over all k but the positive; column_lse[k] = log sum exp S_jk over all j whose positive
// it is not; positive[j] = S_jk at the positive. The logits are kept where there is room for them.
struct ContrastiveStatistics {
    Pairs pairs;
    const float* scale;  // one number
    int64_t first;
    float* row_lse;     // (rows)
    float* column_lse;  // (columns)
    float* positive;    // (rows)
    float* logits;      // (kept_logits(rows, columns)), tile by tile, or null
};

// W_jk = row_weight_j exp(S_jk - row_lse_j) + column_weight_k exp(S_jk - column_lse_k), positive_weight_j at positives,
// with row_values = (row_lse, row_weight, positive_weight) and column_values = (column_lse, column_weight):
// x_grad += W y, y_grad += W^T x.
struct ContrastiveGrad {
    Pairs pairs;
    const float* scale;
    int64_t first;
    const float* row_values;     // (3, rows)
    const float* column_values;  // (2, columns)
    const float* logits;         // that contrastive_statistics kept, or null: they are formed again
    float* x_grad;  // (rows, dimension), zeros
    float* y_grad;  // (columns, dimension), zeros
};

// Cross entropy of each row's softmax against the target alpha P + (1 - alpha) onehot(positive), where P is the softmax
// of scale <momentum_j, y_k>. With n_j = log sum exp S_jk and n'_j the same of the momentum rows, both without the
// positive, and m_j, m'_j less the positive's logit:
//   losses_j = softplus(m_j) + alpha sum P_jk (S_j,positive - S_jk)
//   W_jk     = sigmoid(m_j) exp(S_jk - n_j) - alpha P_jk,  and at the positive minus the sum of the others, so that no
//              1 - p is ever formed: at scale 100 it would cancel to nothing.
// x_grad += W y, y_grad += W^T x.
struct RowContrast {
    Pairs pairs;
    const float* momentum;  // (rows, dimension), or null: alpha is 0 then
    const float* scale;
    int64_t first;
    float alpha;
    float* losses;  // (rows)
    float* x_grad;  // (rows, dimension), zeros, or null where no gradient is wanted
    float* y_grad;  // (columns, dimension), zeros, or null; not without x_grad
};

// Every pair by itself, with S_jk = scale <x_j, y_k> + bias and l_jk = 1 at the positive, else -1:
//   total = sum softplus(-l_jk S_jk),   W_jk = -l_jk sigmoid(-l_jk S_jk),   weight_total = sum W_jk
// x_grad += W y, y_grad += W^T x.
struct SigmoidContrast {
    Pairs pairs;
    const float* affine;  // scale and bias
    int64_t first;
    double* totals;  // total and weight_total
    float* x_grad;   // (rows, dimension), zeros, or null where no gradient is wanted
    float* y_grad;   // (columns, dimension), zeros, or null; not without x_grad
};

// G_jk = exp(-t |x_j - y_k|^2): total = sum_jk G_jk, x_grad_j += sum_k G_jk (y_k - x_j), y_grad_k += sum_j G_jk (x_j - y_k).
// symmetric: y is x. Each pair of different rows is computed once and counts for both; x_grad is then the whole gradient.
struct GaussianPotential {
    Pairs pairs;
    bool symmetric;
    float t;        // positive
    double* total;  // one number
    float* x_grad;  // (rows, dimension), zeros, or null where no gradient is wanted
    float* y_grad;  // (columns, dimension), zeros; null where symmetric
};

// For each pair (query, item): above = items that score higher than the pair's, ties = other items that score the same;
// a score is the inner product. Its bits depend on the two vectors alone, so equal items tie. An item with a NaN
// score counts as above, and a pair with a NaN score has all items above it.
struct NearestCounts {
    Pairs pairs;           // x: queries, y: items
    const int64_t* query;  // (count), ascending
    const int64_t* item;   // (count)
    int64_t count;
    int64_t* above;  // (count)
    int64_t* ties;   // (count)
};

// P = (A - a_center) + (B - b_center) and M = (A - B) - difference_center, formed in blocks: plus = P^T P, minus = M^T M.
struct GeometricRows {
    const float* a;  // (rows, dimension)
    const float* b;  // (rows, dimension)
    int64_t rows;
    int64_t dimension;
    const float* centers;  // (3, dimension): of a, of b, of their difference
};

struct GeometricProducts {
    GeometricRows rows;
    float* products;  // (2, dimension, dimension): plus and minus
};

// a_grad = P plus_weights + M minus_weights, b_grad = P plus_weights - M minus_weights
struct GeometricGrad {
    GeometricRows rows;
    const float* weights;  // (2, dimension, dimension): plus_weights and minus_weights
    float* a_grad;         // (rows, dimension)
    float* b_grad;         // (rows, dimension)
};

// instruction_set: one of instruction_sets_here(). Throws std::invalid_argument on any other.
struct Choice {
    std::string instruction_set;
    int threads;
};

void contrastive_statistics(const ContrastiveStatistics& problem, const Choice& choice);
void contrastive_grad(const ContrastiveGrad& problem, const Choice& choice);
void row_contrast(const RowContrast& problem, const Choice& choice);
void sigmoid_contrast(const SigmoidContrast& problem, const Choice& choice);
void gaussian_potential(const GaussianPotential& problem, const Choice& choice);
void geometric_products(const GeometricProducts& problem, const Choice& choice);
void geometric_grad(const GeometricGrad& problem, const Choice& choice);
void nearest_counts(const NearestCounts& problem, const Choice& choice);

// How many floats the logits of so many rows and columns take, in whole tiles.
int64_t kept_logits(int64_t rows, int64_t columns);

std::vector<std::string> instruction_sets_built();
std::vector<std::string> instruction_sets_here();  // what this machine can run of those built, the fastest last
bool built_with_openmp();

}  // namespace modstruct::cpu
