// What instructions of PTX do, for kernels as nvcc has made them (host/ptx.py): the compiled kernel runs on the same
// fibres, and beside the same units, as its source. Registers are bits; addresses of shared memory are numbers of their
// own, as on the device, those of all other memory are the host's.
//
// What it notices beyond the tests of the source: what the compiler and inline assembly make of it (an operand in the
// wrong place, a load moved to before what makes it right), accesses that are not aligned to their size, and races in
// shared memory: two threads touch the same byte, one of them writes, and neither a barrier of the block nor, within a
// warp, `bar.warp.sync` lies between. (Shuffles and votes order no memory.) Kernels with barriers in shared memory are
// excepted; host/hopper.h watches their units. And, where no address is given twice (host/driver), that what is read
// ahead of `griddepcontrol.wait` is written by no launch.
//
// The forms of instructions are those that nvcc has used so far: another is an error when this is compiled.
#pragma once

#include <cmath>
#include <tuple>
#include <unordered_set>

#include "../hopper.cuh"
#include "../tensor_core.cuh"
#include "counts.h"

namespace ptx {

// Where static shared memory begins; dynamic shared memory begins where bulk copies expect it (host/hopper.h).
inline constexpr u32 STATIC = 0x100000, DYNAMIC = fibres::Hopper::BASE;

template <typename T, u32 N>
struct Values { T of[N]; };

inline float f32(u32 bits) { return __uint_as_float(bits); }
inline u32 bits(float x) { return __float_as_uint(x); }
inline double f64(u64 bits) { double x; std::memcpy(&x, &bits, 8); return x; }
inline u64 bits(double x) { u64 b; std::memcpy(&b, &x, 8); return b; }

// Who touched a piece of shared memory last, and when: barriers of the block and of its warp that it had passed. Those of
// the block go on counting in the next block.
struct Touch {
    u16 thread = 0xffff, of_warp = 0;
    u32 of_block = 0;
    int line = 0;
};
inline constexpr u32 PIECE_BYTES = 2; // no kernel stores less
struct Piece { Touch write, reads[2]; };

// Of the block that runs.
struct Watch {
    u64 number = ~0ull;
    const char* kernel = "";
    unsigned char* statics = nullptr;
    size_t static_bytes = 0;
    std::vector<Piece> of_statics, of_dynamic;
    u64 first_generation = 0, generation = 0; // of the block's barriers
    std::vector<u16> warp_generations;
    bool has_barriers = false; // in shared memory
};
inline Watch& watch() {
    static thread_local Watch one;
    return one;
}

inline void begin(const char* kernel, size_t static_bytes) {
    Watch& w = watch();
    if (w.number == fibres::block->number) return;
    w.number = fibres::block->number;
    w.kernel = kernel;
    w.static_bytes = static_bytes;
    w.statics = static_bytes ? fibres::shared<unsigned char>(-1, static_bytes) : nullptr;
    const auto make_room = [](std::vector<Piece>& pieces, size_t num_bytes) {
        pieces.resize(std::max(pieces.size(), (num_bytes + PIECE_BYTES - 1) / PIECE_BYTES));
    };
    make_room(w.of_statics, static_bytes);
    make_room(w.of_dynamic, fibres::block->dynamic.size());
    w.first_generation = w.generation + 1;
    w.warp_generations.assign(fibres::block->warps.size(), 0);
    w.has_barriers = false;
}

inline bool are_ordered(const Touch& earlier, const Touch& now) {
    if (earlier.thread == 0xffff || earlier.thread == now.thread || earlier.of_block != now.of_block) return true;
    return earlier.thread / 32 == now.thread / 32 && earlier.of_warp != now.of_warp;
}

[[noreturn]] inline void fail_race(u32 address, const Touch& earlier, const char* what, const Touch& now, const char* now_what) {
    fibres::fail("a race in shared memory at %u: thread %u %s it at line %d of the PTX, thread %u %s it at line %d", address,
                 earlier.thread, what, earlier.line, now.thread, now_what, now.line);
}

enum class Access { Read, Write, Atomic, Landing /* of a copy, which was counted when it began */ };

// Bytes of shared memory as the host has them, after all that can be wrong with touching them.
inline unsigned char* shared_bytes(u32 address, u32 size, Access access, int line) {
    Watch& w = watch();
    const bool is_static = address >= STATIC;
    const u32 offset = address - (is_static ? STATIC : DYNAMIC);
    const size_t total = is_static ? w.static_bytes : fibres::block->dynamic.size();
    if (address % size) fibres::fail("line %d of the PTX: %u bytes of shared memory at %u are not aligned", line, size, address);
    if ((!is_static && address < DYNAMIC) || size_t(offset) + size > total)
        fibres::fail("line %d of the PTX: %u bytes at %u, shared memory has %zu", line, size, offset, total);
    const u32 current = fibres::block->current;
    if (counts::are_wanted() && access != Access::Landing) counts::note(w.kernel, line, true, address, size);
    w.generation = w.first_generation + fibres::block->generation;
    const Touch now{u16(current), w.warp_generations[current / 32], u32(w.generation), line};
    Piece* pieces = (is_static ? w.of_statics : w.of_dynamic).data() + offset / PIECE_BYTES;
    for (u32 i = 0; i < (w.has_barriers ? 0 : size / PIECE_BYTES); ++i) {
        Piece& piece = pieces[i];
        const char* what = access == Access::Read ? "reads" : "writes";
        // Atomic operations and each other are no race; what counts them as writes is their line.
        const bool is_atomic_after_atomic = access == Access::Atomic && piece.write.line < 0;
        if (!is_atomic_after_atomic && !are_ordered(piece.write, now)) fail_race(address, piece.write, "wrote", now, what);
        if (access == Access::Read) {
            if (piece.reads[0].thread != now.thread) piece.reads[1] = piece.reads[0];
            piece.reads[0] = now;
            continue;
        }
        for (const Touch& read : piece.reads)
            if (!are_ordered(read, now)) fail_race(address, read, "read", now, what);
        piece.write = now;
        if (access == Access::Atomic) piece.write.line = -line;
    }
    return is_static ? w.statics + offset : fibres::block->dynamic.data() + offset;
}

// Blocks of global memory that launches have stored to, and those that they have read ahead of `begin_launch`, when others
// may still store: none is both. Known only where no address is given twice.
inline bool are_addresses_unique = false;
struct Blocks {
    static constexpr u64 BYTES = 256; // memory is given in multiples of it
    std::unordered_set<u64> all;
    u64 last = ~0ull;

    bool has(u64 block) const { return block == last || all.count(block) != 0; }
    void add(u64 block) {
        if (block != last) all.insert(last = block);
    }
};
struct Launches { Blocks stored, read_early; };
inline Launches& launches() {
    static auto& one = *new Launches;
    return one;
}

inline unsigned char* global_bytes(u64 address, u32 size, Access access, int line) {
    if (are_addresses_unique) {
        const u64 block = address / Blocks::BYTES;
        Launches& l = launches();
        const bool is_early = !fibres::self().has_begun, is_read = access == Access::Read;
        if (is_early && (!is_read || l.stored.has(block)))
            fibres::fail("line %d of the PTX: %s touches, before begin_launch, memory that launches write", line, watch().kernel);
        if (!is_read && l.read_early.has(block))
            fibres::fail("line %d of the PTX: %s writes what launches read before begin_launch", line, watch().kernel);
        if (!is_read) l.stored.add(block);
        if (is_early) l.read_early.add(block);
    }
    if (address % size) fibres::fail("line %d of the PTX: %u bytes at an address that is not aligned", line, size);
    if (counts::are_wanted()) counts::note(watch().kernel, line, false, address, size);
    return reinterpret_cast<unsigned char*>(address);
}

template <typename T, u32 N>
Values<T, N> loaded(const unsigned char* at) {
    Values<T, N> values;
    std::memcpy(&values, at, sizeof values);
    return values;
}

template <typename T>
void static_assert_piece() {
    static_assert(sizeof(T) >= PIECE_BYTES, "pieces of shared memory that are watched are too long");
}

#define LOADS_OF(space, bytes)                                                                                         \
    template <typename T, u32 N>                                                                                       \
    Values<T, N> ld_##space(u64 address, int line) {                                                                   \
        return loaded<T, N>(bytes);                                                                                    \
    }
LOADS_OF(global, global_bytes(address, sizeof(T) * N, Access::Read, line))
LOADS_OF(generic, global_bytes(address, sizeof(T) * N, Access::Read, line))
LOADS_OF(param, reinterpret_cast<const unsigned char*>(address))
LOADS_OF(const, reinterpret_cast<const unsigned char*>(address))
LOADS_OF(shared, (static_assert_piece<T>(), shared_bytes(u32(address), sizeof(T) * N, Access::Read, line)))
#undef LOADS_OF

template <typename T, u32 N>
void st_global(u64 address, const Values<T, N>& values, int line) {
    std::memcpy(global_bytes(address, sizeof values, Access::Write, line), &values, sizeof values);
}
template <typename T, u32 N>
void st_shared(u64 address, const Values<T, N>& values, int line) {
    static_assert_piece<T>();
    std::memcpy(shared_bytes(u32(address), sizeof values, Access::Write, line), &values, sizeof values);
}

inline u32 atom_shared_add(u64 address, u32 x, int line) {
    unsigned char* at = shared_bytes(u32(address), 4, Access::Atomic, line);
    const u32 old = loaded<u32, 1>(at).of[0], sum = old + x;
    std::memcpy(at, &sum, 4);
    return old;
}

inline u64 from_generic_global(u64 address) { return address; }
inline u64 to_generic_param(u64 address) { return address; }

inline void block_barrier(int line) { fibres::block_barrier(line); }
inline void warp_barrier(u32 mask, int line) {
    fibres::need_full(mask, "bar.warp.sync");
    const u32 warp = fibres::block->current / 32;
    // The last lane that comes passes it first: the others are counted by then.
    if (fibres::warp().arrived == 31) ++watch().warp_generations[warp];
    fibres::exchange("bar.warp.sync", line, {});
}

inline u32 shuffled(const char* what, u32 mask, u32 x, u32 from, int line) { return fibres::shuffle(what, line, mask, x, from); }
// `clamp` has the last lane that may be read in its low 5 bits, and above them which bits of a lane name its segment.
#define SHUFFLE(name, from_expression, is_inside)                                                                      \
    inline u32 shfl_##name(u32 x, u32 b, u32 clamp, u32 mask, bool& was_in_range, int line) {                          \
        const u32 lane = fibres::lane(), segment = clamp >> 8 & 31, limit = (lane & segment) | (clamp & 31 & ~segment); \
        const u32 low = lane & segment, from = from_expression;                                                        \
        (void)low;                                                                                                     \
        was_in_range = is_inside;                                                                                      \
        return shuffled("shfl." #name, mask, x, was_in_range ? from : lane, line);                                     \
    }
SHUFFLE(bfly, lane ^ b, from <= limit)
SHUFFLE(up, lane - b, int(from) >= int(limit))
SHUFFLE(down, lane + b, from <= limit)
SHUFFLE(idx, low | (b & 31 & ~segment), from <= limit)
#undef SHUFFLE

inline u32 ballot(bool vote, u32 mask, int line) { return __ballot_sync(mask, vote, line); }

inline void mma_bf16(u32 (&c)[4], const u32* a, u32 b0, u32 b1, int line) {
    float sums[4] = {f32(c[0]), f32(c[1]), f32(c[2]), f32(c[3])};
    ::mma_bf16(sums, a, b0, b1, line);
    for (u32 i = 0; i < 4; ++i) c[i] = bits(sums[i]);
}
inline void mma_s8(u32 (&c)[4], const u32* a, u32 b0, u32 b1, int line) {
    int sums[4] = {int(c[0]), int(c[1]), int(c[2]), int(c[3])};
    ::mma_s8(sums, a, b0, b1, line);
    for (u32 i = 0; i < 4; ++i) c[i] = u32(sums[i]);
}
template <bool TRANSPOSED>
void ldmatrix(u32 (&to)[4], u64 address, int line) {
    ldmatrix_x4<TRANSPOSED>(to, shared_bytes(u32(address), 16, Access::Read, line), line);
}

// Written from now until it is waited for.
inline void copy_async(u64 to, u64 from, u32 num_bytes, int line) {
    if (num_bytes != 0 && num_bytes != 16) fibres::fail("line %d of the PTX: a copy of %u of 16 bytes", line, num_bytes);
    const void* bytes = num_bytes ? global_bytes(from, 16, Access::Read, line) : reinterpret_cast<const void*>(from);
    copy_async_16(shared_bytes(u32(to), 16, Access::Write, line), bytes, num_bytes == 16);
}
template <int NUM_OPEN>
void copy_wait(int line) {
    const auto& groups = fibres::self().copy_groups;
    for (size_t i = 0; i + NUM_OPEN + 1 < groups.size(); ++i)
        for (const fibres::Copy& copy : groups[i]) {
            const auto offset = static_cast<unsigned char*>(copy.to) - fibres::block->dynamic.data();
            const bool is_dynamic = offset >= 0 && size_t(offset) < fibres::block->dynamic.size();
            const u32 address = is_dynamic ? DYNAMIC + u32(offset) : STATIC + u32(static_cast<unsigned char*>(copy.to) - watch().statics);
            shared_bytes(address, 16, Access::Landing, line);
        }
    ::copy_wait<NUM_OPEN>();
}

inline unsigned char* dynamic(u64 address) {
    if (u32(address) < DYNAMIC || u32(address) - DYNAMIC > fibres::block->dynamic.size())
        fibres::fail("address %u is not of dynamic shared memory", u32(address));
    return fibres::block->dynamic.data() + (u32(address) - DYNAMIC);
}
inline void barrier_init(u64 at, u32 count) {
    if (at % 8) fibres::fail("a barrier at %u: barriers are at multiples of 8", u32(at));
    watch().has_barriers = true;
    fibres::barrier_init(dynamic(at), count);
}
inline void barrier_arrive(u64 at) { fibres::hopper().arrive(dynamic(at)); }
inline void barrier_expect(u64 at, u32 num_bytes) { fibres::barrier_expect(dynamic(at), num_bytes); }
// The device may come back before the phase is over, and is asked again then.
inline bool barrier_wait(u64 at, u32 parity, int line) {
    fibres::barrier_wait(dynamic(at), parity, line);
    return true;
}
inline void copy_box(u64 to, u64 tensor_map, const unsigned (&at)[4], u64 barrier) {
    fibres::copy_box(dynamic(to), reinterpret_cast<const void*>(tensor_map), at, dynamic(barrier));
}
inline void fence_async() { fibres::fence_proxy_async(); }

// Values alone.
#define OF_TWO(name, type, expression) inline type name(type a, type b) { return type(expression); }
#define OF_ONE(name, to, from, expression) inline to name(from a) { return to(expression); }
#define INTEGERS(n)                                                                                                    \
    OF_TWO(add_s##n, u##n, a + b) OF_TWO(add_u##n, u##n, a + b) OF_TWO(sub_s##n, u##n, a - b)                          \
    OF_TWO(mul_lo_s##n, u##n, a * b) OF_TWO(mul_lo_u##n, u##n, a * b)                                                  \
    OF_TWO(div_u##n, u##n, a / b) OF_TWO(rem_u##n, u##n, a % b)                                                        \
    OF_TWO(min_u##n, u##n, a < b ? a : b) OF_TWO(max_u##n, u##n, a < b ? b : a)                                        \
    OF_TWO(min_s##n, u##n, s##n(a) < s##n(b) ? a : b) OF_TWO(max_s##n, u##n, s##n(a) < s##n(b) ? b : a)                \
    OF_TWO(and_b##n, u##n, a & b) OF_TWO(or_b##n, u##n, a | b) OF_TWO(xor_b##n, u##n, a ^ b)                           \
    OF_ONE(not_b##n, u##n, u##n, ~a) OF_ONE(neg_s##n, u##n, u##n, 0 - a)                                               \
    inline u##n shl_b##n(u##n a, u32 by) { return by < n ? u##n(a << by) : u##n(0); }                                  \
    inline u##n shr_u##n(u##n a, u32 by) { return by < n ? u##n(a >> by) : u##n(0); }                                  \
    inline u##n shr_s##n(u##n a, u32 by) { return u##n(s##n(a) >> (by < n ? by : n - 1)); }                            \
    inline u##n mad_lo_s##n(u##n a, u##n b, u##n c) { return u##n(a * b + c); }                                        \
    inline u##n mad_lo_u##n(u##n a, u##n b, u##n c) { return u##n(a * b + c); }                                        \
    inline u##n selp_b##n(u##n a, u##n b, bool is_a) { return is_a ? a : b; }                                          \
    inline u##n selp_u##n(u##n a, u##n b, bool is_a) { return is_a ? a : b; }                                          \
    inline u##n selp_s##n(u##n a, u##n b, bool is_a) { return is_a ? a : b; }
typedef short s16;
typedef int s32;
typedef long long s64;
typedef signed char s8;
INTEGERS(16)
INTEGERS(32)
INTEGERS(64)
#undef INTEGERS
#define COMPARISONS(type, number)                                                                                      \
    inline bool setp_eq_##type(u64 a, u64 b) { return number(a) == number(b); }                                        \
    inline bool setp_ne_##type(u64 a, u64 b) { return number(a) != number(b); }                                        \
    inline bool setp_lt_##type(u64 a, u64 b) { return number(a) < number(b); }                                         \
    inline bool setp_le_##type(u64 a, u64 b) { return number(a) <= number(b); }                                        \
    inline bool setp_gt_##type(u64 a, u64 b) { return number(a) > number(b); }                                         \
    inline bool setp_ge_##type(u64 a, u64 b) { return number(a) >= number(b); }
COMPARISONS(s16, s16) COMPARISONS(u16, u16) COMPARISONS(b16, u16)
COMPARISONS(s32, s32) COMPARISONS(u32, u32) COMPARISONS(b32, u32)
COMPARISONS(s64, s64) COMPARISONS(u64, u64) COMPARISONS(b64, u64)
#undef COMPARISONS
// False where one is no number; those that end in u are true then.
#define FLOATS(n, type)                                                                                                \
    inline bool setp_eq_f##n(u##n a, u##n b) { return f##n(a) == f##n(b); }                                            \
    inline bool setp_ne_f##n(u##n a, u##n b) { return f##n(a) < f##n(b) || f##n(a) > f##n(b); }                        \
    inline bool setp_lt_f##n(u##n a, u##n b) { return f##n(a) < f##n(b); }                                             \
    inline bool setp_le_f##n(u##n a, u##n b) { return f##n(a) <= f##n(b); }                                            \
    inline bool setp_gt_f##n(u##n a, u##n b) { return f##n(a) > f##n(b); }                                             \
    inline bool setp_ge_f##n(u##n a, u##n b) { return f##n(a) >= f##n(b); }                                            \
    inline bool setp_equ_f##n(u##n a, u##n b) { return !setp_ne_f##n(a, b); }                                          \
    inline bool setp_neu_f##n(u##n a, u##n b) { return !(f##n(a) == f##n(b)); }                                        \
    inline bool setp_ltu_f##n(u##n a, u##n b) { return !(f##n(a) >= f##n(b)); }                                        \
    inline bool setp_leu_f##n(u##n a, u##n b) { return !(f##n(a) > f##n(b)); }                                         \
    inline bool setp_gtu_f##n(u##n a, u##n b) { return !(f##n(a) <= f##n(b)); }                                        \
    inline bool setp_geu_f##n(u##n a, u##n b) { return !(f##n(a) < f##n(b)); }                                         \
    inline bool setp_nan_f##n(u##n a, u##n b) { return std::isnan(f##n(a)) || std::isnan(f##n(b)); }                   \
    inline bool setp_num_f##n(u##n a, u##n b) { return !setp_nan_f##n(a, b); }                                         \
    OF_TWO(add_rn_f##n, u##n, bits(f##n(a) + f##n(b))) OF_TWO(sub_rn_f##n, u##n, bits(f##n(a) - f##n(b)))              \
    OF_TWO(mul_rn_f##n, u##n, bits(f##n(a) * f##n(b))) OF_TWO(div_rn_f##n, u##n, bits(f##n(a) / f##n(b)))              \
    OF_TWO(min_f##n, u##n, bits(type(std::fmin(f##n(a), f##n(b))))) OF_TWO(max_f##n, u##n, bits(type(std::fmax(f##n(a), f##n(b))))) \
    OF_ONE(rcp_rn_f##n, u##n, u##n, bits(type(1) / f##n(a))) OF_ONE(sqrt_rn_f##n, u##n, u##n, bits(type(std::sqrt(f##n(a))))) \
    OF_ONE(abs_f##n, u##n, u##n, a & ~(u##n(1) << (n - 1))) OF_ONE(neg_f##n, u##n, u##n, a ^ u##n(1) << (n - 1))       \
    inline u##n fma_rn_f##n(u##n a, u##n b, u##n c) { return bits(type(std::fma(f##n(a), f##n(b), f##n(c)))); }        \
    inline u##n selp_f##n(u##n a, u##n b, bool is_a) { return is_a ? a : b; }
FLOATS(32, float)
FLOATS(64, double)
#undef FLOATS

inline bool and_pred(bool a, bool b) { return a && b; }
inline bool or_pred(bool a, bool b) { return a || b; }
inline bool xor_pred(bool a, bool b) { return a != b; }
inline bool not_pred(bool a) { return !a; }

inline u32 mul_wide_u16(u64 a, u64 b) { return u32(u16(a)) * u16(b); }
inline u64 mul_wide_u32(u64 a, u64 b) { return u64(u32(a)) * u32(b); }
inline u64 mul_wide_s32(u64 a, u64 b) { return u64(s64(s32(a)) * s32(b)); }
OF_TWO(mul_hi_u32, u32, u64(a) * b >> 32)
OF_TWO(mul_hi_u64, u64, (unsigned __int128)(a) * b >> 64)
OF_ONE(popc_b32, u32, u32, __builtin_popcount(a))
inline u32 brev_b32(u32 a) {
    u32 reversed = 0;
    for (u32 i = 0; i < 32; ++i) reversed |= (a >> i & 1) << (31 - i);
    return reversed;
}
OF_ONE(bfind_shiftamt_u32, u32, u32, a ? __builtin_clz(a) : 0xffffffffu)
// The low `count` bits of a, in the place of those of b from `first` on.
template <typename T>
T inserted(T a, T b, u32 first, u32 count) {
    first &= 255, count &= 255;
    const u32 width = 8 * sizeof(T);
    for (u32 i = 0; i < count && first + i < width; ++i) {
        const T bit = T(1) << (first + i);
        b = (b & ~bit) | (i < width && (a >> i & 1) ? bit : T(0));
    }
    return b;
}
inline u32 bfi_b32(u32 a, u32 b, u32 first, u32 count) { return inserted(a, b, first, count); }
inline u64 bfi_b64(u64 a, u64 b, u32 first, u32 count) { return inserted(a, b, first, count); }
inline u32 prmt_b32(u32 a, u32 b, u32 selector) {
    const u64 both = a | u64(b) << 32;
    u32 result = 0;
    for (u32 i = 0; i < 4; ++i) {
        const u32 which = selector >> (4 * i) & 15;
        const u32 byte = u32(both >> (which % 8 * 8)) & 0xff;
        result |= (which & 8 ? (byte & 0x80 ? 0xffu : 0u) : byte) << (8 * i);
    }
    return result;
}

OF_ONE(cvt_u16_u32, u16, u32, a)
OF_ONE(cvt_u32_u16, u32, u16, a)
OF_ONE(cvt_u32_u64, u32, u64, a)
OF_ONE(cvt_u64_u32, u64, u32, a)
OF_ONE(cvt_s64_s32, u64, u32, s64(s32(a)))
OF_ONE(cvt_s32_s8, u32, u64, s32(s8(a)))
OF_ONE(cvt_rn_f32_s32, u32, u32, bits(float(s32(a))))
OF_ONE(cvt_rn_f32_u32, u32, u32, bits(float(a)))
OF_ONE(cvt_rn_f32_s16, u32, u16, bits(float(s16(a))))
OF_ONE(cvt_rn_f64_u64, u64, u64, bits(double(a)))
OF_ONE(cvt_f64_f32, u64, u32, bits(double(f32(a))))
OF_ONE(cvt_rn_f32_f64, u32, u64, bits(float(f64(a))))
OF_ONE(cvt_f32_f16, u32, u16, bits(widen_f16(a)))
inline u64 whole(double x) { return !(x >= 0) ? 0 : (x >= 18446744073709551616.0 ? ~0ull : u64(x)); }
OF_ONE(cvt_rzi_u64_f32, u64, u32, whole(f32(a)))
OF_ONE(cvt_rzi_u64_f64, u64, u64, whole(f64(a)))
OF_TWO(cvt_rn_bf16x2_f32, u32, pack_bf16(f32(b), f32(a)))
OF_ONE(ex2_approx_ftz_f32, u32, u32, bits(fast_exp2(f32(a))))
// The upper half of what 1 / a is.
OF_ONE(rcp_approx_ftz_f64, u64, u64, bits(1 / f64(a)) & 0xffffffff00000000ull)
#undef OF_ONE
#undef OF_TWO

using Run = void (*)(const unsigned char* const* parameters);

} // namespace ptx

// Each file of kernels ends with one of these for each. Who launches them in another way than tests has one of its own.
#ifndef COMPILED_KERNEL
#define COMPILED_KERNEL(name)                                                                                          \
    static const ptx::Registered of_##name(reinterpret_cast<const void*>(&name), run_##name);

namespace ptx {

// Kernels by their sources.
inline std::map<const void*, Run>& all() {
    static std::map<const void*, Run> of_sources;
    return of_sources;
}
struct Registered {
    Registered(const void* source, Run run) { all()[source] = run; }
};

// What LAUNCH of the harness does where the compiled kernel is to be tested instead of its source.
template <typename... P, typename... A>
void launch(fibres::Order order, dim3 grid, dim3 threads, size_t num_dynamic, void (*source)(P...), A&&... args) {
    const auto found = all().find(reinterpret_cast<const void*>(source));
    if (found == all().end()) fibres::fail("a kernel is launched that was not compiled");
    const std::tuple<P...> values(std::forward<A>(args)...);
    const auto run = [&](const auto&... value) {
        const unsigned char* parameters[] = {reinterpret_cast<const unsigned char*>(&value)...};
        fibres::launch(order, grid, threads, num_dynamic, [&] { found->second(parameters); });
    };
    std::apply(run, values);
}

} // namespace ptx
#endif
