// The product of rows with a matrix in f32, value by value: for models that compute in f32, where tensor cores
// would round.
//
//   out[m, n] = sum over k of x[m, k] * w[n, k]  (+ bias[n])  (+ out[m, n] where `add`)
//
//   x f32 [m, k]; w f32 [n, k], as a checkpoint has it; bias f32 [n] or null; out f32 [m, n]
//
// Order: a fold over k from zero, `acc = fma(x, w, acc)`; then the bias; then what is there. It is the CPU's, with
// the same bits.
//
// Grid (ceil(n / 32), ceil(m / 8)), 256 threads: a warp per row, a lane per column; tiles of 32 k.
#include "numerics.cuh"

extern "C" __global__ void __launch_bounds__(256)
plain_matmul_f32(const float* x, const float* w, const float* bias,
                 float* out, u32 m, u32 n, u32 k, u32 add) {
    SHARED_ARRAY(float, rows, 8 * 32);
    SHARED_ARRAY(float, columns, 32 * 33); // a column's values are 33 apart, so that lanes read different banks
    begin_launch();
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const u32 row = blockIdx.y * 8 + warp, column = blockIdx.x * 32 + lane;
    float acc = 0.0f;
    for (u32 start = 0; start < k; start += 32) {
        const u32 at = start + lane;
        rows[warp * 32 + lane] = row < m && at < k ? x[u64(row) * k + at] : 0.0f;
        for (u32 i = warp; i < 32; i += 8) {
            const u32 of = blockIdx.x * 32 + i;
            columns[i * 33 + lane] = of < n && at < k ? w[u64(of) * k + at] : 0.0f;
        }
        if (MUTATE(1, true, false)) __syncthreads();
        const u32 end = min(32u, k - start);
        for (u32 i = 0; i < end; ++i) acc = fmaf(rows[warp * 32 + i], columns[lane * 33 + MUTATE(2, i, i ^ 1u)], acc);
        __syncthreads(); // the next round writes what was just read
    }
    if (row >= m || column >= n) return;
    if (bias) acc += bias[column];
    float* to = out + u64(row) * n + column;
    *to = add ? *to + MUTATE(3, acc, 0.0f) : acc;
}
