#include "../digest.cu"
#include "harness.h"

// The function as it is defined, one stripe after the other.
struct Reference {
    u64 acc[8];
    static u64 read(const unsigned char* at) {
        u64 value;
        std::memcpy(&value, at, 8);
        return value;
    }
    void stripe(const unsigned char* data, const unsigned char* secret) {
        for (int i = 0; i < 8; ++i) {
            const u64 value = read(data + 8 * i), keyed = value ^ read(secret + 8 * i);
            acc[i ^ 1] += value;
            acc[i] += (keyed & 0xffffffff) * (keyed >> 32);
        }
    }
    u64 fold(const unsigned char* secret, u64 result) const {
        for (int i = 0; i < 4; ++i) {
            const u64 a = acc[2 * i] ^ read(secret + 16 * i), b = acc[2 * i + 1] ^ read(secret + 16 * i + 8);
            const u64 low = (a & 0xffffffff) * (b & 0xffffffff), middle = (a >> 32) * (b & 0xffffffff);
            const u64 other = (a & 0xffffffff) * (b >> 32), high = (a >> 32) * (b >> 32);
            const u64 cross = (low >> 32) + (middle & 0xffffffff) + other;
            result += ((low & 0xffffffff) | cross << 32) ^ (high + (middle >> 32) + (cross >> 32));
        }
        result = (result ^ result >> 37) * 0x165667919e3779f9ull;
        return result ^ result >> 32;
    }
    std::pair<u64, u64> of(const std::vector<unsigned char>& data, const unsigned char* secret) {
        const u64 start[8] = {0xc2b2ae3dull,         0x9e3779b185ebca87ull, 0xc2b2ae3d27d4eb4full, 0x165667b19e3779f9ull,
                              0x85ebca77c2b2ae63ull, 0x85ebca77ull,         0x27d4eb2f165667c5ull, 0x9e3779b1ull};
        std::memcpy(acc, start, sizeof acc);
        const size_t size = data.size(), blocks = (size - 1) / 1024;
        for (size_t block = 0; block <= blocks; ++block) {
            const size_t stripes = block < blocks ? 16 : (size - 1 - 1024 * blocks) / 64;
            for (size_t s = 0; s < stripes; ++s) stripe(&data[block * 1024 + s * 64], secret + 8 * s);
            for (int i = 0; i < 8 && block < blocks; ++i)
                acc[i] = (acc[i] ^ acc[i] >> 47 ^ read(secret + 128 + 8 * i)) * 0x9e3779b1ull;
        }
        stripe(&data[size - 64], secret + 192 - 64 - 7);
        return {fold(secret + 11, size * 0x9e3779b185ebca87ull), fold(secret + 192 - 64 - 11, ~(size * 0xc2b2ae3d27d4eb4full))};
    }
};

// Pieces of the whole, cut at these places, lie in a pool in another order.
static void digested(fibres::Order order, size_t size, std::vector<size_t> cuts) {
    std::vector<unsigned char> data(size);
    for (auto& byte : data) byte = u8(random_below(256));
    Device<unsigned char> pool(size + 128);
    cuts.push_back(size);
    std::vector<DigestPiece> pieces;
    size_t offset = size + 64, start = 0;
    for (size_t end : cuts) {
        offset -= end - start;
        std::copy(data.begin() + start, data.begin() + end, pool.get() + offset);
        pieces.push_back({offset, end});
        start = end;
    }
    auto device_pieces = on_device(pieces);
    Device<u64> out(2);
    LAUNCH(order, 1, 1024, 0, digest_pieces, pool.get(), device_pieces.get(), u64(size), out.get());
    unsigned char secret[192];
    const u64 words[24] = {
    0xbe4ba423396cfeb8ull, 0x1cad21f72c81017cull, 0xdb979083e96dd4deull, 0x1f67b3b7a4a44072ull,
    0x78e5c0cc4ee679cbull, 0x2172ffcc7dd05a82ull, 0x8e2443f7744608b8ull, 0x4c263a81e69035e0ull,
    0xcb00c391bb52283cull, 0xa32e531b8b65d088ull, 0x4ef90da297486471ull, 0xd8acdea946ef1938ull,
    0x3f349ce33f76faa8ull, 0x1d4f0bc7c7bbdcf9ull, 0x3159b4cd4be0518aull, 0x647378d9c97e9fc8ull,
    0xc3ebd33483acc5eaull, 0xeb6313faffa081c5ull, 0x49daf0b751dd0d17ull, 0x9e68d429265516d3ull,
    0xfca1477d58be162bull, 0xce31d07ad1b8f88full, 0x280416958f3acb45ull, 0x7e404bbbcafbd7afull,
    };
    std::memcpy(secret, words, sizeof secret);
    const auto [low, high] = Reference().of(data, secret);
    expect_same(out[0], low, "the lower half of the digest of bytes", size);
    expect_same(out[1], high, "the upper half of the digest of bytes", size);
}

TEST(pieces_have_the_digest_of_the_whole) {
    digested(order, 256, {});
    digested(order, 1024, {512});
    digested(order, 1024 + 64, {64, 128, 640});
    digested(order, 2048, {1536});
    digested(order, 40 * 1024 + 192, {4096, 4160, 33 * 1024, 36 * 1024 + 576});
    digested(order, 65 * 1024, {});
}
