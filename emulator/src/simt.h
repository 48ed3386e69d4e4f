// A CPU in the place of a GPU, for tests of CUDA kernels: the words of CUDA C++ that `node/src/kernels/cuda/device` uses.
//
// A grid's blocks run one after another. Each thread of a block is a fiber with a stack of its own; it runs until it waits for others (at
// a barrier, for a warp's exchange), and then the next one runs. So what races on a GPU may not race here: this shows whether the
// arithmetic and the addresses are right, not whether a barrier is missing everywhere.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <utility>

#define __global__
#define __device__
#define __shared__ static thread_local
#define __restrict__
#define __launch_bounds__(...)
#define DYNAMIC_SHARED(name) uint8_t *name = simt::shared_memory()

struct uint2 { uint32_t x, y; };
struct uint4 { uint32_t x, y, z, w; };
struct int2 { int x, y; };
struct float2 { float x, y; };
struct char4 { int8_t x, y, z, w; };
struct uint3 { unsigned x, y, z; };

using std::max;
using std::min;

namespace simt {
extern thread_local uint3 thread, block, block_size, grid_size;
uint8_t *shared_memory();
void wait_for_block();
void wait_for_warp();
// Room of 16 words for each lane of the calling fiber's warp.
uint32_t (*exchange())[16];

// Gives the `lane`th lane's value to the caller.
inline uint32_t shuffle(uint32_t value, unsigned lane) {
    exchange()[thread.x % 32][0] = value;
    wait_for_warp();
    uint32_t found = exchange()[lane % 32][0];
    wait_for_warp();
    return found;
}

typedef void (*Unpacked)(void *kernel, void **arguments);
struct Kernel {
    Kernel(const char *name, void *kernel, Unpacked call);
};

template <typename... A, size_t... I> void call(void (*kernel)(A...), void **arguments, std::index_sequence<I...>) {
    kernel(*static_cast<A *>(arguments[I])...);
}
template <typename... A> Unpacked unpacked(void (*)(A...)) {
    return [](void *kernel, void **arguments) {
        call(reinterpret_cast<void (*)(A...)>(kernel), arguments, std::index_sequence_for<A...>());
    };
}
} // namespace simt

#define EXPORT(name) static simt::Kernel exported_##name(#name, reinterpret_cast<void *>(&name), simt::unpacked(&name))

#define threadIdx simt::thread
#define blockIdx simt::block
#define blockDim simt::block_size
#define gridDim simt::grid_size

inline void __syncthreads() { simt::wait_for_block(); }
inline void __syncwarp() { simt::wait_for_warp(); }
inline float __shfl_xor_sync(unsigned, float x, int mask) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    bits = simt::shuffle(bits, (simt::thread.x % 32) ^ mask);
    memcpy(&x, &bits, 4);
    return x;
}
inline unsigned long long atomicAdd(unsigned long long *at, unsigned long long x) {
    unsigned long long before = *at;
    *at += x;
    return before;
}
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

inline float from_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
inline float to_float(bf16 x) { return from_bits((uint32_t)x.bits << 16); }
inline float to_float(f16 x) {
    uint32_t sign = (uint32_t)(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff;
    // one product mends the exponent, of subnormal numbers too
    float size = rest >= 0x7c00 ? from_bits(rest << 13 | 0x7f800000) : from_bits(rest << 13) * from_bits(0x77800000);
    return sign ? -size : size;
}
// to the nearest, ties to the even one
inline bf16 to_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if (x != x) return bf16{(uint16_t)(bits >> 16 | 64)};
    return bf16{(uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline f16 to_f16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    uint16_t sign = bits >> 16 & 0x8000;
    float size = fabsf(x);
    if (x != x) return f16{(uint16_t)(sign | 0x7e00)};
    if (size >= 65520.0f) return f16{(uint16_t)(sign | 0x7c00)};
    // below 2^-14 the last bit counts 2^-24: adding a number whose last bit counts as much rounds
    if (size < 6.103515625e-5f) {
        float rounded = size + 0.5f;
        memcpy(&bits, &rounded, 4);
        return f16{(uint16_t)(sign | (bits - 0x3f000000))};
    }
    memcpy(&bits, &size, 4);
    bits += 0xfff + (bits >> 13 & 1);
    return f16{(uint16_t)(sign | ((bits >> 13) - (112 << 10)))};
}

template <typename T> uint32_t pack(T a, T b) {
    uint16_t low, high;
    memcpy(&low, &a, 2), memcpy(&high, &b, 2);
    return low | (uint32_t)high << 16;
}
template <typename T> float unpack(uint32_t pair, int i) {
    uint16_t bits = (uint16_t)(pair >> (16 * i));
    T x;
    memcpy((void *)&x, &bits, 2);
    return to_float(x);
}
inline uint32_t subtract(uint32_t a, uint32_t b) {
    return pack(to_bf16(unpack<bf16>(a, 0) - unpack<bf16>(b, 0)), to_bf16(unpack<bf16>(a, 1) - unpack<bf16>(b, 1)));
}

// As the tensor core does it, but for the order of its sums.
template <typename T> void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], T) {
    unsigned lane = simt::thread.x % 32, g = lane / 4, t = lane % 4;
    uint32_t(*all)[16] = simt::exchange();
    for (int i = 0; i < 4; i++) all[lane][i] = a[i];
    for (int i = 0; i < 2; i++) all[lane][4 + i] = b[i];
    simt::wait_for_warp();
    for (int i = 0; i < 4; i++) {
        unsigned row = g + 8 * (i / 2), column = 2 * t + i % 2;
        for (unsigned k = 0; k < 16; k++) {
            unsigned owner = k % 8 / 2, upper = k / 8;
            float x = unpack<T>(all[4 * (row % 8) + owner][row / 8 + 2 * upper], k % 2);
            float y = unpack<T>(all[4 * column + owner][4 + upper], k % 2);
            d[i] += x * y;
        }
    }
    simt::wait_for_warp();
}
