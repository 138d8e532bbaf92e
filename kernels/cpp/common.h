// Shared by the CPU kernels. Loops over rows run on OpenMP threads; sums are formed in an order that does not depend on
// how many there are, so equal inputs give equal bits on any number of threads.
#pragma once

#if defined(__AVX512F__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("prefer-vector-width=512")  // GCC takes half of it, for processors that slow down; products use all anyway
#endif

#include <cmath>
#include <cstdint>
#include <cstring>

using std::int64_t;

// Rows that one thread sums into one partial result: fixed, because the order of a sum must be.
constexpr int64_t BLOCK = 64;

inline int64_t blocks_of(int64_t rows) { return (rows + BLOCK - 1) / BLOCK; }

#define PARALLEL_FOR _Pragma("omp parallel for schedule(static) num_threads(threads)")

template <class T> struct Exponential;

template <> struct Exponential<float> {
    using Bits = std::int32_t;
    static constexpr int terms = 7, mantissa = 23;
    static constexpr Bits bias = 127;
    static constexpr float lowest = -87.0f, highest = 88.8f;
    static constexpr float log2e = 1.44269504088896341f, ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
};

template <> struct Exponential<double> {
    using Bits = std::int64_t;
    static constexpr int terms = 13, mantissa = 52;
    static constexpr Bits bias = 1023;
    static constexpr double lowest = -708.0, highest = 709.8;
    static constexpr double log2e = 1.4426950408889634074, ln2_high = 6.93145751953125e-1,
                            ln2_low = 1.42860682030941723212e-6;
};

// e^x without branches, so that loops over it become vector code: 2^n times the series of the rest. Within 2 ulp.
// Below the normal numbers it is the smallest of them, above them infinity; NaN stays NaN.
template <class T> inline T exponential(T x) {
    using E = Exponential<T>;
    x = x < E::lowest ? E::lowest : x;
    x = x > E::highest ? E::highest : x;
    const T n = std::nearbyint(x * E::log2e);
    const T rest = (x - n * E::ln2_high) - n * E::ln2_low;
    constexpr double factorials[] = {1.,       1.,       2.,        6.,         24.,         120.,         720.,
                                     5040.,    40320.,   362880.,   3628800.,   39916800.,   479001600.,   6227020800.};
    T sum = T(1.0 / factorials[E::terms]);
#pragma GCC unroll 16
    for (int i = E::terms - 1; i >= 0; --i) sum = sum * rest + T(1.0 / factorials[i]);
    const typename E::Bits bits = (static_cast<typename E::Bits>(n) + E::bias) << E::mantissa;
    T power;
    std::memcpy(&power, &bits, sizeof power);
    return sum * power;
}

template <class T> inline T sigmoid(T x) { return T(1) / (T(1) + exponential(-x)); }

// Adds up partial results (blocks, width) in order.
template <class T> void add_blocks(const T* partial, T* out, int64_t blocks, int64_t width) {
    for (int64_t i = 0; i < width; ++i) out[i] = 0;
    for (int64_t b = 0; b < blocks; ++b)
        for (int64_t i = 0; i < width; ++i) out[i] += partial[b * width + i];
}

// y[t] = sum of weights[a] * rows[where[a]] over offsets[t] <= a < offsets[t + 1]; without weights they are 1.
template <class T>
inline void sum_of_token(const T* rows, const int64_t* where, const int64_t* offsets, const T* weights, T* y, int64_t t,
                         int64_t dim) {
    T* out = y + t * dim;
    const int64_t begin = offsets[t], end = offsets[t + 1];
    if (begin == end) std::memset(out, 0, dim * sizeof(T));
    for (int64_t a = begin; a < end; ++a) {
        const T* row = rows + where[a] * dim;
        const T weight = weights ? weights[a] : T(1);
        if (a == begin) {
#pragma omp simd
            for (int64_t i = 0; i < dim; ++i) out[i] = row[i] * weight;
        } else {
#pragma omp simd
            for (int64_t i = 0; i < dim; ++i) out[i] += row[i] * weight;
        }
    }
}
