// Between the fused q, k, v product and attention: norms of heads, rotation, new keys and values into the pool.
//
//   qkv      f32 [rows, q heads | k heads | v heads, head_dim]
//   q_out    [rows, q heads, head_dim], rotated, in the type of the pool
//   pool     see kv_layout.cuh; row r's k (rotated) and v go to slots[r] of the layer
//
// Where q_norm and k_norm are given (f32 [head_dim]), every head of q and of k is first divided by its root
// mean square and multiplied by them; order: lane l folds the squares of x[4 (l + 32 j)] and its three neighbours
// over j, then `warp_sum`.
// Rotation by the row's angles, cosines and sines f32 [positions, rot_dim / 2]; feature i < rot_dim / 2 turns
// with i + rot_dim / 2, features from rot_dim on stay:
//   (a, b) -> (fma(a, cos, -(b * sin)), fma(b, cos, a * sin))
//
// head_dim even, at most 256. Slots of one call are distinct and inside the pool; where slots[r] is NOTHING, row r's
// k and v go nowhere.
// Grid (rows, ceil(heads / 4)) with heads = q + 2 kv, 128 threads: a warp per head.
#include "kv_layout.cuh"
#include "numerics.cuh"

struct RopeWrite {
    KvShape kv;
    u32 layer;
    u32 num_q_heads;
    u32 rot_dim;
    float eps;
};

template <typename T>
__device__ void rope_kv_write(const RopeWrite& job, const float* qkv, const float* q_norm,
                              const float* k_norm, const float* cosines,
                              const float* sines, const u32* positions,
                              const u32* slots, T* q_out, T* pool) {
    SHARED_ARRAY(float, staged, 4 * 256);
    begin_launch();
    const u32 row = blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const u32 q_heads = job.num_q_heads, kv_heads = job.kv.num_kv_heads, dim = job.kv.head_dim;
    const u32 head = blockIdx.y * 4 + warp;
    if (head >= q_heads + 2 * kv_heads) return; // a whole warp; there is no barrier of the block
    const bool is_q = head < q_heads, is_v = head >= q_heads + kv_heads;
    if (!is_q && slots[row] == MUTATE(4, NOTHING, 0u)) return; // a whole warp
    const float* from = qkv + (u64(row) * (q_heads + 2 * kv_heads) + head) * dim;
    float* x = staged + warp * 256;
    const float* norm = is_v ? nullptr : (is_q ? q_norm : k_norm);
    float sum = 0.0f;
    for (u32 first = 4 * lane; first < dim; first += 128) {
        const Four four = load_four(from, dim, first);
        store_four(x, dim, first, four);
#pragma unroll
        for (u32 i = 0; i < 4; ++i) sum = fmaf(four.of[i], four.of[i], sum);
    }
    if (norm) {
        const float scale = 1.0f / sqrtf(warp_sum(sum) / float(dim) + job.eps);
        for (u32 first = 4 * lane; first < dim; first += 128) {
            Four four = load_four(x, dim, first);
            const Four factor = load_four(norm, dim, first);
#pragma unroll
            for (u32 i = 0; i < 4; ++i) four.of[i] = four.of[i] * scale * MUTATE(1, factor.of[i], 1.0f);
            store_four(x, dim, first, four);
        }
    }
    // Every lane now reads what others wrote.
    if (MUTATE(2, true, false)) __syncwarp();
    T* to;
    if (is_q) {
        to = q_out + (u64(row) * q_heads + head) * dim;
    } else {
        const u32 kv_head = is_v ? head - q_heads - kv_heads : head - q_heads;
        to = pool + k_index(job.kv, job.layer, slots[row], kv_head) + (is_v ? v_distance(job.kv) : 0);
    }
    const u32 half = job.rot_dim / 2;
    const u64 angles = u64(positions[row]) * half;
    for (u32 first = 4 * lane; first < dim; first += 128) {
        Four four = load_four(x, dim, first);
#pragma unroll
        for (u32 k = 0; k < 4; ++k) {
            const u32 i = first + k;
            if (!is_v && i < half) {
                four.of[k] = fmaf(four.of[k], cosines[angles + i], -(x[i + half] * sines[angles + i]));
            } else if (!is_v && i < 2 * half) {
                const u32 j = i - half;
                four.of[k] = fmaf(four.of[k], cosines[angles + j], MUTATE(3, x[j], -x[j]) * sines[angles + j]);
            }
        }
        store_four(to, dim, first, four);
    }
}

extern "C" __global__ void __launch_bounds__(128, 8)
rope_kv_write_f32(RopeWrite job, const float* qkv, const float* q_norm, const float* k_norm, const float* cosines,
                  const float* sines, const u32* positions, const u32* slots, float* q_out, float* pool) {
    rope_kv_write(job, qkv, q_norm, k_norm, cosines, sines, positions, slots, q_out, pool);
}

extern "C" __global__ void __launch_bounds__(128, 8)
rope_kv_write_bf16(RopeWrite job, const float* qkv, const float* q_norm, const float* k_norm, const float* cosines,
                   const float* sines, const u32* positions, const u32* slots, bf16* q_out, bf16* pool) {
    rope_kv_write(job, qkv, q_norm, k_norm, cosines, sines, positions, slots, q_out, pool);
}
