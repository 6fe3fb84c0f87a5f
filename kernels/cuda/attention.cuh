// What the kernels of paged attention share: the job, tiles of keys and values in shared memory, the online
// softmax of one warp's rows, the merge of parts.
//
// A row's visible positions are walked in parts of 512, each in tiles of 64, both counted from position 0 of the
// sequence. The softmax starts anew with every part; parts are merged in ascending order. Whatever the kernel,
// the chunk or the batch, a row goes through the same operations:
//
//   S = q k^T           mma over features in steps of 16, ascending, from zero
//   s = S * scale * log2(e), or softcap * tanh(S * scale / softcap) * log2(e); masked: lowest
//   m' = max(m, s);  a = 2^(m - m');  p = 2^(s - m'), masked 0
//   l = fma(l, a, sum of p), per lane of a quad: ((q0 + q1) + (q2 + q3)) over quarters of 16 positions, each
//       (p[2t] + p[2t+1]) + (p[2t+8] + p[2t+9]); the quad is summed (xor 1, xor 2) when the part ends
//   acc = acc * a, then mma of p in bf16 with v over positions in steps of 16, ascending
//   merge               m' = max(m, mp);  a = 2^(m - m');  b = 2^(mp - m');  l = fma(lp, b, l * a);
//                       acc = fma(accp, b, acc * a), from (lowest, 0, 0)
//   end                 with a sink s (one score per head that has no value): one more merge with (s, 1, 0);
//                       out = acc * (1 / l)
//
// A tile or part in which a row sees nothing changes none of its bits. So decode and prefill give a row the
// same bits, which the test of attention_decode.cu checks on the emulation.
#pragma once

#include "attention_job.cuh"
#include "tensor_core.cuh"

// The products of a quarter become scores in units of log2.
__device__ __forceinline__ void scale_scores(const AttentionJob& job, float scores[2][4]) {
    if (job.softcap == 0.0f) {
#pragma unroll
        for (u32 i = 0; i < 8; ++i) scores[i / 4][i % 4] = scores[i / 4][i % 4] * job.scale * LOG2_E;
    } else {
#pragma unroll
        for (u32 i = 0; i < 8; ++i) {
            const float score = scores[i / 4][i % 4] * job.scale;
            scores[i / 4][i % 4] = MUTATE(2, job.softcap * own_tanh(score / job.softcap), score) * LOG2_E;
        }
    }
}

// Byte offset of 8 features (chunk) of a row in shared memory. Chunks of rows that follow one another lie in
// different banks, so that `ldmatrix` takes 8 rows in one go.
template <u32 DIM>
__device__ __forceinline__ u32 chunk_offset(u32 row, u32 chunk) {
    return row * DIM * 2 + ((chunk ^ (row & 7)) << 4);
}

// Starts copying positions tile * 64 .. + 64 of one head's K and V to shared memory, a granule per warp. Only
// positions first..=last are read, and only their entries of the block table; the others become zeros.
template <u32 DIM>
__device__ __forceinline__ void load_tile(const AttentionJob& job, const bf16* pool, const u32* block_table,
                                          u32 kv_head, u32 tile, u32 first, u32 last, unsigned char* k_tile,
                                          unsigned char* v_tile) {
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const u32 start = tile * TILE_TOKENS + warp * GRANULE_TOKENS;
    const bool is_seen = start <= last && start + GRANULE_TOKENS > first;
    const bf16* k = pool;
    if (is_seen) {
        const u32 block = block_table[start / job.kv.block_size];
        k = pool + k_index(job.kv, job.layer, block * job.kv.block_size + start % job.kv.block_size, kv_head);
    }
    const u64 to_v = v_distance(job.kv);
    for (u32 c = lane; c < GRANULE_TOKENS * DIM / 8; c += 32) {
        const u32 token = c / (DIM / 8), chunk = c % (DIM / 8);
        const bool is_there = is_seen && start + token >= first && start + token <= last;
        const bf16* from = is_there ? k + token * DIM + chunk * 8 : pool;
        const u32 offset = chunk_offset<DIM>(warp * GRANULE_TOKENS + token, chunk);
        copy_async_16(k_tile + offset, from, is_there);
        copy_async_16(v_tile + offset, is_there ? from + to_v : pool, is_there);
    }
}

// The A operand of 16 rows at features 16 step .. + 16.
template <u32 DIM>
__device__ __forceinline__ void load_rows(u32* a, const unsigned char* rows, u32 step) {
    const u32 lane = threadIdx.x % 32;
    ldmatrix_x4<false>(a, rows + chunk_offset<DIM>(lane % 16, 2 * step + lane / 16));
}

// Products of 16 queries with 16 keys (a quarter of a tile): scores[0] of the first 8 keys, scores[1] of the others.
template <u32 DIM>
__device__ __forceinline__ void multiply_keys(float scores[2][4], const u32* a, const unsigned char* k_tile,
                                              u32 quarter, u32 step) {
    const u32 lane = threadIdx.x % 32;
    u32 b[4];
    ldmatrix_x4<false>(b, k_tile + chunk_offset<DIM>(quarter * 16 + lane / 16 * 8 + lane % 8, 2 * step + lane / 8 % 2));
    mma_bf16(scores[0], a, b[0], b[1]);
    mma_bf16(scores[1], a, b[2], b[3]);
}

// Adds the product of 16 x 16 weights with 16 positions' values, features 16 pair .. + 16.
template <u32 DIM>
__device__ __forceinline__ void multiply_values(float acc[2][4], const u32* a, const unsigned char* v_tile,
                                                u32 quarter, u32 pair) {
    const u32 lane = threadIdx.x % 32;
    u32 b[4];
    ldmatrix_x4<true>(b, v_tile + chunk_offset<DIM>(quarter * 16 + lane % 16, 2 * pair + lane / 16));
    mma_bf16(acc[0], a, b[0], b[1]);
    mma_bf16(acc[1], a, b[2], MUTATE(3, b[3], b[1]));
}

// Turns a quarter's products into scores; `first` and `last` are the visible ranges of rows g and g + 8.
__device__ __forceinline__ void mask_scores(const AttentionJob& job, float scores[2][4], u32 start, const u32* first,
                                            const u32* last) {
    const u32 t = threadIdx.x % 4;
    scale_scores(job, scores);
#pragma unroll
    for (u32 n = 0; n < 2; ++n)
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
            const u32 position = start + n * 8 + 2 * t + i % 2, row = i / 2;
            const bool is_visible = position >= first[row] && position <= last[row];
            scores[n][i] = is_visible ? scores[n][i] : LOWEST;
        }
}

// The highest of a row's scores in this quarter that this lane holds; rows g (0) and g + 8 (1).
__device__ __forceinline__ float quarter_max(const float scores[2][4], u32 row) {
    return fmaxf(fmaxf(scores[0][2 * row], scores[0][2 * row + 1]), fmaxf(scores[1][2 * row], scores[1][2 * row + 1]));
}

__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(FULL_WARP, x, 1));
    return fmaxf(x, __shfl_xor_sync(FULL_WARP, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(FULL_WARP, x, 1);
    return x + __shfl_xor_sync(FULL_WARP, x, 2);
}

// Scores become weights; returns their sum over this lane's part of the quarter.
template <bool IS_MASKED = true>
__device__ __forceinline__ float weigh(float scores[2][4], float max, u32 row) {
#pragma unroll
    for (u32 n = 0; n < 2; ++n)
#pragma unroll
        for (u32 i = 2 * row; i < 2 * row + 2; ++i)
            scores[n][i] = IS_MASKED && scores[n][i] == LOWEST ? 0.0f : fast_exp2(scores[n][i] - max);
    return (scores[0][2 * row] + scores[0][2 * row + 1]) + (scores[1][2 * row] + scores[1][2 * row + 1]);
}

// One tile of the online softmax of rows g and g + 8: its products become weights, and `correction` is what everything
// summed before is to be multiplied with. Not masked: all rows of the warp see all positions of the tile.
template <bool IS_MASKED = true>
__device__ __forceinline__ void soften(const AttentionJob& job, float scores[4][2][4], u32 start, const u32* from,
                                       const u32* to, float* max, float* sum, float* correction) {
#pragma unroll
    for (u32 quarter = 0; quarter < 4; ++quarter) {
        if (IS_MASKED) mask_scores(job, scores[quarter], start + quarter * 16, from, to);
        else scale_scores(job, scores[quarter]);
    }
#pragma unroll
    for (u32 row = 0; row < 2; ++row) {
        float highest = max[row], parts[4];
#pragma unroll
        for (u32 quarter = 0; quarter < 4; ++quarter) highest = fmaxf(highest, quarter_max(scores[quarter], row));
        highest = quad_max(highest);
        correction[row] = fast_exp2(max[row] - highest);
        max[row] = highest;
#pragma unroll
        for (u32 quarter = 0; quarter < 4; ++quarter) parts[quarter] = weigh<IS_MASKED>(scores[quarter], highest, row);
        sum[row] = fmaf(sum[row], correction[row], (parts[0] + parts[1]) + (parts[2] + parts[3]));
    }
}

// The weights of a quarter as the A operand of a product with its values.
__device__ __forceinline__ void pack_weights(u32* a, const float scores[2][4]) {
#pragma unroll
    for (u32 i = 0; i < 4; ++i) a[i] = pack_bf16(scores[i / 2][i % 2 * 2], scores[i / 2][i % 2 * 2 + 1]);
}

// The factors of a merge: what is so far, and what is added.
struct Merge {
    float max, old_factor, new_factor;
    __device__ Merge(float old_max, float new_max) {
        max = fmaxf(old_max, new_max);
        old_factor = fast_exp2(old_max - max);
        new_factor = fast_exp2(new_max - max);
    }
    __device__ float of(float old_value, float new_value) const {
        return fmaf(new_value, new_factor, MUTATE(4, old_value * old_factor, old_value));
    }
};
