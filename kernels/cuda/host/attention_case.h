// A batch of sequences in a paged pool, and the attention they should get.
//
// Blocks lie anywhere in the pool. All that belongs to no token is NaN, also the rest of a sequence's own last
// block, and block tables name a block far outside for what a window hides.
#pragma once

#include "../attention_job.cuh"
#include "harness.h"

struct Sequence {
    u32 first_position; // of its rows; everything before is in the pool already
    u32 num_rows;
};

struct Shape {
    u32 num_heads, num_kv_heads, head_dim, block_size;
    u32 window;
    float softcap;
    bool has_sinks;
};

template <typename T>
struct AttentionCase {
    static constexpr u32 LAYERS = 2, LAYER = 1;
    Shape shape;
    std::vector<Sequence> sequences;
    std::vector<u32> first_rows, table_starts;
    AttentionJob job;
    u32 num_rows = 0;
    Device<T> pool{0}, q{0}, out{0};
    Device<u32> block_tables{0};
    Device<float> sinks{0};

    AttentionCase(const Shape& shape, const std::vector<Sequence>& sequences) : shape(shape), sequences(sequences) {
        const u32 kv_heads = shape.num_kv_heads, dim = shape.head_dim, size = shape.block_size;
        u32 num_blocks = 3;
        for (const Sequence& s : sequences) num_blocks += (s.first_position + s.num_rows + size - 1) / size;
        job = {{num_blocks, size, kv_heads, dim}, LAYER, shape.num_heads, 1.5f / std::sqrt(float(dim)), shape.softcap, shape.window};
        pool = Device<T>(size_t(LAYERS) * num_blocks * size * 2 * kv_heads * dim);
        const std::vector<u32> blocks = random_choice(num_blocks - 3, num_blocks);
        std::vector<u32> tables;
        u32 next = 0;
        for (const Sequence& s : sequences) {
            first_rows.push_back(num_rows);
            num_rows += s.num_rows;
            table_starts.push_back(u32(tables.size()));
            const u32 end = s.first_position + s.num_rows, seen = first_seen(s.first_position);
            for (u32 start = 0; start < end; start += size, ++next)
                tables.push_back(start + size <= seen ? 0xfffffffu : blocks[next]);
            for (u32 position = seen; position < end; ++position)
                for (u32 i = 0; i < kv_heads * dim; ++i)
                    for (u32 plane = 0; plane < 2; ++plane)
                        set(&pool[at(tables[table_starts.back() + position / size], position, plane, i / dim, i % dim)],
                            random_between(-2, 2));
        }
        block_tables = on_device(tables);
        q = random_values<T>(size_t(num_rows) * shape.num_heads * dim);
        out = Device<T>(q.size());
        sinks = random_values<float>(shape.num_heads, 3, 6);
    }

    const float* sinks_or_null() const { return shape.has_sinks ? sinks.get() : nullptr; }

    u32 first_seen(u32 position) const {
        return shape.window && position + 1 > shape.window ? position + 1 - shape.window : 0;
    }

    // [layer][block][granule][K, V][head][16][dim]
    size_t at(u32 block, u32 position, u32 plane, u32 head, u32 feature) const {
        const size_t granule = (size_t(LAYER) * job.kv.num_blocks + block) * (shape.block_size / 16) + position % shape.block_size / 16;
        return (((granule * 2 + plane) * shape.num_kv_heads + head) * 16 + position % 16) * shape.head_dim + feature;
    }

    // Compares every row of `out` with the definition of attention.
    void expect(double tolerance) const {
        const u32 dim = shape.head_dim, group = shape.num_heads / shape.num_kv_heads;
        for (size_t s = 0; s < sequences.size(); ++s)
            for (u32 row = 0; row < sequences[s].num_rows; ++row)
                for (u32 head = 0; head < shape.num_heads; ++head) {
                    const size_t base = (size_t(first_rows[s] + row) * shape.num_heads + head) * dim;
                    const u32 position = sequences[s].first_position + row;
                    double sum = shape.has_sinks ? std::exp(double(sinks[head])) : 0;
                    std::vector<double> values(dim, 0.0);
                    for (u32 p = first_seen(position); p <= position; ++p) {
                        const u32 block = block_tables[table_starts[s] + p / shape.block_size];
                        double score = 0;
                        for (u32 i = 0; i < dim; ++i)
                            score += double(value_of(q[base + i])) * value_of(pool[at(block, p, 0, head / group, i)]);
                        score *= job.scale;
                        if (shape.softcap != 0) score = shape.softcap * std::tanh(score / shape.softcap);
                        const double weight = std::exp(score);
                        sum += weight;
                        for (u32 i = 0; i < dim; ++i) values[i] += weight * value_of(pool[at(block, p, 1, head / group, i)]);
                    }
                    for (u32 i = 0; i < dim; ++i)
                        expect_close(value_of(out[base + i]), values[i] / sum, tolerance, "out", base + i);
                }
    }
};
