// The kernels for any machine.
#include "kernels.h"

#if defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace modstruct::cpu {
namespace portable {
namespace {

#define VECTOR_WIDTH 4
#if defined(__aarch64__)
#define BLOCK_HEIGHT 12
#define MULTIPLY_ADD(a, b, c) ((Vector)vfmaq_f32((float32x4_t)(c), (float32x4_t)(a), (float32x4_t)(b)))
#else
#define BLOCK_HEIGHT 6
#define MULTIPLY_ADD(a, b, c) ((a) * (b) + (c))
#endif

#include "vector.h"
#include "products.h"
#include "tile_functions.h"

bool runs_here() { return true; }

}  // namespace
}  // namespace portable

const Kernels portable_kernels = MODSTRUCT_KERNELS(portable);

}  // namespace modstruct::cpu
