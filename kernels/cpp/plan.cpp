// Routing to plan: a stable counting sort of the assignments by expert, and the way back.
#include "common.h"

// Assignment a is the a % width th of item a / width; items are tokens, or with `tokens` assignments of width 1. Chunks
// of items are counted, then placed, side by side: integers, so that their number changes no result.
// starts (chunks, experts + 1): within a chunk, first how often an expert occurs, then its next row. The last column
// counts ids that are no expert; where there are any, nothing else is written. Returns how many, as far as an int can.
static int plan(const int64_t* experts, const int64_t* tokens, int64_t* counts, int64_t* by_row, int64_t* order,
                 int64_t* where, int64_t* offsets, int64_t* starts, int64_t items, int64_t width, int64_t num_tokens,
                 int64_t num_experts, int64_t ragged, int64_t chunks, int64_t threads) {
    const int64_t stride = num_experts + 1;
    const auto edge = [&](int64_t chunk) { return items * chunk / chunks; };
    PARALLEL_FOR
    for (int64_t c = 0; c < chunks; ++c) {
        int64_t* mine = starts + c * stride;
        std::memset(mine, 0, stride * sizeof(int64_t));
        for (int64_t a = edge(c) * width; a < edge(c + 1) * width; ++a) {
            const bool known = static_cast<std::uint64_t>(experts[a]) < static_cast<std::uint64_t>(num_experts);
            ++mine[known ? experts[a] : num_experts];
        }
    }
    for (int64_t c = 1; c < chunks; ++c) starts[num_experts] += starts[c * stride + num_experts];
    if (const int64_t wrong = starts[num_experts])
        return static_cast<int>(wrong < INT32_MAX ? wrong : INT32_MAX);
    int64_t row = 0;
    for (int64_t e = 0; e < num_experts; ++e) {
        const int64_t first = row;
        for (int64_t c = 0; c < chunks; ++c) {
            const int64_t size = starts[c * stride + e];
            starts[c * stride + e] = row;
            row += size;
        }
        counts[e] = row - first;
    }
    PARALLEL_FOR
    for (int64_t c = 0; c < chunks; ++c) {
        int64_t* next = starts + c * stride;
        for (int64_t i = edge(c); i < edge(c + 1); ++i) {
            const int64_t token = ragged ? tokens[i] : i;
            for (int64_t a = i * width; a < (i + 1) * width; ++a) {
                const int64_t r = next[experts[a]]++;
                where[a] = r;
                order[r] = a;
                by_row[r] = token;
            }
        }
    }
    if (ragged) {  // sorted: a token's assignments begin where the first one of it or of a later token stands
        int64_t token = 0;
        for (int64_t a = 0; a < items; ++a)
            for (; token <= tokens[a] && token <= num_tokens; ++token) offsets[token] = a;
        for (; token <= num_tokens; ++token) offsets[token] = items;
    } else {
        for (int64_t t = 0; t <= num_tokens; ++t) offsets[t] = t * width;
    }
    return 0;
}

extern "C" int plan_i64(const int64_t* experts, const int64_t* tokens, int64_t* counts, int64_t* by_row, int64_t* order,
                         int64_t* where, int64_t* offsets, int64_t* starts, int64_t items, int64_t width,
                         int64_t num_tokens, int64_t num_experts, int64_t ragged, int64_t chunks, int64_t threads) {
    return plan(experts, tokens, counts, by_row, order, where, offsets, starts, items, width, num_tokens, num_experts, ragged,
         chunks, threads);
}
