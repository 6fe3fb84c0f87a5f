// A matrix of k-quants for the tests of their kernels: the logical form, and the records made of it value by value.
#pragma once

#include "../k_quants.cuh"
#include "harness.h"

template <u32 BITS>
struct KQuantCase {
    static constexpr u32 GROUP = BITS == 4 ? 32 : 16;
    u32 n, k;
    std::vector<u8> codes;    // [n, k]
    std::vector<int> s, m;    // [n, k / GROUP]
    std::vector<u16> d, dmin; // [n, k / 256]
    Device<u8> records;

    KQuantCase(u32 n, u32 k)
        : n(n), k(k), codes(size_t(n) * k), s(codes.size() / GROUP), m(s.size()), d(codes.size() / 256), dmin(d.size()),
          records(size_t(n + 15) / 16 * ((k + 511) / 512) * (BITS == 4 ? 4736 : 6720)) {
        for (u8& code : codes) code = u8(random_below(1 << BITS));
        for (int& each : s) each = BITS == 4 ? int(random_below(64)) : int(random_below(256)) - 128;
        for (int& each : m) each = BITS == 4 ? int(random_below(64)) : 0;
        for (u16& each : d) each = random_f16();
        for (u16& each : dmin) each = BITS == 4 ? random_f16() : 0;
        std::memset(records.get(), 0, records.size());
        for (u32 row = 0; row < n; ++row)
            for (u32 at = 0; at < k; ++at) pack(row, at);
    }

    // Normal and tiny, of either sign.
    static u16 random_f16() {
        const u32 magnitude = random_below(8) == 0 ? 1 + random_below(0x3ff) : 0x1000 + random_below(0x1000);
        return u16(magnitude | random_below(2) << 15);
    }

    void put(u8* to, u32 value) { *to = u8(*to | value); }

    void pack(u32 row, u32 at) {
        const u32 block = at / 256, warp = at % 256 / 32, t = at % 32 / 8, e = at % 8, g = row % 8, lane = 4 * g + t;
        const u32 part = row % 16 / 8 * 2 + block % 2;
        const size_t bytes = BITS == 4 ? 4736 : 6720, scales = BITS == 4 ? 128 : 64;
        const size_t low = scales + 512, high = low + 4096;
        u8* record = records.get() + (size_t(row / 16) * ((k + 511) / 512) + block / 2) * bytes;
        const size_t of_group = size_t(row) * (k / GROUP) + at / GROUP, of_block = size_t(row) * (k / 256) + block;
        const u32 code = codes[size_t(row) * k + at];
        put(record + low + ((warp * 32 + lane) * 4 + part) * 4 + e / 2, (code & 15) << (e % 2 * 4));
        if (BITS == 4) {
            const u16 both[2] = {d[of_block], dmin[of_block]};
            std::memcpy(record + (g * 4 + part) * 4, both, 4);
            u8* pair = record + scales + warp * 64 + g * 8 + part * 2;
            pair[0] = u8(s[of_group]), pair[1] = u8(m[of_group]);
        } else {
            std::memcpy(record + (g * 4 + part) * 2, &d[of_block], 2);
            record[scales + warp * 64 + g * 8 + t / 2 * 4 + part] = u8(s[of_group] + 128);
            put(record + high + ((warp * 32 + lane) * 2 + part / 2) * 4 + e / 2, code >> 4 << (part % 2 * 4 + e % 2 * 2));
        }
    }

    static double value_of_f16(u16 bits) {
        const int exponent = bits >> 10 & 31, fraction = bits & 0x3ff;
        const double magnitude = exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24);
        return bits >> 15 ? -magnitude : magnitude;
    }

    // As bf16, which is what products take; rounded to f32 before. In double, what is rounded is exact.
    bf16 weight(u32 row, u32 at) const {
        const size_t of_group = size_t(row) * (k / GROUP) + at / GROUP, of_block = size_t(row) * (k / 256) + at / 256;
        const double code = double(codes[size_t(row) * k + at]) - (BITS == 6 ? 32 : 0);
        bf16 rounded;
        const double scaled = value_of_f16(d[of_block]) * s[of_group] * code;
        set(&rounded, BITS == 6 ? scaled + 0.0 /* nothing has no sign */ : scaled - value_of_f16(dmin[of_block]) * m[of_group]);
        return rounded;
    }
};
