// Weights of 8 or 4 bits with a scale for every 32 of a row, as they lie in device memory.
//
//   weight = scale * (code - OFFSET), rounded to bf16, which is what products are made of
//   8 bits   codes u8 [n, k], OFFSET 128
//   4 bits   codes u8 [n, k / 2], the even k in the lower half of its byte, OFFSET 8
//   scales   f16 [n, k / 32]
#pragma once

#include "tensor_core.cuh"

#define QUANTIZED_GROUP 32

// 8 weights from element 8 * eighth of a row on, as four pairs.
template <u32 BITS>
__device__ __forceinline__ uint4 weights_at(const u8* __restrict__ row_codes, float scale, u32 eighth) {
    constexpr u32 MASK = (1u << BITS) - 1;
    constexpr float OFFSET = float(1u << (BITS - 1));
    u32 words[2];
    if (BITS == 8) {
        const uint2 codes = *reinterpret_cast<const uint2*>(row_codes + u64(eighth) * 8);
        words[0] = codes.x, words[1] = codes.y;
    } else {
        words[0] = *reinterpret_cast<const u32*>(row_codes + u64(eighth) * 4);
        words[1] = words[0] >> 16;
    }
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
