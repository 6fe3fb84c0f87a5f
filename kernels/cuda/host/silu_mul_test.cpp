#include "../silu_mul.cu"
#include "harness.h"

template <typename T, typename Kernel>
static void gated(fibres::Order order, Kernel kernel, u32 ffn) {
    const u32 rows = 3;
    auto gate_up = random_values<float>(rows * 2 * ffn, -20, 20);
    Device<T> out(rows * ffn);
    LAUNCH(order, dim3(rows, (ffn + 1023) / 1024), 256, 0, kernel, gate_up.get(), out.get(), ffn);
    for (u32 row = 0; row < rows; ++row)
        for (u32 i = 0; i < ffn; ++i) {
            const double g = gate_up[row * 2 * ffn + i], u = gate_up[row * 2 * ffn + ffn + i];
            expect_close(value_of(out[row * ffn + i]), g / (1 + std::exp(-g)) * u, TOLERANCE<T>, "out", row * ffn + i);
        }
}

TEST(gate_and_up_are_multiplied) {
    for (u32 ffn : {5u, 512u, 1024u, 2500u}) {
        gated<float>(order, silu_mul_f32, ffn);
        gated<bf16>(order, silu_mul_bf16, ffn);
    }
}

#ifndef __CUDACC__
TEST(the_exponential_is_within_two_ulp_and_exact_at_its_ends) {
    (void)order;
    for (double x = -87.2; x < 88.7; x += 0.0137)
        expect_close(own_exp(float(x)) / std::exp(double(float(x))), 1, 2.4e-7, "exp", size_t(x + 100));
    expect_close(own_exp(0.0f), 1, 0, "exp(0)", 0);
    expect_close(own_exp(-100.0f), 0, 0, "exp(-100)", 0);
    if (own_exp(100.0f) != INFINITY) fibres::fail("exp(100) is %g, expected infinity", own_exp(100.0f));
}
#endif
