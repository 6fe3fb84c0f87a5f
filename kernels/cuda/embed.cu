// Rows of the embedding table.
//
//   out[row, i] = table[ids[row], i]          out f32 [rows, width]; table f32 or bf16 [vocab, width]
//
// An id with its highest bit set names entry `id & 0x7fffffff` of `drawn`, the tokens that the step before
// this one drew: the host need not have seen them. Ids are checked where they enter.
//
// Grid (rows), 256 threads.
#include "numerics.cuh"

template <typename T>
__device__ void embed(const T* __restrict__ table, const u32* __restrict__ ids, const u32* __restrict__ drawn,
                      float* __restrict__ out, u32 width) {
    const u32 row = blockIdx.x;
    u32 id = ids[row];
    if (id & 0x80000000u) id = drawn[MUTATE(1, id & 0x7fffffffu, 0u)];
    const T* from = table + u64(id) * width;
    float* to = out + u64(row) * width;
    for (u32 i = threadIdx.x; i < width; i += blockDim.x) to[i] = widen(from[MUTATE(2, i, i ^ 1u)]);
}

extern "C" __global__ void __launch_bounds__(256)
embed_f32(const float* table, const u32* ids, const u32* drawn, float* out, u32 width) {
    embed(table, ids, drawn, out, width);
}

extern "C" __global__ void __launch_bounds__(256)
embed_bf16(const bf16* table, const u32* ids, const u32* drawn, float* out, u32 width) {
    embed(table, ids, drawn, out, width);
}
