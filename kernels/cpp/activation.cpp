// `activate` of kernels/activation.py and its gradient.
#include "activation.h"

template <class T>
void activation_forward(const T* hidden, T* out, int64_t rows, int64_t width, int64_t kind, int64_t threads) {
    with_kind(kind, [=](auto k) {
        using Kind = decltype(k);
        PARALLEL_FOR
        for (int64_t r = 0; r < rows; ++r)
            activate_row<Kind>(hidden + r * width * (Kind::gated ? 2 : 1), out + r * width, width);
    });
}

template <class T>
void activation_backward(const T* grad, const T* hidden, T* grad_hidden, int64_t rows, int64_t width, int64_t kind,
                         int64_t threads) {
    with_kind(kind, [=](auto k) {
        using Kind = decltype(k);
        const int64_t inputs = width * (Kind::gated ? 2 : 1);
        PARALLEL_FOR
        for (int64_t r = 0; r < rows; ++r)
            gradient_row<Kind>(hidden + r * inputs, grad + r * width, grad_hidden + r * inputs, width);
    });
}

#define EXPORT(T, S)                                                                                                     \
    extern "C" void activation_forward_##S(const T* hidden, T* out, int64_t rows, int64_t width, int64_t kind,           \
                                           int64_t threads) {                                                            \
        activation_forward<T>(hidden, out, rows, width, kind, threads);                                                  \
    }                                                                                                                    \
    extern "C" void activation_backward_##S(const T* grad, const T* hidden, T* grad_hidden, int64_t rows, int64_t width, \
                                            int64_t kind, int64_t threads) {                                             \
        activation_backward<T>(grad, hidden, grad_hidden, rows, width, kind, threads);                                   \
    }
EXPORT(float, f32)
EXPORT(double, f64)
#undef EXPORT
