// What the kernels' test works with: inputs on the device, and every result in plain float64.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <utility>
#include <vector>

#include "mesa.h"
#include "tests/arrays.h"

namespace {

using namespace mesa;
using Vec = std::vector<double>;

Array<float> floats(const Vec& v) { return Array<float>(std::vector<float>(v.begin(), v.end())); }

// Rows [B, T, heads, width] lie in memory padded to a multiple of 8 elements.
int padded(int width) { return (width + 7) / 8 * 8; }

Rows make_rows(void* data, int64_t T, int heads, int width, int64_t row, DType dtype) {
    return {data, T * heads * row, heads * row, static_cast<int>(row), dtype, width, 1};
}

// [B, T, heads, width] in some dtype; `values` become what the dtype can hold.
struct Matrix {
    Array<uint8_t> bytes;
    Rows rows;

    Matrix(Vec& values, DType dtype, int64_t T, int heads, int width)
        : bytes(encode(values, dtype, width)), rows(make_rows(bytes.data, T, heads, width, padded(width), dtype)) {}

    static std::vector<uint8_t> encode(Vec& values, DType dtype, int width) {
        const size_t size = dtype == DType::f32 ? 4 : 2;
        std::vector<uint8_t> out(values.size() / width * padded(width) * size);
        for (size_t i = 0; i < values.size(); ++i) {
            const float f = static_cast<float>(values[i]);
            const __half h = __float2half(f);
            const __nv_bfloat16 b = __float2bfloat16(f);
            values[i] = dtype == DType::f32 ? f : dtype == DType::f16 ? __half2float(h) : __bfloat162float(b);
            const void* from = dtype == DType::f32 ? static_cast<const void*>(&f)
                               : dtype == DType::f16 ? static_cast<const void*>(&h) : static_cast<const void*>(&b);
            std::memcpy(&out[(i / width * padded(width) + i % width) * size], from, size);
        }
        return out;
    }
};

// A float32 result [B, T, heads, width].
struct Output {
    Array<float> data;
    Rows rows;

    Output(int B, int64_t T, int heads, int width, int row)
        : data(B * T * heads * row), rows(make_rows(data.data, T, heads, width, row, DType::f32)) {}
    Output(int B, int64_t T, int heads, int width) : Output(B, T, heads, width, padded(width)) {}

    // Without the padding, whose every element must be zero.
    Vec doubles() const {
        const Vec all = data.doubles();
        Vec out;
        for (size_t i = 0; i < all.size(); ++i) {
            if (int64_t(i) % rows.head_stride < rows.width) out.push_back(all[i]);
            else if (all[i] != 0) out[0] = NAN;
        }
        return out;
    }
};

// ---- inputs --------------------------------------------------------------------------------------------------------

struct Inputs {
    int B, H, K, V;
    int64_t T;
    std::vector<int64_t> bounds;  // of packed sequences; empty: B sequences of T tokens
    DType dtype;
    int HS;                            // state heads, each shared by neighbouring ones of the H output heads
    Vec q, d_o;                        // of the output heads
    Vec k, v, g, beta, lamb;           // of the state heads
    Vec h_kk, h_kv, end_dkk, end_dkv;  // likewise: states at the start, gradients of those at the end

    int sequences() const { return bounds.empty() ? B : static_cast<int>(bounds.size()) - 1; }

    Inputs(int B, int64_t T, int H, int K, int V, DType dtype, std::vector<int64_t> bounds = {}, int group = 1,
           bool with_states = true)
        : B(B), H(H), K(K), V(V), T(T), bounds(std::move(bounds)), dtype(dtype), HS(H / group) {
        std::mt19937_64 random(7);
        std::normal_distribution<double> normal;
        std::uniform_real_distribution<double> uniform;
        const auto draw = [&](int64_t n, auto&& f) {
            Vec out(n);
            for (double& x : out) x = f();
            return out;
        };
        const int64_t tokens = int64_t(B) * T;
        const double unit = 1 / std::sqrt(K);
        q = draw(tokens * H * K, [&] { return normal(random) * unit; });
        k = draw(tokens * HS * K, [&] { return normal(random) * unit; });
        v = draw(tokens * HS * V, [&] { return normal(random); });
        d_o = draw(tokens * H * V, [&] { return normal(random); });
        g = draw(tokens * HS, [&] { return std::log(0.9 + 0.1 * uniform(random)); });
        beta = draw(tokens * HS, [&] { return uniform(random); });
        lamb = draw(int64_t(HS) * K, [&] { return 0.25 + uniform(random); });
        for (Vec* x : {&g, &beta, &lamb}) round_to_float(*x);
        if (!with_states) return;
        const int64_t states = int64_t(sequences()) * HS;
        h_kv = draw(states * K * V, [&] { return normal(random); });
        h_kk.resize(states * K * K);
        for (int64_t s = 0; s < states; ++s)
            for (int rank = 0; rank < 4; ++rank) {
                const Vec u = draw(K, [&] { return normal(random) * unit; });
                for (int i = 0; i < K; ++i)
                    for (int j = 0; j < K; ++j) h_kk[(s * K + i) * K + j] += u[i] * u[j];
            }
        end_dkv = draw(states * K * V, [&] { return normal(random) * unit; });
        end_dkk = draw(states * K * K, [&] { return normal(random) * unit; });
        for (Vec* x : {&h_kv, &h_kk, &end_dkv, &end_dkk}) round_to_float(*x);
    }

    static void round_to_float(Vec& v) {
        for (double& x : v) x = static_cast<float>(x);
    }
};

// ---- float64 reference: one token after the other, one Cholesky factorisation each ---------------------------------

Vec cholesky(const double* h, const double* lamb, int K) {
    Vec L(h, h + K * K);
    for (int i = 0; i < K; ++i) L[i * K + i] += lamb[i];
    for (int j = 0; j < K; ++j)
        for (int i = j; i < K; ++i) {
            double sum = L[i * K + j];
            for (int m = 0; m < j; ++m) sum -= L[i * K + m] * L[j * K + m];
            L[i * K + j] = i == j ? std::sqrt(sum) : sum / L[j * K + j];
        }
    return L;
}

void solve(const Vec& L, double* x, int K) {
    for (int i = 0; i < K; ++i) {
        for (int m = 0; m < i; ++m) x[i] -= L[i * K + m] * x[m];
        x[i] /= L[i * K + i];
    }
    for (int i = K - 1; i >= 0; --i) {
        for (int m = i + 1; m < K; ++m) x[i] -= L[m * K + i] * x[m];
        x[i] /= L[i * K + i];
    }
}

struct Results {
    Vec o, x, dq, dk, dv, dg, dbeta, dlamb, h_kk, h_kv, dh_kk, dh_kv;
};

// S = [G | H], row-major [K][V + K]. Gradients are of every output head, as the kernels give them.
Results reference(const Inputs& in) {
    const int K = in.K, V = in.V, W = V + K, H = in.H, group = H / in.HS;
    const size_t gates = in.q.size() / K, states = size_t(in.sequences()) * H;
    Results r;
    r.o.resize(in.d_o.size()), r.dv.resize(in.d_o.size());
    r.x.resize(in.q.size()), r.dq.resize(in.q.size()), r.dk.resize(in.q.size());
    r.dg.resize(gates), r.dbeta.resize(gates), r.dlamb.resize(size_t(H) * K);
    r.h_kk = in.h_kk, r.h_kv = in.h_kv, r.dh_kk.resize(states * K * K), r.dh_kv.resize(states * K * V);

    for (int n = 0; n < in.sequences(); ++n)
        for (int h = 0; h < H; ++h) {
            const int64_t first = in.bounds.empty() ? n * in.T : in.bounds[n];
            const int64_t length = in.bounds.empty() ? in.T : in.bounds[n + 1] - first;
            const int64_t state = int64_t(n) * in.HS + h / group;
            double* const kk = &r.h_kk[state * K * K];  // the same for every head of the group
            double* const kv = &r.h_kv[state * K * V];
            const double* const lamb = &in.lamb[h / group * K];
            const auto value = [&](int64_t at, int c) { return c < V ? in.v[at * V + c] : in.k[at * K + c - V]; };
            const auto joint = [&](const Vec& g, const Vec& h, int i, int c, bool transposed) {
                if (c < V) return g[(state * K + i) * V + c];
                return transposed ? h[(state * K + c - V) * K + i] : h[(state * K + i) * K + c - V];
            };

            std::vector<Vec> states{Vec(K * W)}, factors;
            for (int i = 0; i < K; ++i)
                for (int c = 0; c < W; ++c) states[0][i * W + c] = joint(in.h_kv, in.h_kk, i, c, false);
            for (int64_t t = 0; t < length; ++t) {
                const int64_t at = (first + t) * H + h, shared = (first + t) * in.HS + h / group;
                Vec S = states.back();
                for (int i = 0; i < K; ++i)
                    for (int c = 0; c < W; ++c)
                        S[i * W + c] = std::exp(in.g[shared]) * S[i * W + c] +
                                       in.beta[shared] * in.k[shared * K + i] * value(shared, c);
                for (int i = 0; i < K; ++i) {
                    std::copy_n(&S[i * W], V, &kv[i * V]);
                    std::copy_n(&S[i * W + V], K, &kk[i * K]);
                }
                factors.push_back(cholesky(kk, lamb, K));
                double* const x = &r.x[at * K];
                std::copy_n(&in.q[at * K], K, x);
                solve(factors.back(), x, K);
                for (int i = 0; i < K; ++i)
                    for (int c = 0; c < V; ++c) r.o[at * V + c] += S[i * W + c] * x[i];
                states.push_back(std::move(S));
            }

            // Adjoint of the state, from token t + 1 on. Gradients of H are given for -w x', the transpose of the joint
            // adjoint's -x w'; of a group, the first head takes those of the final state.
            Vec dS(K * W);
            for (int i = 0; i < K && h % group == 0; ++i)
                for (int c = 0; c < W; ++c) dS[i * W + c] = joint(in.end_dkv, in.end_dkk, i, c, true);
            for (int64_t t = length - 1; t >= 0; --t) {
                const int64_t at = (first + t) * H + h, shared = (first + t) * in.HS + h / group;
                const Vec &S = states[t + 1], &before = states[t];
                const double *x = &r.x[at * K], *d_o = &in.d_o[at * V], *k = &in.k[shared * K];
                const double beta = in.beta[shared], decay = std::exp(in.g[shared]);
                double* const w = &r.dq[at * K];
                for (int i = 0; i < K; ++i)
                    for (int c = 0; c < V; ++c) w[i] += S[i * W + c] * d_o[c];
                solve(factors[t], w, K);
                for (int i = 0; i < K; ++i) {
                    r.dlamb[h * K + i] -= w[i] * x[i];
                    for (int c = 0; c < W; ++c) {
                        double& d = dS[i * W + c];
                        d += x[i] * (c < V ? d_o[c] : -w[c - V]);
                        r.dk[at * K + i] += beta * d * value(shared, c);
                        (c < V ? r.dv[at * V + c] : r.dk[at * K + c - V]) += beta * d * k[i];
                        r.dbeta[at] += k[i] * d * value(shared, c);
                        r.dg[at] += decay * d * before[i * W + c];
                        d *= decay;
                    }
                }
            }
            for (int i = 0; i < K; ++i)
                for (int c = 0; c < W; ++c) {
                    const int64_t s = int64_t(n) * H + h;
                    (c < V ? r.dh_kv[(s * K + i) * V + c] : r.dh_kk[(s * K + c - V) * K + i]) = dS[i * W + c];
                }
        }
    return r;
}

}  // namespace
