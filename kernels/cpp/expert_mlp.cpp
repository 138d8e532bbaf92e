// The experts of a layer, forward and backward (kernels/expert_mlp_cpu.py).
//
// Work is cut into segments: up to a few hundred consecutive rows of one expert, which a thread takes from gathering to
// the last product in buffers of its own, so that only what others need goes to memory. Products are single-threaded
// BLAS calls. Segments are cut by sizes alone and every sum has a fixed order, so results have the same bits on any number
// of threads. Matrices here are row-major; BLAS sees them as column-major transposes.
#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

#include "activation.h"

// Fortran's ?gemm: column-major C (m, n) = op(A) op(B) + beta C.
template <class T>
using Gemm = void (*)(const char*, const char*, const int*, const int*, const int*, const T*, const T*, const int*, const T*,
                      const int*, const T*, T*, const int*);

// MKL's mkl_set_num_threads_local, where BLAS is MKL: how many threads the caller's products take; returns what was set.
using Limit = int (*)(int);

// A team of one is no parallel region to BLAS, which would then start threads of its own.
struct Alone {
    Limit limit;
    int before;
    Alone(Limit limit, int64_t threads) : limit(threads == 1 ? limit : nullptr) {
        if (this->limit) before = limit(1);
    }
    ~Alone() {
        if (limit) limit(before);
    }
};

// Below about a millisecond of work each, threads cost more than they bring, most of all where cores are busy.
constexpr double WORK_PER_THREAD = 1e8;

// bf16 as the hidden layer is stored; arithmetic is fp32.
struct BFloat {
    std::uint16_t bits;
};

inline void widen(const BFloat* from, float* to, int64_t size) {
    for (int64_t i = 0; i < size; ++i) {
        const std::uint32_t bits = std::uint32_t(from[i].bits) << 16;
        std::memcpy(to + i, &bits, sizeof bits);
    }
}

// To the nearest, ties to even; `from` gets the rounded values too.
inline void narrow(float* from, BFloat* to, int64_t size) {
    for (int64_t i = 0; i < size; ++i) {
        std::uint32_t bits;
        std::memcpy(&bits, from + i, sizeof bits);
        const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
        bits = nan ? bits | 0x400000u : bits + 0x7fffu + ((bits >> 16) & 1u);
        to[i].bits = std::uint16_t(bits >> 16);
        bits &= 0xffff0000u;
        std::memcpy(from + i, &bits, sizeof bits);
    }
}

struct Segment {
    int64_t expert, first, rows;  // first: of all rows
    int64_t turn;                 // how many segments of its expert come before it
    int64_t slot;                 // where its rows lie in scratch memory: every segment begins on a cache line
};

inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// Equal parts of about `target` rows; at most three halves of it, and a multiple of 8.
inline std::vector<Segment> segments_of(const int64_t* counts, int64_t experts, int64_t target) {
    std::vector<Segment> found;
    int64_t first = 0, slot = 0;
    for (int64_t e = 0; e < experts; ++e) {
        const int64_t parts = std::max<int64_t>(1, (counts[e] + target / 2) / target);
        const int64_t size = round_up((counts[e] + parts - 1) / parts, 8), end = first + counts[e];
        for (int64_t turn = 0; first < end; ++turn) {
            const int64_t rows = std::min(size, end - first);
            found.push_back({e, first, rows, turn, slot});
            first += rows;
            slot += round_up(rows, 16);
        }
    }
    return found;
}

// What both directions are given. Without `tokens` the rows lie in order, there are no gates, and nothing is summed.
template <class T> struct Experts {
    Gemm<T> gemm;
    const T *const *w1, *const *w2;  // of each expert
    const int64_t *counts, *tokens, *order, *where, *offsets;
    const T* gates;
    int64_t num_tokens, num_rows, experts, dim, width, inputs, target;  // inputs: into the non-linearity
    int64_t threads;

    int64_t most() const { return round_up(target + target / 2 + 8, 16); }

    // (m, n) = left (m, k) times right (k, n), either stored transposed.
    void product(bool transpose_left, bool transpose_right, int64_t m, int64_t n, int64_t k, const T* left,
                 int64_t left_stride, const T* right, int64_t right_stride, T* out, bool add = false) const {
        const T one = 1, beta = add ? 1 : 0;
        const int rows = n, columns = m, inner = k, ldl = left_stride, ldr = right_stride;
        gemm(transpose_right ? "T" : "N", transpose_left ? "T" : "N", &rows, &columns, &inner, &one, right, &ldr, left, &ldl,
             &beta, out, &rows);
    }

    // The rows of a segment, one after the other: where they lie, or copied to `buffer`.
    const T* gather(const T* x, const Segment& s, T* buffer) const {
        if (!tokens) return x + s.first * dim;
        constexpr int64_t ahead = 2, line = 64 / sizeof(T);  // hardware does not guess where the next row lies
        for (int64_t r = 0; r < s.rows; ++r) {
            const T *row = x + tokens[s.first + r] * dim, *later = x + tokens[s.first + std::min(r + ahead, s.rows - 1)] * dim;
            T* out = buffer + r * dim;
            for (int64_t i = 0; i < dim; i += line) {
                __builtin_prefetch(later + i);
                std::memcpy(out + i, row + i, std::min(line, dim - i) * sizeof(T));
            }
        }
        return buffer;
    }
};

// y (tokens, dim); rows: memory for (rows, dim), or y itself where nothing is summed; hidden: (rows, inputs) to keep, or
// null; memory: per thread `most` rows of dim + inputs + width.
template <class Kind, class T, class S>
void forward(const Experts<T>& given, const T* x, S* hidden, T* rows, T* y, T* memory) {
    const int64_t dim = given.dim, width = given.width, inputs = given.inputs;
    const std::vector<Segment> segments = segments_of(given.counts, given.experts, given.target);
    const int64_t most = given.most(), buffers = most * (dim + inputs + width);
    constexpr bool same = std::is_same<T, S>::value;
    std::atomic<int64_t> next(0), thread(0);
#pragma omp parallel num_threads(given.threads)
    {
        T* const gathered = memory + thread++ * buffers;
        T *const before = gathered + most * dim, *const active = before + most * inputs;
        for (size_t i = next++; i < segments.size(); i = next++) {
            const Segment& s = segments[i];
            T* h = before;
            if constexpr (same) h = hidden ? hidden + s.first * inputs : before;
            given.product(false, true, s.rows, inputs, dim, given.gather(x, s, gathered), dim,
                          given.w1[s.expert], dim, h);
            for (int64_t r = 0; r < s.rows; ++r) {
                if constexpr (!same)
                    if (hidden) narrow(h + r * inputs, hidden + (s.first + r) * inputs, inputs);
                activate_row<Kind>(h + r * inputs, active + r * width, width);
            }
            given.product(false, true, s.rows, dim, width, active, width, given.w2[s.expert], width,
                          rows + s.first * dim);
        }
        if (given.tokens) {
#pragma omp barrier
#pragma omp for schedule(dynamic, 64) nowait
            for (int64_t t = 0; t < given.num_tokens; ++t)
                sum_of_token(rows, given.where, given.offsets, given.gates, y, t, dim);
        }
    }
}

// Adds a segment's part to rows [first, first + size) of the gradient of w1 (`grads` are those of the hidden layer, `rows`
// the tokens) or of w2 (those of the output, and the gated activation): (out, in) += grads^T rows. `out` is the expert's; an
// expert's first segment writes where nothing is to be added to.
template <class T>
void outer(const Experts<T>& given, const Segment& s, const T* grads, const T* rows, int64_t outputs, int64_t inputs,
           int64_t first, int64_t size, bool add, T* out) {
    given.product(true, false, size, inputs, s.rows, grads + first, outputs, rows, inputs, out + first * inputs,
                  add || s.turn > 0);
}

// One slice of one expert's weight gradient.
struct Slice {
    int64_t expert;
    bool second;  // of w2
    int64_t first, size;
};

// By counts only. An expert with a large share of all rows has several, which threads share; one with about an eighth or
// less has one per matrix, as every product costs a pass over its rows.
inline std::vector<Slice> slices_of(const int64_t* counts, int64_t experts, int64_t rows, int64_t inputs, int64_t dim) {
    std::vector<Slice> found;
    for (int64_t e = 0; e < experts; ++e) {
        const int64_t parts = 32 * counts[e] <= 5 * rows ? 1 : 16 * counts[e] / rows;
        for (bool second : {false, true}) {
            const int64_t all = second ? dim : inputs, size = std::max<int64_t>(64, round_up((all + parts - 1) / parts, 16));
            for (int64_t first = 0; first < all; first += size)
                found.push_back({e, second, first, std::min(size, all - first)});
        }
    }
    return found;
}

// The order in which segments are handed out. Sums over an expert's segments are in order too, so a thread may have to
// wait for the one before: experts take turns, as many at a time as there are threads.
inline void take_turns(std::vector<Segment>& segments, int64_t threads) {
    std::vector<int64_t> present(segments.size());  // how many experts with rows come before
    for (size_t i = 1; i < segments.size(); ++i) present[i] = present[i - 1] + (segments[i].turn == 0);
    std::vector<size_t> order(segments.size());
    for (size_t i = 0; i < order.size(); ++i) order[i] = i;
    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) {
        const int64_t left = present[a] / threads, right = present[b] / threads;
        return left != right ? left < right : segments[a].turn < segments[b].turn;
    });
    std::vector<Segment> sorted;
    for (size_t i : order) sorted.push_back(segments[i]);
    segments.swap(sorted);
}

// memory: per thread `most` rows of 2 dim + inputs + width, and one row of inputs. kept: null, or memory for the gradients
// of the hidden layer and the gated activations of all segments; with it gradients of weights are formed at the end, by
// slices, which threads share where few experts have most rows. The arithmetic is the same.
template <class Kind, class T, class S>
void backward(const Experts<T>& given, const T* grad, const T* x, const S* hidden, T* rows, T* grad_x,
              T* const* grad_w1, T* const* grad_w2, const int64_t* add, T* grad_gates, T* memory, T* kept) {
    const int64_t dim = given.dim, width = given.width, inputs = given.inputs;
    std::vector<Segment> segments = segments_of(given.counts, given.experts, given.target);
    const std::vector<Slice> slices = slices_of(given.counts, given.experts, given.num_rows, inputs, dim);
    const int64_t most = given.most(), buffers = most * (2 * dim + inputs + width) + round_up(inputs, 16);
    const int64_t slots = segments.empty() ? 0 : segments.back().slot + round_up(segments.back().rows, 16);
    std::vector<int64_t> begins(given.experts + 1, segments.size());  // first segment of each expert
    for (int64_t i = segments.size() - 1; i >= 0; --i) begins[segments[i].expert] = i;
    for (int64_t e = given.experts - 1; e >= 0; --e)
        if (!given.counts[e]) begins[e] = begins[e + 1];
    std::vector<size_t> slice_begins(given.experts + 1, slices.size());  // first slice of each expert
    for (size_t i = slices.size(); i-- > 0;) slice_begins[slices[i].expert] = i;
    std::vector<Segment> work = segments;
    take_turns(work, given.threads);
    std::vector<std::atomic<int64_t>> done(given.experts);  // segments whose gradients are added
    for (auto& count : done) count = 0;
    std::atomic<size_t> next(0), next_slice(0);
    std::atomic<int64_t> thread(0);
#pragma omp parallel num_threads(given.threads)
    {
        T* const gathered = memory + thread++ * buffers;
        T *const grads = gathered + most * dim, *const own_hidden = grads + most * dim;
        T *const own_active = own_hidden + most * inputs, *const wide = own_active + most * width;
        for (size_t i = next++; i < work.size(); i = next++) {
            const Segment& s = work[i];
            T* const grad_hidden = kept ? kept + s.slot * inputs : own_hidden;
            T* const active = kept ? kept + slots * inputs + s.slot * width : own_active;
            const T *const w1 = given.w1[s.expert], *const w2 = given.w2[s.expert];
            const T* const grad_rows = given.gather(grad, s, grads);
            given.product(false, false, s.rows, width, dim, grad_rows, dim, w2, width, active);  // gradient of it, yet
            for (int64_t r = 0; r < s.rows; ++r) {
                const S* stored = hidden + (s.first + r) * inputs;
                const T* h;
                if constexpr (std::is_same<T, S>::value)
                    h = stored;
                else
                    widen(stored, wide, inputs), h = wide;
                const int64_t a = given.gates ? given.order[s.first + r] : 0;
                const T gate = given.gates ? given.gates[a] : T(1);
                const T dot = gated_gradient_row<Kind>(h, gate, active + r * width, grad_hidden + r * inputs, width);
                if (given.gates) grad_gates[a] = dot;
            }
            given.product(false, false, s.rows, dim, inputs, grad_hidden, inputs, w1, dim, rows + s.first * dim);
            if (kept) continue;
            const T* const tokens = given.gather(x, s, gathered);
            while (done[s.expert].load(std::memory_order_acquire) != s.turn) std::this_thread::yield();
            for (size_t task = slice_begins[s.expert]; task < slice_begins[s.expert + 1]; ++task) {
                const Slice& slice = slices[task];
                if (slice.second)
                    outer(given, s, grad_rows, active, dim, width, slice.first, slice.size, add[s.expert], grad_w2[s.expert]);
                else
                    outer(given, s, grad_hidden, tokens, inputs, dim, slice.first, slice.size, add[s.expert],
                          grad_w1[s.expert]);
            }
            done[s.expert].store(s.turn + 1, std::memory_order_release);
        }
        if (kept || given.tokens) {
#pragma omp barrier
        }
        for (size_t task = next_slice++; task < slices.size(); task = next_slice++) {
            const Slice& slice = slices[task];
            const int64_t e = slice.expert;
            const int64_t stride = slice.second ? width : dim;
            T* const out = slice.second ? grad_w2[e] : grad_w1[e];
            if (!given.counts[e] && !add[e]) std::memset(out + slice.first * stride, 0, slice.size * stride * sizeof(T));
            if (!kept) continue;
            for (int64_t i = begins[e]; i < begins[e + 1]; ++i) {
                const Segment& s = segments[i];
                if (slice.second)
                    outer(given, s, given.gather(grad, s, grads), kept + slots * inputs + s.slot * width, dim, width,
                          slice.first, slice.size, add[e], out);
                else
                    outer(given, s, kept + s.slot * inputs, given.gather(x, s, gathered), inputs, dim, slice.first,
                          slice.size, add[e], out);
            }
        }
        if (given.tokens) {
#pragma omp for schedule(dynamic, 64) nowait
            for (int64_t t = 0; t < given.num_tokens; ++t)
                sum_of_token(rows, given.where, given.offsets, static_cast<const T*>(nullptr), grad_x, t, dim);
        }
    }
}

// Sizes come in one array, in the order of the struct.
template <class T>
Experts<T> experts_of(Gemm<T> gemm, Limit limit, const T* const* w1, const T* const* w2, const int64_t* const* plan,
                      const T* gates, const int64_t* sizes, int64_t threads) {
    const double work = 2.0 * sizes[1] * sizes[3] * (sizes[4] + sizes[5]);  // of the forward pass
    if (limit) threads = std::min<int64_t>(threads, 1 + static_cast<int64_t>(work / WORK_PER_THREAD));
    return {gemm,     w1,       w2,       plan[0],  plan[1],  plan[2],  plan[3],  plan[4], gates,
            sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6], threads};
}

#define EXPORT(T, S, NAME)                                                                                               \
    extern "C" void expert_mlp_forward_##NAME(                                                                           \
        Gemm<T> gemm, Limit limit, const T* x, const T* const* w1, const T* const* w2, const int64_t* counts,             \
        const int64_t* tokens, const int64_t* order, const int64_t* where, const int64_t* offsets, const T* gates,       \
        S* hidden, T* rows, T* y, T* memory, const int64_t* sizes, int64_t kind, int64_t threads) {                      \
        const int64_t* plan[] = {counts, tokens, order, where, offsets};                                                 \
        const Experts<T> given = experts_of<T>(gemm, limit, w1, w2, plan, gates, sizes, threads);                        \
        const Alone alone(limit, given.threads);                                                                         \
        with_kind(kind, [&](auto k) { forward<decltype(k)>(given, x, hidden, rows, y, memory); });                       \
    }                                                                                                                    \
    extern "C" void expert_mlp_backward_##NAME(                                                                          \
        Gemm<T> gemm, Limit limit, const T* x, const T* const* w1, const T* const* w2, const int64_t* counts,             \
        const int64_t* tokens, const int64_t* order, const int64_t* where, const int64_t* offsets, const T* gates,       \
        const T* grad, const S* hidden, T* rows, T* grad_x, T* const* grad_w1, T* const* grad_w2, const int64_t* add,    \
        T* grad_gates, T* memory, T* kept, const int64_t* sizes, int64_t kind, int64_t threads) {                        \
        const int64_t* plan[] = {counts, tokens, order, where, offsets};                                                 \
        const Experts<T> given = experts_of<T>(gemm, limit, w1, w2, plan, gates, sizes, threads);                        \
        const Alone alone(limit, given.threads);                                                                         \
        with_kind(kind, [&](auto k) {                                                                                    \
            backward<decltype(k)>(given, grad, x, hidden, rows, grad_x, grad_w1, grad_w2, add, grad_gates, memory, kept);\
        });                                                                                                              \
    }
EXPORT(float, float, f32)
EXPORT(double, double, f64)
EXPORT(float, BFloat, bf16)
#undef EXPORT
