// The product of few rows with a weight matrix: as fast as the weights can be read.
//
//   out[m, n] = sum over k of x[m, k] * w[n, k]  (+ bias[n])  (+ out[m, n] where `add`)
//
//   x bf16 [m, k]; w bf16 [n, k], as a checkpoint has it; bias f32 [n] or null; out f32 [m, n]
//
// k is a multiple of 8; any m and n, made for m up to 16. A row's bits do not depend on m or on its place, so
// for more rows than that it is slower than cuBLASLt but gives batch-invariant results.
//
// Order: k in chunks of 32, warp w of 8 takes chunks w, w + 8, ...; in a chunk two `mma` of 16 each, the first
// over elements 0..4 of every 8, the second over 4..8; the warps' sums are added in ascending order.
//
// Grid (ceil(n / 16), ceil(m / 16)), 256 threads. A lane reads 16 bytes of a row at a time, straight into
// the operands: which k an `mma` calls its first is free as long as both operands agree.
#include "tensor_core.cuh"

extern "C" __global__ void __launch_bounds__(256)
skinny_matmul_bf16(const bf16* __restrict__ x, const bf16* __restrict__ w, const float* __restrict__ bias,
                   float* __restrict__ out, u32 m, u32 n, u32 k, u32 add) {
    SHARED_ARRAY(float, partial, 8 * 16 * 16);
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const u32 first_row = blockIdx.y * 16, first_column = blockIdx.x * 16;
    float acc[2][4] = {};
#pragma unroll 4
    for (u32 chunk = warp; chunk * 32 < k; chunk += 8) {
        const u32 at = chunk * 32 + t * 8;
        uint4 a[2], b[2];
#pragma unroll
        for (u32 i = 0; i < 2; ++i) {
            const u32 row = first_row + g + 8 * i, column = first_column + g + 8 * i;
            const bool is_row = at < k && row < m, is_column = at < k && column < n;
            a[i] = is_row ? *reinterpret_cast<const uint4*>(x + u64(row) * k + at) : make_uint4(0, 0, 0, 0);
            b[i] = is_column ? *reinterpret_cast<const uint4*>(w + u64(column) * k + at) : make_uint4(0, 0, 0, 0);
        }
        const u32 low[4] = {a[0].x, a[1].x, a[0].y, a[1].y}, high[4] = {a[0].z, a[1].z, a[0].w, MUTATE(1, a[1].w, a[0].w)};
#pragma unroll
        for (u32 i = 0; i < 2; ++i) {
            mma_bf16(acc[i], low, b[i].x, b[i].y);
            mma_bf16(acc[i], high, b[i].z, b[i].w);
        }
    }
#pragma unroll
    for (u32 i = 0; i < 8; ++i)
        partial[(warp * 16 + g + i % 4 / 2 * 8) * 16 + i / 4 * 8 + 2 * t + i % 2] = acc[i / 4][i % 4];
    if (MUTATE(2, true, false)) __syncthreads();
    const u32 row = first_row + threadIdx.x / 16, column = first_column + threadIdx.x % 16;
    if (row >= m || column >= n) return;
    float sum = partial[threadIdx.x];
#pragma unroll
    for (u32 i = 1; i < 8; ++i) sum += partial[i * 256 + threadIdx.x];
    if (bias) sum += bias[column];
    float* to = out + u64(row) * n + column;
    *to = add ? *to + MUTATE(3, sum, 0.0f) : sum;
}
