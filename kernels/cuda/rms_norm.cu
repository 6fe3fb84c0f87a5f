// Root-mean-square normalisation of rows, after adding to the residual stream where there is something to add.
//
//   x[row] = x[row] + delta[row]                          only if delta is not null; x is written back
//   out[row] = x[row] * (1 / sqrt(mean(x[row]^2) + eps)) * weight
//
// x, delta f32 [rows, width]; weight f32 [width]; out f32 or bf16 [rows, width], which is how the product that
// follows wants its operand. Order: thread t of 256 folds x[t + 256 j]^2 over j, a warp's lanes are summed
// as `warp_sum` says, then the 8 warps in ascending order.
//
// Grid (rows), 256 threads.
#include "numerics.cuh"

template <typename T>
__device__ void rms_norm(float* __restrict__ x, const float* __restrict__ delta, const float* __restrict__ weight,
                         float eps, T* __restrict__ out, u32 width) {
    SHARED_ARRAY(float, sums, 8);
    float* row = x + u64(blockIdx.x) * width;
    float sum = 0.0f;
    for (u32 i = threadIdx.x; i < width; i += 256) {
        float value = row[i];
        if (delta) {
            value = MUTATE(1, value + delta[u64(blockIdx.x) * width + i], value);
            row[i] = value;
        }
        sum = fmaf(value, value, sum);
    }
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
    if (MUTATE(2, true, false)) __syncthreads();
    float total = sums[0];
    for (u32 w = 1; w < 8; ++w) total += sums[w];
    const float scale = 1.0f / sqrtf(total / float(width) + MUTATE(3, eps, 0.0f));
    T* to = out + u64(blockIdx.x) * width;
    for (u32 i = threadIdx.x; i < width; i += 256) store(to + i, row[i] * scale * weight[i]);
}

extern "C" __global__ void __launch_bounds__(256)
rms_norm_f32(float* x, const float* delta, const float* weight, float eps, float* out, u32 width) {
    rms_norm(x, delta, weight, eps, out, width);
}

extern "C" __global__ void __launch_bounds__(256)
rms_norm_bf16(float* x, const float* delta, const float* weight, float eps, bf16* out, u32 width) {
    rms_norm(x, delta, weight, eps, out, width);
}
