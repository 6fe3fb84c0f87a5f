#include "../w8a8_matmul.cu"
#include "harness.h"

static std::vector<int> random_codes(size_t count) {
    std::vector<int> codes(count);
    for (int& code : codes) code = int(random_below(255)) - 127;
    return codes;
}

static Device<u8> bytes_of(const std::vector<int>& codes) {
    Device<u8> bytes(codes.size());
    for (size_t i = 0; i < codes.size(); ++i) bytes[i] = u8(codes[i]);
    return bytes;
}

template <typename Kernel>
static void multiplied(fibres::Order order, Kernel kernel, u32 tile, u32 shared, u32 m, u32 n, u32 k,
                       bool has_bias, bool add) {
    const u32 width = n + 3; // the last columns are another's
    const auto x = random_codes(size_t(m) * k), w = random_codes(size_t(n) * k);
    auto x_bytes = bytes_of(x), w_bytes = bytes_of(w);
    auto x_scales = random_values<float>(m), w_scales = random_values<float>(n), bias = random_values<float>(n);
    auto before = random_values<float>(size_t(m) * width);
    Device<float> out(size_t(m) * width);
    for (size_t i = 0; i < out.size(); ++i) out[i] = before[i];
    LAUNCH(order, dim3((n + tile - 1) / tile, (m + tile - 1) / tile), 256, shared, kernel, x_bytes.get(),
           x_scales.get(), w_bytes.get(), w_scales.get(), has_bias ? bias.get() : nullptr, out.get(), m, n, k, width,
           u32(add));
    for (u32 row = 0; row < m; ++row)
        for (u32 column = 0; column < width; ++column) {
            const size_t at = size_t(row) * width + column;
            if (column >= n) {
                expect_same(bits_of(out[at]), bits_of(before[at]), "another's column", at);
                continue;
            }
            int64_t dot = 0;
            for (u32 i = 0; i < k; ++i) dot += x[size_t(row) * k + i] * w[size_t(column) * k + i];
            const float scale = x_scales[row] * w_scales[column];
            float want = float(dot) * scale;
            if (has_bias) want += bias[column];
            if (add) want = before[at] + want;
            expect_same(bits_of(out[at]), bits_of(want), "out", at);
        }
}

TEST(products_of_few_rows_are_exact) {
    multiplied(order, w8a8_matmul, 16, 0, 1, 16, 64, false, false);
    multiplied(order, w8a8_matmul, 16, 0, 5, 19, 1104, true, false);
    multiplied(order, w8a8_matmul, 16, 0, 18, 7, 48, true, true);
}

TEST(products_of_many_rows_are_exact) {
    multiplied(order, w8a8_matmul_tiled, 128, W8A8_SHARED, 1, 1, 16, false, false);
    multiplied(order, w8a8_matmul_tiled, 128, W8A8_SHARED, 131, 70, 336, true, true);
    multiplied(order, w8a8_matmul_tiled, 128, W8A8_SHARED, 77, 133, 80, false, false);
}

TEST(rows_become_integers_with_a_scale) {
    const u32 m = 6, k = 2048 + 16;
    auto x = random_values<bf16>(size_t(m) * k);
    for (u32 i = 0; i < k; ++i) x[size_t(1) * k + i].bits = 0;                               // zeros
    for (u32 i = 0; i < k; ++i) set(&x[size_t(2) * k + i], 1e-34 * (i + 1)); // less than there is a scale for
    x[size_t(3) * k + 5].bits = 0x7fc0, x[size_t(4) * k + 2050].bits = 0xff80;               // no number, -infinity
    for (u32 i = 0; i < k; ++i) set(&x[size_t(5) * k + i], i == 1000 ? -254 : int(i % 9) - 4); // halves
    Device<u8> codes(size_t(m) * k);
    Device<float> scales(m);
    LAUNCH(order, m, 256, 0, w8a8_quantize, x.get(), codes.get(), scales.get(), k);
    for (u32 row = 0; row < m; ++row) {
        float largest = 0;
        bool is_finite = true;
        for (u32 i = 0; i < k; ++i) {
            const float value = value_of(x[size_t(row) * k + i]);
            is_finite = is_finite && std::isfinite(value);
            largest = std::fmax(largest, std::fabs(value));
        }
        const bool is_zero = largest < 1e-30f;
        if (is_finite) expect_same(bits_of(scales[row]), bits_of(is_zero ? 0.0f : largest / 127.0f), "scale", row);
        else if (std::isfinite(scales[row])) fibres::fail("row %u has a finite scale", row);
        for (u32 i = 0; i < k; ++i) {
            const float scaled = value_of(x[size_t(row) * k + i]) * (127.0f / largest);
            const int want = is_finite && !is_zero ? int(std::nearbyint(scaled)) : 0;
            expect_same(codes[size_t(row) * k + i], u8(want), "code", size_t(row) * k + i);
        }
    }
}
