// What products of few rows end with: 8 warps have summed other chunks of k for the same tile of 16 rows and 16 columns.
#pragma once

#include "tensor_core.cuh"

template <typename T>
struct alignas(8) SumPair { T of[2]; };

// Where the element 16 * row + column of a tile is: eights of columns of two rows in an order that depends on the rows, so
// that neither those who write nor those who read meet in a bank.
__device__ __forceinline__ u32 place_in_tile(u32 element) { return element ^ (element >> 5 & 3) << 3; }

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

// Likewise of the other way round: of 16 columns times two times 8 rows.
__device__ __forceinline__ void put_sums_of_columns(float* partial, const float (&acc)[2][4]) {
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (u32 i = 0; i < 8; ++i)
        partial[warp * 256 + place_in_tile((i / 4 * 8 + 2 * t + i % 2) * 16 + i % 4 / 2 * 8 + g)] = acc[i / 4][i % 4];
    if (MUTATE(51, true, false)) __syncthreads();
}

// Adds 16 columns of weights times 8 rows of activations: those of rows g and g + 8 as operand, 8 of k of each.
__device__ __forceinline__ void multiply_columns(float* acc, const uint4 (&columns)[2], const uint4& row) {
    const u32 low[4] = {columns[0].x, columns[1].x, columns[0].y, columns[1].y};
    const u32 high[4] = {columns[0].z, columns[1].z, columns[0].w, columns[1].w};
    mma_bf16(acc, low, row.x, row.y);
    mma_bf16(acc, high, row.z, row.w);
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
