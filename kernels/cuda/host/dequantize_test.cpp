#include "../dequantize.cu"
#include "k_quant_case.h"
#include "quantized_case.h"

template <u32 BITS, typename Kernel>
static void dequantized(fibres::Order order, Kernel kernel, u32 n, u32 k) {
    const QuantizedCase<BITS> c(n, k);
    Device<bf16> out(size_t(n) * k);
    LAUNCH(order, dim3(n, (k + 2047) / 2048), 256, 0, kernel, c.codes.get(), c.scales.get(), out.get(), k);
    for (u32 row = 0; row < n; ++row)
        for (u32 at = 0; at < k; ++at)
            expect_same(out[size_t(row) * k + at].bits, c.weight(row, at).bits, "weight", size_t(row) * k + at);
}

TEST(codes_become_the_weights_they_stand_for) {
    dequantized<8>(order, dequantize_8, 3, 96);
    dequantized<8>(order, dequantize_8, 2, 2048 + 64);
    dequantized<4>(order, dequantize_4, 3, 96);
    dequantized<4>(order, dequantize_4, 2, 2048 + 64);
}

template <u32 BITS, typename Kernel>
static void dequantized_records(fibres::Order order, Kernel kernel, u32 n, u32 k) {
    const KQuantCase<BITS> c(n, k);
    Device<bf16> out(size_t(n) * k);
    LAUNCH(order, dim3((n + 15) / 16, (k + 511) / 512), 256, 0, kernel, c.records.get(), out.get(), n, k);
    for (u32 row = 0; row < n; ++row)
        for (u32 at = 0; at < k; ++at)
            expect_same(out[size_t(row) * k + at].bits, c.weight(row, at).bits, "weight", size_t(row) * k + at);
}

TEST(records_of_k_quants_become_the_weights_they_stand_for) {
    dequantized_records<4>(order, k_quant_dequantize_4, 21, 768);
    dequantized_records<4>(order, k_quant_dequantize_4, 3, 512);
    dequantized_records<6>(order, k_quant_dequantize_6, 21, 768);
    dequantized_records<6>(order, k_quant_dequantize_6, 3, 512);
}
