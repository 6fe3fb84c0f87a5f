// The product of few rows with a weight matrix: as fast as the weights can be read.
//
//   skinny_matmul     out[m, n] = sum over k of x[m, k] * w[n, k]  (+ bias[n])  (+ out[m, n] where `add`)
//   skinny_gate_up    out[m, n] = silu(gate) * up, the products with w[n, k] and with w[ffn + n, k]
//
//   x bf16 [m, k]; w bf16 [n, k] or [2 ffn, k], as a checkpoint has it; bias f32 [n] or null; out f32 [m, n] or bf16
//   [m, ffn], with the bits of a product and silu_mul.cu
//
// k is a multiple of 8; any m and n, made for m up to 16. A row's bits do not depend on m or on its place, so
// for more rows than that it is slower than cuBLASLt but gives batch-invariant results.
//
// Order: k in chunks of 32, warp w of 8 takes chunks w, w + 8, ...; in a chunk two `mma` of 16 each, the first
// over elements 0..4 of every 8, the second over 4..8; the warps' sums are added in ascending order.
//
// Grid (ceil(n / 16) or ceil(ffn / 8), ceil(m / 16)), 256 threads. A lane reads 16 bytes of a row at a time, straight
// into the operands: which k an `mma` calls its first is free as long as both operands agree.
#include "few_rows.cuh"

// Of a block: 16 columns of w, as two times 8 that begin at `columns`; those from `end` on are not there.
struct SkinnyTile {
    u32 columns[2], end[2];
};

// Chunks of weights that a warp has on their way while it multiplies with as many: with two blocks on a multiprocessor
// 64 KB, more than its share of the memory's bandwidth times the latency.
#define SKINNY_AHEAD 4

// Leaves the sums of each warp in `partial` [8][16 rows][16 columns] and passes a barrier.
__device__ __forceinline__ void skinny_sums(const bf16* x, const bf16* w, u32 m, u32 k,
                                            const SkinnyTile& tile, float* partial) {
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const u32 first_row = blockIdx.y * 16;
    const bf16 *x_rows[2], *w_rows[2];
    bool is_row[2], is_column[2];
#pragma unroll
    for (u32 i = 0; i < 2; ++i) {
        const u32 row = first_row + g + 8 * i, column = tile.columns[i] + g;
        is_row[i] = row < m, is_column[i] = column < tile.end[i];
        x_rows[i] = x + u64(is_row[i] ? row : 0) * k, w_rows[i] = w + u64(is_column[i] ? column : 0) * k;
    }
    uint4 ahead[SKINNY_AHEAD][2];
    const auto load_weights = [&](u32 chunk) {
#pragma unroll
        for (u32 c = 0; c < SKINNY_AHEAD; ++c) {
            const u32 at = (chunk + 8 * c) * 32 + t * 8;
#pragma unroll
            for (u32 i = 0; i < 2; ++i) ahead[c][i] = load_once_16(w_rows[i] + (at < k ? at : 0), at < k && is_column[i]);
        }
    };
    load_weights(warp); // which no launch writes
    begin_launch();
    float acc[2][4] = {};
#pragma unroll 1
    for (u32 chunk = warp; chunk * 32 < k; chunk += 8 * SKINNY_AHEAD) {
        uint4 a[SKINNY_AHEAD][2], b[SKINNY_AHEAD][2];
#pragma unroll
        for (u32 c = 0; c < SKINNY_AHEAD; ++c) {
            const u32 at = (chunk + 8 * c) * 32 + t * 8;
#pragma unroll
            for (u32 i = 0; i < 2; ++i) {
                b[c][i] = ahead[c][i];
                a[c][i] = load_16(x_rows[i] + (at < k ? at : 0), at < k && is_row[i]);
            }
        }
        load_weights(chunk + 8 * SKINNY_AHEAD);
#pragma unroll
        for (u32 c = 0; c < SKINNY_AHEAD; ++c) {
            const uint4* of = a[c];
            const u32 low[4] = {of[0].x, of[1].x, of[0].y, of[1].y};
            const u32 high[4] = {of[0].z, of[1].z, of[0].w, MUTATE(1, of[1].w, of[0].w)};
#pragma unroll
            for (u32 i = 0; i < 2; ++i) {
                mma_bf16(acc[i], low, b[c][i].x, b[c][i].y);
                mma_bf16(acc[i], high, b[c][i].z, b[c][i].w);
            }
        }
    }
    put_sums(partial, acc);
}

extern "C" __global__ void __launch_bounds__(256, 2)
skinny_matmul_bf16(const bf16* x, const bf16* w, const float* bias,
                   float* out, u32 m, u32 n, u32 k, u32 add) {
    SHARED_ARRAY(float, partial, 8 * 16 * 16);
    const u32 first = blockIdx.x * 16;
    skinny_sums(x, w, m, k, {{first, first + 8}, {n, n}}, partial);
    put_tile(partial, bias, out, m, n, n, add);
}

extern "C" __global__ void __launch_bounds__(256, 2)
skinny_gate_up_bf16(const bf16* x, const bf16* w, bf16* out, u32 m, u32 ffn, u32 k) {
    SHARED_ARRAY(float, partial, 8 * 16 * 16);
    const u32 first = blockIdx.x * 8;
    skinny_sums(x, w, m, k, {{first, MUTATE(2, ffn, 0u) + first}, {ffn, 2 * ffn}}, partial);
    const u32 row = blockIdx.y * 16 + threadIdx.x / 8, column = first + threadIdx.x % 8, gate = threadIdx.x / 8 * 16 + threadIdx.x % 8;
    if (threadIdx.x >= 128 || row >= m || column >= ffn) return;
    store(out + u64(row) * ffn + column, own_silu(sum_of(partial, gate)) * sum_of(partial, gate + MUTATE(3, 8, 0)));
}
