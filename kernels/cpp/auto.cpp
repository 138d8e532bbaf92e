// The search of parallel/auto.py, which says what is looked for and finds the same plan: a bank in one call.
#include <algorithm>
#include <numeric>
#include <vector>

#include "copies.h"

namespace search {

using Plan = std::vector<std::uint8_t>;  // (experts, ranks), the hottest expert first

// The counts of a few steps, added up, with the hottest expert first.
struct Heat {
    int64_t experts;
    copies::Nodes nodes;
    std::vector<int64_t> counts, loads, owners, order, place;

    Heat(const int64_t* const* steps, int64_t number, const int64_t* owner_of, int64_t experts, const copies::Nodes& nodes)
        : experts(experts), nodes(nodes), counts(experts * nodes.ranks), loads(experts), owners(experts), order(experts),
          place(experts) {
        std::vector<int64_t> sums(steps[0], steps[0] + experts * nodes.ranks), all(experts, 0);
        for (int64_t r = 0; r < nodes.ranks; ++r) {
            int64_t* const sum = &sums[r * experts];
            for (int64_t s = 1; s < number; ++s) copies::add(sum, steps[s] + r * experts, experts);
            copies::add(all.data(), sum, experts);
        }
        std::iota(order.begin(), order.end(), 0);
        std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return all[a] > all[b]; });
        for (int64_t k = 0; k < experts; ++k) {
            loads[k] = all[order[k]];
            owners[k] = owner_of[order[k]];
            place[order[k]] = k;
        }
        constexpr int64_t together = 8;  // ranks, whose counts of an expert fill a cache line
        for (int64_t first = 0; first < nodes.ranks; first += together) {
            const int64_t number = std::min(nodes.ranks - first, together);
            for (int64_t e = 0; e < experts; ++e) {
                const int64_t* const from = &sums[first * experts + e];
                int64_t* const to = &counts[place[e] * nodes.ranks + first];
                for (int64_t r = 0; r < number; ++r) to[r] = from[r * experts];
            }
        }
    }

    Plan alone(int64_t depth) const {
        Plan plan(depth * nodes.ranks, 0);
        for (int64_t k = 0; k < depth; ++k) plan[k * nodes.ranks + owners[k]] = 1;
        return plan;
    }

    Plan own_node(int64_t depth) const {
        Plan plan(depth * nodes.ranks, 0);
        for (int64_t k = 0; k < depth; ++k) {
            const int64_t node = owners[k] / nodes.per_node;
            std::fill(&plan[k * nodes.ranks] + nodes.begin(node), &plan[k * nodes.ranks] + nodes.end(node), 1);
        }
        return plan;
    }

    Plan spread(const std::vector<int64_t>& seats, int64_t depth, int64_t most_copies) const {
        std::vector<int64_t> weights(experts), spare(nodes.ranks, 0), room(nodes.ranks, most_copies);
        for (int64_t k = 0; k < experts; ++k) {
            weights[k] = loads[k] / (seats[k] + 1);
            spare[owners[k]] -= weights[k];
        }
        Plan plan = alone(depth);
        copies::spread(plan.data(), seats.data(), weights.data(), spare.data(), room.data(), depth, nodes);
        return plan;
    }

    std::vector<int64_t> seats_by_load() const {
        const int64_t total = std::accumulate(loads.begin(), loads.end(), int64_t(0));
        const int64_t mean = std::max(int64_t(1), (total + nodes.ranks - 1) / nodes.ranks);
        std::vector<int64_t> seats(experts);
        for (int64_t k = 0; k < experts; ++k)
            seats[k] = std::max(int64_t(0), std::min((loads[k] + mean - 1) / mean, nodes.ranks) - 1);
        return seats;
    }
};

// Calls `see(i)` where a byte is 1: most plans have few of these.
template <class See> void each_set(const std::uint8_t* bytes, int64_t length, See see) {
    int64_t i = 0;
    for (std::uint64_t eight; i + 8 <= length; i += 8) {
        std::memcpy(&eight, bytes + i, 8);
        for (int64_t j = i; eight && j < i + 8; ++j)
            if (bytes[j]) see(j);
    }
    for (; i < length; ++i)
        if (bytes[i]) see(i);
}

// The best prefix so far: the first experts of a template.
struct Best {
    int64_t time, depth;
    const Plan* plan;
};

}  // namespace search

// steps (number): arrays (ranks, experts); last and found (ranks, experts). found comes in as zeros.
extern "C" void auto_plan_i64(const int64_t* const* steps, const int64_t* owners, const copies::Costs* costs,
                              const std::uint8_t* last, std::uint8_t* found, int64_t number, int64_t experts, int64_t ranks,
                              int64_t per_node, int64_t depth, int64_t most_copies, int64_t millionths, int64_t) {
    using namespace search;
    const Heat heat(steps, number, owners, experts, {ranks, per_node});
    const copies::Bank bank(heat.counts.data(), heat.owners.data(), experts, heat.nodes, *costs, most_copies);
    depth = std::min(depth, experts);
    const std::vector<int64_t> nodes_but_one(experts, heat.nodes.number - 1);
    const Plan templates[] = {heat.own_node(depth), heat.spread(nodes_but_one, depth, most_copies),
                              heat.spread(heat.seats_by_load(), depth, most_copies)};
    const int64_t none = bank.time(bank.alone);
    Best best{none, 0, &templates[0]};
    std::vector<int64_t> times(experts + 1);
    const auto see = [&](const Plan& plan, int64_t length) {
        bank.prefixes(plan.data(), length, times.data(), best.time);
        const auto least = std::min_element(times.begin(), times.begin() + length + 1);
        if (*least < best.time) best = {*least, least - times.begin(), &plan};
    };
    for (const Plan& each : templates) see(each, depth);
    const Plan everywhere(experts * ranks, 1);
    see(everywhere, experts);

    Plan before = heat.alone(experts);
    for (int64_t r = 0; r < ranks; ++r)
        each_set(last + r * experts, experts, [&](int64_t e) { before[heat.place[e] * ranks + r] = 1; });
    const int64_t then = bank.time(before.data(), experts);
    const __int128 saved = static_cast<__int128>(then - best.time) * 1000000;
    if (then <= none && saved <= static_cast<__int128>(then) * millionths) best = {then, experts, &before};

    for (int64_t e = 0; e < experts; ++e) found[owners[e] * experts + e] = 1;
    for (int64_t k = 0; k < best.depth; ++k)
        each_set(best.plan->data() + k * ranks, ranks, [&](int64_t r) { found[r * experts + heat.order[k]] = 1; });
}
