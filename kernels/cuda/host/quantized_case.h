// A matrix of codes with scales for the tests of the quantized kernels.
#pragma once

#include "../quantized.cuh"
#include "harness.h"

template <u32 BITS>
struct QuantizedCase {
    u32 n, k;
    Device<u8> codes;
    Device<u16> scales;

    QuantizedCase(u32 n, u32 k) : n(n), k(k), codes(size_t(n) * k * BITS / 8), scales(size_t(n) * k / 32) {
        for (size_t i = 0; i < codes.size(); ++i) codes[i] = u8(random_below(256));
        // Normal and tiny, of either sign.
        for (size_t i = 0; i < scales.size(); ++i)
            scales[i] = u16((random_below(8) == 0 ? 1 + random_below(0x3ff) : 0x2000 + random_below(0x1000)) | random_below(2) << 15);
    }

    double scale(u32 row, u32 at) const {
        const u16 bits = scales[size_t(row) * (k / 32) + at / 32];
        const int exponent = bits >> 10 & 31, fraction = bits & 0x3ff;
        const double magnitude = exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24);
        return bits >> 15 ? -magnitude : magnitude;
    }

    // As bf16, which is what products take.
    bf16 weight(u32 row, u32 at) const {
        const size_t index = size_t(row) * k + at;
        const u32 code = BITS == 8 ? codes[index] : u32(codes[index / 2] >> (index % 2 * 4) & 15);
        bf16 rounded;
        set(&rounded, (double(code) - (1 << (BITS - 1))) * scale(row, at) + 0.0); // nothing has no sign
        return rounded;
    }
};
