// Weights of k-quants, codes of 4 or 6 bits with scales in two levels, as they lie in device memory.
//
//   weight = (d * s) * (code - OFFSET) - (dmin * m) with one rounding to f32, then rounded to bf16, which is what
//            products are made of; products of d and s are exact
//   4 bits   q4_K: OFFSET 0, s and m u8 for 32 of k
//   6 bits   q6_K: OFFSET 32, s i8 for 16 of k, no minima
//            d and dmin f16 for a block of 256 of k
//
// A matrix [n, k] is records [ceil(n / 16)][ceil(k / 512)], each of 16 rows and two blocks. A record is what 8 warps
// take at a time: warp w has chunk w, 32 of k, of both blocks, lane 4 g + t elements 8 t to 8 t + 7 of the chunks of
// rows g and g + 8. Its four parts are row g of both blocks, then row g + 8 of both. In a record, one behind the other:
//
//   d        f16 [8 g][4 parts], with 4 bits each with dmin behind it
//   scales   4 bits: u8 [8 warps][8 g][4 parts], each s with m behind it
//            6 bits: u8 [8 warps][8 g][2 halves of 16][4 parts], s + 128
//   low      u32 [8 warps][32 lanes][4 parts]: bits 0 to 3 of element e from bit 4 e on
//   high     u32 [8 warps][32 lanes][2], only with 6 bits: bits 4 and 5 of element e of parts 2 j and 2 j + 1 from bit
//            8 (e / 2) + 2 (e % 2) on, those of the second part 4 further
//
// So a lane's codes are one load of 16 bytes, and one of 8, those of a warp lie in a row. What is beyond n or k is 0.
#pragma once

#include "tensor_core.cuh"

#define K_BLOCK 256

template <u32 BITS>
struct KQuant {
    static constexpr u32 D_BYTES = BITS == 4 ? 128 : 64, SCALES = D_BYTES, LOW = SCALES + 512, HIGH = LOW + 4096;
    static constexpr u32 RECORD_BYTES = HIGH + (BITS == 6 ? 2048 : 0);
    static constexpr u32 OFFSET = BITS == 6 ? 32 : 0;
};

__device__ __forceinline__ u32 k_num_pairs(u32 k) { return (k / K_BLOCK + 1) / 2; }

// Of 6 bits.
__device__ __forceinline__ float signed_scale(u32 scales, u32 which) { return based_byte(scales, which) - (BYTE_BASE + 128.0f); }

// Which 16 of a chunk a lane's elements are in.
__device__ __forceinline__ u32 k_half(u32 t) { return MUTATE(23, t / 2, 0u); }

// 8 weights as four pairs. With 4 bits `high` is not looked at; with 6 it is of this part, which is the second of the two
// that share it if `is_second`, and there are no minima: the scale has 19 digits and SMALL_BASE + OFFSET 3, so their product
// is exact.
template <u32 BITS>
__device__ __forceinline__ uint4 k_weights(u32 low, u32 high, bool is_second, float scale, float min) {
    u32 even = low & 0x0f0f0f0fu, odd = low >> 4 & 0x0f0f0f0fu;
    if (BITS == 6) {
        even |= (is_second ? high : high << 4) & 0x30303030u;
        odd |= MUTATE(21, is_second ? high >> 2 : high << 2, high) & 0x30303030u;
    }
    const float base = -(SMALL_BASE + KQuant<BITS>::OFFSET) * scale;
    const auto weight = [&](u32 bytes, u32 which) {
        const float based = based_small(bytes, which);
        return BITS == 6 ? fmaf(scale, based, MUTATE(22, base, 0.0f)) : fmaf(scale, based - SMALL_BASE, MUTATE(22, -min, 0.0f));
    };
    return make_uint4(pack_bf16(weight(even, 0), weight(odd, 0)), pack_bf16(weight(even, 1), weight(odd, 1)),
                      pack_bf16(weight(even, 2), weight(odd, 2)), pack_bf16(weight(even, 3), weight(odd, 3)));
}

// What a lane has of a record.
template <u32 BITS>
struct KLane {
    u32 low[4], high[2], scales[2], d[4];

    __device__ __forceinline__ void load(const u8* record, u32 warp, u32 lane) {
        const u32 g = lane / 4;
        const uint4 codes = *reinterpret_cast<const uint4*>(record + KQuant<BITS>::LOW + (warp * 32 + lane) * 16);
        low[0] = codes.x, low[1] = codes.y, low[2] = codes.z, low[3] = codes.w;
        const u8* of_warp = record + KQuant<BITS>::SCALES + warp * 64 + g * 8;
        if (BITS == 4) {
            const uint2 pairs = *reinterpret_cast<const uint2*>(of_warp);
            const uint4 of_blocks = *reinterpret_cast<const uint4*>(record + g * 16);
            scales[0] = pairs.x, scales[1] = pairs.y;
            d[0] = of_blocks.x, d[1] = of_blocks.y, d[2] = of_blocks.z, d[3] = of_blocks.w;
        } else {
            const uint2 upper = *reinterpret_cast<const uint2*>(record + KQuant<BITS>::HIGH + (warp * 32 + lane) * 8);
            const uint2 of_blocks = *reinterpret_cast<const uint2*>(record + g * 8);
            high[0] = upper.x, high[1] = upper.y;
            scales[0] = *reinterpret_cast<const u32*>(of_warp + k_half(lane % 4) * 4);
            d[0] = of_blocks.x, d[1] = of_blocks.y;
        }
    }

    // Those of a part.
    __device__ __forceinline__ uint4 weights(u32 part) const {
        if (BITS == 4) {
            const u32 s_and_m = scales[part / 2], first = part % 2 * 2;
            const float scale = widen_f16(u16(d[part] & 0xffffu)) * (based_small(s_and_m, first) - SMALL_BASE);
            const float min = widen_f16(u16(d[part] >> 16)) * (based_small(s_and_m, first + 1) - SMALL_BASE);
            return k_weights<4>(low[part], 0, false, scale, min);
        }
        const float scale = widen_f16(u16(d[part / 2] >> part % 2 * 16 & 0xffffu)) * signed_scale(scales[0], part);
        return k_weights<6>(low[part], high[part / 2], part % 2, scale, 0.0f);
    }
};

// 8 weights from element 8 * eighth of a row on.
template <u32 BITS>
__device__ __forceinline__ uint4 k_weights_at(const u8* records, u64 row, u32 eighth, u32 k) {
    const u32 block = eighth / 32, warp = eighth / 4 % 8, t = eighth % 4, g = u32(row % 8), lane = 4 * g + t;
    const u32 part = u32(row % 16) / 8 * 2 + block % 2;
    const u8* record = records + (row / 16 * k_num_pairs(k) + block / 2) * KQuant<BITS>::RECORD_BYTES;
    const u8* of_warp = record + KQuant<BITS>::SCALES + warp * 64 + g * 8;
    const u32 low = reinterpret_cast<const u32*>(record + KQuant<BITS>::LOW)[(warp * 32 + lane) * 4 + part];
    const u16* d = reinterpret_cast<const u16*>(record);
    if (BITS == 4) {
        const float scale = widen_f16(d[(g * 4 + part) * 2]) * (based_small(of_warp[part * 2], 0) - SMALL_BASE);
        const float min = widen_f16(d[(g * 4 + part) * 2 + 1]) * (based_small(of_warp[part * 2 + 1], 0) - SMALL_BASE);
        return k_weights<4>(low, 0, false, scale, min);
    }
    const u32 high = reinterpret_cast<const u32*>(record + KQuant<BITS>::HIGH)[(warp * 32 + lane) * 2 + part / 2];
    const float scale = widen_f16(d[g * 4 + part]) * signed_scale(of_warp[k_half(t) * 4 + part], 0);
    return k_weights<6>(low, high, part % 2, scale, 0.0f);
}
