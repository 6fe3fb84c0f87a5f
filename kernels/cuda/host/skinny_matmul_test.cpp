#include "../silu_mul.cu"
#include "../skinny_matmul.cu"
#include "harness.h"

static void multiplied(fibres::Order order, u32 m, u32 n, u32 k, bool has_bias, bool add) {
    auto x = random_values<bf16>(size_t(m) * k), w = random_values<bf16>(size_t(n) * k);
    auto bias = random_values<float>(n), out = random_values<float>(size_t(m) * n);
    std::vector<double> want(size_t(m) * n);
    for (u32 row = 0; row < m; ++row)
        for (u32 column = 0; column < n; ++column) {
            double sum = has_bias ? bias[column] : 0;
            if (add) sum += out[row * n + column];
            for (u32 i = 0; i < k; ++i) sum += double(value_of(x[row * k + i])) * value_of(w[column * k + i]);
            want[row * n + column] = sum;
        }
    LAUNCH(order, dim3((n + 15) / 16, (m + 15) / 16), 256, 0, skinny_matmul_bf16, x.get(), w.get(),
           has_bias ? bias.get() : nullptr, out.get(), m, n, k, u32(add));
    for (size_t i = 0; i < want.size(); ++i) expect_close(out[i], want[i], 2e-4, "out", i);
}

TEST(few_rows_times_any_matrix) {
    multiplied(order, 1, 40, 256, false, false);
    multiplied(order, 5, 16, 520, true, false);
    multiplied(order, 16, 33, 64, false, true);
    multiplied(order, 19, 24, 1040, true, true);
}

TEST(a_row_alone_has_the_bits_it_has_among_others) {
    const u32 m = 11, n = 24, k = 328;
    auto x = random_values<bf16>(m * k), w = random_values<bf16>(n * k);
    Device<float> all(m * n), one(n);
    LAUNCH(order, dim3(2, 1), 256, 0, skinny_matmul_bf16, x.get(), w.get(), nullptr, all.get(), m, n, k, 0u);
    for (u32 row : {0u, 7u, 10u}) {
        auto alone = on_device(std::vector<bf16>(x.get() + row * k, x.get() + (row + 1) * k));
        LAUNCH(order, dim3(2, 1), 256, 0, skinny_matmul_bf16, alone.get(), w.get(), nullptr, one.get(), 1u, n, k, 0u);
        for (u32 i = 0; i < n; ++i) expect_same(bits_of(one[i]), bits_of(all[row * n + i]), "bits", row * n + i);
    }
}

TEST(gate_and_up_have_the_bits_of_a_product_and_the_gate) {
    for (u32 m : {1u, 5u, 16u, 21u})
        for (u32 ffn : {8u, 20u, 48u}) {
            const u32 k = 328;
            auto x = random_values<bf16>(m * k), w = random_values<bf16>(2 * ffn * k);
            Device<float> product(m * 2 * ffn);
            Device<bf16> wanted(m * ffn), found(m * ffn);
            LAUNCH(order, dim3((2 * ffn + 15) / 16, (m + 15) / 16), 256, 0, skinny_matmul_bf16, x.get(), w.get(), nullptr,
                   product.get(), m, 2 * ffn, k, 0u);
            LAUNCH(order, dim3(m, 1), 256, 0, silu_mul_bf16, product.get(), wanted.get(), ffn);
            LAUNCH(order, dim3((ffn + 7) / 8, (m + 15) / 16), 256, 0, skinny_gate_up_bf16, x.get(), w.get(), found.get(), m, ffn, k);
            for (u32 i = 0; i < m * ffn; ++i) expect_same(found[i].bits, wanted[i].bits, "out", i);
        }
}
