// The three ways to form products: what 16 bytes of an operand hold, how weights are rounded for torch's products, one
// step over 32 bytes of depth, and the exponential.
#pragma once

#include <device.cuh>

#include "pairwise_cuda.h"

namespace modstruct::cuda {

constexpr float LOWEST = -3.402823466e38f;  // stands for the logarithm of 0: -inf would turn differences into NaN

// Tensor-core products carry logits in units of ln 2, so an exponential is one instruction.
struct BaseTwo {
    static constexpr float PER_NAT = 1.44269504f;
    static constexpr float NATS = 0.693147181f;
    static __device__ __forceinline__ float from_nats(float x) { return larger(LOWEST, x * PER_NAT); }
    static __device__ __forceinline__ float exponential(float x) { return power_of_two(x); }
    static __device__ __forceinline__ float logarithm(float x) { return log2f(x); }
};

struct BaseE {
    static constexpr float PER_NAT = 1.0f;
    static constexpr float NATS = 1.0f;
    static __device__ __forceinline__ float from_nats(float x) { return x; }
    static __device__ __forceinline__ float exponential(float x) { return expf(x); }
    static __device__ __forceinline__ float logarithm(float x) { return logf(x); }
};

struct Bf16 {
    using Base = BaseTwo;
    static constexpr bool TENSOR_CORES = true;
    static constexpr bool HALF_WEIGHTS = true;
    static constexpr int VALUES = 8;  // in 16 bytes
    static __device__ __forceinline__ float value(uint4 bytes, int i) {
        const uint32_t word = i < 4 ? (i < 2 ? bytes.x : bytes.y) : (i < 6 ? bytes.z : bytes.w);
        return __uint_as_float(i % 2 == 0 ? word << 16 : word & 0xffff0000u);
    }
    static __device__ __forceinline__ float rounded(float x) { return __uint_as_float(pack_bf16(x, 0.0f) << 16); }
    static __device__ __forceinline__ void multiply(float (&sum)[4], const uint32_t (&a)[4], uint32_t b_low,
                                                    uint32_t b_high) {
        multiply_bf16(sum, a, b_low, b_high);
    }
};

struct SinglePrecision {
    static constexpr bool HALF_WEIGHTS = false;
    static constexpr int VALUES = 4;
    static __device__ __forceinline__ float value(uint4 bytes, int i) {
        return __uint_as_float(i < 2 ? (i == 0 ? bytes.x : bytes.y) : (i == 2 ? bytes.z : bytes.w));
    }
};

struct Tf32 : SinglePrecision {
    using Base = BaseTwo;
    static constexpr bool TENSOR_CORES = true;
    static __device__ __forceinline__ float rounded(float x) { return round_tf32(x); }
    static __device__ __forceinline__ void multiply(float (&sum)[4], const uint32_t (&a)[4], uint32_t b_low,
                                                    uint32_t b_high) {
        multiply_tf32(sum, a, b_low, b_high);
    }
};

struct Float32 : SinglePrecision {
    using Base = BaseE;
    static constexpr bool TENSOR_CORES = false;
    static __device__ __forceinline__ float rounded(float x) { return x; }
};

// function(Kind{}) for the kind of a precision
template <class Function>
void with_kind(Precision precision, Function function) {
    switch (precision) {
        case Precision::bf16:
            return function(Bf16{});
        case Precision::tf32:
            return function(Tf32{});
        case Precision::float32:
            return function(Float32{});
    }
}

}  // namespace modstruct::cuda
