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
