// Products of a warpgroup on the host; what is promised and what is noticed: host/hopper.h.
#pragma once

#include "hopper.h"

namespace fibres {

// A matrix of bf16 in shared memory, by its descriptor.
struct SharedMatrix {
    unsigned start, leading, stride;
    explicit SharedMatrix(uint64_t descriptor)
        : start(unsigned(descriptor & 0x3fff) << 4), leading(unsigned(descriptor >> 16 & 0x3fff) << 4),
          stride(unsigned(descriptor >> 32 & 0x3fff) << 4) {
        if (descriptor >> 62 != 1) fail("a matrix without the 128-byte swizzle: only that is known here");
        if (descriptor & 0x3fffc000c000c000) fail("a descriptor with bits that stand for nothing here");
    }
    // Where the 16 bytes with value `k` of row `row` begin, if values that are summed over follow one another.
    unsigned of_rows(unsigned row, unsigned k) const {
        return offset_of(swizzled(start + row / 8 * stride + row % 8 * 128 + k / 8 * 16));
    }
    // The same if rows follow one another.
    unsigned of_columns(unsigned row, unsigned k) const {
        return offset_of(swizzled(start + row / 64 * leading + k / 8 * stride + k % 8 * 128 + row % 64 / 8 * 16));
    }
};

inline float from_bf16(const unsigned char* at) {
    const uint32_t bits = uint32_t(at[0]) << 16 | uint32_t(at[1]) << 24;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline void wgmma_fence(int line) {
    exchange("wgmma.fence", line, {});
    hopper().products[block->current].is_fenced = true;
}

inline void wgmma_commit(int line) {
    exchange("wgmma.commit_group", line, {});
    ++hopper().products[block->current].group;
}

// All groups but the newest `num_open` are done.
inline void wgmma_wait(unsigned num_open, int line) {
    exchange("wgmma.wait_group", line, {});
    Hopper& h = hopper();
    Products& mine = h.products[block->current];
    mine.is_fenced = false;
    const auto is_done = [&](uint64_t group) { return group + num_open < mine.group; };
    for (const Held& held : mine.held)
        if (is_done(held.group) && std::memcmp(held.registers, held.values, sizeof held.values) != 0)
            fail("thread %u changed operands of a product before it had waited for it", block->current);
    mine.held.erase(std::remove_if(mine.held.begin(), mine.held.end(), [&](const Held& held) { return is_done(held.group); }),
                    mine.held.end());
    for (const Accumulators& done : mine.accumulators) {
        if (!is_done(done.group)) continue;
        for (size_t i = 0; i < done.values.size(); ++i) {
            uint32_t bits;
            std::memcpy(&bits, &done.registers[i], 4);
            if (bits != 0xffffffffu)
                fail("thread %u changed the result of a product before it had waited for it", block->current);
            done.registers[i] = done.values[i];
        }
    }
    mine.accumulators.erase(std::remove_if(mine.accumulators.begin(), mine.accumulators.end(),
                                           [&](const Accumulators& done) { return is_done(done.group); }),
                            mine.accumulators.end());
    if (lane() != 0) return;
    auto& reading = h.reading[block->current / 32];
    while (!reading.empty() && is_done(reading.front().group)) {
        for (unsigned chunk : reading.front().chunks) --h.readers[chunk];
        reading.pop_front();
    }
}

// d += a b over 16 values, by the four warps of a warpgroup, 16 rows each: a[64][16] is in registers or, rows of 16
// values, in shared memory; b[16][num_columns] is in shared memory, column after column or, transposed, row after row.
inline void wgmma(float* d, unsigned num_columns, const unsigned* a_registers, uint64_t a, uint64_t b, bool is_transposed,
                  bool adds, int line) {
    Hopper& h = hopper();
    const unsigned warp = block->current / 32, g = lane() / 4, t = lane() % 4;
    Products& mine = h.products[block->current];
    if (!mine.is_fenced) fail("thread %u: a product of line %d without wgmma.fence before it", block->current, line);
    Payload operands{{0, 0, a, b}};
    if (a_registers) std::memcpy(operands.words, a_registers, 16);
    const Payload* all = exchange("wgmma", line, operands);
    const SharedMatrix of_b(b);
    if (lane() == 0) {
        for (unsigned i = 0; i < 32; ++i)
            if (all[i].words[2] != a || all[i].words[3] != b)
                fail("lanes 0 and %u of warp %u name different matrices", i, warp);
        auto& issued = h.issued[warp / 4];
        const size_t number = h.num_issued[warp]++;
        if (number == issued.size()) issued.push_back({line, a, b});
        if (!(issued[number] == Issued{line, a, b}))
            fail("warp %u issues the product of line %d, another of its warpgroup that of line %d", warp, line,
                 issued[number].line);
        Reading reading{mine.group, {}};
        for (unsigned i = 0; i < 2 * num_columns; ++i)
            reading.chunks.push_back((is_transposed ? of_b.of_columns(i % (num_columns / 8) * 8, i / (num_columns / 8))
                                                    : of_b.of_rows(i / 2, i % 2 * 8)) / 16);
        if (!a_registers)
            for (unsigned i = 0; i < 32; ++i)
                reading.chunks.push_back(SharedMatrix(a).of_rows(warp % 4 * 16 + i / 2, i % 2 * 8) / 16);
        for (unsigned chunk : reading.chunks) {
            if (h.is_filling[chunk]) fail("warp %u: the product of line %d reads what a bulk copy has not filled", warp, line);
            ++h.readers[chunk];
        }
        h.reading[warp].push_back(std::move(reading));
    }

    float rows[2][16];
    for (unsigned i = 0; i < 32; ++i) {
        const unsigned upper = i / 16, k = i % 16;
        if (a_registers) {
            const auto* of_lane = reinterpret_cast<const unsigned char*>(all[4 * g + k % 8 / 2].words);
            rows[upper][k] = from_bf16(of_lane + 4 * (k / 8 * 2 + upper) + k % 2 * 2);
        } else {
            rows[upper][k] = from_bf16(h.view.data() + SharedMatrix(a).of_rows(warp % 4 * 16 + g + 8 * upper, k) + k % 8 * 2);
        }
    }
    auto found = std::find_if(mine.accumulators.begin(), mine.accumulators.end(),
                              [&](const Accumulators& open) { return open.registers == d; });
    if (found == mine.accumulators.end()) {
        found = mine.accumulators.insert(found, {d, std::vector<float>(d, d + num_columns / 2), 0});
        std::memset(d, 0xff, num_columns / 2 * sizeof(float));
    }
    Accumulators& sums = *found;
    sums.group = mine.group;
    for (unsigned column = 0; column < num_columns; column += 8)
        for (unsigned odd = 0; odd < 2; ++odd) {
            const unsigned n = column + 2 * t + odd;
            float values[16];
            for (unsigned k = 0; k < 16; ++k) {
                const unsigned at = is_transposed ? of_b.of_columns(n, k) + n % 8 * 2 : of_b.of_rows(n, k) + k % 8 * 2;
                values[k] = from_bf16(h.view.data() + at);
            }
            for (unsigned upper = 0; upper < 2; ++upper) {
                float& value = sums.values[column / 2 + 2 * upper + odd];
                double sum = adds ? value : 0.0;
                for (unsigned k = 0; k < 16; ++k) sum += double(rows[upper][k]) * double(values[k]);
                value = float(sum);
            }
        }
    if (a_registers) {
        mine.held.push_back({a_registers, {}, mine.group});
        std::memcpy(mine.held.back().values, a_registers, 16);
    }
}

} // namespace fibres
