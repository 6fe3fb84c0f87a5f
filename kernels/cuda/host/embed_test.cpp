#include "../embed.cu"
#include "k_quant_case.h"
#include "quantized_case.h"

template <typename T, typename Kernel>
static void rows_come_out(fibres::Order order, Kernel kernel, u32 width) {
    const u32 vocab = 9, rows = 6;
    auto table = random_values<T>(vocab * width);
    auto ids = on_device<u32>({3, 8, 0x80000000u | 2, 0, 0x80000000u | 0, 3});
    auto drawn = on_device<u32>({7, 1, 5});
    const u32 wanted[rows] = {3, 8, 5, 0, 7, 3};
    Device<float> out(rows * width);
    LAUNCH(order, rows, 256, 0, kernel, table.get(), ids.get(), drawn.get(), out.get(), width);
    for (u32 row = 0; row < rows; ++row)
        for (u32 i = 0; i < width; ++i)
            expect_close(out[row * width + i], value_of(table[wanted[row] * width + i]), 0, "out", row * width + i);
}

TEST(rows_of_known_and_of_just_drawn_tokens_come_out) {
    for (u32 width : {1u, 70u, 256u, 515u}) {
        rows_come_out<float>(order, embed_f32, width);
        rows_come_out<bf16>(order, embed_bf16, width);
    }
}

template <u32 BITS, typename Kernel>
static void rows_of_codes_come_out(fibres::Order order, Kernel kernel, u32 width) {
    const QuantizedCase<BITS> c(9, width);
    auto ids = on_device<u32>({3, 8, 0x80000000u | 1, 0});
    auto drawn = on_device<u32>({7, 5});
    const u32 rows = 4, wanted[rows] = {3, 8, 5, 0};
    Device<float> out(rows * width);
    LAUNCH(order, rows, 256, 0, kernel, c.codes.get(), c.scales.get(), ids.get(), drawn.get(), out.get(), width);
    for (u32 row = 0; row < rows; ++row)
        for (u32 i = 0; i < width; ++i)
            expect_close(out[row * width + i], value_of(c.weight(wanted[row], i)), 0, "out", row * width + i);
}

TEST(rows_of_codes_come_out_as_what_they_stand_for) {
    for (u32 width : {32u, 96u, 2048u + 64u}) {
        rows_of_codes_come_out<8>(order, embed_8, width);
        rows_of_codes_come_out<4>(order, embed_4, width);
    }
}

template <u32 BITS, typename Kernel>
static void rows_of_records_come_out(fibres::Order order, Kernel kernel, u32 width) {
    const KQuantCase<BITS> c(27, width);
    auto ids = on_device<u32>({3, 26, 0x80000000u | 1, 0});
    auto drawn = on_device<u32>({7, 21});
    const u32 rows = 4, wanted[rows] = {3, 26, 21, 0};
    Device<float> out(rows * width);
    LAUNCH(order, rows, 256, 0, kernel, c.records.get(), ids.get(), drawn.get(), out.get(), width);
    for (u32 row = 0; row < rows; ++row)
        for (u32 i = 0; i < width; ++i)
            expect_close(out[row * width + i], value_of(c.weight(wanted[row], i)), 0, "out", row * width + i);
}

TEST(rows_of_k_quants_come_out_as_what_they_stand_for) {
    for (u32 width : {256u, 768u, 2048u + 256u}) {
        rows_of_records_come_out<4>(order, embed_k_quant_4, width);
        rows_of_records_come_out<6>(order, embed_k_quant_6, width);
    }
}
