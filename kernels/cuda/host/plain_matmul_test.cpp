#include "harness.h"
#include "../plain_matmul.cu"

static void compare(fibres::Order order, u32 m, u32 n, u32 k, bool has_bias, bool add) {
    const auto x = random_values<float>(size_t(m) * k), w = random_values<float>(size_t(n) * k);
    const auto bias = random_values<float>(n), before = random_values<float>(size_t(m) * n);
    Device<float> out(before.size());
    std::copy(before.get(), before.get() + before.size(), out.get());
    LAUNCH(order, dim3((n + 31) / 32, (m + 7) / 8), 256, 0, plain_matmul_f32, x.get(), w.get(),
           has_bias ? bias.get() : nullptr, out.get(), m, n, k, u32(add));
    for (u32 row = 0; row < m; ++row)
        for (u32 column = 0; column < n; ++column) {
            const size_t at = size_t(row) * n + column;
            float sum = 0.0f;
            for (u32 i = 0; i < k; ++i) sum = std::fma(x[size_t(row) * k + i], w[size_t(column) * k + i], sum);
            if (has_bias) sum += bias[column];
            expect_same(bits_of(out[at]), bits_of(add ? before[at] + sum : sum), "out", at);
        }
}

TEST(product_has_the_bits_of_a_fold) {
    for (u32 m : {1u, 9u})
        for (u32 n : {32u, 45u})
            for (u32 k : {31u, 96u}) compare(order, m, n, k, m == 1, k == 96);
}

TEST(bias_and_sum_are_added_in_this_order) {
    compare(order, 8, 33, 64, true, true);
    compare(order, 3, 7, 90, false, false);
}
