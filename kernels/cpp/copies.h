// What plans of copies are made of: seats for copies, and what a bank takes. parallel/copies.py and parallel/costs.py say
// what is computed, and compute the same integers.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "common.h"

namespace copies {

struct Nodes {
    int64_t ranks, per_node;
    int64_t count() const { return (ranks + per_node - 1) / per_node; }
    int64_t begin(int64_t node) const { return node * per_node; }
    int64_t end(int64_t node) const { return std::min(ranks, (node + 1) * per_node); }
};

// present (experts, ranks); see spread() in parallel/copies.py.
inline void spread(std::uint8_t* present, const int64_t* seats, const int64_t* weights, int64_t* spare, int64_t* room,
                   int64_t experts, const Nodes& nodes) {
    std::vector<int64_t> of_node(nodes.count(), 0);
    std::vector<char> has(nodes.count()), full(nodes.count());
    for (int64_t n = 0; n < nodes.count(); ++n)
        for (int64_t r = nodes.begin(n); r < nodes.end(n); ++r) of_node[n] += spare[r];
    for (int64_t e = 0; e < experts; ++e) {
        std::uint8_t* there = present + e * nodes.ranks;
        for (int64_t n = 0; n < nodes.count(); ++n) {
            has[n] = full[n] = 0;
            for (int64_t r = nodes.begin(n); r < nodes.end(n); ++r) has[n] |= there[r];
        }
        for (int64_t left = seats[e]; left > 0;) {
            int64_t node = -1;
            for (int64_t n = 0; n < nodes.count(); ++n) {
                if (full[n]) continue;
                if (node < 0 || has[n] < has[node] || (has[n] == has[node] && of_node[n] > of_node[node])) node = n;
            }
            if (node < 0) break;
            int64_t rank = -1;
            for (int64_t r = nodes.begin(node); r < nodes.end(node); ++r)
                if (!there[r] && room[r] > 0 && (rank < 0 || spare[r] > spare[rank])) rank = r;
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

    explicit Load(const Nodes& of) : nodes(of), all(5 * of.ranks + 4 * of.count(), 0), list(of.ranks + 1), ends(of.count()) {
        int64_t* next = all.data();
        for (int64_t** part : {&work, &guests, &sent, &taken, &given}) *part = next, next += of.ranks;
        for (int64_t** part : {&rows_in, &rows_out, &copies_in, &copies_out}) *part = next, next += of.count();
    }

    // The same as another of these nodes.
    void take(const Load& other) { std::copy(other.all.begin(), other.all.end(), all.begin()); }

    // Adds an expert that is on its owner only. counts (ranks).
    void alone(const int64_t* counts, const int64_t* of_node, int64_t owner, const Costs& costs) {
        const int64_t home = owner / nodes.per_node;
        int64_t total = 0;
        for (int64_t n = 0; n < nodes.count(); ++n) {
            total += of_node[n];
            rows_out[n] += of_node[n];
        }
        rows_out[home] -= of_node[home];
        rows_in[home] += (total - of_node[home]);
        for (int64_t r = 0; r < nodes.ranks; ++r) sent[r] += counts[r];
        sent[owner] -= counts[owner];
        guests[owner] += (total - counts[owner]);
        work[owner] += costs.of(total);
    }

    // From its owner only to all ranks, so that no row travels.
    void everywhere(const int64_t* counts, const int64_t* of_node, int64_t owner, const Costs& costs) {
        const int64_t home = owner / nodes.per_node;
        int64_t total = 0;
        for (int64_t n = 0; n < nodes.count(); ++n) {
            const int64_t here = nodes.end(n) - nodes.begin(n), away = n != home;
            total += of_node[n];
            rows_out[n] -= away * of_node[n];
            copies_in[n] += away * here;
            copies_out[home] += away * here;
        }
        rows_in[home] -= total - of_node[home];
        work[owner] -= costs.of(total);
        guests[owner] -= total - counts[owner];
        sent[owner] += counts[owner];
        taken[owner] -= 1;
        given[owner] += nodes.ranks - 1;
        for (int64_t r = 0; r < nodes.ranks; ++r) {
            work[r] += costs.of(counts[r]);
            sent[r] -= counts[r];
            taken[r] += 1;
        }
    }

    // From its owner only to where the template has it; only ranks that have it see another load than that. False where
    // that is its owner only.
    bool widen(const int64_t* counts, const int64_t* of_node, const std::uint8_t* there, int64_t owner, const Costs& costs) {
        const int64_t home = owner / nodes.per_node;
        int64_t copies = 0, far = 0, total = 0;
        for (int64_t n = 0; n < nodes.count(); ++n) {
            const int64_t first = copies;
            total += of_node[n];
            for (int64_t r = nodes.begin(n); r < nodes.end(n); ++r) list[copies] = r, copies += there[r];
            ends[n] = copies;
            if (copies == first) far += of_node[n];
        }
        if (copies == 1) return false;
        if (copies == nodes.ranks) {
            everywhere(counts, of_node, owner, costs);
            return true;
        }
        const int64_t far_share = share(far, copies);
        work[owner] -= costs.of(total);
        guests[owner] -= total - counts[owner];
        sent[owner] += counts[owner];
        taken[owner] -= 1;
        given[owner] += copies - 1;
        rows_in[home] -= total - of_node[home];
        for (int64_t n = 0, first = 0; n < nodes.count(); first = ends[n++]) {
            const int64_t here = ends[n] - first;
            if (here == 0) continue;
            int64_t away = of_node[n];
            for (int64_t i = first; i < ends[n]; ++i) away -= counts[list[i]];
            const int64_t strangers = share(away, here) + far_share;
            for (int64_t i = first; i < ends[n]; ++i) {
                const int64_t r = list[i];
                work[r] += costs.of(counts[r] + strangers);
                guests[r] += strangers;
                sent[r] -= counts[r];
                taken[r] += 1;
            }
            rows_in[n] += here * far_share;
            if (n == home) {
                copies_out[n] += copies - here;
            } else {
                rows_out[n] -= of_node[n];
                copies_in[n] += here;
            }
        }
        return true;
    }

    int64_t most(const int64_t* part, int64_t length) const {
        int64_t found = 0;
        for (int64_t i = 0; i < length; ++i) found = part[i] > found ? part[i] : found;
        return found;
    }

    int64_t exchange(const int64_t* ranks, const int64_t* across, int64_t near, int64_t far, int64_t message) const {
        const int64_t rank = most(ranks, 2 * nodes.ranks), node = most(across, 2 * nodes.count());
        return std::max(rank * near, node * far) + message * std::min(rank, nodes.ranks - 1);
    }

    int64_t time(const Costs& c) const {
        const int64_t zero = 0;
        const int64_t trip = exchange(guests, rows_in, c.row_near, c.row_far, c.message * c.micro_batches);
        const int64_t gather = exchange(taken, copies_in, c.copy_near, c.copy_far, c.message);
        const int64_t back = exchange(taken, copies_in, c.grad_near, c.grad_far, c.message);
        const int64_t forward = c.gathers_forward * std::max(zero, gather - c.hidden_forward);
        const int64_t hidden = std::max(c.gathers_backward, c.reductions) * c.hidden_backward;
        const int64_t backward = std::max(zero, c.gathers_backward * gather + c.reductions * back - hidden);
        return most(work, nodes.ranks) + 4 * trip + forward + backward;
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

    Bank(const int64_t* counts, const int64_t* owners, int64_t experts, const Nodes& nodes, const Costs& costs,
         int64_t most_copies)
        : counts(counts), owners(owners), experts(experts), nodes(nodes), costs(costs), most_copies(most_copies),
          nodes_counts(experts * nodes.count(), 0), alone(nodes) {
        for (int64_t e = 0; e < experts; ++e) {
            int64_t* sums = nodes_counts.data() + e * nodes.count();
            for (int64_t n = 0; n < nodes.count(); ++n)
                for (int64_t r = nodes.begin(n); r < nodes.end(n); ++r) sums[n] += of(e)[r];
            alone.alone(of(e), sums, owners[e], costs);
        }
    }

    const int64_t* of(int64_t expert) const { return counts + expert * nodes.ranks; }
    const int64_t* of_node(int64_t expert) const { return nodes_counts.data() + expert * nodes.count(); }

    // What a plan takes; UNFIT where a rank would have too many copies.
    int64_t time(const Load& load) const {
        return load.most(load.taken, nodes.ranks) <= most_copies ? load.time(costs) : UNFIT;
    }

    // templates (depth, ranks), times (depth + 1); see prefix_times() in parallel/costs.py.
    void prefixes(const std::uint8_t* there, int64_t depth, int64_t* times) const {
        Load load(nodes);
        load.take(alone);
        times[0] = time(load);
        for (int64_t e = 0; e < depth; ++e) {
            const bool more = times[e] != UNFIT && load.widen(of(e), of_node(e), there + e * nodes.ranks, owners[e], costs);
            times[e + 1] = more ? time(load) : times[e];  // a rank that has too many never has less
        }
    }
};

}  // namespace copies
