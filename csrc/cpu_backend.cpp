// The operators on CPU, in float32 or float64 (16-bit inputs are computed in float32, results rounded at the end).
//
// Per sequence and head the state S = [G | H] is a linear-attention state with keys k and values u = [v | k], and its
// adjoint is one with keys x and values y = [do | -w]. The passes over all tokens are therefore few: the states before
// each chunk of 64 tokens (scan_states, also backwards for the adjoint), the solve, the read-out and the gradients,
// which run on all chunks and heads in parallel.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>
#include <numeric>
#include <tuple>
#include <type_traits>
#include <vector>

#include "checks.h"
#include "cpu/types.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define MESA_ISA avx512
#define MESA_TARGET __attribute__((target("avx512f,fma")))
#define MESA_VECTOR_BYTES 64
#include "cpu/kernels.h"
#define MESA_ISA avx2
#define MESA_TARGET __attribute__((target("avx2,fma")))
#define MESA_VECTOR_BYTES 32
#include "cpu/kernels.h"
#endif
#define MESA_ISA portable
#define MESA_TARGET
#define MESA_VECTOR_BYTES 16
#include "cpu/kernels.h"

namespace mesa {
namespace {

using at::Tensor;
using std::optional;

template <typename T>
const Kernels<T>& choose_kernels() {
#if defined(__x86_64__) && defined(__GNUC__)
    if (__builtin_cpu_supports("avx512f")) return avx512::table<T>;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return avx2::table<T>;
#endif
    return portable::table<T>;
}

template <typename T>
const Kernels<T>& kernels() {
    static const Kernels<T>& chosen = choose_kernels<T>();
    return chosen;
}

// ---------------------------------------------------------------------------------------------------- scratch memory

template <typename T>
struct View {
    T* data;
    int64_t ld;

    T* row(int64_t i) const { return data + i * ld; }
    View columns_from(int64_t j) const { return {data + j, ld}; }
    View rows_from(int64_t i) const { return {row(i), ld}; }
};

// Scratch memory of a thread, zero at first. What is written without its padding keeps the padding zero; results of
// products are written with it, and NaN times zero is NaN there too.
template <typename T>
struct Matrix : View<T> {
    Matrix(int64_t rows, int64_t columns) : View<T>{nullptr, pitch<T>(columns)} {
        const size_t bytes = rows * this->ld * sizeof(T);
        memory.reset(static_cast<T*>(std::aligned_alloc(64, bytes)));
        if (!memory) throw std::bad_alloc();
        this->data = memory.get();
        std::fill_n(this->data, rows * this->ld, T(0));
    }

    struct Free {
        void operator()(T* p) const { std::free(p); }
    };
    std::unique_ptr<T, Free> memory;
};

template <typename T>
void transpose(View<T> from, int64_t rows, int64_t columns, View<T> to) {
    const auto tile = [&](int64_t i0, int64_t j0, int64_t height, int64_t width) {
        for (int64_t j = j0; j < j0 + width; ++j)
            for (int64_t i = i0; i < i0 + height; ++i) to.row(j)[i] = from.row(i)[j];
    };
    constexpr int64_t kBlock = 16, kTile = 4;  // a block stays in the cache, a tile is transposed in registers
    for (int64_t i0 = 0; i0 < rows; i0 += kBlock)
        for (int64_t j0 = 0; j0 < columns; j0 += kBlock)
            for (int64_t j = j0; j < std::min(columns, j0 + kBlock); j += kTile)
                for (int64_t i = i0; i < std::min(rows, i0 + kBlock); i += kTile) {
                    if (i + kTile > rows || j + kTile > columns) {
                        tile(i, j, std::min(kTile, rows - i), std::min(kTile, columns - j));
                        continue;
                    }
                    for (int64_t b = 0; b < kTile; ++b) {
                        const T column[kTile] = {from.row(i)[j + b], from.row(i + 1)[j + b], from.row(i + 2)[j + b],
                                                 from.row(i + 3)[j + b]};
                        std::copy_n(column, kTile, to.row(j + b) + i);
                    }
                }
}

// The same numbers in another type.
template <typename From, typename To>
void convert(View<From> from, int64_t rows, int64_t columns, View<To> to) {
    for (int64_t i = 0; i < rows; ++i) std::copy_n(from.row(i), columns, to.row(i));
}

// ------------------------------------------------------------------------------------------- tokens, heads and chunks

// A contiguous [tokens, heads, width] array: [B, T] flattened.
template <typename T>
struct Heads {
    T* data;
    int64_t heads, width;

    explicit Heads(const Tensor& t) : data(t.data_ptr<T>()), heads(t.size(-2)), width(t.size(-1)) {}

    T* at(int64_t token, int64_t head) const { return data + (token * heads + head) * width; }

    // The head that a state head reads, the n-th where it reads several.
    int64_t of_state(const ProblemSize& p, int64_t state_head, int64_t n = 0) const {
        return heads <= p.HS ? state_head / (p.HS / heads) : state_head * (heads / p.HS) + n;
    }

    // The rows of one head; those from count to kChunk are set to zero.
    void load(int64_t token, int count, int64_t head, View<T> to) const {
        for (int i = 0; i < count; ++i) std::copy_n(at(token + i, head), width, to.row(i));
        for (int i = count; i < kChunk; ++i) std::fill_n(to.row(i), width, T(0));
    }
    void store(int64_t token, int count, int64_t head, View<T> from) const {
        for (int i = 0; i < count; ++i) std::copy_n(from.row(i), width, at(token + i, head));
    }
};

struct Chunk {
    int64_t token;  // first one, in [B, T] flattened
    int count;      // of tokens
};

struct Layout {
    std::vector<Chunk> chunks;
    std::vector<int64_t> first;  // [N + 1] first chunk of each sequence

    Layout(const ProblemSize& p, const optional<Tensor>& cu_seqlens) {
        std::vector<int64_t> offsets(p.N + 1);
        if (cu_seqlens) {
            const Tensor contiguous = cu_seqlens->contiguous();
            std::copy_n(contiguous.const_data_ptr<int64_t>(), p.N + 1, offsets.begin());
        } else {
            for (int64_t n = 0; n <= p.N; ++n) offsets[n] = n * p.T;
        }
        for (int64_t n = 0; n < p.N; ++n) {
            first.push_back(chunks.size());
            for (int64_t t = offsets[n]; t < offsets[n + 1]; t += kChunk)
                chunks.push_back({t, static_cast<int>(std::min<int64_t>(kChunk, offsets[n + 1] - t))});
        }
        first.push_back(chunks.size());
    }
};

// Rows 0, 1, 2, ...: all rows of a product.
std::vector<int> row_numbers(int64_t count) {
    std::vector<int> rows(count);
    std::iota(rows.begin(), rows.end(), 0);
    return rows;
}

// The gates of a chunk and state head, with gc the running sum of g. The decays are products of e^g in double
// precision: no difference of large sums is ever formed, and g = -inf needs no care.
template <typename T>
struct Gates {
    double decay[kChunk];
    T beta[kChunk];
    T in[kChunk];   // e^{gc_i}, from the state before the chunk to token i
    T out[kChunk];  // e^{gc_C - gc_j}, from token j to the state after the chunk
    T total;        // e^{gc_C}

    void load(const Heads<T>& g, const Heads<T>& beta_heads, Chunk chunk, int64_t head) {
        std::fill_n(beta, kChunk, T(0));
        std::fill_n(decay, kChunk, 1.0);
        double product = 1;
        for (int i = 0; i < chunk.count; ++i) {
            decay[i] = std::exp(static_cast<double>(g.at(chunk.token + i, 0)[head]));
            beta[i] = beta_heads.at(chunk.token + i, 0)[head];
            product *= decay[i];
            in[i] = static_cast<T>(product);
        }
        total = static_cast<T>(product);
        product = 1;
        for (int j = chunk.count - 1; j >= 0; --j) {
            out[j] = static_cast<T>(product);
            product *= decay[j];
        }
    }
};

// A chunk of tokens with everything that a state head needs of it.
template <typename T>
struct Block {
    int count = 0;
    int64_t k_column;     // of k in u = [v | k]; v starts at 0
    Matrix<T> u, ut;      // [kChunk, v | k] and its transpose
    Matrix<T> decay;      // L[i,j] = e^{gc_i - gc_j} for j <= i, else 0
    Matrix<T> mask;       // M[i,j] = L[i,j] beta_j
    Gates<T> gates;

    Block(int64_t K, int64_t V)
        : k_column(padded<T>(V)), u(kChunk, k_column + padded<T>(K)), ut(k_column + padded<T>(K), kChunk),
          decay(kChunk, kChunk), mask(kChunk, kChunk) {}

    View<T> v() const { return u; }
    View<T> k() const { return u.columns_from(k_column); }
    View<T> vt() const { return ut; }
    View<T> kt() const { return ut.rows_from(k_column); }

    // The same tokens in float64, as far as `attend` reads them. The padding of the two types differs.
    template <typename From>
    void widen(const Block<From>& from, int64_t K, int64_t V) {
        count = from.count;
        convert<From, T>(from.v(), kChunk, V, v());
        convert<From, T>(from.k(), kChunk, K, k());
        convert<From, T>(from.vt(), V, kChunk, vt());
        convert<From, T>(from.kt(), K, kChunk, kt());
        convert<From, T>(from.mask, kChunk, kChunk, mask);
        std::copy_n(from.gates.in, kChunk, gates.in);
    }

    void load(const Heads<T>& k_heads, int64_t k_head, const Heads<T>& v_heads, const Heads<T>& g,
              const Heads<T>& beta, Chunk chunk, int64_t head, bool transpose_v) {
        count = chunk.count;
        v_heads.load(chunk.token, count, head, v());
        k_heads.load(chunk.token, count, k_head, k());
        if (transpose_v) transpose(v(), kChunk, v_heads.width, vt());
        transpose(k(), kChunk, k_heads.width, kt());
        gates.load(g, beta, chunk, head);
        double row[kChunk] = {};
        for (int i = 0; i < kChunk; ++i) {
            for (int j = 0; j < i; ++j) row[j] *= gates.decay[i];
            row[i] = 1;
            T* const l = decay.row(i);
            T* const m = mask.row(i);
            for (int j = 0; j < kChunk; ++j) {
                l[j] = static_cast<T>(row[j]);
                m[j] = l[j] * gates.beta[j];
            }
        }
    }
};

// ------------------------------------------------------------------------------------------------- states by chunks

// One part of a joint state, G or H.
template <typename T>
struct ScanPart {
    Heads<T> values;
    T sign;           // of the values
    const T* start;   // [N, HS, K, width] where the scan starts, or null for zeros
    T* end;           // and where it ends, or null if not wanted
    bool transposed;  // both are stored as transposes
};

// Runs S = total S + sum_t weight_t a_t values_t' over the chunks of every sequence and keeps the state that each chunk
// starts from in states[chunk, head]. Forwards these are the states, with weights from the token to the end of the
// chunk, times beta; backwards they are the adjoints, with weights from the beginning of the chunk to the token.
template <typename T>
void scan_states(const ProblemSize& p, const Layout& layout, const Heads<T>& g, const Heads<T>& beta,
                 const Heads<T>& a, const ScanPart<T> (&parts)[2], bool backwards, const View<T>& states) {
    const auto& kernel = kernels<T>();
    const int64_t heads_per_state = std::max<int64_t>(1, a.heads / p.HS);
    at::parallel_for(0, p.N * p.HS * 2, 1, [&](int64_t begin, int64_t end) {
        const auto rows = row_numbers(p.K);
        Matrix<T> weighted(kChunk, p.K), values(kChunk, std::max(p.K, p.V)), last(p.K, padded<T>(p.V) + p.K);
        Gates<T> gates;
        for (int64_t task = begin; task < end; ++task) {
            const int64_t n = task / (p.HS * 2), head = task / 2 % p.HS;
            const ScanPart<T>& part = parts[task % 2];
            const int64_t width = task % 2 ? p.K : p.V, column = task % 2 ? padded<T>(p.V) : 0;
            const int64_t chunks = layout.first[n + 1] - layout.first[n];
            const auto chunk_number = [&](int64_t i) {  // of the i-th chunk on the way
                return backwards ? layout.first[n + 1] - 1 - i : layout.first[n] + i;
            };
            const auto slot = [&](int64_t i) {  // of the state that it starts from
                const auto state = i == chunks ? last : states.rows_from((chunk_number(i) * p.HS + head) * p.K);
                return state.columns_from(column);
            };
            const auto stored = [&](int64_t i, int64_t j) {  // where part.start and part.end have S[i,j]
                return (n * p.HS + head) * p.K * width + (part.transposed ? j * width + i : i * width + j);
            };

            const View<T> initial = slot(0);
            for (int64_t i = 0; i < p.K; ++i) {
                std::fill_n(initial.row(i), padded<T>(width), T(0));
                if (part.start)
                    for (int64_t j = 0; j < width; ++j) initial.row(i)[j] = part.start[stored(i, j)];
            }
            for (int64_t i = 0; i < chunks; ++i) {
                const Chunk chunk = layout.chunks[chunk_number(i)];
                gates.load(g, beta, chunk, head);
                for (int64_t h = 0; h < heads_per_state; ++h) {
                    const int64_t a_head = a.of_state(p, head, h), value_head = part.values.of_state(p, head, h);
                    for (int t = 0; t < chunk.count; ++t) {
                        const T weight = backwards ? gates.in[t] : gates.out[t] * gates.beta[t];
                        kernel.scale(p.K, weight, a.at(chunk.token + t, a_head), weighted.row(t));
                        T* const value = values.row(t);
                        kernel.scale(width, part.sign, part.values.at(chunk.token + t, value_head), value);
                        std::fill(value + width, value + padded<T>(width), T(0));
                    }
                    const View<T> before = slot(i), after = slot(i + 1);
                    Product<T> product{weighted.data, 1, weighted.ld, values.data, values.ld, after.data, after.ld,
                                       padded<T>(width), chunk.count};
                    product.add = h ? after.data : before.data;
                    product.add_scale = h ? T(1) : gates.total;
                    kernel.multiply(product, rows.data(), p.K);
                }
            }
            if (!part.end) continue;
            const View<T> final_state = slot(chunks);
            for (int64_t i = 0; i < p.K; ++i)
                for (int64_t j = 0; j < width; ++j) part.end[stored(i, j)] = final_state.row(i)[j];
        }
    });
}

// ----------------------------------------------------------------------------------------- one chunk: apply and solve

// out = e^{gc} (A S) + ((A keys') o M) values for the given rows, A `width` and the values `n` wide. This is the
// operator of the conjugate gradient (keys, S, values = k, H, k), the read-out (k, G, v) and dx (v, G', k).
// Without a block (a decode step) it is A S.
template <typename T>
void attend(const Block<T>* block, View<T> a, int64_t width, View<T> keys_t, View<T> state, View<T> values, int64_t n,
            View<T> out, View<T> scores, const int* rows, int count) {
    const auto& kernel = kernels<T>();
    Product<T> from_state{a.data, a.ld, 1, state.data, state.ld, out.data, out.ld, padded<T>(n), width};
    if (block) {
        Product<T> to_scores{a.data, a.ld, 1, keys_t.data, keys_t.ld, scores.data, scores.ld, kChunk, width};
        to_scores.part = Part::c_lower;
        to_scores.mask = block->mask.data;
        kernel.multiply(to_scores, rows, count);
        Product<T> from_chunk{scores.data, scores.ld, 1, values.data, values.ld, out.data, out.ld, padded<T>(n),
                              block->count};
        from_chunk.part = Part::a_lower;
        kernel.multiply(from_chunk, rows, count);
        from_state.row_scale = block->gates.in;
        from_state.add = out.data;
    }
    kernel.multiply(from_state, rows, count);
}

struct Stop {
    int max_iterations;
    double tol;
};

// Lambda and its inverse for every head, padded.
template <typename T>
struct Regulariser {
    Matrix<T> lamb, inverse;

    explicit Regulariser(const Tensor& tensor)
        : lamb(tensor.size(0), tensor.size(1)), inverse(tensor.size(0), tensor.size(1)) {
        const T* const from = tensor.const_data_ptr<T>();
        for (int64_t h = 0; h < tensor.size(0); ++h)
            for (int64_t j = 0; j < tensor.size(1); ++j) {
                lamb.row(h)[j] = from[h * tensor.size(1) + j];
                inverse.row(h)[j] = T(1) / lamb.row(h)[j];
            }
    }
};

// The preconditioned conjugate gradient for up to `capacity` right-hand sides, each with its own steps (see cg.h).
template <typename T>
struct Solver {
    int64_t K;
    Matrix<T> b;  // in: right-hand sides; overwritten
    Matrix<T> x;  // out: solutions
    Matrix<T> p, ap, scores;
    std::vector<CgRow<T>> rows;
    std::vector<T> curvature;  // largest 1 / step length: close to the largest eigenvalue of (H_i + Lambda) / Lambda
    std::vector<int> active;

    Solver(int64_t capacity, int64_t width)
        : K(width), b(capacity, K), x(capacity, K), p(capacity, K), ap(capacity, K), scores(kChunk, kChunk),
          rows(capacity), curvature(capacity) {}

    // (H_i + Lambda) x_i = b_i for i < count, with H_i = e^{gc_i} H + the tokens of the block up to i.
    void run(const Block<T>* block, View<T> H, const T* lamb, const T* inverse_lamb, int count, Stop stop) {
        const auto& kernel = kernels<T>();
        const int64_t n = padded<T>(K);
        active.clear();
        std::vector<int> exponents(count);
        for (int i = 0; i < count; ++i) {
            std::fill(b.row(i) + K, b.row(i) + n, T(0));  // NaN from a right-hand side before this one
            exponents[i] = scaling_exponent(kernel.largest(n, b.row(i)));
            const T scale = std::ldexp(T(1), -exponents[i]);
            rows[i] = CgRow<T>(kernel.cg_start(n, scale, inverse_lamb, p.row(i), x.row(i), b.row(i)));
            curvature[i] = 0;
            if (rows[i].active) active.push_back(i);
        }
        const T tol2 = static_cast<T>(stop.tol * stop.tol);
        const View<T> k = block ? block->k() : View<T>{}, kt = block ? block->kt() : View<T>{};
        for (int step = 0; step < stop.max_iterations && !active.empty(); ++step) {
            attend<T>(block, p, K, kt, H, k, K, ap, scores, active.data(), active.size());
            for (const int i : active) {
                kernel.cg_step(n, lamb, inverse_lamb, p.row(i), ap.row(i), x.row(i), b.row(i), rows[i], tol2);
                curvature[i] = std::max(curvature[i], T(1) / rows[i].step);
            }
            active.erase(std::remove_if(active.begin(), active.end(), [&](int i) { return !rows[i].active; }),
                         active.end());
        }
        for (int i = 0; i < count; ++i) kernel.scale(n, std::ldexp(T(1), exponents[i]), x.row(i), x.row(i));
    }

    // Of the power of two that brings the largest element to [1, 2); inside what T can hold in both directions.
    static int scaling_exponent(T largest) {
        constexpr int kLimit = std::numeric_limits<T>::max_exponent - 2;
        if (largest == 0 || !std::isfinite(largest)) return 0;
        return std::clamp(std::ilogb(largest), -kLimit, kLimit);
    }
};

// The rows of badly conditioned systems, in float64 where float32 is not enough. With values that are linear in the
// keys the read-out o = G'x cancels by up to the condition number of the system, and w = (H + Lambda)^{-1} G do
// magnifies the error of G do. Such rows therefore get their right-hand side in float64 and a correction of the
// solution, solved in float32 from the residual in float64, and are read out before it is rounded. Whether a row needs
// it shows in the row's own steps, so that it depends on no other; well-conditioned rows pay nothing.
template <typename T>
struct HardRows {
    static constexpr double kHard = 256;        // condition number, by the solver's estimate
    static constexpr double kCorrection = 1e-2;  // tolerance for the correction, which is small beside the solution

    // A chunk, the states before it and what its rows need: right-hand sides b, solutions x, and in y either o or do.
    struct Wide {
        Block<double> block;
        Matrix<double> G, gt, H, b, x, ax, y, scores;

        Wide(int64_t capacity, int64_t K, int64_t V)
            : block(K, V), G(K, V), gt(V, K), H(K, K), b(capacity, K), x(capacity, K), ax(capacity, K), y(capacity, V),
              scores(kChunk, kChunk) {}
    };

    int64_t K, V;
    std::vector<int> rows;

    HardRows(int64_t K, int64_t V) : K(K), V(V) {}

    // Of the first `count` rows that the solver has just solved.
    bool find(const Solver<T>& solver, int count, Stop stop) {
        rows.clear();
        if constexpr (std::is_same_v<T, float>)
            for (int i = 0; i < count; ++i)
                if (solver.curvature[i] > kHard && solver.rows[i].bound_squared() <= stop.tol * stop.tol)
                    rows.push_back(i);
        return !rows.empty();
    }

    // Sets the chunk (none for a decode step, whose G and H hold the token) and the states before it.
    Wide& widen(const Block<T>* block, View<T> G, View<T> H, int64_t capacity) {
        if (!wide) wide = std::make_unique<Wide>(capacity, K, V);
        if (block) wide->block.widen(*block, K, V);
        convert<T, double>(G, K, V, wide->G);
        convert<T, double>(H, K, K, wide->H);
        return *wide;
    }

    // Corrects solver.x of the first `count` rows where they are hard, given their right-hand sides in b.
    void correct(const Block<T>* block, View<T> H, const T* lamb, const T* inverse_lamb, int count, Stop stop,
                 Solver<T>& solver) {
        Wide& w = *wide;
        const std::vector<CgRow<T>> first_rows = solver.rows;
        convert<T, double>(solver.x, count, K, w.x);
        attend<double>(block ? &w.block : nullptr, w.x, K, w.block.kt(), w.H, w.block.k(), K, w.ax, w.scores,
                       rows.data(), rows.size());
        for (int i = 0; i < count; ++i) std::fill_n(solver.b.row(i), K, T(0));  // nothing to solve for the others
        for (const int i : rows)
            for (int64_t j = 0; j < K; ++j)
                solver.b.row(i)[j] = static_cast<T>(w.b.row(i)[j] - w.ax.row(i)[j] - lamb[j] * w.x.row(i)[j]);
        solver.run(block, H, lamb, inverse_lamb, count, {stop.max_iterations, kCorrection});
        for (const int i : rows)
            for (int64_t j = 0; j < K; ++j) w.x.row(i)[j] += solver.x.row(i)[j];
        convert<double, T>(w.x, count, K, solver.x);
        solver.rows = first_rows;
    }

    // The same for the backward pass, where b = G do.
    void correct_adjoint(const Block<T>& block, View<T> G, View<T> H, const T* lamb, const T* inverse_lamb,
                         View<T> grad_o, int count, Stop stop, Solver<T>& solver) {
        Wide& w = widen(&block, G, H, kChunk);
        transpose<double>(w.G, K, V, w.gt);
        convert<T, double>(grad_o, count, V, w.y);
        attend<double>(&w.block, w.y, V, w.block.vt(), w.gt, w.block.k(), K, w.b, w.scores, rows.data(), rows.size());
        correct(&block, H, lamb, inverse_lamb, count, stop, solver);
    }

    // to(i) = x' [G | H] y for the hard rows among the first `count`, once they are corrected.
    template <typename To>
    void products(View<T> x, View<T> y, int count, const To& to) {
        Wide& w = *wide;
        convert<T, double>(x, count, K, w.x);
        attend<double>(nullptr, w.x, K, {}, w.G, {}, V, w.y, w.scores, rows.data(), rows.size());
        attend<double>(nullptr, w.x, K, {}, w.H, {}, K, w.ax, w.scores, rows.data(), rows.size());
        for (const int i : rows) {
            const double from_G = std::inner_product(w.y.row(i), w.y.row(i) + V, y.row(i), 0.0);
            *to(i) = std::inner_product(w.ax.row(i), w.ax.row(i) + K, y.row(i) + padded<T>(V), from_G);
        }
    }

   private:
    std::unique_ptr<Wide> wide;
};

// The read-out o = G'x.
template <typename T>
struct ReadOut {
    int64_t K, V;
    Matrix<T> o;
    std::vector<int> all;
    HardRows<T> hard;

    ReadOut(int64_t capacity, int64_t K, int64_t V)
        : K(K), V(V), o(capacity, V), all(row_numbers(capacity)), hard(K, V) {}

    // Of the first `count` rows that the solver has just solved for right-hand sides q(i); corrects solver.x as well.
    // Without a block (a decode step) G and H hold the token.
    template <typename Q>
    void run(const Block<T>* block, View<T> G, View<T> H, const T* lamb, const T* inverse_lamb, Stop stop, int count,
             const Q& q, Solver<T>& solver) {
        attend<T>(block, solver.x, K, block ? block->kt() : View<T>{}, G, block ? block->v() : View<T>{}, V, o,
                  solver.scores, all.data(), count);
        if (!hard.find(solver, count, stop)) return;
        auto& wide = hard.widen(block, G, H, all.size());
        for (const int i : hard.rows) std::copy_n(q(i), K, wide.b.row(i));
        hard.correct(block, H, lamb, inverse_lamb, count, stop, solver);
        attend<double>(block ? &wide.block : nullptr, wide.x, K, wide.block.kt(), wide.G, wide.block.v(), V, wide.y,
                       wide.scores, hard.rows.data(), hard.rows.size());
        for (const int i : hard.rows) std::copy_n(wide.y.row(i), V, o.row(i));
    }
};

// -------------------------------------------------------------------------------------------------------- operators

// Everything below computes in T on contiguous arrays: copies are made only of what is not that already.
template <typename T>
Tensor prepare(const Tensor& t) {
    return t.to(c10::CppTypeToScalarType<T>::value).contiguous();
}

template <typename T>
optional<Tensor> prepare(const optional<Tensor>& t) {
    return t ? optional<Tensor>(prepare<T>(*t)) : std::nullopt;
}

template <typename T>
const T* data_or_null(const optional<Tensor>& t) {
    return t ? t->const_data_ptr<T>() : nullptr;
}

// The inputs of a call, as the passes read them.
template <typename T>
struct Inputs {
    Tensor k_, v_, g_, beta_;
    optional<Tensor> h_kk, h_kv;
    Heads<T> k, v, g, beta;
    Regulariser<T> lamb;
    Layout layout;

    Inputs(const ProblemSize& p, const Tensor& k_in, const Tensor& v_in, const Tensor& g_in, const Tensor& beta_in,
           const Tensor& lamb_in, const optional<Tensor>& h_kk_in, const optional<Tensor>& h_kv_in,
           const optional<Tensor>& cu_seqlens)
        : k_(prepare<T>(k_in)), v_(prepare<T>(v_in)), g_(prepare<T>(g_in)), beta_(prepare<T>(beta_in)),
          h_kk(prepare<T>(h_kk_in)), h_kv(prepare<T>(h_kv_in)), k(k_), v(v_), g(g_.unsqueeze(-2)),
          beta(beta_.unsqueeze(-2)), lamb(prepare<T>(lamb_in)), layout(p, cu_seqlens) {}

    // State [G | H] before every chunk, for [chunk, state head, K] rows.
    Tensor allocate_states(const ProblemSize& p) const {
        return at::empty({static_cast<int64_t>(layout.chunks.size()) * p.HS * p.K, ld(p)}, g_.options());
    }
    static int64_t ld(const ProblemSize& p) { return pitch<T>(padded<T>(p.V) + p.K); }

    View<T> scan(const ProblemSize& p, const Tensor& states, T* final_kk, T* final_kv) const {
        const View<T> view{states.data_ptr<T>(), ld(p)};
        // x' H' = (H x)': only the transpose gives the gradient of an H that is perturbed without staying symmetric.
        const ScanPart<T> parts[2] = {{v, T(1), data_or_null<T>(h_kv), final_kv, false},
                                      {k, T(1), data_or_null<T>(h_kk), final_kk, true}};
        scan_states(p, layout, g, beta, k, parts, false, view);
        return view;
    }

    void load(const ProblemSize& p, Block<T>& block, Chunk chunk, int64_t head, bool transpose_v) const {
        block.load(k, k.of_state(p, head), v, g, beta, chunk, head, transpose_v);
    }
};

// Calls body(chunk number, state head) for all of them in parallel; make_body makes a body for each thread's share.
template <typename MakeBody>
void for_chunks_and_heads(const ProblemSize& p, const Layout& layout, const MakeBody& make_body) {
    at::parallel_for(0, layout.chunks.size() * p.HS, 1, [&](int64_t begin, int64_t end) {
        auto body = make_body();
        for (int64_t task = begin; task < end; ++task) body(task / p.HS, task % p.HS);
    });
}

using ForwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using BackwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <typename T>
ForwardResult forward(const ProblemSize& p, const Inputs<T>& in, const Tensor& q_in, Stop stop) {
    const Tensor q = prepare<T>(q_in);
    const auto options = q.options();
    const Tensor o = at::empty({p.B, p.T, p.HO, p.V}, options), x = at::empty({p.B, p.T, p.HO, p.K}, options);
    const Tensor steps = at::empty({p.B, p.T, p.HO}, options.dtype(at::kInt));
    const Tensor bound = at::empty({p.B, p.T, p.HO}, options);
    const Tensor h_kk = at::empty({p.N, p.HS, p.K, p.K}, options), h_kv = at::empty({p.N, p.HS, p.K, p.V}, options);
    const Tensor states = in.allocate_states(p);
    const View<T> s = in.scan(p, states, h_kk.data_ptr<T>(), h_kv.data_ptr<T>());

    const Heads<T> q_heads(q), o_heads(o), x_heads(x);
    for_chunks_and_heads(p, in.layout, [&] {
        return [&, block = Block<T>(p.K, p.V), solver = Solver<T>(kChunk, p.K),
                read = ReadOut<T>(kChunk, p.K, p.V)](int64_t number, int64_t head) mutable {
            const Chunk chunk = in.layout.chunks[number];
            const View<T> G = s.rows_from((number * p.HS + head) * p.K), H = G.columns_from(block.k_column);
            const T *const lamb = in.lamb.lamb.row(head), *const inverse_lamb = in.lamb.inverse.row(head);
            in.load(p, block, chunk, head, false);
            for (int64_t out = head * p.outputs_per_state(); out < (head + 1) * p.outputs_per_state(); ++out) {
                const int64_t query = out / p.outputs_per_query();
                q_heads.load(chunk.token, chunk.count, query, solver.b);
                solver.run(&block, H, lamb, inverse_lamb, chunk.count, stop);
                read.run(&block, G, H, lamb, inverse_lamb, stop, chunk.count,
                         [&](int i) { return q_heads.at(chunk.token + i, query); }, solver);
                x_heads.store(chunk.token, chunk.count, out, solver.x);
                o_heads.store(chunk.token, chunk.count, out, read.o);
                for (int i = 0; i < chunk.count; ++i) {
                    const int64_t at = (chunk.token + i) * p.HO + out;
                    steps.data_ptr<int>()[at] = solver.rows[i].steps;
                    bound.data_ptr<T>()[at] = std::sqrt(solver.rows[i].bound_squared());
                }
            }
        };
    });
    return {o.to(p.dtype), x, h_kk, h_kv, steps, bound};
}

// w_t = (H_t + Lambda)^{-1} G_t do_t for all tokens, [B, T, HO, K], and what the state before each chunk adds to the
// output of its tokens, x_t' S y_t with y_t = [do_t | -w_t], before decay, [B, T, HO, 1] in float64.
template <typename T>
std::tuple<Tensor, Tensor> solve_adjoint(const ProblemSize& p, const Inputs<T>& in, View<T> s, const Heads<T>& x_heads,
                                         const Heads<T>& grad_o, Stop stop) {
    const Tensor w = at::empty({p.B, p.T, p.HO, p.K}, in.g_.options());
    const Tensor products = at::empty({p.B, p.T, p.HO, 1}, in.g_.options().dtype(at::kDouble));
    const Heads<T> w_heads(w);
    const Heads<double> product_heads(products);
    const int64_t k_column = padded<T>(p.V), u_width = k_column + padded<T>(p.K);
    for_chunks_and_heads(p, in.layout, [&] {
        return [&, block = Block<T>(p.K, p.V), solver = Solver<T>(kChunk, p.K), x = Matrix<T>(kChunk, p.K),
                y = Matrix<T>(kChunk, u_width), from_state = Matrix<T>(kChunk, u_width), gt = Matrix<T>(p.V, p.K),
                rows = row_numbers(kChunk), hard = HardRows<T>(p.K, p.V)](int64_t number, int64_t head) mutable {
            const auto& kernel = kernels<T>();
            const Chunk chunk = in.layout.chunks[number];
            const View<T> G = s.rows_from((number * p.HS + head) * p.K), H = G.columns_from(k_column);
            const T *const lamb = in.lamb.lamb.row(head), *const inverse_lamb = in.lamb.inverse.row(head);
            in.load(p, block, chunk, head, true);
            transpose<T>(G, p.K, p.V, gt);
            for (int64_t out = head * p.outputs_per_state(); out < (head + 1) * p.outputs_per_state(); ++out) {
                grad_o.load(chunk.token, chunk.count, out, y);
                attend<T>(&block, y, p.V, block.vt(), gt, block.k(), p.K, solver.b, solver.scores, rows.data(),
                          chunk.count);
                solver.run(&block, H, lamb, inverse_lamb, chunk.count, stop);
                const bool any_hard = hard.find(solver, chunk.count, stop);
                if (any_hard) hard.correct_adjoint(block, G, H, lamb, inverse_lamb, y, chunk.count, stop, solver);
                w_heads.store(chunk.token, chunk.count, out, solver.x);

                x_heads.load(chunk.token, chunk.count, out, x);
                for (int i = 0; i < chunk.count; ++i) kernel.scale(p.K, T(-1), solver.x.row(i), y.row(i) + k_column);
                attend<T>(nullptr, x, p.K, {}, G, {}, u_width, from_state, {}, rows.data(), chunk.count);
                for (int i = 0; i < chunk.count; ++i)
                    *product_heads.at(chunk.token + i, out) = kernel.dot(u_width, from_state.row(i), y.row(i));
                if (any_hard)
                    hard.products(x, y, chunk.count, [&](int i) { return product_heads.at(chunk.token + i, out); });
            }
        };
    });
    return {w, products};
}

// The gradient of gated linear attention with queries x, keys k, values u = [v | k] and output gradients y = [do | -w]:
// dk and dv per state head, dg and dbeta. S is the state before and D the adjoint of the state after a chunk.
template <typename T>
struct AttentionGradient {
    const ProblemSize& p;
    const Inputs<T>& in;
    View<T> states, adjoints;
    Heads<T> x_heads, grad_o, w_heads;
    Heads<double> products;  // x_i' S y_i
    Heads<T> dk, dv, dg, dbeta;

    const Kernels<T>& kernel = kernels<T>();
    int64_t k_width = padded<T>(p.K), k_column = padded<T>(p.V), u_width = k_column + k_width;
    Block<T> block{p.K, p.V};
    Matrix<T> x{kChunk, p.K}, y{kChunk, u_width};
    Matrix<T> keys{kChunk, kChunk}, residuals{kChunk, kChunk};    // scores x_i.k_j and y_i.u_j
    Matrix<T> from_adjoint_t{k_width, kChunk};          // D u_j, transposed
    Matrix<T> moved{kChunk, p.K}, du{kChunk, u_width};  // D_j u_j and D_j' k_j, with the adjoint D_j at token j
    std::vector<int> rows = row_numbers(std::max<int64_t>(kChunk, p.K));

    // What the decays carry, each term once: from token j to token i, from the state before the chunk to token i, from
    // token j to the state after the chunk, and from state to state.
    double inside[kChunk][kChunk] = {}, before[kChunk] = {}, after[kChunk] = {}, across = 0;

    void operator()(int64_t number, int64_t head) {
        const Chunk chunk = in.layout.chunks[number];
        const View<T> S = states.rows_from((number * p.HS + head) * p.K);
        const View<T> D = adjoints.rows_from((number * p.HS + head) * p.K);
        in.load(p, block, chunk, head, true);
        start_from_adjoint(S, D);
        for (int64_t n = 0; n < p.outputs_per_state(); ++n) add_outputs(chunk, head * p.outputs_per_state() + n);
        store(chunk, head);
    }

    // C (+)= row_scale o (A B), or with A' and its known zeros.
    void multiply(View<T> a, View<T> b, View<T> c, int64_t n, int64_t depth, Part part = Part::all,
                  const T* row_scale = nullptr) {
        Product<T> product{a.data, a.ld, 1, b.data, b.ld, c.data, c.ld, n, depth};
        product.part = part;
        product.row_scale = row_scale;
        kernel.multiply(product, rows.data(), block.count);
    }
    void add_transposed(View<T> a, View<T> b, View<T> c, int64_t n) {
        Product<T> product{a.data, 1, a.ld, b.data, b.ld, c.data, c.ld, n, block.count};
        product.part = Part::a_upper;
        product.add = c.data;
        kernel.multiply(product, rows.data(), block.count);
    }

    void start_from_adjoint(View<T> S, View<T> D) {
        const Gates<T>& gates = block.gates;
        Product<T> product{D.data, D.ld, 1, block.ut.data, block.ut.ld, from_adjoint_t.data, from_adjoint_t.ld, kChunk,
                           u_width};
        kernel.multiply(product, rows.data(), p.K);
        transpose<T>(from_adjoint_t, k_width, block.count, moved);  // with the padding: moved may hold NaN there
        multiply(block.k(), D, du, u_width, p.K, Part::all, gates.out);
        for (int j = 0; j < block.count; ++j) {
            const T dot = kernel.dot(k_width, block.k().row(j), moved.row(j));
            after[j] = static_cast<double>(gates.out[j]) * gates.beta[j] * dot;
            kernel.scale(k_width, gates.out[j], moved.row(j), moved.row(j));
            before[j] = 0;
            std::fill_n(inside[j], kChunk, 0.0);
        }
        across = 0;
        for (int64_t i = 0; i < p.K; ++i) across += kernel.wide_dot(u_width, D.row(i), S.row(i));
        across *= gates.total;
    }

    void add_outputs(Chunk chunk, int64_t head) {
        x_heads.load(chunk.token, chunk.count, head, x);
        grad_o.load(chunk.token, chunk.count, head, y);
        w_heads.load(chunk.token, chunk.count, head, y.columns_from(k_column));
        for (int i = 0; i < chunk.count; ++i)
            kernel.scale(k_width, T(-1), y.row(i) + k_column, y.row(i) + k_column);

        multiply(x, block.kt(), keys, kChunk, p.K, Part::c_lower);
        multiply(y, block.ut, residuals, kChunk, u_width, Part::c_lower);
        for (int i = 0; i < chunk.count; ++i) {
            T *const key = keys.row(i), *const residual = residuals.row(i);
            kernel.weigh_scores(i + 1, block.decay.row(i), block.mask.row(i), key, residual, inside[i]);
            std::fill(key + i + 1, key + kChunk, T(0));
            std::fill(residual + i + 1, residual + kChunk, T(0));
        }
        add_transposed(residuals, x, moved, k_width);
        add_transposed(keys, y, du, u_width);
        for (int i = 0; i < chunk.count; ++i)
            before[i] += static_cast<double>(block.gates.in[i]) * *products.at(chunk.token + i, head);
    }

    void store(Chunk chunk, int64_t head) {
        for (int j = 0; j < chunk.count; ++j) {
            const T beta = block.gates.beta[j];
            T *const dv_row = dv.at(chunk.token + j, head), *const dk_row = dk.at(chunk.token + j, head);
            for (int64_t c = 0; c < p.V; ++c) dv_row[c] = beta * du.row(j)[c];
            for (int64_t c = 0; c < p.K; ++c) dk_row[c] = beta * (moved.row(j)[c] + du.row(j)[k_column + c]);
            dbeta.at(chunk.token + j, 0)[head] = kernel.dot(k_width, block.k().row(j), moved.row(j));
        }

        // dg_t is all that passes through the decay of token t: j < t <= i. Only terms that belong are ever added;
        // differences of running sums would lose small gradients beside large ones.
        double total[kChunk], departures = 0, passing[kChunk] = {};
        for (int t = chunk.count - 1; t >= 0; --t)
            total[t] = before[t] + (t + 1 < chunk.count ? total[t + 1] : 0.0);
        for (int t = 0; t < chunk.count; ++t) {
            total[t] += departures + across;
            departures += after[t];
        }
        for (int t = chunk.count - 1; t >= 0; --t) {
            double sums[4] = {};  // four at a time: one chain of additions would be waited for
            for (int j = 0; j < t; ++j) sums[j % 4] += passing[j] += inside[t][j];
            const double within = (sums[0] + sums[1]) + (sums[2] + sums[3]);
            dg.at(chunk.token + t, 0)[head] = static_cast<T>(total[t] + within);
        }
    }
};

// Sum over the heads that share one, [B, T, H, width] -> [B, T, heads, width].
Tensor sum_groups(const Tensor& t, int64_t heads) {
    return t.size(2) == heads ? t : t.view({t.size(0), t.size(1), heads, t.size(2) / heads, t.size(3)}).sum(3);
}

template <typename T>
BackwardResult backward(const ProblemSize& p, const Inputs<T>& in, const Tensor& grad_o_in, const Tensor& x_in,
                        const optional<Tensor>& dh_kk_in, const optional<Tensor>& dh_kv_in, Stop stop) {
    const Tensor grad_o = prepare<T>(grad_o_in), x = prepare<T>(x_in);
    const auto dh_kk_final = prepare<T>(dh_kk_in), dh_kv_final = prepare<T>(dh_kv_in);
    const auto options = x.options();
    const Tensor states = in.allocate_states(p), adjoints = in.allocate_states(p);
    const View<T> s = in.scan(p, states, nullptr, nullptr);
    Tensor w, products;
    std::tie(w, products) = solve_adjoint(p, in, s, Heads<T>(x), Heads<T>(grad_o), stop);

    const Tensor dh_kk = at::empty({p.N, p.HS, p.K, p.K}, options), dh_kv = at::empty({p.N, p.HS, p.K, p.V}, options);
    const View<T> d{adjoints.data_ptr<T>(), in.ld(p)};
    const ScanPart<T> parts[2] = {
        {Heads<T>(grad_o), T(1), data_or_null<T>(dh_kv_final), dh_kv.data_ptr<T>(), false},
        {Heads<T>(w), T(-1), data_or_null<T>(dh_kk_final), dh_kk.data_ptr<T>(), true}};
    scan_states(p, in.layout, in.g, in.beta, Heads<T>(x), parts, true, d);

    const Tensor dk = at::empty({p.B, p.T, p.HS, p.K}, options), dv = at::empty({p.B, p.T, p.HS, p.V}, options);
    const Tensor dg = at::empty({p.B, p.T, p.HS}, options), dbeta = at::empty({p.B, p.T, p.HS}, options);
    for_chunks_and_heads(p, in.layout, [&] {
        return AttentionGradient<T>{p, in, s, d, Heads<T>(x), Heads<T>(grad_o), Heads<T>(w), Heads<double>(products),
                                    Heads<T>(dk), Heads<T>(dv), Heads<T>(dg.unsqueeze(-2)),
                                    Heads<T>(dbeta.unsqueeze(-2))};
    });
    const Tensor dlamb = -(w * x).sum(at::IntArrayRef{0, 1}).view({p.HS, p.outputs_per_state(), p.K}).sum(1);
    return {sum_groups(w, p.HQ).to(p.dtype), sum_groups(dk, p.HK).to(p.dtype), dv.to(p.dtype), dg, dbeta, dlamb,
            dh_kk, dh_kv};
}

// One token for every sequence: the states are read, updated, written and kept at hand for the solve.
template <typename T>
Tensor decode(const ProblemSize& p, const Tensor& q_in, const Tensor& k_in, const Tensor& v_in, const Tensor& g_in,
              const Tensor& beta_in, const Tensor& lamb_in, const Tensor& h_kk, const Tensor& h_kv,
              const optional<Tensor>& state_indices, Stop stop) {
    const Tensor q = prepare<T>(q_in), k = prepare<T>(k_in), v = prepare<T>(v_in), g = prepare<T>(g_in),
                 beta = prepare<T>(beta_in);
    const Regulariser<T> lamb(prepare<T>(lamb_in));
    const Tensor o = at::empty({p.B, p.HO, p.V}, q.options());
    const Tensor indices = state_indices ? state_indices->contiguous() : Tensor();
    const Heads<T> q_heads(q), k_heads(k), v_heads(v), o_heads(o);
    const int64_t group = p.outputs_per_state();
    at::parallel_for(0, p.B * p.HS, 1, [&](int64_t begin, int64_t end) {
        Matrix<T> H(p.K, p.K), G(p.K, p.V);
        Solver<T> solver(group, p.K);
        ReadOut<T> read(group, p.K, p.V);
        const auto update = [](T* state, int64_t width, T decay, T factor, const T* values, T* copy) {
            for (int64_t j = 0; j < width; ++j) copy[j] = state[j] = decay * state[j] + factor * values[j];
        };
        for (int64_t task = begin; task < end; ++task) {
            const int64_t b = task / p.HS, head = task % p.HS;
            const int64_t index = state_indices ? indices.const_data_ptr<int64_t>()[b] : b;
            if (index < 0) {
                std::fill_n(o_heads.at(b, head * group), group * p.V, T(0));
                continue;
            }
            const T decay = std::exp(g.const_data_ptr<T>()[task]), gate = beta.const_data_ptr<T>()[task];
            const T *const key = k_heads.at(b, k_heads.of_state(p, head)), *const value = v_heads.at(b, head);
            const int64_t first_row = (index * p.HS + head) * p.K;
            for (int64_t i = 0; i < p.K; ++i) {
                update(h_kk.data_ptr<T>() + (first_row + i) * p.K, p.K, decay, gate * key[i], key, H.row(i));
                update(h_kv.data_ptr<T>() + (first_row + i) * p.V, p.V, decay, gate * key[i], value, G.row(i));
            }
            const auto query = [&](int i) { return q_heads.at(b, (head * group + i) / p.outputs_per_query()); };
            for (int64_t i = 0; i < group; ++i) std::copy_n(query(i), p.K, solver.b.row(i));
            solver.run(nullptr, H, lamb.lamb.row(head), lamb.inverse.row(head), group, stop);
            read.run(nullptr, G, H, lamb.lamb.row(head), lamb.inverse.row(head), stop, group, query, solver);
            for (int64_t i = 0; i < group; ++i) std::copy_n(read.o.row(i), p.V, o_heads.at(b, head * group + i));
        }
    });
    return o.to(p.dtype);
}

// Calls f with a value of the compute dtype.
template <typename F>
auto with_compute_type(const ProblemSize& p, const F& f) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return p.compute == at::kDouble ? f(double()) : f(float());
}

ForwardResult chunk_forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& g, const Tensor& beta,
                            const Tensor& lamb, const optional<Tensor>& h_kk, const optional<Tensor>& h_kv,
                            const optional<Tensor>& cu_seqlens, int64_t max_cg_iterations, double cg_tol) {
    const ProblemSize p = check_chunk_inputs(q, k, v, g, beta, lamb, h_kk, h_kv, cu_seqlens, max_cg_iterations, cg_tol);
    return with_compute_type(p, [&](auto zero) {
        using T = decltype(zero);
        const Inputs<T> in(p, k, v, g, beta, lamb, h_kk, h_kv, cu_seqlens);
        return forward<T>(p, in, q, {static_cast<int>(max_cg_iterations), cg_tol});
    });
}

BackwardResult chunk_backward(const Tensor& grad_o, const optional<Tensor>& dh_kk_final,
                              const optional<Tensor>& dh_kv_final, const Tensor& q, const Tensor& k, const Tensor& v,
                              const Tensor& g, const Tensor& beta, const Tensor& lamb, const optional<Tensor>& h_kk,
                              const optional<Tensor>& h_kv, const optional<Tensor>& cu_seqlens, const Tensor& x,
                              int64_t max_cg_iterations, double cg_tol) {
    const ProblemSize p = check_chunk_inputs(q, k, v, g, beta, lamb, h_kk, h_kv, cu_seqlens, max_cg_iterations, cg_tol);
    check_backward_inputs(p, q, grad_o, dh_kk_final, dh_kv_final, x);
    return with_compute_type(p, [&](auto zero) {
        using T = decltype(zero);
        const Inputs<T> in(p, k, v, g, beta, lamb, h_kk, h_kv, cu_seqlens);
        return backward<T>(p, in, grad_o, x, dh_kk_final, dh_kv_final, {static_cast<int>(max_cg_iterations), cg_tol});
    });
}

Tensor decode_step(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& g, const Tensor& beta,
                   const Tensor& lamb, const Tensor& h_kk, const Tensor& h_kv, const optional<Tensor>& state_indices,
                   int64_t max_cg_iterations, double cg_tol) {
    const ProblemSize p =
        check_decode_inputs(q, k, v, g, beta, lamb, h_kk, h_kv, state_indices, max_cg_iterations, cg_tol);
    return with_compute_type(p, [&](auto zero) {
        using T = decltype(zero);
        return decode<T>(p, q, k, v, g, beta, lamb, h_kk, h_kv, state_indices,
                         {static_cast<int>(max_cg_iterations), cg_tol});
    });
}

}  // namespace
}  // namespace mesa

TORCH_LIBRARY_IMPL(mesa_ext, CPU, m) {
    m.impl("chunk_forward", TORCH_FN(mesa::chunk_forward));
    m.impl("chunk_backward", TORCH_FN(mesa::chunk_backward));
    m.impl("decode_step", TORCH_FN(mesa::decode_step));
}
