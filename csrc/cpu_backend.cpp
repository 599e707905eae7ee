// The operators on CPU, in float32 or float64 (16-bit inputs are computed in float32, results rounded at the end).
//
// Per sequence and head the state S = [G | H] is a linear-attention state with keys k and values u = [v | k], and its
// adjoint is one with keys x and values y = [do | -w]. The passes over all tokens are therefore few, each with a state at
// hand that goes from chunk to chunk: solve and read-out; backwards dx and the solve, then the gradients with the adjoint.
#include <torch/library.h>

#include <tuple>

#include "cpu/solve.h"
#include "cpu/states.h"

namespace mesa::cpu {
namespace {

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
    Segments segments;

    Inputs(const ProblemSize& p, const Tensor& k_in, const Tensor& v_in, const Tensor& g_in, const Tensor& beta_in,
           const Tensor& lamb_in, const optional<Tensor>& h_kk_in, const optional<Tensor>& h_kv_in,
           const optional<Tensor>& cu_seqlens)
        : k_(prepare<T>(k_in)), v_(prepare<T>(v_in)), g_(prepare<T>(g_in)), beta_(prepare<T>(beta_in)),
          h_kk(prepare<T>(h_kk_in)), h_kv(prepare<T>(h_kv_in)), k(k_), v(v_), g(g_.unsqueeze(-2)),
          beta(beta_.unsqueeze(-2)), lamb(prepare<T>(lamb_in)), layout(p, cu_seqlens),
          segments(p, layout, !cu_seqlens) {}

    Scan<T> scan(const ProblemSize& p, T* final_kk, T* final_kv) const {
        // x' H' = (H x)': only the transpose gives the gradient of an H that is perturbed without staying symmetric.
        return {p, layout, segments, g, beta, k,
                {{v, T(1), data_or_null<T>(h_kv), final_kv, false}, {k, T(1), data_or_null<T>(h_kk), final_kk, true}},
                false};
    }

    void load(const ProblemSize& p, Block<T>& block, Chunk chunk, int64_t head, bool transpose_v) const {
        block.load(k, k.of_state(p, head), v, g, beta, chunk, head, transpose_v);
    }
};

// Calls body(segment number, state head) for all of them in parallel; make_body makes a body for each thread.
template <typename T, typename MakeBody>
void for_segments_and_heads(const ProblemSize& p, const Inputs<T>& in, const MakeBody& make_body) {
    for_each_task(in.segments.list.size() * p.HS, [&] {
        return [&, body = make_body()](int64_t task) mutable { body(task / p.HS, task % p.HS); };
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
    const Scan<T> scan = in.scan(p, h_kk.data_ptr<T>(), h_kv.data_ptr<T>());
    const States<T> states(p, in.segments.list.size(), options);  // of the segments, on their way through the chunks
    const auto place = [&](int64_t segment, int64_t head) { return states.at(segment, head); };
    scan.start_segments(place);

    const Heads<T> q_heads(q), o_heads(o), x_heads(x);
    for_segments_and_heads(p, in, [&] {
        return [&, block = Block<T>(p.K, p.V), solver = Solver<T>(kChunk, p.K), read = ReadOut<T>(kChunk, p.K, p.V),
                advance = Advance<T>(p)](int64_t segment, int64_t head) mutable {
            const View<T> G = place(segment, head), H = G.columns_from(block.k_column);
            const T *const lamb = in.lamb.lamb.row(head), *const inverse_lamb = in.lamb.inverse.row(head);
            for (int64_t number = in.segments.list[segment].begin; number < in.segments.list[segment].end; ++number) {
                const Chunk chunk = in.layout.chunks[number];
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
                        steps.data_ptr<int>()[at] = solver.rows[i].steps();
                        bound.data_ptr<T>()[at] = std::sqrt(solver.rows[i].bound_squared());
                    }
                }
                advance(block, G, G);
            }
            scan.finish(in.segments.list[segment], head, G);
        };
    });
    return {o.to(p.dtype), x, h_kk, h_kv, steps, bound};
}

// What the solve of the backward pass leaves to the gradients.
template <typename T>
struct Adjoint {
    States<T> states;  // before every chunk
    Tensor w;          // w_t = (H_t + Lambda)^{-1} G_t do_t, [B, T, HO, K]
    Tensor products;   // e^{gc_t} x_t' S y_t with y_t = [do_t | -w_t] and the state S before the chunk, [B, T, HO, 1]
    Tensor sums;       // of w o x over every chunk, [chunk, HO, K]
};

template <typename T>
Adjoint<T> solve_adjoint(const ProblemSize& p, const Inputs<T>& in, const Heads<T>& x_heads, const Heads<T>& grad_o,
                         Stop stop) {
    const auto options = in.g_.options();
    const int64_t chunks = in.layout.chunks.size();
    const Adjoint<T> result{States<T>(p, chunks, options), at::empty({p.B, p.T, p.HO, p.K}, options),
                            at::empty({p.B, p.T, p.HO, 1}, options.dtype(at::kDouble)),
                            at::zeros({chunks, p.HO, p.K}, options)};
    const Heads<T> w_heads(result.w), sums(result.sums);
    const Heads<double> product_heads(result.products);
    in.scan(p, nullptr, nullptr).start_segments([&](int64_t segment, int64_t head) {
        return result.states.at(in.segments.list[segment].begin, head);
    });

    const int64_t k_width = padded<T>(p.K);
    for_segments_and_heads(p, in, [&] {
        return [&, block = Block<T>(p.K, p.V), solver = Solver<T>(kChunk, p.K), 
                x = Matrix<T>(kChunk, p.K), from_g = Matrix<T>(kChunk, p.K), from_h = Matrix<T>(kChunk, p.K),
                gt = Matrix<T>(p.V, p.K), rows = row_numbers(kChunk), hard = HardRows<T>(p.K, p.V),
                advance = Advance<T>(p)](int64_t segment, int64_t head) mutable {
            const auto& kernel = kernels<T>();
            const T *const lamb = in.lamb.lamb.row(head), *const inverse_lamb = in.lamb.inverse.row(head);
            const int64_t end = in.segments.list[segment].end;
            for (int64_t number = in.segments.list[segment].begin; number < end; ++number) {
                const Chunk chunk = in.layout.chunks[number];
                const View<T> G = result.states.at(number, head), H = G.columns_from(block.k_column);
                in.load(p, block, chunk, head, true);
                transpose<T>(G, p.K, p.V, gt);
                for (int64_t out = head * p.outputs_per_state(); out < (head + 1) * p.outputs_per_state(); ++out) {
                    const auto multiply_state = [&](View<T> a, int64_t width, View<T> state, View<T> to) {
                        Product<T> product{{a.data, a.ld, 1, state.data, state.ld, width}, to.data, to.ld, k_width};
                        product.row_scale = block.gates.in;
                        kernel.multiply(product, rows.data(), chunk.count);
                    };
                    const View<T> do_rows = grad_o.rows(chunk.token, out);
                    multiply_state(do_rows, p.V, gt, from_g);
                    score<T>(&block, do_rows, p.V, block.vt(), solver.scores, rows.data(), chunk.count);
                    Product<T> dx{{solver.scores.data, solver.scores.ld, 1, block.k().data, block.k().ld, chunk.count,
                                   Part::lower}, solver.b.data, solver.b.ld, k_width};
                    dx.add = from_g.data;
                    dx.ldadd = from_g.ld;
                    kernel.multiply(dx, rows.data(), chunk.count);
                    solver.run(&block, H, lamb, inverse_lamb, chunk.count, stop);
                    const bool any_hard = hard.find(solver, chunk.count, stop);
                    if (any_hard)
                        hard.correct_adjoint(block, G, H, lamb, inverse_lamb, do_rows, chunk.count, stop, solver);
                    w_heads.store(chunk.token, chunk.count, out, solver.x);

                    x_heads.load(chunk.token, chunk.count, out, x);
                    multiply_state(x, p.K, H, from_h);
                    for (int i = 0; i < chunk.count; ++i) {
                        const T *const x_row = x.row(i), *const w_row = solver.x.row(i);
                        kernel.add_products(p.K, x_row, w_row, sums.at(number, out));
                        *product_heads.at(chunk.token + i, out) =
                            kernel.dot(k_width, x_row, from_g.row(i)) - kernel.dot(k_width, from_h.row(i), w_row);
                    }
                    if (any_hard)
                        hard.products(x, do_rows, solver.x, chunk.count, block.gates.in,
                                      [&](int i) { return product_heads.at(chunk.token + i, out); });
                }
                if (number + 1 < end) advance(block, G, result.states.at(number + 1, head));
            }
        };
    });
    return result;
}

// The gradient of gated linear attention with queries x, keys k, values u = [v | k] and output gradients y = [do | -w]:
// dk and dv per state head, dg and dbeta. S is the state before and D the adjoint of the state after a chunk, which goes
// from chunk to chunk, backwards.
template <typename T>
struct AttentionGradient {
    const ProblemSize& p;
    const Inputs<T>& in;
    const States<T>& states;    // before every chunk
    const States<T>& adjoints;  // of the segments, on their way through the chunks
    const Scan<T>& scan;
    Heads<T> x_heads, grad_o, w_heads;
    Heads<double> products;  // e^{gc_i} x_i' S y_i
    Heads<T> dk, dv, dg, dbeta;

    const Kernels<T>& kernel = kernels<T>();
    int64_t k_width = padded<T>(p.K), k_column = padded<T>(p.V), u_width = k_column + k_width;
    Block<T> block{p.K, p.V};
    Matrix<T> x{kChunk, p.K}, y{kChunk, u_width}, weighted{kChunk, p.K};
    Matrix<T> keys{kChunk, kChunk}, residuals{kChunk, kChunk};    // scores x_i.k_j and y_i.u_j
    Matrix<T> from_values_t{k_width, kChunk};  // D_G v_j, transposed
    Matrix<T> E{p.K, p.K};                     // D_H + D_H': k is key and value of H, both of whose gradients are dk
    // With the adjoint at token j: `moved` is what passes to k_j as a key but for E k_j, which is in `du` beside D_G' k_j.
    Matrix<T> moved{kChunk, p.K}, du{kChunk, u_width};
    T keys_half[kChunk];  // k_j' D_H k_j
    std::vector<int> rows = row_numbers(kChunk), state_rows = row_numbers(p.K);

    // What the decays carry, each term once: from token j to token i, from the state before the chunk to token i, from
    // token j to the state after the chunk, and from state to state.
    double inside[kChunk][kChunk] = {}, before[kChunk] = {}, after[kChunk] = {}, across = 0;

    void operator()(int64_t segment, int64_t head) {
        const View<T> D = adjoints.at(segment, head);
        for (int64_t number = in.segments.list[segment].end - 1; number >= in.segments.list[segment].begin; --number) {
            const Chunk chunk = in.layout.chunks[number];
            in.load(p, block, chunk, head, true);
            start_from_adjoint(states.at(number, head), D);
            for (int64_t n = 0; n < p.outputs_per_state(); ++n) {
                add_outputs(chunk, head * p.outputs_per_state() + n);
                advance_adjoint(D, n == 0 ? block.gates.total : T(1));
            }
            store(chunk, head);
        }
        scan.finish(in.segments.list[segment], head, D);
    }

    // C (+)= row_scale o (A B), or with A' and its known zeros.
    void multiply(View<T> a, View<T> b, View<T> c, int64_t n, int64_t depth, bool lower = false,
                  const T* row_scale = nullptr) {
        Product<T> product{{a.data, a.ld, 1, b.data, b.ld, depth}, c.data, c.ld, n};
        product.lower = lower;
        product.row_scale = row_scale;
        kernel.multiply(product, rows.data(), block.count);
    }
    void add_transposed(View<T> a, View<T> b, View<T> c, int64_t n) {
        Product<T> product{{a.data, 1, a.ld, b.data, b.ld, block.count, Part::upper}, c.data, c.ld, n};
        product.add = c.data;
        product.ldadd = c.ld;
        kernel.multiply(product, rows.data(), block.count);
    }

    void start_from_adjoint(View<T> S, View<T> D) {
        const Gates<T>& gates = block.gates;
        const View<T> D_H = D.columns_from(k_column), du_k = du.columns_from(k_column);
        const Product<T> product{{D.data, D.ld, 1, block.vt().data, block.ut.ld, p.V}, from_values_t.data,
                                 from_values_t.ld, kChunk};
        kernel.multiply(product, state_rows.data(), p.K);
        transpose<T>(from_values_t, k_width, block.count, moved);  // with the padding: moved may hold NaN there
        transpose<T>(D_H, p.K, p.K, E);
        for (int64_t i = 0; i < p.K; ++i) kernel.scaled_sum(p.K, T(1), D_H.row(i), E.row(i), E.row(i));
        multiply(block.k(), D, du, k_column, p.K, false, gates.out);
        multiply(block.k(), E, du_k, k_width, p.K, false, gates.out);
        for (int j = 0; j < block.count; ++j) {
            const T* const key = block.k().row(j);
            kernel.scale(k_width, gates.out[j], moved.row(j), moved.row(j));
            keys_half[j] = kernel.dot(k_width, key, du_k.row(j)) / 2;
            after[j] = static_cast<double>(gates.beta[j]) * (kernel.dot(k_width, key, moved.row(j)) + keys_half[j]);
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

        multiply(x, block.kt(), keys, kChunk, p.K, true);
        multiply(y, block.ut, residuals, kChunk, u_width, true);
        for (int i = 0; i < chunk.count; ++i) {
            T *const key = keys.row(i), *const residual = residuals.row(i);
            kernel.weigh_scores(i + 1, block.decay.row(i), block.mask.row(i), key, residual, inside[i]);
            std::fill(key + i + 1, key + kChunk, T(0));
            std::fill(residual + i + 1, residual + kChunk, T(0));
        }
        add_transposed(residuals, x, moved, k_width);
        add_transposed(keys, y, du, u_width);
        for (int i = 0; i < chunk.count; ++i) before[i] += *products.at(chunk.token + i, head);
    }

    void advance_adjoint(View<T> D, T total) {
        for (int i = 0; i < block.count; ++i) kernel.scale(p.K, block.gates.in[i], x.row(i), weighted.row(i));
        advance_state<T>(weighted, y, block.count, total, D, D, u_width, state_rows);
    }

    void store(Chunk chunk, int64_t head) {
        for (int j = 0; j < chunk.count; ++j) {
            const T beta = block.gates.beta[j];
            kernel.scale(p.V, beta, du.row(j), dv.at(chunk.token + j, head));
            kernel.scaled_sum(p.K, beta, moved.row(j), du.row(j) + k_column, dk.at(chunk.token + j, head));
            dbeta.at(chunk.token + j, 0)[head] =
                kernel.dot(k_width, block.k().row(j), moved.row(j)) + keys_half[j];
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

// Over the first dimension; on any number of threads the same.
template <typename T>
Tensor sum_in_order(const Tensor& t) {
    const Tensor sum = at::zeros(t.sizes().slice(1), t.options());
    const int64_t n = sum.numel();
    for (int64_t i = 0; i < t.size(0); ++i)
        std::transform(sum.data_ptr<T>(), sum.data_ptr<T>() + n, t.data_ptr<T>() + i * n, sum.data_ptr<T>(),
                       std::plus<T>());
    return sum;
}

template <typename T>
BackwardResult backward(const ProblemSize& p, const Inputs<T>& in, const Tensor& grad_o_in, const Tensor& x_in,
                        const optional<Tensor>& dh_kk_in, const optional<Tensor>& dh_kv_in, Stop stop) {
    const Tensor grad_o = prepare<T>(grad_o_in), x = prepare<T>(x_in);
    const auto dh_kk_final = prepare<T>(dh_kk_in), dh_kv_final = prepare<T>(dh_kv_in);
    const auto options = x.options();
    const Heads<T> x_heads(x), do_heads(grad_o);
    const Adjoint<T> adjoint = solve_adjoint(p, in, x_heads, do_heads, stop);

    const Tensor dh_kk = at::empty({p.N, p.HS, p.K, p.K}, options), dh_kv = at::empty({p.N, p.HS, p.K, p.V}, options);
    const Heads<T> w_heads(adjoint.w);
    const Scan<T> scan{p, in.layout, in.segments, in.g, in.beta, x_heads,
                       {{do_heads, T(1), data_or_null<T>(dh_kv_final), dh_kv.data_ptr<T>(), false},
                        {w_heads, T(-1), data_or_null<T>(dh_kk_final), dh_kk.data_ptr<T>(), true}},
                       true};
    const States<T> adjoints(p, in.segments.list.size(), options);
    scan.start_segments([&](int64_t segment, int64_t head) { return adjoints.at(segment, head); });

    const Tensor dk = at::empty({p.B, p.T, p.HS, p.K}, options), dv = at::empty({p.B, p.T, p.HS, p.V}, options);
    const Tensor dg = at::empty({p.B, p.T, p.HS}, options), dbeta = at::empty({p.B, p.T, p.HS}, options);
    for_segments_and_heads(p, in, [&] {
        return AttentionGradient<T>{p, in, adjoint.states, adjoints, scan, x_heads, do_heads, w_heads,
                                    Heads<double>(adjoint.products), Heads<T>(dk), Heads<T>(dv),
                                    Heads<T>(dg.unsqueeze(-2)), Heads<T>(dbeta.unsqueeze(-2))};
    });
    const Tensor dlamb = -sum_in_order<T>(adjoint.sums).view({p.HS, p.outputs_per_state(), p.K}).sum(1);
    return {sum_groups(adjoint.w, p.HQ).to(p.dtype), sum_groups(dk, p.HK).to(p.dtype), dv.to(p.dtype), dg, dbeta, dlamb,
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
}  // namespace mesa::cpu

TORCH_LIBRARY_IMPL(mesa_ext, CPU, m) {
    m.impl("chunk_forward", TORCH_FN(mesa::cpu::chunk_forward));
    m.impl("chunk_backward", TORCH_FN(mesa::cpu::chunk_backward));
    m.impl("decode_step", TORCH_FN(mesa::cpu::decode_step));
}
