#include "../k_quant_matmul.cu"
#include "k_quant_case.h"

template <u32 BITS, typename Kernel>
static void multiplied(fibres::Order order, Kernel kernel, u32 m, u32 n, u32 k, u32 width, bool has_bias, bool add) {
    const KQuantCase<BITS> c(n, k);
    auto x = random_values<bf16>(size_t(m) * k);
    auto bias = random_values<float>(n), before = random_values<float>(size_t(m) * width);
    Device<float> out(size_t(m) * width);
    for (size_t i = 0; i < out.size(); ++i) out[i] = before[i];
    LAUNCH(order, dim3((n + 15) / 16, (m + 15) / 16), 256, 0, kernel, x.get(), c.records.get(),
           has_bias ? bias.get() : nullptr, out.get(), m, n, k, width, u32(add));
    for (u32 row = 0; row < m; ++row)
        for (u32 column = 0; column < width; ++column) {
            const size_t at = size_t(row) * width + column;
            if (column >= n) {
                expect_same(bits_of(out[at]), bits_of(before[at]), "another's column", at);
                continue;
            }
            double want = (has_bias ? bias[column] : 0.0) + (add ? before[at] : 0.0), magnitude = 1.0;
            for (u32 i = 0; i < k; ++i) {
                const double product = double(value_of(x[size_t(row) * k + i])) * value_of(c.weight(column, i));
                want += product, magnitude = std::fmax(magnitude, std::fabs(want));
            }
            expect_close(out[at] / magnitude, want / magnitude, 2e-4, "out, of its largest partial sum", at);
        }
}

TEST(products_are_those_of_the_weights_that_codes_stand_for) {
    multiplied<4>(order, k_quant_matmul_4, 1, 16, 256, 16, false, false);
    multiplied<4>(order, k_quant_matmul_4, 5, 19, 768, 30, true, true);
    multiplied<4>(order, k_quant_matmul_4, 18, 7, 512, 7, false, false);
    multiplied<4>(order, k_quant_matmul_4, 8, 16, 512, 16, false, false);
    multiplied<4>(order, k_quant_matmul_4, 9, 16, 512, 16, false, false);
    multiplied<4>(order, k_quant_matmul_4, 2, 3, 2816, 4, false, false);
    multiplied<6>(order, k_quant_matmul_6, 1, 16, 256, 16, false, false);
    multiplied<6>(order, k_quant_matmul_6, 5, 19, 768, 30, true, true);
    multiplied<6>(order, k_quant_matmul_6, 18, 7, 512, 7, false, false);
    multiplied<6>(order, k_quant_matmul_6, 2, 3, 2816, 4, false, false);
    // Twice as many records as are on their way, and a half; three times.
    for (u32 blocks : {16u, 17u, 24u}) {
        multiplied<4>(order, k_quant_matmul_4, 2, 3, 256 * blocks, 3, false, false);
        multiplied<6>(order, k_quant_matmul_6, 2, 3, 256 * blocks, 3, false, false);
    }
}
