// The product of few rows with a quantized weight matrix: as fast as its codes can be read.
//
//   out[m, n] = sum over k of x[m, k] * w[n, k]  (+ bias[n])  (+ out[m, n] where `add`)
//
//   x bf16 [m, k]; w as quantized.cuh has it; bias f32 [n] or null; out f32 rows of `width`, of which these
//   are n columns
//
// k is a multiple of 32; any m and n, made for m up to 16. Order: that of skinny_matmul.cu, so the bits are those of its
// product with the weights that dequantize.cu makes; they do not depend on m or on a row's place.
//
// Grid (ceil(n / 16), ceil(m / 16)), 256 threads. A warp's chunk of k is a group: a lane reads 8 codes of a row, with
// one scale, and makes them operands.
#include "quantized.cuh"

template <u32 BITS>
__device__ __forceinline__ void quantized_matmul(const bf16* __restrict__ x, const u8* __restrict__ codes,
                                                 const u16* __restrict__ scales, const float* __restrict__ bias,
                                                 float* __restrict__ out, u32 m, u32 n, u32 k, u32 width, u32 add) {
    SHARED_ARRAY(float, partial, 8 * 16 * 16);
    begin_launch();
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const u32 first_row = blockIdx.y * 16, first_column = blockIdx.x * 16, num_groups = k / QUANTIZED_GROUP;
    const u64 row_bytes = u64(k) * BITS / 8;
    float acc[2][4] = {};
#pragma unroll 4
    for (u32 chunk = warp; chunk < num_groups; chunk += 8) {
        uint4 a[2], b[2];
#pragma unroll
        for (u32 i = 0; i < 2; ++i) {
            const u32 row = first_row + g + 8 * i, column = first_column + g + 8 * i;
            a[i] = row < m ? *reinterpret_cast<const uint4*>(x + u64(row) * k + chunk * 32 + t * 8) : make_uint4(0, 0, 0, 0);
            b[i] = make_uint4(0, 0, 0, 0);
            if (column < n) {
                const float scale = widen_f16(scales[u64(column) * num_groups + MUTATE(1, chunk, 0u)]);
                b[i] = weights_at<BITS>(codes + column * row_bytes, scale, chunk * 4 + t);
            }
        }
        const u32 low[4] = {a[0].x, a[1].x, a[0].y, a[1].y}, high[4] = {a[0].z, a[1].z, a[0].w, a[1].w};
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
    float* to = out + u64(row) * MUTATE(4, width, n) + column;
    *to = add ? *to + MUTATE(3, sum, 0.0f) : sum;
}

extern "C" __global__ void __launch_bounds__(256)
quantized_matmul_8(const bf16* x, const u8* codes, const u16* scales, const float* bias, float* out, u32 m, u32 n, u32 k,
                   u32 width, u32 add) {
    quantized_matmul<8>(x, codes, scales, bias, out, m, n, k, width, add);
}

extern "C" __global__ void __launch_bounds__(256)
quantized_matmul_4(const bf16* x, const u8* codes, const u16* scales, const float* bias, float* out, u32 m, u32 n, u32 k,
                   u32 width, u32 add) {
    quantized_matmul<4>(x, codes, scales, bias, out, m, n, k, width, add);
}
