// Scratch matrices and the tokens of a chunk in them.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <new>
#include <numeric>
#include <optional>
#include <type_traits>
#include <vector>

#include "../checks.h"
#include "isa.h"

namespace mesa::cpu {

using at::Tensor;
using std::optional;

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
    kernels<T>().transpose(from.data, from.ld, rows, columns, to.data, to.ld);
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

    // The rows of one head from a token on, where they are: not on lines, without padding.
    View<T> rows(int64_t token, int64_t head) const { return {at(token, head), heads * width}; }

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
inline std::vector<int> row_numbers(int64_t count) {
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
        kernels<T>().decays(gates.decay, gates.beta, decay.ld, decay.data, mask.data);
    }
};

// after = total before + sum_t weighted_t values_t' over `count` tokens, [K, width]; both states may be the same.
template <typename T>
void advance_state(View<T> weighted, View<T> values, int count, T total, View<T> before, View<T> after, int64_t width,
                   const std::vector<int>& state_rows) {
    Product<T> product{{weighted.data, 1, weighted.ld, values.data, values.ld, count}, after.data, after.ld, width};
    product.add = before.data;
    product.ldadd = before.ld;
    product.add_scale = total;
    kernels<T>().multiply(product, state_rows.data(), state_rows.size());
}

// The same with the tokens [first, end) of a chunk, whose keys and values are given, weighted as at the last of them.
template <typename T>
void add_tokens(const Gates<T>& gates, int first, int end, View<T> keys, View<T> values, View<T> before, View<T> after,
                int64_t width, View<T> weighted, const std::vector<int>& state_rows) {
    double decay = 1;
    for (int j = end - 1; j >= first; --j) {
        const T weight = static_cast<T>(decay) * gates.beta[j];
        kernels<T>().scale(state_rows.size(), weight, keys.row(j - first), weighted.row(j - first));
        decay *= gates.decay[j];
    }
    advance_state<T>(weighted, values, end - first, static_cast<T>(decay), before, after, width, state_rows);
}

// Tokens of a part of a chunk. In every step of a solve a token meets all tokens before it in its part, while H before
// a part is made once; so chunks are solved in parts, and H goes from part to part, unless it is wide.
template <typename T>
int part_tokens(int64_t K) {
    static_assert(16 % kLine<T> == 0);
    return K <= 128 ? 16 : kChunk;
}

}  // namespace mesa::cpu
