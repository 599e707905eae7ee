// The first half of the backward pass, from the first chunk to the last: w = (H + Lambda)^{-1} G do.
#pragma once

#include "inputs.h"

namespace mesa::cpu {

template <typename T>
struct SolveAdjoint {
    const ProblemSize& p;
    const Inputs<T>& in;
    const States<T>& states;  // before every chunk: read and written
    Heads<T> x, grad_o;
    Heads<T> w;
    Heads<double> from_state;  // out: e^{gc_t} x_t' S y_t with y_t = [do_t | -w_t] and the state S before the chunk
    Heads<T> xw;               // out: sum of x o w over the chunk, at zero before
    Stop stop;

    const Kernels<T>& kernel = kernels<T>();
    int64_t k_width = padded<T>(p.K);
    Block<T> block{p.K, p.V};
    Matrix<T> gt{p.V, p.K}, x_rows{kChunk, p.K};
    Matrix<T> G_do{kChunk, p.K}, x_H{kChunk, p.K};  // e^{gc} G do and e^{gc} x' H
    Solver<T> solver{kChunk, p.K};
    HardRows<T> hard{p.K, p.V};
    Systems<T> systems{p.K};
    std::vector<int> rows = row_numbers(kChunk);

    void operator()(int64_t, int64_t number, int64_t head, bool goes_on) {
        const Chunk chunk = in.layout.chunks[number];
        const View<T> G = states.at(number, head);
        in.load(p, block, chunk, head, true);
        systems.load(block, G.columns_from(block.k_column));
        transpose<T>(G, p.K, p.V, gt);
        for (int64_t n = 0; n < p.outputs_per_state(); ++n)
            solve(chunk, number, head, head * p.outputs_per_state() + n, G);
        if (goes_on) systems.advance(G, states.at(number + 1, head));
    }

    void solve(Chunk chunk, int64_t number, int64_t head, int64_t out, View<T> G) {
        const View<T> H = G.columns_from(block.k_column);
        const T *const lamb = in.lamb.lamb.row(head), *const inverse_lamb = in.lamb.inverse.row(head);
        const View<T> do_rows = grad_o.rows(chunk.token, out);
        multiply_state(do_rows, p.V, gt, G_do);
        add_tokens_to_dx(do_rows);
        solver.run(systems, lamb, inverse_lamb, chunk.count, stop);
        const bool any_hard = hard.find(solver, chunk.count, stop);
        if (any_hard) hard.correct_adjoint(systems, G, lamb, inverse_lamb, do_rows, chunk.count, stop, solver);
        w.store(chunk.token, chunk.count, out, solver.x);

        x.load(chunk.token, chunk.count, out, x_rows);
        multiply_state(x_rows, p.K, H, x_H);
        for (int i = 0; i < chunk.count; ++i) {
            const T *const x_row = x_rows.row(i), *const w_row = solver.x.row(i);
            kernel.add_products(p.K, x_row, w_row, xw.at(number, out));
            *from_state.at(chunk.token + i, out) =
                kernel.dot(k_width, x_row, G_do.row(i)) - kernel.dot(k_width, x_H.row(i), w_row);
        }
        if (any_hard)
            hard.products(x_rows, do_rows, solver.x, chunk.count, block.gates.in,
                          [&](int i) { return from_state.at(chunk.token + i, out); });
    }

    // e^{gc} (A S), with a state of K columns.
    void multiply_state(View<T> a, int64_t width, View<T> state, View<T> to) {
        Product<T> product{{a.data, a.ld, 1, state.data, state.ld, width}, to.data, to.ld, k_width};
        product.row_scale = block.gates.in;
        kernel.multiply(product, rows.data(), block.count);
    }

    // dx = e^{gc} G do + ((do v') o M) k, the right-hand side.
    void add_tokens_to_dx(View<T> do_rows) {
        const View<T> scores = solver.scores, k = block.k();
        score<T>(&block, do_rows, p.V, block.vt(), scores, rows.data(), block.count);
        Product<T> dx{{scores.data, scores.ld, 1, k.data, k.ld, block.count, Part::lower}, solver.b.data, solver.b.ld,
                      k_width};
        dx.add = G_do.data;
        dx.ldadd = G_do.ld;
        kernel.multiply(dx, rows.data(), block.count);
    }
};

}  // namespace mesa::cpu
