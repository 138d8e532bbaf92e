// silu(gate) * up on rows that hold both, gates first.
#include "common.h"

template <class T> void gated_silu_forward(const T* hidden, T* out, int64_t rows, int64_t width, int64_t threads) {
    PARALLEL_FOR
    for (int64_t r = 0; r < rows; ++r) {
        const T *gate = hidden + r * 2 * width, *up = gate + width;
        T* y = out + r * width;
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) y[i] = gate[i] * sigmoid(gate[i]) * up[i];
    }
}

template <class T>
void gated_silu_backward(const T* grad, const T* hidden, T* grad_hidden, int64_t rows, int64_t width, int64_t threads) {
    PARALLEL_FOR
    for (int64_t r = 0; r < rows; ++r) {
        const T *gate = hidden + r * 2 * width, *up = gate + width, *g = grad + r * width;
        T *grad_gate = grad_hidden + r * 2 * width, *grad_up = grad_gate + width;
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) {
            const T s = sigmoid(gate[i]);
            const T silu = gate[i] * s;
            grad_gate[i] = g[i] * up[i] * (s + silu * (T(1) - s));
            grad_up[i] = g[i] * silu;
        }
    }
}

#define EXPORT(T, S)                                                                                                     \
    extern "C" void gated_silu_forward_##S(const T* hidden, T* out, int64_t rows, int64_t width, int64_t threads) {      \
        gated_silu_forward<T>(hidden, out, rows, width, threads);                                                        \
    }                                                                                                                    \
    extern "C" void gated_silu_backward_##S(const T* g, const T* hidden, T* gh, int64_t rows, int64_t width,             \
                                            int64_t threads) {                                                           \
        gated_silu_backward<T>(g, hidden, gh, rows, width, threads);                                                     \
    }
EXPORT(float, f32)
EXPORT(double, f64)
#undef EXPORT
