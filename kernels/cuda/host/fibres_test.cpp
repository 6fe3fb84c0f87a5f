// The header's own tests: what it must notice, each in a child process that has to fail with a sentence.
#include "misuse.h"

// Kernels of tests are not launched behind others.
static const bool is_begun_by_none = fibres::must_begin = false;

TEST(a_barrier_that_one_thread_misses_is_a_sentence) {
    expect_said([&] { fibres::launch(order, 1, 64, 0, [] { if (threadIdx.x != 5) __syncthreads(); }); },
                "waits at __syncthreads");
}

TEST(barriers_of_different_lines_do_not_meet) {
    expect_said([&] {
        fibres::launch(order, 1, 64, 0, [] {
            if (threadIdx.x < 32) {
                __syncthreads();
            } else {
                __syncthreads();
            }
        });
    }, "others at that of line");
}

TEST(a_shuffle_that_half_a_warp_misses_is_a_sentence) {
    expect_said([&] {
        fibres::launch(order, 1, 32, 0, [] { if (threadIdx.x < 16) __shfl_xor_sync(FULL_WARP, 1, 1); });
    }, "waits at __shfl_xor_sync");
}

TEST(touching_memory_beyond_a_buffer_is_a_sentence) {
    expect_said([&] {
        Device<float> values(64);
        fibres::launch(order, 1, 128, 0, [&] { values.get()[threadIdx.x] = 1; });
    }, "beyond the end of a buffer");
}

TEST(shared_memory_begins_as_nan_in_every_block) {
    Device<float> out(64);
    fibres::launch(order, 2, 32, 0, [&] {
        SHARED_ARRAY(float, value, 32);
        out[blockIdx.x * 32 + threadIdx.x] = value[threadIdx.x];
        value[threadIdx.x] = 1;
    });
    for (u32 i = 0; i < 64; ++i)
        if (!std::isnan(out[i])) fibres::fail("shared memory begins as %g", out[i]);
}

TEST(collectives_give_every_lane_what_cuda_documents) {
    fibres::launch(order, 1, 64, 0, [] {
        const u32 lane = threadIdx.x % 32;
        expect_same(__shfl_sync(FULL_WARP, lane * 3, 7), 21, "shfl", lane);
        expect_same(__shfl_sync(FULL_WARP, lane, 1, 4), lane / 4 * 4 + 1, "shfl of width 4", lane);
        expect_same(__shfl_xor_sync(FULL_WARP, lane, 5), lane ^ 5, "shfl_xor", lane);
        expect_same(__shfl_up_sync(FULL_WARP, lane, 3), lane < 3 ? lane : lane - 3, "shfl_up", lane);
        expect_same(__ballot_sync(FULL_WARP, lane % 3 == 0), 0x49249249u, "ballot", lane);
    });
}

TEST(a_thread_that_does_not_wait_for_earlier_launches_is_a_sentence) {
    const auto of_ours = [&](const std::function<void()>& kernel) {
        fibres::must_begin = true;
        fibres::launch(order, 1, 32, 0, kernel);
    };
    expect_said([&] { of_ours([] { if (threadIdx.x != 7) begin_launch(); }); }, "thread 7 ended without begin_launch");
    expect_said([&] { of_ours([] { begin_launch(), begin_launch(); }); }, "calls begin_launch a second time");
}
