// Keys and values in blocks of 16 tokens, and attention over them.
//
// Of each layer, a block holds keys as [K heads, 16 tokens, D] and values as [K heads, D, 16 tokens], D filled up with zeros to 32,
// 64, 96, 128 or 256, so that both are read along rows as the tensor cores want them. All query heads of a key-value head go through its
// keys and values together (Ainslie et al. 2023, arXiv:2305.13245), several rows of a prompt too: each is a column of the products, and
// softmax is made as blocks come (Milakov & Gimelshein 2018, arXiv:1805.02867; Dao et al. 2022, arXiv:2205.14135).
#pragma once
#include "platform.cuh"

constexpr int BLOCK_TOKENS = 16;
constexpr int ATTENTION_WARPS = 4;
constexpr int MAX_HEAD = 256;
constexpr float NOTHING = -1e30f;

// How a cache keeps its values: the type they are multiplied in, and whether each token of a head has a scale.
struct KeptF16 {
    typedef f16 Stored;
    typedef f16 Used;
    static constexpr bool IS_SCALED = false;
};
struct KeptBf16 {
    typedef bf16 Stored;
    typedef bf16 Used;
    static constexpr bool IS_SCALED = false;
};
struct KeptInt8 {
    typedef int8_t Stored;
    typedef bf16 Used;
    static constexpr bool IS_SCALED = true;
};

// One layer's cache; of scales, [blocks, K heads, 16 tokens].
template <typename C> struct Layer {
    typename C::Stored *keys, *values;
    float *key_scales, *value_scales;
};

// Four values that lie together, as two registers.
__device__ inline void load4(const bf16 *at, uint32_t (&to)[2]) {
    uint2 v = *reinterpret_cast<const uint2 *>(at);
    to[0] = v.x, to[1] = v.y;
}
__device__ inline void load4(const f16 *at, uint32_t (&to)[2]) {
    uint2 v = *reinterpret_cast<const uint2 *>(at);
    to[0] = v.x, to[1] = v.y;
}
__device__ inline void load4(const int8_t *at, uint32_t (&to)[2]) {
    char4 v = *reinterpret_cast<const char4 *>(at);
    to[0] = pack(to_bf16((float)v.x), to_bf16((float)v.y)), to[1] = pack(to_bf16((float)v.z), to_bf16((float)v.w));
}

// Norms and rotates one head of `width` values, a warp; `head` is the warp's own room.
__device__ inline void turn_head(const float *from, float *head, const float *gains, float epsilon, const float *cos, const float *sin,
                                 int half, int is_interleaved, int width) {
    float squares = 0;
    for (int d = lane_id(); d < width; d += LANES) {
        head[d] = from[d];
        squares += from[d] * from[d];
    }
    if (gains) {
        float scale = rsqrtf(warp_sum(squares) / width + epsilon);
        for (int d = lane_id(); d < width; d += LANES) head[d] *= scale * gains[d];
    }
    __syncwarp();
    for (int i = lane_id(); i < half; i += LANES) {
        int a = is_interleaved ? 2 * i : i, b = is_interleaved ? 2 * i + 1 : i + half;
        float x = head[a], y = head[b];
        head[a] = x * cos[i] - y * sin[i], head[b] = x * sin[i] + y * cos[i];
    }
    __syncwarp();
}

__device__ inline float largest(const float *head, int width) {
    float most = 0;
    for (int d = lane_id(); d < width; d += LANES) most = fmaxf(most, fabsf(head[d]));
#pragma unroll
    for (int step = LANES / 2; step > 0; step /= 2) most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, step));
    return most;
}

template <typename T> __device__ T keep(float x, float) { return from_float<T>(x); }
template <> __device__ inline int8_t keep<int8_t>(float x, float inverse) { return (int8_t)rintf(x * inverse); }

// Block x norms and rotates the queries and keys of row x, and writes its keys and values to their slot. Queries go to [T, H, padded].
template <typename C>
__device__ void rope_write(const float *qkv, const uint32_t *positions, const uint32_t *slots, const float *cos, const float *sin,
                           const float *query_gains, const float *key_gains, float epsilon, int half, int is_interleaved, int heads,
                           int kv_heads, int width, int padded, typename C::Used *queries, Layer<C> layer) {
    __shared__ float rooms[ATTENTION_WARPS][MAX_HEAD];
    typedef typename C::Used Used;
    typedef typename C::Stored Stored;
    int row = blockIdx.x;
    float *room = rooms[warp_id()];
    const float *angles_cos = cos + (size_t)positions[row] * half, *angles_sin = sin + (size_t)positions[row] * half;
    size_t block = slots[row] / BLOCK_TOKENS, place = slots[row] % BLOCK_TOKENS;
    for (int head = warp_id(); head < heads + 2 * kv_heads; head += ATTENTION_WARPS) {
        const float *from = qkv + ((size_t)row * (heads + 2 * kv_heads) + head) * width;
        bool is_query = head < heads, is_value = head >= heads + kv_heads;
        turn_head(from, room, is_value ? nullptr : is_query ? query_gains : key_gains, epsilon, angles_cos, angles_sin,
                  is_value ? 0 : half, is_interleaved, width);
        if (is_query) {
            Used *to = queries + ((size_t)row * heads + head) * padded;
            for (int d = lane_id(); d < padded; d += LANES) to[d] = from_float<Used>(d < width ? room[d] : 0.0f);
        } else {
            size_t at = block * kv_heads + (head - heads) % kv_heads;
            float scale = C::IS_SCALED ? largest(room, width) / 127.0f : 1.0f, inverse = scale > 0 ? 1.0f / scale : 0.0f;
            if (C::IS_SCALED && lane_id() == 0) (is_value ? layer.value_scales : layer.key_scales)[at * BLOCK_TOKENS + place] = scale;
            for (int d = lane_id(); d < padded; d += LANES) {
                Stored x = keep<Stored>(d < width ? room[d] : 0.0f, inverse);
                if (is_value) layer.values[(at * padded + d) * BLOCK_TOKENS + place] = x;
                else layer.keys[(at * BLOCK_TOKENS + place) * padded + d] = x;
            }
        }
        __syncwarp();
    }
}

#define ROPE_WRITE(name, C)                                                                                                        \
    extern "C" __global__ void rope_write_##name(                                                                                  \
        const float *qkv, const uint32_t *positions, const uint32_t *slots, const float *cos, const float *sin,                    \
        const float *query_gains, const float *key_gains, float epsilon, int half, int is_interleaved, int heads, int kv_heads,    \
        int width, int padded, C::Used *queries, C::Stored *keys, C::Stored *values, float *key_scales, float *value_scales) {                 \
        rope_write<C>(qkv, positions, slots, cos, sin, query_gains, key_gains, epsilon, half, is_interleaved, heads, kv_heads,     \
                      width, padded, queries, Layer<C>{keys, values, key_scales, value_scales});                                           \
    }                                                                                                                              \
    EXPORT(rope_write_##name)
ROPE_WRITE(f16, KeptF16);
ROPE_WRITE(bf16, KeptBf16);
ROPE_WRITE(int8, KeptInt8);

// Some query heads of some rows of one sequence over some of its blocks. Columns count through the rows and, within a row, through the
// query heads of one key-value head.
struct Item {
    // row of column 0 of the sequence's rows in this step, and its position
    int row, position;
    int first_column, columns;
    int table;            // where the sequence's blocks begin
    int first_block, end_block;
    int part;             // where the unfinished sums go; less than 0: they are finished
};

// Parts of the same columns.
struct Whole {
    int row, first_column, columns;
    int first_part, parts;
};

struct Shape {
    int kv_heads, group, width;
    float scale;
    int window;           // how many positions a row sees, or 0 for all
};

// The columns of a warp: 8 * TILES of them, heads of 16 * DEPTH values.
template <typename C, int TILES, int DEPTH> struct Columns {
    typedef typename C::Used Used;
    static constexpr int COUNT = 8 * TILES, PADDED = 16 * DEPTH;
    float most[TILES][2], total[TILES][2];
    float sums[DEPTH][TILES][4];

    __device__ inline void clear() {
#pragma unroll
        for (int i = 0; i < TILES; i++)
#pragma unroll
            for (int j = 0; j < 2; j++) most[i][j] = NOTHING, total[i][j] = 0;
#pragma unroll
        for (int m = 0; m < DEPTH; m++)
#pragma unroll
            for (int i = 0; i < TILES; i++)
#pragma unroll
                for (int j = 0; j < 4; j++) sums[m][i][j] = 0;
    }

    // scores[token, column] of the 16 tokens of a block. `queries` are [columns, PADDED + 8].
    __device__ inline void score(const typename C::Stored *keys, const Used *queries, float (&scores)[TILES][4]) const {
        int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll
        for (int k = 0; k < PADDED; k += 32) {
            // lane t has values 8t to 8t + 7 of 32: four for each of two steps
            uint32_t a[2][4], pair[2];
#pragma unroll
            for (int half = 0; half < 2; half++)
#pragma unroll
                for (int step = 0; step < 2; step++) {
                    load4(keys + (g + 8 * half) * PADDED + k + 8 * t + 4 * step, pair);
                    a[step][half] = pair[0], a[step][2 + half] = pair[1];
                }
#pragma unroll
            for (int i = 0; i < TILES; i++)
#pragma unroll
                for (int step = 0; step < 2; step++) {
                    load4(queries + (8 * i + g) * (PADDED + 8) + k + 8 * t + 4 * step, pair);
                    mma(scores[i], a[step], pair, Used());
                }
        }
    }

    // Takes a block in. `seen` says for each column from which position to which it sees; `shares` is the warp's own room.
    __device__ inline void take(int block, size_t at, const Layer<C> &layer, const Used *queries, const int2 *seen, float scale,
                                Used *shares) {
        int g = lane_id() / 4, t = lane_id() % 4;
        float scores[TILES][4] = {};
        score(layer.keys + at * BLOCK_TOKENS * PADDED, queries, scores);
        float key_scale[2] = {scale, scale}, value_scale[2] = {1, 1};
        if (C::IS_SCALED)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                key_scale[half] *= layer.key_scales[at * BLOCK_TOKENS + g + 8 * half];
                value_scale[half] = layer.value_scales[at * BLOCK_TOKENS + g + 8 * half];
            }
#pragma unroll
        for (int i = 0; i < TILES; i++)
#pragma unroll
            for (int j = 0; j < 2; j++) {
                int column = 8 * i + 2 * t + j, token = block * BLOCK_TOKENS + g;
                int2 range = seen[column];
                bool sees_low = token >= range.x && token < range.y, sees_high = token + 8 >= range.x && token + 8 < range.y;
                float low = sees_low ? scores[i][j] * key_scale[0] : NOTHING;
                float high = sees_high ? scores[i][2 + j] * key_scale[1] : NOTHING;
                float now = fmaxf(most[i][j], fmaxf(low, high));
#pragma unroll
                for (int step = 4; step < LANES; step *= 2) now = fmaxf(now, __shfl_xor_sync(ALL_LANES, now, step));
                float fade = expf(most[i][j] - now);
                low = sees_low ? expf(low - now) : 0.0f, high = sees_high ? expf(high - now) : 0.0f;
                most[i][j] = now, total[i][j] = total[i][j] * fade + low + high;
#pragma unroll
                for (int m = 0; m < DEPTH; m++) sums[m][i][j] *= fade, sums[m][i][2 + j] *= fade;
                shares[column * BLOCK_TOKENS + g] = from_float<Used>(low * value_scale[0]);
                shares[column * BLOCK_TOKENS + g + 8] = from_float<Used>(high * value_scale[1]);
            }
        __syncwarp();
        // sums[value, column] += values[value, token] * shares[token, column]; lane t has tokens 4t to 4t + 3
        const typename C::Stored *values = layer.values + at * BLOCK_TOKENS * PADDED;
        uint32_t b[TILES][2];
#pragma unroll
        for (int i = 0; i < TILES; i++) load4(shares + (8 * i + g) * BLOCK_TOKENS + 4 * t, b[i]);
#pragma unroll
        for (int m = 0; m < DEPTH; m++) {
            uint32_t low[2], high[2];
            load4(values + (16 * m + g) * BLOCK_TOKENS + 4 * t, low);
            load4(values + (16 * m + g + 8) * BLOCK_TOKENS + 4 * t, high);
            uint32_t a[4] = {low[0], high[0], low[1], high[1]};
#pragma unroll
            for (int i = 0; i < TILES; i++) mma(sums[m][i], a, b[i], Used());
        }
        __syncwarp();
    }

    // Each column's total over the lanes that share it.
    __device__ inline void finish() {
#pragma unroll
        for (int i = 0; i < TILES; i++)
#pragma unroll
            for (int j = 0; j < 2; j++)
#pragma unroll
                for (int step = 4; step < LANES; step *= 2) total[i][j] += __shfl_xor_sync(ALL_LANES, total[i][j], step);
    }
};

// Block (x, y): item x for key-value head y. Warps share the columns and take turns at the blocks of tokens (SPLIT), or have 8 * TILES
// columns each and all go through the same blocks. Shared memory: see `attention_shared` of the host's side.
template <typename C, int TILES, int DEPTH, bool SPLIT>
__device__ void attend(const typename C::Used *queries, Layer<C> layer, const Item *items, const uint32_t *tables, Shape shape,
                       bf16 *out, float *part_sums, float2 *part_totals) {
    typedef Columns<C, TILES, DEPTH> Own;
    typedef typename C::Used Used;
    constexpr int COUNT = (SPLIT ? 1 : ATTENTION_WARPS) * Own::COUNT, PADDED = Own::PADDED;
    constexpr int PARTS = SPLIT ? ATTENTION_WARPS : 1;
    DYNAMIC_SHARED(room);
    // queries [COUNT, PADDED + 8] and, once they are no longer needed, sums [PARTS, COUNT, PADDED] in their place
    Used *all_queries = reinterpret_cast<Used *>(room);
    float *all_sums = reinterpret_cast<float *>(room);
    constexpr int QUERY_BYTES = COUNT * (PADDED + 8) * sizeof(Used), SUM_BYTES = PARTS * COUNT * PADDED * sizeof(float);
    float2 *totals = reinterpret_cast<float2 *>(room + (QUERY_BYTES > SUM_BYTES ? QUERY_BYTES : SUM_BYTES));
    int2 *seen = reinterpret_cast<int2 *>(totals + PARTS * COUNT);
    Used *all_shares = reinterpret_cast<Used *>(seen + COUNT);
    Item item = items[blockIdx.x];
    int head = blockIdx.y, heads = shape.kv_heads * shape.group;

    for (int at = threadIdx.x; at < COUNT * (PADDED / 4); at += blockDim.x) {
        int column = at / (PADDED / 4), d = at % (PADDED / 4) * 4, c = item.first_column + column;
        uint2 v = {0, 0};
        if (column < item.columns) {
            size_t row = item.row + c / shape.group;
            v = *reinterpret_cast<const uint2 *>(queries + (row * heads + head * shape.group + c % shape.group) * PADDED + d);
        }
        *reinterpret_cast<uint2 *>(all_queries + column * (PADDED + 8) + d) = v;
    }
    for (int column = threadIdx.x; column < COUNT; column += blockDim.x) {
        int end = item.position + (item.first_column + column) / shape.group + 1;
        int first = shape.window && end > shape.window ? end - shape.window : 0;
        seen[column] = column < item.columns ? int2{first, end} : int2{0, 0};
    }
    __syncthreads();

    int first_of_warp = SPLIT ? 0 : warp_id() * Own::COUNT;
    Used *shares = all_shares + warp_id() * Own::COUNT * BLOCK_TOKENS;
    const Used *own_queries = all_queries + first_of_warp * (PADDED + 8);
    Own own;
    own.clear();
    // what lies before the first row's window no row sees; the same warp always has the same blocks, whatever rows are in the item
    int first_block = max(item.first_block, seen[0].x / BLOCK_TOKENS / ATTENTION_WARPS * ATTENTION_WARPS);
    if (first_of_warp < item.columns)
        for (int block = first_block + (SPLIT ? warp_id() : 0); block < item.end_block; block += SPLIT ? ATTENTION_WARPS : 1)
            own.take(block, (size_t)tables[item.table + block] * shape.kv_heads + head, layer, own_queries, seen + first_of_warp,
                     shape.scale, shares);
    own.finish();
    __syncthreads();

    int g = lane_id() / 4, t = lane_id() % 4, slot = (SPLIT ? warp_id() * COUNT : 0) + first_of_warp;
#pragma unroll
    for (int i = 0; i < TILES; i++)
#pragma unroll
        for (int j = 0; j < 2; j++) {
            int column = slot + 8 * i + 2 * t + j;
            if (g == 0) totals[column] = float2{own.most[i][j], own.total[i][j]};
#pragma unroll
            for (int m = 0; m < DEPTH; m++) {
                all_sums[(size_t)column * PADDED + 16 * m + g] = own.sums[m][i][j];
                all_sums[(size_t)column * PADDED + 16 * m + g + 8] = own.sums[m][i][2 + j];
            }
        }
    __syncthreads();
    for (int at = threadIdx.x; at < item.columns * PADDED; at += blockDim.x) {
        int column = at / PADDED, d = at % PADDED, c = item.first_column + column;
        float most = NOTHING, total = 0, sum = 0;
#pragma unroll
        for (int w = 0; w < PARTS; w++) most = fmaxf(most, totals[w * COUNT + column].x);
#pragma unroll
        for (int w = 0; w < PARTS; w++) {
            float weight = expf(totals[w * COUNT + column].x - most);
            total += weight * totals[w * COUNT + column].y, sum += weight * all_sums[(size_t)(w * COUNT + column) * PADDED + d];
        }
        if (item.part >= 0) {
            size_t to = ((size_t)item.part * shape.kv_heads + head) * COUNT + column;
            part_sums[to * PADDED + d] = sum;
            if (d == 0) part_totals[to] = float2{most, total};
        } else if (d < shape.width) {
            size_t row = item.row + c / shape.group;
            out[(row * heads + head * shape.group + c % shape.group) * shape.width + d] = to_bf16(sum / total);
        }
    }
}

// Block (x, y) adds up the parts of whole x for key-value head y; `count` columns have room in a part.
extern "C" __global__ void attend_join(const Whole *wholes, const float *part_sums, const float2 *part_totals, int count, int padded,
                                       Shape shape, bf16 *out) {
    Whole whole = wholes[blockIdx.x];
    int head = blockIdx.y, heads = shape.kv_heads * shape.group;
    for (int at = threadIdx.x; at < whole.columns * padded; at += blockDim.x) {
        int column = at / padded, d = at % padded, c = whole.first_column + column;
        float most = NOTHING, total = 0, sum = 0;
        for (int p = whole.first_part; p < whole.first_part + whole.parts; p++)
            most = fmaxf(most, part_totals[((size_t)p * shape.kv_heads + head) * count + column].x);
        for (int p = whole.first_part; p < whole.first_part + whole.parts; p++) {
            size_t from = ((size_t)p * shape.kv_heads + head) * count + column;
            float weight = expf(part_totals[from].x - most);
            total += weight * part_totals[from].y, sum += weight * part_sums[from * padded + d];
        }
        size_t row = whole.row + c / shape.group;
        if (d < shape.width) out[(row * heads + head * shape.group + c % shape.group) * shape.width + d] = to_bf16(sum / total);
    }
}
EXPORT(attend_join);

#define ATTEND(kind, name, C, tiles, depth, split)                                                                                 \
    extern "C" __global__ void __launch_bounds__(ATTENTION_WARPS * LANES) attend_##kind##_##name##_##depth(                        \
        const C::Used *queries, C::Stored *keys, C::Stored *values, float *key_scales, float *value_scales, const Item *items,     \
        const uint32_t *tables, Shape shape, bf16 *out, float *part_sums, float2 *part_totals) {                                   \
        attend<C, tiles, depth, split>(queries, Layer<C>{keys, values, key_scales, value_scales}, items, tables, shape, out,       \
                                       part_sums, part_totals);                                                                    \
    }                                                                                                                              \
    EXPORT(attend_##kind##_##name##_##depth)
// few columns, with the blocks of tokens split over the warps; many columns of a prompt, 32 or 16 for each warp
#define ATTEND_DEPTH(depth, wide)                                                                                                  \
    ATTEND(few, f16, KeptF16, 1, depth, true);                                                                                     \
    ATTEND(few, bf16, KeptBf16, 1, depth, true);                                                                                   \
    ATTEND(few, int8, KeptInt8, 1, depth, true);                                                                                   \
    ATTEND(many, f16, KeptF16, wide, depth, false);                                                                                \
    ATTEND(many, bf16, KeptBf16, wide, depth, false);                                                                              \
    ATTEND(many, int8, KeptInt8, wide, depth, false)
ATTEND_DEPTH(2, 4);
ATTEND_DEPTH(4, 4);
ATTEND_DEPTH(6, 4);
ATTEND_DEPTH(8, 4);
ATTEND_DEPTH(16, 2);
