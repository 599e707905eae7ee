// The forward pass: solve and read-out, chunk by chunk.
#pragma once

#include "inputs.h"

namespace mesa::cpu {

template <typename T>
struct SolveAndReadOut {
    const ProblemSize& p;
    const Inputs<T>& in;
    const States<T>& states;  // of the segments, on their way through the chunks
    Heads<T> q, o, x;
    int* steps;
    T* bound;
    Stop stop;

    Block<T> block{p.K, p.V};
    Solver<T> solver{kChunk, p.K};
    ReadOut<T> read{kChunk, p.K, p.V};
    Systems<T> systems{p.K};

    void operator()(int64_t segment, int64_t number, int64_t head, bool goes_on) {
        const Chunk chunk = in.layout.chunks[number];
        const View<T> G = states.at(segment, head), H = G.columns_from(block.k_column);
        const T *const lamb = in.lamb.lamb.row(head), *const inverse_lamb = in.lamb.inverse.row(head);
        in.load(p, block, chunk, head, false);
        systems.load(block, H);
        for (int64_t out = head * p.outputs_per_state(); out < (head + 1) * p.outputs_per_state(); ++out) {
            const int64_t query = out / p.outputs_per_query();
            q.load(chunk.token, chunk.count, query, solver.b);
            solver.run(systems, lamb, inverse_lamb, chunk.count, stop);
            read.run(systems, G, lamb, inverse_lamb, stop, chunk.count,
                     [&](int i) { return q.at(chunk.token + i, query); }, solver);
            x.store(chunk.token, chunk.count, out, solver.x);
            o.store(chunk.token, chunk.count, out, read.o);
            for (int i = 0; i < chunk.count; ++i) {
                const int64_t at = (chunk.token + i) * p.HO + out;
                steps[at] = solver.rows[i].steps();
                bound[at] = std::sqrt(solver.rows[i].bound_squared());
            }
        }
        if (goes_on) systems.advance(G, G);
    }
};

}  // namespace mesa::cpu
