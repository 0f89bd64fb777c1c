// The kernels for x86-64 processors with AVX2.
#if defined(__x86_64__)
#include "kernels.h"

#include <immintrin.h>

namespace modstruct::cpu {

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
namespace avx2 {
namespace {

#define VECTOR_WIDTH 8
#define BLOCK_HEIGHT 6
#define MULTIPLY_ADD(a, b, c) ((Vector)_mm256_fmadd_ps((__m256)(a), (__m256)(b), (__m256)(c)))

#include "vector.h"
#include "products.h"
#include "tile_functions.h"

}  // namespace
}  // namespace avx2
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace avx2 {
namespace {
bool runs_here() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
}  // namespace
}  // namespace avx2

const Kernels avx2_kernels = MODSTRUCT_KERNELS(avx2);

}  // namespace modstruct::cpu
#endif
