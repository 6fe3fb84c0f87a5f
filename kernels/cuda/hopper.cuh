// The instructions of compute capability 9.0 alone (sm_90a), each as one function: barriers in shared memory that count
// arrivals and bytes, bulk copies of a box of a tensor, products of a warpgroup (four warps) from shared memory. On a
// device they are inline PTX; on the host (host/hopper.h) they do what the PTX manual documents, and say what is misused.
//
// Matrices in shared memory are in lines of 64 values of bf16 (128 bytes), each line's 16-byte pieces in the order
// that the 128-byte swizzle gives them: piece c of line l is at place c ^ (l % 8). Bulk copies write it, products
// read it, and neither meets the same banks twice in 8 lines. A matrix of more than 64 values a row is several
// panels, one behind the other. The pattern is one of addresses: panels begin at multiples of 1024 bytes.
//
//   product      d[64][N] += a[64][16] b[16][N]; warp w of the warpgroup has rows 16 w .. + 16 of d, and of a if that is in
//                registers, both as fragments of an `mma` of its 16 rows (tensor_core.cuh)
#pragma once

#include "numerics.cuh"

#ifdef __CUDACC__
#define GRID_CONSTANT __grid_constant__
#else
#define GRID_CONSTANT
#include "host/hopper.h"
#endif

#define LINE_BYTES 128
#define LINE_VALUES 64
#define WARPGROUP 128

// A tensor in global memory and the box of it that a copy brings: made by the driver (cuTensorMapEncodeTiled), opaque.
struct alignas(128) TensorMap { u64 words[16]; };

#ifdef __CUDACC__
__device__ __forceinline__ u32 shared_address(const void* at) { return u32(__cvta_generic_to_shared(at)); }
#else
using fibres::shared_address;
#endif

// A barrier whose phases end with `count` arrivals and the last byte that was announced.
__device__ __forceinline__ void barrier_init(u64* barrier, u32 count) {
#ifdef __CUDACC__
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(shared_address(barrier)), "r"(count) : "memory");
#else
    fibres::barrier_init(barrier, count);
#endif
}

// By the thread that made barriers, before the block's threads meet: copies may use them then.
__device__ __forceinline__ void barriers_are_made() {
#ifdef __CUDACC__
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

__device__ __forceinline__ void barrier_arrive(u64* barrier) {
#ifdef __CUDACC__
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(shared_address(barrier)) : "memory");
#else
    fibres::hopper().arrive(barrier);
#endif
}

// Arrives, and announces bytes that copies will bring in this phase.
__device__ __forceinline__ void barrier_expect(u64* barrier, u32 num_bytes) {
#ifdef __CUDACC__
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
                 :: "r"(shared_address(barrier)), "r"(num_bytes) : "memory");
#else
    fibres::barrier_expect(barrier, num_bytes);
#endif
}

// Waits for the end of the phase of this parity; phases are counted from 0.
__device__ __forceinline__ void barrier_wait(u64* barrier, u32 parity
#ifndef __CUDACC__
                                             , int line = __builtin_LINE()
#endif
) {
#ifdef __CUDACC__
    const u32 address = shared_address(barrier);
    u32 is_over;
    do {
        asm volatile("{\n"
                     ".reg .pred over;\n"
                     "mbarrier.try_wait.parity.shared::cta.b64 over, [%1], %2;\n"
                     "selp.u32 %0, 1, 0, over;\n"
                     "}" : "=r"(is_over) : "r"(address), "r"(parity) : "memory");
    } while (!is_over);
#else
    fibres::barrier_wait(barrier, parity, line);
#endif
}

// What this thread has stored to shared memory is there for copies and products that others start behind a barrier.
__device__ __forceinline__ void fence_proxy_async() {
#ifdef __CUDACC__
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#else
    fibres::fence_proxy_async();
#endif
}

// Starts copying the box of the map's tensor that begins at (x, y, z, w), x innermost; the barrier gets its bytes.
__device__ __forceinline__ void copy_box(void* to, const TensorMap* map, u32 x, u32 y, u32 z, u32 w, u64* barrier) {
#ifdef __CUDACC__
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%2, %3, %4, %5}], [%6];"
                 :: "r"(shared_address(to)), "l"(map), "r"(x), "r"(y), "r"(z), "r"(w), "r"(shared_address(barrier))
                 : "memory");
#else
    fibres::copy_box(to, map, {x, y, z, w}, barrier);
#endif
}

// A warpgroup gives registers of its threads back down to, or takes them up to, so many a thread.
template <u32 COUNT>
__device__ __forceinline__ void registers_down() {
    static_assert(COUNT % 8 == 0 && COUNT >= 24, "a multiple of 8");
#ifdef __CUDACC__
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(COUNT));
#endif
}
template <u32 COUNT>
__device__ __forceinline__ void registers_up() {
    static_assert(COUNT % 8 == 0 && COUNT <= 256, "a multiple of 8");
#ifdef __CUDACC__
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(COUNT));
#endif
}

// A matrix with the 128-byte swizzle: its address; what lies between panels; what lies between 8 lines and the next 8.
__device__ __forceinline__ u64 matrix_descriptor(const void* at, u32 panel_bytes, u32 stride_bytes) {
    const auto field = [](u32 bytes) { return u64((bytes & 0x3ffff) >> 4); };
    return field(shared_address(at)) | field(panel_bytes) << 16 | field(stride_bytes) << 32 | u64(1) << 62;
}

// Whatever was done to these registers is done before the fence that follows: the compiler moves it no further.
template <u32 PAIRS>
__device__ __forceinline__ void hold(float (&d)[PAIRS][2][4]) {
#ifdef __CUDACC__
#pragma unroll
    for (u32 i = 0; i < PAIRS * 8; ++i) asm volatile("" : "+f"(d[i / 8][i / 4 % 2][i % 4])::"memory");
#endif
}
__device__ __forceinline__ void hold(u32 (&a)[4][4]) {
#ifdef __CUDACC__
#pragma unroll
    for (u32 i = 0; i < 16; ++i) asm volatile("" : "+r"(a[i / 4][i % 4])::"memory");
#endif
}

// Before products, behind whatever touched the registers that they use.
__device__ __forceinline__ void wgmma_fence(
#ifndef __CUDACC__
    int line = __builtin_LINE()
#endif
) {
#ifdef __CUDACC__
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#else
    fibres::wgmma_fence(line);
#endif
}

// Closes a group of products.
__device__ __forceinline__ void wgmma_commit(
#ifndef __CUDACC__
    int line = __builtin_LINE()
#endif
) {
#ifdef __CUDACC__
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#else
    fibres::wgmma_commit(line);
#endif
}

// Waits for all groups but the newest NUM_OPEN: `d`, the result of what is waited for, may be used from here on.
template <u32 NUM_OPEN, u32 PAIRS>
__device__ __forceinline__ void wgmma_wait(float (&d)[PAIRS][2][4]
#ifndef __CUDACC__
                                           , int line = __builtin_LINE()
#endif
) {
#ifdef __CUDACC__
    asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(NUM_OPEN) : "memory");
    hold(d); // nor is any use of `d` moved to before the wait
#else
    (void)d;
    fibres::wgmma_wait(NUM_OPEN, line);
#endif
}

#define D8(pair)                                                                                                       \
    "+f"(d[pair][0][0]), "+f"(d[pair][0][1]), "+f"(d[pair][0][2]), "+f"(d[pair][0][3]), "+f"(d[pair][1][0]),           \
        "+f"(d[pair][1][1]), "+f"(d[pair][1][2]), "+f"(d[pair][1][3])
#define NAMES_32                                                                                                       \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                                           \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NAMES_64                                                                                                       \
    NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                      \
             "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// Rows times rows, 64 of each: both matrices have what is summed over along their lines. Without `adds` d is what comes out.
__device__ __forceinline__ void wgmma_rows(float (&d)[4][2][4], u64 a, u64 b, bool adds
#ifndef __CUDACC__
                                           , int line = __builtin_LINE()
#endif
) {
#ifdef __CUDACC__
    asm volatile("{\n"
                 ".reg .pred adds;\n"
                 "setp.ne.b32 adds, %34, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" NAMES_32 "}, %32, %33, adds, 1, 1, 0, 0;\n"
                 "}" : D8(0), D8(1), D8(2), D8(3) : "l"(a), "l"(b), "r"(u32(adds)));
#else
    fibres::wgmma(d[0][0], 64, nullptr, a, b, false, adds, line);
#endif
}

// Adds rows in registers times a matrix whose lines have what is not summed over: 64 or 128 columns of it.
template <u32 PAIRS>
__device__ __forceinline__ void wgmma_columns(float (&d)[PAIRS][2][4], const u32 (&a)[4], u64 b
#ifndef __CUDACC__
                                              , int line = __builtin_LINE()
#endif
) {
    static_assert(PAIRS == 4 || PAIRS == 8, "64 or 128 columns");
#ifdef __CUDACC__
    if constexpr (PAIRS == 4)
        asm volatile("{\n"
                     ".reg .pred adds;\n"
                     "setp.eq.b32 adds, 0, 0;\n"
                     "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" NAMES_32 "}, "
                     "{%32, %33, %34, %35}, %36, adds, 1, 1, 1;\n"
                     "}" : D8(0), D8(1), D8(2), D8(3) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
    else
        asm volatile("{\n"
                     ".reg .pred adds;\n"
                     "setp.eq.b32 adds, 0, 0;\n"
                     "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" NAMES_64 "}, "
                     "{%64, %65, %66, %67}, %68, adds, 1, 1, 1;\n"
                     "}" : D8(0), D8(1), D8(2), D8(3), D8(4), D8(5), D8(6), D8(7)
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
#else
    fibres::wgmma(d[0][0], PAIRS * 16, a, 0, b, true, true, line);
#endif
}

#undef D8
#undef NAMES_32
#undef NAMES_64
