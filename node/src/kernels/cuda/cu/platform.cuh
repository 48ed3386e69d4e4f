// What kernels ask of the machine: nvcc's own words and a few instructions of the tensor cores. Under EMULATED the same names come
// from `emulator/src/simt.h`, and the kernels run on a CPU, thread by thread, so that they can be tested where there is no GPU.
#pragma once
#include <stdint.h>
#include <string.h>

#ifdef EMULATED
#include "simt.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define EXPORT(name)
#define DYNAMIC_SHARED(name) extern __shared__ __align__(16) uint8_t name[]

typedef __nv_bfloat16 bf16;
typedef __half f16;

__device__ inline float to_float(bf16 x) { return __bfloat162float(x); }
__device__ inline float to_float(f16 x) { return __half2float(x); }
__device__ inline bf16 to_bf16(float x) { return __float2bfloat16(x); }
__device__ inline f16 to_f16(float x) { return __float2half(x); }

// two values in one register, the first in its lower half
__device__ inline uint32_t pack(bf16 a, bf16 b) {
    __nv_bfloat162 pair = __halves2bfloat162(a, b);
    return *reinterpret_cast<uint32_t *>(&pair);
}
__device__ inline uint32_t pack(f16 a, f16 b) {
    __half2 pair = __halves2half2(a, b);
    return *reinterpret_cast<uint32_t *>(&pair);
}

// a - b of two pairs of bf16
__device__ inline uint32_t subtract(uint32_t a, uint32_t b) {
    __nv_bfloat162 d = __hsub2(*reinterpret_cast<__nv_bfloat162 *>(&a), *reinterpret_cast<__nv_bfloat162 *>(&b));
    return *reinterpret_cast<uint32_t *>(&d);
}

// d[16 x 8] += a[16 x 16] * b[16 x 8] by a warp. With lane = 4g + t: a[0], a[1] hold rows g, g + 8 at columns 2t, 2t + 1; a[2], a[3] the
// same at columns 2t + 8, 2t + 9; b[0], b[1] hold column g at rows 2t, 2t + 1 and 2t + 8, 2t + 9; d[0], d[1] hold row g at columns 2t,
// 2t + 1, and d[2], d[3] row g + 8 (PTX ISA, mma.m16n8k16).
__device__ inline void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bf16) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ inline void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], f16) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#endif

__device__ inline uint32_t float_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof(bits));
    return bits;
}

template <typename T> __device__ T from_float(float x);
template <> __device__ inline bf16 from_float<bf16>(float x) { return to_bf16(x); }
template <> __device__ inline f16 from_float<f16>(float x) { return to_f16(x); }
template <> __device__ inline float from_float<float>(float x) { return x; }
__device__ inline float to_float(float x) { return x; }

constexpr int LANES = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;

__device__ inline int lane_id() { return threadIdx.x % LANES; }
__device__ inline int warp_id() { return threadIdx.x / LANES; }

__device__ inline float warp_sum(float x) {
#pragma unroll
    for (int step = LANES / 2; step > 0; step /= 2) x += __shfl_xor_sync(ALL_LANES, x, step);
    return x;
}

// The sum over all threads of a block, which each of them gets; `room` holds a value for each warp.
__device__ inline float block_sum(float x, float *room) {
    x = warp_sum(x);
    if (lane_id() == 0) room[warp_id()] = x;
    __syncthreads();
    float sum = 0;
    for (int w = 0; w < (int)blockDim.x / LANES; w++) sum += room[w];
    __syncthreads();
    return sum;
}
