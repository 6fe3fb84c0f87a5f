// Causal attention of prefill chunks over the paged pool: many rows of many sequences in one launch.
//
//   q, out   bf16 [rows, num_heads, DIM]; out may not be q
//   pool     bf16, see kv_layout.cuh; holds the keys and values of the rows themselves already
//   tiles    [num_tiles], at most 64 consecutive rows of one sequence each
//   sinks    f32 [num_heads], one score per head that takes weight and has no value; null: none
//
// DIM is 64 or 128 (with 256 features a warp's 16 rows do not fit its registers: such rows go through
// attention_decode.cu one by one). Window, softcap, scale: see AttentionJob. The order of operations: see attention.cuh.
// Of the pool and the block table only what some row of the tile sees is read; stored values at positions
// between what the first row and what the last row see must be finite.
//
// Grid (num_tiles, num_heads), 128 threads; dynamic shared memory: PREFILL_SHARED(DIM) bytes.
//
//   warp w has rows 16 w .. + 16; all warps share the K and V tiles, of which the next one is on its way
//   shared memory   q [64] | k, v [64], twice | total of the parts so far, [DIM / 2][128 threads] f32
#include "attention.cuh"

#define PREFILL_SHARED(dim) ((dim) * (64 * 2 + 2 * 2 * 64 * 2 + 64 * 4))

template <u32 DIM>
__device__ void attention_prefill(const AttentionJob& job, const bf16* q, const bf16* pool,
                                  const PrefillTile* tiles, const u32* block_tables,
                                  const float* sinks, bf16* out) {
    DYNAMIC_SHARED(memory);
    constexpr u32 TILE_BYTES = TILE_TOKENS * DIM * 2;
    unsigned char* q_tile = memory;
    unsigned char* kv_tiles = memory + PREFILL_ROWS * DIM * 2;
    float* total = reinterpret_cast<float*>(kv_tiles + 4 * TILE_BYTES) + threadIdx.x;

    begin_launch();
    const PrefillTile tile = tiles[blockIdx.x];
    const u32* block_table = block_tables + tile.block_table;
    const u32 head = blockIdx.y, kv_head = head / (job.num_heads / job.kv.num_kv_heads);
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const u32 first = first_visible(job, tile.first_position), last = tile.first_position + tile.num_rows - 1;
    const u32 first_tile = first / TILE_TOKENS, last_tile = last / TILE_TOKENS;
    // Rows of this lane, and what they see; rows beyond the tile see what its last row sees and are not stored.
    u32 from[2], to[2];
#pragma unroll
    for (u32 i = 0; i < 2; ++i) {
        to[i] = min(tile.first_position + warp * 16 + g + 8 * i, last);
        from[i] = first_visible(job, to[i]);
    }

    for (u32 c = threadIdx.x; c < PREFILL_ROWS * DIM / 8; c += 128) {
        const u32 row = c / (DIM / 8), chunk = c % (DIM / 8);
        const bool is_there = row < tile.num_rows;
        const u64 at = (u64(tile.first_row + (is_there ? row : 0)) * job.num_heads + head) * DIM + chunk * 8;
        copy_async_16(q_tile + chunk_offset<DIM>(row, chunk), q + at, is_there);
    }
    load_tile<DIM>(job, pool, block_table, kv_head, first_tile, first, last, kv_tiles, kv_tiles + TILE_BYTES);
    copy_commit();

    float acc[DIM / 16][2][4], total_max[2] = {LOWEST, LOWEST}, total_sum[2] = {0, 0}, max[2], sum[2];
#pragma unroll
    for (u32 i = 0; i < DIM / 2; ++i) total[i * 128] = 0.0f;

    for (u32 index = first_tile; index <= last_tile; ++index) {
        if (index == first_tile || index % (PART_TOKENS / TILE_TOKENS) == 0) {
            for (u32 i = 0; i < 2; ++i) max[i] = LOWEST, sum[i] = 0.0f;
#pragma unroll
            for (u32 pair = 0; pair < DIM / 16; ++pair)
#pragma unroll
                for (u32 i = 0; i < 8; ++i) acc[pair][i / 4][i % 4] = 0.0f;
        }
        const u32 stage = (index - first_tile) % 2;
        if (index < last_tile) {
            unsigned char* next = kv_tiles + (1 - stage) * 2 * TILE_BYTES;
            load_tile<DIM>(job, pool, block_table, kv_head, index + 1, first, last, next, next + TILE_BYTES);
        }
        copy_commit();
        copy_wait<1>();
        if (MUTATE(11, true, false)) __syncthreads();
        const unsigned char* k_tile = kv_tiles + stage * 2 * TILE_BYTES;
        const unsigned char* v_tile = k_tile + TILE_BYTES;

        float scores[4][2][4];
#pragma unroll
        for (u32 i = 0; i < 32; ++i) scores[i / 8][i / 4 % 2][i % 4] = 0.0f;
#pragma unroll
        for (u32 step = 0; step < DIM / 16; ++step) {
            u32 a[4];
            load_rows<DIM>(a, q_tile + warp * 16 * DIM * 2, step);
#pragma unroll
            for (u32 quarter = 0; quarter < 4; ++quarter)
                multiply_keys<DIM>(scores[quarter], a, k_tile, quarter, step);
        }
        float correction[2];
        soften(job, scores, index * TILE_TOKENS, from, to, max, sum, correction);
#pragma unroll
        for (u32 pair = 0; pair < DIM / 16; ++pair)
#pragma unroll
            for (u32 i = 0; i < 8; ++i) acc[pair][i / 4][i % 4] *= MUTATE(12, correction[i % 4 / 2], 1.0f);
#pragma unroll
        for (u32 quarter = 0; quarter < 4; ++quarter) {
            u32 a[4];
            pack_weights(a, scores[quarter]);
#pragma unroll
            for (u32 pair = 0; pair < DIM / 16; ++pair) multiply_values<DIM>(acc[pair], a, v_tile, quarter, pair);
        }
        __syncthreads(); // the next round loads into the tiles just read

        if (index == last_tile || (index + 1) % (PART_TOKENS / TILE_TOKENS) == 0) {
#pragma unroll
            for (u32 row = 0; row < 2; ++row) {
                const Merge merge(total_max[row], max[row]);
                total_max[row] = merge.max;
                total_sum[row] = merge.of(total_sum[row], quad_sum(sum[row]));
#pragma unroll
                for (u32 pair = 0; pair < DIM / 16; ++pair)
#pragma unroll
                    for (u32 i = 0; i < 4; ++i) {
                        float& so_far = total[(pair * 8 + row * 4 + i) * 128];
                        so_far = merge.of(so_far, acc[pair][i / 2][2 * row + i % 2]);
                    }
            }
        }
    }

#pragma unroll
    for (u32 row = 0; row < 2; ++row) {
        const u32 tile_row = warp * 16 + g + 8 * row;
        const float sink = sinks ? MUTATE(13, sinks[head], 0.0f) * LOG2_E : LOWEST;
        const Merge merge(total_max[row], sink);
        const float inverse = 1.0f / merge.of(total_sum[row], sinks ? 1.0f : 0.0f);
        if (tile_row >= tile.num_rows) continue;
        bf16* to_row = out + (u64(tile.first_row + tile_row) * job.num_heads + head) * DIM;
#pragma unroll
        for (u32 pair = 0; pair < DIM / 16; ++pair)
#pragma unroll
            for (u32 i = 0; i < 4; ++i) {
                const float value = merge.of(total[(pair * 8 + row * 4 + i) * 128], 0.0f);
                store(to_row + pair * 16 + i / 2 * 8 + 2 * t + i % 2, value * inverse);
            }
    }
    copy_wait<0>();
}

#define ENTRY(dim)                                                                                                     \
    extern "C" __global__ void __launch_bounds__(128)                                                                  \
    attention_prefill_##dim(AttentionJob job, const bf16* q, const bf16* pool, const PrefillTile* tiles,               \
                            const u32* block_tables, const float* sinks, bf16* out) {                                  \
        attention_prefill<dim>(job, q, pool, tiles, block_tables, sinks, out);                                         \
    }
ENTRY(64)
ENTRY(128)
#undef ENTRY
