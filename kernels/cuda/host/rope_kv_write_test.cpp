#include "../rope_kv_write.cu"
#include "harness.h"

struct Case {
    u32 q_heads, kv_heads, dim, rot_dim, block_size;
    bool has_norm;
    bool has_padding = false; // the last row
};

template <typename T, typename Kernel>
static void written(fibres::Order order, Kernel kernel, const Case& c) {
    const u32 rows = 5, layers = 2, layer = 1, num_blocks = 4, heads = c.q_heads + 2 * c.kv_heads, max_position = 40;
    const float eps = 0.01f;
    const KvShape kv{num_blocks, c.block_size, c.kv_heads, c.dim};
    auto qkv = random_values<float>(rows * heads * c.dim);
    auto q_norm = random_values<float>(c.dim), k_norm = random_values<float>(c.dim);
    auto cosines = random_values<float>(max_position * c.rot_dim / 2, -1, 1);
    auto sines = random_values<float>(max_position * c.rot_dim / 2, -1, 1);
    auto positions = on_device(random_choice(rows, max_position));
    auto slots = on_device(random_choice(rows, num_blocks * c.block_size));
    if (c.has_padding) slots[rows - 1] = NOTHING;
    Device<T> q_out(rows * c.q_heads * c.dim);
    Device<T> pool(size_t(layers) * num_blocks * c.block_size * 2 * c.kv_heads * c.dim);
    // What the kernel does not write stays, so it must begin as something recognisable.
    for (size_t i = 0; i < pool.size(); ++i) set(&pool[i], 3);
    const RopeWrite job{kv, layer, c.q_heads, c.rot_dim, eps};
    const float *qn = c.has_norm ? q_norm.get() : nullptr, *kn = c.has_norm ? k_norm.get() : nullptr;
    LAUNCH(order, dim3(rows, (heads + 3) / 4), 128, 0, kernel, job, qkv.get(), qn, kn, cosines.get(), sines.get(), positions.get(), slots.get(), q_out.get(), pool.get());

    std::vector<double> want_pool(pool.size(), 3.0);
    for (u32 row = 0; row < rows; ++row)
        for (u32 head = 0; head < heads; ++head) {
            const bool is_v = head >= c.q_heads + c.kv_heads, is_k = head >= c.q_heads && !is_v;
            std::vector<double> x(c.dim), y;
            double squares = 0;
            for (u32 i = 0; i < c.dim; ++i) {
                x[i] = qkv[(row * heads + head) * c.dim + i];
                squares += x[i] * x[i];
            }
            if (c.has_norm && !is_v)
                for (u32 i = 0; i < c.dim; ++i)
                    x[i] = x[i] / std::sqrt(squares / c.dim + eps) * (is_k ? k_norm[i] : q_norm[i]);
            y = x;
            const u32 half = c.rot_dim / 2;
            for (u32 i = 0; i < half && !is_v; ++i) {
                const double cos = cosines[positions[row] * half + i], sin = sines[positions[row] * half + i];
                y[i] = x[i] * cos - x[i + half] * sin;
                y[i + half] = x[i + half] * cos + x[i] * sin;
            }
            // The layout as its drawing says: [layer][block][granule][K, V][head][16][dim].
            const u32 block = slots[row] / c.block_size, offset = slots[row] % c.block_size;
            const size_t granules = c.block_size / 16, plane = size_t(c.kv_heads) * 16 * c.dim;
            const size_t granule = (size_t(layer) * num_blocks + block) * granules + offset / 16;
            for (u32 i = 0; i < c.dim; ++i) {
                if (!is_v && !is_k) {
                    const size_t at = (row * c.q_heads + head) * c.dim + i;
                    expect_close(value_of(q_out[at]), y[i], TOLERANCE<T>, "q_out", at);
                } else if (slots[row] != NOTHING) {
                    const u32 kv_head = head - c.q_heads - (is_v ? c.kv_heads : 0);
                    want_pool[granule * 2 * plane + (is_v ? plane : 0) + (kv_head * 16 + offset % 16) * c.dim + i] = y[i];
                }
            }
        }
    for (size_t i = 0; i < pool.size(); ++i) expect_close(value_of(pool[i]), want_pool[i], TOLERANCE<T>, "pool", i);
}

TEST(q_is_rotated_and_k_and_v_land_in_their_slots) {
    const Case cases[] = {{4, 2, 64, 64, 16, false}, {3, 1, 20, 12, 32, true}, {2, 2, 256, 256, 48, true}};
    for (const Case& c : cases) {
        written<float>(order, rope_kv_write_f32, c);
        written<bf16>(order, rope_kv_write_bf16, c);
    }
}

TEST(k_and_v_of_a_row_that_only_pads_go_nowhere) {
    written<float>(order, rope_kv_write_f32, {2, 1, 16, 16, 16, false, true});
    written<bf16>(order, rope_kv_write_bf16, {2, 1, 16, 16, 16, true, true});
}
