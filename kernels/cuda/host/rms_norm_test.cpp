#include "../rms_norm.cu"
#include "harness.h"

template <typename T, typename Kernel>
static void normed(fibres::Order order, Kernel kernel, u32 width, bool has_delta) {
    const u32 rows = 3;
    const float eps = 0.05f; // large, so that leaving it out shows
    auto x = random_values<float>(rows * width), delta = random_values<float>(rows * width);
    auto weight = random_values<float>(width);
    std::vector<double> sum(x.size());
    for (size_t i = 0; i < sum.size(); ++i) sum[i] = has_delta ? x[i] + delta[i] : x[i];
    Device<T> out(rows * width);
    const float* add = has_delta ? delta.get() : nullptr;
    LAUNCH(order, rows, 256, 0, kernel, x.get(), add, weight.get(), eps, out.get(), width);
    for (u32 row = 0; row < rows; ++row) {
        double squares = 0;
        for (u32 i = 0; i < width; ++i) squares += sum[row * width + i] * sum[row * width + i];
        const double scale = 1 / std::sqrt(squares / width + eps);
        for (u32 i = 0; i < width; ++i) {
            const size_t at = row * width + i;
            expect_close(x[at], float(sum[at]), 1e-7, "x", at);
            expect_close(value_of(out[at]), sum[at] * scale * weight[i], TOLERANCE<T>, "out", at);
        }
    }
}

TEST(rows_are_normed_with_and_without_a_residual) {
    for (u32 width : {8u, 64u, 300u, 1024u})
        for (bool has_delta : {false, true}) {
            normed<float>(order, rms_norm_f32, width, has_delta);
            normed<bf16>(order, rms_norm_bf16, width, has_delta);
        }
}

// A row's bits must not depend on what else is in the step.
TEST(a_row_alone_has_the_bits_it_has_among_others) {
    const u32 rows = 4, width = 700;
    auto x = random_values<float>(rows * width), weight = random_values<float>(width);
    Device<float> all(rows * width), one(width);
    LAUNCH(order, rows, 256, 0, rms_norm_f32, x.get(), nullptr, weight.get(), 1e-6f, all.get(), width);
    for (u32 row = 0; row < rows; ++row) {
        float* from = x.get() + row * width;
        LAUNCH(order, 1, 256, 0, rms_norm_f32, from, nullptr, weight.get(), 1e-6f, one.get(), width);
        for (u32 i = 0; i < width; ++i)
            expect_same(bits_of(one[i]), bits_of(all[row * width + i]), "bits", row * width + i);
    }
}
