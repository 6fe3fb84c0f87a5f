// Causal attention of single rows over the paged pool, one launch for a ragged batch: the keys of a row are split
// at fixed positions into parts of 512, every part is a block of its own, a second kernel merges them.
//
//   attention_decode_<DIM>     units [num_units] -> partials
//   attention_merge_<DIM>      partials -> out
//
//   q, out      bf16 [_, num_heads, DIM]
//   units       row, its position, where its block table begins, which part; every part in which the row sees
//               something is a unit, those of a row follow one another in ascending order; row NOTHING: no unit
//   rows        row, its first unit, how many; row NOTHING: none, nothing is written
//   partial_acc f32 [num_units, num_heads, DIM], partial_state f32 [num_units, num_heads, 2]: maximum and sum
//   sinks       as in attention_prefill.cu; null: none
//
// DIM is 64, 128 or 256. The order of operations: see attention.cuh; a row has the same bits here as in
// attention_prefill.cu (where that has its DIM). Query heads that share a KV head are the rows of one tensor-core tile, 16 at most per
// block, so keys and values are read once for them.
//
// attention_decode: grid (num_units, num_kv_heads, ceil(num_heads / num_kv_heads / 16)), 128 threads; dynamic
// shared memory: DECODE_SHARED(DIM) bytes. attention_merge: grid (num_rows, num_heads), 64 threads.
//
//   scores  warp w multiplies with keys 16 w .. + 16 of a tile       values  warp w has features DIM / 4 w .. + DIM / 4
#include "attention.cuh"

#define DECODE_SHARED(dim) ((dim) * (16 * 2 + 2 * 2 * 64 * 2))

struct DecodeUnit {
    u32 row;
    u32 position;
    u32 block_table; // where the row's begins in block_tables
    u32 part;
};

struct DecodeRow {
    u32 row;
    u32 first_unit;
    u32 num_units;
};

template <u32 DIM>
__device__ void attention_decode(const AttentionJob& job, const bf16* q, const bf16* pool,
                                 const DecodeUnit* units, const u32* block_tables,
                                 float* partial_acc, float* partial_state) {
    DYNAMIC_SHARED(memory);
    SHARED_ARRAY(float, maxima, 4 * 16);
    SHARED_ARRAY(float, sums, 4 * 2 * 32);
    SHARED_ARRAY(uint4, weights, 16 * TILE_TOKENS * 2 / 16);
    constexpr u32 TILE_BYTES = TILE_TOKENS * DIM * 2;
    constexpr u32 PAIRS = DIM / 16 / 4; // of features, per warp
    unsigned char* q_rows = memory;
    unsigned char* kv_tiles = memory + 16 * DIM * 2;
    unsigned char* weight_tile = reinterpret_cast<unsigned char*>(weights);

    begin_launch();
    const DecodeUnit unit = units[blockIdx.x];
    if (unit.row == MUTATE(24, NOTHING, 0u)) return; // the whole block
    const u32* block_table = block_tables + unit.block_table;
    const u32 group = job.num_heads / job.kv.num_kv_heads, kv_head = blockIdx.y;
    const u32 first_head = kv_head * group + blockIdx.z * 16, num_heads = min(group - blockIdx.z * 16, 16u);
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const u32 first = max(first_visible(job, unit.position), unit.part * PART_TOKENS);
    const u32 last = min(unit.position, (unit.part + 1) * PART_TOKENS - MUTATE(21, 1, 2));
    const u32 first_tile = first / TILE_TOKENS, last_tile = last / TILE_TOKENS;
    const u32 from[2] = {first, first}, to[2] = {last, last};

    for (u32 c = threadIdx.x; c < 16 * DIM / 8; c += 128) {
        const u32 row = c / (DIM / 8), chunk = c % (DIM / 8);
        const bool is_there = row < num_heads;
        const u64 at = (u64(unit.row) * job.num_heads + first_head + (is_there ? row : 0)) * DIM + chunk * 8;
        copy_async_16(q_rows + chunk_offset<DIM>(row, chunk), q + at, is_there);
    }
    load_tile<DIM>(job, pool, block_table, kv_head, first_tile, first, last, kv_tiles, kv_tiles + TILE_BYTES);
    copy_commit();

    float acc[PAIRS][2][4], max[2] = {LOWEST, LOWEST}, sum[2] = {0.0f, 0.0f};
#pragma unroll
    for (u32 i = 0; i < PAIRS * 8; ++i) acc[i / 8][i / 4 % 2][i % 4] = 0.0f;

    for (u32 index = first_tile; index <= last_tile; ++index) {
        const u32 stage = (index - first_tile) % 2;
        if (index < last_tile) {
            unsigned char* next = kv_tiles + (1 - stage) * 2 * TILE_BYTES;
            load_tile<DIM>(job, pool, block_table, kv_head, index + 1, first, last, next, next + TILE_BYTES);
        }
        copy_commit();
        copy_wait<1>();
        __syncthreads();
        const unsigned char* k_tile = kv_tiles + stage * 2 * TILE_BYTES;
        const unsigned char* v_tile = k_tile + TILE_BYTES;

        float scores[2][4] = {};
#pragma unroll
        for (u32 step = 0; step < DIM / 16; ++step) {
            u32 a[4];
            load_rows<DIM>(a, q_rows, step);
            multiply_keys<DIM>(scores, a, k_tile, warp, step);
        }
        mask_scores(job, scores, index * TILE_TOKENS + warp * 16, from, to);
#pragma unroll
        for (u32 row = 0; row < 2; ++row) {
            const float highest = quad_max(quarter_max(scores, row));
            if (t == 0) maxima[warp * 16 + g + 8 * row] = highest;
        }
        __syncthreads();

        float correction[2];
#pragma unroll
        for (u32 row = 0; row < 2; ++row) {
            float highest = max[row];
#pragma unroll
            for (u32 w = 0; w < 4; ++w) highest = fmaxf(highest, maxima[w * 16 + g + 8 * row]);
            correction[row] = fast_exp2(max[row] - highest);
            max[row] = highest;
            sums[(warp * 2 + row) * 32 + lane] = weigh(scores, highest, row);
#pragma unroll
            for (u32 n = 0; n < 2; ++n)
                *reinterpret_cast<u32*>(weight_tile + chunk_offset<TILE_TOKENS>(g + 8 * row, 2 * warp + n) + 4 * t) =
                    pack_bf16(scores[n][2 * row], scores[n][2 * row + 1]);
        }
        if (MUTATE(22, true, false)) __syncthreads();
        if (warp == 0) {
#pragma unroll
            for (u32 row = 0; row < 2; ++row) {
                const float* of = sums + row * 32 + lane;
                sum[row] = fmaf(sum[row], correction[row], (of[0] + of[64]) + (of[128] + of[192]));
            }
        }
#pragma unroll
        for (u32 i = 0; i < PAIRS * 8; ++i) acc[i / 8][i / 4 % 2][i % 4] *= correction[i % 4 / 2];
#pragma unroll
        for (u32 quarter = 0; quarter < 4; ++quarter) {
            u32 a[4];
            load_rows<TILE_TOKENS>(a, weight_tile, quarter);
#pragma unroll
            for (u32 pair = 0; pair < PAIRS; ++pair)
                multiply_values<DIM>(acc[pair], a, v_tile, quarter, warp * PAIRS + pair);
        }
        __syncthreads(); // the next round loads into the tiles just read
    }
    copy_wait<0>();

#pragma unroll
    for (u32 row = 0; row < 2; ++row) {
        const float total = quad_sum(sum[row]);
        if (g + 8 * row >= num_heads) continue;
        const u64 at = u64(blockIdx.x) * job.num_heads + first_head + g + 8 * row;
        if (warp == 0 && t == 0) {
            partial_state[2 * at] = max[row];
            partial_state[2 * at + 1] = total;
        }
#pragma unroll
        for (u32 pair = 0; pair < PAIRS; ++pair)
#pragma unroll
            for (u32 i = 0; i < 4; ++i)
                partial_acc[at * DIM + (warp * PAIRS + pair) * 16 + i / 2 * 8 + 2 * t + i % 2] =
                    acc[pair][i / 2][2 * row + i % 2];
    }
}

template <u32 DIM>
__device__ void attention_merge(const float* partial_acc, const float* partial_state,
                                const DecodeRow* rows, const float* sinks,
                                bf16* out, u32 num_heads) {
    begin_launch();
    const DecodeRow row = rows[blockIdx.x];
    if (row.row == MUTATE(25, NOTHING, 0u)) return;
    const u32 head = blockIdx.y;
    float acc[DIM / 64], max = LOWEST, sum = 0.0f;
#pragma unroll
    for (u32 i = 0; i < DIM / 64; ++i) acc[i] = 0.0f;
    for (u32 part = 0; part < row.num_units; ++part) {
        const u64 at = u64(row.first_unit + part) * num_heads + head;
        const Merge merge(max, partial_state[2 * at]);
        max = merge.max;
        sum = merge.of(sum, partial_state[2 * at + 1]);
#pragma unroll
        for (u32 i = 0; i < DIM / 64; ++i) acc[i] = merge.of(acc[i], partial_acc[at * DIM + i * 64 + threadIdx.x]);
    }
    const Merge merge(max, sinks ? MUTATE(23, sinks[head], 0.0f) * LOG2_E : LOWEST);
    const float inverse = 1.0f / merge.of(sum, sinks ? 1.0f : 0.0f);
    bf16* to = out + (u64(row.row) * num_heads + head) * DIM + threadIdx.x;
#pragma unroll
    for (u32 i = 0; i < DIM / 64; ++i) store(to + i * 64, merge.of(acc[i], 0.0f) * inverse);
}

#define ENTRY(dim)                                                                                                     \
    extern "C" __global__ void __launch_bounds__(128)                                                                  \
    attention_decode_##dim(AttentionJob job, const bf16* q, const bf16* pool, const DecodeUnit* units,                 \
                           const u32* block_tables, float* partial_acc, float* partial_state) {                        \
        attention_decode<dim>(job, q, pool, units, block_tables, partial_acc, partial_state);                          \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(64)                                                                   \
    attention_merge_##dim(const float* partial_acc, const float* partial_state, const DecodeRow* rows,                 \
                          const float* sinks, bf16* out, u32 num_heads) {                                              \
        attention_merge<dim>(partial_acc, partial_state, rows, sinks, out, num_heads);                                 \
    }
ENTRY(64)
ENTRY(128)
ENTRY(256)
#undef ENTRY
