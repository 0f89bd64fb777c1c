// The instructions and the launch that only a GPU has. Every other file of csrc/cuda is plain C++ with CUDA's own
// names, and finds this one as <device.cuh>: tests/cuda_on_cpu has another of the same content, which runs on a CPU.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace modstruct::cuda {

// 16 bytes from global to shared memory, zeros where they are not `valid`. Done when copies_wait says so.
__device__ __forceinline__ void copy_start(void* shared, const void* global, bool valid) {
    const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    const int bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes)
                 : "memory");
}

// Ends a group of copies of this thread; a group may be empty.
__device__ __forceinline__ void copies_end_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Returns when all groups of this thread but the last PENDING are done.
template <int PENDING>
__device__ __forceinline__ void copies_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Four 8 x 8 matrices of 16-bit numbers: lane l names row l % 8 of matrix l / 8, 16 bytes of shared memory, and gets
// 32 bits of row l / 4, the (l % 4)-th, of each matrix.
__device__ __forceinline__ void load_matrices(uint32_t (&part)[4], const void* row) {
    const uint32_t from = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(part[0]), "=r"(part[1]), "=r"(part[2]), "=r"(part[3])
                 : "r"(from)
                 : "memory");
}

// sum (16 x 8) += a (16 x 16, bfloat16) b (16 x 8)
__device__ __forceinline__ void multiply_bf16(float (&sum)[4], const uint32_t (&a)[4], uint32_t b_low,
                                              uint32_t b_high) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b_low), "r"(b_high));
}

// sum (16 x 8) += a (16 x 8, tf32: the low 13 bits of a float32 are not read) b (8 x 8)
__device__ __forceinline__ void multiply_tf32(float (&sum)[4], const uint32_t (&a)[4], uint32_t b_low,
                                              uint32_t b_high) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b_low), "r"(b_high));
}

// The larger; NaN if either is (fmaxf drops it).
__device__ __forceinline__ float larger(float a, float b) {
    float value;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(value) : "f"(a), "f"(b));
    return value;
}

// 2^x within 2^-22 of its value; 0 below the normal numbers.
__device__ __forceinline__ float power_of_two(float x) {
    float value;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(value) : "f"(x));
    return value;
}

// Two bfloat16, rounded to nearest, the first in the low half.
__device__ __forceinline__ uint32_t pack_bf16(float first, float second) {
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
    return pair;
}

// To the 10 bits behind the point that a tensor core reads of a float32, ties away from zero.
__device__ __forceinline__ float round_tf32(float x) {
    uint32_t bits;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
    return __uint_as_float(bits);
}

inline void check(cudaError_t status, const char* kernel) {
    if (status != cudaSuccess) {
        throw std::runtime_error(std::string(kernel) + ": " + cudaGetErrorString(status));
    }
}

template <class Kernel>
__global__ void __launch_bounds__(Kernel::THREADS)
    entry(const __grid_constant__ typename Kernel::Parameters parameters) {
    extern __shared__ __align__(128) unsigned char shared[];
    Kernel::run(parameters, shared);
}

// Queues Kernel::run(parameters, shared memory) on `blocks` blocks. Throws std::runtime_error with the kernel's name.
template <class Kernel>
void launch(const typename Kernel::Parameters& parameters, int64_t blocks, void* stream) {
    if (Kernel::SHARED_BYTES > 48 * 1024) {
        check(cudaFuncSetAttribute(entry<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize, Kernel::SHARED_BYTES),
              Kernel::NAME);
    }
    entry<Kernel><<<static_cast<unsigned>(blocks), Kernel::THREADS, Kernel::SHARED_BYTES,
                    static_cast<cudaStream_t>(stream)>>>(parameters);
    check(cudaGetLastError(), Kernel::NAME);
}

}  // namespace modstruct::cuda
