// Cross-entropy of rows of logits, which become its gradient in place. A row stays in the cache between its passes.
#include "common.h"

// losses[r] = log(sum(exp(logits[r]))) - logits[r, label]; rows with a negative label are padding: no loss, no gradient.
template <class T>
void cross_entropy(T* logits, const int64_t* labels, T* losses, int64_t rows, int64_t classes, int64_t with_gradient,
                   int64_t threads) {
    PARALLEL_FOR
    for (int64_t r = 0; r < rows; ++r) {
        T* row = logits + r * classes;
        const int64_t label = labels[r];
        if (label < 0) {
            losses[r] = 0;
            if (with_gradient) std::memset(row, 0, classes * sizeof(T));
            continue;
        }
        T highest = row[0];
#pragma omp simd reduction(max : highest)
        for (int64_t i = 0; i < classes; ++i) highest = row[i] > highest ? row[i] : highest;
        const T shifted = row[label] - highest;
        T sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < classes; ++i) {
            const T power = exponential(row[i] - highest);
            row[i] = power;
            sum += power;
        }
        losses[r] = std::log(sum) - shifted;
        if (with_gradient) {
            const T scale = T(1) / sum;
#pragma omp simd
            for (int64_t i = 0; i < classes; ++i) row[i] *= scale;
            row[label] -= T(1);
        }
    }
}

#define EXPORT(T, S)                                                                                                     \
    extern "C" void cross_entropy_##S(T* logits, const int64_t* labels, T* losses, int64_t rows, int64_t classes,        \
                                      int64_t with_gradient, int64_t threads) {                                          \
        cross_entropy<T>(logits, labels, losses, rows, classes, with_gradient, threads);                                 \
    }
EXPORT(float, f32)
EXPORT(double, f64)
#undef EXPORT
