// The gate of a feed-forward layer.
//
//   out[row, i] = silu(gate_up[row, i]) * gate_up[row, ffn + i]        silu(g) = g / (1 + exp(-g))
//
// gate_up f32 [rows, 2 * ffn]; out f32 or bf16 [rows, ffn]. Every value on its own: no order.
//
// Grid (rows, ceil(ffn / 1024)), 256 threads, 4 values each. Along y there are at most 65,535 blocks.
#include "numerics.cuh"

template <typename T>
__device__ void silu_mul(const float* __restrict__ gate_up, T* __restrict__ out, u32 ffn) {
    const float* gate = gate_up + u64(blockIdx.x) * 2 * ffn;
    const float* up = gate + MUTATE(1, ffn, 0u);
    T* to = out + u64(blockIdx.x) * ffn;
    const u32 end = min(ffn, (blockIdx.y + 1) * 1024);
    for (u32 i = blockIdx.y * 1024 + threadIdx.x; i < end; i += 256) {
        const float g = gate[i];
        store(to + i, g / (1.0f + own_exp(MUTATE(2, -g, g))) * up[i]);
    }
}

extern "C" __global__ void __launch_bounds__(256) silu_mul_f32(const float* gate_up, float* out, u32 ffn) {
    silu_mul(gate_up, out, ffn);
}

extern "C" __global__ void __launch_bounds__(256) silu_mul_bf16(const float* gate_up, bf16* out, u32 ffn) {
    silu_mul(gate_up, out, ffn);
}
