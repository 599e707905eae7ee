// solve: x_t = (H_t + diag(lamb))^-1 rhs_t for the 64 tokens of a chunk, by preconditioned conjugate gradient (cg.h).
//
// With c the state before the chunk, P the directions of the 64 tokens and M_ij = decay(i, j) beta_j for j <= i:
//
//     A P = e^{gc} (P H_c) + ((P K') o M) K + P Lambda
//
// H lies in shared memory as hi + lo, K in one term (two if it came in float32). P is rounded once to fp16, with a
// power-of-two scale per row, and that same P enters A P, p.Ap and x += alpha p, so that rounding it costs no accuracy.
// A warp owns 16 rows. With mma.sync it shares nothing with the other warps but read-only memory and ends when its rows
// have ended; with wgmma the four warps of a block go through the steps together.
#include "../cg.h"
#include "chunk.cuh"

namespace mesa {
namespace {

// |p| is kept near 2^9: products with keys (|k| <= 2^4.5) stay below fp16's 2^16, small elements far above its 2^-24.
constexpr int kDirectionExponent = 9;

template <int KTiles, int KeyTerms>
struct Shared {
    __half keys[KTiles * KeyTerms * kPanel];  // row-scaled to a largest element in [1, 2)
    __half h[KTiles * KTiles * 2 * kPanel];   // [column tile][row tile][hi, lo]
    float4 x[KTiles * 8 * kThreads];          // each thread's own part, in accumulator layout
    ChunkGates gates;  // once the weights are made, beta is that of token j's scores over 2^lo, and lo is from_start
    float tile_weight[kChunk];  // the same beta, decayed to the last of the sixteen tokens that j belongs to
    // 112 KB + 1 KB at K = 128 in 16 bits: two blocks on a multiprocessor of 228 KB.
};

__device__ __forceinline__ float smallest_lamb(const LambPair* lamb, int pairs, int lane) {
    float m = lamb[lane].lamb[0];
    for (int i = lane; i < pairs; i += 32) m = fminf(m, fminf(lamb[i].lamb[0], lamb[i].lamb[1]));
#pragma unroll
    for (int d = 1; d < 32; d *= 2) m = fminf(m, __shfl_xor_sync(0xffffffffu, m, d));
    return m;
}

__device__ __forceinline__ LambPair lamb_at(const LambPair* lane_lamb, int tile, int n) {
    const float4 v = ptx::load_in_place(reinterpret_cast<const float4*>(lane_lamb + tile * (kChunk / 2) + n * 4));
    return {{v.x, v.y}, {v.z, v.w}};
}

// Power of two that brings a vector of squared Lambda norm `pp` to a norm of about 2^kDirectionExponent.
__device__ __forceinline__ float direction_scale(float pp, float inverse_smallest_lamb) {
    const int exponent = static_cast<int>((__float_as_uint(pp * inverse_smallest_lamb) >> 23) & 0xff) - 127;
    return pow2(min(max(kDirectionExponent - ((exponent + 1) >> 1), -126), 126));
}

// Two neighbouring elements of the stored direction. `zero` is a zero that the compiler cannot see through, another one
// for each phase of a step: it would otherwise unpack all of p once and keep it, and there are no registers for that.
__device__ __forceinline__ float2 direction_at(const Operand<1>& p, int n, int half, uint32_t zero) {
    return unpack(p.term[0].r[n / 2][n % 2 * 2 + half] ^ zero);
}

// A power of two in a float leaves its mantissa free, which takes the exponent of another one.
__device__ __forceinline__ float pair_of_powers(float first, float second) {
    return __uint_as_float(__float_as_uint(first) | __float_as_uint(second) >> 23);
}
__device__ __forceinline__ float first_power(float pair) { return __uint_as_float(__float_as_uint(pair) & 0x7f800000); }
__device__ __forceinline__ float second_power(float pair) { return __uint_as_float(__float_as_uint(pair) << 23); }

// Whether any row of those that go on together is active.
template <Isa isa>
__device__ __forceinline__ bool any_active(bool active) {
    if constexpr (isa == Isa::hopper) return __syncthreads_or(active);
    else return __any_sync(0xffffffffu, active);
}

template <Isa isa, int KTiles, int KeyTerms>
__global__ void __launch_bounds__(kThreads, KTiles == 1 ? 3 : 2) solve_kernel(const __grid_constant__ SolveArgs a) {
    if constexpr (isa == Isa::hopper && !ptx::kHasHopper) return;  // never launched
    MESA_DYNAMIC_SHARED(shared_bytes);
    auto& sm = *reinterpret_cast<Shared<KTiles, KeyTerms>*>(shared_bytes);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int64_t slot = blockIdx.x / a.heads;
    const int head = blockIdx.x % a.heads;
    const Chunk chunk = find_chunk(a.problem, slot);
    if (chunk.length == 0) return;

    // Loads: everything is asked for at once, the tokens first; H comes while they are worked on. The right-hand side
    // waits in x's place, the keys' row scales (they go into beta, the weight of score (i, j)) in that of the weights.
    const int value_tiles = (a.problem.V + kChunk - 1) / kChunk, column_tiles = value_tiles + KTiles;
    const int64_t place = state_tile(a.states, slot, head, column_tiles, value_tiles);
    const float* const h_scale = a.states.scales + place;
    float* const right_hand_side = reinterpret_cast<float*>(sm.x);
    fetch_staged_rows<KTiles>(right_hand_side, a.rhs, chunk, head);
    fetch_rows<KTiles, KeyTerms>(sm.keys, a.keys, chunk, head, 0);
    ptx::cp_async_commit();
    copy_panels_async<KTiles * KTiles * 2>(sm.h, a.states.panels + place * KTiles * 2 * kPanel);
    ptx::cp_async_commit();
    load_gates(sm.gates, a.gates, a.problem, chunk, head);
    ptx::cp_async_wait<1>();
    convert_rows<KTiles, KeyTerms>(sm.keys, sm.tile_weight, a.keys.dtype, 0);
    convert_staged_rows<KTiles>(right_hand_side, a.rhs.dtype);
    __syncthreads();
    const int token = threadIdx.x;  // of the first 64 threads
    if (token < kChunk) sm.gates.beta[token] *= sm.tile_weight[token] * sm.tile_weight[token];
    __syncthreads();

    // Per row: a power of two `mu` >= the row's largest weight, which keeps the scores in fp16.
    const int first_row = warp * 16;
    const int own_row = first_row + acc_row(lane, lane & 1);  // whose scalars this lane keeps
    float largest = 0.f;
    for (int j = lane & 2; j <= own_row; j += 4)
        largest = fmaxf(largest, fmaxf(sm.gates.decay(own_row, j) * sm.gates.beta[j],
                                       j < own_row ? sm.gates.decay(own_row, j + 1) * sm.gates.beta[j + 1] : 0.f));
    // Where the state before the chunk outweighs the chunk beyond float32, a larger mu keeps their ratio finite.
    for (int ct = 0; ct < KTiles; ++ct)
        largest = fmaxf(largest, sm.gates.decay_from_start(own_row) * h_scale[ct] * pow2(-80));
    const float mu = scale_to(fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 2)), -1).down;
    const float own_weight = pow2_inverse(mu) * ptx::exp2_approx(sm.gates.lo[own_row]);
    __syncthreads();
    if (token < kChunk) {
        const float weight = sm.gates.beta[token] * ptx::exp2_approx(-sm.gates.lo[token]);
        sm.gates.beta[token] = weight;
        sm.tile_weight[token] = weight * ptx::exp2_approx(sm.gates.hi[token | 15] - sm.gates.hi[token]);
        sm.gates.lo[token] = sm.gates.decay_from_start(token);
    }
    const float* const from_start = sm.gates.lo;

    const LambPair* const lamb = a.lamb + (head / a.states.group) * (KTiles * kChunk / 2);
    const float inverse_smallest_lamb = __frcp_rn(smallest_lamb(lamb, KTiles * kChunk / 2, lane));
    const LambPair* const lane_lamb = lamb + lane % 4;  // this lane's columns are at constant distances from here
    const float tol_squared = a.tolerance * a.tolerance;

    // r = rhs scaled by a power of two, x = 0, p = z = r / lamb.
    Acc r[KTiles];
    float rz[2] = {0.f, 0.f};
    float rhs_scale[2];  // a row's true value = scale * stored
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int t = first_row + acc_row(lane, half);
        float amax = 0.f;
#pragma unroll
        for (int kt = 0; kt < KTiles; ++kt)
#pragma unroll
            for (int n = 0; n < 8; ++n) {
                const float2 v = *reinterpret_cast<const float2*>(
                    right_hand_side + staged_offset<KTiles>(t, kt * kChunk + acc_col(lane, n)));
                r[kt].c[n][half * 2] = v.x, r[kt].c[n][half * 2 + 1] = v.y;
                amax = fmaxf(amax, fmaxf(fabsf(v.x), fabsf(v.y)));
            }
        const Pow2Scale s = scale_to(quad_max(amax), 0);
        rhs_scale[half] = s.down;
#pragma unroll
        for (int kt = 0; kt < KTiles; ++kt)
#pragma unroll
            for (int n = 0; n < 8; ++n) {
                const LambPair l = lamb_at(lane_lamb, kt, n);
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    float& v = r[kt].c[n][half * 2 + e];
                    v *= s.up;
                    rz[half] = fmaf(v * l.inverse[e], v, rz[half]);
                }
            }
    }
    const float own_scales = pair_of_powers(mu, lane & 1 ? rhs_scale[1] : rhs_scale[0]);
    CgRow<float> row(own_sum(rz, lane));
    float direction = direction_scale(row.pp, inverse_smallest_lamb);  // stored p = direction * p
    ptx::cp_async_wait<0>();
    publish_shared<isa>();
    __syncthreads();
    Operand<1> p[KTiles];
    const float first_direction[2] = {of_row(direction, 0, lane), of_row(direction, 1, lane)};
#pragma unroll
    for (int kt = 0; kt < KTiles; ++kt)
#pragma unroll
        for (int n = 0; n < 8; ++n) {
            const LambPair l = lamb_at(lane_lamb, kt, n);
#pragma unroll
            for (int half = 0; half < 2; ++half)
                p[kt].term[0].r[n / 2][n % 2 * 2 + half] =
                    pack(r[kt].c[n][half * 2] * l.inverse[0] * first_direction[half],
                         r[kt].c[n][half * 2 + 1] * l.inverse[1] * first_direction[half]);
            sm.x[(kt * 8 + n) * kThreads + threadIdx.x] = {0.f, 0.f, 0.f, 0.f};
        }

    const uint32_t zero_for_next = static_cast<uint32_t>(a.problem.V) >> 31;
    for (int step = 0; step < a.max_iterations && any_active<isa>(row.active); ++step) {
        const auto mu_of_row = [&](int half) { return first_power(of_row(own_scales, half, lane)); };
        Acc ap[KTiles];
        const auto multiply_by_state = [&] {
            constexpr int kNextColumns = KTiles * 2 * kPanel, kNextRows = 2 * kPanel;
            mma_AB<isa, 2, false>(ap, p[0], sm.h, kNextColumns, lane);
            if constexpr (KTiles == 2) mma_AB<isa, 2>(ap, p[1], sm.h + kNextRows, kNextColumns, lane);
        };
        const auto scale_by_decay = [&] {
#pragma unroll
            for (int ct = 0; ct < KTiles; ++ct)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const float factor =
                        from_start[first_row + acc_row(lane, half)] * (h_scale[ct] * pow2_inverse(mu_of_row(half)));
#pragma unroll
                    for (int n = 0; n < 8; ++n) ap[ct].c[n][half * 2] *= factor, ap[ct].c[n][half * 2 + 1] *= factor;
                }
        };
        // scores o M / mu, of the tokens from `first` on. The decays' small terms (2^lo) are in the weights. A decay from
        // an earlier warp's sixteen tokens is one to the last of them times one from there, both at most 1.
        const auto weigh_scores = [&](auto& scores, int first) {
            const float row_weight[2] = {of_row(own_weight, 0, lane), of_row(own_weight, 1, lane)};
            const int first_token = ptx::opaque(first_row);  // or their addresses would be kept from step to step
            const int i[2] = {first_token + acc_row(lane, 0), first_token + acc_row(lane, 1)};
            const float g[2] = {sm.gates.hi[i[0]], sm.gates.hi[i[1]]};
#pragma unroll
            for (int m = 0; m < int(sizeof(scores) / sizeof(scores[0]) / 2); ++m) {
                const int tokens = first + m * 16;
                float(&left)[4] = scores[m * 2];
                float(&right)[4] = scores[m * 2 + 1];
                if (tokens > first_row) {
#pragma unroll
                    for (int e = 0; e < 4; ++e) left[e] = right[e] = 0.f;
                    continue;
                }
                if (tokens < first_row) {
                    const float last = sm.gates.hi[tokens + 15];
                    const float factor[2] = {ptx::exp2_approx(g[0] - last) * row_weight[0],
                                             ptx::exp2_approx(g[1] - last) * row_weight[1]};
                    const float2 l = *reinterpret_cast<const float2*>(sm.tile_weight + tokens + acc_col(lane, 0)),
                                 r = *reinterpret_cast<const float2*>(sm.tile_weight + tokens + acc_col(lane, 1));
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        left[half * 2] *= factor[half] * l.x, left[half * 2 + 1] *= factor[half] * l.y;
                        right[half * 2] *= factor[half] * r.x, right[half * 2 + 1] *= factor[half] * r.y;
                    }
                    continue;
                }
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const int j = tokens + acc_col(lane, e / 2) + e % 2;
                    const float gj = sm.gates.hi[j], weight = sm.gates.beta[j];
                    float* const s = e / 2 ? right : left;
#pragma unroll
                    for (int half = 0; half < 2; ++half)
                        s[half * 2 + e % 2] *=
                            j <= i[half] ? ptx::exp2_approx(g[half] - gj) * weight * row_weight[half] : 0.f;
                }
            }
        };

        if constexpr (isa == Isa::hopper) {
            static_assert(KeyTerms == 1, "two-term keys leave no room for a second block on the multiprocessor");
            Acc scores;  // weighed while P H_c is under way
            products_begin<isa>(scores, ap[0], ap[KTiles - 1]);
            mma_ABt<isa, 1, false>(scores, p[0], sm.keys, lane);
            if constexpr (KTiles == 2) mma_ABt<isa, 1>(scores, p[1], sm.keys + kPanel, lane);
            products_commit<isa>();
            multiply_by_state();
            products_commit<isa>();
            products_wait<isa, 1>(scores);
            weigh_scores(scores.c, 0);
            Operand<1> weights;
            acc_operand(weights, scores);
            products_wait<isa, 0>(ap[0], ap[KTiles - 1]);
            scale_by_decay();
            products_begin<isa>(ap[0], ap[KTiles - 1]);
            mma_AB<isa, 1>(ap, weights, sm.keys, kPanel, lane);
            products_end<isa>(ap[0], ap[KTiles - 1]);
        } else {
            multiply_by_state();
            scale_by_decay();
            // (P K') o M, some tokens j at a time, to keep within the registers; this warp's rows see none past its
            // last.
            constexpr int kTokens = KTiles == 2 && KeyTerms == 1 ? 32 : 16;
            for (int first = 0; first <= first_row; first += kTokens) {
                float scores[kTokens / 8][4] = {};
#pragma unroll
                for (int kt = 0; kt < KTiles; ++kt)
#pragma unroll
                    for (int k = 0; k < 4; ++k) {
                        const __half* keys = sm.keys + kt * KeyTerms * kPanel + first * kChunk;
#pragma unroll
                        for (int t = 0; t < KeyTerms; ++t)
                            mma_ABt_step(scores, p[kt].term[0].r[k], keys + t * kPanel, k, lane);
                    }
                weigh_scores(scores, first);
#pragma unroll
                for (int k = 0; k < kTokens / 16; ++k) {
                    uint32_t hi[4], lo[4];
                    acc_step_operand<KeyTerms>(hi, lo, scores[k * 2], scores[k * 2 + 1]);
#pragma unroll
                    for (int ct = 0; ct < KTiles; ++ct) {
                        const __half* keys = sm.keys + ct * KeyTerms * kPanel + (first + k * 16) * kChunk;
                        mma_AB_step(ap[ct].c, hi, keys, 0, lane);
                        if constexpr (KeyTerms == 2) mma_AB_step(ap[ct].c, hi, keys + kPanel, 0, lane);
                        if constexpr (KeyTerms == 2) mma_AB_step(ap[ct].c, lo, keys, 0, lane);
                    }
                }
            }
        }

        // A p in true units (of the stored p), and p.Ap.
        float pAp[2] = {0.f, 0.f};
        const float row_mu[2] = {mu_of_row(0), mu_of_row(1)};
#pragma unroll
        for (int kt = 0; kt < KTiles; ++kt)
#pragma unroll
            for (int n = 0; n < 8; ++n) {
                const LambPair l = lamb_at(lane_lamb, kt, n);
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const float2 d = direction_at(p[kt], n, half, 0);
                    float& u = ap[kt].c[n][half * 2];
                    float& v = ap[kt].c[n][half * 2 + 1];
                    u = fmaf(l.lamb[0], d.x, row_mu[half] * u);
                    v = fmaf(l.lamb[1], d.y, row_mu[half] * v);
                    pAp[half] = fmaf(d.x, u, fmaf(d.y, v, pAp[half]));
                }
            }
        const float inverse_direction = pow2_inverse(direction);
        const float own_alpha =
            row.alpha(own_sum(pAp, lane) * inverse_direction * inverse_direction) * inverse_direction;
        const float alpha[2] = {of_row(own_alpha, 0, lane), of_row(own_alpha, 1, lane)};

        // r -= alpha Ap, r.z.
        rz[0] = rz[1] = 0.f;
#pragma unroll
        for (int kt = 0; kt < KTiles; ++kt)
#pragma unroll
            for (int n = 0; n < 8; ++n) {
                const LambPair l = lamb_at(lane_lamb, kt, n);
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    float& u = r[kt].c[n][half * 2];
                    float& v = r[kt].c[n][half * 2 + 1];
                    u = fmaf(-alpha[half], ap[kt].c[n][half * 2], u);
                    v = fmaf(-alpha[half], ap[kt].c[n][half * 2 + 1], v);
                    rz[half] = fmaf(u * l.inverse[0], u, fmaf(v * l.inverse[1], v, rz[half]));
                }
            }

        // x += alpha p and p = z + beta p, in its new scale; the direction of a row that has ended is zero.
        const float beta = row.advance(own_sum(rz, lane), tol_squared);
        direction = direction_scale(row.pp, inverse_smallest_lamb);
        const float own_add = row.active ? direction : 0.f, own_keep = beta * direction * inverse_direction;
        const float add[2] = {of_row(own_add, 0, lane), of_row(own_add, 1, lane)};
        const float keep[2] = {of_row(own_keep, 0, lane), of_row(own_keep, 1, lane)};
#pragma unroll
        for (int kt = 0; kt < KTiles; ++kt)
#pragma unroll
            for (int n = 0; n < 8; ++n) {
                const LambPair l = lamb_at(lane_lamb, kt, n);
                float4& x = sm.x[(kt * 8 + n) * kThreads + threadIdx.x];
                float* xs[2] = {&x.x, &x.z};
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const float2 d = direction_at(p[kt], n, half, zero_for_next);
                    xs[half][0] = fmaf(alpha[half], d.x, xs[half][0]);
                    xs[half][1] = fmaf(alpha[half], d.y, xs[half][1]);
                    p[kt].term[0].r[n / 2][n % 2 * 2 + half] =
                        pack(fmaf(r[kt].c[n][half * 2] * l.inverse[0], add[half], d.x * keep[half]),
                             fmaf(r[kt].c[n][half * 2 + 1] * l.inverse[1], add[half], d.y * keep[half]));
                }
            }
    }

    // Where the results go is found anew rather than kept.
    const unsigned block = blockIdx.x ^ zero_for_next;
    const int to_head = block % a.heads;
    const Chunk to_write = find_chunk(a.problem, block / a.heads);
    float* to[2];
    uint16_t* to_rounded[2];
    float scale[2];
    int columns[2];  // this lane's, from its first one on
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int t = first_row + acc_row(lane, half), col = acc_col(lane, 0);
        to[half] = static_cast<float*>(a.x.data) + row_offset(a.x, to_write, t, to_head) + col;
        to_rounded[half] = static_cast<uint16_t*>(a.rounded.data) + row_offset(a.rounded, to_write, t, to_head) + col;
        scale[half] = second_power(of_row(own_scales, half, lane));
        columns[half] = t < to_write.length ? padded_width(a.x) - col : 0;
        const int64_t out = (to_write.batch * a.problem.T + to_write.token + t) * a.heads + to_head;
        if (lane % 4 == half && t < to_write.length) {
            if (a.steps) a.steps[out] = row.steps;
            if (a.bound) a.bound[out] = sqrtf(row.bound_squared());
        }
    }
#pragma unroll 4
    for (int i = 0; i < KTiles * 8; ++i) {
        const float4 x = sm.x[i * kThreads + threadIdx.x];
        const float2 rows[2] = {{x.x * scale[0], x.y * scale[0]}, {x.z * scale[1], x.w * scale[1]}};
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            if (i * 8 >= columns[half]) continue;
            *reinterpret_cast<float2*>(to[half] + i * 8) = rows[half];
            if (a.rounded.data)
                *reinterpret_cast<uint32_t*>(to_rounded[half] + i * 8) =
                    pack(a.rounded.dtype, rows[half].x, rows[half].y);
        }
    }
}

template <Isa isa, int KTiles, int KeyTerms>
cudaError_t launch_solver(const SolveArgs& a, cudaStream_t stream) {
    return launch(solve_kernel<isa, KTiles, KeyTerms>, a, a.problem.slots() * a.heads, sizeof(Shared<KTiles, KeyTerms>),
                  stream);
}

}  // namespace

cudaError_t launch_solve(const SolveArgs& a, cudaStream_t stream) {
    const bool wide = tiles(a.problem.K) == 2;
    if (a.keys.dtype == DType::f32)
        return wide ? launch_solver<Isa::portable, 2, 2>(a, stream) : launch_solver<Isa::portable, 1, 2>(a, stream);
    if (a.problem.hopper)
        return wide ? launch_solver<Isa::hopper, 2, 1>(a, stream) : launch_solver<Isa::hopper, 1, 1>(a, stream);
    return wide ? launch_solver<Isa::portable, 2, 1>(a, stream) : launch_solver<Isa::portable, 1, 1>(a, stream);
}

}  // namespace mesa
