// Products of 8-bit weights with a scale for each row, and of activations quantized as they come (W8A8).
//
//   w8a8_quantize        codes[m, k] and scales[m] of x[m, k]
//   w8a8_matmul          few rows: as fast as the weights can be read
//   w8a8_matmul_tiled    many rows: tiles of 128 rows and 128 columns
//
//   out[m, n] = (sum over k of x[m, k] * w[n, k]) * (x_scales[m] * w_scales[n])  (+ bias[n])  (+ out[m, n] where `add`)
//
//   x bf16 [m, k] before it is quantized; codes s8 [m, k] and [n, k]; scales f32 [m] and [n]; bias f32 [n] or null; out
//   f32 rows of `width`, of which these are n columns. k is a multiple of 16, and below 2^17.
//
// A row of x becomes integers as on the CPU (kernels/src/quantized/activations.rs): max = its largest magnitude, scale
// = max / 127, code = x * (127 / max) to the nearest, half to even; all 0 where max is below 1e-30, not finite or no
// number. Sums are exact, in any order, and behind them there are the CPU's roundings: both products give a row the
// CPU's bits for the same x, whatever else is in the step.
//
// Grids: (m) of 256 threads; (ceil(n / 16), ceil(m / 16)) of 256; (ceil(n / 128), ceil(m / 128)) of 256, with
// W8A8_SHARED bytes.
#include "few_rows.cuh"

extern "C" __global__ void __launch_bounds__(256)
w8a8_quantize(const bf16* x, u8* codes, float* scales, u32 k) {
    SHARED_ARRAY(u32, warp_max_bits, 8);
    begin_launch();
    const bf16* row = x + u64(blockIdx.x) * k;
    // As integers magnitudes are ordered as they are, with what is no number above all.
    u32 bits = 0;
    for (u32 at = threadIdx.x * 8; at < k; at += 256 * 8) {
        const uint4 eight = *reinterpret_cast<const uint4*>(row + at);
        const u32 pairs[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
        for (u32 i = 0; i < 4; ++i) bits = max(bits, max(pairs[i] << 16 & 0x7fffffffu, pairs[i] & 0x7fff0000u));
    }
    for (int with = 16; with > 0; with /= 2) bits = max(bits, __shfl_xor_sync(FULL_WARP, bits, with));
    if (threadIdx.x % 32 == 0) warp_max_bits[threadIdx.x / 32] = bits;
    __syncthreads();
    for (u32 w = 0; w < 8; ++w) bits = max(bits, MUTATE(1, warp_max_bits[w], bits));
    const float largest = __uint_as_float(bits);
    const bool is_zero = largest < MUTATE(2, 1e-30f, 0.0f);
    const float reciprocal = is_zero ? 0.0f : 127.0f / largest;
    if (threadIdx.x == 0) scales[blockIdx.x] = is_zero ? 0.0f : largest / 127.0f;
    for (u32 at = threadIdx.x * 8; at < k; at += 256 * 8) {
        const uint4 eight = *reinterpret_cast<const uint4*>(row + at);
        const u32 pairs[4] = {eight.x, eight.y, eight.z, eight.w};
        u32 quads[2] = {};
#pragma unroll
        for (u32 i = 0; i < 8; ++i) {
            const float scaled = __uint_as_float(pairs[i / 2] >> (i % 2 * 16) << 16) * reciprocal;
            // Adding it rounds to an integer, held in the low bits.
            const float magic = 12582912.0f, kept = fabsf(scaled) < 128.0f ? scaled : MUTATE(3, 0.0f, 1.0f);
            quads[i / 4] |= (__float_as_uint(kept + magic) & 255u) << (i % 4 * 8);
        }
        *reinterpret_cast<uint2*>(codes + u64(blockIdx.x) * k + at) = make_uint2(quads[0], quads[1]);
    }
}

// What ends a sum.
__device__ __forceinline__ void put(float* to, int dot, float x_scale, float w_scale, const float* bias, u32 add) {
    float sum = fmaf(float(dot), x_scale * w_scale, 0.0f);
    if (bias) sum += MUTATE(4, *bias, 0.0f);
    *to = add ? *to + MUTATE(5, sum, 0.0f) : sum;
}

extern "C" __global__ void __launch_bounds__(256, 2)
w8a8_matmul(const u8* x, const float* x_scales, const u8* w,
            const float* w_scales, const float* bias, float* out, u32 m, u32 n,
            u32 k, u32 width, u32 add) {
    SHARED_ARRAY(int, partial, 8 * 16 * 16);
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const u32 first_row = blockIdx.y * 16, first_column = blockIdx.x * 16;
    // Chunks of weights of a warp that are on their way: 64 KB for two blocks.
    constexpr u32 DEPTH = 4;
    uint4 ring[DEPTH][2];
    const auto load_weights = [&](uint4(&to)[2], u32 chunk) {
        const u32 at = chunk * 64 + t * 16;
#pragma unroll
        for (u32 i = 0; i < 2; ++i) {
            const u32 column = first_column + g + 8 * i;
            const bool is_there = at < k && column < n;
            to[i] = load_once_16(w + (is_there ? u64(column) * k + at : 0), is_there);
        }
    };
#pragma unroll
    for (u32 depth = 0; depth < DEPTH; ++depth) load_weights(ring[depth], warp + 8 * depth);
    begin_launch(); // which writes no weights
    int acc[2][4] = {};
    // Which k an `mma` calls its first is free as long as both operands agree: a lane takes 16 in a row.
#pragma unroll 1
    for (u32 first = warp; first * 64 < k; first += 8 * DEPTH) {
#pragma unroll
        for (u32 depth = 0; depth < DEPTH; ++depth) {
            const u32 chunk = first + 8 * depth, at = chunk * 64 + t * 16;
            uint4 a[2];
#pragma unroll
            for (u32 i = 0; i < 2; ++i) {
                const u32 row = first_row + g + 8 * i;
                const bool is_there = at < k && row < m;
                a[i] = load_16(x + (is_there ? u64(row) * k + at : 0), is_there);
            }
            const u32 low[4] = {a[0].x, a[1].x, a[0].y, a[1].y};
            const u32 high[4] = {a[0].z, a[1].z, a[0].w, MUTATE(6, a[1].w, a[0].w)};
#pragma unroll
            for (u32 i = 0; i < 2; ++i) {
                mma_s8(acc[i], low, ring[depth][i].x, ring[depth][i].y);
                mma_s8(acc[i], high, ring[depth][i].z, ring[depth][i].w);
            }
            load_weights(ring[depth], chunk + 8 * DEPTH);
        }
    }
    put_sums(partial, acc);
    const u32 row = first_row + threadIdx.x / 16, column = first_column + threadIdx.x % 16;
    if (row >= m || column >= n) return;
    const int dot = sum_of(partial, threadIdx.x);
    put(out + u64(row) * width + column, dot, x_scales[row], w_scales[column], bias ? bias + column : nullptr, add);
}

// A stage has 64 of k of 128 rows of either operand, each a line of four times 16 bytes, which every other line has in
// another order: neither 8 lines, as `ldmatrix` reads them, nor 2, as they are written, meet in a bank.
#define TILE 128
#define STAGES 3
#define LINE 64
#define STAGE_BYTES (2 * TILE * LINE)
#define W8A8_SHARED (STAGES * STAGE_BYTES)

// Where the 16 bytes `piece` of a line are.
__device__ __forceinline__ u32 place_in_stage(u32 line, u32 piece) { return line * LINE + (piece ^ line / 2 % 4) * 16; }

// Warps are 2 x 4, each with 64 rows and 32 columns.
extern "C" __global__ void __launch_bounds__(256)
w8a8_matmul_tiled(const u8* x, const float* x_scales, const u8* w,
                  const float* w_scales, const float* bias, float* out, u32 m,
                  u32 n, u32 k, u32 width, u32 add) {
    DYNAMIC_SHARED(shared);
    begin_launch();
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const u32 first_row = blockIdx.y * TILE, first_column = blockIdx.x * TILE;
    const u32 warp_row = warp / 4 * 64, warp_column = warp % 4 * 32, num_steps = (k + 63) / 64;
    const auto fetch = [&](u32 step) {
        unsigned char* to = shared + step % STAGES * STAGE_BYTES;
        for (u32 i = threadIdx.x; step < num_steps && i < TILE * 4; i += 256) {
            const u32 line = i / 4, at = step * 64 + i % 4 * 16, row = first_row + line, column = first_column + line;
            const bool is_row = at < k && row < m, is_column = at < k && column < n;
            copy_async_16(to + place_in_stage(line, i % 4), is_row ? x + u64(row) * k + at : x, is_row);
            copy_async_16(to + place_in_stage(TILE + line, i % 4), is_column ? w + u64(column) * k + at : w, is_column);
        }
        copy_commit();
    };
    int acc[4][4][4] = {};
    fetch(0);
    fetch(1);
#pragma unroll 1
    for (u32 step = 0; step < num_steps; ++step) {
        if (MUTATE(8, true, false)) copy_wait<1>();
        // All have it, and all have read what the next copies overwrite.
        if (MUTATE(9, true, false)) __syncthreads();
        fetch(step + 2);
        const unsigned char* from = shared + step % STAGES * STAGE_BYTES;
#pragma unroll
        for (u32 half = 0; half < 2; ++half) {
            u32 a[4][4], b[2][4];
#pragma unroll
            for (u32 i = 0; i < 4; ++i)
                ldmatrix_x4<false>(a[i], from + place_in_stage(warp_row + i * 16 + lane % 16, half * 2 + lane / 16));
#pragma unroll
            for (u32 j = 0; j < 2; ++j)
                ldmatrix_x4<false>(b[j], from + place_in_stage(TILE + warp_column + j * 16 + lane / 16 * 8 + lane % 8,
                                                               half * 2 + MUTATE(10, lane / 8 % 2, 0u)));
#pragma unroll
            for (u32 i = 0; i < 4; ++i)
#pragma unroll
                for (u32 j = 0; j < 4; ++j) mma_s8(acc[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
        }
    }
#pragma unroll
    for (u32 i = 0; i < 4; ++i)
#pragma unroll
        for (u32 e = 0; e < 16; ++e) {
            const u32 row = first_row + warp_row + i * 16 + g + e % 4 / 2 * 8;
            const u32 column = first_column + warp_column + e / 4 * 8 + 2 * t + e % 2;
            if (row < m && column < n)
                put(out + u64(row) * width + column, acc[i][e / 4][e % 4], x_scales[row], w_scales[column],
                    bias ? bias + column : nullptr, add);
        }
}
