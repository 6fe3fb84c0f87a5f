// The most likely tokens of rows of logits, with their log-probabilities.
//
//   logits     f32 [_, vocab]
//   jobs       for each block a row and how many tokens, at most vocab and TOP_MAX
//   ids        u32 [num_jobs, TOP_MAX], most likely first, lower ids first among equals; beyond the number nothing is
//              written
//   logprobs   f32 [num_jobs, TOP_MAX]: (x - highest) - ln(sum exp(x - highest)) in the order of additions of
//              sample.cu, so that a token has the same bits here and there
//
// As there NaN counts as -infinity. Each thread has the best of its tokens 4 (t + 512 j) .. + 4. In each round the best of all is
// taken, and the warp of the thread that had it looks for the next one among that thread's tokens.
//
// Grid (num_jobs), 512 threads.
#include "numerics.cuh"

struct TopJob {
    u32 row, num;
};

#define TOP_MAX 20
#define TOP_THREADS 512
#define TOP_WARPS (TOP_THREADS / 32)

// A token under its logit: larger is better. 0 is none.
__device__ __forceinline__ u64 top_candidate(float x, u32 token) {
    const u32 bits = __float_as_uint(x != x ? __uint_as_float(0xff800000u) : x + 0.0f); // -0 is 0
    return u64(bits ^ (u32(int(bits) >> 31) | 0x80000000u)) << 32 | MUTATE(1, u32(~token), token);
}

__device__ __forceinline__ u64 warp_best_of(u64 best) {
    for (int with = 16; with > 0; with /= 2) best = max(best, __shfl_xor_sync(FULL_WARP, best, with));
    return best;
}

extern "C" __global__ void __launch_bounds__(TOP_THREADS)
top_logprobs(const float* logits, const TopJob* jobs, u32 vocab, u32* ids,
             float* logprobs) {
    SHARED_ARRAY(u64, warp_best, TOP_WARPS);
    SHARED_ARRAY(float, warp_highest, TOP_WARPS);
    SHARED_ARRAY(double, halves, TOP_THREADS);
    begin_launch();
    const TopJob job = jobs[blockIdx.x];
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const float* row = logits + u64(job.row) * vocab;

    u64 mine = 0;
    float highest = __uint_as_float(0xff800000u);
    each_four<TOP_THREADS>({row}, vocab, [&](u32 first, const Four(&x)[1]) {
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
            if (first + i >= vocab) break;
            mine = max(mine, top_candidate(x[0].of[i], first + i));
            highest = fmaxf(highest, x[0].of[i]);
        }
    });
    highest = warp_max(highest);
    const u64 best_here = warp_best_of(mine);
    if (lane == 0) warp_highest[warp] = highest, warp_best[warp] = best_here;
    __syncthreads();
    for (u32 w = 0; w < TOP_WARPS; ++w) highest = fmaxf(highest, warp_highest[w]);
    double sum = 0.0;
    each_four<TOP_THREADS>({row}, vocab, [&](u32 first, const Four(&x)[1]) {
#pragma unroll
        for (u32 i = 0; i < 4; ++i)
            if (first + i < vocab) sum += double(own_exp(x[0].of[i] - highest));
    });
    halves[threadIdx.x] = sum;
    for (u32 half = TOP_THREADS / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) halves[threadIdx.x] += halves[threadIdx.x + half];
    }

    for (u32 index = 0; index < job.num; ++index) {
        if (MUTATE(3, true, false)) __syncthreads();
        const u64 best = warp_best_of(warp_best[lane % TOP_WARPS]);
        const u32 token = ~u32(best), owner = token / 4 % TOP_THREADS;
        if (threadIdx.x == 0) {
            const u64 at = u64(blockIdx.x) * TOP_MAX + index;
            ids[at] = token;
            logprobs[at] = float(double(row[token] - highest) - log(MUTATE(2, halves[0], 1.0)));
        }
        // All have seen it before it is replaced.
        __syncthreads();
        if (warp != owner / 32) continue;
        u64 next = 0;
        for (u32 first = 4 * (owner + lane * TOP_THREADS); first < vocab; first += 4 * 32 * TOP_THREADS) {
            const Four x = load_four(row, vocab, first);
#pragma unroll
            for (u32 i = 0; i < 4; ++i) {
                const u64 candidate = first + i < vocab ? top_candidate(x.of[i], first + i) : 0;
                if (candidate < best) next = max(next, candidate);
            }
        }
        next = warp_best_of(next);
        if (lane == owner % 32) mine = MUTATE(4, next, 0ull);
        const u64 left = warp_best_of(mine);
        if (lane == 0) warp_best[warp] = left;
    }
}
