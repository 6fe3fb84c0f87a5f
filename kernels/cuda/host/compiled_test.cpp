// That kernels as nvcc has made them are run as the PTX manual says (host/ptx.h), and what has to be noticed there.
#include "compiled.cu"
#include "misuse.h"

// A kernel of two warps whose last argument says whether it is right.
#define EXPECT_RACE(kernel, num_values, ...)                                                                           \
    do {                                                                                                               \
        Device<u32> out(num_values);                                                                                   \
        expect_said([&] { LAUNCH(order, 1, 64, 0, kernel, __VA_ARGS__ out.get(), 0u); }, "a race in shared memory");   \
        LAUNCH(order, 1, 64, 0, kernel, __VA_ARGS__ out.get(), 1u);                                                    \
    } while (false)

TEST(threads_of_a_block_that_do_not_wait_for_one_another_are_a_sentence) {
    EXPECT_RACE(exchanges_in_a_block, 64);
    auto from = random_values<float>(64 * 4);
    EXPECT_RACE(copies, 64, reinterpret_cast<const u32*>(from.get()), );
}

TEST(threads_of_a_warp_that_do_not_wait_for_one_another_are_a_sentence) {
    EXPECT_RACE(exchanges_in_a_warp, 64);
    EXPECT_RACE(writes_what_others_read, 64);
}

TEST(atomic_operations_are_no_race_with_each_other_but_with_all_else) {
    EXPECT_RACE(adds_up, 1);
    Device<u32> out(1);
    LAUNCH(order, 1, 64, 0, adds_up, out.get(), 1u);
    expect_same(out[0], 64, "count", 0);
}

TEST(accesses_that_are_not_aligned_or_beyond_shared_memory_are_a_sentence) {
    auto memory = random_values<float>(64);
    const auto* bytes = reinterpret_cast<const unsigned char*>(memory.get());
    Device<u32> out(64);
    const auto reads = [&](const unsigned char* from, u32 offset) { LAUNCH(order, 1, 64, 0, reads_at, from, offset, out.get()); };
    expect_said([&] { reads(bytes, 2); }, "an address that is not aligned");
    expect_said([&] { reads(bytes, 64 * 4); }, "beyond the end of a buffer");
    expect_said([&] { reads(nullptr, 2); }, "are not aligned");
    expect_said([&] { reads(nullptr, 64 * 4); }, "shared memory has 256");
    reads(bytes, 8);
    expect_same(out[5], bits_of(memory[2]), "value", 5);
}

TEST(reading_what_launches_write_before_they_were_waited_for_is_a_sentence) {
    auto memory = random_values<float>(64 * 3);
    u32 *from = reinterpret_cast<u32*>(memory.get()), *to = from + 64, *out = from + 128;
    const auto reads = [&](const u32* values, u32* out, u32 waits_first) {
        LAUNCH(order, 1, 32, 0, reads_what_launches_write, values, out, waits_first);
    };
    ptx::are_addresses_unique = true;
    expect_said([&] { reads(from, to, 1), reads(to, out, 0); }, "touches, before begin_launch, memory that launches write");
    expect_said([&] { reads(from, to, 0), reads(to, from, 1); }, "writes what launches read before begin_launch");
    expect_said([&] { reads(from, to, 0), reads(to, out, 1), reads(from, to, 0), fibres::fail("all right"); }, "all right");
    ptx::are_addresses_unique = false;
}

TEST(registers_of_a_product_are_nothing_before_it_was_waited_for) {
    Device<float> out(128);
    const auto multiplies = [&](u32 is_waited_for) {
        LAUNCH(order, 1, 128, 1024 + 64 * LINE_BYTES, multiplies_a_panel, out.get(), is_waited_for);
    };
    multiplies(1);
    expect_same(bits_of(out[77]), bits_of(16), "sum", 77);
    multiplies(0);
    expect_same(bits_of(out[77]), 0xffffffff, "bits", 77);
}
