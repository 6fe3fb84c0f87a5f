#include "../block_copy.cu"
#include "harness.h"

static const u32 LAYERS = 3, NUM_BLOCKS = 7, WORDS = 4 * 300; // 4,800 bytes per block

static Device<u32> numbered_pool() {
    Device<u32> pool(LAYERS * NUM_BLOCKS * WORDS);
    for (u32 i = 0; i < pool.size(); ++i) pool[i] = i;
    return pool;
}

TEST(pairs_are_copied_in_all_layers_and_nothing_else_changes) {
    auto pool = numbered_pool();
    auto pairs = on_device<u32>({5, 0, 5, 3, 6, 2});
    LAUNCH(order, dim3(3, LAYERS), 256, 0, copy_blocks, reinterpret_cast<uint4*>(pool.get()), pairs.get(), NUM_BLOCKS, WORDS * 4);
    const u32 now[NUM_BLOCKS] = {5, 1, 6, 5, 4, 5, 6};
    for (u32 i = 0; i < pool.size(); ++i) {
        const u32 layer = i / (NUM_BLOCKS * WORDS), block = i / WORDS % NUM_BLOCKS;
        expect_same(pool[i], (layer * NUM_BLOCKS + now[block]) * WORDS + i % WORDS, "pool", i);
    }
}

TEST(named_blocks_are_zeroed_in_all_layers_and_nothing_else_changes) {
    auto pool = numbered_pool();
    auto blocks = on_device<u32>({6, 1});
    LAUNCH(order, dim3(2, LAYERS), 256, 0, clear_blocks, reinterpret_cast<uint4*>(pool.get()), blocks.get(), NUM_BLOCKS, WORDS * 4);
    for (u32 i = 0; i < pool.size(); ++i) {
        const u32 block = i / WORDS % NUM_BLOCKS;
        expect_same(pool[i], block == 6 || block == 1 ? 0 : i, "pool", i);
    }
}
