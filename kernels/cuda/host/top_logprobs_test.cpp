#include "../top_logprobs.cu"
#include "harness.h"

static void compare(fibres::Order order, const Device<float>& logits, u32 vocab, const std::vector<TopJob>& jobs) {
    auto device_jobs = on_device(jobs);
    Device<u32> ids(jobs.size() * TOP_MAX);
    Device<float> logprobs(ids.size());
    LAUNCH(order, u32(jobs.size()), 512, 0, top_logprobs, logits.get(), device_jobs.get(), vocab, ids.get(),
           logprobs.get());
    for (size_t job = 0; job < jobs.size(); ++job) {
        const float* row = logits.get() + size_t(jobs[job].row) * vocab;
        std::vector<std::pair<float, u32>> all;
        double sum = 0;
        for (u32 i = 0; i < vocab; ++i) all.push_back({std::isnan(row[i]) ? INFINITY : -row[i], i});
        std::sort(all.begin(), all.end());
        for (u32 i = 0; i < vocab; ++i) sum += std::exp(double(-all[i].first) + all[0].first);
        for (u32 i = 0; i < TOP_MAX; ++i) {
            const size_t at = job * TOP_MAX + i;
            expect_same(ids[at], i < jobs[job].num ? all[i].second : 0xffffffffu, "token", at);
            if (i >= jobs[job].num) continue;
            const double want = double(-all[i].first) + all[0].first - std::log(sum);
            if (std::isinf(want)) expect_same(bits_of(logprobs[at]), 0xff800000u, "logprob", at);
            else expect_close(logprobs[at], want, 2e-6, "logprob", at);
        }
    }
}

TEST(the_most_likely_come_first_and_lower_ids_among_equals) {
    for (u32 vocab : {20u, 511u, 2100u}) {
        auto logits = random_values<float>(3 * vocab, -8, 8);
        // Many equal ones, in tokens of one thread and of others; and a row in which hardly any is likely.
        for (u32 i = 0; i < vocab; ++i) logits[vocab + i] = float(random_below(4));
        for (u32 i = 0; i < vocab; ++i) logits[2 * vocab + i] = i % 9 == 4 ? float(i % 5) : -INFINITY;
        compare(order, logits, vocab, {{2, 20}, {0, 20}, {1, 20}, {0, 1}, {1, 7}, {2, 3}});
    }
}

// One thread has all of them.
TEST(the_tokens_of_one_thread_can_be_the_most_likely) {
    const u32 vocab = 512 * 40 + 3;
    auto logits = random_values<float>(vocab, -8, 0);
    for (u32 j = 0; j < 40; ++j) logits[77 + 512 * j] = 1.0f + float(j * 7 % 13);
    logits[5] = std::nanf("");
    Device<float> without(vocab);
    for (u32 i = 0; i < vocab; ++i) without[i] = i == 5 ? -INFINITY : float(logits[i]);
    compare(order, without, vocab, {{0, 20}});
    auto job = on_device<TopJob>({{0, 20}});
    Device<u32> ids(TOP_MAX), expected(TOP_MAX);
    Device<float> logprobs(TOP_MAX);
    LAUNCH(order, 1, 512, 0, top_logprobs, without.get(), job.get(), vocab, expected.get(), logprobs.get());
    LAUNCH(order, 1, 512, 0, top_logprobs, logits.get(), job.get(), vocab, ids.get(), logprobs.get());
    for (u32 i = 0; i < TOP_MAX; ++i) expect_same(ids[i], expected[i], "token", i);
}
