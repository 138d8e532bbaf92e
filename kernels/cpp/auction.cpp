// Balanced assignment: prices by counting, then augmenting paths between experts. kernels/auction.py says how and why;
// both files take the same steps in integers, so that they return the same assignment.
#include <algorithm>
#include <vector>

#include "common.h"

namespace auction {

using std::int32_t;
using std::int8_t;
using std::uint32_t;

constexpr int32_t FAR = int32_t(1) << 30;          // cost of leaving an expert without tokens
constexpr int64_t UNREACHED = int64_t(1) << 44;    // distance of an expert that no path has reached
constexpr int64_t REACHABLE = int64_t(1) << 43;    // every true distance is below this
constexpr int32_t PRICE_LIMIT = int32_t(1) << 29;

struct Problem {
    int64_t tokens, experts, threads;
    std::vector<int32_t> value;  // (tokens, experts)
    std::vector<int8_t> dither;  // (tokens, experts)
    std::vector<int64_t> quota, count, choice;
    int32_t scale;
};

inline int bit_length(int32_t value) { return value ? 32 - __builtin_clz(static_cast<uint32_t>(value)) : 0; }

// A power of two near the geometric mean of the ranges of the rows.
inline int32_t typical(const Problem& p) {
    std::vector<int32_t> range(p.tokens);
    const int64_t threads = p.threads;
    PARALLEL_FOR
    for (int64_t t = 0; t < p.tokens; ++t) {
        const int32_t* row = p.value.data() + t * p.experts;
        int32_t low = row[0], high = row[0];
#pragma omp simd reduction(min : low) reduction(max : high)
        for (int64_t e = 0; e < p.experts; ++e) {
            low = row[e] < low ? row[e] : low;
            high = row[e] > high ? row[e] : high;
        }
        range[t] = high - low;
    }
    int64_t bits = 0, rows = 0;
    for (int64_t t = 0; t < p.tokens; ++t) bits += bit_length(range[t]), rows += range[t] > 0;
    const int64_t mean = rows ? bits / rows : 0;
    return int32_t(1) << std::min<int64_t>(std::max<int64_t>(mean - 1, 0), 28);
}

// Scores as integers: regret against the row's best, 28 bits for the largest of all; then columns without their mean.
template <class T> void load(Problem& p, const T* scores, int64_t stride, int levels_bits) {
    const int64_t tokens = p.tokens, experts = p.experts, threads = p.threads;
    bool any = false;
    double lowest = 0;
    for (int64_t t = 0; t < tokens; ++t)
        for (int64_t e = 0; e < experts; ++e) {
            const double x = scores[t * stride + e];
            if (std::isfinite(x) && (!any || x < lowest)) lowest = x, any = true;
        }
    std::vector<double> regret(tokens * experts), worst(tokens);
    PARALLEL_FOR
    for (int64_t t = 0; t < tokens; ++t) {
        double* row = regret.data() + t * experts;
        double best = 0, least = 0;
        for (int64_t e = 0; e < experts; ++e) {
            const double x = scores[t * stride + e];
            row[e] = (std::isfinite(x) ? x : lowest) * 0.25;  // differences of the largest doubles would overflow
            best = e == 0 || row[e] > best ? row[e] : best;
            least = e == 0 || row[e] < least ? row[e] : least;
        }
        for (int64_t e = 0; e < experts; ++e) row[e] -= best;
        worst[t] = best - least;
    }
    double range = 0;
    for (double w : worst) range = w > range ? w : range;
    const double divisor = range > 0 ? range : 1, levels = double(int64_t(1) << levels_bits);
    PARALLEL_FOR
    for (int64_t t = 0; t < tokens; ++t)
        for (int64_t e = 0; e < experts; ++e) {
            const int64_t i = t * experts + e;
            p.value[i] = static_cast<int32_t>(std::nearbyint(regret[i] / divisor * levels));
            const uint32_t mixed = (uint32_t(t) * 0x9E3779B1u ^ uint32_t(e) * 0x85EBCA77u) * 0x2C1B3C6Du;
            p.dither[i] = static_cast<int8_t>(int(mixed >> 24) - 128);
        }
    const int64_t floor = -8 * int64_t(typical(p));  // a few rows of huge values must not move the mean
    std::vector<int64_t> mean(experts, 0);
    for (int64_t t = 0; t < tokens; ++t)
        for (int64_t e = 0; e < experts; ++e) mean[e] += std::max<int64_t>(p.value[t * experts + e], floor);
    for (int64_t& m : mean) m /= tokens;
    PARALLEL_FOR
    for (int64_t t = 0; t < tokens; ++t)
        for (int64_t e = 0; e < experts; ++e) p.value[t * experts + e] -= static_cast<int32_t>(mean[e]);
    p.scale = typical(p);
}

// The expert of the largest net value, the first of equal ones; `net` is scratch for a row.
template <bool DITHERED>
inline int32_t best_expert(const int32_t* row, const int32_t* price, const int8_t* noise, int32_t dither, int32_t* net,
                           int32_t experts) {
    int32_t best = INT32_MIN, first = INT32_MAX;
#pragma omp simd reduction(max : best)
    for (int32_t e = 0; e < experts; ++e) {
        const int32_t x = row[e] - price[e] + (DITHERED ? noise[e] * dither : 0);
        net[e] = x;
        best = x > best ? x : best;
    }
#pragma omp simd reduction(min : first)
    for (int32_t e = 0; e < experts; ++e) {
        const int32_t at = net[e] == best ? e : INT32_MAX;
        first = at < first ? at : first;
    }
    return first;
}

// Every token to its best expert at these prices; how many too many there are in all.
inline int64_t choose(Problem& p, const std::vector<int32_t>& prices, int32_t dither) {
    const int64_t tokens = p.tokens, experts = p.experts, threads = p.threads;
    const int32_t* price = prices.data();
    PARALLEL_FOR
    for (int64_t block = 0; block < blocks_of(tokens); ++block) {
        std::vector<int32_t> net(experts);
        for (int64_t t = block * BLOCK; t < std::min(block * BLOCK + BLOCK, tokens); ++t) {
            const int32_t* row = p.value.data() + t * experts;
            const int8_t* noise = p.dither.data() + t * experts;
            const int32_t width = static_cast<int32_t>(experts);
            p.choice[t] = dither ? best_expert<true>(row, price, noise, dither, net.data(), width)
                                 : best_expert<false>(row, price, noise, 0, net.data(), width);
        }
    }
    std::fill(p.count.begin(), p.count.end(), 0);
    for (int64_t t = 0; t < p.tokens; ++t) ++p.count[p.choice[t]];
    int64_t excess = 0;
    for (int64_t e = 0; e < experts; ++e) excess += std::max<int64_t>(p.count[e] - p.quota[e], 0);
    return excess;
}

inline int32_t clamped(int64_t price) {
    return static_cast<int32_t>(std::min<int64_t>(std::max<int64_t>(price, -PRICE_LIMIT), PRICE_LIMIT));
}

// Prices at which experts are chosen about as often as their quotas say.
inline std::vector<int32_t> prices(Problem& p, int64_t levels, int64_t per_level, int64_t rounds) {
    const int64_t experts = p.experts;
    std::vector<int32_t> price(experts, 0);
    for (int64_t level = 0; level < levels; ++level) {
        const int64_t amplitude = std::max(p.scale >> level, 1);
        for (int64_t round = 0; round < per_level; ++round) {
            choose(p, price, static_cast<int32_t>(amplitude >> 8));
            for (int64_t e = 0; e < experts; ++e) {
                const int64_t over = p.count[e] - p.quota[e];
                price[e] = clamped(price[e] + amplitude * over / (2 * (p.count[e] + p.quota[e])));
            }
        }
    }
    std::vector<int32_t> best = price, step(experts, std::max(p.scale >> 10, 1)), last(experts, 0);
    int64_t fewest = INT64_MAX;
    for (int64_t round = 0; round < rounds && fewest; ++round) {
        const int64_t excess = choose(p, price, 0);
        if (excess < fewest) fewest = excess, best = price;
        for (int64_t e = 0; e < experts; ++e) {
            const int32_t sign = (p.count[e] > p.quota[e]) - (p.count[e] < p.quota[e]);
            const int32_t turn = sign * last[e];
            if (turn < 0) step[e] >>= 1;
            if (turn > 0) step[e] += step[e] >> 1;
            step[e] = std::min(std::max(step[e], 1), p.scale);
            price[e] = clamped(int64_t(price[e]) + sign * step[e]);
            last[e] = sign;
        }
    }
    return best;
}

using Members = std::vector<int64_t>;  // tokens of an expert, in order

// What the cheapest move from expert e to every other one costs.
inline void transfer(const Problem& p, const Members& members, int64_t e, int32_t* cost) {
    const int64_t experts = p.experts;
    std::fill(cost, cost + experts, FAR);
    for (int64_t t : members) {
        const int32_t* row = p.value.data() + t * experts;
        const int32_t own = row[e];
#pragma omp simd
        for (int64_t f = 0; f < experts; ++f) {
            const int32_t loss = own - row[f];
            cost[f] = loss < cost[f] ? loss : cost[f];
        }
    }
}

// Moves tokens from experts with too many to experts with too few, each time along the cheapest path.
inline void repair(Problem& p) {
    const int64_t experts = p.experts, threads = p.threads;
    int64_t excess = 0;
    for (int64_t e = 0; e < experts; ++e) excess += std::max<int64_t>(p.count[e] - p.quota[e], 0);
    if (!excess) return;
    std::vector<Members> members(experts);
    for (int64_t t = 0; t < p.tokens; ++t) members[p.choice[t]].push_back(t);
    std::vector<int32_t> cost(experts * experts);
    PARALLEL_FOR
    for (int64_t e = 0; e < experts; ++e) transfer(p, members[e], e, cost.data() + e * experts);
    std::vector<int64_t> distance(experts), next(experts), parent(experts), from(experts), path;
    std::vector<char> changed(experts), changing(experts);
    while (excess) {
        for (int64_t e = 0; e < experts; ++e) {
            changed[e] = p.count[e] > p.quota[e];
            distance[e] = changed[e] ? 0 : UNREACHED;
            parent[e] = -1;
        }
        for (bool improved = true; improved;) {  // Bellman-Ford; no cycle is negative
            improved = false;
            for (int64_t f = 0; f < experts; ++f) next[f] = std::min(distance[f], REACHABLE), from[f] = -1;
            for (int64_t e = 0; e < experts; ++e) {
                if (!changed[e]) continue;
                const int32_t* row = cost.data() + e * experts;
                if (p.count[e] == 0) continue;
                const int64_t base = distance[e];
#pragma omp simd
                for (int64_t f = 0; f < experts; ++f) {
                    const int64_t reached = base + row[f];
                    from[f] = reached < next[f] ? e : from[f];
                    next[f] = reached < next[f] ? reached : next[f];
                }
            }
            for (int64_t f = 0; f < experts; ++f) {
                changing[f] = from[f] >= 0;
                if (changing[f]) distance[f] = next[f], parent[f] = from[f], improved = true;
            }
            changed.swap(changing);
        }
        int64_t sink = -1;
        for (int64_t e = 0; e < experts; ++e)
            if (p.count[e] < p.quota[e] && (sink < 0 || distance[e] < distance[sink])) sink = e;
        path.assign(1, sink);
        while (parent[path.back()] >= 0) path.push_back(parent[path.back()]);
        const int64_t source = path.back();
        int64_t moved = std::min(p.count[source] - p.quota[source], p.quota[sink] - p.count[sink]);
        const auto fits = [&](int64_t t, int64_t e, int64_t f) {
            const int32_t* row = p.value.data() + t * experts;
            return row[e] - row[f] == cost[e * experts + f];
        };
        for (size_t i = 0; i + 1 < path.size() && moved > 1; ++i) {  // at least one token fits
            int64_t fitting = 0;
            for (int64_t t : members[path[i + 1]]) fitting += fits(t, path[i + 1], path[i]);
            moved = std::min(moved, fitting);
        }
        for (size_t i = 0; i + 1 < path.size(); ++i) {  // from the sink backwards: nobody moves twice
            Members &here = members[path[i + 1]], &there = members[path[i]], staying;
            const int64_t before = static_cast<int64_t>(there.size());
            int64_t left = moved;
            for (int64_t t : here) {
                const bool goes = left > 0 && fits(t, path[i + 1], path[i]);
                (goes ? there : staying).push_back(t);
                left -= goes;
            }
            std::inplace_merge(there.begin(), there.begin() + before, there.end());
            here.swap(staying);
        }
        p.count[source] -= moved;
        p.count[sink] += moved;
        excess -= moved;
        for (int64_t e : path) transfer(p, members[e], e, cost.data() + e * experts);
    }
    for (int64_t e = 0; e < experts; ++e)
        for (int64_t t : members[e]) p.choice[t] = e;
}

template <class T>
void assign(const T* scores, int64_t* out, int64_t tokens, int64_t experts, int64_t stride, int64_t bits,
            int64_t levels, int64_t per_level, int64_t rounds, int64_t threads) {
    Problem p{tokens, experts, threads, {}, {}, {}, {}, {}, 1};
    p.value.resize(tokens * experts);
    p.dither.resize(tokens * experts);
    p.count.resize(experts);
    p.choice.resize(tokens);
    for (int64_t e = 0; e < experts; ++e) p.quota.push_back(tokens / experts + (e < tokens % experts));
    load(p, scores, stride, static_cast<int>(bits));
    choose(p, prices(p, levels, per_level, rounds), 0);
    repair(p);
    std::copy(p.choice.begin(), p.choice.end(), out);
}

}  // namespace auction

#define EXPORT(T, S)                                                                                                     \
    extern "C" void balanced_assignment_##S(const T* scores, int64_t* out, int64_t tokens, int64_t experts,              \
                                            int64_t stride, int64_t bits, int64_t levels, int64_t per_level,             \
                                            int64_t rounds, int64_t threads) {                                           \
        auction::assign<T>(scores, out, tokens, experts, stride, bits, levels, per_level, rounds, threads);              \
    }
EXPORT(float, f32)
EXPORT(double, f64)
#undef EXPORT
