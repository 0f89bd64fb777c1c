// csrc/cuda/gpu/device.cuh on a CPU. Fragment layouts are those of the PTX ISA, "Matrix multiply-accumulate operation
// using mma instruction"; with lane l, g = l / 4 and t = l % 4:
//   ldmatrix .x4     lane l names row l % 8 of matrix l / 8; register i gets elements 2t, 2t + 1 of row g of matrix i
//   m16n8k16 (bf16)  a0: row g, columns 2t, 2t+1   a1: row g + 8, the same   a2, a3: those rows, columns 2t+8, 2t+9
//                    b0: rows 2t, 2t+1, column g       b1: rows 2t+8, 2t+9, column g
//   m16n8k8 (tf32)   a0: row g, column t   a1: row g + 8, column t   a2, a3: rows g, g + 8, column t + 4
//                    b0: row t, column g   b1: row t + 4, column g
//   sums of both     c0, c1: row g, columns 2t, 2t+1   c2, c3: row g + 8, the same
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>

#include "thread_block.h"

#define __device__
#define __host__
#define __forceinline__ inline

struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }

inline float __uint_as_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
inline uint32_t __float_as_uint(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline void __syncthreads() { cuda_on_cpu::barrier(); }
inline void __syncwarp() {
    int none = 0;
    cuda_on_cpu::together(0xffffffffu, &none, [](void* const*) {});
}

template <class Number>
Number __shfl_xor_sync(uint32_t mask, Number value, int lane_mask) {
    struct Operands {
        Number value, result;
        int lane_mask;
    } own = {value, value, lane_mask};
    cuda_on_cpu::together(mask, &own, [](void* const* of_lanes) {
        for (int lane = 0; lane < cuda_on_cpu::LANES; ++lane) {
            if (auto* operands = static_cast<Operands*>(of_lanes[lane])) {
                const void* other = of_lanes[lane ^ operands->lane_mask];
                // Reading a lane outside the mask is undefined: give what no test would pass with.
                operands->result = other ? static_cast<const Operands*>(other)->value : static_cast<Number>(-12345);
            }
        }
    });
    return own.result;
}

inline int atomicAdd(int* to, int value) {
    const int before = *to;
    *to += value;
    return before;
}

namespace modstruct::cuda {

inline void copy_start(void* shared, const void* global, bool valid) {
    if ((reinterpret_cast<uintptr_t>(shared) | (valid ? reinterpret_cast<uintptr_t>(global) : 0)) % 16 != 0) {
        cuda_on_cpu::fail("cp.async of 16 bytes from or to an address that is no multiple of 16");
    }
    cuda_on_cpu::copy_start(shared, global, 16, valid);
}
inline void copies_end_group() { cuda_on_cpu::copies_end_group(); }
template <int PENDING>
void copies_wait() {
    cuda_on_cpu::copies_wait(PENDING);
}

inline void load_matrices(uint32_t (&part)[4], const void* row) {
    struct Operands {
        uint32_t* part;
        const unsigned char* row;
    } own = {part, static_cast<const unsigned char*>(row)};
    cuda_on_cpu::together(0xffffffffu, &own, [](void* const* of_lanes) {
        for (int matrix = 0; matrix < 4; ++matrix) {
            unsigned banks = 0;  // in groups of 16 bytes
            for (int line = 0; line < 8; ++line) {
                const auto* source = static_cast<const Operands*>(of_lanes[matrix * 8 + line]);
                banks |= 1u << reinterpret_cast<uintptr_t>(source->row) / 16 % 8;
            }
            if (banks != 0xff) {
                cuda_on_cpu::fail("ldmatrix reads two rows from the same banks: right, but slow");
            }
            for (int lane = 0; lane < cuda_on_cpu::LANES; ++lane) {
                const auto* source = static_cast<const Operands*>(of_lanes[matrix * 8 + lane / 4]);
                std::memcpy(static_cast<Operands*>(of_lanes[lane])->part + matrix, source->row + lane % 4 * 4, 4);
            }
        }
    });
}

struct MultiplyOperands {
    float* sum;
    const uint32_t* a;
    uint32_t b[2];
};

// element(word, i): the i-th number of a register, of PER_WORD. DEPTH is 8 PER_WORD.
template <int PER_WORD, class Element>
void multiply_lanes(void* const* of_lanes, Element element) {
    constexpr int DEPTH = 8 * PER_WORD;
    float a[16][DEPTH];
    float b[DEPTH][8];
    for (int lane = 0; lane < cuda_on_cpu::LANES; ++lane) {
        const auto& own = *static_cast<const MultiplyOperands*>(of_lanes[lane]);
        const int g = lane / 4;
        const int t = lane % 4;
        for (int word = 0; word < 4; ++word) {
            for (int i = 0; i < PER_WORD; ++i) {
                a[g + word % 2 * 8][PER_WORD * t + i + word / 2 * 4 * PER_WORD] = element(own.a[word], i);
            }
        }
        for (int word = 0; word < 2; ++word) {
            for (int i = 0; i < PER_WORD; ++i) {
                b[PER_WORD * t + i + word * 4 * PER_WORD][g] = element(own.b[word], i);
            }
        }
    }
    for (int lane = 0; lane < cuda_on_cpu::LANES; ++lane) {
        float* sum = static_cast<const MultiplyOperands*>(of_lanes[lane])->sum;
        for (int i = 0; i < 4; ++i) {
            const int row = lane / 4 + i / 2 * 8;
            const int column = lane % 4 * 2 + i % 2;
            double total = 0;
            for (int d = 0; d < DEPTH; ++d) {
                total += static_cast<double>(a[row][d]) * static_cast<double>(b[d][column]);
            }
            sum[i] = static_cast<float>(static_cast<double>(sum[i]) + total);
        }
    }
}

inline void multiply_bf16(float (&sum)[4], const uint32_t (&a)[4], uint32_t b_low, uint32_t b_high) {
    MultiplyOperands own = {sum, a, {b_low, b_high}};
    cuda_on_cpu::together(0xffffffffu, &own, [](void* const* of_lanes) {
        multiply_lanes<2>(of_lanes, [](uint32_t word, int i) {
            return __uint_as_float(i == 0 ? word << 16 : word & 0xffff0000u);
        });
    });
}

inline void multiply_tf32(float (&sum)[4], const uint32_t (&a)[4], uint32_t b_low, uint32_t b_high) {
    MultiplyOperands own = {sum, a, {b_low, b_high}};
    cuda_on_cpu::together(0xffffffffu, &own, [](void* const* of_lanes) {
        multiply_lanes<1>(of_lanes, [](uint32_t word, int) {
            const float value = __uint_as_float(word);
            return value != value ? value : __uint_as_float(word & 0xffffe000u);
        });
    });
}

inline float larger(float a, float b) { return a != a || b != b ? NAN : std::max(a, b); }

inline float power_of_two(float x) {
    const float value = std::exp2(x);
    return value < 1.17549435e-38f ? 0.0f : value;
}

inline uint32_t pack_bf16(float first, float second) {
    const auto rounded = [](float value) -> uint32_t {
        const uint32_t bits = __float_as_uint(value);
        return value != value ? 0x7fffu : (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
    };
    return rounded(first) | rounded(second) << 16;
}

inline float round_tf32(float x) {
    return std::isfinite(x) ? __uint_as_float((__float_as_uint(x) + 0x1000u) & 0xffffe000u) : x;
}

// One block after the other, each with shared memory that starts as NaN.
template <class Kernel>
void launch(const typename Kernel::Parameters& parameters, int64_t blocks, void*) {
    const size_t bytes = std::max(Kernel::SHARED_BYTES, 16);
    const std::unique_ptr<unsigned char, void (*)(void*)> shared(
        static_cast<unsigned char*>(std::aligned_alloc(128, (bytes + 127) / 128 * 128)), std::free);
    for (int64_t block = 0; block < blocks; ++block) {
        std::memset(shared.get(), 0xff, bytes);
        cuda_on_cpu::run_block(static_cast<unsigned>(block), Kernel::THREADS,
                               [&] { Kernel::run(parameters, shared.get()); });
    }
}

}  // namespace modstruct::cuda
