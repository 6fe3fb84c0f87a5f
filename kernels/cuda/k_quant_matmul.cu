// The product of few rows with a matrix of k-quants: as fast as its codes can be read.
//
//   out[m, n] = sum over k of x[m, k] * w[n, k]  (+ bias[n])  (+ out[m, n] where `add`)
//
//   x bf16 [m, k]; w as k_quants.cuh has it; bias f32 [n] or null; out f32 rows of `width`, of which these are n
//   columns
//
// k is a multiple of 256; any m and n, made for m up to 16. Order: that of skinny_matmul.cu, so the bits are those of
// its product with the weights that k_quant_dequantize makes; they do not depend on m or on a row's place.
//
// Grid (ceil(n / 16), ceil(m / 16)), 256 threads. A lane has the codes of DEPTH records on their way while it
// multiplies: 16 warps of a multiprocessor then have 37 KiB of 4-bit codes, or 53 KiB of 6-bit ones.
#include "few_rows.cuh"
#include "k_quants.cuh"

template <u32 BITS, u32 DEPTH, u32 ROWS>
__device__ __forceinline__ void k_quant_rows(const bf16* x, const u8* w, const float* bias, float* out, u32 m, u32 n, u32 k,
                                             u32 width, u32 add, float* partial) {
    constexpr u32 RECORD_BYTES = KQuant<BITS>::RECORD_BYTES;
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const u32 first_row = blockIdx.y * 16;
    const u32 num_pairs = k_num_pairs(k);
    const u8* records = w + u64(blockIdx.x) * num_pairs * RECORD_BYTES; // that follow
    // Of the lane's rows, at the warp's next chunk; one that is not there is another's, whose sums nobody takes.
    const bf16* row_x[2];
#pragma unroll
    for (u32 i = 0; i < 2; ++i) row_x[i] = x + u64(min(first_row + g + 8 * i, m - 1)) * k + warp * 32 + t * 8;
    float acc[2][4] = {};
    KLane<BITS> ring[DEPTH];
    u32 left = num_pairs;
    const auto load = [&](u32 to, u32 ahead) { ring[to].load(records + ahead * RECORD_BYTES, warp, lane); };
    const auto multiply = [&](u32 which, bool has_second) {
#pragma unroll
        for (u32 block = 0; block < 2; ++block) {
            const uint4 columns[2] = {ring[which].weights(MUTATE(2, block, 0u)), ring[which].weights(2 + block)};
            // Behind an odd last block there is none: weights are 0 there, and what they are multiplied with is some other.
            const u32 at = which * (2 * K_BLOCK) + (has_second ? block : 0) * K_BLOCK;
#pragma unroll
            for (u32 i = 0; i < ROWS / 8; ++i) multiply_columns(acc[i], columns, *reinterpret_cast<const uint4*>(row_x[i] + at));
        }
    };
    const auto go_on = [&] {
        left -= DEPTH, records += DEPTH * RECORD_BYTES;
#pragma unroll
        for (u32 i = 0; i < 2; ++i) row_x[i] += DEPTH * 2 * K_BLOCK;
    };
#pragma unroll
    for (u32 depth = 0; depth < DEPTH; ++depth)
        if (depth < left) load(depth, depth);
    begin_launch(); // which writes no weights
    // As long as all that follow are there, nobody asks for each.
#pragma unroll 1
    for (; left >= 2 * DEPTH; go_on()) {
#pragma unroll
        for (u32 depth = 0; depth < DEPTH; ++depth) multiply(depth, true), load(depth, MUTATE(3, depth + DEPTH, depth));
    }
    const bool has_all = MUTATE(1, k / K_BLOCK % 2 == 0, true);
#pragma unroll 1
    for (;; go_on()) {
#pragma unroll
        for (u32 depth = 0; depth < DEPTH; ++depth) {
            if (depth < left) multiply(depth, has_all || depth + 1 < left);
            if (depth + DEPTH < left) load(depth, depth + DEPTH);
        }
        if (left <= DEPTH) break;
    }
    put_sums_of_columns(partial, acc);
    put_tile(partial, bias, out, m, n, width, add);
}

// Up to 8 rows are half of the products; what is on the way fits the registers.
template <u32 BITS>
__device__ __forceinline__ void k_quant_matmul(const bf16* x, const u8* w, const float* bias, float* out, u32 m, u32 n, u32 k,
                                               u32 width, u32 add) {
    SHARED_ARRAY(float, partial, 8 * 16 * 16);
    if (m <= MUTATE(4, 8u, 9u)) {
        k_quant_rows<BITS, 4, 8>(x, w, bias, out, m, n, k, width, add, partial);
    } else {
        k_quant_rows<BITS, BITS == 4 ? 3 : 4, 16>(x, w, bias, out, m, n, k, width, add, partial);
    }
}

extern "C" __global__ void __launch_bounds__(256, 2)
k_quant_matmul_4(const bf16* x, const u8* w, const float* bias, float* out, u32 m, u32 n, u32 k, u32 width, u32 add) {
    k_quant_matmul<4>(x, w, bias, out, m, n, k, width, add);
}

extern "C" __global__ void __launch_bounds__(256, 2)
k_quant_matmul_6(const bf16* x, const u8* w, const float* bias, float* out, u32 m, u32 n, u32 k, u32 width, u32 add) {
    k_quant_matmul<6>(x, w, bias, out, m, n, k, width, add);
}
