// Operations on rows of activations, a block of threads for each row.
#pragma once
#include "platform.cuh"

constexpr int MAX_WARPS = 32;

// x * sigmoid(s(x)): SiLU, or GELU in its tanh form.
__device__ inline float activate(float x, int is_gelu) {
    float s = is_gelu ? 1.5957691216057308f * (x + 0.044715f * x * x * x) : x;
    return x / (1.0f + expf(-s));
}

// out[i] = norm(x[picked[i]]), or of row i when nothing is picked.
template <typename Out>
__device__ void rms_norm(const float *x, const uint32_t *picked, const float *gains, float epsilon, int width, Out *out) {
    __shared__ float room[MAX_WARPS];
    const float *row = x + (size_t)(picked ? picked[blockIdx.x] : blockIdx.x) * width;
    float squares = 0;
    for (int i = threadIdx.x; i < width; i += blockDim.x) squares += row[i] * row[i];
    float scale = rsqrtf(block_sum(squares, room) / width + epsilon);
    for (int i = threadIdx.x; i < width; i += blockDim.x)
        out[(size_t)blockIdx.x * width + i] = from_float<Out>(row[i] * scale * gains[i]);
}

extern "C" __global__ void rms_norm_bf16(const float *x, const uint32_t *picked, const float *gains, float epsilon, int width, bf16 *out) {
    rms_norm(x, picked, gains, epsilon, width, out);
}
EXPORT(rms_norm_bf16);

extern "C" __global__ void rms_norm_f32(const float *x, const uint32_t *picked, const float *gains, float epsilon, int width, float *out) {
    rms_norm(x, picked, gains, epsilon, width, out);
}
EXPORT(rms_norm_f32);

// residual += norm(x)
extern "C" __global__ void rms_norm_add(const float *x, const float *gains, float epsilon, int width, float *residual) {
    __shared__ float room[MAX_WARPS];
    const float *row = x + (size_t)blockIdx.x * width;
    float squares = 0;
    for (int i = threadIdx.x; i < width; i += blockDim.x) squares += row[i] * row[i];
    float scale = rsqrtf(block_sum(squares, room) / width + epsilon);
    for (int i = threadIdx.x; i < width; i += blockDim.x) residual[(size_t)blockIdx.x * width + i] += row[i] * scale * gains[i];
}
EXPORT(rms_norm_add);

// out[T, F] = activation(gate) * up of rows [gate, up]
extern "C" __global__ void gate_mul(const float *gate_up, int width, int is_gelu, bf16 *out) {
    const float *gate = gate_up + (size_t)blockIdx.x * 2 * width, *up = gate + width;
    for (int i = threadIdx.x; i < width; i += blockDim.x)
        out[(size_t)blockIdx.x * width + i] = to_bf16(activate(gate[i], is_gelu) * up[i]);
}
EXPORT(gate_mul);

// Sums of 32 neighbours of x[T, width], which minimums of quantized weights are multiplied with.
extern "C" __global__ void group_sums(const bf16 *x, int width, float *sums) {
    int groups = width / 32;
    for (int group = warp_id(); group < groups; group += blockDim.x / LANES) {
        float sum = warp_sum(to_float(x[(size_t)blockIdx.x * width + group * 32 + lane_id()]));
        if (lane_id() == 0) sums[(size_t)blockIdx.x * groups + group] = sum;
    }
}
EXPORT(group_sums);

// out[t] = bias, so that products can be added to it
extern "C" __global__ void fill_bias(const float *bias, int width, float *out) {
    for (int i = threadIdx.x; i < width; i += blockDim.x) out[(size_t)blockIdx.x * width + i] = bias[i];
}
EXPORT(fill_bias);

// residual[t] += bias
extern "C" __global__ void add_bias(const float *bias, int width, float *out) {
    for (int i = threadIdx.x; i < width; i += blockDim.x) out[(size_t)blockIdx.x * width + i] += bias[i];
}
EXPORT(add_bias);

// Probabilities of the `used` most probable of `count` experts, zero for the others; of equals the first is taken. One warp a row.
extern "C" __global__ void route(const float *scores, int count, int used, int is_normalized, float *weights) {
    const float *row = scores + (size_t)blockIdx.x * count;
    float *out = weights + (size_t)blockIdx.x * count;
    float most = -INFINITY;
    for (int i = 0; i < count; i++) most = fmaxf(most, row[i]);
    float total = 0;
    for (int i = 0; i < count; i++) total += expf(row[i] - most);
    float taken = 0;
    for (int i = lane_id(); i < count; i += LANES) {
        int before = 0;
        for (int j = 0; j < count; j++) before += row[j] > row[i] || (row[j] == row[i] && j < i);
        float p = before < used ? expf(row[i] - most) / total : 0.0f;
        out[i] = p;
        taken += p;
    }
    taken = warp_sum(taken);
    if (is_normalized)
        for (int i = lane_id(); i < count; i += LANES) out[i] /= taken;
}
EXPORT(route);

// residual[t] += weights[t, expert] * x[t]
extern "C" __global__ void add_weighted(const float *x, const float *weights, int count, int expert, int width, float *residual) {
    float weight = weights[(size_t)blockIdx.x * count + expert];
    if (weight == 0.0f) return;
    size_t first = (size_t)blockIdx.x * width;
    for (int i = threadIdx.x; i < width; i += blockDim.x) residual[first + i] += weight * x[first + i];
}
EXPORT(add_weighted);
