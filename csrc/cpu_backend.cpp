// The operators on CPU, in float32 or float64 (16-bit inputs are computed in float32, results rounded at the end).
//
// Per sequence and head the state S = [G | H] is a linear-attention state with keys k and values u = [v | k], and its
// adjoint is one with keys x and values y = [do | -w]. The passes over all tokens are therefore few, each with a state
// at hand that goes from chunk to chunk: solve and read-out (forward.h); for the gradients dx and the solve
// (adjoint.h), then, with the adjoint and from the end, the rest (gradient.h).
#include <torch/library.h>

#include <vector>

#include "cpu/adjoint.h"
#include "cpu/forward.h"
#include "cpu/gradient.h"
#include "cpu/state_at.h"
#include "results.h"

namespace mesa::cpu {
namespace {

using Results = std::vector<Tensor>;

template <typename T>
Results forward(const ProblemSize& p, const Inputs<T>& in, const Tensor& q_in, Stop stop, bool solution,
                bool final_state, bool solver_info, const optional<Tensor>& state_at) {
    const Tensor q = prepare<T>(q_in);
    const auto options = q.options();
    const Tensor o = at::empty({p.B, p.T, p.HO, p.V}, options), x = at::empty({p.B, p.T, p.HO, p.K}, options);
    const Tensor steps = at::empty({p.B, p.T, p.HO}, options.dtype(at::kInt));
    const Tensor bound = at::empty({p.B, p.T, p.HO}, options);
    const Tensor h_kk = if_wanted(final_state, state_shape(p, state_at, p.K), options),
                 h_kv = if_wanted(final_state, state_shape(p, state_at, p.V), options);
    T *const kk = data_or_null<T>(h_kk), *const kv = data_or_null<T>(h_kv);
    if (state_at && final_state) make_states_at<T>(p, in, *state_at, kk, kv);
    const Scan<T> scan = in.scan(p, state_at ? nullptr : kk, state_at ? nullptr : kv);
    const States<T> states(p, in.segments.list.size(), options);  // of the segments, on their way through the chunks
    scan.run([&](int64_t segment, int64_t head) { return states.at(segment, head); }, [&] {
        return SolveAndReadOut<T>{p, in, states, Heads<T>(q), Heads<T>(o), Heads<T>(x), steps.data_ptr<int>(),
                                  bound.data_ptr<T>(), stop};
    });
    const auto if_asked = [](bool asked, const Tensor& made) { return asked ? made : Tensor(); };
    return wanted({o.to(p.dtype), if_asked(solution, x), if_wanted(solution, {0}, options), h_kk, h_kv,
                   if_asked(solver_info, steps), if_asked(solver_info, bound)});
}

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
Results backward(const ProblemSize& p, const Inputs<T>& in, const Tensor& grad_o_in, const Tensor& x_in,
                 const optional<Tensor>& dh_kk_in, const optional<Tensor>& dh_kv_in, Stop stop) {
    const Tensor grad_o = prepare<T>(grad_o_in), x = prepare<T>(x_in);
    const auto dh_kk_final = prepare<T>(dh_kk_in), dh_kv_final = prepare<T>(dh_kv_in);
    const auto options = x.options();
    const int64_t chunks = in.layout.chunks.size();
    const Heads<T> x_heads(x), do_heads(grad_o);

    const Tensor w = at::empty({p.B, p.T, p.HO, p.K}, options), xw = at::zeros({chunks, p.HO, p.K}, options);
    const Tensor from_state = at::empty({p.B, p.T, p.HO, 1}, options.dtype(at::kDouble));
    const Heads<T> w_heads(w);
    const States<T> states(p, chunks, options);  // before every chunk
    const auto first_chunk = [&](int64_t segment, int64_t head) {
        return states.at(in.segments.list[segment].begin, head);
    };
    in.scan(p, nullptr, nullptr).run(first_chunk, [&] {
        return SolveAdjoint<T>{p, in, states, x_heads, do_heads, w_heads, Heads<double>(from_state),
                               Heads<T>(xw), stop};
    });

    const Tensor dh_kk = if_wanted(in.h_kk.has_value(), {p.N, p.HS, p.K, p.K}, options),
                 dh_kv = if_wanted(in.h_kv.has_value(), {p.N, p.HS, p.K, p.V}, options);
    const Scan<T> scan{p, in.layout, in.segments, in.g, in.beta, x_heads,
                       {{do_heads, T(1), data_or_null<T>(dh_kv_final), data_or_null<T>(dh_kv), false},
                        {w_heads, T(-1), data_or_null<T>(dh_kk_final), data_or_null<T>(dh_kk), true}},
                       true};
    const Tensor dk = at::empty({p.B, p.T, p.HS, p.K}, options), dv = at::empty({p.B, p.T, p.HS, p.V}, options);
    const Tensor dg = at::empty({p.B, p.T, p.HS}, options), dbeta = at::empty({p.B, p.T, p.HS}, options);
    const States<T> adjoints(p, in.segments.list.size(), options);  // of the segments, on their way
    scan.run([&](int64_t segment, int64_t head) { return adjoints.at(segment, head); }, [&] {
        return AttentionGradient<T>{p, in, states, adjoints, x_heads, do_heads, w_heads, Heads<double>(from_state),
                                    Heads<T>(dk), Heads<T>(dv), Heads<T>(dg.unsqueeze(-2)),
                                    Heads<T>(dbeta.unsqueeze(-2))};
    });
    const Tensor dlamb = -sum_in_order<T>(xw).view({p.HS, p.outputs_per_state(), p.K}).sum(1);
    return wanted({sum_groups(w, p.HQ).to(p.dtype), sum_groups(dk, p.HK).to(p.dtype), dv.to(p.dtype), dg, dbeta, dlamb,
                   dh_kk, dh_kv});
}

// One token for every sequence: the states are read, updated, written and kept at hand for the solve.
template <typename T>
void decode(const ProblemSize& p, const Tensor& q_in, const Tensor& k_in, const Tensor& v_in, const Tensor& g_in,
              const Tensor& beta_in, const Tensor& lamb_in, const Tensor& h_kk, const Tensor& h_kv,
              const optional<Tensor>& state_indices, Stop stop, const Tensor& out) {
    const Tensor q = prepare<T>(q_in), k = prepare<T>(k_in), v = prepare<T>(v_in), g = prepare<T>(g_in),
                 beta = prepare<T>(beta_in);
    const Regulariser<T> lamb(prepare<T>(lamb_in));
    const Tensor o = out.is_contiguous() && p.dtype == p.compute ? out : at::empty({p.B, p.HO, p.V}, q.options());
    const Tensor indices = state_indices ? state_indices->contiguous() : Tensor();
    const Heads<T> q_heads(q), k_heads(k), v_heads(v), o_heads(o);
    const int64_t group = p.outputs_per_state();
    const bool packed = is_packed(h_kk);
    at::parallel_for(0, p.B * p.HS, 1, [&](int64_t begin, int64_t end) {
        Matrix<T> H(p.K, p.K), G(p.K, p.V);
        Solver<T> solver(group, p.K);
        ReadOut<T> read(group, p.K, p.V);
        const Systems<T> systems(H);
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
            const int64_t state = index * p.HS + head;
            for (int64_t i = 0; i < p.K; ++i)
                update(h_kv.data_ptr<T>() + (state * p.K + i) * p.V, p.V, decay, gate * key[i], value, G.row(i));
            for (int64_t i = 0; i < p.K && !packed; ++i)
                update(h_kk.data_ptr<T>() + (state * p.K + i) * p.K, p.K, decay, gate * key[i], key, H.row(i));
            T* tile = h_kk.data_ptr<T>() + state * packed_tiles(p.K) * kTile * kTile;
            for (int64_t i = 0; i < p.K && packed; i += kTile)
                for (int64_t j = i; j < p.K; j += kTile, tile += kTile * kTile) {
                    const int64_t rows = std::min<int64_t>(kTile, p.K - i), width = std::min<int64_t>(kTile, p.K - j);
                    const View<T> here = H.rows_from(i).columns_from(j);
                    for (int64_t r = 0; r < rows; ++r)
                        update(tile + r * kTile, width, decay, gate * key[i + r], key + j, here.row(r));
                    if (j > i) transpose(here, rows, width, H.rows_from(j).columns_from(i));
                }
            const auto query = [&](int i) { return q_heads.at(b, (head * group + i) / p.outputs_per_query()); };
            for (int64_t i = 0; i < group; ++i) std::copy_n(query(i), p.K, solver.b.row(i));
            solver.run(systems, lamb.lamb.row(head), lamb.inverse.row(head), group, stop);
            read.run(systems, G, lamb.lamb.row(head), lamb.inverse.row(head), stop, group, query, solver);
            for (int64_t i = 0; i < group; ++i) std::copy_n(read.o.row(i), p.V, o_heads.at(b, head * group + i));
        }
    });
    if (!o.is_same(out)) out.copy_(o);
}

// Calls f with a value of the compute dtype.
template <typename F>
auto with_compute_type(const ProblemSize& p, const F& f) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return p.compute == at::kDouble ? f(double()) : f(float());
}

Results chunk_forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& g, const Tensor& beta,
                      const Tensor& lamb, const optional<Tensor>& h_kk, const optional<Tensor>& h_kv,
                      const optional<Tensor>& cu_seqlens, int64_t max_cg_iterations, double cg_tol, bool solution,
                      bool final_state, bool solver_info, const optional<Tensor>& state_at,
                      bool /*keep_states: nothing is kept here*/) {
    const ProblemSize p = check_chunk_inputs(q, k, v, g, beta, lamb, h_kk, h_kv, cu_seqlens, max_cg_iterations, cg_tol);
    check_state_at(p, q, cu_seqlens, state_at);
    return with_compute_type(p, [&](auto zero) {
        using T = decltype(zero);
        const Inputs<T> in(p, k, v, g, beta, lamb, h_kk, h_kv, cu_seqlens);
        return forward<T>(p, in, q, {static_cast<int>(max_cg_iterations), cg_tol}, solution, final_state, solver_info,
                          state_at);
    });
}

Results chunk_backward(const Tensor& grad_o, const optional<Tensor>& dh_kk_final, const optional<Tensor>& dh_kv_final,
                       const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& g, const Tensor& beta,
                       const Tensor& lamb, const optional<Tensor>& h_kk, const optional<Tensor>& h_kv,
                       const optional<Tensor>& cu_seqlens, const Tensor& x, const Tensor& kept,
                       int64_t max_cg_iterations, double cg_tol) {
    const ProblemSize p = check_chunk_inputs(q, k, v, g, beta, lamb, h_kk, h_kv, cu_seqlens, max_cg_iterations, cg_tol);
    check_backward_inputs(p, q, grad_o, dh_kk_final, dh_kv_final, x, kept);
    return with_compute_type(p, [&](auto zero) {
        using T = decltype(zero);
        const Inputs<T> in(p, k, v, g, beta, lamb, h_kk, h_kv, cu_seqlens);
        return backward<T>(p, in, grad_o, x, dh_kk_final, dh_kv_final, {static_cast<int>(max_cg_iterations), cg_tol});
    });
}

void decode_step(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& g, const Tensor& beta,
                 const Tensor& lamb, const Tensor& h_kk, const Tensor& h_kv, const optional<Tensor>& state_indices,
                 int64_t max_cg_iterations, double cg_tol, const Tensor& out) {
    const ProblemSize p =
        check_decode_inputs(q, k, v, g, beta, lamb, h_kk, h_kv, state_indices, max_cg_iterations, cg_tol, out);
    with_compute_type(p, [&](auto zero) {
        using T = decltype(zero);
        decode<T>(p, q, k, v, g, beta, lamb, h_kk, h_kv, state_indices, {static_cast<int>(max_cg_iterations), cg_tol},
                  out);
    });
    mark_written({h_kk, h_kv, out});
}

}  // namespace
}  // namespace mesa::cpu

TORCH_LIBRARY_IMPL(mesa_ext, CPU, m) {
    m.impl("chunk_forward", TORCH_FN(mesa::cpu::chunk_forward));
    m.impl("chunk_backward", TORCH_FN(mesa::cpu::chunk_backward));
    m.impl("decode_step", TORCH_FN(mesa::cpu::decode_step));
}
