// What products of few rows end with: 8 warps have summed other chunks of k for the same tile of 16 rows and 16 columns.
#pragma once

#include "tensor_core.cuh"

template <typename T>
struct alignas(8) SumPair { T of[2]; };

// Where the element 16 * row + column of a tile is: every other two rows have their halves the other way round, so that
// neither those who write nor those who read meet in a bank.
__device__ __forceinline__ u32 place_in_tile(u32 element) { return element ^ (element >> 5 & 1) << 3; }

// Each warp's sums, as `mma` leaves them for two times 8 columns, to `partial` [8][16 rows][16 columns]; all are there then.
template <typename T>
__device__ __forceinline__ void put_sums(T* partial, const T (&acc)[2][4]) {
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (u32 i = 0; i < 4; ++i) {
        const u32 place = place_in_tile((g + i % 2 * 8) * 16 + i / 2 * 8 + 2 * t);
        const T* sums = &acc[i / 2][i % 2 * 2];
        *reinterpret_cast<SumPair<T>*>(partial + warp * 256 + place) = {{sums[0], sums[1]}};
    }
    if (MUTATE(51, true, false)) __syncthreads();
}

// Over the warps, in ascending order, of the element 16 * row + column of the tile.
template <typename T>
__device__ __forceinline__ T sum_of(const T* partial, u32 element) {
    const u32 place = place_in_tile(element);
    T sum = partial[place];
#pragma unroll
    for (u32 i = 1; i < 8; ++i) sum += partial[i * 256 + place];
    return sum;
}

// The tile with bias (f32 [n] or null), added to what is there if said, to f32 rows of `width`, of which these are n columns.
__device__ __forceinline__ void put_tile(const float* partial, const float* bias, float* out, u32 m, u32 n, u32 width,
                                         u32 add) {
    const u32 row = blockIdx.y * 16 + threadIdx.x / 16, column = blockIdx.x * 16 + threadIdx.x % 16;
    if (row >= m || column >= n) return;
    float sum = sum_of(partial, threadIdx.x);
    if (bias) sum += bias[column];
    float* to = out + u64(row) * width + column;
    *to = add ? *to + sum : sum;
}
