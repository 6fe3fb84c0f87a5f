// The digest of bytes that lie in pieces: XXH3 of 128 bits with seed 0 and the standard secret, as the host makes it.
//
//   pool       where offsets count from, at a multiple of 8
//   pieces     [_] offset of a piece, where it ends in the whole; each a multiple of 64 bytes at a multiple of 8
//   num_bytes  of the whole, at least 256
//   out        u64 [2]: the lower half, the upper half
//
// The function is defined over stripes of 64 bytes, 8 words each, 16 to a block of 1024:
//   in a block    acc[i] += low(w ^ key) * high(w ^ key);  acc[i ^ 1] += w      for word i of every stripe
//   behind it     acc[i] = (acc[i] ^ acc[i] >> 47 ^ key) * PRIME32_1            not behind the last, which may be short
//   at the end    the last 64 bytes once more, with other keys; then both halves are folded from all acc
// What a block adds does not depend on the acc before it: 31 warps sum a block each, and one walks from block to block,
// while the others are a round ahead of it and write elsewhere. That walk is what the time of a digest is; it takes some
// 30 cycles for a block, in which the others' loads have to come: four from each thread at once.
//
// Grid (1), 1,024 threads.
#include "device.cuh"

#define ROUND_BLOCKS 31
#define PRIME32_1 0x9e3779b1ull
#define PRIME64_1 0x9e3779b185ebca87ull
#define PRIME64_2 0xc2b2ae3d27d4eb4full

struct DigestPiece {
    u64 offset;
    u64 end; // in the whole; it begins where the one before it ends
};

CONSTANT_ARRAY(u64, SECRET, 24) = {
    0xbe4ba423396cfeb8ull, 0x1cad21f72c81017cull, 0xdb979083e96dd4deull, 0x1f67b3b7a4a44072ull,
    0x78e5c0cc4ee679cbull, 0x2172ffcc7dd05a82ull, 0x8e2443f7744608b8ull, 0x4c263a81e69035e0ull,
    0xcb00c391bb52283cull, 0xa32e531b8b65d088ull, 0x4ef90da297486471ull, 0xd8acdea946ef1938ull,
    0x3f349ce33f76faa8ull, 0x1d4f0bc7c7bbdcf9ull, 0x3159b4cd4be0518aull, 0x647378d9c97e9fc8ull,
    0xc3ebd33483acc5eaull, 0xeb6313faffa081c5ull, 0x49daf0b751dd0d17ull, 0x9e68d429265516d3ull,
    0xfca1477d58be162bull, 0xce31d07ad1b8f88full, 0x280416958f3acb45ull, 0x7e404bbbcafbd7afull,
};
CONSTANT_ARRAY(u64, START, 8) = {
    0xc2b2ae3dull, PRIME64_1, PRIME64_2, 0x165667b19e3779f9ull, 0x85ebca77c2b2ae63ull, 0x85ebca77ull,
    0x27d4eb2f165667c5ull, PRIME32_1,
};

// 8 bytes of the secret, which may begin anywhere.
__device__ __forceinline__ u64 secret_at(u32 byte) {
    const u32 shift = byte % 8 * 8;
    return shift == 0 ? SECRET[byte / 8] : SECRET[byte / 8] >> shift | SECRET[byte / 8 + 1] << (64 - shift);
}

// The two halves of a product of 128 bits, xored.
__device__ __forceinline__ u64 fold_product(u64 a, u64 b) {
#ifdef __CUDACC__
    return a * b ^ __umul64hi(a, b);
#else
    const unsigned __int128 product = (unsigned __int128)a * b;
    return u64(product) ^ u64(product >> 64);
#endif
}

__device__ __forceinline__ u64 fold_all(const u64* acc, u32 secret, u64 start) {
    u64 result = start;
#pragma unroll
    for (u32 i = 0; i < 4; ++i)
        result += fold_product(acc[2 * i] ^ secret_at(secret + 16 * i), acc[2 * i + 1] ^ secret_at(secret + 16 * i + 8));
    result ^= result >> 37;
    result *= 0x165667919e3779f9ull;
    return result ^ result >> 32;
}

// Walks forward through the pieces.
struct Cursor {
    const unsigned char* pool;
    const DigestPiece* piece;
    u64 start; // of the piece, in the whole

    // The bytes from `at` on, of which as many lie there as the piece has left.
    __device__ const unsigned char* move_to(u64 at) {
        while (at >= piece->end) start = MUTATE(1, piece->end, 0ull), ++piece;
        return pool + piece->offset + (at - start);
    }
    __device__ u64 word_at(u64 at) { return *reinterpret_cast<const u64*>(move_to(at)); }
};

extern "C" __global__ void __launch_bounds__(1024)
digest_pieces(const unsigned char* pool, const DigestPiece* pieces, u64 num_bytes,
              u64* out) {
    SHARED_ARRAY(u64, both_sums, 2 * ROUND_BLOCKS * 8);
    begin_launch();
    // A lane has word `word` of the stripes `stripe`, `stripe` + 4, ... of a block.
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, word = lane % 8, stripe = lane / 8;
    const u64 last_block = (num_bytes - 1) / 1024, num_stripes = (num_bytes - 1) / 64;
    u64 keys[4];
#pragma unroll
    for (u32 i = 0; i < 4; ++i) keys[i] = SECRET[stripe + 4 * i + word];
    const u64 key = SECRET[16 + word];
    Cursor cursor{pool, pieces, 0};
    u64 acc = START[word];
    for (u64 first = 0; first <= last_block; first += ROUND_BLOCKS) {
        u64* sums = both_sums + first / ROUND_BLOCKS % 2 * (ROUND_BLOCKS * 8);
        const u64 block = first + warp - 1;
        if (warp > 0 && block <= last_block) {
            const unsigned char* at = cursor.move_to(block * 1024);
            const bool is_whole = (block + 1) * 1024 <= MUTATE(6, cursor.piece->end, num_bytes);
            u64 values[4], products = 0, words = 0;
#pragma unroll
            for (u32 i = 0; i < 4; ++i) {
                values[i] = 0;
                if (is_whole) values[i] = *reinterpret_cast<const u64*>(at + (stripe + 4 * i) * 64 + word * 8);
            }
#pragma unroll
            for (u32 i = 0; i < 4; ++i) {
                const u64 of = block * 16 + stripe + 4 * i;
                if (of >= num_stripes) break;
                const u64 value = is_whole ? values[i] : cursor.word_at(of * 64 + word * 8), keyed = value ^ keys[i];
                products += (keyed & 0xffffffffull) * (keyed >> 32);
                words += value;
            }
            u64 sum = products + __shfl_xor_sync(FULL_WARP, words, MUTATE(2, 1, 2));
            sum += __shfl_xor_sync(FULL_WARP, sum, 8);
            sum += __shfl_xor_sync(FULL_WARP, sum, 16);
            if (lane < 8) sums[(warp - 1) * 8 + lane] = sum;
        }
        if (MUTATE(4, true, false)) __syncthreads();
        if (warp != 0) continue;
        const u32 num_blocks = u32(min(u64(ROUND_BLOCKS), last_block + 1 - first));
#pragma unroll 4
        for (u32 b = 0; b < num_blocks; ++b) {
            acc += sums[b * 8 + word];
            if (first + b < MUTATE(3, last_block, last_block + 1)) {
                acc ^= acc >> 47 ^ key;
                acc *= PRIME32_1;
            }
        }
    }
    if (warp != 0) return;
    const u64 value = cursor.word_at(num_bytes - 64 + word * 8), keyed = value ^ secret_at(MUTATE(5, 121, 128) + 8 * word);
    acc += (keyed & 0xffffffffull) * (keyed >> 32) + __shfl_xor_sync(FULL_WARP, value, 1);
    __syncwarp(); // all lanes have read the last sums
    if (lane < 8) both_sums[lane] = acc;
    __syncwarp();
    if (lane == 0) out[0] = fold_all(both_sums, 11, num_bytes * PRIME64_1);
    if (lane == 1) out[1] = fold_all(both_sums, 117, ~(num_bytes * PRIME64_2));
}
