// Where a key or value of the paged KV pool lies in device memory.
//
//   pool     [layer][block]
//   block    [granule]                      block_size / 16 of them
//   granule  [K plane][V plane]
//   plane    [kv_head][16 tokens][head_dim]
//
// As on the CPU a granule is 16 tokens, a block of any size is a concatenation of granules, and a granule of
// one layer is one piece of memory: what travels between two devices, whatever their block sizes, is granule
// bytes as they are. Inside a head the orders differ. Here a token's features are contiguous: a head of a
// granule is then one piece of 16 * head_dim values (4 KB for 128 features in bf16) that a warp reads in full
// lines, K rows are B operands of `mma.sync` as `ldmatrix` gives them, V rows as `ldmatrix.trans` does. The
// CPU's order (lanes are tokens) and this one are permutations of one another within a head of a granule.
#pragma once

#include "device.cuh"

#define GRANULE_TOKENS 16

struct KvShape {
    u32 num_blocks;
    u32 block_size; // a multiple of 16
    u32 num_kv_heads;
    u32 head_dim;
};

// Index, in values from the start of the pool, of feature 0 of the K of a slot (block * block_size + offset).
__device__ __forceinline__ u64 k_index(const KvShape& shape, u32 layer, u32 slot, u32 kv_head) {
    const u64 head_values = u64(GRANULE_TOKENS) * shape.head_dim;
    const u64 granule = u64(layer) * shape.num_blocks * (shape.block_size / GRANULE_TOKENS) + slot / GRANULE_TOKENS;
    return (granule * 2 * shape.num_kv_heads + kv_head) * head_values + u64(slot % GRANULE_TOKENS) * shape.head_dim;
}

// From the K of a token to its V.
__device__ __forceinline__ u64 v_distance(const KvShape& shape) {
    return u64(shape.num_kv_heads) * GRANULE_TOKENS * shape.head_dim;
}
