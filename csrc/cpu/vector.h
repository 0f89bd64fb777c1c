// Vectors and their exponential. Each instruction set's .cpp file includes this one, products.h and tile_functions.h
// inside a namespace and a target region of its own, after defining VECTOR_WIDTH, BLOCK_HEIGHT and MULTIPLY_ADD. So
// there is no include guard, and nothing of the standard library may be called: its templates are shared by the whole
// program and would be compiled for one processor only.

typedef float Vector __attribute__((vector_size(4 * VECTOR_WIDTH)));
typedef int32_t Mask __attribute__((vector_size(4 * VECTOR_WIDTH)));
typedef uint32_t Word __attribute__((vector_size(4 * VECTOR_WIDTH)));

#define INLINE static inline __attribute__((always_inline))

INLINE Vector load(const float* from) {
    Vector value;
    __builtin_memcpy(&value, from, sizeof value);
    return value;
}

INLINE void store(float* to, Vector value) { __builtin_memcpy(to, &value, sizeof value); }

// Less zero, since that changes no number and compiles to nothing; -0 + 0 would be another number, and an addition.
INLINE Vector broadcast(float value) { return value - Vector{}; }

// `yes` where the mask is set, else `no`.
INLINE Vector choose(Mask mask, Vector yes, Vector no) { return (Vector)((mask & (Mask)yes) | (~mask & (Mask)no)); }

INLINE Vector larger(Vector a, Vector b) { return choose(b > a, b, a); }  // a where b is NaN

INLINE float largest_lane(Vector v) {
    float value = v[0];
    for (int lane = 1; lane < VECTOR_WIDTH; ++lane) {
        value = v[lane] > value ? v[lane] : value;
    }
    return value;
}

INLINE float sum_of_lanes(Vector v) {
    float value = v[0];
    for (int lane = 1; lane < VECTOR_WIDTH; ++lane) {
        value += v[lane];
    }
    return value;
}

// log(1 + x) to about one unit in the last place, for x in [0, 1], which keeps the digits of a small x; NaN at NaN.
INLINE Vector log_of_one_plus(Vector x) {
    // log(1 + x) = 2 atanh(z), z = x / (2 + x) <= 1/3: the first term of the series left out is below 1e-9.
    const Vector z = x / (x + 2.0f);
    const Vector square = z * z;
    Vector series = broadcast(1.0f / 17);
    series = MULTIPLY_ADD(series, square, broadcast(1.0f / 15));
    series = MULTIPLY_ADD(series, square, broadcast(1.0f / 13));
    series = MULTIPLY_ADD(series, square, broadcast(1.0f / 11));
    series = MULTIPLY_ADD(series, square, broadcast(1.0f / 9));
    series = MULTIPLY_ADD(series, square, broadcast(1.0f / 7));
    series = MULTIPLY_ADD(series, square, broadcast(1.0f / 5));
    series = MULTIPLY_ADD(series, square, broadcast(1.0f / 3));
    return MULTIPLY_ADD(series * square, z, z) * 2.0f;
}

// exp(x) to about one unit in the last place, for x up to 88; exactly 1 at 0, 0 below the normal numbers, NaN at NaN.
INLINE Vector exponential(Vector x) {
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
