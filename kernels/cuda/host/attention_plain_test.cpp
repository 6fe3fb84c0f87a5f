#include "../attention_plain.cu"
#include "attention_case.h"

template <typename T, typename Kernel>
static void attended(fibres::Order order, Kernel kernel, const Shape& shape, const std::vector<Sequence>& sequences, double tolerance,
                     u32 num_padding = 0) {
    AttentionCase<T> c(shape, sequences);
    std::vector<PlainRow> rows;
    for (size_t s = 0; s < sequences.size(); ++s)
        for (u32 i = 0; i < sequences[s].num_rows; ++i)
            rows.push_back({c.first_rows[s] + i, sequences[s].first_position + i, c.table_starts[s]});
    for (u32 i = 0; i < num_padding; ++i) rows.push_back({NOTHING, 0, 0});
    auto device_rows = on_device(rows);
    LAUNCH(order, dim3(u32(rows.size()), shape.num_heads), 128, 0, kernel, c.job, c.q.get(), c.pool.get(), device_rows.get(),
           c.block_tables.get(), c.sinks_or_null(), c.out.get());
    c.expect(tolerance);
}

TEST(rows_of_ragged_sequences_get_the_attention_of_the_definition) {
    const std::vector<Sequence> sequences = {{0, 3}, {700, 1}, {62, 3}, {1100, 1}};
    const Shape shapes[] = {{4, 2, 64, 16, 0, 0, false}, {3, 1, 20, 48, 0, 0, true}, {2, 2, 200, 32, 20, 5, true}};
    for (const Shape& shape : shapes) {
        attended<float>(order, attention_plain_f32, shape, sequences, 1e-5);
        attended<bf16>(order, attention_plain_bf16, shape, sequences, 1e-2);
    }
    attended<float>(order, attention_plain_f32, {2, 2, 8, 16, 20, 0, false}, {{515, 2}}, 1e-5);
    attended<bf16>(order, attention_plain_bf16, {2, 1, 8, 16, 0, 0, false}, {{20, 1}, {3, 1}}, 1e-2, 2);
}
