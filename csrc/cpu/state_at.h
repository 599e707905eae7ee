// The states after given numbers of tokens.
#pragma once

#include "inputs.h"

namespace mesa::cpu {

// Each state is a task of its own that walks from the beginning of its sequence, whatever others are wanted of it.
template <typename T>
void make_states_at(const ProblemSize& p, const Inputs<T>& in, const Tensor& state_at, T* kk, T* kv) {
    const Tensor counts = state_at.contiguous();
    const int64_t of_each = p.N ? counts.numel() / p.N : 0;
    const int64_t k_column = padded<T>(p.V), width = k_column + padded<T>(p.K);
    for_each_task(counts.numel() * p.HS, [&] {
        return [&, state = Matrix<T>(p.K, width), values = Matrix<T>(kChunk, width),
                weighted = Matrix<T>(kChunk, p.K), rows = row_numbers(p.K), gates = Gates<T>()](int64_t task) mutable {
            const int64_t number = task / p.HS, head = task % p.HS, n = number / of_each;
            const auto row_of = [&](auto* states, int64_t which, int64_t i, int64_t columns) {
                return states + ((which * p.HS + head) * p.K + i) * columns;
            };
            const T *const start_kk = data_or_null<T>(in.h_kk), *const start_kv = data_or_null<T>(in.h_kv);
            for (int64_t i = 0; i < p.K; ++i) {
                std::fill_n(state.row(i), width, T(0));
                if (!start_kk) continue;
                std::copy_n(row_of(start_kv, n, i, p.V), p.V, state.row(i));
                std::copy_n(row_of(start_kk, n, i, p.K), p.K, state.row(i) + k_column);
            }
            int64_t left = counts.const_data_ptr<int64_t>()[number];
            for (int64_t c = in.layout.first[n]; left > 0; ++c) {
                Chunk chunk = in.layout.chunks[c];
                chunk.count = static_cast<int>(std::min<int64_t>(chunk.count, left));
                left -= chunk.count;
                gates.load(in.g, in.beta, chunk, head);
                in.v.load(chunk.token, chunk.count, head, values);
                in.k.load(chunk.token, chunk.count, in.k.of_state(p, head), values.columns_from(k_column));
                add_tokens<T>(gates, 0, chunk.count, values.columns_from(k_column), values, state, state, width,
                              weighted, rows);
            }
            for (int64_t i = 0; i < p.K; ++i) {
                std::copy_n(state.row(i), p.V, row_of(kv, number, i, p.V));
                std::copy_n(state.row(i) + k_column, p.K, row_of(kk, number, i, p.K));
            }
        };
    });
}

}  // namespace mesa::cpu
