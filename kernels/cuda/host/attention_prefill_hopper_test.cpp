#include "../attention_prefill.cu"
#include "../attention_prefill_hopper.cu"
#include "attention_case.h"
#include "tensor_map.h"

struct Kernels {
    decltype(&attention_prefill_hopper_64) hopper;
    decltype(&attention_prefill_64) portable;
};
static const Kernels OF_64 = {attention_prefill_hopper_64, attention_prefill_64};
static const Kernels OF_128 = {attention_prefill_hopper_128, attention_prefill_128};

// Tiles of `rows` rows; every row's attention, and its bits as of the portable kernel (of tiles of 64).
static void attended(fibres::Order order, const Kernels& kernels, const Shape& shape, const std::vector<Sequence>& sequences,
                     u32 rows = PREFILL_ROWS) {
    AttentionCase<bf16> c(shape, sequences);
    const auto tiles_of = [&](u32 rows) {
        std::vector<PrefillTile> tiles;
        for (size_t s = 0; s < sequences.size(); ++s)
            for (u32 i = 0; i < sequences[s].num_rows; i += rows)
                tiles.push_back({c.first_rows[s] + i, std::min(rows, sequences[s].num_rows - i),
                                 sequences[s].first_position + i, c.table_starts[s]});
        return on_device(tiles);
    };
    const KvShape& kv = c.job.kv;
    const TensorMap pool = tensor_map(
        c.pool.get(), {shape.head_dim, 16, 2 * shape.num_kv_heads, u64(c.LAYERS) * kv.num_blocks * (shape.block_size / 16)},
        {64, 16, 1, HOPPER_BOX_TOKENS(shape.block_size) / 16});
    const auto tiles = tiles_of(rows), whole_tiles = tiles_of(PREFILL_ROWS);
    const u32 pairs = (shape.num_heads / shape.num_kv_heads + 1) / 2;
    LAUNCH(order, dim3(u32(tiles.size()), shape.num_kv_heads * pairs), 384, HOPPER_SHARED(shape.head_dim), kernels.hopper,
           c.job, c.q.get(), pool, tiles.get(), c.block_tables.get(), c.sinks_or_null(), c.out.get());
    c.expect(1e-2);

    Device<bf16> portable(c.out.size());
    LAUNCH(order, dim3(u32(whole_tiles.size()), shape.num_heads), 128, PREFILL_SHARED(shape.head_dim), kernels.portable, c.job,
           c.q.get(), c.pool.get(), whole_tiles.get(), c.block_tables.get(), c.sinks_or_null(), portable.get());
#ifdef __CUDACC__
    size_t same = 0;
    for (size_t i = 0; i < portable.size(); ++i) {
        same += c.out[i].bits == portable[i].bits;
        expect_close(value_of(c.out[i]), value_of(portable[i]), 1e-2, "as of the portable kernel", i);
    }
    std::printf("   %zu of %zu values have the bits of the portable kernel\n", same, portable.size());
#else
    for (size_t i = 0; i < portable.size(); ++i) expect_same(c.out[i].bits, portable[i].bits, "bits as of the portable kernel", i);
#endif
}

TEST(chunks_of_ragged_sequences_get_the_attention_of_the_definition_with_the_bits_of_the_portable_kernel) {
    attended(order, OF_64, {2, 1, 64, 16, 0, 0, false}, {{0, 70}, {530, 3}});
    attended(order, OF_128, {1, 1, 128, 32, 0, 0, true}, {{37, 9}, {0, 1}});
    attended(order, OF_128, {3, 1, 128, 64, 0, 0, false}, {{575, 2}});
    attended(order, OF_128, {4, 2, 128, 128, 0, 0, false}, {{100, 60}});
}

TEST(window_softcap_and_sinks_count) {
    attended(order, OF_64, {2, 2, 64, 48, 20, 0, false}, {{500, 66}, {3, 2}});
    attended(order, OF_64, {2, 1, 64, 16, 0, 3, false}, {{20, 10}});
    attended(order, OF_64, {2, 1, 64, 16, 100, 5, true}, {{450, 80}});
    attended(order, OF_128, {2, 1, 128, 96, 300, 0, true}, {{700, 20}});
}

TEST(a_row_has_the_same_bits_in_any_tile) { attended(order, OF_64, {2, 1, 64, 32, 150, 0, false}, {{490, 40}}, 7); }
