// What plans of copies are made of: seats for copies, and what a bank takes. parallel/copies.py and parallel/costs.py say
// what is computed, and compute the same integers.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "common.h"

namespace copies {

// Functions copy these to locals: what they write could be them, for all that the compiler knows.
struct Nodes {
    int64_t ranks, per_node, number;
    Nodes(int64_t ranks, int64_t per_node) : ranks(ranks), per_node(per_node), number((ranks + per_node - 1) / per_node) {}
    int64_t begin(int64_t node) const { return node * per_node; }
    int64_t end(int64_t node) const { return std::min(ranks, (node + 1) * per_node); }
};

inline void add(int64_t* __restrict to, const int64_t* __restrict what, int64_t length) {
    for (int64_t i = 0; i < length; ++i) to[i] += what[i];
}

inline void subtract(int64_t* __restrict from, const int64_t* __restrict what, int64_t length) {
    for (int64_t i = 0; i < length; ++i) from[i] -= what[i];
}

// How many of these bytes, each 0 or 1, are 1.
inline int64_t count(const std::uint8_t* bytes, int64_t length) {
    int64_t found = 0, i = 0;
    for (std::uint64_t eight; i + 8 <= length; i += 8) {
        std::memcpy(&eight, bytes + i, 8);
        found += __builtin_popcountll(eight);
    }
    for (; i < length; ++i) found += bytes[i];
    return found;
}

// present (experts, ranks); see spread() in parallel/copies.py.
inline void spread(std::uint8_t* present, const int64_t* seats, const int64_t* weights, int64_t* spare, int64_t* room,
                   int64_t experts, const Nodes nodes) {
    std::vector<int64_t> work(3 * nodes.number, 0);
    int64_t *const of_node = work.data(), *const has = of_node + nodes.number, *const full = has + nodes.number;
    for (int64_t n = 0; n < nodes.number; ++n)
        for (int64_t r = nodes.begin(n); r < nodes.end(n); ++r) of_node[n] += spare[r];
    for (int64_t e = 0; e < experts; ++e) {
        if (seats[e] <= 0) continue;
        std::uint8_t* there = present + e * nodes.ranks;
        for (int64_t n = 0; n < nodes.number; ++n) {
            has[n] = full[n] = 0;
            for (int64_t r = nodes.begin(n); r < nodes.end(n); ++r) has[n] |= there[r];
        }
        for (int64_t left = seats[e]; left > 0;) {
            // conditions without shortcuts: nobody could predict the branches
            int64_t node = -1, lacks = 2, most = 0;
            for (int64_t n = 0; n < nodes.number; ++n) {
                const bool better = (full[n] == 0) & ((has[n] < lacks) | ((has[n] == lacks) & (of_node[n] > most)));
                node = better ? n : node, lacks = better ? has[n] : lacks, most = better ? of_node[n] : most;
            }
            if (node < 0) break;
            int64_t rank = -1;
            for (int64_t r = nodes.begin(node), end = nodes.end(node); r < end; ++r) {
                const bool better = (there[r] == 0) & (room[r] > 0) & ((rank < 0) | (spare[r] > most));
                rank = better ? r : rank, most = better ? spare[r] : most;
            }
            if (rank < 0) {
                full[node] = 1;
                continue;
            }
            there[rank] = has[node] = 1;
            spare[rank] -= weights[e];
            of_node[node] -= weights[e];
            --room[rank];
            --left;
        }
    }
}

// Division of numbers that are not negative: most are none or small, or divided by one.
inline int64_t share(int64_t amount, int64_t among) {
    if (amount == 0 || among == 1) return amount;
    if (amount >> 32 == 0) return static_cast<std::uint32_t>(amount) / static_cast<std::uint32_t>(among);
    return amount / among;
}

// The fields of Costs, in order.
struct Costs {
    int64_t row, expert, row_near, row_far, copy_near, copy_far, grad_near, grad_far, message, hidden_forward,
        hidden_backward, gathers_forward, gathers_backward, reductions, micro_batches;

    int64_t of(int64_t rows) const { return row * rows + (rows > 0 ? expert * micro_batches : 0); }
};

// What a plan adds up to: vectors over ranks, then over nodes, side by side.
struct Load {
    Nodes nodes;
    std::vector<int64_t> all, list, ends;  // the latter two are room to work in
    int64_t *work, *guests, *sent, *taken, *given, *rows_in, *rows_out, *copies_in, *copies_out;

    explicit Load(const Nodes& of) : nodes(of), all(5 * of.ranks + 4 * of.number, 0), list(of.ranks + 1), ends(of.number) {
        int64_t* next = all.data();
        for (int64_t** part : {&work, &guests, &sent, &taken, &given}) *part = next, next += of.ranks;
        for (int64_t** part : {&rows_in, &rows_out, &copies_in, &copies_out}) *part = next, next += of.number;
    }

    Load(const Load& other) : Load(other.nodes) { std::copy(other.all.begin(), other.all.end(), all.begin()); }

    // Adds an expert that is on its owner only. counts (ranks).
    void alone(const int64_t* counts, const int64_t* of_node, int64_t owner, const Costs& costs) {
        add(rows_out, of_node, nodes.number);
        add(sent, counts, nodes.ranks);
        settle(counts, of_node, owner, costs, 1);
    }

    // What the owner, and it alone, has of an expert without copies: `sign` 1 adds it, -1 takes it away.
    void settle(const int64_t* counts, const int64_t* of_node, int64_t owner, const Costs& costs, int64_t sign) {
        const int64_t home = owner / nodes.per_node, number = nodes.number;
        int64_t total = 0;
        for (int64_t n = 0; n < number; ++n) total += of_node[n];
        rows_out[home] -= sign * of_node[home];
        rows_in[home] += sign * (total - of_node[home]);
        sent[owner] -= sign * counts[owner];
        guests[owner] += sign * (total - counts[owner]);
        work[owner] += sign * costs.of(total);
    }

    // From its owner only to all ranks, so that no row travels.
    void everywhere(const int64_t* counts, const int64_t* of_node, int64_t owner, const Costs& costs) {
        settle(counts, of_node, owner, costs, -1);
        subtract(rows_out, of_node, nodes.number);
        subtract(sent, counts, nodes.ranks);
        const Nodes on = nodes;
        const int64_t home = owner / on.per_node, here = on.end(home) - on.begin(home);
        for (int64_t n = 0; n < on.number; ++n) copies_in[n] += on.end(n) - on.begin(n);
        copies_in[home] -= here;
        copies_out[home] += on.ranks - here;
        given[owner] += on.ranks - 1;
        taken[owner] -= 1;
        const int64_t row = costs.row, fixed = costs.expert * costs.micro_batches;
        int64_t *const __restrict does = work, *const __restrict takes = taken;
        for (int64_t r = 0; r < on.ranks; ++r) {
            does[r] += row * counts[r] + (counts[r] > 0 ? fixed : 0);
            takes[r] += 1;
        }
    }

    // From its owner only to where the template has it; only ranks that have it see another load than that. False where
    // that is its owner only.
    bool widen(const int64_t* counts, const int64_t* of_node, const std::uint8_t* there, int64_t owner, const Costs& costs) {
        const Nodes on = nodes;
        const int64_t home = owner / on.per_node;
        const int64_t copies = count(there, on.ranks);
        if (copies == 1) return false;
        if (copies == on.ranks) {
            everywhere(counts, of_node, owner, costs);
            return true;
        }
        int64_t *const ranks = list.data(), *const end = ends.data();
        int64_t listed = 0, far = 0;
        for (int64_t n = 0; n < on.number; ++n) {
            const int64_t first = listed;
            for (int64_t r = on.begin(n), last = on.end(n); r < last; ++r) ranks[listed] = r, listed += there[r];
            end[n] = listed;
            if (listed == first) far += of_node[n];
        }
        settle(counts, of_node, owner, costs, -1);
        taken[owner] -= 1;
        given[owner] += copies - 1;
        const int64_t far_share = share(far, copies);
        for (int64_t n = 0, first = 0; n < on.number; first = end[n++]) {
            const int64_t here = end[n] - first;
            if (here == 0) continue;
            int64_t away = of_node[n];
            for (int64_t i = first; i < end[n]; ++i) away -= counts[ranks[i]];
            const int64_t strangers = share(away, here) + far_share;
            for (int64_t i = first; i < end[n]; ++i) {
                const int64_t r = ranks[i];
                work[r] += costs.of(counts[r] + strangers);
                guests[r] += strangers;
                sent[r] -= counts[r];
                taken[r] += 1;
            }
            rows_in[n] += here * far_share;
            rows_out[n] -= of_node[n];
            if (n == home)
                copies_out[n] += copies - here;
            else
                copies_in[n] += here;
        }
        return true;
    }

    int64_t most(const int64_t* part, int64_t length) const {
        int64_t found = 0;
        for (int64_t i = 0; i < length; ++i) found = part[i] > found ? part[i] : found;
        return found;
    }

    int64_t exchange(int64_t rank, int64_t node, int64_t near, int64_t far, int64_t message) const {
        return std::max(rank * near, node * far) + message * std::min(rank, nodes.ranks - 1);
    }

    int64_t of_rows(const Costs& c) const {
        const int64_t rank = most(guests, 2 * nodes.ranks), node = most(rows_in, 2 * nodes.number);
        return most(work, nodes.ranks) + 4 * exchange(rank, node, c.row_near, c.row_far, c.message * c.micro_batches);
    }

    // What copies take in sight: never less with more of them.
    int64_t of_copies(const Costs& c) const {
        const int64_t zero = 0, rank = most(taken, 2 * nodes.ranks), node = most(copies_in, 2 * nodes.number);
        const int64_t gather = exchange(rank, node, c.copy_near, c.copy_far, c.message);
        const int64_t back = exchange(rank, node, c.grad_near, c.grad_far, c.message);
        const int64_t hidden = std::max(c.gathers_backward, c.reductions) * c.hidden_backward;
        return c.gathers_forward * std::max(zero, gather - c.hidden_forward) +
               std::max(zero, c.gathers_backward * gather + c.reductions * back - hidden);
    }
};

constexpr int64_t UNFIT = std::numeric_limits<int64_t>::max();

// A bank's rows (experts, ranks), in the order in which its experts are to be copied, and what it takes without copies.
struct Bank {
    const int64_t *counts, *owners;
    int64_t experts;
    Nodes nodes;
    const Costs& costs;
    int64_t most_copies;
    std::vector<int64_t> nodes_counts;
    Load alone;

    Bank(const int64_t* counts, const int64_t* owners, int64_t experts, const Nodes nodes, const Costs& costs,
         int64_t most_copies)
        : counts(counts), owners(owners), experts(experts), nodes(nodes), costs(costs), most_copies(most_copies),
          nodes_counts(experts * nodes.number, 0), alone(nodes) {
        for (int64_t e = 0; e < experts; ++e) {
            for (int64_t n = 0; n < nodes.number; ++n) {
                int64_t sum = 0;
                for (int64_t r = nodes.begin(n), end = nodes.end(n); r < end; ++r) sum += of(e)[r];
                nodes_counts[e * nodes.number + n] = sum;
            }
            alone.alone(of(e), of_node(e), owners[e], costs);
        }
    }

    const int64_t* of(int64_t expert) const { return counts + expert * nodes.ranks; }
    const int64_t* of_node(int64_t expert) const { return nodes_counts.data() + expert * nodes.number; }

    // A plan's time, or UNFIT where a rank would have too many copies, or where copies alone take as long as `bound`. What
    // is true of either is true of every plan that has more.
    int64_t time(const Load& load, int64_t bound = UNFIT) const {
        if (load.most(load.taken, nodes.ranks) > most_copies) return UNFIT;
        const int64_t of_copies = load.of_copies(costs);
        return of_copies < bound ? of_copies + load.of_rows(costs) : UNFIT;
    }

    // Of a plan (depth, ranks), and of no copies.
    int64_t time(const std::uint8_t* there, int64_t depth) const {
        Load load(alone);
        for (int64_t e = 0; e < depth; ++e) widen(load, there, e);
        return time(load);
    }

    // template (depth, ranks), times (depth + 1); see prefix_times() in parallel/costs.py.
    void prefixes(const std::uint8_t* there, int64_t depth, int64_t* times, int64_t bound = UNFIT) const {
        std::fill(times, times + depth + 1, UNFIT);
        Load load(alone);
        times[0] = time(load, bound);
        for (int64_t e = 0; e < depth && times[e] != UNFIT; ++e)
            times[e + 1] = widen(load, there, e) ? time(load, bound) : times[e];
    }

    bool widen(Load& load, const std::uint8_t* there, int64_t expert) const {
        return load.widen(of(expert), of_node(expert), there + expert * nodes.ranks, owners[expert], costs);
    }
};

}  // namespace copies
