// What accesses of compiled kernels (host/ptx.h) cost the memory, by counting: `kernels/cuda/check counts`.
//
//   global   sectors of 32 bytes that a warp's access touches, and those that its bytes would fill
//   shared   turns of the 32 banks of 4 bytes that it takes, and those that its different bytes would fill
//
// Accesses of 8 bytes are taken half a warp at a time, of 16 bytes a quarter. Lanes belong to one access where they are
// at the same instruction for as many times: what a device does where they do not run apart. Caches, and so what is
// read twice, are not counted.
#pragma once

#include <array>
#include <set>

#include "fibres.h"

namespace counts {

struct Site {
    std::string kernel;
    int line;
    bool is_shared;
    bool operator<(const Site& other) const {
        return std::tie(kernel, line, is_shared) < std::tie(other.kernel, other.line, other.is_shared);
    }
};
struct Cost { uint64_t num_accesses = 0, taken = 0, least = 0; };

struct Access {
    unsigned size, num_lanes = 0;
    std::array<uint64_t, 32> addresses;
    std::array<bool, 32> is_there{};
};
struct OfSite {
    std::array<unsigned, 32> num_times{};
    std::deque<Access> open;
    unsigned first = 0; // how many were closed before the first of `open`
};

struct Counts {
    std::map<Site, Cost> costs;
    uint64_t block = ~0ull;
    std::map<std::pair<unsigned, Site>, OfSite> sites; // by warp
};
inline Counts& all() {
    static auto& one = *new Counts;
    return one;
}
inline bool are_wanted() {
    static const bool wanted = std::getenv("COUNTS") != nullptr;
    return wanted;
}

inline void close(const Site& site, const Access& access) {
    Cost& cost = all().costs[site];
    ++cost.num_accesses;
    const unsigned per_turn = site.is_shared ? 32 / (std::max(access.size, 4u) / 4) : 32;
    std::set<uint64_t> bytes_of_all;
    for (unsigned first = 0; first < 32; first += per_turn) {
        std::map<uint64_t, std::set<uint64_t>> words; // of each bank
        std::set<uint64_t> sectors, granules;
        for (unsigned lane = first; lane < first + per_turn; ++lane) {
            if (!access.is_there[lane]) continue;
            for (unsigned at = 0; at < access.size; at += std::min(access.size, 4u)) {
                const uint64_t word = (access.addresses[lane] + at) / 4;
                words[word % 32].insert(word), sectors.insert(word / 8), granules.insert(word);
            }
        }
        if (granules.empty()) continue;
        if (site.is_shared) {
            size_t num_turns = 0;
            for (const auto& [bank, of_bank] : words) num_turns = std::max(num_turns, of_bank.size());
            cost.taken += num_turns, cost.least += (granules.size() + 31) / 32;
        } else {
            cost.taken += sectors.size(), cost.least += (granules.size() + 7) / 8;
        }
    }
}

// One lane's access of `size` bytes.
inline void note(const std::string& kernel, int line, bool is_shared, uint64_t address, unsigned size) {
    Counts& c = all();
    if (c.block != fibres::block->number) {
        for (const auto& [key, of_site] : c.sites)
            for (const Access& access : of_site.open) close(key.second, access);
        c.sites.clear();
        c.block = fibres::block->number;
    }
    const unsigned lane = fibres::lane();
    const Site site{kernel, line, is_shared};
    OfSite& of_site = c.sites[{fibres::block->current / 32, site}];
    const unsigned index = of_site.num_times[lane]++ - of_site.first;
    while (of_site.open.size() <= index) of_site.open.push_back({size, 0, {}, {}});
    Access& access = of_site.open[index];
    access.addresses[lane] = address, access.is_there[lane] = true, ++access.num_lanes;
    while (!of_site.open.empty() && of_site.open.front().num_lanes == 32) {
        close(site, of_site.open.front());
        of_site.open.pop_front(), ++of_site.first;
    }
}

// A line for each kernel and kind, and for each instruction that takes more than it could.
inline void print() {
    Counts& c = all();
    for (const auto& [key, of_site] : c.sites)
        for (const Access& access : of_site.open) close(key.second, access);
    c.sites.clear();
    std::map<std::pair<std::string, bool>, Cost> of_kernels;
    for (const auto& [site, cost] : c.costs) {
        Cost& sum = of_kernels[{site.kernel, site.is_shared}];
        sum.num_accesses += cost.num_accesses, sum.taken += cost.taken, sum.least += cost.least;
    }
    for (const auto& [key, sum] : of_kernels) {
        std::printf("   %-30s %-6s %9llu accesses %10llu %s, least %10llu, %.2f\n", key.first.c_str(), key.second ? "shared" : "global",
                    (unsigned long long)sum.num_accesses, (unsigned long long)sum.taken, key.second ? "turns  " : "sectors",
                    (unsigned long long)sum.least, double(sum.taken) / double(std::max<uint64_t>(sum.least, 1)));
        for (const auto& [site, cost] : c.costs)
            if (site.kernel == key.first && site.is_shared == key.second && cost.taken > cost.least)
                std::printf("      line %6d of the PTX %9llu accesses %10llu, least %10llu, %.2f\n", site.line,
                            (unsigned long long)cost.num_accesses, (unsigned long long)cost.taken, (unsigned long long)cost.least,
                            double(cost.taken) / double(cost.least));
    }
}

} // namespace counts
