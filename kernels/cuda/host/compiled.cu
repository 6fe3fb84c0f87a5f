// Kernels for compiled_test.cpp alone: most of them are wrong on purpose.
#include "../hopper.cuh"
#include "../tensor_core.cuh"

// Neighbours of 64 values, with or without a barrier of the block; within a warp, with or without its barrier.
extern "C" __global__ void exchanges_in_a_block(u32* out, u32 has_barrier) {
    SHARED_ARRAY(u32, values, 64);
    begin_launch();
    values[threadIdx.x] = threadIdx.x;
    if (has_barrier) __syncthreads();
    out[threadIdx.x] = values[threadIdx.x ^ 32];
}

extern "C" __global__ void exchanges_in_a_warp(u32* out, u32 has_barrier) {
    SHARED_ARRAY(u32, values, 64);
    begin_launch();
    values[threadIdx.x] = threadIdx.x;
    if (has_barrier) __syncwarp();
    out[threadIdx.x] = values[threadIdx.x ^ 1];
}

// Reads are over before somebody else writes, or not; shuffles order nothing.
extern "C" __global__ void writes_what_others_read(u32* out, u32 has_barrier) {
    SHARED_ARRAY(u32, values, 64);
    begin_launch();
    values[threadIdx.x] = threadIdx.x;
    __syncthreads();
    const u32 value = __shfl_xor_sync(FULL_WARP, values[threadIdx.x ^ 1], 1);
    if (has_barrier) __syncwarp();
    values[threadIdx.x] = value;
    out[threadIdx.x] = values[threadIdx.x];
}

// All threads add to one place, which thread 0 then reads, behind a barrier or not.
extern "C" __global__ void adds_up(u32* out, u32 has_barrier) {
    SHARED_ARRAY(u32, total, 1);
    begin_launch();
    if (threadIdx.x == 0) *total = 0;
    __syncthreads();
    atomicAdd(total, 1u);
    if (has_barrier) __syncthreads();
    if (threadIdx.x == 0) *out = *total;
}

// What a copy brings, before or behind the barrier that makes it everybody's.
extern "C" __global__ void copies(const u32* from, u32* out, u32 has_barrier) {
    SHARED_ARRAY(u32, values, 64 * 4);
    begin_launch();
    copy_async_16(values + threadIdx.x * 4, from + threadIdx.x * 4, true);
    copy_commit();
    copy_wait<0>();
    if (has_barrier) __syncthreads();
    out[threadIdx.x] = values[(threadIdx.x ^ 32) * 4];
}

extern "C" __global__ void reads_at(const unsigned char* memory, u32 offset, u32* out) {
    SHARED_ARRAY(u32, values, 64);
    begin_launch();
    values[threadIdx.x] = threadIdx.x;
    __syncwarp();
    const unsigned char* bytes = reinterpret_cast<const unsigned char*>(values);
    out[threadIdx.x] = memory ? *reinterpret_cast<const u32*>(memory + offset) : *reinterpret_cast<const u32*>(bytes + offset);
}

// d [64][64] = a [64][64] b [64][64]^T, as far as it has come before it was waited for, or behind that.
extern "C" __global__ void multiplies_a_panel(float* out, u32 is_waited_for) {
    DYNAMIC_SHARED(memory);
    begin_launch();
    unsigned char* panel = memory + (1024 - shared_address(memory) % 1024) % 1024;
    for (u32 i = threadIdx.x; i < 64 * LINE_BYTES / 4; i += 128) reinterpret_cast<u32*>(panel)[i] = 0x3f803f80u; // ones
    fence_proxy_async();
    __syncthreads();
    float d[4][2][4];
    wgmma_fence();
    wgmma_rows(d, matrix_descriptor(panel, 0, 8 * LINE_BYTES), matrix_descriptor(panel, 0, 8 * LINE_BYTES), false);
    wgmma_commit();
    float early = d[0][0][0];
#ifdef __CUDACC__
    asm volatile("mov.b32 %0, %1;" : "=f"(early) : "f"(d[0][0][0]) : "memory"); // is moved to behind the wait otherwise
#endif
    wgmma_wait<0>(d);
    out[threadIdx.x] = is_waited_for ? d[0][0][0] : early;
}

// What earlier launches write, ahead of what waits for them or behind it.
extern "C" __global__ void reads_what_launches_write(const u32* from, u32* out, u32 waits_first) {
    u32 value = 0;
    if (!waits_first) value = from[threadIdx.x];
    begin_launch();
    if (waits_first) value = from[threadIdx.x];
    out[threadIdx.x] = value;
}
