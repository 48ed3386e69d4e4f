// The next token of each row, chosen where the logits are: no sort, and nothing but whole numbers added up, so that the order in which
// threads come does not matter.
#pragma once
#include "platform.cuh"

constexpr int PICK_THREADS = 512;
constexpr int DIGITS = 256;
constexpr int DIGIT_BITS = 8;

// How a row's token is chosen: `Pick` in `batch.rs`.
struct Pick {
    float temperature, top_p, min_p, uniform;
    int top_k;
};

// A number that is greater for a greater x; the least for what is no number.
__device__ inline uint32_t order_key(float x) {
    if (x != x) return 0;
    uint32_t bits = float_bits(x);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// What a token weighs beside the likeliest, which weighs 2^32.
struct Weigh {
    float top, temperature;
    __device__ inline uint64_t operator()(float x) const { return (uint64_t)(expf((x - top) / temperature) * 4294967296.0f); }
};

struct PickRoom {
    float tops[PICK_THREADS];
    int ids[PICK_THREADS];
    unsigned long long sums[PICK_THREADS];
    unsigned long long digits[DIGITS];
    unsigned long long before;
    uint32_t prefix;
};

// The sum of all threads' values, which each of them gets.
__device__ inline uint64_t block_total(uint64_t own, PickRoom &room) {
    room.sums[threadIdx.x] = own;
    __syncthreads();
    for (int step = PICK_THREADS / 2; step > 0; step /= 2) {
        if ((int)threadIdx.x < step) room.sums[threadIdx.x] += room.sums[threadIdx.x + step];
        __syncthreads();
    }
    uint64_t total = room.sums[0];
    __syncthreads();
    return total;
}

// The greatest key at which the tokens of this key and above, of those that `least` lets in, measure `target` or more; digit by digit.
template <typename Measure>
__device__ uint32_t find_key(const float *logits, int vocab, uint32_t least, uint64_t target, Measure measure, PickRoom &room) {
    if (threadIdx.x == 0) room.prefix = 0, room.before = 0;
    for (int shift = 32 - DIGIT_BITS; shift >= 0; shift -= DIGIT_BITS) {
        for (int i = threadIdx.x; i < DIGITS; i += PICK_THREADS) room.digits[i] = 0;
        __syncthreads();
        uint32_t prefix = room.prefix;
        for (int i = threadIdx.x; i < vocab; i += PICK_THREADS) {
            uint32_t key = order_key(logits[i]);
            bool is_below_prefix = shift + DIGIT_BITS < 32 && key >> (shift + DIGIT_BITS) != prefix;
            if (key < least || is_below_prefix) continue;
            atomicAdd(&room.digits[key >> shift & (DIGITS - 1)], (unsigned long long)measure(logits[i]));
        }
        __syncthreads();
        if (threadIdx.x == 0) {
            int digit = DIGITS - 1;
            while (digit > 0 && room.before + room.digits[digit] < target) room.before += room.digits[digit--];
            room.prefix = room.prefix << DIGIT_BITS | digit;
        }
        __syncthreads();
    }
    uint32_t key = room.prefix;
    __syncthreads();
    return key;
}

struct One {
    __device__ inline uint64_t operator()(float) const { return 1; }
};

// Block x chooses the token of logits[rows[x]]. As on the host: what weighs less than 2^-24 of the likeliest or less than min_p is
// dropped, then what is not among the top_k, then what the likeliest that reach top_p do not need; equals of the last one stay.
extern "C" __global__ void __launch_bounds__(PICK_THREADS)
    pick_tokens(const float *all_logits, int vocab, const uint32_t *rows, const Pick *picks, uint32_t *tokens) {
    __shared__ PickRoom room;
    const float *logits = all_logits + (size_t)rows[blockIdx.x] * vocab;
    Pick pick = picks[blockIdx.x];

    float top = -INFINITY;
    int id = vocab;
    for (int i = threadIdx.x; i < vocab; i += PICK_THREADS)
        if (logits[i] > top) top = logits[i], id = i;
    room.tops[threadIdx.x] = top, room.ids[threadIdx.x] = id;
    __syncthreads();
    for (int step = PICK_THREADS / 2; step > 0; step /= 2) {
        if ((int)threadIdx.x < step) {
            int other = threadIdx.x + step;
            bool is_better = room.tops[other] > room.tops[threadIdx.x]
                || (room.tops[other] == room.tops[threadIdx.x] && room.ids[other] < room.ids[threadIdx.x]);
            if (is_better) room.tops[threadIdx.x] = room.tops[other], room.ids[threadIdx.x] = room.ids[other];
        }
        __syncthreads();
    }
    top = room.tops[0], id = room.ids[0];
    if (pick.temperature <= 0 || pick.top_k == 1 || id == vocab) {
        if (threadIdx.x == 0) tokens[blockIdx.x] = id == vocab ? 0 : id;
        return;
    }

    Weigh weigh{top, pick.temperature};
    constexpr float LEAST = 5.9604645e-8f;
    uint32_t least = order_key(logf(fmaxf(pick.min_p, LEAST)) * pick.temperature + top);
    if (pick.top_k > 0 && pick.top_k < vocab) least = max(least, find_key(logits, vocab, least, pick.top_k, One{}, room));
    int each = (vocab + PICK_THREADS - 1) / PICK_THREADS, first = threadIdx.x * each, end = min(vocab, first + each);
    for (int round = 0; round < 2; round++) {
        uint64_t own = 0;
        for (int i = first; i < end; i++)
            if (order_key(logits[i]) >= least) own += weigh(logits[i]);
        uint64_t total = block_total(own, room);
        if (round == 0 && pick.top_p < 1.0f) {
            uint64_t enough = (uint64_t)((double)pick.top_p * (double)total);
            least = max(least, find_key(logits, vocab, least, enough > 0 ? enough : 1, weigh, room));
            continue;
        }
        // the token at which the sum, in the order of the vocabulary, passes the draw
        uint64_t left = (uint64_t)((double)pick.uniform * (double)total);
        room.sums[threadIdx.x] = own;
        __syncthreads();
        bool is_mine = true;
        for (int i = 0; i < (int)threadIdx.x && is_mine; i++)
            if (left < room.sums[i]) is_mine = false;
            else left -= room.sums[i];
        if (is_mine && left < own)
            for (int i = first; i < end; i++) {
                uint64_t weight = order_key(logits[i]) >= least ? weigh(logits[i]) : 0;
                if (left < weight) {
                    tokens[blockIdx.x] = i;
                    break;
                }
                left -= weight;
            }
        return;
    }
}
EXPORT(pick_tokens);
