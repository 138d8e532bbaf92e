// Weighted rows back to tokens, and the gradient of that. Assignments are sorted by token; `where` is the row of each.
#include "common.h"

template <class T>
void sum_rows(const T* rows, const int64_t* where, const int64_t* offsets, const T* weights, T* y, int64_t tokens,
              int64_t dim, int64_t threads) {
    PARALLEL_FOR
    for (int64_t t = 0; t < tokens; ++t) sum_of_token(rows, where, offsets, weights, y, t, dim);
}

// grad_rows[where[a]] = weights[a] * grad[t]; grad_weights[a] = rows[where[a]] . grad[t]. Every row belongs to one a.
template <class T>
void combine_backward(const T* grad, const T* rows, const int64_t* where, const int64_t* offsets, const T* weights,
                      T* grad_rows, T* grad_weights, int64_t tokens, int64_t dim, int64_t threads) {
    PARALLEL_FOR
    for (int64_t t = 0; t < tokens; ++t) {
        const T* g = grad + t * dim;
        for (int64_t a = offsets[t]; a < offsets[t + 1]; ++a) {
            const T* row = rows + where[a] * dim;
            T* out = grad_rows + where[a] * dim;
            const T weight = weights[a];
            T dot = 0;
#pragma omp simd reduction(+ : dot)
            for (int64_t i = 0; i < dim; ++i) {
                dot += row[i] * g[i];
                out[i] = g[i] * weight;
            }
            grad_weights[a] = dot;
        }
    }
}

#define EXPORT(T, S)                                                                                                     \
    extern "C" void sum_rows_##S(const T* rows, const int64_t* where, const int64_t* offsets, const T* w, T* y,          \
                                 int64_t tokens, int64_t dim, int64_t threads) {                                         \
        sum_rows<T>(rows, where, offsets, w, y, tokens, dim, threads);                                                   \
    }                                                                                                                    \
    extern "C" void combine_backward_##S(const T* g, const T* rows, const int64_t* where, const int64_t* offsets,        \
                                         const T* w, T* gr, T* gw, int64_t tokens, int64_t dim, int64_t threads) {       \
        combine_backward<T>(g, rows, where, offsets, w, gr, gw, tokens, dim, threads);                                   \
    }
EXPORT(float, f32)
EXPORT(double, f64)
#undef EXPORT
