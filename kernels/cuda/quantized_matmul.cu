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
// 32 KB of codes of 8 bits, 16 KB of 4. More do not fit the registers. Codes come so fast that what is done for each of
// them counts: from the machine code, 5 operations of a lane.
#include "few_rows.cuh"
#include "quantized.cuh"

template <u32 BITS, u32 DEPTH, u32 ROWS>
__device__ __forceinline__ void quantized_rows(const bf16* x, const u8* codes,
                                               const u16* scales, const float* bias,
                                               float* out, u32 m, u32 n, u32 k, u32 width, u32 add, float* partial) {
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const u32 first_row = blockIdx.y * 16, first_column = blockIdx.x * 16, num_groups = k / QUANTIZED_GROUP;
    // Of the lane's rows and columns, at the warp's next chunk; one that is not there is another's, whose sums nobody takes.
    const bf16* row_x[2];
    const u8* column_codes[2];
    const u16* column_scales[2];
#pragma unroll
    for (u32 i = 0; i < 2; ++i) {
        const u64 row = min(first_row + g + 8 * i, m - 1), column = min(first_column + g + 8 * i, n - 1);
        row_x[i] = x + row * k + warp * 32 + t * 8;
        column_codes[i] = codes + column * (u64(k) * BITS / 8) + (warp * 4 + t) * BITS;
        column_scales[i] = scales + column * num_groups + warp;
    }
    // How many chunks the warp still has; it takes every eighth.
    u32 left = warp < num_groups ? (num_groups - warp + 7) / 8 : 0;
    CodesOf8 ring[DEPTH][2];
    const auto load_codes = [&](u32 to, u32 ahead) {
#pragma unroll
        for (u32 i = 0; i < 2; ++i)
            ring[to][i] = codes_at<BITS>(column_codes[i] + ahead * (32 * BITS), column_scales[i] + ahead * 8);
    };
    float acc[2][4] = {};
    const auto multiply = [&](u32 which) {
        const uint4 columns[2] = {weights_of<BITS>(ring[which][0]), weights_of<BITS>(ring[which][1])};
#pragma unroll
        for (u32 i = 0; i < ROWS / 8; ++i)
            multiply_columns(acc[i], columns, *reinterpret_cast<const uint4*>(row_x[i] + which * 256));
    };
    const auto go_on = [&] {
        left -= DEPTH;
#pragma unroll
        for (u32 i = 0; i < 2; ++i) row_x[i] += DEPTH * 256, column_codes[i] += DEPTH * 32 * BITS, column_scales[i] += DEPTH * 8;
    };
#pragma unroll
    for (u32 depth = 0; depth < DEPTH; ++depth)
        if (depth < left) load_codes(depth, depth);
    begin_launch(); // which writes no weights
    // As long as all that follow are there, nobody asks for each.
#pragma unroll 1
    for (; left >= MUTATE(12, 2 * DEPTH, DEPTH); go_on()) {
#pragma unroll
        for (u32 depth = 0; depth < DEPTH; ++depth) multiply(depth), load_codes(depth, depth + DEPTH);
    }
#pragma unroll 1
    for (;; go_on()) {
#pragma unroll
        for (u32 depth = 0; depth < DEPTH; ++depth) {
            if (depth < left) multiply(depth);
            if (depth + DEPTH < MUTATE(1, left, 0u)) load_codes(depth, depth + DEPTH);
        }
        if (left <= DEPTH) break;
    }
    put_sums_of_columns(partial, acc);
    put_tile(partial, bias, out, m, n, width, add);
}

// Up to 8 rows are half of the products.
template <u32 BITS>
__device__ __forceinline__ void quantized_matmul(const bf16* x, const u8* codes, const u16* scales, const float* bias, float* out,
                                                 u32 m, u32 n, u32 k, u32 width, u32 add) {
    SHARED_ARRAY(float, partial, 8 * 16 * 16);
    if (m <= MUTATE(2, 8u, 9u)) {
        quantized_rows<BITS, 4, 8>(x, codes, scales, bias, out, m, n, k, width, add, partial);
    } else {
        quantized_rows<BITS, 4, 16>(x, codes, scales, bias, out, m, n, k, width, add, partial);
    }
}

extern "C" __global__ void __launch_bounds__(256, 2)
quantized_matmul_8(const bf16* x, const u8* codes, const u16* scales, const float* bias, float* out, u32 m, u32 n, u32 k,
                   u32 width, u32 add) {
    quantized_matmul<8>(x, codes, scales, bias, out, m, n, k, width, add);
}

extern "C" __global__ void __launch_bounds__(256, 2)
quantized_matmul_4(const bf16* x, const u8* codes, const u16* scales, const float* bias, float* out, u32 m, u32 n, u32 k,
                   u32 width, u32 add) {
    quantized_matmul<4>(x, codes, scales, bias, out, m, n, k, width, add);
}
