// The arithmetic that all kernels share. Compiled with -fmad=false: what is fused is written as `fmaf`.
//
// The operations and their roundings are those of the CPU kernels (kernels/src/numerics.rs): f32 everywhere,
// bf16 only as operands of products and as stored KV. Orders of reductions are stated per kernel and depend
// on shapes alone, never on the batch. They are not the CPU's: CUDA is a numerics family of its own.
#pragma once

#include "device.cuh"

struct bf16 { u16 bits; };

// Nearest even, NaN stays NaN, magnitudes below 2^-56 become zero as on the CPU.
__device__ __forceinline__ u16 round_bf16(float x) {
    const u32 bits = __float_as_uint(x);
    u32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    if ((bits & 0x7fffffffu) > 0x7f800000u) rounded = (bits >> 16) | 0x40u;
    return (rounded & 0x7fffu) < ((127u - 56u) << 7) ? u16(0) : u16(rounded);
}

__device__ __forceinline__ float widen(bf16 x) { return __uint_as_float(u32(x.bits) << 16); }
__device__ __forceinline__ float widen(float x) { return x; }

// An f16 that is finite; also the tiny ones are exact.
__device__ __forceinline__ float widen_f16(u16 bits) {
#ifdef __CUDACC__
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
#else
    const float magnitude = __uint_as_float(u32(bits & 0x7fffu) << 13) * __uint_as_float(0x77800000u); // 2^112
    return bits & 0x8000u ? -magnitude : magnitude;
#endif
}

// A byte of `bytes` as a float, and BYTE_BASE more: it comes to be the digits from 2^0 on. One operation of full speed,
// which conversions are not.
#define BYTE_BASE 32768.0f
__device__ __forceinline__ float based_byte(u32 bytes, u32 which) {
    return __uint_as_float(__byte_perm(bytes, 0x00004700u, 0x5404u | which << 4));
}

// The same of a byte below 128, and SMALL_BASE more, which leaves products with it more digits.
#define SMALL_BASE 128.0f
__device__ __forceinline__ float based_small(u32 bytes, u32 which) {
    return __uint_as_float(__byte_perm(bytes, 0x00004300u, 0x5044u | which << 8));
}

__device__ __forceinline__ void store(float* to, float x) { *to = x; }
__device__ __forceinline__ void store(bf16* to, float x) { to->bits = round_bf16(x); }

// Within 2 ulp; 0 below -87.3, infinity above 88.7, exactly 1 at 0: the CPU's polynomial, operation by operation.
__device__ __forceinline__ float own_exp(float x) {
    const float magic = 12582912.0f; // 1.5 * 2^23: adding it rounds to an integer, held in the low bits
    const float clamped = x < -87.3f ? -87.3f : (x > 88.8f ? 88.8f : x);
    const float shifted = fmaf(clamped, 1.44269504088896340736f, magic);
    const float n = shifted - magic;
    float r = fmaf(n, -0.6933594f, clamped);
    r = fmaf(n, 2.1219444e-4f, r);
    float p = 1.0f / 5040.0f;
    p = fmaf(p, r, 1.0f / 720.0f);
    p = fmaf(p, r, 1.0f / 120.0f);
    p = fmaf(p, r, 1.0f / 24.0f);
    p = fmaf(p, r, 1.0f / 6.0f);
    p = fmaf(p, r, 0.5f);
    p = fmaf(p, r, 1.0f);
    p = fmaf(p, r, 1.0f);
    const int whole = int(__float_as_uint(shifted)) - int(__float_as_uint(magic));
    const int half = whole >> 1; // 2^n in two factors, since n reaches 128
    const float scaled = p * __uint_as_float(u32(half + 127) << 23) * __uint_as_float(u32(whole - half + 127) << 23);
    return x < -87.3f ? 0.0f : scaled;
}

__device__ __forceinline__ float own_tanh(float x) { return 1.0f - 2.0f / (own_exp(2.0f * x) + 1.0f); }

// Sum over a warp: lane i takes lane i ^ 16, then ^ 8, 4, 2, 1. All lanes get the same bits.
__device__ __forceinline__ float warp_sum(float x) {
    for (int with = 16; with > 0; with /= 2) x += __shfl_xor_sync(FULL_WARP, x, with);
    return x;
}

__device__ __forceinline__ float warp_max(float x) {
    for (int with = 16; with > 0; with /= 2) x = fmaxf(x, __shfl_xor_sync(FULL_WARP, x, with));
    return x;
}

// g / (1 + exp(-g))
__device__ __forceinline__ float own_silu(float g) { return g / (1.0f + own_exp(-g)); }

// 16 bytes; zeros, without reading, where `is_there` is false. There is no branch, so that many are on their way at once.
#ifdef __CUDACC__
#define LOAD_16(kind, x, from, is_there)                                                                               \
    asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %5, 0;\nmov.b32 %0, 0;\nmov.b32 %1, 0;\nmov.b32 %2, 0;\n"             \
                 "mov.b32 %3, 0;\n@p ld.global" kind ".v4.u32 {%0, %1, %2, %3}, [%4];\n}"                              \
                 : "=r"((x).x), "=r"((x).y), "=r"((x).z), "=r"((x).w)                                                  \
                 : "l"(__cvta_generic_to_global(from)), "r"(u32(is_there)) : "memory")
#else
#define LOAD_16(kind, x, from, is_there)                                                                               \
    if (reinterpret_cast<uintptr_t>(from) % 16) fibres::fail("a load of 16 bytes: the address is not aligned");         \
    x = (is_there) ? *static_cast<const uint4*>(from) : make_uint4(0, 0, 0, 0)
#endif

__device__ __forceinline__ uint4 load_16(const void* from, bool is_there) {
    uint4 x;
    LOAD_16("", x, from, is_there);
    return x;
}

// Likewise, of what no other load wants: weights.
__device__ __forceinline__ uint4 load_once_16(const void* from, bool is_there) {
    uint4 x;
    LOAD_16(".L1::no_allocate", x, from, is_there);
    return x;
}

// Four neighbours of a row.
struct Four { float of[4]; };

__device__ __forceinline__ Four four_of(const uint4& x) {
    return {{__uint_as_float(x.x), __uint_as_float(x.y), __uint_as_float(x.z), __uint_as_float(x.w)}};
}

// Those from `first` on, a multiple of 4; what lies behind the end of the row is 0. One load where the width is a
// multiple of 4: rows then begin at multiples of 16 bytes, as memory does.
__device__ __forceinline__ Four load_four(const float* row, u32 width, u32 first) {
    if (width % 4 == 0) return four_of(*reinterpret_cast<const uint4*>(row + first));
    Four four = {};
#pragma unroll
    for (u32 i = 0; i < 4; ++i)
        if (first + i < width) four.of[i] = row[first + i];
    return four;
}

// Likewise.
__device__ __forceinline__ void store_four(float* row, u32 width, u32 first, const Four& four) {
    if (width % 4 == 0) {
        const float* x = four.of;
        *reinterpret_cast<uint4*>(row + first) =
            make_uint4(__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]), __float_as_uint(x[3]));
        return;
    }
#pragma unroll
    for (u32 i = 0; i < 4; ++i)
        if (first + i < width) store(row + first + i, four.of[i]);
}

__device__ __forceinline__ void store_four(bf16* row, u32 width, u32 first, const Four& four) {
    if (width % 4 == 0) {
        const auto pair = [&](u32 i) { return u32(round_bf16(four.of[i])) | u32(round_bf16(four.of[i + 1])) << 16; };
        *reinterpret_cast<uint2*>(row + first) = make_uint2(pair(0), pair(2));
        return;
    }
#pragma unroll
    for (u32 i = 0; i < 4; ++i)
        if (first + i < width) store(row + first + i, four.of[i]);
}

// Calls `take` with every first = 4 (t + THREADS j) of rows of a width, j ascending, for thread t of THREADS, and the four
// neighbours from there on of each row. Several loads are on their way at once.
template <u32 THREADS, u32 N, typename F>
__device__ __forceinline__ void each_four(const float* const (&rows)[N], u32 width, F take) {
    constexpr u32 AHEAD = 4;
    if (width % 4 != 0) {
        for (u32 first = 4 * threadIdx.x; first < width; first += 4 * THREADS) {
            Four fours[N];
#pragma unroll
            for (u32 n = 0; n < N; ++n) fours[n] = load_four(rows[n], width, first);
            take(first, fours);
        }
        return;
    }
#pragma unroll 1
    for (u32 start = 4 * threadIdx.x; start < width; start += 4 * THREADS * AHEAD) {
        uint4 loaded[AHEAD][N];
#pragma unroll
        for (u32 j = 0; j < AHEAD; ++j) {
            const u32 first = start + 4 * THREADS * j;
#pragma unroll
            for (u32 n = 0; n < N; ++n) loaded[j][n] = load_16(rows[n] + (first < width ? first : 0), first < width);
        }
#pragma unroll
        for (u32 j = 0; j < AHEAD; ++j) {
            const u32 first = start + 4 * THREADS * j;
            if (first >= width) break;
            Four fours[N];
#pragma unroll
            for (u32 n = 0; n < N; ++n) fours[n] = four_of(loaded[j][n]);
            take(first, fours);
        }
    }
}
