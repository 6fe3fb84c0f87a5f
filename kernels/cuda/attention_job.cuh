// What an attention layer fixes, and which positions a query sees.
#pragma once

#include "kv_layout.cuh"

// A softmax starts anew after this many positions, counted from position 0 of the sequence.
#define PART_TOKENS 512
// Positions of one step of the online softmax.
#define TILE_TOKENS 64
#define LOWEST -3.402823466e38f
#define LOG2_E 1.44269504088896340736f

// Rows of a tile of prefill, at most.
#define PREFILL_ROWS 64

struct AttentionJob {
    KvShape kv;
    u32 layer;
    u32 num_heads; // a multiple of kv.num_kv_heads
    float scale;
    float softcap; // 0: none
    u32 window;    // a query at p sees p - window + 1 ..= p; 0: all up to p
};

// Consecutive rows of one sequence.
struct PrefillTile {
    u32 first_row;
    u32 num_rows;       // 1..=PREFILL_ROWS
    u32 first_position; // of first_row
    u32 block_table;    // where the sequence's begins in block_tables
};

__device__ __forceinline__ u32 first_visible(const AttentionJob& job, u32 position) {
    return job.window == 0 || position + 1 < job.window ? 0 : position + 1 - MUTATE(1, job.window, job.window + 1);
}
