// The kernels for x86-64 processors with AVX-512.
#if defined(__x86_64__)
#include "kernels.h"

#include <immintrin.h>

namespace modstruct::cpu {

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx2,fma")
#endif
namespace avx512 {
namespace {

#define VECTOR_WIDTH 16
#define BLOCK_HEIGHT 12
#define MULTIPLY_ADD(a, b, c) ((Vector)_mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(c)))

#include "vector.h"
#include "products.h"
#include "tile_functions.h"

}  // namespace
}  // namespace avx512
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace avx512 {
namespace {
bool runs_here() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
}  // namespace
}  // namespace avx512

const Kernels avx512_kernels = MODSTRUCT_KERNELS(avx512);

}  // namespace modstruct::cpu
#endif
