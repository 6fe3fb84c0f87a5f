// Causal attention of prefill chunks over the paged pool on compute capability 9.0: attention_prefill.cu with bulk
// copies and the products of warpgroups.
//
//   q, out, tiles, block_tables, sinks, DIM, window, softcap, scale: as in attention_prefill.cu
//   pool     a tensor map of the pool, bf16: dimensions (DIM, 16 tokens, 2 * num_kv_heads: K, then V, granules of all layers),
//            packed; box (64, 16, 1, HOPPER_BOX_TOKENS / 16); 128-byte swizzle. See kv_layout.cuh
//
// The order of operations is that of attention.cuh, and depends on shapes and a row's own position alone: a row has the
// same bits in any tile and batch. On the emulation they are those of attention_prefill.cu and attention_decode.cu,
// which a test compares. On a device products of warpgroups may add 16 values in another order than `mma` does: who
// offers both kernels gives them different numerics ids, and who promises that a row decoded is the row prefilled
// (batch-invariant serving) uses the other one.
//
// The pool is read in boxes of one block in which some row of the tile sees something, and the block table likewise.
// What is stored at positions that no row of the tile sees counts for nothing, whatever it is; at positions
// between what the first row and what the last row see it must be finite.
//
// Grid (num_tiles, num_kv_heads * ceil(heads of a KV head / 2)), 384 threads; dynamic shared memory: HOPPER_SHARED(DIM)
// bytes. Tiles that begin late in their sequences are best at the end of the list: their blocks start first.
//
//   warpgroup 0      its first warp brings K and V, tile after tile, as stages become free
//   warpgroups 1, 2  a query head each, of the same rows and the same KV head; warp w has rows 16 w .. + 16
//
//   shared memory    q [64], twice | k [64] | v [64], HOPPER_STAGES times each, all as in hopper.cuh | barriers
//
// While the tensor cores multiply a tile's weights with its values, the next tile's scores become weights.
#include "attention.cuh"
#include "hopper.cuh"

#define HOPPER_STAGES 4
#define HOPPER_SHARED(dim) (1024 + (2 + 2 * HOPPER_STAGES) * 64 * (dim) * 2 + (4 * HOPPER_STAGES + 3) * 8)
// Positions of a bulk copy: those of a tile, of a block, or what fits both.
#define HOPPER_BOX_TOKENS(block_size) ((block_size) % 64 == 0 ? 64u : (block_size) % 32 == 0 ? 32u : 16u)
// Of a thread, of the 65,536 of a multiprocessor.
#define PRODUCER_REGISTERS 40
#define CONSUMER_REGISTERS 232

#define PANEL_BYTES (64 * LINE_BYTES)

// What a tile's rows see.
struct Seen {
    u32 first, last; // positions
    __device__ u32 first_tile() const { return first / TILE_TOKENS; }
    __device__ u32 last_tile() const { return last / TILE_TOKENS; }
};

template <u32 DIM>
struct HopperMemory {
    static constexpr u32 TILE_BYTES = 64 * DIM * 2;
    unsigned char* tiles;
    __device__ explicit HopperMemory(unsigned char* memory) : tiles(memory + (1024 - shared_address(memory) % 1024) % 1024) {}
    __device__ unsigned char* q(u32 of) const { return tiles + of * TILE_BYTES; }
    __device__ unsigned char* k(u32 stage) const { return tiles + (2 + stage) * TILE_BYTES; }
    __device__ unsigned char* v(u32 stage) const { return tiles + (2 + HOPPER_STAGES + stage) * TILE_BYTES; }
    __device__ u64* barrier(u32 i) const { return reinterpret_cast<u64*>(tiles + (2 + 2 * HOPPER_STAGES) * TILE_BYTES) + i; }
    // A stage's keys or values are there.
    __device__ u64* k_is_full(u32 stage) const { return barrier(stage); }
    __device__ u64* v_is_full(u32 stage) const { return barrier(HOPPER_STAGES + stage); }
    // All warps have read them.
    __device__ u64* k_is_empty(u32 stage) const { return barrier(2 * HOPPER_STAGES + stage); }
    __device__ u64* v_is_empty(u32 stage) const { return barrier(3 * HOPPER_STAGES + stage); }
    __device__ u64* q_is_full(u32 of) const { return barrier(4 * HOPPER_STAGES + of); }
    // Values have come of which some count for nothing.
    __device__ u64* has_landed() const { return barrier(4 * HOPPER_STAGES + 2); }
};

// Zeroes the values of positions that nobody sees: their weight is 0, and 0 times what is stored there may be NaN.
template <u32 DIM>
__device__ __forceinline__ void clear_unseen(unsigned char* v_tile, u32 start, const Seen& seen) {
    for (u32 c = threadIdx.x % 32; c < TILE_TOKENS * DIM / 8; c += 32) {
        const u32 line = c / (DIM / 8), chunk = c % (DIM / 8), position = start + line;
        if (position >= seen.first && position <= seen.last) continue;
        unsigned char* to = v_tile + chunk / 8 * PANEL_BYTES + line * LINE_BYTES + chunk % 8 * 16;
        *reinterpret_cast<uint4*>(to) = make_uint4(0, 0, 0, 0);
    }
}

// One warp brings the keys and values of all tiles.
template <u32 DIM>
__device__ __forceinline__ void produce(const AttentionJob& job, const TensorMap* pool, const u32* block_table, u32 kv_head,
                                        const Seen& seen, const HopperMemory<DIM>& memory) {
    constexpr u32 PANELS = DIM / LINE_VALUES;
    const u32 lane = threadIdx.x % 32, box_tokens = HOPPER_BOX_TOKENS(job.kv.block_size);
    const u32 box = lane / PANELS, panel = lane % PANELS; // of this lane
    const u32 block_granules = job.kv.block_size / GRANULE_TOKENS;
    const u32 to_box = panel * PANEL_BYTES + box * box_tokens * LINE_BYTES;
    u32 num_landed = 0;
    for (u32 index = seen.first_tile(); index <= seen.last_tile(); ++index) {
        const u32 stage = (index - seen.first_tile()) % HOPPER_STAGES, turn = (index - seen.first_tile()) / HOPPER_STAGES;
        const u32 tile_start = index * TILE_TOKENS, start = tile_start + box * box_tokens;
        const bool is_mine = box < TILE_TOKENS / box_tokens && start <= seen.last && start + box_tokens > seen.first;
        u32 granule = 0;
        if (is_mine) {
            const u32 block = job.layer * job.kv.num_blocks + block_table[start / job.kv.block_size];
            granule = block * block_granules + start % job.kv.block_size / GRANULE_TOKENS;
        }
        const u32 num_bytes = u32(__popc(__ballot_sync(FULL_WARP, is_mine))) * box_tokens * LINE_BYTES;

        if (turn > 0 && MUTATE(31, true, false)) barrier_wait(memory.k_is_empty(stage), (turn - 1) % 2);
        if (lane == 0) barrier_expect(memory.k_is_full(stage), num_bytes);
        __syncwarp();
        if (is_mine)
            copy_box(memory.k(stage) + to_box, pool, panel * LINE_VALUES, 0, kv_head, granule, memory.k_is_full(stage));

        const bool is_edge = tile_start < seen.first || tile_start + TILE_TOKENS > seen.last + 1;
        u64* v_has_come = is_edge ? memory.has_landed() : memory.v_is_full(stage);
        if (turn > 0 && MUTATE(32, true, false)) barrier_wait(memory.v_is_empty(stage), (turn - 1) % 2);
        if (lane == 0) barrier_expect(v_has_come, num_bytes);
        __syncwarp();
        if (is_mine) {
            const u32 v_head = job.kv.num_kv_heads + kv_head;
            copy_box(memory.v(stage) + to_box, pool, panel * LINE_VALUES, 0, v_head, granule, v_has_come);
        }
        if (is_edge) {
            barrier_wait(memory.has_landed(), num_landed++ % 2);
            if (MUTATE(33, true, false)) clear_unseen<DIM>(memory.v(stage), tile_start, seen);
            if (MUTATE(34, true, false)) fence_proxy_async();
            __syncwarp();
            if (lane == 0) barrier_arrive(memory.v_is_full(stage));
        }
    }
}

// A warpgroup's queries to shared memory, zeros for rows that the tile does not have.
template <u32 DIM>
__device__ __forceinline__ void load_queries(const bf16* q, const PrefillTile& tile, u32 head, u32 num_heads,
                                             unsigned char* q_tile) {
    for (u32 c = threadIdx.x % WARPGROUP; c < 64 * DIM / 8; c += WARPGROUP) {
        const u32 row = c / (DIM / 8), chunk = c % (DIM / 8);
        uint4 values = make_uint4(0, 0, 0, 0);
        if (row < tile.num_rows)
            values = *reinterpret_cast<const uint4*>(q + (u64(tile.first_row + row) * num_heads + head) * DIM + chunk * 8);
        const u32 piece = chunk % 8 ^ MUTATE(35, row % 8, 0u);
        *reinterpret_cast<uint4*>(q_tile + chunk / 8 * PANEL_BYTES + row * LINE_BYTES + piece * 16) = values;
    }
}

// Starts the products of 64 queries with 64 keys.
template <u32 DIM>
__device__ __forceinline__ void start_scores(float (&scores)[4][2][4], const unsigned char* q_tile,
                                             const unsigned char* k_tile) {
#pragma unroll
    for (u32 step = 0; step < DIM / 16; ++step) {
        const u32 at = step / 4 * PANEL_BYTES + step % 4 * 32;
        wgmma_rows(scores, matrix_descriptor(q_tile + at, PANEL_BYTES, 8 * LINE_BYTES),
                   matrix_descriptor(k_tile + at, PANEL_BYTES, MUTATE(36, 8, 4) * LINE_BYTES), step > 0);
    }
    wgmma_commit();
}

// Starts adding the products of the weights of 64 positions with their values.
template <u32 DIM>
__device__ __forceinline__ void start_values(float (&acc)[DIM / 16][2][4], const u32 (&weights)[4][4],
                                             const unsigned char* v_tile) {
#pragma unroll
    for (u32 quarter = 0; quarter < 4; ++quarter) {
        const unsigned char* v = v_tile + quarter * 16 * LINE_BYTES;
        wgmma_columns(acc, weights[quarter], matrix_descriptor(v, MUTATE(37, PANEL_BYTES, 0u), 8 * LINE_BYTES));
    }
    wgmma_commit();
}

// The sums of a part, or of all parts so far.
template <u32 DIM>
struct Sums {
    float max[2], sum[2], acc[DIM / 16][2][4];
    __device__ __forceinline__ void clear() {
#pragma unroll
        for (u32 i = 0; i < DIM / 2; ++i) acc[i / 8][i / 4 % 2][i % 4] = 0.0f;
        for (u32 row = 0; row < 2; ++row) max[row] = LOWEST, sum[row] = 0.0f;
    }
};

// Merges a part; `max` and `sum` are its.
template <u32 DIM>
__device__ __forceinline__ void merge_part(Sums<DIM>& total, const float* max, const float* sum,
                                           const float (&acc)[DIM / 16][2][4]) {
#pragma unroll
    for (u32 row = 0; row < 2; ++row) {
        const Merge merge(total.max[row], max[row]);
        total.max[row] = merge.max;
        total.sum[row] = merge.of(total.sum[row], quad_sum(sum[row]));
#pragma unroll
        for (u32 i = 0; i < DIM / 4; ++i) {
            float& so_far = total.acc[i / 4][i / 2 % 2][2 * row + i % 2];
            so_far = merge.of(so_far, acc[i / 4][i / 2 % 2][2 * row + i % 2]);
        }
    }
}

// A warpgroup attends for one head.
template <u32 DIM>
__device__ __forceinline__ void consume(const AttentionJob& job, const bf16* q, const PrefillTile& tile, u32 head, u32 of,
                                        const float* sinks, bf16* out, const Seen& seen, const HopperMemory<DIM>& memory) {
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, g = lane / 4, t = lane % 4;
    // Rows of this lane, and what they see; rows beyond the tile see what its last row sees and are not stored.
    u32 from[2], to[2];
#pragma unroll
    for (u32 i = 0; i < 2; ++i) {
        to[i] = min(tile.first_position + warp * 16 + g + 8 * i, seen.last);
        from[i] = first_visible(job, to[i]);
    }
    // What all rows of the warp see.
    const u32 all_to = min(tile.first_position + warp * 16, seen.last);
    const u32 all_from = first_visible(job, min(tile.first_position + warp * 16 + 15, seen.last));

    load_queries<DIM>(q, tile, head, job.num_heads, memory.q(of));
    if (MUTATE(38, true, false)) fence_proxy_async();
    barrier_arrive(memory.q_is_full(of));
    barrier_wait(memory.q_is_full(of), 0);

    Sums<DIM> part, total;
    part.clear(), total.clear();
    float scores[4][2][4], correction[2];
    u32 weights[4][4];
    const auto soften_tile = [&](u32 index) {
        const u32 start = index * TILE_TOKENS;
        if (start >= all_from && start + TILE_TOKENS <= MUTATE(39, all_to + 1, all_to + 17))
            soften<false>(job, scores, start, from, to, part.max, part.sum, correction);
        else
            soften<true>(job, scores, start, from, to, part.max, part.sum, correction);
    };

    barrier_wait(memory.k_is_full(0), 0);
    wgmma_fence();
    start_scores<DIM>(scores, memory.q(of), memory.k(0));
    wgmma_wait<0>(scores);
    if (lane == 0) barrier_arrive(memory.k_is_empty(0));
    soften_tile(seen.first_tile());
#pragma unroll
    for (u32 quarter = 0; quarter < 4; ++quarter) pack_weights(weights[quarter], scores[quarter]);

    for (u32 index = seen.first_tile() + 1; index <= seen.last_tile(); ++index) {
        const u32 n = index - seen.first_tile(), stage = n % HOPPER_STAGES, before = (n - 1) % HOPPER_STAGES;
        if (MUTATE(40, true, false)) barrier_wait(memory.k_is_full(stage), n / HOPPER_STAGES % 2);
        hold(part.acc), hold(weights);
        if (MUTATE(41, true, false)) wgmma_fence();
        start_scores<DIM>(scores, memory.q(of), memory.k(stage));
        if (MUTATE(42, true, false)) barrier_wait(memory.v_is_full(before), (n - 1) / HOPPER_STAGES % 2);
        wgmma_fence(); // behind a loop the compiler wants it again
        start_values<DIM>(part.acc, weights, memory.v(before));

        wgmma_wait<1>(scores);
        if (lane == 0) barrier_arrive(memory.k_is_empty(stage));
        // The softmax of the next part begins while the values of the last tile of this one are multiplied.
        const bool is_new_part = index % (PART_TOKENS / TILE_TOKENS) == 0;
        const float max[2] = {part.max[0], part.max[1]}, sum[2] = {part.sum[0], part.sum[1]};
        if (is_new_part)
            for (u32 row = 0; row < 2; ++row) part.max[row] = LOWEST, part.sum[row] = 0.0f;
        soften_tile(index);

        wgmma_wait<0>(part.acc);
        if (lane == 0) barrier_arrive(memory.v_is_empty(before));
        if (is_new_part) merge_part<DIM>(total, max, sum, part.acc);
#pragma unroll
        for (u32 i = 0; i < DIM / 2; ++i) {
            float& value = part.acc[i / 8][i / 4 % 2][i % 4];
            value = is_new_part ? 0.0f : value * MUTATE(43, correction[i % 4 / 2], 1.0f);
        }
#pragma unroll
        for (u32 quarter = 0; quarter < 4; ++quarter) pack_weights(weights[quarter], scores[quarter]);
    }

    const u32 n = seen.last_tile() - seen.first_tile();
    barrier_wait(memory.v_is_full(n % HOPPER_STAGES), n / HOPPER_STAGES % 2);
    hold(part.acc), hold(weights);
    wgmma_fence();
    start_values<DIM>(part.acc, weights, memory.v(n % HOPPER_STAGES));
    wgmma_wait<0>(part.acc);
    merge_part<DIM>(total, part.max, part.sum, part.acc);

#pragma unroll
    for (u32 row = 0; row < 2; ++row) {
        const u32 tile_row = warp * 16 + g + 8 * row;
        const float sink = sinks ? MUTATE(44, sinks[head], 0.0f) * LOG2_E : LOWEST;
        const Merge merge(total.max[row], sink);
        const float inverse = 1.0f / merge.of(total.sum[row], sinks ? 1.0f : 0.0f);
        if (tile_row >= tile.num_rows) continue;
        bf16* to_row = out + (u64(tile.first_row + tile_row) * job.num_heads + head) * DIM;
#pragma unroll
        for (u32 i = 0; i < DIM / 8; ++i) {
            const float* values = &total.acc[i / 2][i % 2][2 * row];
            const u32 even = round_bf16(merge.of(values[0], 0.0f) * inverse);
            const u32 odd = round_bf16(merge.of(values[1], 0.0f) * inverse);
            *reinterpret_cast<u32*>(to_row + i * 8 + 2 * t) = even | odd << 16;
        }
    }
}

template <u32 DIM>
__device__ __forceinline__ void attention_prefill_hopper(const AttentionJob& job, const bf16* q,
                                                         const TensorMap* pool, const PrefillTile* tiles,
                                                         const u32* block_tables,
                                                         const float* sinks, bf16* out) {
    static_assert((PRODUCER_REGISTERS + 2 * CONSUMER_REGISTERS) * WARPGROUP <= 65536, "registers of a multiprocessor");
    DYNAMIC_SHARED(bytes);
    const HopperMemory<DIM> memory(bytes);
    begin_launch();
    const PrefillTile tile = tiles[gridDim.x - 1 - blockIdx.x];
    const u32 group = job.num_heads / job.kv.num_kv_heads, pairs = (group + 1) / 2;
    const u32 kv_head = blockIdx.y / pairs, first_head = blockIdx.y % pairs * 2; // within the group
    const u32 num_heads = min(group - first_head, 2u), warpgroup = threadIdx.x / WARPGROUP;
    const Seen seen = {first_visible(job, tile.first_position), tile.first_position + tile.num_rows - 1};

    if (threadIdx.x == 0) {
        for (u32 stage = 0; stage < HOPPER_STAGES; ++stage) {
            barrier_init(memory.k_is_full(stage), 1);
            barrier_init(memory.v_is_full(stage), 1);
            barrier_init(memory.k_is_empty(stage), num_heads * 4);
            barrier_init(memory.v_is_empty(stage), num_heads * 4);
        }
        for (u32 of = 0; of < 2; ++of) barrier_init(memory.q_is_full(of), WARPGROUP);
        barrier_init(memory.has_landed(), 1);
        barriers_are_made();
    }
    __syncthreads();

    if (warpgroup == 0) {
        registers_down<PRODUCER_REGISTERS>();
        if (threadIdx.x < 32) produce<DIM>(job, pool, block_tables + tile.block_table, kv_head, seen, memory);
    } else {
        registers_up<CONSUMER_REGISTERS>();
        if (warpgroup <= num_heads)
            consume<DIM>(job, q, tile, kv_head * group + first_head + warpgroup - 1, warpgroup - 1, sinks, out, seen, memory);
    }
}

#define ENTRY(dim)                                                                                                     \
    extern "C" __global__ void __launch_bounds__(384, 1)                                                               \
    attention_prefill_hopper_##dim(AttentionJob job, const bf16* q, const GRID_CONSTANT TensorMap pool,                \
                                   const PrefillTile* tiles, const u32* block_tables, const float* sinks, bf16* out) { \
        attention_prefill_hopper<dim>(job, q, &pool, tiles, block_tables, sinks, out);                                 \
    }
ENTRY(64)
ENTRY(128)
#undef ENTRY
