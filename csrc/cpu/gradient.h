// The second half of the backward pass, from the last chunk to the first: the gradients of k, v and the gates.
#pragma once

#include "inputs.h"

namespace mesa::cpu {

// The gradient of gated linear attention with queries x, keys k, values u = [v | k] and output gradients
// y = [do | -w]: dk and dv per state head, dg and dbeta. S is the state before a chunk, D the adjoint of the state
// after it, which goes from chunk to chunk.
template <typename T>
struct AttentionGradient {
    const ProblemSize& p;
    const Inputs<T>& in;
    const States<T>& states;    // before every chunk
    const States<T>& adjoints;  // of the segments, on their way through the chunks
    Heads<T> x_heads, grad_o, w_heads;
    Heads<double> from_state;  // e^{gc_i} x_i' S y_i
    Heads<T> dk, dv, dg, dbeta;

    const Kernels<T>& kernel = kernels<T>();
    int64_t k_width = padded<T>(p.K), k_column = padded<T>(p.V), u_width = k_column + k_width;
    Block<T> block{p.K, p.V};
    Matrix<T> x{kChunk, p.K}, y{kChunk, u_width}, weighted{kChunk, p.K};
    Matrix<T> keys{kChunk, kChunk}, residuals{kChunk, kChunk};  // scores x_i.k_j and y_i.u_j
    // With D_j, the adjoint at token j, k_j gets D_j u_j as a key and the k part of D_j' k_j as a value. D_H is in
    // both: E = D_H + D_H' makes one product of the two.
    Matrix<T> E{p.K, p.K};
    Matrix<T> from_values_t{k_width, kChunk};  // D_G v_j, transposed
    Matrix<T> moved{kChunk, p.K};              // D_G v_j, and D_j u_j as far as it comes from the chunk
    Matrix<T> du{kChunk, u_width};             // D_G' k_j | E k_j, and D_j' k_j as far as it comes from the chunk
    T from_H[kChunk];                          // k_j' D_H k_j with the decay from D_j to D
    std::vector<int> rows = row_numbers(kChunk), state_rows = row_numbers(p.K);

    // What the decays carry, each term once: from token j to token i, from the state before the chunk to token i, from
    // token j to the state after the chunk, and from state to state.
    double inside[kChunk][kChunk] = {}, before[kChunk] = {}, after[kChunk] = {}, across = 0;

    void operator()(int64_t segment, int64_t number, int64_t head, bool goes_on) {
        const Chunk chunk = in.layout.chunks[number];
        const View<T> D = adjoints.at(segment, head);
        in.load(p, block, chunk, head, true);
        start_from_adjoint(states.at(number, head), D);
        for (int64_t n = 0; n < p.outputs_per_state(); ++n) {
            add_outputs(chunk, head * p.outputs_per_state() + n);
            if (goes_on) advance_adjoint(D, n == 0 ? block.gates.total : T(1));
        }
        store(chunk, head);
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
            from_H[j] = kernel.dot(k_width, key, du_k.row(j)) / 2;
            after[j] = static_cast<double>(gates.beta[j]) * (kernel.dot(k_width, key, moved.row(j)) + from_H[j]);
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
        for (int i = 0; i < chunk.count; ++i)
            kernel.scale(p.K, T(-1), w_heads.at(chunk.token + i, head), y.row(i) + k_column);

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
        for (int i = 0; i < chunk.count; ++i) before[i] += *from_state.at(chunk.token + i, head);
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
            dbeta.at(chunk.token + j, 0)[head] = kernel.dot(k_width, block.k().row(j), moved.row(j)) + from_H[j];
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

}  // namespace mesa::cpu
