// The non-linearities of kernels/activation.py: values, and gradients from the input alone.
#pragma once
#include "common.h"

// The normal distribution at x, phi and its integral Phi. Phi comes from erfc(z) = exp(-z^2) p(t) / (1 + 2 z), where
// t = (z - 3) / (z + 3) maps z >= 0 to [-1, 1] (M. Shepherd and J. Laframboise, Math. Comp. 36, 1981); p is the Chebyshev
// fit, within 5e-9 for float and 3e-16 for double. The lower tail keeps its digits.
template <class T> struct Normal {
    T density, share;
};

template <class T> inline T erfc_fit(T t) {
    constexpr bool wide = sizeof(T) == 8;
    constexpr int terms = wide ? 23 : 12;
    constexpr double narrow_fit[] = {1.253008056,     -0.1356210694,  -0.04756215693, 0.1296441143,
                                     -0.1192752753,   0.06831656777,  -0.02376357644, 0.00249911687,
                                     0.001875079124,  -0.000726453679, -9.254516687e-5, 7.731024224e-5};
    constexpr double wide_fit[] = {
        1.25300805826972955,     -0.13562110612457575,    -0.0475622943534203791,  0.129645158702283467,
        -0.119273663416760023,   0.0683080273563839702,   -0.0237705148915300752,  0.00252939166720517231,
        0.0018886900977441495,   -0.000779831279729015847, -0.000105158312978131282, 0.00012509531076254534,
        4.94412434222365985e-6,  -0.0000200899978332842766, -7.18788383440426665e-7, 3.4542947702777379e-6,
        3.36697908064075958e-7,  -5.96398362552274053e-7, -1.20541422864893789e-7, 8.76588141173055843e-8,
        2.78438812655022206e-8,  -7.64196289258997485e-9, -3.18135414349692733e-9};
    T sum = T(wide ? wide_fit[22] : narrow_fit[11]);
#pragma GCC unroll 32
    for (int i = terms - 2; i >= 0; --i) sum = sum * t + T(wide ? wide_fit[i] : narrow_fit[i < 12 ? i : 0]);
    return sum;
}

template <class T> inline Normal<T> normal(T x) {
    T z = std::fabs(x) * T(0.70710678118654752440);
    z = z > T(40) ? T(40) : z;  // beyond it every type has 0; infinity would become NaN
    const T power = exponential(-z * z);
    const T upper = T(0.5) * power * erfc_fit((z - T(3)) / (z + T(3))) / (T(1) + T(2) * z);
    return {power * T(0.39894228040143267794), x < T(0) ? upper : T(1) - upper};
}

template <class T> inline T relu(T x) { return x < T(0) ? T(0) : x; }  // NaN stays NaN

// `value` is the activation of one element; `slopes` are its derivatives by gate and up, and `value` again.
template <class T> struct Slopes {
    T value, gate, up;
};

struct SwiGlu {
    static constexpr bool gated = true;
    template <class T> static T value(T gate, T up) { return gate * sigmoid(gate) * up; }
    template <class T> static Slopes<T> slopes(T gate, T up) {
        const T s = sigmoid(gate), silu = gate * s;
        return {silu * up, up * (s + silu * (T(1) - s)), silu};
    }
};

struct Gelu {
    static constexpr bool gated = false;
    template <class T> static T value(T x, T) { return x * normal(x).share; }
    template <class T> static Slopes<T> slopes(T x, T) {
        const Normal<T> n = normal(x);
        return {x * n.share, n.share + x * n.density, T(0)};
    }
};

struct Relu2 {
    static constexpr bool gated = false;
    template <class T> static T value(T x, T) { return relu(x) * relu(x); }
    template <class T> static Slopes<T> slopes(T x, T) { return {relu(x) * relu(x), T(2) * relu(x), T(0)}; }
};

struct DRelu {
    static constexpr bool gated = true;
    template <class T> static T value(T gate, T up) { return relu(gate) * relu(up); }
    template <class T> static Slopes<T> slopes(T gate, T up) {
        return {relu(gate) * relu(up), gate > T(0) ? relu(up) : T(0), up > T(0) ? relu(gate) : T(0)};
    }
};

// Calls `task` with the kind: its number is the position in KINDS of kernels/activation.py.
template <class Task> void with_kind(int64_t kind, Task task) {
    switch (kind) {
    case 0: return task(SwiGlu());
    case 1: return task(Gelu());
    case 2: return task(Relu2());
    default: return task(DRelu());
    }
}

// One row; gated rows hold the gates first.
template <class Kind, class T> void activate_row(const T* hidden, T* out, int64_t width) {
    const T* up = hidden + (Kind::gated ? width : 0);
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) out[i] = Kind::value(hidden[i], up[i]);
}

template <class Kind, class T> void gradient_row(const T* hidden, const T* grad, T* grad_hidden, int64_t width) {
    const T* up = hidden + (Kind::gated ? width : 0);
    T* grad_up = grad_hidden + (Kind::gated ? width : 0);
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) {
        const Slopes<T> s = Kind::slopes(hidden[i], up[i]);
        const T g = grad[i];
        grad_hidden[i] = g * s.gate;
        if (Kind::gated) grad_up[i] = g * s.up;
    }
}

// The same under a gate: gradients are multiplied by it, `grad` becomes the gated activation, and what is returned is the
// gradient of the gate.
template <class Kind, class T>
T gated_gradient_row(const T* hidden, T gate, T* grad, T* grad_hidden, int64_t width) {
    const T* up = hidden + (Kind::gated ? width : 0);
    T* grad_up = grad_hidden + (Kind::gated ? width : 0);
    T dot = 0;
#pragma omp simd reduction(+ : dot)
    for (int64_t i = 0; i < width; ++i) {
        const Slopes<T> s = Kind::slopes(hidden[i], up[i]);
        const T g = grad[i];
        dot += g * s.value;
        grad[i] = gate * s.value;
        grad_hidden[i] = gate * g * s.gate;
        if (Kind::gated) grad_up[i] = gate * g * s.up;
    }
    return dot;
}
