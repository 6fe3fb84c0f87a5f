// Weights of 8 or 4 bits with a scale for every 32 of a row, as they lie in device memory.
//
//   weight = scale * (code - OFFSET), rounded to bf16, which is what products are made of
//   8 bits   codes u8 [n, k], OFFSET 128
//   4 bits   codes u8 [n, k / 2], the even k in the lower half of its byte, OFFSET 8
//   scales   f16 [n, k / 32]
#pragma once

#include "tensor_core.cuh"

#define QUANTIZED_GROUP 32

// 8 codes of a row with their scale, as they lie in memory.
struct CodesOf8 {
    u32 words[2];
    u16 scale;
};

template <u32 BITS>
__device__ __forceinline__ CodesOf8 codes_at(const u8* at, const u16* scale) {
    CodesOf8 codes;
    if (BITS == 8) {
        const uint2 words = *reinterpret_cast<const uint2*>(at);
        codes.words[0] = words.x, codes.words[1] = words.y;
    } else {
        codes.words[0] = *reinterpret_cast<const u32*>(at);
    }
    codes.scale = *scale;
    return codes;
}

// As four pairs of bf16. Whatever the scale, BYTE_BASE + OFFSET times it is exact: weights are rounded once.
template <u32 BITS>
__device__ __forceinline__ uint4 weights_of(const CodesOf8& codes) {
    constexpr float OFFSET = float(1u << (BITS - 1));
    const float scale = widen_f16(codes.scale), base = -(BYTE_BASE + MUTATE(11, OFFSET, 0.0f)) * scale;
    const auto weight = [&](u32 bytes, u32 which) { return fmaf(scale, based_byte(bytes, which), base); };
    u32 pairs[4];
    const u32 even = codes.words[0] & 0x0f0f0f0fu, odd = codes.words[0] >> 4 & 0x0f0f0f0fu;
#pragma unroll
    for (u32 i = 0; i < 4; ++i) {
        const u32 word = codes.words[BITS == 8 ? i / 2 : 0], first = i % 2 * 2;
        pairs[i] = BITS == 8 ? pack_bf16(weight(word, first), weight(word, first + 1)) : pack_bf16(weight(even, i), weight(odd, i));
    }
    return make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
}
