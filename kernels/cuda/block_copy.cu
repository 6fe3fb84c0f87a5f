// Whole blocks of the KV pool, in all layers: copied for copy-on-write, zeroed when they are allocated.
//
//   copy_blocks    pool[layer, pairs[2 i + 1]] = pool[layer, pairs[2 i]]      for every layer and pair i
//   clear_blocks   pool[layer, blocks[i]] = 0                                 for every layer and i
//
// The pool is bytes [layer][block][block_bytes], block_bytes a multiple of 16. A destination is in no other
// pair of the call, neither as source nor as destination.
//
// Grid (pairs or blocks, layers), 256 threads, 16 bytes each at a time.
#include "device.cuh"

extern "C" __global__ void __launch_bounds__(256)
copy_blocks(uint4* pool, const u32* pairs, u32 num_blocks, u64 block_bytes) {
    begin_launch();
    const u64 units = block_bytes / 16, layer = u64(blockIdx.y) * num_blocks;
    const uint4* from = pool + (layer + pairs[2 * blockIdx.x + MUTATE(1, 0, 1)]) * units;
    uint4* to = pool + (layer + pairs[2 * blockIdx.x + 1]) * units;
    for (u64 i = threadIdx.x; i < units; i += 256) to[i] = from[i];
}

extern "C" __global__ void __launch_bounds__(256)
clear_blocks(uint4* pool, const u32* blocks, u32 num_blocks, u64 block_bytes) {
    begin_launch();
    const u64 units = block_bytes / 16;
    uint4* to = pool + (u64(blockIdx.y) * num_blocks + blocks[blockIdx.x]) * units;
    for (u64 i = threadIdx.x; i < MUTATE(2, units, units - 1); i += 256) to[i] = make_uint4(0, 0, 0, 0);
}
