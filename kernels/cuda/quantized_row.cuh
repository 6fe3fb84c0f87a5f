// Places in a row of weights of 8 or 4 bits.
#pragma once

#include "quantized.cuh"

// Those of row `row` of k values, from element 8 * eighth on.
template <u32 BITS>
__device__ __forceinline__ CodesOf8 codes_of_row(const u8* codes, const u16* scales, u64 row, u32 k, u32 eighth) {
    const u32 group = MUTATE(10, eighth / (QUANTIZED_GROUP / 8), eighth / QUANTIZED_GROUP);
    return codes_at<BITS>(codes + row * k * BITS / 8 + u64(eighth) * BITS, scales + row * (k / QUANTIZED_GROUP) + group);
}
