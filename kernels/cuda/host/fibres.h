// Runs a kernel on the host: every CUDA thread is a fibre, one block at a time. A fibre is made once by ucontext
// and from then on entered and left by setjmp and longjmp, which need no system call.
//
// What it shows: index arithmetic, a missing barrier (threads run in forward, reverse and shuffled order, and
// shared memory begins as NaN), a barrier that not all threads reach, a read or write beyond the end of a
// buffer (buffers end at a page nobody may touch), a warp collective called from different places.
// What it does not show: races between two threads of a warp that run in lockstep on the device, memory
// ordering between blocks, speed. Blocks run one after the other in the given order.
//
// Units that work beside a block's threads (bulk copies, products of a warpgroup) are in host/hopper.h.
//
// Only full warps take part in collectives (mask 0xffffffff), and no thread may return while others wait at a
// barrier: both are legal on a device in some cases, none of our kernels needs them.
#pragma once

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __restrict__
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace fibres {

[[noreturn]] inline void fail(const char* format, ...) {
    std::va_list args;
    va_start(args, format);
    std::printf("FAILED: ");
    std::vprintf(format, args);
    std::printf("\n");
    va_end(args);
    std::fflush(stdout);
    std::_Exit(1);
}

// Which MUTATE place is wrong; 0: none.
inline int mutation = 0;

// Bytes that end (but for what alignment to 16 needs) where the process may touch nothing.
class Guarded {
  public:
    explicit Guarded(size_t num_bytes, bool is_file = false) : num_bytes_(num_bytes) {
        const size_t page = size_t(sysconf(_SC_PAGESIZE));
        const size_t rounded = (num_bytes + 15) / 16 * 16;
        mapped_ = (rounded + page - 1) / page * page + page;
        if (is_file) {
            file_ = memfd_create("fibres", MFD_CLOEXEC);
            if (file_ < 0 || ftruncate(file_, off_t(mapped_)) != 0) fail("no file in memory of %zu bytes", num_bytes);
        }
        const int flags = is_file ? MAP_SHARED : MAP_PRIVATE | MAP_ANONYMOUS;
        void* base = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, flags, file_, 0);
        if (base == MAP_FAILED) fail("no memory for a buffer of %zu bytes", num_bytes);
        base_ = static_cast<unsigned char*>(base);
        mprotect(base_ + mapped_ - page, page, PROT_NONE);
        data_ = base_ + mapped_ - page - rounded;
    }
    ~Guarded() {
        if (base_) munmap(base_, mapped_);
        if (file_ >= 0) close(file_);
    }
    Guarded(const Guarded&) = delete;
    Guarded(Guarded&& other) noexcept { *this = std::move(other); }
    Guarded& operator=(Guarded&& other) noexcept {
        std::swap(base_, other.base_), std::swap(data_, other.data_);
        std::swap(mapped_, other.mapped_), std::swap(num_bytes_, other.num_bytes_), std::swap(file_, other.file_);
        return *this;
    }
    unsigned char* data() const { return data_; }
    size_t size() const { return num_bytes_; }
    // Of the file that it is the memory of; -1: of none.
    int file() const { return file_; }
    size_t file_offset() const { return size_t(data_ - base_); }

  private:
    unsigned char *base_ = nullptr, *data_ = nullptr;
    size_t mapped_ = 0, num_bytes_ = 0;
    int file_ = -1;
};

// What one lane gives to a collective: enough for the operands of an `mma`.
struct Payload { uint64_t words[8]; };

struct Warp {
    Payload slots[2][32]; // two in turn: all have read one before the next but one is written
    unsigned arrived = 0;
    uint64_t generation = 0;
    const char* operation = nullptr;
    int line = 0;
};

struct Copy { void* to; const void* from; bool is_there; };

struct Fibre {
    jmp_buf resume;
    bool is_started = false, has_begun = false;
    dim3 index;
    bool is_done = false;
    const char* waits_for = nullptr; // a barrier, or nothing
    int line = 0;
    bool (*is_released)(const Fibre&) = nullptr;
    uint64_t generation = 0;
    const void* place = nullptr; // of what it waits for, if there are several
    std::deque<std::vector<Copy>> copy_groups; // the last one is open
};

enum class Order { Forward, Reverse, Shuffled };
inline constexpr Order ORDERS[] = {Order::Forward, Order::Reverse, Order::Shuffled};

// Units that work beside the threads of a block.
struct Beside {
    virtual ~Beside() = default;
    // Does one of the things it was asked for, when no thread can go on; false: there is none.
    virtual bool step(Order order, std::mt19937& random) = 0;
    // Fails if the block has ended before them.
    virtual void on_block_end() = 0;
};

// The fibres of a launch: the first of those that all launches of the process share.
struct Fibres {
    Fibre* first;
    size_t count;
    Fibre* begin() const { return first; }
    Fibre* end() const { return first + count; }
    size_t size() const { return count; }
    Fibre* data() const { return first; }
    Fibre& operator[](size_t i) const { return first[i]; }
};

struct Block {
    Fibres fibres;
    std::vector<Warp> warps;
    unsigned arrived = 0;
    uint64_t generation = 0;
    int line = 0;
    unsigned current = 0;
    uint64_t number = 0; // of all blocks so far
    jmp_buf scheduler;
    const std::function<void()>* kernel = nullptr;
    std::map<int, Guarded> shared; // static shared memory by the place that declares it
    std::vector<int> poisoned;     // which of it this block has seen already
    Guarded dynamic{0};
    std::unique_ptr<Beside> beside; // made by the first thread that asks for some
};

inline Block* block = nullptr;

inline Fibre& self() { return block->fibres[block->current]; }
inline unsigned lane() { return block->current % 32; }
inline Warp& warp() { return block->warps[block->current / 32]; }

// What every thread of a kernel of ours calls once, see `begin_launch` of device.cuh; tests of this header itself do not.
inline bool must_begin = true;
inline void begin_thread() {
    if (std::exchange(self().has_begun, true)) fail("thread %u calls begin_launch a second time", block->current);
}

// Back to who runs the block; returns when this fibre has its next turn.
inline void leave() {
    if (_setjmp(self().resume) == 0) _longjmp(block->scheduler, 1);
}

// The life of a fibre: one thread of a block after the other.
inline void run_fibre() {
    for (;;) {
        (*block->kernel)();
        Fibre& fibre = self();
        for (const auto& group : fibre.copy_groups)
            if (!group.empty()) fail("thread %u ended with asynchronous copies in flight", block->current);
        if (must_begin && !fibre.has_begun) fail("thread %u ended without begin_launch", block->current);
        fibre.is_done = true;
        leave();
    }
}

inline void enter(Fibre& fibre) {
    if (_setjmp(block->scheduler) != 0) return;
    if (fibre.is_started) _longjmp(fibre.resume, 1);
    constexpr size_t STACK_BYTES = 64 << 10;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_size = STACK_BYTES;
    context.uc_stack.ss_sp = mmap(nullptr, STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (context.uc_stack.ss_sp == MAP_FAILED) fail("no memory for a stack");
    context.uc_link = nullptr;
    fibre.is_started = true;
    makecontext(&context, run_fibre, 0);
    setcontext(&context);
}

inline void pause(const char* what, int line, bool (*is_released)(const Fibre&), uint64_t generation,
                  const void* place = nullptr) {
    Fibre& fibre = self();
    fibre.waits_for = what, fibre.line = line, fibre.is_released = is_released;
    fibre.generation = generation, fibre.place = place;
    leave();
    self().waits_for = nullptr;
}

inline void block_barrier(int line) {
    if (block->arrived == 0) block->line = line;
    if (block->line != line)
        fail("thread %u is at __syncthreads of line %d, others at that of line %d", block->current, line, block->line);
    const uint64_t generation = block->generation;
    if (++block->arrived == block->fibres.size()) {
        block->arrived = 0;
        ++block->generation;
        return;
    }
    pause("__syncthreads", line, [](const Fibre& f) { return block->generation != f.generation; }, generation);
}

// All lanes give a payload, then all see all payloads, by lane.
inline const Payload* exchange(const char* operation, int line, const Payload& payload) {
    Warp& w = warp();
    if (w.arrived == 0) w.operation = operation, w.line = line;
    if (w.line != line || std::strcmp(w.operation, operation) != 0)
        fail("lane %u of warp %u is at %s of line %d, others at %s of line %d", lane(), block->current / 32, operation,
             line, w.operation, w.line);
    const uint64_t generation = w.generation;
    Payload* slots = w.slots[generation % 2];
    slots[lane()] = payload;
    if (++w.arrived == 32) {
        w.arrived = 0;
        ++w.generation;
    } else {
        pause(operation, line, [](const Fibre& f) {
            return block->warps[size_t(&f - block->fibres.data()) / 32].generation != f.generation;
        }, generation);
    }
    return slots;
}

inline void need_full(unsigned mask, const char* operation) {
    if (mask != 0xffffffffu) fail("%s with mask %08x: only full warps are known here", operation, mask);
}

template <typename T>
T shuffle(const char* operation, int line, unsigned mask, T value, unsigned from_lane) {
    static_assert(sizeof(T) <= sizeof(Payload));
    need_full(mask, operation);
    Payload payload{};
    std::memcpy(&payload, &value, sizeof value);
    T result;
    std::memcpy(&result, &exchange(operation, line, payload)[from_lane % 32], sizeof result);
    return result;
}

template <typename T>
T* shared(int place, size_t count) {
    auto found = block->shared.find(place);
    if (found == block->shared.end()) found = block->shared.emplace(place, Guarded(count * sizeof(T))).first;
    if (std::find(block->poisoned.begin(), block->poisoned.end(), place) == block->poisoned.end()) {
        std::memset(found->second.data(), 0xff, found->second.size());
        block->poisoned.push_back(place);
    }
    return reinterpret_cast<T*>(found->second.data());
}

inline void run_block(Order order, std::mt19937& random) {
    std::vector<unsigned> turn(block->fibres.size());
    std::iota(turn.begin(), turn.end(), 0u);
    if (order == Order::Reverse) std::reverse(turn.begin(), turn.end());
    for (;;) {
        if (order == Order::Shuffled) std::shuffle(turn.begin(), turn.end(), random);
        bool has_run = false, all_done = true;
        for (unsigned index : turn) {
            Fibre& fibre = block->fibres[index];
            if (fibre.is_done) continue;
            all_done = false;
            if (fibre.waits_for && !fibre.is_released(fibre)) continue;
            has_run = true;
            block->current = index;
            threadIdx = fibre.index;
            enter(fibre);
        }
        if (all_done) {
            if (block->beside) block->beside->on_block_end();
            return;
        }
        if (has_run || (block->beside && block->beside->step(order, random))) continue;
        unsigned num_done = 0;
        const Fibre* waiting = nullptr;
        for (const Fibre& fibre : block->fibres) fibre.is_done ? void(++num_done) : void(waiting = &fibre);
        fail("thread %u of block (%u, %u, %u) waits at %s of line %d for ever: %u of %zu threads have ended",
             unsigned(waiting - block->fibres.data()), blockIdx.x, blockIdx.y, blockIdx.z, waiting->waits_for,
             waiting->line, num_done, block->fibres.size());
    }
}

// Runs `kernel` for every block of the grid, with `num_dynamic` bytes of dynamic shared memory.
inline void launch(Order order, dim3 grid, dim3 threads, size_t num_dynamic, const std::function<void()>& kernel) {
    static Fibre* const all_fibres = new Fibre[1024]; // never destroyed: the process may end meanwhile
    const unsigned num_threads = threads.x * threads.y * threads.z;
    if (num_threads == 0 || num_threads % 32 != 0 || num_threads > 1024)
        fail("blocks of %u threads: expected whole warps, at most 1024 threads", num_threads);
    if (grid.y > 65535 || grid.z > 65535) fail("%u x %u x %u blocks: at most 65535 along y and z", grid.x, grid.y, grid.z);
    std::mt19937 random(1);
    static uint64_t num_blocks = 0;
    Block here;
    block = &here;
    here.kernel = &kernel;
    here.dynamic = Guarded(num_dynamic);
    here.fibres = {all_fibres, num_threads};
    blockDim = threads, gridDim = grid;
    for (unsigned z = 0; z < grid.z; ++z)
        for (unsigned y = 0; y < grid.y; ++y)
            for (unsigned x = 0; x < grid.x; ++x) {
                blockIdx = dim3(x, y, z);
                here.number = num_blocks++;
                here.warps.assign(num_threads / 32, Warp{});
                here.arrived = 0, here.generation = 0;
                here.poisoned.clear();
                here.beside.reset();
                std::memset(here.dynamic.data(), 0xff, here.dynamic.size());
                for (unsigned i = 0; i < num_threads; ++i) {
                    Fibre& fibre = here.fibres[i];
                    fibre.index = dim3(i % threads.x, i / threads.x % threads.y, i / threads.x / threads.y);
                    fibre.is_done = fibre.has_begun = false, fibre.waits_for = nullptr;
                    fibre.copy_groups.assign(1, {});
                }
                run_block(order, random);
            }
    block = nullptr;
}

} // namespace fibres

// What kernels call, under CUDA's names.
inline void __syncthreads(int line = __builtin_LINE()) { fibres::block_barrier(line); }
inline void __syncwarp(unsigned mask = 0xffffffffu, int line = __builtin_LINE()) {
    fibres::shuffle("__syncwarp", line, mask, 0, 0);
}
template <typename T>
T __shfl_sync(unsigned mask, T value, int from, int width = 32, int line = __builtin_LINE()) {
    const unsigned lane = fibres::lane(), first = lane / width * width;
    return fibres::shuffle("__shfl_sync", line, mask, value, first + unsigned(from) % width);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int with, int line = __builtin_LINE()) {
    return fibres::shuffle("__shfl_xor_sync", line, mask, value, fibres::lane() ^ unsigned(with));
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int line = __builtin_LINE()) {
    const unsigned lane = fibres::lane();
    return fibres::shuffle("__shfl_up_sync", line, mask, value, lane < by ? lane : lane - by);
}
inline unsigned __ballot_sync(unsigned mask, int vote, int line = __builtin_LINE()) {
    fibres::need_full(mask, "__ballot_sync");
    const fibres::Payload* all = fibres::exchange("__ballot_sync", line, {{uint64_t(vote != 0)}});
    unsigned votes = 0;
    for (int lane = 0; lane < 32; ++lane) votes |= unsigned(all[lane].words[0]) << lane;
    return votes;
}
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
    const uint64_t both = low | uint64_t(high) << 32;
    unsigned result = 0;
    for (int i = 0; i < 4; ++i) result |= unsigned(both >> (selector >> (4 * i) & 7) * 8 & 0xff) << (8 * i);
    return result;
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(unsigned bits) { return __builtin_ffs(int(bits)); }
inline unsigned __float_as_uint(float x) { unsigned bits; std::memcpy(&bits, &x, 4); return bits; }
inline float __uint_as_float(unsigned bits) { float x; std::memcpy(&x, &bits, 4); return x; }
template <typename T> T atomicAdd(T* at, T value) { T old = *at; *at += value; return old; }
template <typename T> T atomicMax(T* at, T value) { T old = *at; *at = std::max(old, value); return old; }
using std::max;
using std::min;

#define SHARED_ARRAY(type, name, count) type* const name = fibres::shared<type>(__COUNTER__, count)
#define DYNAMIC_SHARED(name) unsigned char* const name = fibres::block->dynamic.data()
