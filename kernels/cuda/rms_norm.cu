// Root-mean-square normalisation of rows.
//
//   out[row] = x[row] * (1 / sqrt(mean(x[row]^2) + eps)) * weight
//
// x f32 [rows, width]; weight f32 [width]; out f32 or bf16 [rows, width], which is how the product that follows wants
// its operand. Order: thread t of 256 folds the squares of x[4 (t + 256 j)] and its three neighbours over j, a warp's
// lanes are summed as `warp_sum` says, then the 8 warps in ascending order.
//
// Grid (rows), 256 threads.
#include "numerics.cuh"

template <typename T>
__device__ void rms_norm(const float* x, const float* weight, float eps, T* out,
                         u32 width) {
    SHARED_ARRAY(float, sums, 8);
    begin_launch();
    const float* row = x + u64(blockIdx.x) * width;
    float sum = 0.0f;
    each_four<256>({row}, width, [&](u32, const Four(&x)[1]) {
#pragma unroll
        for (u32 i = 0; i < 4; ++i) sum = fmaf(x[0].of[i], MUTATE(1, x[0].of[i], x[0].of[0]), sum);
    });
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
    if (MUTATE(2, true, false)) __syncthreads();
    float total = sums[0];
    for (u32 w = 1; w < 8; ++w) total += sums[w];
    const float scale = 1.0f / sqrtf(total / float(width) + MUTATE(3, eps, 0.0f));
    each_four<256>({row, weight}, width, [&](u32 first, const Four(&x)[2]) {
        Four normed;
#pragma unroll
        for (u32 i = 0; i < 4; ++i) normed.of[i] = x[0].of[i] * scale * x[1].of[i];
        store_four(out + u64(blockIdx.x) * width, width, first, normed);
    });
}

extern "C" __global__ void __launch_bounds__(256)
rms_norm_f32(const float* x, const float* weight, float eps, float* out, u32 width) {
    rms_norm(x, weight, eps, out, width);
}

extern "C" __global__ void __launch_bounds__(256)
rms_norm_bf16(const float* x, const float* weight, float eps, bf16* out, u32 width) {
    rms_norm(x, weight, eps, out, width);
}
