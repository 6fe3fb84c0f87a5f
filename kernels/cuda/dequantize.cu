// A quantized weight matrix as bf16, for a product of many rows.
//
//   out bf16 [n, k]; the matrix as quantized.cuh has it; k is a multiple of 32
//
// Grid (n, ceil(k / 2048)), 256 threads, 8 values each. Along y there are at most 65,535 blocks.
#include "quantized.cuh"

template <u32 BITS>
__device__ __forceinline__ void dequantize(const u8* __restrict__ codes, const u16* __restrict__ scales,
                                           bf16* __restrict__ out, u32 k) {
    begin_launch();
    const u32 row = blockIdx.x, eighth = blockIdx.y * 256 + threadIdx.x;
    if (eighth * 8 >= k) return;
    const float scale = widen_f16(scales[u64(row) * (k / QUANTIZED_GROUP) + MUTATE(1, eighth / 4, eighth / 8)]);
    *reinterpret_cast<uint4*>(out + u64(row) * k + eighth * 8) =
        weights_at<BITS>(codes + u64(row) * k * BITS / 8, scale, eighth);
}

extern "C" __global__ void __launch_bounds__(256)
dequantize_8(const u8* codes, const u16* scales, bf16* out, u32 k) {
    dequantize<8>(codes, scales, out, k);
}

extern "C" __global__ void __launch_bounds__(256)
dequantize_4(const u8* codes, const u16* scales, bf16* out, u32 k) {
    dequantize<4>(codes, scales, out, k);
}
