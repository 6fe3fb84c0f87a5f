#include "../quantized_matmul.cu"
#include "quantized_case.h"

template <u32 BITS, typename Kernel>
static void multiplied(fibres::Order order, Kernel kernel, u32 m, u32 n, u32 k, bool has_bias, bool add) {
    const u32 width = n + 5; // the last columns are another's
    const QuantizedCase<BITS> c(n, k);
    auto x = random_values<bf16>(size_t(m) * k);
    auto bias = random_values<float>(n), before = random_values<float>(size_t(m) * width);
    Device<float> out(size_t(m) * width);
    for (size_t i = 0; i < out.size(); ++i) out[i] = before[i];
    LAUNCH(order, dim3((n + 15) / 16, (m + 15) / 16), 256, 0, kernel, x.get(), c.codes.get(), c.scales.get(),
           has_bias ? bias.get() : nullptr, out.get(), m, n, k, width, u32(add));
    for (u32 row = 0; row < m; ++row)
        for (u32 column = 0; column < width; ++column) {
            const size_t at = size_t(row) * width + column;
            if (column >= n) {
                expect_same(bits_of(out[at]), bits_of(before[at]), "another's column", at);
                continue;
            }
            double want = (has_bias ? bias[column] : 0.0) + (add ? before[at] : 0.0);
            for (u32 i = 0; i < k; ++i)
                want += double(value_of(x[size_t(row) * k + i])) * value_of(c.weight(column, i));
            expect_close(out[at], want, 2e-4, "out", at);
        }
}

TEST(products_are_those_of_the_weights_that_codes_stand_for) {
    multiplied<8>(order, quantized_matmul_8, 1, 16, 32, false, false);
    multiplied<8>(order, quantized_matmul_8, 5, 19, 320, true, false);
    multiplied<8>(order, quantized_matmul_8, 18, 7, 96, false, true);
    multiplied<8>(order, quantized_matmul_8, 8, 16, 96, false, false);
    multiplied<8>(order, quantized_matmul_8, 9, 16, 96, false, false);
    multiplied<4>(order, quantized_matmul_4, 1, 16, 32, false, false);
    multiplied<4>(order, quantized_matmul_4, 5, 19, 320, true, true);
    multiplied<4>(order, quantized_matmul_4, 18, 7, 96, false, false);
    // Chunks of a warp: as many as are on their way, one more or less, several times as many.
    for (u32 chunks : {7u, 32u, 33u, 64u, 67u, 120u}) {
        multiplied<8>(order, quantized_matmul_8, 2, 16, 32 * chunks, false, false);
        multiplied<4>(order, quantized_matmul_4, 2, 16, 32 * chunks, false, false);
    }
}
