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

// Those from element 8 * eighth of a row on.
template <u32 BITS>
__device__ __forceinline__ CodesOf8 codes_at(const u8* row_codes, const u16* row_scales,
                                             u32 eighth) {
    CodesOf8 codes;
    if (BITS == 8) {
        const uint2 words = *reinterpret_cast<const uint2*>(row_codes + u64(eighth) * 8);
        codes.words[0] = words.x, codes.words[1] = words.y;
    } else {
        codes.words[0] = *reinterpret_cast<const u32*>(row_codes + u64(eighth) * 4);
    }
    codes.scale = row_scales[MUTATE(10, eighth / (QUANTIZED_GROUP / 8), eighth / QUANTIZED_GROUP)];
    return codes;
}

// As four pairs of bf16.
template <u32 BITS>
__device__ __forceinline__ uint4 weights_of(const CodesOf8& codes) {
    constexpr u32 MASK = (1u << BITS) - 1;
    constexpr float OFFSET = float(1u << (BITS - 1));
    const float scale = widen_f16(codes.scale);
    const u32 words[2] = {codes.words[0], BITS == 8 ? codes.words[1] : codes.words[0] >> 16};
    u32 pairs[4];
#pragma unroll
    for (u32 i = 0; i < 4; ++i) {
        const u32 word = words[i / 2] >> (i % 2 * 2 * BITS);
        const float even = (float(word & MASK) - OFFSET) * scale;
        const float odd = (float(word >> BITS & MASK) - MUTATE(11, OFFSET, 0.0f)) * scale;
        pairs[i] = pack_bf16(even, odd);
    }
    return make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
}
