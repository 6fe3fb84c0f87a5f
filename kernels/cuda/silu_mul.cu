// The gate of a feed-forward layer.
//
//   out[row, i] = silu(gate_up[row, i]) * gate_up[row, ffn + i]        silu(g) = g / (1 + exp(-g))
//
// gate_up f32 [rows, 2 * ffn]; out f32 or bf16 [rows, ffn]. Every value on its own: no order.
//
// Grid (rows, ceil(ffn / 1024)), 256 threads, 4 neighbours each. Along y there are at most 65,535 blocks.
#include "numerics.cuh"

template <typename T>
__device__ void silu_mul(const float* gate_up, T* out, u32 ffn) {
    begin_launch();
    const u32 first = blockIdx.y * 1024 + 4 * threadIdx.x;
    if (first >= ffn) return;
    const float* of_row = gate_up + u64(blockIdx.x) * 2 * ffn;
    const Four gate = load_four(of_row, ffn, first), up = load_four(of_row + MUTATE(1, ffn, 0u), ffn, first);
    Four gated;
#pragma unroll
    for (u32 i = 0; i < 4; ++i) gated.of[i] = own_silu(MUTATE(2, gate.of[i], -gate.of[i])) * up.of[i];
    store_four(out + u64(blockIdx.x) * ffn, ffn, first, gated);
}

extern "C" __global__ void __launch_bounds__(256) silu_mul_f32(const float* gate_up, float* out, u32 ffn) {
    silu_mul(gate_up, out, ffn);
}

extern "C" __global__ void __launch_bounds__(256) silu_mul_bf16(const float* gate_up, bf16* out, u32 ffn) {
    silu_mul(gate_up, out, ffn);
}
