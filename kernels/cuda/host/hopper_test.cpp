// The instructions of hopper.cuh: that they are what is documented, on a GPU too; and what their emulation has to notice.
#include "tensor_map.h"
#ifndef __CUDACC__
#include "misuse.h"

// Kernels of tests are not launched behind others.
static const bool is_begun_by_none = fibres::must_begin = false;
#endif

// Where the memory of a block that is aligned as swizzled panels have to be begins.
__device__ inline unsigned char* panels(unsigned char* memory) {
    return memory + (1024 - shared_address(memory) % 1024) % 1024;
}

__device__ inline unsigned char* value_at(unsigned char* panel, u32 line, u32 i) {
    return panel + line * LINE_BYTES + ((i / 8 ^ line % 8) << 4) + i % 8 * 2;
}

// Two boxes of `map` to shared memory, and all of it to `out` [2][32][64] in the order of lines and values.
extern "C" __global__ void copies_boxes(const GRID_CONSTANT TensorMap map, bf16* out) {
    DYNAMIC_SHARED(memory);
    unsigned char* box = panels(memory);
    u64* barrier = reinterpret_cast<u64*>(box + 2 * 32 * LINE_BYTES);
    if (threadIdx.x == 0) {
        barrier_init(barrier, 1);
        barriers_are_made();
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        barrier_expect(barrier, 2 * 32 * LINE_BYTES);
        copy_box(box, &map, 0, 0, 1, 3, barrier);
        copy_box(box + 32 * LINE_BYTES, &map, 64, 0, 2, 0, barrier);
    }
    barrier_wait(barrier, 0);
    for (u32 i = threadIdx.x; i < 2 * 32 * 64; i += blockDim.x)
        out[i] = *reinterpret_cast<bf16*>(value_at(box + i / (32 * 64) * 32 * LINE_BYTES, i / 64 % 32, i % 64));
}

TEST(a_box_of_a_tensor_comes_in_the_order_of_the_swizzle) {
    const u64 dims[4] = {128, 16, 3, 5};
    auto values = random_values<bf16>(dims[0] * dims[1] * dims[2] * dims[3]);
    Device<bf16> out(2 * 32 * 64);
    const TensorMap map = tensor_map(values.get(), {dims[0], dims[1], dims[2], dims[3]}, {64, 16, 1, 2});
    LAUNCH(order, 1, 64, 1024 + 2 * 32 * LINE_BYTES + 8, copies_boxes, map, out.get());
    for (u32 i = 0; i < out.size(); ++i) {
        const u32 second = i / (32 * 64), line = i / 64 % 32, granule = (second ? 0 : 3) + line / 16, head = second ? 2 : 1;
        const size_t at = ((granule * dims[2] + head) * dims[1] + line % 16) * dims[0] + second * 64 + i % 64;
        expect_same(out[i].bits, values[at].bits, "value of a box", i);
    }
}

// out [64][64] = a [64][128] keys [64][128]^T, and out_values [64][128] = a's first 16 values of a row * values [16][128].
extern "C" __global__ void multiplies(const bf16* a, const bf16* keys, const bf16* values, float* out, float* out_values) {
    DYNAMIC_SHARED(memory);
    unsigned char *a_panels = panels(memory), *key_panels = a_panels + 2 * 64 * LINE_BYTES;
    unsigned char* value_panels = key_panels + 2 * 64 * LINE_BYTES;
    for (u32 i = threadIdx.x; i < 64 * 128; i += 128) {
        const u32 row = i / 128, panel = i % 128 / 64;
        *reinterpret_cast<bf16*>(value_at(a_panels + panel * 64 * LINE_BYTES, row, i % 64)) = a[i];
        *reinterpret_cast<bf16*>(value_at(key_panels + panel * 64 * LINE_BYTES, row, i % 64)) = keys[i];
        if (row < 16) *reinterpret_cast<bf16*>(value_at(value_panels + panel * 16 * LINE_BYTES, row, i % 64)) = values[i];
    }
    const u32 lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, first_row = threadIdx.x / 32 * 16;
    u32 fragment[4];
    for (u32 i = 0; i < 4; ++i) {
        const bf16* pair = a + (first_row + g + i % 2 * 8) * 128 + 2 * t + i / 2 * 8;
        fragment[i] = pair[0].bits | u32(pair[1].bits) << 16;
    }
    float scores[4][2][4] = {}, acc[8][2][4] = {};
    fence_proxy_async();
    __syncthreads();
    hold(scores), hold(acc);
    wgmma_fence();
#pragma unroll
    for (u32 step = 0; step < 8; ++step) {
        const u32 at = step / 4 * 64 * LINE_BYTES + step % 4 * 32;
        wgmma_rows(scores, matrix_descriptor(a_panels + at, 0, 8 * LINE_BYTES),
                   matrix_descriptor(key_panels + at, 0, 8 * LINE_BYTES), step > 0);
    }
    wgmma_commit();
    wgmma_columns(acc, fragment, matrix_descriptor(value_panels, 16 * LINE_BYTES, 8 * LINE_BYTES));
    wgmma_commit();
    wgmma_wait<1>(scores);
    wgmma_wait<0>(acc);
#pragma unroll
    for (u32 i = 0; i < 64; ++i) {
        const u32 row = first_row + g + i / 2 % 2 * 8, column = i / 4 * 8 + 2 * t + i % 2;
        if (column < 64) out[row * 64 + column] = scores[i / 8 % 4][i / 4 % 2][i % 4];
        out_values[row * 128 + column] = acc[i / 8][i / 4 % 2][i % 4];
    }
}

TEST(products_of_a_warpgroup_are_those_of_the_matrices) {
    auto a = random_values<bf16>(64 * 128), keys = random_values<bf16>(64 * 128), values = random_values<bf16>(16 * 128);
    Device<float> out(64 * 64), out_values(64 * 128);
    LAUNCH(order, 1, 128, 1024 + (64 * 4 + 16 * 2) * LINE_BYTES, multiplies, a.get(), keys.get(), values.get(), out.get(),
           out_values.get());
    for (u32 row = 0; row < 64; ++row) {
        for (u32 column = 0; column < 64; ++column) {
            double sum = 0;
            for (u32 k = 0; k < 128; ++k) sum += double(value_of(a[row * 128 + k])) * value_of(keys[column * 128 + k]);
            expect_close(out[row * 64 + column], sum, 1e-4, "rows times rows", row * 64 + column);
        }
        for (u32 column = 0; column < 128; ++column) {
            double sum = 0;
            for (u32 k = 0; k < 16; ++k) sum += double(value_of(a[row * 128 + k])) * value_of(values[k * 128 + column]);
            expect_close(out_values[row * 128 + column], sum, 1e-4, "rows times columns", row * 128 + column);
        }
    }
}

#if !defined(__CUDACC__) && !defined(COMPILED_KERNELS)
static const u32 SHARED_BYTES = 1024 + 128 * LINE_BYTES + 16;

// A block of one warpgroup and what it shares: two panels and a barrier of one arrival.
struct Given {
    unsigned char* panel;
    u64* barrier;
};

static void launched(fibres::Order order, const std::function<void(const Given&)>& body) {
    fibres::launch(order, 1, 128, SHARED_BYTES, [&] {
        DYNAMIC_SHARED(memory);
        unsigned char* panel = panels(memory);
        const Given given = {panel, reinterpret_cast<u64*>(panel + 128 * LINE_BYTES)};
        if (threadIdx.x == 0) barrier_init(given.barrier, 1);
        __syncthreads();
        body(given);
    });
}

static void expect_misuse(fibres::Order order, const std::function<void(const Given&)>& body, const char* part) {
    expect_said([&] { launched(order, body); }, part);
}

static u64 matrix(const Given& given) { return matrix_descriptor(given.panel, 0, 8 * LINE_BYTES); }

TEST(reading_what_a_copy_has_not_filled_is_a_sentence) {
    auto values = random_values<bf16>(64 * 16);
    const TensorMap map = tensor_map(values.get(), {64, 16, 1, 1}, {64, 16, 1, 1});
    expect_misuse(order, [&](const Given& given) {
        if (threadIdx.x == 0) {
            barrier_expect(given.barrier, 16 * LINE_BYTES);
            copy_box(given.panel, &map, 0, 0, 0, 0, given.barrier);
        }
        __syncthreads();
        float d[4][2][4] = {};
        wgmma_fence();
        wgmma_rows(d, matrix(given), matrix(given), false);
    }, "reads what a bulk copy has not filled");
}

TEST(copying_over_what_a_product_may_read_is_a_sentence) {
    auto values = random_values<bf16>(64 * 16);
    const TensorMap map = tensor_map(values.get(), {64, 16, 1, 1}, {64, 16, 1, 1});
    expect_misuse(order, [&](const Given& given) {
        float d[4][2][4] = {};
        wgmma_fence();
        wgmma_rows(d, matrix(given), matrix(given), false);
        wgmma_commit();
        if (threadIdx.x == 0) copy_box(given.panel, &map, 0, 0, 0, 0, given.barrier);
        wgmma_wait<0>(d);
    }, "that a product may read");
}

TEST(registers_of_a_product_that_are_touched_too_early_are_a_sentence) {
    expect_misuse(order, [](const Given& given) {
        float d[4][2][4] = {};
        wgmma_fence();
        wgmma_rows(d, matrix(given), matrix(given), false);
        wgmma_commit();
        if (threadIdx.x == 77) d[1][1][1] = 0.0f;
        wgmma_wait<0>(d);
    }, "thread 77 changed the result of a product");
    expect_misuse(order, [](const Given& given) {
        float d[4][2][4] = {};
        u32 a[4] = {};
        wgmma_fence();
        wgmma_columns(d, a, matrix(given));
        wgmma_commit();
        a[3] += threadIdx.x == 5;
        wgmma_wait<0>(d);
    }, "thread 5 changed operands of a product");
    expect_misuse(order, [](const Given& given) {
        float d[4][2][4] = {};
        wgmma_rows(d, matrix(given), matrix(given), false);
    }, "without wgmma.fence");
    expect_misuse(order, [](const Given& given) {
        float d[4][2][4] = {};
        wgmma_fence();
        wgmma_rows(d, matrix(given), matrix(given), false);
        wgmma_commit();
    }, "ended with products in flight");
}

TEST(stores_that_are_not_fenced_do_not_come_to_a_product) {
    launched(order, [](const Given& given) {
        for (u32 i = threadIdx.x; i < 64 * 64; i += 128) *reinterpret_cast<bf16*>(value_at(given.panel, i / 64, i % 64)) = {0};
        __syncthreads();
        float d[4][2][4] = {};
        wgmma_fence();
        wgmma_rows(d, matrix(given), matrix(given), false);
        wgmma_commit();
        if (!std::isnan(d[0][0][0])) fibres::fail("a result that was not waited for is %g", d[0][0][0]);
        wgmma_wait<0>(d);
        if (!std::isnan(d[0][0][0])) fibres::fail("a product of what was not fenced is %g", d[0][0][0]);
    });
}

TEST(warps_of_a_warpgroup_that_disagree_are_a_sentence) {
    expect_misuse(order, [](const Given& given) {
        float d[4][2][4] = {};
        wgmma_fence();
        const u64 other = threadIdx.x / 32 == 2 ? 1024 / 16 : 0;
        wgmma_rows(d, matrix(given) + other, matrix(given), false);
        wgmma_commit();
        wgmma_wait<0>(d);
    }, "another of its warpgroup");
    expect_misuse(order, [](const Given& given) {
        float d[4][2][4] = {};
        if (threadIdx.x < 32) return;
        wgmma_fence();
        wgmma_rows(d, matrix(given), matrix(given), false);
        wgmma_commit();
        wgmma_wait<0>(d);
    }, "warp 0 issued 0 products, its warpgroup 1");
}

TEST(misused_barriers_are_a_sentence) {
    expect_misuse(order, [](const Given& given) { barrier_wait(given.barrier - 1, 0); }, "was not initialised");
    expect_misuse(order, [](const Given& given) {
        if (threadIdx.x == 0) barrier_expect(given.barrier, 16);
        barrier_wait(given.barrier, 0);
    }, "waits at a barrier in shared memory");
    expect_misuse(order, [](const Given& given) {
        if (threadIdx.x == 0) barrier_expect(given.barrier, 16), barrier_arrive(given.barrier);
    }, "arrives at a barrier at which all 1 have");
}

TEST(misplaced_boxes_and_matrices_are_a_sentence) {
    auto values = random_values<bf16>(64 * 16);
    const TensorMap map = tensor_map(values.get(), {64, 16, 1, 1}, {64, 16, 1, 1});
    const auto copy_to = [&](u32 offset, u32 row) {
        return [&map, offset, row](const Given& given) { copy_box(given.panel + offset, &map, 0, row, 0, 0, given.barrier); };
    };
    expect_misuse(order, copy_to(128, 0), "begins at multiples of 1024");
    expect_misuse(order, copy_to(0, 1), "a box from 1 on of 16 along dimension 1 of 16");
    expect_misuse(order, [](const Given& given) {
        float d[4][2][4] = {};
        wgmma_fence();
        wgmma_rows(d, matrix(given) ^ u64(1) << 62, matrix(given), false);
    }, "without the 128-byte swizzle");
    expect_misuse(order, [](const Given& given) {
        float d[4][2][4] = {};
        wgmma_fence();
        wgmma_rows(d, matrix_descriptor(given.panel + 128 * LINE_BYTES, 0, 8 * LINE_BYTES), matrix(given), false);
    }, "outside of dynamic shared memory");
}
#endif
