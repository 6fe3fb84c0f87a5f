// The units of compute capability 9.0 that work beside a block's threads, on the host: barriers in shared memory that
// also count bytes, bulk copies of a box of a tensor, products of a warpgroup. Layouts and rules are those of the
// PTX manual (mbarrier, cp.async.bulk.tensor, wgmma and its matrix descriptors, the 128-byte swizzle).
//
// A bulk copy takes its place at once (what was there becomes NaN) and lands as late as it can, when no thread can go
// on. A product is computed when it is issued, from what is in shared memory then, and its registers are NaN until it
// is waited for. Asynchronous units see dynamic shared memory through a view of their own, to which what threads
// have stored comes with `fence.proxy.async`. So the following are noticed, mostly as a sentence, else as NaN:
//
//   a product that reads what a copy has not filled, a copy over what a product may still read
//   registers of a product that are touched before it is waited for, or used without `wgmma.fence`
//   stores that no thread has fenced (which thread fences is not noticed: the first one brings all stores)
//   a barrier that gets more arrivals than it counts, is used before it is made, or waits for bytes that never come
//   warps of a warpgroup that issue different products; boxes, matrices and descriptors that are not aligned
#pragma once

#include "fibres.h"

namespace fibres {

// What stands for a tensor map: words of it.
struct HostTensorMap {
    uint64_t kind, address, dims[4], box[4];
};
inline constexpr uint64_t HOST_TENSOR_MAP = 0x70616d5f74736f68;

struct Barrier {
    unsigned count, pending;
    int64_t bytes = 0; // expected and not yet come
    uint64_t phase = 0;
};

// A product's accumulators in registers, as they will be.
struct Accumulators {
    float* registers;
    std::vector<float> values;
    uint64_t group;
};

// Registers that a product reads while it is on its way.
struct Held {
    const unsigned* registers;
    unsigned values[4];
    uint64_t group;
};

struct Products {
    std::vector<Accumulators> accumulators;
    std::vector<Held> held;
    uint64_t group = 0; // the open one
    bool is_fenced = false;
};

// 16-byte pieces of shared memory that products of a warp read.
struct Reading {
    uint64_t group;
    std::vector<unsigned> chunks;
};

struct Issued {
    int line;
    uint64_t a, b;
    bool operator==(const Issued& other) const { return line == other.line && a == other.a && b == other.b; }
};

struct BulkCopy {
    std::vector<std::pair<unsigned, const unsigned char*>> chunks; // where in shared memory, from where
    const void* barrier;
};

struct Hopper : Beside {
    // Where dynamic shared memory begins: no more aligned than its declaration says.
    static constexpr unsigned BASE = 1024 + 128;

    std::map<const void*, Barrier> barriers;
    std::vector<unsigned char> view; // of the asynchronous units
    std::vector<unsigned> readers;   // per 16 bytes
    std::vector<bool> is_filling;
    std::deque<BulkCopy> copies;
    std::vector<Products> products;                // per thread
    std::vector<std::deque<Reading>> reading;      // per warp
    std::vector<std::vector<Issued>> issued;       // per warpgroup
    std::vector<size_t> num_issued;                // per warp

    Hopper()
        : view(block->dynamic.size(), 0xff), readers((view.size() + 15) / 16), is_filling(readers.size()),
          products(block->fibres.size()), reading(block->warps.size()), issued((block->warps.size() + 3) / 4),
          num_issued(block->warps.size()) {}

    unsigned char* memory() const { return block->dynamic.data(); }

    Barrier& barrier(const void* at) {
        const auto found = barriers.find(at);
        if (found == barriers.end()) fail("thread %u uses a barrier that was not initialised", block->current);
        return found->second;
    }

    void arrive(const void* at) {
        Barrier& b = barrier(at);
        if (b.pending == 0) fail("thread %u arrives at a barrier at which all %u have", block->current, b.count);
        --b.pending;
        complete(b);
    }

    static void complete(Barrier& b) {
        if (b.pending > 0 || b.bytes != 0) return;
        ++b.phase;
        b.pending = b.count;
    }

    bool step(Order order, std::mt19937& random) override {
        if (copies.empty()) return false;
        const size_t which = order == Order::Forward ? 0 : order == Order::Reverse ? copies.size() - 1 : random() % copies.size();
        const BulkCopy copy = copies[which];
        copies.erase(copies.begin() + long(which));
        for (const auto& [offset, from] : copy.chunks) {
            std::memcpy(memory() + offset, from, 16);
            std::memcpy(view.data() + offset, from, 16);
            is_filling[offset / 16] = false;
        }
        Barrier& b = barrier(copy.barrier);
        b.bytes -= int64_t(copy.chunks.size() * 16);
        complete(b);
        return true;
    }

    void on_block_end() override {
        if (!copies.empty()) fail("a block ended with %zu bulk copies in flight", copies.size());
        for (size_t thread = 0; thread < products.size(); ++thread)
            if (!products[thread].accumulators.empty()) fail("thread %zu ended with products in flight", thread);
        for (size_t warp = 0; warp < num_issued.size(); ++warp)
            if (num_issued[warp] != issued[warp / 4].size())
                fail("warp %zu issued %zu products, its warpgroup %zu", warp, num_issued[warp], issued[warp / 4].size());
    }
};

inline Hopper& hopper() {
    if (!block->beside) block->beside = std::make_unique<Hopper>();
    return static_cast<Hopper&>(*block->beside);
}

inline unsigned shared_address(const void* at) {
    const auto offset = static_cast<const unsigned char*>(at) - block->dynamic.data();
    if (offset < 0 || size_t(offset) > block->dynamic.size()) fail("an address is not of dynamic shared memory");
    return Hopper::BASE + unsigned(offset);
}

// The 128-byte swizzle: which 16 bytes of a line of 128 depends on the line, with a period of 1024 bytes.
inline unsigned swizzled(unsigned address) { return address ^ (address >> 7 & 7) << 4; }

inline unsigned offset_of(unsigned address) {
    const unsigned offset = address - Hopper::BASE;
    if (address < Hopper::BASE || offset + 16 > block->dynamic.size())
        fail("thread %u: a unit touches address %u, outside of dynamic shared memory", block->current, address);
    return offset;
}

inline void barrier_init(const void* at, unsigned count) { hopper().barriers[at] = {count, count}; }

inline void barrier_expect(const void* at, unsigned num_bytes) {
    hopper().barrier(at).bytes += num_bytes;
    hopper().arrive(at);
}

inline void barrier_wait(const void* at, unsigned parity, int line) {
    if ((hopper().barrier(at).phase & 1) != parity) return;
    pause("a barrier in shared memory", line, [](const Fibre& fibre) {
        return (hopper().barrier(fibre.place).phase & 1) != fibre.generation;
    }, parity, at);
}

inline void fence_proxy_async() {
    Hopper& h = hopper();
    for (size_t offset = 0; offset < h.view.size(); offset += 16) {
        const size_t size = std::min<size_t>(16, h.view.size() - offset);
        if (std::memcmp(h.view.data() + offset, h.memory() + offset, size) == 0) continue;
        if (h.readers[offset / 16]) fail("shared memory was stored to at %zu while a product may read it", offset);
        std::memcpy(h.view.data() + offset, h.memory() + offset, size);
    }
}

// A box of a packed tensor of four dimensions, 2 bytes a value, the innermost first; 64 values along it.
inline void copy_box(void* to, const void* tensor_map, const unsigned (&at)[4], const void* barrier) {
    HostTensorMap map;
    std::memcpy(&map, tensor_map, sizeof map);
    if (map.kind != HOST_TENSOR_MAP) fail("a bulk copy without a tensor map");
    if (map.box[0] != 64) fail("a box of %zu values: lines of the swizzle have 64", size_t(map.box[0]));
    const unsigned start = shared_address(to);
    if (start % 1024) fail("a bulk copy to address %u: the swizzle begins at multiples of 1024", start);
    for (unsigned i = 0; i < 4; ++i)
        if (at[i] + map.box[i] > map.dims[i])
            fail("a box from %u on of %zu along dimension %u of %zu", at[i], size_t(map.box[i]), i, size_t(map.dims[i]));
    Hopper& h = hopper();
    BulkCopy copy{{}, barrier};
    unsigned row = 0;
    for (unsigned z = 0; z < map.box[3]; ++z)
        for (unsigned y = 0; y < map.box[2]; ++y)
            for (unsigned x = 0; x < map.box[1]; ++x, ++row) {
                const uint64_t index = ((at[3] + z) * map.dims[2] + at[2] + y) * map.dims[1] + at[1] + x;
                const auto* from = reinterpret_cast<const unsigned char*>(map.address + (index * map.dims[0] + at[0]) * 2);
                for (unsigned c = 0; c < 8; ++c)
                    copy.chunks.push_back({offset_of(swizzled(start + row * 128 + c * 16)), from + c * 16});
            }
    for (const auto& [offset, from] : copy.chunks) {
        if (h.readers[offset / 16]) fail("a bulk copy over shared memory at %u that a product may read", offset);
        if (h.is_filling[offset / 16]) fail("a bulk copy over shared memory at %u that another fills", offset);
        h.is_filling[offset / 16] = true;
        std::memset(h.memory() + offset, 0xff, 16);
        std::memset(h.view.data() + offset, 0xff, 16);
    }
    h.copies.push_back(std::move(copy));
}

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
            if (bits != 0xffffffffu) fail("thread %u changed the result of a product before it had waited for it", block->current);
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
            if (all[i].words[2] != a || all[i].words[3] != b) fail("lanes 0 and %u of warp %u name different matrices", i, warp);
        auto& issued = h.issued[warp / 4];
        const size_t number = h.num_issued[warp]++;
        if (number == issued.size()) issued.push_back({line, a, b});
        if (!(issued[number] == Issued{line, a, b}))
            fail("warp %u issues the product of line %d, another of its warpgroup that of line %d", warp, line, issued[number].line);
        Reading reading{mine.group, {}};
        for (unsigned i = 0; i < 2 * num_columns; ++i)
            reading.chunks.push_back((is_transposed ? of_b.of_columns(i % (num_columns / 8) * 8, i / (num_columns / 8))
                                                    : of_b.of_rows(i / 2, i % 2 * 8)) / 16);
        if (!a_registers)
            for (unsigned i = 0; i < 32; ++i) reading.chunks.push_back(SharedMatrix(a).of_rows(warp % 4 * 16 + i / 2, i % 2 * 8) / 16);
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
            for (unsigned k = 0; k < 16; ++k)
                values[k] = from_bf16(h.view.data() + (is_transposed ? of_b.of_columns(n, k) + n % 8 * 2 : of_b.of_rows(n, k) + k % 8 * 2));
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
