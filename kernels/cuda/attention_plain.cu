// Causal attention of any rows over the paged pool, value by value: for f32 KV, where tensor cores would round,
// and for head sizes they have no kernel for. Slow on long contexts, exact everywhere.
//
//   q, out       f32 or bf16 [_, num_heads, head_dim]
//   pool         in the same type, see kv_layout.cuh
//   rows         [num_rows] row, its position, where its block table begins in block_tables; row NOTHING: none
//   sinks        f32 [num_heads] or null
//
// head_dim at most 256. The order is that of the CPU (kernels/src/numerics.rs), so that in f32 the bits are the
// same: scores fold over features (bf16: pairs, the odd one first); per part of 512 an online softmax over tiles
// of 64 with our own exp, sums in 16 lanes and as a tree; values fold from zero over a tile's visible positions
// (bf16: pairs, weights through `round_bf16`); parts merge ascending. A sink is one more
// part (s, 1, 0) at the end.
//
// Grid (num_rows, num_heads), 128 threads.
#include "attention_job.cuh"
#include "numerics.cuh"

struct PlainRow {
    u32 row;
    u32 position;
    u32 block_table;
};

template <typename T> struct IsBf16 { static constexpr bool value = false; };
template <> struct IsBf16<bf16> { static constexpr bool value = true; };

struct PlainState {
    float max, sum, acc[2]; // this thread's features: threadIdx.x and threadIdx.x + 128

    __device__ void merge(float part_max, float part_sum, float part_0, float part_1) {
        const float higher = fmaxf(max, part_max), a = own_exp(max - higher), b = own_exp(part_max - higher);
        sum = fmaf(part_sum, b, sum * a);
        acc[0] = fmaf(part_0, b, acc[0] * a);
        acc[1] = fmaf(part_1, b, MUTATE(31, acc[1] * a, acc[1]));
        max = higher;
    }
};

template <typename T>
__device__ void attention_plain(const AttentionJob& job, const T* q, const T* pool,
                                const PlainRow* rows, const u32* block_tables,
                                const float* sinks, T* out) {
    SHARED_ARRAY(float, query, 256);
    SHARED_ARRAY(float, scores, TILE_TOKENS);
    SHARED_ARRAY(float, state, 2); // the tile's new maximum, its sum
    SHARED_ARRAY(const T*, keys, TILE_TOKENS);
    begin_launch();
    const PlainRow row = rows[blockIdx.x];
    if (row.row == MUTATE(34, NOTHING, 0u)) return; // the whole block
    const u32 head = blockIdx.y, dim = job.kv.head_dim, kv_head = head / (job.num_heads / job.kv.num_kv_heads);
    const u32 first = first_visible(job, row.position), thread = threadIdx.x;
    const u64 to_v = v_distance(job.kv), q_at = (u64(row.row) * job.num_heads + head) * dim;
    constexpr u32 PART_TILES = PART_TOKENS / TILE_TOKENS;
    for (u32 i = thread; i < dim; i += 128) query[i] = widen(q[q_at + i]);

    PlainState total = {LOWEST, 0.0f, {0.0f, 0.0f}}, part = total;
    for (u32 tile = first / TILE_TOKENS; tile <= row.position / TILE_TOKENS; ++tile) {
        const u32 start = tile * TILE_TOKENS;
        if (tile == first / TILE_TOKENS || tile % PART_TILES == 0) part = {LOWEST, 0.0f, {0.0f, 0.0f}};
        __syncthreads();
        if (thread < TILE_TOKENS) {
            const u32 position = start + thread;
            float score = LOWEST;
            const T* key = nullptr;
            if (position >= first && position <= row.position) {
                const u32 block = block_tables[row.block_table + position / job.kv.block_size];
                key = pool + k_index(job.kv, job.layer, block * job.kv.block_size + position % job.kv.block_size, kv_head);
                float fold = 0.0f;
                for (u32 i = 0; i < dim; i += 2) {
                    const u32 one = IsBf16<T>::value ? i + 1 : i, other = i + i + 1 - one;
                    fold = fmaf(query[one], widen(key[one]), fold);
                    fold = fmaf(query[other], widen(key[other]), fold);
                }
                score = fold * job.scale;
                if (job.softcap != 0.0f) score = job.softcap * own_tanh(score / job.softcap);
            }
            scores[thread] = score;
            keys[thread] = key;
        }
        __syncthreads();
        if (thread < 32) {
            const float max = fmaxf(part.max, warp_max(fmaxf(scores[thread], scores[thread + 32])));
            float weight[2];
            for (u32 i = 0; i < 2; ++i) {
                weight[i] = keys[thread + 32 * i] ? own_exp(scores[thread + 32 * i] - max) : 0.0f;
                scores[thread + 32 * i] = weight[i];
            }
            // Lane i of 16 adds positions i, i + 16, i + 32, i + 48 in this order.
            const float second = __shfl_xor_sync(FULL_WARP, weight[0], 16);
            const float fourth = __shfl_xor_sync(FULL_WARP, weight[1], 16);
            float lane_sum = ((weight[0] + second) + weight[1]) + fourth;
            for (int with = 8; with > 0; with /= 2) lane_sum += __shfl_xor_sync(FULL_WARP, lane_sum, with);
            if (thread == 0) state[0] = max, state[1] = lane_sum;
        }
        __syncthreads();
        const float correction = own_exp(part.max - state[0]);
        part.max = state[0];
        part.sum = fmaf(part.sum, correction, MUTATE(32, state[1], 1.0f));
#pragma unroll
        for (u32 half = 0; half < 2; ++half) {
            const u32 feature = thread + 128 * half;
            if (feature >= dim) continue;
            float fold = 0.0f;
            for (u32 i = 0; i < TILE_TOKENS; i += 2)
                for (u32 j = 0; j < 2; ++j) {
                    const u32 at = IsBf16<T>::value ? i + 1 - j : i + j;
                    if (!keys[at]) continue;
                    float weight = scores[at];
                    if (IsBf16<T>::value) weight = widen(bf16{round_bf16(weight)});
                    fold = fmaf(weight, widen(keys[at][to_v + feature]), fold);
                }
            part.acc[half] = fmaf(part.acc[half], correction, fold);
        }
        if (tile == row.position / TILE_TOKENS || (tile + 1) % PART_TILES == 0) {
            total.merge(part.max, part.sum, part.acc[0], part.acc[1]);
        }
    }
    if (sinks) total.merge(MUTATE(33, sinks[head], 0.0f), 1.0f, 0.0f, 0.0f);
    const float inverse = 1.0f / total.sum;
#pragma unroll
    for (u32 half = 0; half < 2; ++half) {
        const u32 feature = thread + 128 * half;
        if (feature < dim) store(out + q_at + feature, total.acc[half] * inverse);
    }
}

extern "C" __global__ void __launch_bounds__(128)
attention_plain_f32(AttentionJob job, const float* q, const float* pool, const PlainRow* rows, const u32* block_tables,
                    const float* sinks, float* out) {
    attention_plain(job, q, pool, rows, block_tables, sinks, out);
}

extern "C" __global__ void __launch_bounds__(128)
attention_plain_bf16(AttentionJob job, const bf16* q, const bf16* pool, const PlainRow* rows, const u32* block_tables,
                     const float* sinks, bf16* out) {
    attention_plain(job, q, pool, rows, block_tables, sinks, out);
}
