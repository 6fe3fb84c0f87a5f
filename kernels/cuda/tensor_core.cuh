// The instructions of tensor cores and of asynchronous copies, each as one function. On a device they are
// inline PTX; on the host they move values between lanes by the fragment layouts that the PTX manual documents
// for bf16, so that code which gets a layout wrong computes something wrong here too.
//
//   lane = 4 g + t          g = 0..7, t = 0..3; one u32 holds two bf16, the lower index in the lower half
//   A 16 x 16   a[0] (g, 2t..)      a[1] (g + 8, 2t..)   a[2] (g, 2t + 8..)   a[3] (g + 8, 2t + 8..)
//   B 16 x 8    b0 (2t.., g)        b1 (2t + 8.., g)
//   C 16 x 8    c[0], c[1] (g, 2t..)                     c[2], c[3] (g + 8, 2t..)
#pragma once

#include "numerics.cuh"

// Two values as bf16, `even` in the lower half. Unlike `round_bf16` it keeps the tiny.
__device__ __forceinline__ u32 pack_bf16(float even, float odd) {
#ifdef __CUDACC__
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(odd), "f"(even));
    return pair;
#else
    const auto round = [](float x) { const u32 b = __float_as_uint(x); return (b + 0x7fffu + ((b >> 16) & 1u)) >> 16; };
    return round(even) | round(odd) << 16;
#endif
}

// 2^x, to the precision of the device's own unit (2 ulp); 0 far below.
__device__ __forceinline__ float fast_exp2(float x) {
#ifdef __CUDACC__
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return exp2f(x);
#endif
}

// c = a * b + c. The device fixes the order of additions, the same for every element and every call.
__device__ __forceinline__ void mma_bf16(float* c, const u32* a, u32 b0, u32 b1
#ifndef __CUDACC__
                                         , int line = __builtin_LINE()
#endif
) {
#ifdef __CUDACC__
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
    const auto two = [](u32 low, u32 high) { return uint64_t(low) | uint64_t(high) << 32; };
    const fibres::Payload* all = fibres::exchange("mma", line, {{two(a[0], a[1]), two(a[2], a[3]), two(b0, b1)}});
    const auto half = [](uint64_t word, u32 index) { return widen(bf16{u16(word >> (16 * index))}); };
    const u32 g = fibres::lane() / 4, t = fibres::lane() % 4;
    for (u32 i = 0; i < 4; ++i) {
        const u32 row = g, is_lower_row = i / 2, n = 2 * t + i % 2;
        double sum = c[i];
        for (u32 k = 0; k < 16; ++k) {
            const uint64_t a_word = all[4 * row + k % 8 / 2].words[k / 8], b_word = all[4 * n + k % 8 / 2].words[2];
            sum += double(half(a_word, 2 * is_lower_row + k % 2)) * double(half(b_word, k / 8 * 2 + k % 2));
        }
        c[i] = float(sum);
    }
#endif
}

// The same of 8-bit integers, 32 of k: exact unless a sum leaves 32 bits. One u32 holds four of consecutive k.
//
//   A 16 x 32   a[0] (g, 4t..)      a[1] (g + 8, 4t..)   a[2] (g, 4t + 16..)  a[3] (g + 8, 4t + 16..)
//   B 32 x 8    b0 (4t.., g)        b1 (4t + 16.., g)    C as above
__device__ __forceinline__ void mma_s8(int* c, const u32* a, u32 b0, u32 b1
#ifndef __CUDACC__
                                       , int line = __builtin_LINE()
#endif
) {
#ifdef __CUDACC__
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
    const auto two = [](u32 low, u32 high) { return uint64_t(low) | uint64_t(high) << 32; };
    const fibres::Payload* all = fibres::exchange("mma s8", line, {{two(a[0], a[1]), two(a[2], a[3]), two(b0, b1)}});
    const auto byte = [](uint64_t word, u32 index) { return int(int8_t(word >> (8 * index))); };
    const u32 g = fibres::lane() / 4, t = fibres::lane() % 4;
    for (u32 i = 0; i < 4; ++i) {
        const u32 is_lower_row = i / 2, n = 2 * t + i % 2;
        for (u32 k = 0; k < 32; ++k) {
            const uint64_t a_word = all[4 * g + k % 16 / 4].words[k / 16], b_word = all[4 * n + k % 16 / 4].words[2];
            c[i] += byte(a_word, 4 * is_lower_row + k % 4) * byte(b_word, k / 16 * 4 + k % 4);
        }
    }
#endif
}

// Four 8 x 8 matrices of bf16, or of 8 rows of 16 bytes of anything, from shared memory. Lane 8 j + r names the 16
// bytes of row r of matrix j; of each matrix j the lane gets the elements (g, 2t..), with TRANSPOSED those at (2t..,
// g).
template <bool TRANSPOSED>
__device__ __forceinline__ void ldmatrix_x4(u32* result, const void* row
#ifndef __CUDACC__
                                            , int line = __builtin_LINE()
#endif
) {
#ifdef __CUDACC__
    const u32 address = u32(__cvta_generic_to_shared(row));
    if (TRANSPOSED) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(result[0]), "=r"(result[1]), "=r"(result[2]), "=r"(result[3]) : "r"(address) : "memory");
    } else {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(result[0]), "=r"(result[1]), "=r"(result[2]), "=r"(result[3]) : "r"(address) : "memory");
    }
#else
    if (reinterpret_cast<uintptr_t>(row) % 16) fibres::fail("ldmatrix: lane %u names a row that is not aligned to 16 bytes", fibres::lane());
    fibres::Payload mine{};
    std::memcpy(mine.words, row, 16);
    const fibres::Payload* all = fibres::exchange("ldmatrix", line, mine);
    const auto element = [&](u32 matrix, u32 r, u32 c) { return u32(all[8 * matrix + r].words[c / 4] >> (c % 4 * 16) & 0xffff); };
    const u32 g = fibres::lane() / 4, t = fibres::lane() % 4;
    for (u32 j = 0; j < 4; ++j)
        result[j] = TRANSPOSED ? element(j, 2 * t, g) | element(j, 2 * t + 1, g) << 16
                               : element(j, g, 2 * t) | element(j, g, 2 * t + 1) << 16;
#endif
}

// Starts copying 16 bytes to shared memory; zeros instead, without reading, where `is_there` is false. Until a
// `copy_wait` covers it the destination holds nothing useful (on the host: NaN).
__device__ __forceinline__ void copy_async_16(void* to, const void* from, bool is_there) {
#ifdef __CUDACC__
    const u32 address = u32(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :: "r"(address), "l"(__cvta_generic_to_global(from)), "r"(is_there ? 16 : 0) : "memory");
#else
    if (reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16)
        fibres::fail("cp.async: an address is not aligned to 16 bytes");
    std::memset(to, 0xff, 16);
    fibres::self().copy_groups.back().push_back({to, from, is_there});
#endif
}

// Closes a group of this thread's copies.
__device__ __forceinline__ void copy_commit() {
#ifdef __CUDACC__
    asm volatile("cp.async.commit_group;" ::: "memory");
#else
    fibres::self().copy_groups.emplace_back();
#endif
}

// Waits for all of this thread's groups but the newest NUM_OPEN. Other threads' copies need a barrier after it.
template <int NUM_OPEN>
__device__ __forceinline__ void copy_wait() {
#ifdef __CUDACC__
    asm volatile("cp.async.wait_group %0;" :: "n"(NUM_OPEN) : "memory");
#else
    auto& groups = fibres::self().copy_groups;
    while (groups.size() > size_t(NUM_OPEN) + 1) {
        for (const fibres::Copy& copy : groups.front())
            copy.is_there ? std::memcpy(copy.to, copy.from, 16) : std::memset(copy.to, 0, 16);
        groups.pop_front();
    }
#endif
}
