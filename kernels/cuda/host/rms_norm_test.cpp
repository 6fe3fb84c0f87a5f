#include "../rms_norm.cu"
#include "harness.h"

template <typename T, typename Kernel>
static void normed(fibres::Order order, Kernel kernel, u32 width) {
    const u32 rows = 3;
    const float eps = 0.05f; // large, so that leaving it out shows
    auto x = random_values<float>(rows * width), weight = random_values<float>(width);
    Device<T> out(rows * width);
    LAUNCH(order, rows, 256, 0, kernel, x.get(), weight.get(), eps, out.get(), width);
    for (u32 row = 0; row < rows; ++row) {
        double squares = 0;
        for (u32 i = 0; i < width; ++i) squares += double(x[row * width + i]) * x[row * width + i];
        const double scale = 1 / std::sqrt(squares / width + eps);
        for (u32 i = 0; i < width; ++i) {
            const size_t at = row * width + i;
            expect_close(value_of(out[at]), x[at] * scale * weight[i], TOLERANCE<T>, "out", at);
        }
    }
}

TEST(rows_are_normed) {
    for (u32 width : {7u, 64u, 301u, 1024u, 5128u}) {
        normed<float>(order, rms_norm_f32, width);
        normed<bf16>(order, rms_norm_bf16, width);
    }
}

// A row's bits must not depend on what else is in the step.
TEST(a_row_alone_has_the_bits_it_has_among_others) {
    const u32 rows = 4, width = 700;
    auto x = random_values<float>(rows * width), weight = random_values<float>(width);
    Device<float> all(rows * width), one(width);
    LAUNCH(order, rows, 256, 0, rms_norm_f32, x.get(), weight.get(), 1e-6f, all.get(), width);
    for (u32 row = 0; row < rows; ++row) {
        float* from = x.get() + row * width;
        LAUNCH(order, 1, 256, 0, rms_norm_f32, from, weight.get(), 1e-6f, one.get(), width);
        for (u32 i = 0; i < width; ++i)
            expect_same(bits_of(one[i]), bits_of(all[row * width + i]), "bits", row * width + i);
    }
}
