#include "../attention_decode.cu"
#include "../attention_prefill.cu"
#include "attention_case.h"

struct Kernels {
    decltype(&attention_decode_64) decode;
    decltype(&attention_merge_64) merge;
    decltype(&attention_prefill_64) prefill;
};
static const Kernels OF_64 = {attention_decode_64, attention_merge_64, attention_prefill_64};
static const Kernels OF_128 = {attention_decode_128, attention_merge_128, attention_prefill_128};
static const Kernels OF_256 = {attention_decode_256, attention_merge_256, nullptr};

static void attended(fibres::Order order, const Kernels& kernels, const Shape& shape, const std::vector<u32>& positions,
                     u32 num_padding = 0) {
    std::vector<Sequence> sequences;
    for (u32 position : positions) sequences.push_back({position, 1});
    AttentionCase<bf16> c(shape, sequences);
    std::vector<DecodeUnit> units;
    std::vector<DecodeRow> rows;
    std::vector<PrefillTile> tiles;
    for (u32 row = 0; row < positions.size(); ++row) {
        const u32 first = c.first_seen(positions[row]) / PART_TOKENS, last = positions[row] / PART_TOKENS;
        rows.push_back({row, u32(units.size()), last - first + 1});
        for (u32 part = first; part <= last; ++part) units.push_back({row, positions[row], c.table_starts[row], part});
        tiles.push_back({row, 1, positions[row], c.table_starts[row]});
    }
    for (u32 i = 0; i < num_padding; ++i) units.push_back({NOTHING, 0, 0, 0}), rows.push_back({NOTHING, 0, 0});
    auto device_units = on_device(units);
    auto device_rows = on_device(rows);
    auto device_tiles = on_device(tiles);
    const u32 num_units = u32(units.size()), group = shape.num_heads / shape.num_kv_heads;
    Device<float> acc(size_t(num_units) * shape.num_heads * shape.head_dim), state(size_t(num_units) * shape.num_heads * 2);
    LAUNCH(order, dim3(num_units, shape.num_kv_heads, (group + 15) / 16), 128, DECODE_SHARED(shape.head_dim), kernels.decode,
           c.job, c.q.get(), c.pool.get(), device_units.get(), c.block_tables.get(), acc.get(), state.get());
    LAUNCH(order, dim3(u32(rows.size()), shape.num_heads), 64, 0, kernels.merge, acc.get(), state.get(), device_rows.get(),
           c.sinks_or_null(), c.out.get(), shape.num_heads);
    c.expect(1e-2);
    for (size_t at = acc.size() - size_t(num_padding) * shape.num_heads * shape.head_dim; at < acc.size(); ++at)
        expect_same(bits_of(acc[at]), 0xffffffffu, "part of a unit that only pads", at);
    if (!kernels.prefill) return;

    Device<bf16> prefilled(c.out.size());
    LAUNCH(order, dim3(u32(tiles.size()), shape.num_heads), 128, PREFILL_SHARED(shape.head_dim), kernels.prefill, c.job,
           c.q.get(), c.pool.get(), device_tiles.get(), c.block_tables.get(), c.sinks_or_null(), prefilled.get());
    for (size_t i = 0; i < prefilled.size(); ++i) expect_same(c.out[i].bits, prefilled[i].bits, "bits as of prefill", i);
}

TEST(a_ragged_batch_gets_the_attention_of_the_definition_with_the_bits_of_prefill) {
    attended(order, OF_64, {4, 2, 64, 16, 0, 0, false}, {0, 15, 64, 600});
    attended(order, OF_128, {3, 1, 128, 32, 0, 0, true}, {70, 511});
    attended(order, OF_256, {2, 1, 256, 48, 0, 0, false}, {100});
}

TEST(units_and_rows_that_only_pad_change_nothing) { attended(order, OF_64, {2, 1, 64, 16, 0, 0, false}, {20, 3}, 2); }

TEST(window_softcap_sinks_and_groups_beyond_one_tile_count) {
    attended(order, OF_64, {2, 2, 64, 48, 20, 0, false}, {515, 5});
    attended(order, OF_64, {18, 1, 64, 16, 0, 5, true}, {40});
}
