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
#include "host_tensor_map.h"

namespace fibres {

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
        size_t which = order == Order::Forward ? 0 : copies.size() - 1;
        if (order == Order::Shuffled) which = random() % copies.size();
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

} // namespace fibres

#include "products.h"
