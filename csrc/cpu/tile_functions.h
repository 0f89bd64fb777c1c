// What is done to the numbers of one tile, [column k][row j]: vectors run along the rows. Lanes behind the last row hold
// what packing's zeros made of them; they are computed too, and nobody reads them, except that statistics over columns
// wants them set to LOWEST.

// Between a row's or column's reference and that of its tile: so much lower, and a common exponential still keeps all
// the digits that matter, and another one for each row and column is not needed.
constexpr float COMMON_RANGE = 50.0f;

INLINE int64_t whole_vectors(int64_t rows) { return (rows + VECTOR_WIDTH - 1) / VECTOR_WIDTH * VECTOR_WIDTH; }

static void statistics(const float* tile, int64_t rows, int64_t columns, bool columns_too, float* row_max,
                       float* row_sum, float* column_max, float* column_sum) {
    const int64_t lanes = whole_vectors(rows);
    for (int64_t j = 0; j < lanes; j += VECTOR_WIDTH) {
        store(row_max + j, broadcast(LOWEST));
        store(row_sum + j, Vector{});
    }
    float top = LOWEST;
    float lowest_column = -LOWEST;
    for (int64_t k = 0; k < columns; ++k) {
        Vector column = broadcast(LOWEST);
        for (int64_t j = 0; j < lanes; j += VECTOR_WIDTH) {
            const Vector value = load(tile + k * BLOCK + j);
            store(row_max + j, larger(load(row_max + j), value));
            column = larger(column, value);
        }
        const float maximum = largest_lane(column);
        top = maximum > top ? maximum : top;
        if (columns_too) {
            column_max[k] = maximum;
            lowest_column = maximum < lowest_column ? maximum : lowest_column;
        }
    }
    float lowest_row = -LOWEST;
    for (int64_t j = 0; j < rows; ++j) {
        lowest_row = row_max[j] < lowest_row ? row_max[j] : lowest_row;
    }
    if (columns_too && lowest_row > top - COMMON_RANGE && lowest_column > top - COMMON_RANGE) {
        for (int64_t k = 0; k < columns; ++k) {
            Vector column = {};
            for (int64_t j = 0; j < lanes; j += VECTOR_WIDTH) {
                const Vector value = exponential(load(tile + k * BLOCK + j) - top);
                store(row_sum + j, load(row_sum + j) + value);
                column += value;
            }
            column_max[k] = top;
            column_sum[k] = sum_of_lanes(column);
        }
        for (int64_t j = 0; j < lanes; j += VECTOR_WIDTH) {
            store(row_max + j, broadcast(top));
        }
        return;
    }
    for (int64_t k = 0; k < columns; ++k) {
        Vector column = {};
        for (int64_t j = 0; j < lanes; j += VECTOR_WIDTH) {
            const Vector value = load(tile + k * BLOCK + j);
            store(row_sum + j, load(row_sum + j) + exponential(value - load(row_max + j)));
            if (columns_too) {
                column += exponential(value - column_max[k]);
            }
        }
        if (columns_too) {
            column_sum[k] = sum_of_lanes(column);
        }
    }
}

static void contrastive_weights(float* tile, int64_t rows, int64_t columns, const ContrastiveWeights& w) {
    const int64_t lanes = whole_vectors(rows);
    float top = LOWEST;
    float bottom = -LOWEST;
    for (int64_t j = 0; j < rows; ++j) {
        top = w.row_lse[j] > top ? w.row_lse[j] : top;
        bottom = w.row_lse[j] < bottom ? w.row_lse[j] : bottom;
    }
    for (int64_t k = 0; k < columns; ++k) {
        top = w.column_lse[k] > top ? w.column_lse[k] : top;
        bottom = w.column_lse[k] < bottom ? w.column_lse[k] : bottom;
    }
    if (bottom > top - COMMON_RANGE) {
        float factors[BLOCK];  // row_weight_j exp(top - row_lse_j)
        for (int64_t j = 0; j < lanes; j += VECTOR_WIDTH) {
            store(factors + j, exponential(top - load(w.row_lse + j)) * load(w.row_weight + j));
        }
        for (int64_t k = 0; k < columns; ++k) {
            const Vector factor = exponential(broadcast(top - w.column_lse[k])) * w.column_weight[k];
            for (int64_t j = 0; j < lanes; j += VECTOR_WIDTH) {
                float* place = tile + k * BLOCK + j;
                store(place, exponential(load(place) - top) * (load(factors + j) + factor));
            }
        }
        return;
    }
    for (int64_t k = 0; k < columns; ++k) {
        for (int64_t j = 0; j < lanes; j += VECTOR_WIDTH) {
            float* place = tile + k * BLOCK + j;
            const Vector row = exponential(load(place) - load(w.row_lse + j)) * load(w.row_weight + j);
            const Vector column = exponential(load(place) - w.column_lse[k]) * w.column_weight[k];
            store(place, row + column);
        }
    }
}

static void soft_weights(float* tile, const float* momentum_tile, int64_t rows, int64_t columns, const SoftWeights& w) {
    for (int64_t j = 0; j < whole_vectors(rows); j += VECTOR_WIDTH) {
        const Vector lse = load(w.row_lse + j);
        const Vector weight = load(w.row_weight + j);
        if (w.momentum_lse == nullptr) {
            for (int64_t k = 0; k < columns; ++k) {
                float* place = tile + k * BLOCK + j;
                store(place, exponential(load(place) - lse) * weight);
            }
            continue;
        }
        const Vector momentum_lse = load(w.momentum_lse + j);
        const Vector momentum_weight = load(w.momentum_weight + j);
        const Vector positive = load(w.positive + j);
        Vector loss = {};
        for (int64_t k = 0; k < columns; ++k) {
            float* place = tile + k * BLOCK + j;
            const Vector logit = load(place);
            const Vector target = exponential(load(momentum_tile + k * BLOCK + j) - momentum_lse) * momentum_weight;
            // Where a logit was taken out as LOWEST its target is 0, and 0 times LOWEST must not become NaN.
            loss += choose(target == Vector{}, Vector{}, target * (positive - logit));
            store(place, exponential(logit - lse) * weight - target);
        }
        store(w.soft_loss + j, loss);
    }
}

static void sigmoid_weights(float* tile, int64_t rows, int64_t columns, float bias, const SigmoidSums& sums) {
    for (int64_t j = 0; j < whole_vectors(rows); j += VECTOR_WIDTH) {
        Vector losses = {};
        Vector weights = {};
        for (int64_t k = 0; k < columns; ++k) {
            float* place = tile + k * BLOCK + j;
            const Vector logit = load(place) + bias;
            const Mask negative = logit < Vector{};  // false at NaN
            const Vector small = exponential(choose(negative, logit, -logit));
            const Vector weight = choose(negative, small, broadcast(1.0f)) / (small + 1.0f);
            losses += choose(negative, Vector{}, logit) + log_of_one_plus(small);
            weights += weight;
            store(place, weight);
        }
        store(sums.losses + j, losses);
        store(sums.weights + j, weights);
    }
}

static void gaussian(float* tile, int64_t rows, int64_t columns, const float* row_norms, const float* column_norms,
                     float t, GaussianSums& sums) {
    const int64_t lanes = whole_vectors(rows);
    for (int64_t j = 0; j < lanes; j += VECTOR_WIDTH) {
        store(sums.row_others + j, Vector{});
    }
    Mask equal = {};
    sums.total = 0;
    for (int64_t k = 0; k < columns; ++k) {
        Vector column = {};
        for (int64_t j = 0; j < lanes; j += VECTOR_WIDTH) {
            float* place = tile + k * BLOCK + j;
            Vector square = MULTIPLY_ADD(broadcast(-2.0f), load(place), load(row_norms + j) + column_norms[k]);
            square = choose(square < Vector{}, Vector{}, square);  // NaN stays
            const Mask same = square == Vector{};
            const Vector potential = choose(same, Vector{}, exponential(square * -t));
            equal -= same;
            store(place, potential);
            store(sums.row_others + j, load(sums.row_others + j) + potential);
            column += potential;
        }
        sums.column_others[k] = sum_of_lanes(column);
        sums.total += static_cast<double>(sums.column_others[k]);
    }
    for (int lane = 0; lane < VECTOR_WIDTH; ++lane) {
        sums.total += equal[lane];
    }
}

static void count(const float* tile, int64_t rows, int64_t columns, const float* thresholds, int32_t* above,
                  int32_t* ties) {
    for (int64_t j = 0; j < whole_vectors(rows); j += VECTOR_WIDTH) {
        const Vector threshold = load(thresholds + j);
        Mask more = {};
        Mask same = {};
        for (int64_t k = 0; k < columns; ++k) {
            const Vector score = load(tile + k * BLOCK + j);
            more -= ~(score <= threshold);
            same -= score == threshold;
        }
        for (int lane = 0; lane < VECTOR_WIDTH && j + lane < rows; ++lane) {
            above[j + lane] = more[lane];
            ties[j + lane] = same[lane];
        }
    }
}
