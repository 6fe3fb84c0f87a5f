// A quantized weight matrix as bf16, for a product of many rows.
//
//   out bf16 [n, k]; the matrix as quantized.cuh has it; k is a multiple of 32
//
// Grid (n, ceil(k / 2048)), 256 threads, 8 values each. Along y there are at most 65,535 blocks.
//
// k_quant_dequantize: the matrix as k_quants.cuh has it, k a multiple of 256; grid (ceil(n / 16), ceil(k / 512)), 256
// threads, a record for each block.
#include "k_quants.cuh"
#include "quantized_row.cuh"

template <u32 BITS>
__device__ __forceinline__ void dequantize(const u8* codes, const u16* scales,
                                           bf16* out, u32 k) {
    begin_launch();
    const u32 row = blockIdx.x, eighth = blockIdx.y * 256 + threadIdx.x;
    if (eighth * 8 >= k) return;
    const CodesOf8 eight = codes_of_row<BITS>(codes, scales, row, k, eighth);
    *reinterpret_cast<uint4*>(out + u64(row) * k + MUTATE(1, eighth, eighth ^ 1u) * 8) = weights_of<BITS>(eight);
}

extern "C" __global__ void __launch_bounds__(256)
dequantize_8(const u8* codes, const u16* scales, bf16* out, u32 k) {
    dequantize<8>(codes, scales, out, k);
}

extern "C" __global__ void __launch_bounds__(256)
dequantize_4(const u8* codes, const u16* scales, bf16* out, u32 k) {
    dequantize<4>(codes, scales, out, k);
}

template <u32 BITS>
__device__ __forceinline__ void k_quant_dequantize(const u8* records, bf16* out, u32 n,
                                                   u32 k) {
    begin_launch();
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const u64 record = u64(blockIdx.x) * k_num_pairs(k) + blockIdx.y;
    KLane<BITS> mine;
    mine.load(records + record * KQuant<BITS>::RECORD_BYTES, warp, lane);
#pragma unroll
    for (u32 part = 0; part < 4; ++part) {
        const u32 row = blockIdx.x * 16 + g + part / 2 * 8;
        const u32 at = (blockIdx.y * 2 + part % 2) * K_BLOCK + warp * 32 + t * 8;
        if (row < n && at < k)
            *reinterpret_cast<uint4*>(out + u64(row) * k + at) = mine.weights(MUTATE(2, part, part ^ 1u));
    }
}

extern "C" __global__ void __launch_bounds__(256)
k_quant_dequantize_4(const u8* records, bf16* out, u32 n, u32 k) {
    k_quant_dequantize<4>(records, out, n, k);
}

extern "C" __global__ void __launch_bounds__(256)
k_quant_dequantize_6(const u8* records, bf16* out, u32 n, u32 k) {
    k_quant_dequantize<6>(records, out, n, k);
}
