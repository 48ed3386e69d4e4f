// out[T, N] (+)= x[T, K] @ W^T: a block of threads for 16 outputs and up to 8 * TILES rows, its warps taking turns along K.
//
// Tensor cores multiply 16 outputs by 8 rows, so the weights are what is read once, in the widest loads there are, and a row's sum is
// made in one order whatever stands beside it.
#pragma once
#include "platform.cuh"

constexpr int OUTPUTS = 16;
constexpr int GROUP = 32;
constexpr int LINEAR_WARPS = 4;

// Rows of 16 bits, as they are.
struct Dense {
    static constexpr int BITS = 16;
    static constexpr bool HAS_MIN = false, HAS_HALVES = false;
};
// Tiles of 16 outputs by 32 inputs of 4 or 8 bits, with a scale for each output, or one for each half of its 32 inputs, or a minimum.
template <int B, bool M, bool H> struct Packed {
    static constexpr int BITS = B;
    static constexpr bool HAS_MIN = M, HAS_HALVES = H;
};
typedef Packed<4, false, false> Four;
typedef Packed<4, true, false> FourMin;
typedef Packed<8, false, false> Eight;
typedef Packed<8, true, false> EightMin;
typedef Packed<8, false, true> EightHalves;

// Two values of 4 bits, 16 bits apart, as bf16: 0x4300 is 128, whose last bit counts one.
template <bool HAS_MIN> __device__ inline uint32_t widen4(uint32_t bits) {
    return subtract((bits & 0x000f000f) | 0x43004300, HAS_MIN ? 0x43004300 : 0x43084308);
}

// Two values of 8 bits less 128, 16 bits apart: those from 128 on are less by 128, the others by 256.
__device__ inline uint32_t widen8(uint32_t bits) {
    return subtract((bits & 0x007f007f) | 0x43004300, 0x43804380 - (bits & 0x00800080));
}

// A lane's share of a tile: for rows g and g + 8, the four inputs from 16 * step + 4t on, of both steps; pair j of a row is inputs
// 2j, 2j + 1 of the eight, 16 bits apart.
template <typename F> struct Share {
    uint32_t words[F::BITS == 4 ? 2 : 4];

    __device__ inline void load(const uint8_t *tiles, size_t tile) {
        const uint8_t *at = tiles + (tile * LANES + lane_id()) * sizeof(words);
        if (F::BITS == 4) {
            uint2 v = *reinterpret_cast<const uint2 *>(at);
            words[0] = v.x, words[1] = v.y;
        } else {
            uint4 v = *reinterpret_cast<const uint4 *>(at);
            words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
        }
    }

    // Row g (0) or g + 8 (1), pair j.
    __device__ inline uint32_t pair(int row, int j) const {
        if (F::BITS == 4) return widen4<F::HAS_MIN>(words[row] >> (4 * j));
        return widen8(words[2 * row + j / 2] >> (8 * (j % 2)));
    }

    __device__ inline void fragment(int step, uint32_t (&a)[4]) const {
        a[0] = pair(0, 2 * step), a[1] = pair(1, 2 * step), a[2] = pair(0, 2 * step + 1), a[3] = pair(1, 2 * step + 1);
    }
};

// 16 x 32 weights times 8 * TILES rows, added to `sums`.
template <typename F, int TILES> struct Multiply;

template <int TILES> struct Multiply<Dense, TILES> {
    const bf16 *weights;
    __device__ inline void run(int n0, int group, int N, int K, const bf16 *x, int T, const float *, float (&sums)[TILES][4]) const {
        // lane t has inputs 8t to 8t + 7: four for each step
        int g = lane_id() / 4, t = lane_id() % 4;
        size_t k = (size_t)group * GROUP + 8 * t;
        uint4 zero = {0, 0, 0, 0};
        uint4 low = n0 + g < N ? *reinterpret_cast<const uint4 *>(weights + (size_t)(n0 + g) * K + k) : zero;
        uint4 high = n0 + g + 8 < N ? *reinterpret_cast<const uint4 *>(weights + (size_t)(n0 + g + 8) * K + k) : zero;
        uint32_t first[4] = {low.x, high.x, low.y, high.y}, second[4] = {low.z, high.z, low.w, high.w};
#pragma unroll
        for (int i = 0; i < TILES; i++) {
            int row = 8 * i + g;
            uint4 v = row < T ? *reinterpret_cast<const uint4 *>(x + (size_t)row * K + k) : zero;
            uint32_t b[2] = {v.x, v.y}, c[2] = {v.z, v.w};
            mma(sums[i], first, b, bf16());
            mma(sums[i], second, c, bf16());
        }
    }
};

template <int B, bool M, bool H, int TILES> struct Multiply<Packed<B, M, H>, TILES> {
    typedef Packed<B, M, H> F;
    const uint8_t *tiles;
    // of rows g, g + 8 beside each other: for each tile 8 pairs, or 16 where halves have their own
    const f16 *scales;
    const f16 *mins;

    __device__ inline void run(int n0, int group, int, int K, const bf16 *x, int T, const float *x_sums, float (&sums)[TILES][4]) const {
        int g = lane_id() / 4, t = lane_id() % 4, groups = K / GROUP;
        size_t tile = (size_t)(n0 / OUTPUTS) * groups + group;
        Share<F> share;
        share.load(tiles, tile);
        float products[TILES][4] = {};
#pragma unroll
        for (int step = 0; step < 2; step++) {
            uint32_t a[4];
            share.fragment(step, a);
            const f16 *d = scales + (H ? 2 * tile + step : tile) * OUTPUTS + 2 * g;
            float low = to_float(d[0]), high = to_float(d[1]);
#pragma unroll
            for (int i = 0; i < TILES; i++) {
                int row = 8 * i + g;
                uint2 v = {0, 0};
                if (row < T) v = *reinterpret_cast<const uint2 *>(x + (size_t)row * K + group * GROUP + 16 * step + 4 * t);
                uint32_t b[2] = {v.x, v.y};
                mma(products[i], a, b, bf16());
                if (!H && step == 0) continue;
                sums[i][0] += low * products[i][0], sums[i][1] += low * products[i][1];
                sums[i][2] += high * products[i][2], sums[i][3] += high * products[i][3];
                if (H) products[i][0] = products[i][1] = products[i][2] = products[i][3] = 0;
            }
        }
        if (!M) return;
        const f16 *m = mins + tile * OUTPUTS + 2 * g;
        float low = to_float(m[0]), high = to_float(m[1]);
#pragma unroll
        for (int i = 0; i < TILES; i++) {
#pragma unroll
            for (int column = 0; column < 2; column++) {
                int row = 8 * i + 2 * t + column;
                float sum = row < T ? x_sums[(size_t)row * groups + group] : 0.0f;
                sums[i][column] += low * sum, sums[i][2 + column] += high * sum;
            }
        }
    }
};

// Block x computes outputs 16x to 16x + 15, block y rows 8 * TILES * y onwards; `stride` is from one row of `out` to the next.
template <typename F, int TILES>
__device__ void linear(Multiply<F, TILES> weights, const bf16 *x, const float *x_sums, float *out, int T, int N, int K, int stride, int add) {
    int first_row = blockIdx.y * 8 * TILES, groups = K / GROUP, n0 = blockIdx.x * OUTPUTS;
    x += (size_t)first_row * K, out += (size_t)first_row * stride, T -= first_row;
    if (F::HAS_MIN) x_sums += (size_t)first_row * groups;
    float sums[TILES][4] = {};
#pragma unroll 4
    for (int group = warp_id(); group < groups; group += LINEAR_WARPS) weights.run(n0, group, N, K, x, T, x_sums, sums);

    __shared__ float shared[LINEAR_WARPS][TILES][4][LANES];
#pragma unroll
    for (int i = 0; i < TILES; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) shared[warp_id()][i][j][lane_id()] = sums[i][j];
    __syncthreads();
    for (int at = threadIdx.x; at < TILES * 8 * OUTPUTS; at += blockDim.x) {
        int row = at / OUTPUTS, output = at % OUTPUTS;
        if (row >= T || n0 + output >= N) continue;
        int column = row % 8, lane = (output % 8) * 4 + column / 2, j = (output / 8) * 2 + column % 2;
        float sum = 0;
#pragma unroll
        for (int w = 0; w < LINEAR_WARPS; w++) sum += shared[w][row / 8][j][lane];
        float *to = out + (size_t)row * stride + n0 + output;
        *to = add ? *to + sum : sum;
    }
}

#define DENSE(tiles)                                                                                                               \
    extern "C" __global__ void __launch_bounds__(LINEAR_WARPS * LANES)                                                             \
        linear_dense_##tiles(const bf16 *w, const bf16 *x, float *out, int T, int N, int K, int stride, int add) {                             \
        linear<Dense, tiles>(Multiply<Dense, tiles>{w}, x, nullptr, out, T, N, K, stride, add);                                            \
    }                                                                                                                              \
    EXPORT(linear_dense_##tiles)
DENSE(1);
DENSE(2);
DENSE(4);
DENSE(8);

#define PACKED(name, F, tiles)                                                                                                     \
    extern "C" __global__ void __launch_bounds__(LINEAR_WARPS * LANES)                                                             \
        linear_##name##_##tiles(const uint8_t *w, const f16 *scales, const f16 *mins, const bf16 *x, const float *x_sums,          \
                                float *out, int T, int N, int K, int stride, int add) {                                                        \
        linear<F, tiles>(Multiply<F, tiles>{w, scales, mins}, x, x_sums, out, T, N, K, stride, add);                                       \
    }                                                                                                                              \
    EXPORT(linear_##name##_##tiles)
#define PACKED_ALL(name, F) PACKED(name, F, 1); PACKED(name, F, 2); PACKED(name, F, 4); PACKED(name, F, 8)
PACKED_ALL(four, Four);
PACKED_ALL(four_min, FourMin);
PACKED_ALL(eight, Eight);
PACKED_ALL(eight_min, EightMin);
PACKED_ALL(eight_halves, EightHalves);

// One weight of a packed matrix.
template <typename F>
__device__ inline float weight_at(const uint8_t *tiles, const f16 *scales, const f16 *mins, int n, int k, int K) {
    size_t tile = (size_t)(n / OUTPUTS) * (K / GROUP) + k / GROUP;
    int g = n % 8, high = n % OUTPUTS / 8, step = k % GROUP / 16, t = k % 16 / 4, pair = 2 * step + k % 4 / 2;
    const uint32_t *words = reinterpret_cast<const uint32_t *>(tiles) + (tile * LANES + 4 * g + t) * (F::BITS / 2);
    int shift = (k % 2) * 16 + (F::BITS == 4 ? 4 * pair : 8 * (pair % 2));
    int q = F::BITS == 4 ? (int)(words[high] >> shift & 15) - (F::HAS_MIN ? 0 : 8)
                         : (int)(words[2 * high + pair / 2] >> shift & 255) - 128;
    float d = to_float(scales[(F::HAS_HALVES ? 2 * tile + step : tile) * OUTPUTS + 2 * g + high]);
    return d * q + (F::HAS_MIN ? to_float(mins[tile * OUTPUTS + 2 * g + high]) : 0.0f);
}

// out[T, K] = scale * table[tokens]
extern "C" __global__ void embed_dense(const bf16 *table, const uint32_t *tokens, float scale, int K, float *out) {
    for (int k = threadIdx.x; k < K; k += blockDim.x)
        out[(size_t)blockIdx.x * K + k] = scale * to_float(table[(size_t)tokens[blockIdx.x] * K + k]);
}
EXPORT(embed_dense);

// The same of packed tables; and a whole packed matrix as bf16 [N, K], for products of many rows.
#define UNPACK(name, F)                                                                                                            \
    extern "C" __global__ void embed_##name(const uint8_t *tiles, const f16 *scales, const f16 *mins, const uint32_t *tokens,      \
                                            float scale, int K, float *out) {                                                      \
        for (int k = threadIdx.x; k < K; k += blockDim.x)                                                                          \
            out[(size_t)blockIdx.x * K + k] = scale * weight_at<F>(tiles, scales, mins, tokens[blockIdx.x], k, K);                 \
    }                                                                                                                              \
    EXPORT(embed_##name);                                                                                                          \
    extern "C" __global__ void unpack_##name(const uint8_t *tiles, const f16 *scales, const f16 *mins, int K, bf16 *out) {         \
        for (int k = threadIdx.x; k < K; k += blockDim.x)                                                                          \
            out[(size_t)blockIdx.x * K + k] = to_bf16(weight_at<F>(tiles, scales, mins, blockIdx.x, k, K));                        \
    }                                                                                                                              \
    EXPORT(unpack_##name)
UNPACK(four, Four);
UNPACK(four_min, FourMin);
UNPACK(eight, Eight);
UNPACK(eight_min, EightMin);
UNPACK(eight_halves, EightHalves);
