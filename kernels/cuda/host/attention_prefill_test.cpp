#include "../attention_prefill.cu"
#include "attention_case.h"

template <typename Kernel>
static void attended(fibres::Order order, Kernel kernel, const Shape& shape, const std::vector<Sequence>& sequences) {
    AttentionCase<bf16> c(shape, sequences);
    std::vector<PrefillTile> tiles;
    for (size_t s = 0; s < sequences.size(); ++s)
        for (u32 i = 0; i < sequences[s].num_rows; i += PREFILL_ROWS)
            tiles.push_back({c.first_rows[s] + i, std::min(u32(PREFILL_ROWS), sequences[s].num_rows - i),
                             sequences[s].first_position + i, c.table_starts[s]});
    auto device_tiles = on_device(tiles);
    LAUNCH(order, dim3(u32(tiles.size()), shape.num_heads), 128, PREFILL_SHARED(shape.head_dim), kernel, c.job, c.q.get(),
           c.pool.get(), device_tiles.get(), c.block_tables.get(), c.sinks_or_null(), c.out.get());
    c.expect(1e-2);
}

TEST(chunks_of_ragged_sequences_get_the_attention_of_the_definition) {
    attended(order, attention_prefill_64, {2, 1, 64, 16, 0, 0, false}, {{0, 70}, {530, 3}});
    attended(order, attention_prefill_128, {1, 1, 128, 32, 0, 0, true}, {{37, 9}, {0, 1}});
}

TEST(window_softcap_and_sinks_count) {
    attended(order, attention_prefill_64, {2, 2, 64, 48, 20, 0, false}, {{500, 66}, {3, 2}});
    attended(order, attention_prefill_64, {2, 1, 64, 16, 0, 3, false}, {{20, 10}});
    attended(order, attention_prefill_64, {2, 1, 64, 16, 100, 5, true}, {{450, 80}});
}
