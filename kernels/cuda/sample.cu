// From rows of logits to tokens, without the host.
//
//   adjust_logits   a row with bias, bans and penalties of one request, as a copy: choices may share a row
//   sample          one token per entry of `samples`
//
// The steps are those of the CPU (kernels/src/sample.rs): NaN counts as -infinity, +infinity as the largest
// number; temperature below 1e-5 takes the highest logit, lowest id first; else weights exp((x - highest) /
// temperature), then min_p, top_k, top_p, each highest first and lower ids first among equals; then, in
// ascending id, the first token whose running sum exceeds `uniform` times the sum of what is kept. `uniform` is
// the protocol's function of (seed, choice, position), the same on every processor.
//
// Nothing is sorted: top_k and top_p become a threshold on the logit, found digit by digit from histograms, and
// how many of those equal to it stay. Weights are summed as integers (2^38 is 1), so that sums do not depend on
// the order in which threads arrive; that moves a boundary by less than 2^-30 against the CPU's sums.
//
// A row is one block's: what counts is how often it is read and how many threads add to one number. Digits are of
// 11 bits, since the upper 8 are nearly the same for all logits of a row, and 64-bit sums are made of 32-bit additions,
// which shared memory has units for.
//
//   logits  f32 [_, vocab], vocab below 2^24; begins at a multiple of 16 bytes
//   out     u32 [num_samples]; logprobs f32 [num_samples] or null: of the token under the row `raw_row`,
//           (x - highest) - ln(sum exp(x - highest)), the sum in f64, thread t over ids 4 (t + 512 j) .. + 4, then by
//           halves
//
// adjust_logits: grid (rows to adjust), 512 threads. sample: grid (num_samples), 512 threads.
#include "numerics.cuh"

struct Adjustment {
    u32 token;      // each token once per row
    float bias;     // -infinity bans
    u32 is_seen;    // in the prompt or the output
    u32 num_output; // how often it was generated
};

struct AdjustRow {
    u32 from_row, to_row; // rows of logits
    u32 first, num;       // its adjustments
    float repetition_penalty, frequency_penalty, presence_penalty;
};

struct SampleJob {
    u64 seed;
    u32 choice, position;
    u32 row;     // of logits, adjusted if need be
    u32 raw_row; // of logits as the model gave them
    float temperature, top_p, min_p;
    u32 top_k; // 0: all
};

#define THREADS 512
#define WARPS (THREADS / 32)
#define BINS 2048
#define NO_LOGIT __uint_as_float(0xff800000u) // -infinity

__device__ __forceinline__ float clean(float x) { return x != x ? NO_LOGIT : fminf(x, 3.402823466e38f); }

// Calls `take` with `first`, a multiple of 4, and the three ids behind it, as far as there are such, and their logits.
template <typename F>
__device__ __forceinline__ void take_four(const float* row, u32 vocab, u32 first, F take) {
    const Four four = load_four(row, vocab, first);
#pragma unroll
    for (u32 i = 0; i < 4; ++i)
        if (first + i < vocab) take(first + i, four.of[i]);
}

// All of a row, the threads of the block side by side.
template <typename F>
__device__ __forceinline__ void take_row(const float* row, u32 vocab, F take) {
    each_four<THREADS>({row}, vocab, [&](u32 first, const Four(&x)[1]) {
#pragma unroll
        for (u32 i = 0; i < 4; ++i)
            if (first + i < vocab) take(first + i, x[0].of[i]);
    });
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
adjust_logits(float* logits, const AdjustRow* rows, const Adjustment* adjustments, u32 vocab) {
    begin_launch();
    const AdjustRow row = rows[blockIdx.x];
    float* to = logits + u64(row.to_row) * vocab;
    take_row(logits + u64(row.from_row) * vocab, vocab, [&](u32 token, float x) { to[token] = clean(x); });
    __syncthreads();
    for (u32 i = threadIdx.x; i < row.num; i += THREADS) {
        const Adjustment a = adjustments[row.first + i];
        float x = to[a.token] + MUTATE(1, a.bias, 0.0f);
        if (a.is_seen) x = x > 0.0f ? x / row.repetition_penalty : x * MUTATE(2, row.repetition_penalty, 1.0f);
        if (a.num_output > 0) {
            x -= row.frequency_penalty * float(a.num_output);
            x -= row.presence_penalty;
        }
        to[a.token] = x;
    }
}

// splitmix64's finaliser, keyed in turn: see kernels/src/uniform.rs.
__device__ __forceinline__ u64 mix(u64 z) {
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

__device__ __forceinline__ double uniform(u64 seed, u32 choice, u32 position) {
    const u64 golden = 0x9e3779b97f4a7c15ull;
    const u64 a = mix(seed + golden), b = mix((a ^ choice) + golden), c = mix((b ^ position) + golden);
    return double(c >> 11) * (1.0 / 9007199254740992.0);
}

// Ascending like the floats.
__device__ __forceinline__ u32 ascending(float x) {
    const u32 bits = __float_as_uint(x + 0.0f); // -0 is 0
    return bits ^ (u32(int(bits) >> 31) | 0x80000000u);
}

__device__ __forceinline__ float of_ascending(u32 key) {
    return __uint_as_float(key ^ (u32(int(~key) >> 31) | 0x80000000u));
}

__device__ __forceinline__ u64 weight_of(float scaled) { return u64(own_exp(scaled) * 274877906944.0f); } // 2^38

// What the threads of a block share.
struct Shared {
    u32 *low, *high; // sums of bins
    u64* warps;      // one number of each warp
    u64* found;      // three numbers that one thread tells all
};

// Adds to a sum that has two halves. Both wrap; no sum does.
__device__ __forceinline__ void add_to(const Shared& shared, u32 bin, u64 value) {
    const u32 low = u32(value), before = atomicAdd(&shared.low[bin], low);
    const u32 high = u32(value >> 32) + MUTATE(7, before + low < low ? 1 : 0, 0);
    if (high) atomicAdd(&shared.high[bin], high);
}

// The sum over all threads below this one, and over all.
__device__ __forceinline__ u64 sum_before(u64 mine, const Shared& shared, u64& total) {
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    u64 sum = mine;
    for (u32 by = 1; by < 32; by *= 2) {
        const u64 other = __shfl_up_sync(FULL_WARP, sum, by);
        if (lane >= by) sum += other;
    }
    __syncthreads(); // what a call before this told has been read
    if (lane == 31) shared.warps[warp] = sum;
    __syncthreads();
    u64 before = sum - mine;
    total = 0;
    for (u32 w = 0; w < WARPS; ++w) {
        if (w < warp) before += shared.warps[w];
        total += shared.warps[w];
    }
    return before;
}

// What all threads of a block know about their row.
struct Row {
    const float* logits;
    u32 vocab;
    float max, temperature, min_p;
    u32 threshold; // keys above it stay, and of those equal to it the first `num_equal` by id
    u32 num_equal;

    // The key of a logit; 0, which no number has, if min_p or a ban removes it.
    __device__ u32 key(float logit) const {
        const float scaled = (clean(logit) - max) / temperature;
        const bool is_out = scaled == NO_LOGIT || (min_p > 0.0f && own_exp(scaled) < min_p);
        return is_out ? 0 : ascending(scaled);
    }
};

// Finds the highest key at which the sum over keys from the top reaches a target, among what the row keeps so far.
// A key counts 1 and the target is `top_k`; or, if IS_WEIGHED, it counts its weight, and the target is a share `top_p`
// of the sum of all. Sets threshold and num_equal to it; leaves them if all of it is less.
template <bool IS_WEIGHED>
__device__ __forceinline__ void keep_top(Row& row, u32 top_k, float top_p, const Shared& shared) {
    u32 prefix = 0;
    u64 above = 0, target = top_k; // sum over keys above the prefix
#pragma unroll 1
    for (u32 round = 0; round < 3; ++round) {
        const u32 shift = round == 0 ? 21 : round == 1 ? 10 : 0, num_bins = round == 2 ? BINS / 2 : BINS;
        const u32 upper = round == 2 ? 10 : 21; // bits below those that the rounds before have found
        const auto is_below = [&](u32 key) { return round == 0 || (key ^ prefix) >> upper == 0; };
        __syncthreads();
        for (u32 bin = threadIdx.x; bin < BINS; bin += THREADS) shared.low[bin] = shared.high[bin] = 0;
        if (threadIdx.x == 0) shared.found[0] = BINS;
        __syncthreads();
        take_row(row.logits, row.vocab, [&](u32, float logit) {
            const u32 key = row.key(logit);
            if (key <= row.threshold || !is_below(key)) return;
            const u64 counts = IS_WEIGHED ? weight_of(of_ascending(key)) : u64(1);
            if (counts) add_to(shared, key >> shift & (num_bins - 1), counts);
        });
        __syncthreads();
        if (threadIdx.x == 0 && row.threshold != 0 && is_below(row.threshold)) {
            const u64 each = IS_WEIGHED ? weight_of(of_ascending(row.threshold)) : u64(1);
            add_to(shared, row.threshold >> shift & (num_bins - 1), each * row.num_equal);
        }
        __syncthreads();
        // From the highest bin down, four to a thread.
        const u32 highest = BINS - 1 - 4 * threadIdx.x;
        u64 bins[4], mine = 0, total;
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
            bins[i] = u64(shared.high[highest - i]) << 32 | shared.low[highest - i];
            mine += bins[i];
        }
        u64 sum = above + sum_before(mine, shared, total);
        if (IS_WEIGHED && round == 0) target = max(u64(double(MUTATE(5, top_p, 1.0f)) * double(total)), u64(1));
        if (sum < target && sum + mine >= target) {
#pragma unroll
            for (u32 i = 0; i < 4; ++i) {
                if (sum < target && sum + bins[i] >= target)
                    shared.found[0] = highest - i, shared.found[1] = sum, shared.found[2] = bins[i];
                sum += bins[i];
            }
        }
        __syncthreads();
        if (shared.found[0] == BINS) return;
        prefix |= u32(shared.found[0]) << shift;
        above = shared.found[1];
    }
    const u64 each = IS_WEIGHED ? weight_of(of_ascending(prefix)) : u64(1), missing = target - above;
    const u64 all = shared.found[2] / each, wanted = (missing + each - 1) / each;
    row.threshold = prefix;
    row.num_equal = u32(MUTATE(3, min(wanted, all), all));
}

// The token in which the running sum of weights, in ascending id, exceeds a share `uniform` of the sum.
__device__ __forceinline__ u32 draw(const Row& row, double uniform, const Shared& shared) {
    const u32 lane = threadIdx.x % 32;
    // A stretch of ids for each thread: how much is above the threshold, and how many are equal to it.
    const u32 stretch = (row.vocab + 4 * THREADS - 1) / (4 * THREADS) * 4;
    const u32 start = min(threadIdx.x * stretch, row.vocab), end = min(start + stretch, row.vocab);
    u64 mine = 0, total;
    u32 equal = 0;
#pragma unroll 2
    for (u32 first = start; first < end; first += 4)
        take_four(row.logits, row.vocab, first, [&](u32, float logit) {
            const u32 key = row.key(logit);
            if (key > row.threshold) mine += weight_of(of_ascending(key));
            if (key == row.threshold && key != 0) ++equal;
        });
    const u64 each = row.threshold ? weight_of(of_ascending(row.threshold)) : 0;
    const u32 equal_before = u32(min(sum_before(equal, shared, total), u64(row.num_equal)));
    mine += each * min(equal, row.num_equal - MUTATE(8, equal_before, 0u));
    u64 before = sum_before(mine, shared, total);
    const u64 target = min(u64(uniform * double(total)), total - 1);
    if (before <= target && target < before + mine)
        shared.found[0] = start, shared.found[1] = before, shared.found[2] = row.num_equal - equal_before;
    __syncthreads();
    const u32 owned = u32(shared.found[0]), owned_end = min(owned + stretch, row.vocab);
    u32 equals_left = u32(shared.found[2]), token = 0;
    before = shared.found[1];
    // Every warp walks through the one stretch, and comes to the same end.
    for (u32 first = owned; first < owned_end; first += 32) {
        const u32 key = first + lane < owned_end ? row.key(row.logits[first + lane]) : 0;
        const bool is_equal = key == row.threshold && key != 0;
        const u32 equals = __ballot_sync(FULL_WARP, is_equal);
        const bool is_kept = key > row.threshold || (is_equal && u32(__popc(equals & ((1u << lane) - 1))) < equals_left);
        u64 sum = is_kept ? weight_of(of_ascending(key)) : 0;
        for (u32 by = 1; by < 32; by *= 2) {
            const u64 other = __shfl_up_sync(FULL_WARP, sum, by);
            if (lane >= by) sum += other;
        }
        const u32 exceeds = __ballot_sync(FULL_WARP, before + sum > target);
        if (exceeds) {
            token = first + u32(__ffs(exceeds)) - 1;
            break;
        }
        before += __shfl_sync(FULL_WARP, sum, 31);
        equals_left -= min(u32(__popc(equals)), equals_left);
    }
    return token;
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
sample(const float* logits, const SampleJob* samples, u32 vocab, u32* out, float* logprobs) {
    SHARED_ARRAY(u32, low, BINS);
    SHARED_ARRAY(u32, high, BINS);
    SHARED_ARRAY(u64, warps, WARPS);
    SHARED_ARRAY(u64, found, 3);
    SHARED_ARRAY(double, halves, THREADS);
    const Shared shared = {low, high, warps, found};
    begin_launch();
    const SampleJob job = samples[blockIdx.x];
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    Row row = {logits + u64(job.row) * vocab, vocab, 0.0f, job.temperature, fminf(job.min_p, 1.0f), 0, 0};

    // The highest logit with the lowest id, as one number.
    u64 best = 0;
    take_row(row.logits, vocab, [&](u32 token, float logit) {
        best = max(best, u64(ascending(clean(logit))) << 32 | MUTATE(4, u32(~token), token));
    });
    for (int with = 16; with > 0; with /= 2) best = max(best, __shfl_xor_sync(FULL_WARP, best, with));
    if (lane == 0) warps[warp] = best;
    __syncthreads();
    for (u32 w = 0; w < WARPS; ++w) best = max(best, warps[w]);
    row.max = of_ascending(u32(best >> 32));
    u32 token = ~u32(best);

    if (job.temperature >= 1e-5f && row.max != NO_LOGIT) {
        if (job.top_k > 0) keep_top<false>(row, job.top_k, 1.0f, shared);
        if (job.top_p < 1.0f) keep_top<true>(row, 0, job.top_p, shared);
        token = draw(row, uniform(job.seed, job.choice, job.position), shared);
    }
    if (threadIdx.x == 0) out[blockIdx.x] = token;
    if (!logprobs) return;

    const float* raw = logits + u64(job.raw_row) * vocab;
    float highest = NO_LOGIT;
    take_row(raw, vocab, [&](u32, float logit) { highest = fmaxf(highest, logit); });
    highest = warp_max(highest);
    __syncthreads();
    if (lane == 0) warps[warp] = ascending(highest);
    __syncthreads();
    for (u32 w = 0; w < WARPS; ++w) highest = fmaxf(highest, of_ascending(u32(warps[w])));
    double sum = 0.0;
    take_row(raw, vocab, [&](u32, float logit) { sum += double(own_exp(logit - highest)); });
    halves[threadIdx.x] = sum;
    for (u32 half = THREADS / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) halves[threadIdx.x] += halves[threadIdx.x + half];
    }
    __syncthreads();
    if (threadIdx.x == 0) logprobs[blockIdx.x] = float(double(raw[token] - highest) - log(MUTATE(6, halves[0], 1.0)));
}
