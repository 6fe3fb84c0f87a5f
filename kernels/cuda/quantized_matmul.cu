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
// one scale, and makes them operands. DEPTH chunks of each warp are on their way: for two blocks
// 32 KB of codes of 8 bits, 16 KB of 4. More do not fit the registers.
#include "few_rows.cuh"
#include "quantized.cuh"

template <u32 BITS, u32 DEPTH>
__device__ __forceinline__ void quantized_matmul(const bf16* x, const u8* codes,
                                                 const u16* scales, const float* bias,
                                                 float* out, u32 m, u32 n, u32 k, u32 width, u32 add) {
    SHARED_ARRAY(float, partial, 8 * 16 * 16);
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const u32 first_row = blockIdx.y * 16, first_column = blockIdx.x * 16, num_groups = k / QUANTIZED_GROUP;
    // Of the lane's columns; one that is not there is another's, whose sums nobody takes.
    const u8* column_codes[2];
    const u16* column_scales[2];
#pragma unroll
    for (u32 i = 0; i < 2; ++i) {
        const u64 column = min(first_column + g + 8 * i, n - 1);
        column_codes[i] = codes + column * (u64(k) * BITS / 8), column_scales[i] = scales + column * num_groups;
    }
    CodesOf8 ring[DEPTH][2];
    const auto load_codes = [&](CodesOf8(&to)[2], u32 chunk) {
        // Behind the end any will do: what they are multiplied with is 0.
        const u32 eighth = min(chunk, num_groups - 1) * 4 + t;
#pragma unroll
        for (u32 i = 0; i < 2; ++i) to[i] = codes_at<BITS>(column_codes[i], column_scales[i], eighth);
    };
#pragma unroll
    for (u32 depth = 0; depth < DEPTH; ++depth) load_codes(ring[depth], warp + 8 * depth);
    begin_launch(); // which writes no weights
    float acc[2][4] = {};
#pragma unroll 1
    for (u32 first = warp; first < num_groups; first += 8 * DEPTH) {
#pragma unroll
        for (u32 depth = 0; depth < DEPTH; ++depth) {
            const u32 chunk = first + 8 * depth;
            uint4 a[2];
#pragma unroll
            for (u32 i = 0; i < 2; ++i) {
                const u32 row = first_row + g + 8 * i;
                const bool is_there = row < m && chunk < MUTATE(1, num_groups, ~0u);
                a[i] = load_16(x + u64(is_there ? row : 0) * k + (is_there ? chunk * 32 + t * 8 : 0), is_there);
            }
            const u32 low[4] = {a[0].x, a[1].x, a[0].y, a[1].y}, high[4] = {a[0].z, a[1].z, a[0].w, a[1].w};
#pragma unroll
            for (u32 i = 0; i < 2; ++i) {
                const uint4 b = weights_of<BITS>(ring[depth][i]);
                mma_bf16(acc[i], low, b.x, b.y);
                mma_bf16(acc[i], high, b.z, b.w);
            }
            load_codes(ring[depth], chunk + 8 * DEPTH);
        }
    }
    put_sums(partial, acc);
    put_tile(partial, bias, out, m, n, width, add);
}

extern "C" __global__ void __launch_bounds__(256, 2)
quantized_matmul_8(const bf16* x, const u8* codes, const u16* scales, const float* bias, float* out, u32 m, u32 n, u32 k,
                   u32 width, u32 add) {
    quantized_matmul<8, 4>(x, codes, scales, bias, out, m, n, k, width, add);
}

extern "C" __global__ void __launch_bounds__(256, 2)
quantized_matmul_4(const bf16* x, const u8* codes, const u16* scales, const float* bias, float* out, u32 m, u32 n, u32 k,
                   u32 width, u32 add) {
    quantized_matmul<4, 4>(x, codes, scales, bias, out, m, n, k, width, add);
}
