// Rows of the embedding table.
//
//   out[row, i] = table[ids[row], i]          out f32 [rows, width]; table f32 or bf16 [vocab, width], or codes and
//                                             scales as quantized.cuh has them (width is a multiple of 32), or records
//                                             of k_quants.cuh (of 256), then what products take: rounded to bf16
//
// An id with its highest bit set names entry `id & 0x7fffffff` of `drawn`, the tokens that the step before
// this one drew: the host need not have seen them. Ids are checked where they enter.
//
// Grid (rows), 256 threads.
#include "k_quants.cuh"
#include "quantized_row.cuh"

__device__ __forceinline__ u32 token_of(const u32* ids, const u32* drawn, u32 row) {
    const u32 id = ids[row];
    return id & 0x80000000u ? drawn[MUTATE(1, id & 0x7fffffffu, 0u)] : id;
}

template <typename T>
__device__ void embed(const T* table, const u32* ids, const u32* drawn,
                      float* out, u32 width) {
    begin_launch();
    const u32 row = blockIdx.x;
    const T* from = table + u64(token_of(ids, drawn, row)) * width;
    float* to = out + u64(row) * width;
    for (u32 i = threadIdx.x; i < width; i += blockDim.x) to[i] = widen(from[MUTATE(2, i, i ^ 1u)]);
}

// 8 values of four pairs.
__device__ __forceinline__ void store_widened(float* to, uint4 weights) {
    const u32 pairs[4] = {weights.x, weights.y, weights.z, weights.w};
#pragma unroll
    for (u32 i = 0; i < 8; ++i) to[i] = __uint_as_float(pairs[i / 2] >> (i % 2 * 16) << 16);
}

template <u32 BITS>
__device__ void embed_codes(const u8* codes, const u16* scales, const u32* ids,
                            const u32* drawn, float* out, u32 width) {
    begin_launch();
    const u32 row = blockIdx.x;
    const u64 id = token_of(ids, drawn, row);
    for (u32 eighth = threadIdx.x; eighth * 8 < width; eighth += blockDim.x) {
        const CodesOf8 eight = codes_of_row<BITS>(codes, scales, id, width, eighth);
        store_widened(out + u64(row) * width + MUTATE(3, eighth, eighth ^ 1u) * 8, weights_of<BITS>(eight));
    }
}

template <u32 BITS>
__device__ void embed_k_quants(const u8* records, const u32* ids,
                               const u32* drawn, float* out, u32 width) {
    begin_launch();
    const u64 id = token_of(ids, drawn, blockIdx.x);
    for (u32 eighth = threadIdx.x; eighth * 8 < width; eighth += blockDim.x)
        store_widened(out + u64(blockIdx.x) * width + eighth * 8,
                      k_weights_at<BITS>(records, id, MUTATE(4, eighth, eighth ^ 1u), width));
}

extern "C" __global__ void __launch_bounds__(256)
embed_k_quant_4(const u8* records, const u32* ids, const u32* drawn, float* out, u32 width) {
    embed_k_quants<4>(records, ids, drawn, out, width);
}

extern "C" __global__ void __launch_bounds__(256)
embed_k_quant_6(const u8* records, const u32* ids, const u32* drawn, float* out, u32 width) {
    embed_k_quants<6>(records, ids, drawn, out, width);
}

extern "C" __global__ void __launch_bounds__(256)
embed_8(const u8* codes, const u16* scales, const u32* ids, const u32* drawn, float* out, u32 width) {
    embed_codes<8>(codes, scales, ids, drawn, out, width);
}

extern "C" __global__ void __launch_bounds__(256)
embed_4(const u8* codes, const u16* scales, const u32* ids, const u32* drawn, float* out, u32 width) {
    embed_codes<4>(codes, scales, ids, drawn, out, width);
}

extern "C" __global__ void __launch_bounds__(256)
embed_f32(const float* table, const u32* ids, const u32* drawn, float* out, u32 width) {
    embed(table, ids, drawn, out, width);
}

extern "C" __global__ void __launch_bounds__(256)
embed_bf16(const bf16* table, const u32* ids, const u32* drawn, float* out, u32 width) {
    embed(table, ids, drawn, out, width);
}
