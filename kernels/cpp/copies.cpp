// Seats for copies, and what every prefix of a template takes, for planners in Python; see copies.h.
#include "copies.h"

extern "C" void spread_copies_i64(std::uint8_t* present, const int64_t* seats, const int64_t* weights, int64_t* spare,
                                  int64_t* room, int64_t experts, int64_t ranks, int64_t per_node, int64_t) {
    copies::spread(present, seats, weights, spare, room, experts, {ranks, per_node});
}

// templates (number, depth, ranks), times (number, depth + 1); see prefix_times() in parallel/costs.py.
extern "C" void prefix_times_i64(const int64_t* counts, const int64_t* owners, const copies::Costs* costs,
                                 const std::uint8_t* templates, int64_t* times, int64_t number, int64_t depth, int64_t experts,
                                 int64_t ranks, int64_t per_node, int64_t most_copies, int64_t) {
    const copies::Bank bank(counts, owners, experts, {ranks, per_node}, *costs, most_copies);
    for (int64_t i = 0; i < number; ++i) bank.prefixes(templates + i * depth * ranks, depth, times + i * (depth + 1));
}
