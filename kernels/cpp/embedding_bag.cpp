// Reads of a table through slots (tokens, per_token), and the gradient of the rows that were read. The table is larger
// than any cache: rows are asked for before they are needed.
#include "common.h"

#include <vector>

constexpr int64_t AHEAD = 4096;  // bytes on their way while a row is used

template <class T> inline int64_t rows_ahead(int64_t dim) { return 1 + AHEAD / (dim * int64_t(sizeof(T)) + 1); }

// The first two lines of every KiB: finding the page is the slow part, and the processor follows a row that it sees being
// read. Asking for all lines of a large table was slower: that takes the places which the reads themselves need.
template <class T> inline void prefetch_row(const T* row, int64_t dim) {
    constexpr int64_t LINE = 64 / sizeof(T);
    for (int64_t i = 0; i < dim; i += 16 * LINE) {
        __builtin_prefetch(row + i);
        if (i + LINE < dim) __builtin_prefetch(row + i + LINE);
    }
}

// y[t] = sum of weights[t, s] * table[slots[t, s]]. As many columns as the registers hold are summed there: without stores
// between the rows, the processor looks further ahead.
template <class T>
void bag_sums(const T* table, const int64_t* slots, const T* weights, T* y, int64_t tokens, int64_t per_token,
              int64_t dim, int64_t threads) {
    typedef T Vector __attribute__((vector_size(64)));
    constexpr int64_t VECTORS = 16, VECTOR = 64 / sizeof(T), WIDTH = VECTORS * VECTOR;
    const int64_t ahead = rows_ahead<T>(dim), reads = tokens * per_token;
    PARALLEL_FOR
    for (int64_t t = 0; t < tokens; ++t) {
        T* out = y + t * dim;
        const int64_t begin = t * per_token, end = begin + per_token;
        int64_t column = 0;
        for (; column + WIDTH <= dim; column += WIDTH) {
            Vector sum[VECTORS] = {};
            for (int64_t r = begin; r < end; ++r) {
                if (r + ahead < reads) prefetch_row(table + slots[r + ahead] * dim + column, WIDTH);
                const T* row = table + slots[r] * dim + column;
                const T weight = weights[r];
#pragma GCC unroll 16
                for (int64_t i = 0; i < VECTORS; ++i) {
                    Vector values;
                    std::memcpy(&values, row + i * VECTOR, sizeof values);
                    sum[i] += values * weight;
                }
            }
            std::memcpy(out + column, sum, sizeof sum);
        }
        if (column == dim) continue;
        const int64_t rest = dim - column;
        out += column;
        std::memset(out, 0, rest * sizeof(T));
        for (int64_t r = begin; r < end; ++r) {
            if (r + ahead < reads) prefetch_row(table + slots[r + ahead] * dim + column, rest);
            const T* row = table + slots[r] * dim + column;
            const T weight = weights[r];
#pragma omp simd
            for (int64_t i = 0; i < rest; ++i) out[i] += row[i] * weight;
        }
    }
}

// out[t, s] = table[slots[t, s]] . vectors[t]
template <class T>
void bag_dots(const T* table, const int64_t* slots, const T* vectors, T* out, int64_t tokens, int64_t per_token,
              int64_t dim, int64_t threads) {
    const int64_t ahead = rows_ahead<T>(dim), reads = tokens * per_token;
    PARALLEL_FOR
    for (int64_t t = 0; t < tokens; ++t) {
        const T* vector = vectors + t * dim;
        for (int64_t r = t * per_token; r < (t + 1) * per_token; ++r) {
            if (r + ahead < reads) prefetch_row(table + slots[r + ahead] * dim, dim);
            const T* row = table + slots[r] * dim;
            T dot = 0;
#pragma omp simd reduction(+ : dot)
            for (int64_t i = 0; i < dim; ++i) dot += row[i] * vector[i];
            out[r] = dot;
        }
    }
}

// A stable radix sort: the order of the reads by slot, and their slots in that order. Takes as many passes as the
// number of rows has digits.
inline void sort_slots(const int64_t* slots, int64_t* order, int64_t* keys, int64_t reads, int64_t rows) {
    constexpr int DIGIT = 11;
    constexpr int64_t BUCKETS = 1 << DIGIT;
    for (int64_t r = 0; r < reads; ++r) order[r] = r, keys[r] = slots[r];
    std::vector<int64_t> others(2 * reads);
    int64_t *to_order = others.data(), *to_keys = to_order + reads, *from_order = order, *from_keys = keys;
    for (int shift = 0; rows > 1 && ((rows - 1) >> shift) > 0; shift += DIGIT) {
        int64_t begin[BUCKETS + 1] = {};
        for (int64_t r = 0; r < reads; ++r) ++begin[((from_keys[r] >> shift) & (BUCKETS - 1)) + 1];
        for (int64_t b = 0; b < BUCKETS; ++b) begin[b + 1] += begin[b];
        for (int64_t r = 0; r < reads; ++r) {
            const int64_t place = begin[(from_keys[r] >> shift) & (BUCKETS - 1)]++;
            to_order[place] = from_order[r], to_keys[place] = from_keys[r];
        }
        std::swap(from_order, to_order), std::swap(from_keys, to_keys);
    }
    if (from_order != order) {
        std::memcpy(order, from_order, reads * sizeof(int64_t));
        std::memcpy(keys, from_keys, reads * sizeof(int64_t));
    }
}

// out[key] = sum of coefficients[r] * source[r / per_token] over the run of reads r with that key. A run belongs to the
// thread in whose share it begins, which sums it alone.
template <class T>
void sum_runs(const T* source, const T* coefficients, const int64_t* order, const int64_t* keys, T* out, int64_t reads,
              int64_t per_token, int64_t dim, int64_t threads) {
    const int64_t ahead = rows_ahead<T>(dim), shares = 8 * threads;
    PARALLEL_FOR
    for (int64_t share = 0; share < shares; ++share) {
        int64_t a = share * reads / shares;
        const int64_t end = (share + 1) * reads / shares;
        while (a > 0 && a < end && keys[a] == keys[a - 1]) ++a;
        while (a < end) {
            const int64_t key = keys[a];
            T* to = out + key * dim;
            for (bool first = true; a < reads && keys[a] == key; ++a, first = false) {
                if (a + ahead < reads) prefetch_row(source + order[a + ahead] / per_token * dim, dim);
                const T* row = source + order[a] / per_token * dim;
                const T factor = coefficients[order[a]];
                if (first) {
#pragma omp simd
                    for (int64_t i = 0; i < dim; ++i) to[i] = row[i] * factor;
                } else {
#pragma omp simd
                    for (int64_t i = 0; i < dim; ++i) to[i] += row[i] * factor;
                }
            }
        }
    }
}

#define EXPORT(T, S)                                                                                                     \
    extern "C" void bag_sums_##S(const T* table, const int64_t* slots, const T* weights, T* y, int64_t tokens,           \
                                 int64_t per_token, int64_t dim, int64_t threads) {                                      \
        bag_sums<T>(table, slots, weights, y, tokens, per_token, dim, threads);                                          \
    }                                                                                                                    \
    extern "C" void bag_dots_##S(const T* table, const int64_t* slots, const T* vectors, T* out, int64_t tokens,         \
                                 int64_t per_token, int64_t dim, int64_t threads) {                                      \
        bag_dots<T>(table, slots, vectors, out, tokens, per_token, dim, threads);                                        \
    }                                                                                                                    \
    extern "C" void sort_slots_##S(const int64_t* slots, int64_t* order, int64_t* keys, int64_t reads, int64_t rows,     \
                                   int64_t) {                                                                            \
        sort_slots(slots, order, keys, reads, rows);                                                                     \
    }                                                                                                                    \
    extern "C" void sum_runs_##S(const T* source, const T* coefficients, const int64_t* order, const int64_t* keys,      \
                                 T* out, int64_t reads, int64_t per_token, int64_t dim, int64_t threads) {               \
        sum_runs<T>(source, coefficients, order, keys, out, reads, per_token, dim, threads);                             \
    }
EXPORT(float, f32)
EXPORT(double, f64)
#undef EXPORT
