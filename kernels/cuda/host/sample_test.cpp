#include "../sample.cu"
#include "harness.h"

// The steps of the contract on a sorted list, sums in double.
static u32 drawn(const float* logits, u32 vocab, const SampleJob& job, double uniform) {
    std::vector<std::pair<float, u32>> all;
    for (u32 i = 0; i < vocab; ++i) {
        const float x = std::isnan(logits[i]) ? -INFINITY : std::min(logits[i], 3.402823466e38f);
        all.push_back({-x, i});
    }
    std::sort(all.begin(), all.end());
    if (job.temperature < 1e-5f) return all[0].second;
    const float max = -all[0].first;
    const auto weight = [&](const std::pair<float, u32>& one) { return std::exp(double((-one.first - max) / job.temperature)); };
    size_t kept = 0;
    while (kept < vocab && weight(all[kept]) >= job.min_p) ++kept;
    if (job.top_k) kept = std::min(kept, size_t(job.top_k));
    double total = 0, sum = 0;
    for (size_t i = 0; i < kept; ++i) total += weight(all[i]);
    for (size_t i = 0; i < kept && job.top_p < 1; ++i) {
        sum += weight(all[i]);
        if (sum >= double(job.top_p) * total) kept = i + 1;
    }
    all.resize(kept);
    std::sort(all.begin(), all.end(), [](const auto& a, const auto& b) { return a.second < b.second; });
    total = 0, sum = 0;
    for (const auto& one : all) total += weight(one);
    for (const auto& one : all)
        if ((sum += weight(one)) > uniform * total) return one.second;
    return all.back().second;
}

// Of the protocol's table in kernels/src/uniform.rs; the others by the formula there.
static double uniform_of(u64 seed, u32 choice, u32 position) {
    const auto mix = [](u64 z) {
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
        return z ^ (z >> 31);
    };
    const u64 golden = 0x9e3779b97f4a7c15ull;
    return double(mix((mix((mix(seed + golden) ^ choice) + golden) ^ position) + golden) >> 11) / 9007199254740992.0;
}

static void compare(fibres::Order order, const Device<float>& logits, u32 vocab, const std::vector<SampleJob>& jobs) {
    auto device_jobs = on_device(jobs);
    Device<u32> out(jobs.size());
    LAUNCH(order, u32(jobs.size()), 512, 0, sample, logits.get(), device_jobs.get(), vocab, out.get(), nullptr);
    for (size_t i = 0; i < jobs.size(); ++i) {
        const double u = uniform_of(jobs[i].seed, jobs[i].choice, jobs[i].position);
        expect_same(out[i], drawn(logits.get() + jobs[i].row * vocab, vocab, jobs[i], u), "token", i);
    }
}

TEST(random_numbers_are_those_of_the_protocol) {
    (void)order;
    if (uniform_of(42, 3, 1000) != 0.4898355229252481) fibres::fail("the vector of the protocol does not hold");
}

TEST(greedy_takes_the_lowest_id_of_the_highest_logits) {
    const u32 vocab = 2100;
    auto logits = random_values<float>(3 * vocab);
    logits[37] = logits[1900] = 5;
    logits[3] = NAN;
    logits[vocab + 9] = INFINITY;
    for (u32 i = 0; i < vocab; ++i) logits[2 * vocab + i] = -INFINITY;
    compare(order, logits, vocab, {{1, 0, 5, 0, 0, 0, 1, 0, 0}, {1, 0, 5, 1, 1, 0, 1, 0, 0}, {1, 0, 5, 2, 2, 1, 1, 0, 0}});
}

static void draws(fibres::Order order, u32 vocab) {
    auto logits = random_values<float>(2 * vocab, -6, 6);
    // Many equals, so that a threshold falls among them.
    for (u32 i = 0; i < vocab; ++i) logits[vocab + i] = float(int(logits[i]));
    std::vector<SampleJob> jobs;
    for (u32 i = 0; i < 24; ++i) {
        const u32 top_k[] = {0, 50, 2900}, row = i / 2 % 2;
        const float top_p[] = {1, 0.9f, 0.3f, 0}, min_p[] = {0, 0, 0, 0, 0.05f};
        jobs.push_back({7, i % 3, i * 11, row, row, 0.3f + 0.2f * float(i % 8), top_p[i % 4], min_p[i % 5], top_k[i % 3]});
    }
    compare(order, logits, vocab, jobs);
}

TEST(draws_are_those_of_a_sorted_list) {
    for (u32 vocab : {3001u, 3004u, 37u}) draws(order, vocab);
}

TEST(penalties_bias_and_bans_change_a_copy) {
    const u32 vocab = 300;
    auto logits = random_values<float>(2 * vocab);
    logits[0] = 3, logits[1] = 4, logits[2] = -1, logits[3] = 0, logits[4] = 100;
    std::vector<float> want(logits.get(), logits.get() + vocab);
    want[0] = 2, want[1] = 0.25f, want[2] = -2.75f, want[3] = 5, want[4] = -INFINITY;
    auto rows = on_device<AdjustRow>({{0, 1, 0, 5, 2, 0.5f, 0.25f}});
    auto adjustments = on_device<Adjustment>({{0, 1, 1, 0}, {1, 0, 1, 3}, {2, 0, 1, 1}, {3, 5, 0, 0}, {4, -INFINITY, 0, 0}});
    LAUNCH(order, 1, 512, 0, adjust_logits, logits.get(), rows.get(), adjustments.get(), vocab);
    expect_close(logits[0], 3, 0, "the model's own row", 0);
    for (u32 i = 0; i < vocab; ++i) expect_same(bits_of(logits[vocab + i]), bits_of(want[i]), "adjusted", i);
}

static void logprobs(fibres::Order order, u32 vocab) {
    auto logits = random_values<float>(2 * vocab, -8, 8);
    auto jobs = on_device<SampleJob>({{1, 0, 5, 1, 0, 0, 1, 0, 0}, {1, 0, 6, 0, 0, 1, 1, 0, 0}});
    Device<u32> out(2);
    Device<float> found(2);
    LAUNCH(order, 2, 512, 0, sample, logits.get(), jobs.get(), vocab, out.get(), found.get());
    double sum = 0;
    for (u32 i = 0; i < vocab; ++i) sum += std::exp(double(logits[i]));
    for (u32 i = 0; i < 2; ++i) expect_close(found[i], logits[out[i]] - std::log(sum), 1e-5, "logprob", i);
}

TEST(logprobs_are_of_the_raw_row) {
    for (u32 vocab : {1500u, 1503u}) logprobs(order, vocab);
}
