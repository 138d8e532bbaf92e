// Root mean square normalisation of rows: y = x / sqrt(mean(x^2) + eps) * weight.
#include "common.h"

template <class T>
void rms_norm_forward(const T* x, const T* weight, T* y, T* inverse, int64_t rows, int64_t dim, double eps, int64_t threads) {
    PARALLEL_FOR
    for (int64_t r = 0; r < rows; ++r) {
        const T* in = x + r * dim;
        T* out = y + r * dim;
        T sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < dim; ++i) sum += in[i] * in[i];
        const T scale = inverse[r] = T(1) / std::sqrt(sum / T(dim) + T(eps));
#pragma omp simd
        for (int64_t i = 0; i < dim; ++i) out[i] = in[i] * scale * weight[i];
    }
}

// grad_x = scale * grad * weight - x * scale^3 * mean(grad * weight * x); partial (blocks, dim) holds sums of
// grad * x * scale.
template <class T>
void rms_norm_backward(const T* grad, const T* x, const T* weight, const T* inverse, T* grad_x, T* grad_weight, T* partial,
                       int64_t rows, int64_t dim, int64_t threads) {
    const int64_t blocks = blocks_of(rows);
    PARALLEL_FOR
    for (int64_t b = 0; b < blocks; ++b) {
        T* sums = partial + b * dim;
        for (int64_t i = 0; i < dim; ++i) sums[i] = 0;
        const int64_t end = (b + 1) * BLOCK < rows ? (b + 1) * BLOCK : rows;
        for (int64_t r = b * BLOCK; r < end; ++r) {
            const T *in = x + r * dim, *g = grad + r * dim;
            T* out = grad_x + r * dim;
            const T scale = inverse[r];
            T dot = 0;
#pragma omp simd reduction(+ : dot)
            for (int64_t i = 0; i < dim; ++i) dot += g[i] * in[i] * weight[i];
            const T share = dot * scale * scale * scale / T(dim);
#pragma omp simd
            for (int64_t i = 0; i < dim; ++i) {
                sums[i] += g[i] * in[i] * scale;
                out[i] = g[i] * weight[i] * scale - in[i] * share;
            }
        }
    }
    add_blocks(partial, grad_weight, blocks, dim);
}

#define EXPORT(T, S)                                                                                                     \
    extern "C" void rms_norm_forward_##S(const T* x, const T* w, T* y, T* inv, int64_t rows, int64_t dim, double eps,    \
                                         int64_t threads) {                                                              \
        rms_norm_forward<T>(x, w, y, inv, rows, dim, eps, threads);                                                      \
    }                                                                                                                    \
    extern "C" void rms_norm_backward_##S(const T* g, const T* x, const T* w, const T* inv, T* gx, T* gw, T* partial,    \
                                          int64_t rows, int64_t dim, int64_t threads) {                                  \
        rms_norm_backward<T>(g, x, w, inv, gx, gw, partial, rows, dim, threads);                                         \
    }
EXPORT(float, f32)
EXPORT(double, f64)
#undef EXPORT
