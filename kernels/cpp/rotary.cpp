// From the fused projection's heads (queries, keys, values; H + 2 J of them) to normalised and rotated queries and keys,
// and copied values: one pass over memory each way. Without weights nothing is normalised.
#include "common.h"

template <class T>
void rotary_forward(const T* heads, const T* turns, const T* query_weight, const T* key_weight, T* queries, T* keys,
                    T* values, T* inverse, int64_t tokens, int64_t length, int64_t num_queries, int64_t num_keys,
                    int64_t channels, double eps, int64_t threads) {
    const int64_t rotated = num_queries + num_keys, all = rotated + num_keys;
    PARALLEL_FOR
    for (int64_t t = 0; t < tokens; ++t) {
        const T* in = heads + t * all * channels;
        const T* turn = turns + (t % length) * channels;  // pairs (cos, sin)
        for (int64_t h = 0; h < rotated; ++h, in += channels) {
            const bool is_query = h < num_queries;
            T* out = is_query ? queries + (t * num_queries + h) * channels : keys + (t * num_keys + h - num_queries) * channels;
            const T* weight = is_query ? query_weight : key_weight;
            const T* x = in;
            if (weight) {
                T sum = 0;
#pragma omp simd reduction(+ : sum)
                for (int64_t i = 0; i < channels; ++i) sum += in[i] * in[i];
                const T scale = inverse[t * rotated + h] = T(1) / std::sqrt(sum / T(channels) + T(eps));
#pragma omp simd
                for (int64_t i = 0; i < channels; ++i) out[i] = in[i] * scale * weight[i];
                x = out;
            }
#pragma omp simd
            for (int64_t i = 0; i < channels; i += 2) {
                const T real = x[i], imaginary = x[i + 1];
                out[i] = real * turn[i] - imaginary * turn[i + 1];
                out[i + 1] = real * turn[i + 1] + imaginary * turn[i];
            }
        }
        std::memcpy(values + t * num_keys * channels, in, num_keys * channels * sizeof(T));
    }
}

// Gradients of queries, keys and values come with strides (sequence, position, head), as attention leaves them; `partial`
// (blocks, 2, channels) and `scratch` (blocks, channels) are work space.
template <class T>
void rotary_backward(const T* grad_queries, const T* grad_keys, const T* grad_values, const int64_t* strides, const T* heads,
                     const T* turns, const T* query_weight, const T* key_weight, const T* inverse, T* grad_heads,
                     T* grad_weights, T* partial, T* scratch, int64_t tokens, int64_t length, int64_t num_queries,
                     int64_t num_keys, int64_t channels, int64_t threads) {
    const int64_t rotated = num_queries + num_keys, all = rotated + num_keys, blocks = blocks_of(tokens);
    PARALLEL_FOR
    for (int64_t b = 0; b < blocks; ++b) {
        T* sums = partial + b * 2 * channels;
        T* turned = scratch + b * channels;
        for (int64_t i = 0; i < 2 * channels; ++i) sums[i] = 0;
        const int64_t end = (b + 1) * BLOCK < tokens ? (b + 1) * BLOCK : tokens;
        for (int64_t t = b * BLOCK; t < end; ++t) {
            const int64_t sequence = t / length, position = t % length;
            const T* turn = turns + position * channels;
            const T* in = heads + t * all * channels;
            T* out = grad_heads + t * all * channels;
            for (int64_t h = 0; h < all; ++h, in += channels, out += channels) {
                const int part = h < num_queries ? 0 : h < rotated ? 1 : 2;
                const T* base = part == 0 ? grad_queries : part == 1 ? grad_keys : grad_values;
                const int64_t* step = strides + 3 * part;
                const int64_t head = part == 0 ? h : part == 1 ? h - num_queries : h - rotated;
                const T* grad = base + sequence * step[0] + position * step[1] + head * step[2];
                if (part == 2) {
                    std::memcpy(out, grad, channels * sizeof(T));
                    continue;
                }
                const T* weight = part == 0 ? query_weight : key_weight;
                T* back = weight ? turned : out;  // the transpose of a rotation turns the other way
#pragma omp simd
                for (int64_t i = 0; i < channels; i += 2) {
                    const T real = grad[i], imaginary = grad[i + 1];
                    back[i] = real * turn[i] + imaginary * turn[i + 1];
                    back[i + 1] = imaginary * turn[i] - real * turn[i + 1];
                }
                if (!weight) continue;
                T* sum = sums + part * channels;
                const T scale = inverse[t * rotated + h];
                T dot = 0;
#pragma omp simd reduction(+ : dot)
                for (int64_t i = 0; i < channels; ++i) dot += back[i] * in[i] * weight[i];
                const T share = dot * scale * scale * scale / T(channels);
#pragma omp simd
                for (int64_t i = 0; i < channels; ++i) {
                    sum[i] += back[i] * in[i] * scale;
                    out[i] = back[i] * weight[i] * scale - in[i] * share;
                }
            }
        }
    }
    if (query_weight) add_blocks(partial, grad_weights, blocks, 2 * channels);
}

#define EXPORT(T, S)                                                                                                     \
    extern "C" void rotary_forward_##S(const T* heads, const T* turns, const T* qw, const T* kw, T* q, T* k, T* v,       \
                                       T* inv, int64_t tokens, int64_t length, int64_t nq, int64_t nk, int64_t channels, \
                                       double eps, int64_t threads) {                                                    \
        rotary_forward<T>(heads, turns, qw, kw, q, k, v, inv, tokens, length, nq, nk, channels, eps, threads);           \
    }                                                                                                                    \
    extern "C" void rotary_backward_##S(const T* gq, const T* gk, const T* gv, const int64_t* strides, const T* heads,   \
                                        const T* turns, const T* qw, const T* kw, const T* inv, T* gh, T* gw,            \
                                        T* partial, T* scratch, int64_t tokens, int64_t length, int64_t nq, int64_t nk,  \
                                        int64_t channels, int64_t threads) {                                             \
        rotary_backward<T>(gq, gk, gv, strides, heads, turns, qw, kw, inv, gh, gw, partial, scratch, tokens, length, nq, \
                           nk, channels, threads);                                                                       \
    }
EXPORT(float, f32)
EXPORT(double, f64)
#undef EXPORT
