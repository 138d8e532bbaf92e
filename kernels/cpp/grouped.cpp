// Products of groups of rows, each group with a matrix of its own, as many single-threaded products at a time as there are
// threads. The products are BLAS's; tasks are cut by sizes only, so results do not depend on the number of threads.
// Matrices here are row-major; BLAS sees them as column-major transposes.
#include "common.h"

// Fortran's ?gemm: column-major C (m, n) = op(A) op(B).
template <class T>
using Gemm = void (*)(const char*, const char*, const int*, const int*, const int*, const T*, const T*, const int*, const T*,
                      const int*, const T*, T*, const int*);

constexpr int64_t TASK_ROWS = 256;

template <class T>
void product(Gemm<T> gemm, bool transpose_left, bool transpose_right, int64_t m, int64_t n, int64_t k, const T* left,
             int64_t left_stride, const T* right, int64_t right_stride, T* out, int64_t out_stride) {
    const T one = 1, zero = 0;
    const int rows = n, columns = m, inner = k, ldl = left_stride, ldr = right_stride, ldo = out_stride;
    gemm(transpose_right ? "T" : "N", transpose_left ? "T" : "N", &rows, &columns, &inner, &one, right, &ldr, left, &ldl,
         &zero, out, &ldo);
}

// out rows of group g = rows of g times weights[g]^T (outputs, inputs), or times weights[g] (inputs, outputs) where
// `transposed` says that the weights lie so.
template <class T>
void grouped_linear(Gemm<T> gemm, const T* rows, const T* weights, const int64_t* counts, T* out, int64_t groups,
                    int64_t inputs, int64_t outputs, int64_t transposed, int64_t threads) {
#pragma omp parallel num_threads(threads)
    {
        int64_t start = 0;
        for (int64_t g = 0; g < groups; start += counts[g], ++g) {
            const int64_t tasks = (counts[g] + TASK_ROWS - 1) / TASK_ROWS;
#pragma omp for schedule(dynamic, 1) nowait
            for (int64_t task = 0; task < tasks; ++task) {
                const int64_t first = start + task * TASK_ROWS, left = start + counts[g] - first;
                const int64_t size = left < TASK_ROWS ? left : TASK_ROWS;
                product(gemm, false, !transposed, size, outputs, inputs, rows + first * inputs, inputs,
                        weights + g * inputs * outputs, transposed ? outputs : inputs, out + first * outputs, outputs);
            }
        }
    }
}

// out[g] = (left rows of g)^T times (right rows of g); zero for an empty group.
template <class T>
void grouped_outer(Gemm<T> gemm, const T* left, const T* right, const int64_t* counts, T* out, int64_t groups,
                   int64_t outputs, int64_t inputs, int64_t threads) {
    constexpr int64_t slice = 192;  // rows of the result in one task
    const int64_t slices = (outputs + slice - 1) / slice;
#pragma omp parallel num_threads(threads)
    {
        int64_t start = 0;
        for (int64_t g = 0; g < groups; start += counts[g], ++g) {
#pragma omp for schedule(dynamic, 1) nowait
            for (int64_t task = 0; task < slices; ++task) {
                const int64_t first = task * slice, size = outputs - first < slice ? outputs - first : slice;
                T* into = out + (g * outputs + first) * inputs;
                if (counts[g] == 0)
                    std::memset(into, 0, size * inputs * sizeof(T));
                else
                    product(gemm, true, false, size, inputs, counts[g], left + start * outputs + first, outputs,
                            right + start * inputs, inputs, into, inputs);
            }
        }
    }
}

#define EXPORT(T, S)                                                                                                     \
    extern "C" void grouped_linear_##S(Gemm<T> gemm, const T* rows, const T* weights, const int64_t* counts, T* out,     \
                                       int64_t groups, int64_t inputs, int64_t outputs, int64_t transposed,              \
                                       int64_t threads) {                                                                \
        grouped_linear<T>(gemm, rows, weights, counts, out, groups, inputs, outputs, transposed, threads);               \
    }                                                                                                                    \
    extern "C" void grouped_outer_##S(Gemm<T> gemm, const T* left, const T* right, const int64_t* counts, T* out,        \
                                      int64_t groups, int64_t outputs, int64_t inputs, int64_t threads) {                \
        grouped_outer<T>(gemm, left, right, counts, out, groups, outputs, inputs, threads);                              \
    }
EXPORT(float, f32)
EXPORT(double, f64)
#undef EXPORT
