// One chunk: the operator A, the solve, the correction of ill-conditioned rows in float64, and the read-out.
#pragma once

#include <limits>

#include "chunks.h"

namespace mesa::cpu {

// Tokens as they act on one another, and the decay of the state before them.
template <typename T>
struct Window {
    View<T> mask{};
    const T* in = nullptr;
    int count = 0;
    int64_t width = 0;  // of the scores, in whole lines

    Window() = default;
    Window(View<T> mask, const T* in, int count, int64_t tokens)
        : mask(mask), in(in), count(count), width(padded<T>(tokens)) {}

    // All tokens of a chunk, or none.
    Window(const Block<T>* block) {
        if (block) *this = Window(block->mask, block->gates.in, block->count, kChunk);
    }
};

// scores = (A keys') o M for the given rows, A `width` wide.
template <typename T>
void score(const Window<T>& window, View<T> a, int64_t width, View<T> keys_t, View<T> scores, const int* rows,
           int count) {
    Product<T> product{{a.data, a.ld, 1, keys_t.data, keys_t.ld, width}, scores.data, scores.ld, window.width};
    product.lower = true;
    product.mask = window.mask.data;
    kernels<T>().multiply(product, rows, count);
}

// out = e^{gc} (A S) + ((A keys') o M) values for the given rows, A `width` and the values `n` wide. This is the
// operator of the conjugate gradient (keys, S, values = k, H, k), the read-out (k, G, v) and dx (v, G', k).
// Without tokens (a decode step) it is A S.
template <typename T>
void attend(const Window<T>& window, View<T> a, int64_t width, View<T> keys_t, View<T> state, View<T> values,
            int64_t n, View<T> out, View<T> scores, const int* rows, int count) {
    Product<T> product{{a.data, a.ld, 1, state.data, state.ld, width}, out.data, out.ld, padded<T>(n)};
    if (window.count) {
        score(window, a, width, keys_t, scores, rows, count);
        product.row_scale = window.in;
        product.second = {scores.data, scores.ld, 1, values.data, values.ld, window.count, Part::lower};
    }
    kernels<T>().multiply(product, rows, count);
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

// The systems of a chunk: its tokens, and H before every part of it. Without tokens (a decode step) all rows share one
// H.
template <typename T>
struct Systems {
    const Block<T>* block = nullptr;
    int tokens = kChunk;  // of a part
    std::vector<View<T>> H;

    explicit Systems(View<T> H) : H{H}, weighted(1, 1) {}

    explicit Systems(int64_t K)
        : tokens(part_tokens<T>(K)), H(kChunk / tokens), weighted(kChunk, K), rows(row_numbers(K)) {
        for (size_t part = 1; part < H.size(); ++part) H[part] = memory.emplace_back(K, K);
    }

    void load(const Block<T>& block, View<T> before) {
        this->block = &block;
        H[0] = before;
        for (int end = tokens; end < block.count; end += tokens) add_part(end, H[end / tokens]);
    }

    // The part from `first` on.
    Window<T> window(int first, T (&in)[kChunk]) const {
        const int count = std::min(tokens, block->count - first);
        for (int i = 0; i < count; ++i) in[i] = first ? block->decay.row(first + i)[first - 1] : block->gates.in[i];
        return {block->mask.rows_from(first).columns_from(first), in, count, tokens};
    }

    // The state S = [G | H] after the chunk from the one before it, which may lie in the same place.
    void advance(View<T> before, View<T> after) {
        add_tokens<T>(block->gates, 0, block->count, block->k(), block->v(), before, after, block->k_column, weighted,
                      rows);
        add_part(block->count, after.columns_from(block->k_column));
    }

   private:
    std::vector<Matrix<T>> memory;
    Matrix<T> weighted;
    std::vector<int> rows;

    // H after the tokens of a part, up to `end`.
    void add_part(int end, View<T> after) {
        const int part = (end - 1) / tokens, first = part * tokens;
        const View<T> keys = block->k().rows_from(first);
        add_tokens<T>(block->gates, first, end, keys, keys, H[part], after, padded<T>(rows.size()), weighted, rows);
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

    Solver(int64_t capacity, int64_t width)
        : K(width), b(capacity, K), x(capacity, K), p(capacity, K), ap(capacity, K), scores(kChunk, kChunk),
          rows(capacity), curvature(capacity) {}

    // (H_i + Lambda) x_i = b_i for i < count, with H_i = e^{gc_i} H + the tokens of the block up to i.
    void run(const Systems<T>& systems, const T* lamb, const T* inverse_lamb, int count, Stop stop) {
        const auto& kernel = kernels<T>();
        const int64_t n = padded<T>(K);
        std::vector<int> exponents(count);
        for (int i = 0; i < count; ++i) {
            std::fill(b.row(i) + K, b.row(i) + n, T(0));  // NaN from a right-hand side before this one
            exponents[i] = scaling_exponent(kernel.largest(n, b.row(i)));
            const T scale = std::ldexp(T(1), -exponents[i]);
            rows[i] = CgRow<T>(kernel.cg_start(n, scale, inverse_lamb, p.row(i), x.row(i), b.row(i)));
            curvature[i] = 0;
        }
        const Block<T>* const block = systems.block;
        if (!block) iterate({}, {}, {}, systems.H[0], lamb, inverse_lamb, 0, count, stop);
        for (int first = 0; block && first < count; first += systems.tokens) {
            T in[kChunk];
            const Window<T> window = systems.window(first, in);
            iterate(window, block->k().rows_from(first), block->kt().columns_from(first),
                    systems.H[first / systems.tokens], lamb, inverse_lamb, first, window.count, stop);
        }
        for (int i = 0; i < count; ++i) kernel.scale(n, std::ldexp(T(1), exponents[i]), x.row(i), x.row(i));
    }

   private:
    std::vector<int> active;

    // The steps for the rows from `first` on, given the state before them.
    void iterate(const Window<T>& window, View<T> k, View<T> kt, View<T> H, const T* lamb, const T* inverse_lamb,
                 int first, int count, Stop stop) {
        const auto& kernel = kernels<T>();
        const View<T> p = this->p.rows_from(first), ap = this->ap.rows_from(first);
        const T tol2 = static_cast<T>(stop.tol * stop.tol);
        active.clear();
        for (int i = 0; i < count; ++i)
            if (rows[first + i].active()) active.push_back(i);
        for (int step = 0; step < stop.max_iterations && !active.empty(); ++step) {
            attend<T>(window, p, K, kt, H, k, K, ap, scores, active.data(), active.size());
            for (const int i : active) {
                const int row = first + i;
                kernel.cg_step(padded<T>(K), lamb, inverse_lamb, p.row(i), ap.row(i), x.row(row), b.row(row),
                               rows[row], tol2);
                curvature[row] = std::max(curvature[row], T(1) / rows[row].step);
            }
            const auto ended = [&](int i) { return !rows[first + i].active(); };
            active.erase(std::remove_if(active.begin(), active.end(), ended), active.end());
        }
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
                if (solver.curvature[i] > kHardCondition && solver.rows[i].bound_squared() <= stop.tol * stop.tol)
                    rows.push_back(i);
        return !rows.empty();
    }

    // Sets the chunk (none for a decode step, whose G and H hold the token) and the states before it.
    Wide& widen(const Systems<T>& systems, View<T> G, int64_t capacity) {
        if (!wide) wide = std::make_unique<Wide>(capacity, K, V);
        if (systems.block) wide->block.widen(*systems.block, K, V);
        convert<T, double>(G, K, V, wide->G);
        convert<T, double>(systems.H[0], K, K, wide->H);
        return *wide;
    }

    // Corrects solver.x of the first `count` rows where they are hard, given their right-hand sides in b.
    void correct(const Systems<T>& systems, const T* lamb, const T* inverse_lamb, int count, Stop stop,
                 Solver<T>& solver) {
        Wide& w = *wide;
        const std::vector<CgRow<T>> first_rows = solver.rows;
        convert<T, double>(solver.x, count, K, w.x);
        attend<double>(systems.block ? &w.block : nullptr, w.x, K, w.block.kt(), w.H, w.block.k(), K, w.ax, w.scores,
                       rows.data(), rows.size());
        for (int i = 0; i < count; ++i) std::fill_n(solver.b.row(i), K, T(0));  // nothing to solve for the others
        for (const int i : rows)
            for (int64_t j = 0; j < K; ++j)
                solver.b.row(i)[j] = static_cast<T>(w.b.row(i)[j] - w.ax.row(i)[j] - lamb[j] * w.x.row(i)[j]);
        solver.run(systems, lamb, inverse_lamb, count, {stop.max_iterations, kCorrectionTolerance});
        for (const int i : rows)
            for (int64_t j = 0; j < K; ++j) w.x.row(i)[j] += solver.x.row(i)[j];
        convert<double, T>(w.x, count, K, solver.x);
        solver.rows = first_rows;
    }

    // The same for the backward pass, where b = G do.
    void correct_adjoint(const Systems<T>& systems, View<T> G, const T* lamb, const T* inverse_lamb, View<T> grad_o,
                         int count, Stop stop, Solver<T>& solver) {
        Wide& w = widen(systems, G, kChunk);
        transpose<double>(w.G, K, V, w.gt);
        convert<T, double>(grad_o, count, V, w.y);
        attend<double>(&w.block, w.y, V, w.block.vt(), w.gt, w.block.k(), K, w.b, w.scores, rows.data(), rows.size());
        correct(systems, lamb, inverse_lamb, count, stop, solver);
    }

    // to(i) = weight_i x' (G do - H w) for the hard rows among the first `count`, once they are corrected.
    template <typename To>
    void products(View<T> x, View<T> grad_o, View<T> adjoint, int count, const T* weight, const To& to) {
        Wide& w = *wide;
        convert<T, double>(x, count, K, w.x);
        attend<double>(nullptr, w.x, K, {}, w.G, {}, V, w.y, w.scores, rows.data(), rows.size());
        attend<double>(nullptr, w.x, K, {}, w.H, {}, K, w.ax, w.scores, rows.data(), rows.size());
        for (const int i : rows) {
            const double from_G = std::inner_product(w.y.row(i), w.y.row(i) + V, grad_o.row(i), 0.0);
            const double from_H = std::inner_product(w.ax.row(i), w.ax.row(i) + K, adjoint.row(i), 0.0);
            *to(i) = weight[i] * (from_G - from_H);
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
    void run(const Systems<T>& systems, View<T> G, const T* lamb, const T* inverse_lamb, Stop stop, int count,
             const Q& q, Solver<T>& solver) {
        const Block<T>* const block = systems.block;
        attend<T>(block, solver.x, K, block ? block->kt() : View<T>{}, G, block ? block->v() : View<T>{}, V, o,
                  solver.scores, all.data(), count);
        if (!hard.find(solver, count, stop)) return;
        auto& wide = hard.widen(systems, G, all.size());
        for (const int i : hard.rows) std::copy_n(q(i), K, wide.b.row(i));
        hard.correct(systems, lamb, inverse_lamb, count, stop, solver);
        attend<double>(block ? &wide.block : nullptr, wide.x, K, wide.block.kt(), wide.G, wide.block.v(), V, wide.y,
                       wide.scores, hard.rows.data(), hard.rows.size());
        for (const int i : hard.rows) std::copy_n(wide.y.row(i), V, o.row(i));
    }
};

}  // namespace mesa::cpu
