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
//   logits  f32 [_, vocab], vocab below 2^24
//   out     u32 [num_samples]; logprobs f32 [num_samples] or null: of the token under the row `raw_row`,
//           (x - highest) - ln(sum exp(x - highest)), the sum in f64, thread t over ids t + 512 j, then by halves
//
// adjust_logits: grid (rows to adjust), 256 threads. sample: grid (num_samples), 512 threads.
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
#define NO_LOGIT __uint_as_float(0xff800000u) // -infinity

__device__ __forceinline__ float clean(float x) { return x != x ? NO_LOGIT : fminf(x, 3.402823466e38f); }

extern "C" __global__ void __launch_bounds__(256)
adjust_logits(float* logits, const AdjustRow* rows, const Adjustment* adjustments, u32 vocab) {
    const AdjustRow row = rows[blockIdx.x];
    const float* from = logits + u64(row.from_row) * vocab;
    float* to = logits + u64(row.to_row) * vocab;
    for (u32 i = threadIdx.x; i < vocab; i += 256) to[i] = clean(from[i]);
    __syncthreads();
    for (u32 i = threadIdx.x; i < row.num; i += 256) {
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

// What all threads of a block know about their row.
struct Row {
    const float* logits;
    u32 vocab;
    float max, temperature, min_p;
    u32 threshold; // keys above it stay, and of those equal to it the first `num_equal` by id
    u32 num_equal;

    // The key of a token; 0, which no number has, if min_p or a ban removes it.
    __device__ u32 key(u32 token) const {
        const float scaled = (clean(logits[token]) - max) / temperature;
        return scaled == NO_LOGIT || own_exp(scaled) < min_p ? 0 : ascending(scaled);
    }
};

// Finds the highest key at which the sum over keys from the top reaches `target`, among what the row keeps so
// far; a key counts 1 or, if IS_WEIGHED, its weight. Sets threshold and num_equal to it; leaves them if all
// of it is less. `bins` is shared, 256 entries; `found` shared, 3.
template <bool IS_WEIGHED>
__device__ __forceinline__ void keep_top(Row& row, u64 target, u64* bins, u64* found) {
    u32 prefix = 0;
    u64 above = 0; // sum over keys above the prefix
    for (u32 shift = 24;; shift -= 8) {
        __syncthreads();
        if (threadIdx.x < 256) bins[threadIdx.x] = 0;
        __syncthreads();
#pragma unroll 1
        for (u32 token = threadIdx.x; token < row.vocab; token += THREADS) {
            const u32 key = row.key(token);
            if (key <= row.threshold || (shift < 24 && (key ^ prefix) >> (shift + 8) != 0)) continue;
            atomicAdd(&bins[key >> shift & 255], IS_WEIGHED ? weight_of(of_ascending(key)) : u64(1));
        }
        __syncthreads();
        if (threadIdx.x == 0) {
            if (row.threshold != 0 && (shift == 24 || (row.threshold ^ prefix) >> (shift + 8) == 0)) {
                const u64 each = IS_WEIGHED ? weight_of(of_ascending(row.threshold)) : u64(1);
                bins[row.threshold >> shift & 255] += each * row.num_equal;
            }
            found[0] = 256;
            u64 sum = above;
#pragma unroll 1
            for (u32 digit = 256; digit-- > 0;) {
                if (sum + bins[digit] >= target) {
                    found[0] = digit, found[1] = sum, found[2] = bins[digit];
                    break;
                }
                sum += bins[digit];
            }
        }
        __syncthreads();
        if (found[0] == 256) return;
        prefix |= u32(found[0]) << shift;
        above = found[1];
        if (shift == 0) break;
    }
    const u64 each = IS_WEIGHED ? weight_of(of_ascending(prefix)) : u64(1), missing = target - above;
    const u64 all = each == 0 ? 1 : found[2] / each;
    const u64 wanted = each == 0 ? 1 : (missing + each - 1) / each;
    row.threshold = prefix;
    row.num_equal = u32(MUTATE(3, min(wanted, all), all));
}

extern "C" __global__ void __launch_bounds__(THREADS)
sample(const float* logits, const SampleJob* samples, u32 vocab, u32* out, float* logprobs) {
    SHARED_ARRAY(u64, bins, 256);
    SHARED_ARRAY(u64, found, 3);
    SHARED_ARRAY(u64, warp_best, WARPS);
    SHARED_ARRAY(u64, warp_above, WARPS);
    SHARED_ARRAY(u32, warp_equal, WARPS);
    SHARED_ARRAY(double, halves, THREADS);
    const SampleJob job = samples[blockIdx.x];
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    Row row = {logits + u64(job.row) * vocab, vocab, 0.0f, job.temperature, fminf(job.min_p, 1.0f), 0, 0};

    // The highest logit with the lowest id, as one number.
    u64 best = 0;
    for (u32 token = threadIdx.x; token < vocab; token += THREADS) {
        const u64 candidate = u64(ascending(clean(row.logits[token]))) << 32 | MUTATE(4, u32(~token), token);
        best = max(best, candidate);
    }
    for (int with = 16; with > 0; with /= 2) best = max(best, __shfl_xor_sync(FULL_WARP, best, with));
    if (lane == 0) warp_best[warp] = best;
    __syncthreads();
    for (u32 w = 0; w < WARPS; ++w) best = max(best, warp_best[w]);
    row.max = of_ascending(u32(best >> 32));
    u32 token = ~u32(best);

    if (job.temperature >= 1e-5f && row.max != NO_LOGIT) {
        if (job.top_k > 0) keep_top<false>(row, job.top_k, bins, found);
        // Every warp sums one stretch of ids, 64-bit sums of what is above the threshold and counts of equals.
        const u32 stretch = (vocab + WARPS - 1) / WARPS, start = min(warp * stretch, vocab), end = min(start + stretch, vocab);
        for (u32 round = job.top_p < 1.0f ? 0 : 1; round < 2; ++round) {
            u64 above = 0;
            u32 equal = 0;
#pragma unroll 1
            for (u32 i = start + lane; i < end; i += 32) {
                const u32 key = row.key(i);
                if (key > row.threshold) above += weight_of(of_ascending(key));
                if (key == row.threshold && key != 0) ++equal;
            }
            for (int with = 16; with > 0; with /= 2) {
                above += __shfl_xor_sync(FULL_WARP, above, with);
                equal += __shfl_xor_sync(FULL_WARP, equal, with);
            }
            __syncthreads();
            if (lane == 0) warp_above[warp] = above, warp_equal[warp] = equal;
            __syncthreads();
            if (round == 0) {
                u64 total = row.threshold ? weight_of(of_ascending(row.threshold)) * row.num_equal : 0;
                for (u32 w = 0; w < WARPS; ++w) total += warp_above[w];
                const u64 target = u64(double(job.top_p) * double(total));
                keep_top<true>(row, max(MUTATE(5, target, total), u64(1)), bins, found);
            }
        }
        // The stretch in which the running sum exceeds the target.
        const u64 each = row.threshold ? weight_of(of_ascending(row.threshold)) : 0;
        u64 total = 0;
        u32 equals_left = row.num_equal;
#pragma unroll 1
        for (u32 w = 0; w < WARPS; ++w) {
            const u32 kept = min(warp_equal[w], equals_left);
            total += warp_above[w] + each * kept;
            equals_left -= kept;
        }
        const u64 target = min(u64(uniform(job.seed, job.choice, job.position) * double(total)), total - 1);
        u64 before = 0, after = 0;
        equals_left = row.num_equal;
        u32 owner = 0;
#pragma unroll 1
        for (; owner < WARPS; ++owner) {
            const u32 kept = min(warp_equal[owner], equals_left);
            after = before + warp_above[owner] + each * kept;
            if (after > target) break;
            before = after, equals_left -= kept;
        }
        if (warp == owner) {
            for (u32 first = start; first < end; first += 32) {
                const u32 key = first + lane < end ? row.key(first + lane) : 0;
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
                    if (lane == 0) found[0] = first + u32(__ffs(exceeds)) - 1;
                    break;
                }
                before += __shfl_sync(FULL_WARP, sum, 31);
                equals_left -= min(u32(__popc(equals)), equals_left);
            }
        }
        __syncthreads();
        token = u32(found[0]);
    }
    if (threadIdx.x == 0) out[blockIdx.x] = token;
    if (!logprobs) return;

    const float* raw = logits + u64(job.raw_row) * vocab;
    float highest = NO_LOGIT;
    for (u32 i = threadIdx.x; i < vocab; i += THREADS) highest = fmaxf(highest, raw[i]);
    highest = warp_max(highest);
    __syncthreads();
    if (lane == 0) warp_best[warp] = ascending(highest);
    __syncthreads();
    for (u32 w = 0; w < WARPS; ++w) highest = fmaxf(highest, of_ascending(u32(warp_best[w])));
    double sum = 0.0;
    for (u32 i = threadIdx.x; i < vocab; i += THREADS) sum += double(own_exp(raw[i] - highest));
    halves[threadIdx.x] = sum;
    for (u32 half = THREADS / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) halves[threadIdx.x] += halves[threadIdx.x + half];
    }
    __syncthreads();
    if (threadIdx.x == 0) logprobs[blockIdx.x] = float(double(raw[token] - highest) - log(MUTATE(6, halves[0], 1.0)));
}
