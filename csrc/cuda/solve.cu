// solve: x_t = (H_t + diag(lamb))^-1 rhs_t for the 64 tokens of a chunk, by preconditioned conjugate gradient (cg.h),
// and in the forward pass the read-out o_t = G_t' x_t; in the backward pass, where w is solved for, before it the
// right-hand side dx (dx.cuh) and after it x' H w for dg.
//
// With c the state before the chunk, P the directions of the 64 tokens and M_ij = decay(i, j) beta_j for j <= i:
//
//     A P = e^{gc} (P H_c) + ((P K') o M) K + P Lambda        O = e^{gc} (X G_c) + ((X K') o M) V
//
// H is symmetric: its tiles on and below the diagonal are enough. They lie in shared memory as hi + lo, K in one term
// (two if it came in float32). P is rounded once to fp16, with a power-of-two scale per row, and that same P enters
// A P, p.Ap and x += alpha p, so that rounding it costs no accuracy.
// The read-out, which happens once and is where precision would be lost last, takes X and the scores in two terms.
// A warp owns 16 rows. With mma.sync it shares nothing with the other warps but read-only memory and ends its steps
// when its rows have ended; with wgmma the four warps of a block go through the steps together.
#include <cfloat>

#include "../cg.h"
#include "dx.cuh"

namespace mesa {
namespace {

// |p| is kept near 2^9, with small elements far above fp16's 2^-24, and a key's largest element at 2^12, so that scores
// P K' stay below 2^26. Weighed, with weights of at most 2^-kScoreExponent, they fit fp16 again.
constexpr int kDirectionExponent = 9, kKeyExponent = 12, kScoreExponent = 11;

// A row is level where it counts in units of the state before the chunk as it has decayed so far. The weights of the
// tokens are the same for all such rows, beta_j e^{-gc_j}, without exponentials, and the state's part has weight 1.
// Where the weights up to a row are larger than 2^-kScoreExponent its p is made smaller, by at most 2^kMostLoss; beyond
// that, or where the decays up to it come to more than 2^-kStrongDecay, the row counts in units of its own.
constexpr int kMostLoss = 9;
constexpr float kStrongDecay = 100.f;

constexpr int kMaxVTiles = kMaxWidth / kChunk;

template <int KTiles, int KeyTerms, Solve kind>
struct Shared {
    static constexpr int kValues = kMaxVTiles * KeyTerms * kPanel;

    __half keys[KTiles * KeyTerms * kPanel];    // row-scaled to a largest element near 2^kKeyExponent
    __half h[kMaxVTiles * KTiles * 2 * kPanel];  // see copy_h_async; before or after the solve G as it lies in memory
    union {
        float4 x[KTiles * 8 * kThreads];  // each thread's own part, in accumulator layout
        __half values[(kind == Solve::adjoint ? 2 : 1) * kValues];  // and do behind them
    };
    ChunkGates gates;  // once the weights are made, beta is that of token j's scores over 2^lo, and lo is start_weight
    union {
        PowersOfTwo token_scales[kChunk];  // of do, k and v, while dx is made
        float key_scale[kChunk];
        float level_weight[kChunk];  // of token j, for level rows
    };
    // 112 KB + 1 KB at K = 128 in 16 bits: two blocks on a multiprocessor of 228 KB.
};

// Of a lane's part of lamb, all of them positive: their bits are in the same order.
template <int KTiles>
__device__ __forceinline__ uint32_t smallest_exponent(const float2 (&lamb)[KTiles]) {
    float m = INFINITY;
#pragma unroll
    for (int kt = 0; kt < KTiles; ++kt) m = fminf(m, fminf(lamb[kt].x, lamb[kt].y));
    return __reduce_min_sync(0xffffffffu, __float_as_uint(m)) >> 23;
}

// The largest of all tokens' numbers up to `row`, of which each lane has two neighbouring ones.
__device__ __forceinline__ float largest_up_to(int row, const float (&own)[2], int lane) {
    float total = fmaxf(own[0], own[1]);
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
        const float before = __shfl_up_sync(0xffffffffu, total, d);
        if (lane >= d) total = fmaxf(total, before);
    }
    const float before = __shfl_up_sync(0xffffffffu, total, 1);
    const float of_even = __shfl_sync(0xffffffffu, lane == 0 ? own[0] : fmaxf(before, own[0]), row / 2);
    const float of_odd = __shfl_sync(0xffffffffu, total, row / 2);
    return row % 2 ? of_odd : of_even;
}

__device__ __forceinline__ LambPair lamb_at(const LambPair* lane_lamb, int tile, int n) {
    const float4 v = ptx::load_in_place(reinterpret_cast<const float4*>(lane_lamb + tile * (kChunk / 2) + n * 4));
    return {{v.x, v.y}, {v.z, v.w}};
}

// Power of two that brings a vector of squared Lambda norm `pp`, whose squared norm is at most 2^-lamb_exponent times
// that, to a norm of about 2^kDirectionExponent.
__device__ __forceinline__ float direction_scale(float pp, int lamb_exponent) {
    const int exponent = static_cast<int>(__float_as_uint(pp) >> 23 & 0xff) - lamb_exponent;
    return pow2(min(max(kDirectionExponent - ((exponent + 1) >> 1), -126), 126));
}

// Two neighbouring elements of the stored direction. `zero` is a zero that the compiler cannot see through, another one
// for each phase of a step: it would otherwise unpack all of p once and keep it, and there are no registers for that.
__device__ __forceinline__ float2 direction_at(const Operand<1>& p, int n, int half, uint32_t zero) {
    return unpack(p.term[0].r[n / 2][n % 2 * 2 + half] ^ zero);
}

// Of a row: mu (see below), of its key, of its right-hand side.
struct RowScales : PowersOfTwo {  // the sign bit: whether the row is level
    __device__ __forceinline__ void set_level() { bits |= 0x80000000; }
    __device__ __forceinline__ bool level() const { return static_cast<int>(bits) < 0; }
    __device__ __forceinline__ float mu() const { return first(); }
    __device__ __forceinline__ float key() const { return second(); }
    __device__ __forceinline__ float rhs() const { return third(); }
};
__device__ __forceinline__ RowScales scales_of_row(RowScales own, int half, int lane) {
    return {{__shfl_sync(0xffffffffu, own.bits, (lane & ~1) | half)}};
}

// The inverses of a row's step lengths lie among the eigenvalues of (H + Lambda) / Lambda: they show a bad condition.
struct StepRange {
    float shortest = INFINITY, longest = 0.f;

    __device__ __forceinline__ void add(float step) {  // 0: none
        longest = fmaxf(longest, step);
        if (step > 0.f) shortest = fminf(shortest, step);
    }
    __device__ __forceinline__ bool hard() const { return longest > kHardCondition * shortest; }
};

// `count` column tiles of a state, of so many panels each, from the given one on.
template <int Panels>
__device__ __forceinline__ void copy_tiles_async(__half* to, const SplitStates& from, int64_t place, int count) {
    for (int tile = 0; tile < count; ++tile)
        copy_panels_async<Panels>(to + tile * Panels * kPanel, from.panels + (place + tile) * Panels * kPanel);
}

// Of H, symmetric, the tiles (0, 0), (1, 0) and (1, 1), all hi terms before all lo terms. `from` is where H begins.
template <int KTiles>
constexpr int kHTiles = KTiles * (KTiles + 1) / 2;

template <int KTiles, typename F>
__device__ __forceinline__ void for_h_tiles(const __half* from, const F& f) {
#pragma unroll
    for (int tile = 0; tile < kHTiles<KTiles>; ++tile) f(tile, from + (tile + tile / 2) * 2 * kPanel);
}

template <int KTiles>
__device__ __forceinline__ void copy_h_async(__half* to, const __half* from) {
    for_h_tiles<KTiles>(from, [to](int tile, const __half* hi) {
        copy_panels_async<1>(to + tile * kPanel, hi);
        copy_panels_async<1>(to + (kHTiles<KTiles> + tile) * kPanel, hi + kPanel);
    });
}

// What this thread has copied of the panels, times a power of two.
template <int Panels>
__device__ __forceinline__ void scale_own_part(__half* panels, float factor) {
    const __half2 by = __float2half2_rn(factor);
#pragma unroll 1
    for (int i = threadIdx.x; i < Panels * kPanel / 8; i += kThreads) {
        uint4& piece = reinterpret_cast<uint4*>(panels)[i];
        uint4 v = piece;
        for (uint32_t* word : {&v.x, &v.y, &v.z, &v.w}) {
            __half2& pair = reinterpret_cast<__half2&>(*word);
            pair = __hmul2(pair, by);
        }
        piece = v;
    }
}

// The two column tiles of H have scales of their own. Makes the larger one that of both, once this thread's part has
// come. (The smaller numbers lose no bits that count up to a factor of 2^12 between the two.)
template <int KTiles>
__device__ __forceinline__ void to_common_scale(__half* h, const float* scales) {
    if constexpr (KTiles == 2) {
        constexpr int kLo = kHTiles<2> * kPanel;
        const float inverse = pow2_inverse(fmaxf(scales[0], scales[1]));
        const float first = scales[0] * inverse, second = scales[1] * inverse;  // one of them is 1
        if (first < 1.f) {
            scale_own_part<2>(h, first);
            scale_own_part<2>(h + kLo, first);
        } else if (second < 1.f) {
            scale_own_part<1>(h + 2 * kPanel, second);
            scale_own_part<1>(h + 2 * kPanel + kLo, second);
        }
    }
}

// acc = P H.
template <Isa isa, int KTiles, int Terms>
__device__ __forceinline__ void multiply_by_h(Acc (&acc)[KTiles], const Operand<Terms> (&p)[KTiles], const __half* h,
                                              int lane) {
    constexpr int kLo = kHTiles<KTiles> * kPanel;
    mma_ABt<isa, 2, false>(acc, p[0], h, lane, kLo);
    if constexpr (KTiles == 2) mma_AB<isa, 2>(acc, p[1], h + kPanel, kPanel, lane, kLo);
}

// Whether any row of those that go on together is active.
template <Isa isa>
__device__ __forceinline__ bool any_active(bool active) {
    if constexpr (isa == Isa::hopper) return __syncthreads_or(active);
    else return __any_sync(0xffffffffu, active);
}

template <Isa isa, int KTiles, int KeyTerms, Solve kind>
__global__ void __launch_bounds__(kThreads, KTiles == 1 && KeyTerms == 1 ? 3 : 2)
    solve_kernel(const __grid_constant__ SolveArgs a) {
    if constexpr (isa == Isa::hopper && !ptx::kHasHopper) return;  // never launched
    MESA_DYNAMIC_SHARED(shared_bytes);
    using SharedMemory = Shared<KTiles, KeyTerms, kind>;
    auto& sm = *reinterpret_cast<SharedMemory*>(shared_bytes);
    __builtin_assume(threadIdx.x < kThreads);  // or the ends of loops over threads would need registers throughout
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int slot = blockIdx.x / a.heads.count;
    const int head = a.heads.first + blockIdx.x % a.heads.count;
    const Chunk chunk = find_chunk(a.problem, slot);
    if (chunk.length == 0) return;
    constexpr bool kFindsHard = kind == Solve::forward && KeyTerms == 2;
    if (kind == Solve::correction && a.hard_rows[int64_t(slot) * a.heads.all + head] == 0) return;

    // Loads: everything is asked for at once, the tokens first; the state comes while they are worked on. The right-
    // hand side waits in x's place, the keys' row scales (they go into beta, the weight of score (i, j)) in that of the
    // weights.
    const int value_tiles = (a.problem.V + kChunk - 1) / kChunk, column_tiles = value_tiles + KTiles;
    const int64_t place = state_tile(a.states, slot, head, column_tiles, value_tiles);
    const float* const h_scale = a.states.scales + place;
    const float largest_h_scale = fmaxf(h_scale[0], h_scale[KTiles - 1]);
    float* const float_rhs = reinterpret_cast<float*>(sm.x);
    __half* const half_rhs = sm.values;  // panels of f16 or bf16
    const GatePair gates = fetch_gates(a.gates, a.problem, chunk, head);
    constexpr int kLambPairs = KTiles * kChunk / 2;
    float2 lamb[KTiles];  // behind the rows' requests it would wait for all of them
#pragma unroll
    for (int kt = 0; kt < KTiles; ++kt) {
        const LambPair* const pair = a.lamb + (head / a.states.group) * kLambPairs + kt * (kChunk / 2) + lane;
        lamb[kt] = *reinterpret_cast<const float2*>(pair->lamb);
    }
    __half* const d_o = sm.values + SharedMemory::kValues;
    const auto with_value_tiles = [&](const auto& f) {  // wide heads always take both, which is less code
        if (KTiles == 1 && a.problem.V <= kChunk) f(std::integral_constant<int, 1>());
        else f(std::integral_constant<int, kMaxVTiles>());
    };
    if constexpr (kind == Solve::adjoint) {
        with_value_tiles([&](auto tiles) {
            fetch_rows<tiles.value, KeyTerms>(d_o, a.rhs, chunk, head, 0);
            fetch_rows<tiles.value, KeyTerms>(sm.values, a.values, chunk, head, 0);
        });
    } else if constexpr (KeyTerms == 2) {
        fetch_staged_rows<KTiles>(float_rhs, a.rhs, chunk, head);
    } else {
        fetch_rows<KTiles, 1>(half_rhs, a.rhs, chunk, head, 0);
    }
    fetch_rows<KTiles, KeyTerms>(sm.keys, a.keys, chunk, head, 0);
    ptx::cp_async_commit();
    if constexpr (kind == Solve::adjoint)
        copy_tiles_async<KTiles * 2>(sm.h, a.states, place - value_tiles, value_tiles);  // G
    else copy_h_async<KTiles>(sm.h, a.states.panels + place * KTiles * 2 * kPanel);
    ptx::cp_async_commit();
    int lamb_exponent = smallest_exponent(lamb);
    store_gates(sm.gates, gates);
    ptx::cp_async_wait<1>();
    Acc r[KTiles];
    if constexpr (kind == Solve::adjoint) {
        prefetch_rows(a.forward_x, chunk, head);
        for_h_tiles<KTiles>(a.states.panels + place * KTiles * 2 * kPanel,
                            [](int, const __half* tile) { prefetch_panels<2>(tile); });
        PowersOfTwo* const scales = sm.token_scales;
        // One after the other in a loop, which is less code. A token's scales come from the same thread.
        const auto convert = [&](auto tiles, int first, int end) {
#pragma unroll 1
            for (int r = first; r < end; ++r) {
                const auto put_scale = [&](int t, float scale) {
                    if (r == 0) scales[t].set_first(scale);
                    else if (r == 1) scales[t].add_third(scale);
                    else scales[t].add_second(scale);
                };
                convert_rows<decltype(tiles)::value, KeyTerms>(r == 0 ? d_o : r == 1 ? sm.values : sm.keys, put_scale,
                                                               a.keys.dtype, r == 0 ? 4 : r == 1 ? 0 : kKeyExponent);
            }
        };
        constexpr std::integral_constant<int, KTiles> key_tiles{};
        if (KTiles == kMaxVTiles || value_tiles == 1) {
            convert(key_tiles, 0, 3);
        } else {
            convert(std::integral_constant<int, kMaxVTiles>(), 0, 2);
            convert(key_tiles, 2, 3);
        }
        publish_shared<isa>();
        __syncthreads();
        const int first_row = warp * 16;
        float x_from_start[2];
        make_dx<isa, KTiles, KeyTerms>(r, x_from_start, {d_o, sm.values, sm.keys, sm.h, scales, value_tiles},
                                       h_scale - value_tiles, sm.gates, a.forward_x, chunk, head, first_row, lane);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int t = first_row + acc_row(lane, half);
            if (lane % 4 == 0 && t < chunk.length)
                a.from_start[token_index(a.problem, chunk, t, a.heads.all, head)] = x_from_start[half];
        }
        __syncthreads();  // G has been used
        const int64_t place_again =  // to be found anew rather than kept
            state_tile(a.states, ptx::opaque(blockIdx.x) / a.heads.count, head, column_tiles, value_tiles);
        copy_h_async<KTiles>(sm.h, a.states.panels + place_again * KTiles * 2 * kPanel);
        ptx::cp_async_commit();
        if (threadIdx.x < kChunk) sm.key_scale[threadIdx.x] = scales[threadIdx.x].second();
    } else {
        convert_rows<KTiles, KeyTerms>(sm.keys, sm.key_scale, a.keys.dtype, kKeyExponent);
        if constexpr (kind == Solve::forward) {  // what the read-out will want comes to the L2 cache during the steps
            for (int tile = 1; tile <= value_tiles; ++tile)
                prefetch_panels<KTiles * 2>(a.states.panels + (place - tile) * KTiles * 2 * kPanel);
            prefetch_rows(a.values, chunk, head);
        }
    }
    __syncthreads();

    // The scores' weights without decay. Every warp has all of them, two neighbouring tokens in each lane.
    const auto weight_of = [&](int t) { return sm.gates.beta[t] * (sm.key_scale[t] * sm.key_scale[t]); };
    const float weights[2] = {weight_of(lane * 2), weight_of(lane * 2 + 1)};
    const float log_weights[2] = {ptx::log2_approx(weights[0]) - sm.gates.hi[lane * 2],
                                  ptx::log2_approx(weights[1]) - sm.gates.hi[lane * 2 + 1]};
    const float log_unit = ptx::log2_approx(largest_h_scale);
    // Rows before the first token that is not as level rows want it are level. No row depends on a later token in this.
    const auto is_level = [&](int e) {
        return log_weights[e] - log_unit <= kMostLoss - kScoreExponent && sm.gates.hi[lane * 2 + e] > -kStrongDecay;
    };
    const int level_rows =
        __reduce_min_sync(0xffffffffu, !is_level(0) ? lane * 2 : !is_level(1) ? lane * 2 + 1 : kChunk);

    // Per row a power of two `mu`, which brings its largest weight to 2^-kScoreExponent at most; 1 if it is level.
    const int first_row = warp * 16;
    const int own_row = first_row + acc_row(lane, lane & 1);  // whose scalars this lane keeps
    const float largest = largest_up_to(own_row, log_weights, lane);
    float mu = 1.f;
    if (own_row >= level_rows) {
        // Where the state before the chunk outweighs the chunk beyond float32, a larger mu keeps their ratio finite.
        const float log_mu = sm.gates.hi[own_row] + fmaxf(largest + kScoreExponent, log_unit - 80.f);
        mu = pow2(static_cast<int>(floorf(fminf(fmaxf(log_mu, -126.f), 125.f))) + 1);
    } else {  // as if p were larger than it is
        lamb_exponent -= 2 * static_cast<int>(ceilf(fmaxf(largest - log_unit + kScoreExponent, 0.f)));
    }
    const float from_start = sm.gates.decay_from_start(own_row) * largest_h_scale;
    const float own_weight = pow2_inverse(mu) * ptx::exp2_approx(sm.gates.lo[own_row]);
    RowScales own_scales;  // a row's true values are its scale times what is stored
    own_scales.set_first(mu);
    own_scales.add_second(sm.key_scale[own_row]);
    if (own_row < level_rows) own_scales.set_level();
    const int token = threadIdx.x % kChunk;
    const float weight = weight_of(token) * ptx::exp2_approx(-sm.gates.lo[token]);
    __syncthreads();
    if (threadIdx.x < kChunk) {
        sm.gates.beta[token] = weight;
        sm.level_weight[token] = weight * ptx::exp2_approx(-sm.gates.hi[token]) * pow2_inverse(largest_h_scale);
    }
    if (lane % 4 < 2) sm.gates.lo[own_row] = pow2_inverse(mu) * from_start;
    const float* const start_weight = sm.gates.lo;

    // This lane's columns are at constant distances from here. Opaque: kept from step to step are bytes, no address.
    const unsigned lamb_bytes =
        ptx::opaque(((head / a.states.group) * kLambPairs + lane % 4) * unsigned(sizeof(LambPair)));
    const auto lamb_of_lane = [&] {
        return reinterpret_cast<const LambPair*>(reinterpret_cast<const char*>(a.lamb) + ptx::opaque(lamb_bytes));
    };
    const float tol_squared = a.tolerance * a.tolerance;

    // r = rhs scaled by a power of two, x = 0, p = z = r / lamb.
    float scale_up[2], rhs_scale[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int t = first_row + acc_row(lane, half);
        float amax = 0.f;
#pragma unroll
        for (int kt = 0; kt < KTiles; ++kt)
#pragma unroll
            for (int n = 0; n < 8; ++n) {
                float& u = r[kt].c[n][half * 2];
                float& v = r[kt].c[n][half * 2 + 1];
                if constexpr (kind != Solve::adjoint) {
                    const int col = acc_col(lane, n);
                    const float2 pair =
                        KeyTerms == 2
                            ? *reinterpret_cast<const float2*>(float_rhs + staged_offset<KTiles>(t, kt * kChunk + col))
                            : unpack(a.rhs.dtype, *reinterpret_cast<const uint32_t*>(half_rhs + kt * kPanel +
                                                                                     panel_offset(t, col)));
                    u = pair.x, v = pair.y;
                }
                amax = fmaxf(amax, fmaxf(fabsf(u), fabsf(v)));
            }
        const Pow2Scale s = scale_to(quad_max(amax), 0);
        scale_up[half] = s.up, rhs_scale[half] = s.down;
    }
    float rz[2] = {0.f, 0.f};
    Acc z[KTiles];
#pragma unroll
    for (int kt = 0; kt < KTiles; ++kt)
#pragma unroll
        for (int n = 0; n < 8; ++n) {
            const LambPair l = lamb_at(lamb_of_lane(), kt, n);
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                float& v = r[kt].c[n][e];
                v *= scale_up[e / 2];
                z[kt].c[n][e] = v * l.inverse[e % 2];
                rz[e / 2] = fmaf(z[kt].c[n][e], v, rz[e / 2]);
            }
        }
    own_scales.add_third(lane & 1 ? rhs_scale[1] : rhs_scale[0]);
    CgRow<float> row(own_sum(rz, lane));
    [[maybe_unused]] StepRange step_range;
    float direction = direction_scale(row.pp, lamb_exponent);  // stored p = direction * p
    ptx::cp_async_wait<0>();
    to_common_scale<KTiles>(sm.h, h_scale);
    publish_shared<isa>();
    __syncthreads();
    Operand<1> p[KTiles];
    const float first_direction[2] = {of_row(direction, 0, lane), of_row(direction, 1, lane)};
#pragma unroll
    for (int kt = 0; kt < KTiles; ++kt)
#pragma unroll
        for (int n = 0; n < 8; ++n) {
#pragma unroll
            for (int half = 0; half < 2; ++half)
                p[kt].term[0].r[n / 2][n % 2 * 2 + half] = pack(z[kt].c[n][half * 2] * first_direction[half],
                                                                z[kt].c[n][half * 2 + 1] * first_direction[half]);
            sm.x[(kt * 8 + n) * kThreads + threadIdx.x] = {0.f, 0.f, 0.f, 0.f};
        }

    // What the sum of a row in its units is to be multiplied by.
    const auto unit_of_row = [&](int half, int lane, int first_row) {
        const RowScales scales = scales_of_row(own_scales, half, lane);
        return scales.level() ? start_weight[first_row + acc_row(lane, half)] : scales.mu();
    };
    // scores o M in the rows' units, of the tokens from `first` on: the decays' small terms are in the weights.
    const auto weigh_scores = [&](auto all_level, auto& scores, int first, int lane, int first_row) {
        const int col = acc_col(lane, 0);
        const auto pair_at = [](const float* p) { return *reinterpret_cast<const float2*>(p); };
        [[maybe_unused]] const float row_weight[2] = {of_row(own_weight, 0, lane), of_row(own_weight, 1, lane)};
#pragma unroll
        for (int n = 0; n < int(sizeof(scores) / sizeof(scores[0])); ++n) {
            float(&s)[4] = scores[n];
            const int tokens = first + n / 2 * 16, j = first + n * 8 + col;
            if (tokens > first_row) {
#pragma unroll
                for (int e = 0; e < 4; ++e) s[e] = 0.f;
                continue;
            }
            const float2 level = pair_at(sm.level_weight + j);
            float w[4] = {level.x, level.y, level.x, level.y};
            if constexpr (!decltype(all_level)::value) {
                const float2 gj = pair_at(sm.gates.hi + j), own = pair_at(sm.gates.beta + j);
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int row = first_row + acc_row(lane, half);
                    const float g = sm.gates.hi[row];
                    if (row >= level_rows) {
                        w[half * 2] = ptx::exp2_approx(g - gj.x) * own.x * row_weight[half];
                        w[half * 2 + 1] = ptx::exp2_approx(g - gj.y) * own.y * row_weight[half];
                    }
                }
            }
#pragma unroll
            for (int e = 0; e < 4; ++e) s[e] *= w[e];
            if (tokens == first_row) {
#pragma unroll
                for (int e = 0; e < 4; ++e)  // no token sees a later one
                    if (acc_row(lane, e / 2) < col + n % 2 * 8 + e % 2) s[e] = 0.f;
            }
        }
    };

    const uint32_t zero_for_next = static_cast<uint32_t>(a.problem.V) >> 31;
    for (int step = 0; step < a.max_iterations && any_active<isa>(row.active()); ++step) {
        Acc ap[KTiles];
        constexpr int kEarlyLamb = KTiles == 2 ? 8 : 4;  // pairs asked for during the last product, with wgmma
        const LambPair* lane_lamb;
        LambPair early[kEarlyLamb] = {};
        const auto lamb_of_columns = [&](int kt, int n) {
            if constexpr (isa == Isa::hopper)
                if (kt == 0 && n < kEarlyLamb) return early[n];
            return lamb_at(lane_lamb, kt, n);
        };
        const auto weigh_state = [&] {
            float weight[2];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const bool level = scales_of_row(own_scales, half, lane).level();
                weight[half] = level ? 1.f : start_weight[first_row + acc_row(lane, half)];
            }
#pragma unroll
            for (int ct = 0; ct < KTiles; ++ct) scale_rows(ap[ct], weight[0], weight[1]);
        };
        if constexpr (isa == Isa::hopper) {
            static_assert(KeyTerms == 1, "two-term keys leave no room for a second block on the multiprocessor");
            lane_lamb = lamb_of_lane();
            const auto multiply = [&](auto all_level) {
                Acc scores;  // weighed while P H_c is under way
                products_begin<isa>(scores, ap[0], ap[KTiles - 1]);
                mma_ABt<isa, 1, false>(scores, p[0], sm.keys, lane);
                if constexpr (KTiles == 2) mma_ABt<isa, 1>(scores, p[1], sm.keys + kPanel, lane);
                products_commit<isa>();
                multiply_by_h<isa>(ap, p, sm.h, lane);
                products_commit<isa>();
                products_wait<isa, 1>(scores);
                weigh_scores(all_level, scores.c, 0, lane, first_row);
                Operand<1> weights;
                acc_operand(weights, scores);
                if constexpr (!decltype(all_level)::value) {
                    products_wait<isa, 0>(ap[0], ap[KTiles - 1]);
                    weigh_state();
                    products_begin<isa>(ap[0], ap[KTiles - 1]);
                }
                mma_AB<isa, 1>(ap, weights, sm.keys, kPanel, lane);
                products_commit<isa>();
#pragma unroll
                for (int n = 0; n < kEarlyLamb; ++n) early[n] = lamb_at(lane_lamb, 0, n);
                products_wait<isa, 0>(ap[0], ap[KTiles - 1]);
            };
            if (level_rows == kChunk) multiply(std::true_type());
            else multiply(std::false_type());
        } else {
            multiply_by_h<isa>(ap, p, sm.h, lane);
            if (first_row + 16 > level_rows) weigh_state();
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
                if (first_row + 16 <= level_rows) weigh_scores(std::true_type(), scores, first, lane, first_row);
                else weigh_scores(std::false_type(), scores, first, lane, first_row);
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
        const float unit[2] = {unit_of_row(0, lane, first_row), unit_of_row(1, lane, first_row)};
        if (isa != Isa::hopper) lane_lamb = lamb_of_lane();
        float pAp[2] = {0.f, 0.f};
#pragma unroll
        for (int kt = 0; kt < KTiles; ++kt)
#pragma unroll
            for (int n = 0; n < 8; ++n) {
                const LambPair l = lamb_of_columns(kt, n);
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const float2 d = direction_at(p[kt], n, half, 0);
                    float& u = ap[kt].c[n][half * 2];
                    float& v = ap[kt].c[n][half * 2 + 1];
                    u = fmaf(l.lamb[0], d.x, unit[half] * u);
                    v = fmaf(l.lamb[1], d.y, unit[half] * v);
                    pAp[half] = fmaf(d.x, u, fmaf(d.y, v, pAp[half]));
                }
            }
        const float inverse_direction = pow2_inverse(direction);
        const float own_alpha =
            row.alpha(own_sum(pAp, lane) * inverse_direction * inverse_direction) * inverse_direction;
        const float alpha[2] = {of_row(own_alpha, 0, lane), of_row(own_alpha, 1, lane)};
        if constexpr (kFindsHard) step_range.add(row.step);

        // r -= alpha Ap, z = r / lamb in the place of Ap, r.z.
        lane_lamb = lamb_of_lane();
        rz[0] = rz[1] = 0.f;
#pragma unroll
        for (int kt = 0; kt < KTiles; ++kt)
#pragma unroll
            for (int n = 0; n < 8; ++n) {
                const LambPair l = lamb_of_columns(kt, n);
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    float *const u = &r[kt].c[n][half * 2], *const z = &ap[kt].c[n][half * 2];
                    u[0] = fmaf(-alpha[half], z[0], u[0]), z[0] = u[0] * l.inverse[0];
                    u[1] = fmaf(-alpha[half], z[1], u[1]), z[1] = u[1] * l.inverse[1];
                    rz[half] = fmaf(z[0], u[0], fmaf(z[1], u[1], rz[half]));
                }
            }

        // x += alpha p and p = z + beta p, in its new scale; the direction of a row that has ended is zero. Rounding
        // beta and the sum to fp16 costs no steps with random keys in 16 bits, and up to one in 20 elsewhere.
        const float beta = row.advance(own_sum(rz, lane), tol_squared);
        direction = direction_scale(row.pp, lamb_exponent);
        const float own_add = row.active() ? direction : 0.f, own_keep = beta * direction * inverse_direction;
        const float add[2] = {of_row(own_add, 0, lane), of_row(own_add, 1, lane)};
        const __half2 keep[2] = {__float2half2_rn(of_row(own_keep, 0, lane)),
                                 __float2half2_rn(of_row(own_keep, 1, lane))};
#pragma unroll
        for (int kt = 0; kt < KTiles; ++kt)
#pragma unroll
            for (int n = 0; n < 8; ++n) {
                // Read and written whole: by halves the banks would conflict.
                float4& x = sm.x[(kt * 8 + n) * kThreads + threadIdx.x];
                float4 v = x;
                float2 d[2];
#pragma unroll
                for (int half = 0; half < 2; ++half) d[half] = direction_at(p[kt], n, half, zero_for_next);
                v.x = fmaf(alpha[0], d[0].x, v.x), v.y = fmaf(alpha[0], d[0].y, v.y);
                v.z = fmaf(alpha[1], d[1].x, v.z), v.w = fmaf(alpha[1], d[1].y, v.w);
                x = v;
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    uint32_t& stored = p[kt].term[0].r[n / 2][n % 2 * 2 + half];
                    const float* const z = &ap[kt].c[n][half * 2];
                    stored = fma_pairs(stored, keep[half], pack(z[0] * add[half], z[1] * add[half]));
                }
            }
    }

    // Where this thread is and where its results go is found anew rather than kept through the steps.
    const unsigned block = blockIdx.x ^ zero_for_next, thread = threadIdx.x ^ zero_for_next;
    const int end_lane = thread % 32, end_first_row = thread / 32 * 16;
    const int to_slot = block / a.heads.count;
    const int to_head = a.heads.first + block % a.heads.count;
    const Chunk to_write = find_chunk(a.problem, to_slot);
    Acc x[KTiles];
#pragma unroll
    for (int kt = 0; kt < KTiles; ++kt)
#pragma unroll
        for (int n = 0; n < 8; ++n) {
            const float4 v = sm.x[(kt * 8 + n) * kThreads + thread];
            x[kt].c[n][0] = v.x, x[kt].c[n][1] = v.y, x[kt].c[n][2] = v.z, x[kt].c[n][3] = v.w;
        }
    // V comes in the place of x and G in that of H, while x is stored and multiplied.
    const int out_tiles = (a.problem.V + kChunk - 1) / kChunk;
    const int64_t g_place = state_tile(a.states, to_slot, to_head, out_tiles + KTiles, 0);
    if constexpr (kind == Solve::forward) {
        __syncthreads();  // all steps have been taken, and x has been read
        with_value_tiles([&](auto tiles) {
            fetch_rows<tiles.value, KeyTerms>(sm.values, a.values, to_write, to_head, 0);
        });
        copy_tiles_async<KTiles * 2>(sm.h, a.states, g_place, out_tiles);
        ptx::cp_async_commit();
    }
    const float rhs_scale_of[2] = {scales_of_row(own_scales, 0, end_lane).rhs(),
                                   scales_of_row(own_scales, 1, end_lane).rhs()};
#pragma unroll
    for (int kt = 0; kt < KTiles; ++kt) {
        scale_rows(x[kt], rhs_scale_of[0], rhs_scale_of[1]);
        if (a.x.tile[kt].data) store_strip<true>(a.x.tile[kt], to_write, to_head, end_first_row, 0, x[kt], end_lane);
        if (kind == Solve::adjoint && a.rounded.data)
            store_strip<false>(a.rounded, to_write, to_head, end_first_row, kt * kChunk, x[kt], end_lane);
    }
    if (end_lane % 4 < 2) {
        const int t = end_first_row + acc_row(end_lane, end_lane & 1);
        const int64_t out = token_index(a.problem, to_write, t, a.heads.all, to_head);
        if (a.steps && t < to_write.length) a.steps[out] = row.steps();
        if (a.bound && t < to_write.length) a.bound[out] = sqrtf(row.bound_squared());
    }
    if constexpr (kFindsHard) {
        // Of those that have met the tolerance: the others would be no better for it. Lane l takes the warp's row l.
        const bool own_hard = step_range.hard() && row.bound_squared() <= a.tolerance * a.tolerance;
        const bool hard = __shfl_sync(0xffffffffu, own_hard, end_lane % 8 * 4 + end_lane / 8 % 2);
        const uint32_t rows = __ballot_sync(0xffffffffu, hard);
        HardRows* const to = a.hard_rows + int64_t(to_slot) * a.heads.all + to_head;
        if (end_lane == 0) reinterpret_cast<uint16_t*>(to)[thread / 32] = static_cast<uint16_t>(rows);
    }

    if constexpr (kind == Solve::adjoint) {
        // e^{gc} x' H w, the state's part alone.
        float x_scale[2];
        normalise_rows(x, x_scale, 4);
        Operand<2> queries[KTiles];
#pragma unroll
        for (int kt = 0; kt < KTiles; ++kt) acc_operand(queries[kt], x[kt]);
        Acc part[KTiles];
        products_begin<isa>(part[0], part[KTiles - 1]);
        multiply_by_h<isa>(part, queries, sm.h, end_lane);
        products_end<isa>(part[0], part[KTiles - 1]);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int t = end_first_row + acc_row(end_lane, half);
            float sum = 0.f;
#pragma unroll
            for (int ct = 0; ct < KTiles; ++ct) {
                const StripRow forward_x(a.forward_x, to_write, to_head, t, ct * kChunk, end_lane);
#pragma unroll
                for (int n = 0; n < 8; ++n) {
                    const float2 pair = forward_x.pair(n);
                    const float* const p = &part[ct].c[n][half * 2];
                    sum = fmaf(pair.x, p[0], fmaf(pair.y, p[1], sum));
                }
            }
            sum = quad_sum(sum) * (x_scale[half] * (start_weight[t] * scales_of_row(own_scales, half, end_lane).mu()));
            if (end_lane % 4 == 0 && t < to_write.length)
                a.from_start[token_index(a.problem, to_write, t, a.heads.all, to_head)] -= sum;
        }
    }

    if constexpr (kind == Solve::forward) {
        const int end_own_row = end_first_row + acc_row(end_lane, end_lane & 1);
        if (end_lane % 4 < 2) {  // the values' scales are to take the place of the keys' in the weights
            const float inverse = pow2_inverse(own_scales.key());
            sm.gates.beta[end_own_row] *= inverse;
            sm.level_weight[end_own_row] *= inverse;
        }

        float x_scale[2];
        normalise_rows(x, x_scale, 4);
        Operand<2> queries[KTiles];
#pragma unroll
        for (int kt = 0; kt < KTiles; ++kt) acc_operand(queries[kt], x[kt]);
        Acc scores;
        products_begin<isa>(scores);
        mma_ABt<isa, KeyTerms, false>(scores, queries[0], sm.keys, end_lane);
        if constexpr (KTiles == 2) mma_ABt<isa, KeyTerms>(scores, queries[1], sm.keys + KeyTerms * kPanel, end_lane);
        products_end<isa>(scores);

        ptx::cp_async_wait<0>();
        publish_shared<isa>();
        __syncthreads();  // and the weights are without the keys' scales
        // With wgmma the state's part of wide heads is made for both column tiles (of the second, where there is none,
        // for nothing) while V is converted and the scores are weighed.
        constexpr int kTogether = isa == Isa::hopper ? KTiles : 1, kStateTile = KTiles * 2 * kPanel;
        constexpr bool kEarly = kTogether == kMaxVTiles;
        Acc out[kTogether];
        const auto read_state = [&](int first) {
            const __half* const g = sm.h + first * kStateTile;
            products_begin<isa>(out[0], out[kTogether - 1]);
            mma_AB<isa, 2, false>(out, queries[0], g, kStateTile, end_lane);
            if constexpr (KTiles == 2) mma_AB<isa, 2>(out, queries[1], g + 2 * kPanel, kStateTile, end_lane);
            products_commit<isa>();
        };
        if constexpr (kEarly) read_state(0);

        const auto put_scale = [&](int t, float scale) { sm.gates.beta[t] *= scale, sm.level_weight[t] *= scale; };
        with_value_tiles([&](auto tiles) {
            convert_rows<tiles.value, KeyTerms>(sm.values, put_scale, a.values.dtype, 0);
        });
        publish_shared<isa>();
        __syncthreads();
        if (level_rows == kChunk) weigh_scores(std::true_type(), scores.c, 0, end_lane, end_first_row);
        else weigh_scores(std::false_type(), scores.c, 0, end_lane, end_first_row);
        const float* const g_scale = a.states.scales + g_place;
        const float end_largest_h_scale = fmaxf(g_scale[out_tiles], g_scale[out_tiles + KTiles - 1]);
        const float largest_g_scale = fmaxf(g_scale[0], g_scale[out_tiles - 1]);
        float score_scale[2], start_scale[2], unit[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            unit[half] = fminf(x_scale[half] * unit_of_row(half, end_lane, end_first_row), FLT_MAX);
            start_scale[half] = x_scale[half] * (start_weight[end_first_row + acc_row(end_lane, half)] *
                                                 scales_of_row(own_scales, half, end_lane).mu() *
                                                 pow2_inverse(end_largest_h_scale));
        }
        scale_rows(scores, unit[0], unit[1]);
        // Where the state outweighs the chunk beyond float32, this keeps their ratio finite.
        const float at_least = largest_g_scale * pow2(-60);
        normalise_rows(scores, score_scale, 8, {start_scale[0] * at_least, start_scale[1] * at_least});
        Operand<2> weights;
        acc_operand(weights, scores);

#pragma unroll 1
        for (int first = 0; first < (kEarly ? 1 : out_tiles); first += kTogether) {
            // The state's part in units of the scores', then these are added: one accumulator, to save registers.
            if constexpr (!kEarly) read_state(first);
            products_wait<isa, 0>(out[0], out[kTogether - 1]);
#pragma unroll
            for (int u = 0; u < kTogether; ++u) {
                const float scale = g_scale[min(first + u, out_tiles - 1)];
                scale_rows(out[u], start_scale[0] * scale * pow2_inverse(score_scale[0]),
                           start_scale[1] * scale * pow2_inverse(score_scale[1]));
            }
            products_begin<isa>(out[0], out[kTogether - 1]);
            mma_AB<isa, KeyTerms>(out, weights, sm.values + first * KeyTerms * kPanel, KeyTerms * kPanel, end_lane);
            products_end<isa>(out[0], out[kTogether - 1]);
#pragma unroll
            for (int u = 0; u < kTogether; ++u) {
                if (first + u == out_tiles) break;
                scale_rows(out[u], score_scale[0], score_scale[1]);
                store_strip(a.out, to_write, to_head, end_first_row, (first + u) * kChunk, out[u], end_lane);
            }
        }
    }
}

template <Isa isa, int KTiles, int KeyTerms, Solve kind>
cudaError_t launch_solver(const SolveArgs& a, cudaStream_t stream) {
    return launch(solve_kernel<isa, KTiles, KeyTerms, kind>, a, a.problem.slots() * a.heads.count.value(),
                  sizeof(Shared<KTiles, KeyTerms, kind>), stream);
}

template <Isa isa, int KTiles, int KeyTerms>
cudaError_t launch_solver(const SolveArgs& a, cudaStream_t stream) {
    if (a.kind == Solve::forward) return launch_solver<isa, KTiles, KeyTerms, Solve::forward>(a, stream);
    if (a.kind == Solve::adjoint) return launch_solver<isa, KTiles, KeyTerms, Solve::adjoint>(a, stream);
    if constexpr (KeyTerms == 2) return launch_solver<isa, KTiles, KeyTerms, Solve::correction>(a, stream);
    return cudaErrorInvalidValue;
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
