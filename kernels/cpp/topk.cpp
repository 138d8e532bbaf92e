// Token choice: scores of logits, the k best experts of a token, their weights and the probabilities over all experts.
#include "common.h"

#include <limits>
#include <vector>

// e^x that becomes zero where `exponential` stops falling: what is chosen must not depend on how numbers die out.
template <class T> inline T vanishing(T x) { return x < Exponential<T>::lowest ? T(0) : exponential(x); }

// Floats as integers of the same order; NaN counts as infinity. No float becomes the smallest integer.
template <class T> inline typename Exponential<T>::Bits ordered(T x) {
    using Bits = typename Exponential<T>::Bits;
    x = x != x ? std::numeric_limits<T>::infinity() : x + T(0);  // + 0 makes 0 of -0
    Bits bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits < 0 ? bits ^ std::numeric_limits<Bits>::max() : bits;
}

// The places of the largest keys, in descending order; of equals the first comes first. Keys found are overwritten.
template <class Key> void largest(Key* keys, int64_t size, int64_t* found, int64_t k) {
    constexpr Key gone = std::numeric_limits<Key>::min();
    const Key length = static_cast<Key>(size);
    Key last = length;
    for (int64_t i = 0; i < k; ++i) {
        Key best = gone, at = length;
#pragma omp simd reduction(max : best)
        for (Key e = 0; e < length; ++e) {
            const Key key = e == last ? gone : keys[e];
            keys[e] = key;
            best = key > best ? key : best;
        }
#pragma omp simd reduction(min : at)
        for (Key e = 0; e < length; ++e) {
            const Key here = keys[e] == best ? e : length;
            at = here < at ? here : at;
        }
        found[i] = last = at;
    }
}

// Keys of groups that are not among the `kept` best become those of -infinity; a group scores the sum of its best two.
template <class T, class Key>
void keep_groups(const T* selection, Key* keys, int64_t groups, int64_t size, int64_t kept, Key* scores, int64_t* best) {
    constexpr T low = -std::numeric_limits<T>::infinity();
    for (int64_t g = 0; g < groups; ++g) {
        T first = low, second = size > 1 ? low : T(0);
        for (int64_t e = 0; e < size; ++e) {
            const T raw = selection[g * size + e], value = raw != raw ? -low : raw;
            if (value > first) {
                second = size > 1 ? first : second;
                first = value;
            } else if (size > 1 && value > second) {
                second = value;
            }
        }
        scores[g] = ordered(first + second);
    }
    largest(scores, groups, best, kept);
    for (int64_t g = 0; g < groups; ++g) scores[g] = 0;
    for (int64_t i = 0; i < kept; ++i) scores[best[i]] = 1;
    for (int64_t g = 0; g < groups; ++g)
        if (!scores[g])
            for (int64_t e = 0; e < size; ++e) keys[g * size + e] = ordered(low);
}

struct Choice {
    int64_t experts, k, sigmoid, after, groups, kept;
    double scale;
};

// Softmax of the scores' logarithms, by rows of `size`: of logits, or with `sigmoid` of log(sigmoid(logits)), where
// sigmoid(x) = e^min(x, 0) / (1 + e^-|x|) gives the ratios of scores without a logarithm.
template <class T> void shares(const T* x, T* out, int64_t size, bool sigmoid, T scale) {
    T highest = -std::numeric_limits<T>::infinity(), sum = 0;
#pragma omp simd reduction(max : highest)
    for (int64_t e = 0; e < size; ++e) highest = x[e] > highest ? x[e] : highest;
    if (sigmoid) {
        highest = highest < 0 ? highest : T(0);
#pragma omp simd reduction(+ : sum)
        for (int64_t e = 0; e < size; ++e) {
            const T low = x[e] < 0 ? x[e] : T(0);
            sum += out[e] = vanishing(low - highest) / (T(1) + vanishing(-std::abs(x[e])));
        }
    } else {
#pragma omp simd reduction(+ : sum)
        for (int64_t e = 0; e < size; ++e) sum += out[e] = vanishing(x[e] - highest);
    }
    const T factor = scale / sum;
#pragma omp simd
    for (int64_t e = 0; e < size; ++e) out[e] *= factor;
}

template <class T> inline T stable_sigmoid(T x) {
    const T tail = vanishing(-std::abs(x));
    return (x < 0 ? tail : T(1)) / (T(1) + tail);
}

template <class T>
void choose(const T* logits, const T* bias, T* weights, T* probabilities, int64_t* experts, int64_t tokens, Choice choice,
            int64_t threads) {
    using Key = typename Exponential<T>::Bits;
    const int64_t E = choice.experts, k = choice.k, groups = choice.groups, kept = choice.kept;
    const bool sigmoid = choice.sigmoid, after = choice.after;
    const T scale = T(choice.scale);
    const int64_t blocks = blocks_of(tokens);
    PARALLEL_FOR
    for (int64_t b = 0; b < blocks; ++b) {
        std::vector<T> scores(E), selection(E), picked(k);
        std::vector<Key> keys(E), of_groups(groups);
        std::vector<int64_t> best(groups);
        const int64_t end = (b + 1) * BLOCK < tokens ? (b + 1) * BLOCK : tokens;
        for (int64_t t = b * BLOCK; t < end; ++t) {
            const T *x = logits + t * E, *score = probabilities + t * E;
            int64_t* chosen = experts + t * k;
            shares(x, probabilities + t * E, E, sigmoid, T(1));
            if (sigmoid) {
#pragma omp simd
                for (int64_t e = 0; e < E; ++e) scores[e] = stable_sigmoid(x[e]);
                score = scores.data();
            }
#pragma omp simd
            for (int64_t e = 0; e < E; ++e) {
                selection[e] = score[e] + bias[e];
                keys[e] = ordered(selection[e]);
            }
            if (kept < groups)
                keep_groups(selection.data(), keys.data(), groups, E / groups, kept, of_groups.data(), best.data());
            largest(keys.data(), E, chosen, k);
            if (after) {
                for (int64_t i = 0; i < k; ++i) picked[i] = x[chosen[i]];
                shares(picked.data(), weights + t * k, k, sigmoid, scale);
            } else {
                for (int64_t i = 0; i < k; ++i) weights[t * k + i] = score[chosen[i]] * scale;
            }
        }
    }
}

// Through softmaxes and, with `sigmoid`, log(sigmoid), whose slope is sigmoid(-x). Without grad_weights or
// grad_probabilities those are zero.
template <class T>
void choose_backward(const T* grad_weights, const T* grad_probabilities, const T* logits, const T* weights,
                     const T* probabilities, const int64_t* experts, T* grad_logits, int64_t tokens, Choice choice,
                     int64_t threads) {
    const int64_t E = choice.experts, k = choice.k;
    const bool sigmoid = choice.sigmoid, after = choice.after;
    const T scale = T(choice.scale);
    PARALLEL_FOR
    for (int64_t t = 0; t < tokens; ++t) {
        const T *p = probabilities + t * E, *w = weights + t * k;
        const T *grad_p = grad_probabilities ? grad_probabilities + t * E : nullptr;
        const T *grad_w = grad_weights ? grad_weights + t * k : nullptr;
        const int64_t* chosen = experts + t * k;
        T* out = grad_logits + t * E;
        T mean = 0, weighted = 0;
        if (grad_w)
            for (int64_t i = 0; i < k; ++i) weighted += grad_w[i] * w[i];
        if (grad_p) {
#pragma omp simd reduction(+ : mean)
            for (int64_t e = 0; e < E; ++e) mean += grad_p[e] * p[e];
        }
        if (!sigmoid && !after) mean += weighted;  // weights are probabilities
        if (grad_p) {
#pragma omp simd
            for (int64_t e = 0; e < E; ++e) out[e] = p[e] * (grad_p[e] - mean);
        } else {
#pragma omp simd
            for (int64_t e = 0; e < E; ++e) out[e] = -p[e] * mean;
        }
        if (grad_w) {
            const T share = after ? weighted / scale : T(0);
            for (int64_t i = 0; i < k; ++i) out[chosen[i]] += w[i] * (grad_w[i] - share);
        }
        if (sigmoid) {
#pragma omp simd
            for (int64_t e = 0; e < E; ++e) out[e] *= stable_sigmoid(-logits[t * E + e]);
        }
    }
}

#define EXPORT(T, S)                                                                                                     \
    extern "C" void choose_##S(const T* x, const T* bias, T* w, T* p, int64_t* experts, int64_t tokens, int64_t E,       \
                               int64_t k, int64_t sigmoid, int64_t after, int64_t groups, int64_t kept, double scale,    \
                               int64_t threads) {                                                                        \
        choose<T>(x, bias, w, p, experts, tokens, {E, k, sigmoid, after, groups, kept, scale}, threads);                 \
    }                                                                                                                    \
    extern "C" void choose_backward_##S(const T* gw, const T* gp, const T* x, const T* w, const T* p,                    \
                                        const int64_t* experts, T* gx, int64_t tokens, int64_t E, int64_t k,             \
                                        int64_t sigmoid, int64_t after, int64_t groups, int64_t kept, double scale,      \
                                        int64_t threads) {                                                               \
        choose_backward<T>(gw, gp, x, w, p, experts, gx, tokens, {E, k, sigmoid, after, groups, kept, scale}, threads);  \
    }
EXPORT(float, f32)
EXPORT(double, f64)
#undef EXPORT
