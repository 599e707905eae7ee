// grad: gradients of the linear attention with queries x, keys k, values v' = [v | k], output gradients
// do' = [do | -w].
//
// With S the state before the chunk, dS the adjoint after it, rho_ij = decay(i, j) for j <= i and C the last token:
//
//     u_j   = rho_Cj dS v'_j + sum_i rho_ij (do'_i . v'_j) x_i        dk_j = beta_j u_j + (k part of dv'_j)
//     dv'_j = beta_j (rho_Cj dS' k_j + sum_i rho_ij (x_i . k_j) do'_i)      dbeta_j = k_j . u_j
//     dg_t  = e^{gc_C} <dS, S> + sum_{i >= t} e^{gc_i} x_i' S do'_i + sum_{j < t} beta_j rho_Cj k_j' dS v'_j
//           + sum_{i >= t > j} beta_j rho_ij (x_i . k_j) (do'_i . v'_j)
//
// The scores do'.v' = do.v - w.k are residuals: both terms meet in one fp32 sum, before anything is rounded. dg is a
// sum of what crosses token t and not a difference of running totals, which would lose small gradients in large ones.
// What of it needs S comes from elsewhere: <dS, S> from the kernel that makes dS (state.cu), and the second sum's
// addends from dx (x' G do) and the backward solve (x' H w), which have the state at hand.
//
// With 16-bit inputs <dS, S> is there for every eighth chunk only. The others' e^{gc_C} <dS, S> follow, each from that
// of the chunk behind: of what crosses the boundary between the two, all but what ends in the later one passes over
// that one, and all but what begins in the earlier one over this one. A kernel of its own adds these to dg,
// and sums dlamb.
//
// Rows are keys: a warp owns 16 tokens j. Column tiles of 64 of [k | v] are taken one after the other, each of them
// with its part of dS.
#include "chunk.cuh"

namespace mesa {
namespace {

// With wgmma three blocks of narrow heads have room on a multiprocessor of 228 KB, since some of qk's 8-column tiles lie
// in shared memory instead of in registers: each thread's own part, in accumulator layout.
template <Isa isa, int KTiles, int Terms>
constexpr int kParkedTiles = isa == Isa::hopper && KTiles == 1 && Terms == 1 ? 3 : 0;

template <int Tiles>
struct Parked {
    float4 parked[Tiles * kThreads];

    __device__ __forceinline__ float4& own(int n) { return parked[n * kThreads + threadIdx.x]; }
};
template <>
struct Parked<0> {};

template <Isa isa, int KTiles, int Terms>
struct Shared : Parked<kParkedTiles<isa, KTiles, Terms>> {
    __half x[KTiles * 2 * kPanel];
    __half k[KTiles * Terms * kPanel];
    __half d_o[2 * kPanel];             // the current column tile of w or do
    __half v[Terms * kPanel];           // the current column tile of v
    __half state[KTiles * 2 * kPanel];  // the current column tile of dS
    ChunkGates gates;
    float x_scale[kChunk], k_scale[kChunk], do_scale[kChunk], v_scale[kChunk];
    float from_start[kChunk];  // e^{gc_i} x_i' S do'_i
    float to_end[kChunk];      // beta_j rho_Cj k_j' dS v'_j (until all tiles are in it, without beta_j)
    float adjoint_scale[2 * kMaxWidth / kChunk];  // of each column tile, in the order in which they are taken
    // Sums of columns over rows, by the warps that have had them: of w o x, and of what dg has inside.
    float w_x[kThreads / 32][kChunk], crossing[kThreads / 32][kChunk];
};

template <int Terms>
__device__ __forceinline__ float2 panel_pair(const __half* panel, int row, int col) {
    const int at = panel_offset(row, col);
    float2 v = unpack(*reinterpret_cast<const uint32_t*>(panel + at));
    if constexpr (Terms == 2) {
        const float2 lo = unpack(*reinterpret_cast<const uint32_t*>(panel + kPanel + at));
        v.x += lo.x, v.y += lo.y;
    }
    return v;
}

// Has these accumulators computed before what follows. The compilers put such additions off for as long as nobody asks
// for the sum, and keep both summands in registers: nvcc up to the pins, ptxas up to the next loop, which here never
// repeats. `positive` is any positive number that they do not know.
template <typename... Accs>
__device__ __forceinline__ void settle(int positive, Accs&... accumulators) {
    (ptx::wgmma_pin(accumulators.c), ...);
    while (ptx::opaque(positive) < 0) __syncthreads();
}

// Sums over a warp's rows, in which `v` are a lane's addends to its columns acc_col(lane, n) + e. Returns those of
// columns 2 lane and 2 lane + 1: in each step a lane gives away one half of the columns and keeps the other.
__device__ __forceinline__ float2 column_sums(float (&v)[8][2], int lane) {
#pragma unroll
    for (int left = 4; left; left /= 2) {
        const bool upper = lane & left * 4;
#pragma unroll
        for (int n = 0; n < left; ++n)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const float keep = upper ? v[n + left][e] : v[n][e], give = upper ? v[n][e] : v[n + left][e];
                v[n][e] = keep + __shfl_xor_sync(0xffffffffu, give, left * 4);
            }
    }
    return {v[0][0], v[0][1]};
}

// Sums over tokens of the products of two rows' elements, of a thread's eight columns (see part_column) in some rows.
struct ColumnDots {
    float sum[8] = {};

    // `hi` and the lo term a panel behind it, times `scale`, are one of the two.
    __device__ __forceinline__ void add(const float (&v)[8], const __half* hi, float scale) {
        const uint4 h = *reinterpret_cast<const uint4*>(hi), l = *reinterpret_cast<const uint4*>(hi + kPanel);
        const uint32_t words[2][4] = {{h.x, h.y, h.z, h.w}, {l.x, l.y, l.z, l.w}};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float2 a = unpack(words[0][i]), b = unpack(words[1][i]);
            sum[i * 2] = fmaf(v[i * 2], (a.x + b.x) * scale, sum[i * 2]);
            sum[i * 2 + 1] = fmaf(v[i * 2 + 1], (a.y + b.y) * scale, sum[i * 2 + 1]);
        }
    }

    // The warp's sums of 64 columns. As in column_sums, a lane gives away half of its columns in each step.
    __device__ __forceinline__ void put_sums(float* to, int lane) {
#pragma unroll
        for (int left = 4; left >= 2; left /= 2) {
            const bool upper = lane & left * 4;
#pragma unroll
            for (int i = 0; i < left; ++i) {
                const float keep = upper ? sum[i + left] : sum[i], give = upper ? sum[i] : sum[i + left];
                sum[i] = keep + __shfl_xor_sync(0xffffffffu, give, left * 4);
            }
        }
        const int first = lane % 8 * 8 + lane / 16 * 4 + lane / 8 % 2 * 2;
        *reinterpret_cast<float2*>(to + first) = {sum[0], sum[1]};
    }
};

template <Isa isa, int KTiles, int Terms>
__global__ void __launch_bounds__(kThreads, kParkedTiles<isa, KTiles, Terms> > 0 ? 3 : 2)
    grad_kernel(const __grid_constant__ GradArgs a) {
    if constexpr (isa == Isa::hopper && !ptx::kHasHopper) return;  // never launched
    MESA_DYNAMIC_SHARED(shared_bytes);
    auto& sm = *reinterpret_cast<Shared<isa, KTiles, Terms>*>(shared_bytes);
    const int thread_lane = threadIdx.x % 32, warp = threadIdx.x / 32, first_row = warp * 16;
    const int slot = blockIdx.x / a.heads.count;
    const int head = a.heads.first + blockIdx.x % a.heads.count;
    const Chunk chunk = find_chunk(a.problem, slot);
    if (chunk.length == 0) return;
    const int v_tiles = (a.problem.V + kChunk - 1) / kChunk, column_tiles = v_tiles + KTiles;
    const int ds_place = static_cast<int>(state_tile(a.adjoints, slot, head, column_tiles, 0));
    const auto tile_of = [](const SplitStates& s, int64_t place) { return s.panels + place * KTiles * 2 * kPanel; };
    // Column tiles are taken in the order [k | v], since dv may be written where w lies.
    const auto adjoint_place = [&](int ct) { return ds_place + (ct < KTiles ? v_tiles + ct : ct - KTiles); };
    const auto fetch_adjoint = [&](int ct) {
        copy_panels_async<KTiles * 2>(sm.state, tile_of(a.adjoints, adjoint_place(ct)));
        ptx::cp_async_commit();
    };
    const auto fetch_outputs = [&](int ct) {  // w or do
        if (ct < KTiles) {
            fetch_rows<1, 2>(sm.d_o, a.w.tile[ct], chunk, head, 0);
        } else {
            fetch_rows<1, Terms>(sm.d_o, a.d_o, chunk, head, (ct - KTiles) * kChunk);
        }
        ptx::cp_async_commit();
    };
    const auto fetch_values = [&](int ct) {
        if (ct >= KTiles) fetch_rows<1, Terms>(sm.v, a.v, chunk, head, (ct - KTiles) * kChunk);
        ptx::cp_async_commit();
    };

    // Everything is asked for at once, in the order in which it is needed. Later w or do are asked for as soon as
    // the last tile's have been used, v and dS at the end of the tile; all comes from the L2 cache then.
    const GatePair gates = fetch_gates(a.gates, a.problem, chunk, head);
    const int token = threadIdx.x, tile = threadIdx.x - kChunk;  // of the first or the other threads
    float own_scalar = 0.f;
    if (token < chunk.length) own_scalar = a.from_start[token_index(a.problem, chunk, token, a.heads.all, head)];
    else if (tile >= 0 && tile < column_tiles) own_scalar = a.adjoints.scales[adjoint_place(tile)];
    fetch_rows<KTiles, 2>(sm.x, a.x, chunk, head, 0);
    fetch_rows<KTiles, Terms>(sm.k, a.k, chunk, head, 0);
    ptx::cp_async_commit();
    fetch_outputs(0);
    fetch_values(0);
    fetch_adjoint(0);
    if (KTiles == 2) prefetch_rows(a.w.tile[1], chunk, head);
    prefetch_rows(a.d_o, chunk, head);
    prefetch_rows(a.v, chunk, head);
    store_gates(sm.gates, gates);
    if (token < kChunk) sm.from_start[token] = own_scalar;
    else if (tile < column_tiles) sm.adjoint_scale[tile] = own_scalar;
    ptx::cp_async_wait<3>();
    convert_rows<KTiles, 2>(sm.x, sm.x_scale, a.x.dtype, 4);
    convert_rows<KTiles, Terms>(sm.k, sm.k_scale, a.k.dtype, 0);
    publish_shared<isa>();
    __syncthreads();

    int lane = thread_lane;
    int row[2] = {first_row + acc_row(lane, 0), first_row + acc_row(lane, 1)};

    // qk_ji = rho_ij x_i . k_j
    constexpr int kParked = kParkedTiles<isa, KTiles, Terms>;
    Acc qk;
    products_begin<isa>(qk);
    mma_panels<isa, false, true, Terms, 2, false>(qk, sm.k, first_row, sm.x, lane);
    if constexpr (KTiles == 2)
        mma_panels<isa, false, true, Terms, 2>(qk, sm.k + Terms * kPanel, first_row, sm.x + 2 * kPanel, lane);
    products_end<isa>(qk);
#pragma unroll
    for (int n = 0; n < 8; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int i = acc_col(lane, n) + e;
            const float scale = sm.x_scale[i];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float& s = qk.c[n][half * 2 + e];
                const float weight = sm.gates.decay(i, row[half]) * sm.k_scale[row[half]] * scale;
                s = i >= row[half] ? s * weight : 0.f;
            }
        }
        if constexpr (kParked > 0)
            if (n < kParked) sm.own(n) = {qk.c[n][0], qk.c[n][1], qk.c[n][2], qk.c[n][3]};
    }
    const auto qk_of_tile = [&](int n) -> float4 {
        if constexpr (kParked > 0)
            if (n < kParked) return sm.own(n);
        return {qk.c[n][0], qk.c[n][1], qk.c[n][2], qk.c[n][3]};
    };
    float from_chunk_end[2];  // rho_Cj
#pragma unroll
    for (int half = 0; half < 2; ++half) from_chunk_end[half] = sm.gates.decay(kChunk - 1, row[half]);

    const auto column_total = [](const float(&of_warp)[kThreads / 32][kChunk], int i) {
        return (of_warp[0][i] + of_warp[1][i]) + (of_warp[2][i] + of_warp[3][i]);
    };

    // Tile by tile: u and dv' from the end of the chunk, dv' from inside it, the scores, and what reaches dg from
    // behind.
    Acc u[KTiles], scores;
    zero(scores);
#pragma unroll
    for (int kt = 0; kt < KTiles; ++kt) zero(u[kt]);
    if (lane % 4 == 0) sm.to_end[row[0]] = sm.to_end[row[1]] = 0.f;
    for (int ct = 0; ct < column_tiles; ++ct) {
        lane = ptx::opaque(thread_lane);  // or addresses made of it would be kept from tile to tile
        row[0] = first_row + acc_row(lane, 0), row[1] = first_row + acc_row(lane, 1);
        const bool is_v = ct >= KTiles;
        const int col0 = (is_v ? ct - KTiles : ct) * kChunk;
        const float sign = is_v ? 1.f : -1.f;
        if (ct + 1 < column_tiles) prefetch_panels<KTiles * 2>(tile_of(a.adjoints, adjoint_place(ct + 1)));
        ptx::cp_async_wait<1>();  // dS may still be on its way
        if (is_v) {
            convert_rows<1, Terms>(sm.d_o, sm.do_scale, a.d_o.dtype, 4);
            convert_rows<1, Terms>(sm.v, sm.v_scale, a.v.dtype, 0);
        } else {
            ColumnDots dots;  // of w and x: -dlamb
            const auto put_scale = [&](int t, float scale) { sm.do_scale[t] = scale; };
            convert_float_rows<1>(sm.d_o, put_scale, 4, [&](int t, const float(&w)[1][8]) {
                dots.add(w[0], sm.x + ct * 2 * kPanel + panel_offset(t, part_column()), sm.x_scale[t]);
            });
            dots.put_sums(sm.w_x[warp], lane);
        }
        publish_shared<isa>();
        __syncthreads();

        const __half* const values = is_v ? sm.v : sm.k + ct * Terms * kPanel;
        const float* const value_scales = is_v ? sm.v_scale : sm.k_scale;
        const auto value_scale = [&](int half) { return value_scales[row[half]]; };
        const auto do_scale = [&](int n) { return *reinterpret_cast<const float2*>(sm.do_scale + acc_col(lane, n)); };
        const auto with_output_terms = [&](const auto& f) {  // w has two, do in 16 bits one
            if (Terms == 1 && is_v) f(std::integral_constant<int, 1>());
            else f(std::integral_constant<int, 2>());
        };
        Acc part;  // scores; meanwhile the operand of dv' is made
        products_begin<isa>(part);
        with_output_terms([&](auto terms) {
            mma_panels<isa, false, true, Terms, terms.value, false>(part, values, first_row, sm.d_o, lane);
        });
        products_commit<isa>();
        Operand<2> weights;  // qk with do's scales in it, for dv'
        float weight_scale[2];
        {
            Acc weighted;
#pragma unroll
            for (int n = 0; n < 8; ++n) {
                const float2 scale = do_scale(n);
                const float4 own = qk_of_tile(n);
                weighted.c[n][0] = own.x * scale.x, weighted.c[n][1] = own.y * scale.y;
                weighted.c[n][2] = own.z * scale.x, weighted.c[n][3] = own.w * scale.y;
            }
            normalise_rows(weighted, weight_scale, 8);
            acc_operand(weights, weighted);
        }
        products_wait<isa, 0>(part);
#pragma unroll
        for (int n = 0; n < 8; ++n) {
            const float2 scale = do_scale(n);
#pragma unroll
            for (int e = 0; e < 4; ++e)
                scores.c[n][e] = fmaf(sign * value_scale(e / 2) * (e % 2 ? scale.y : scale.x), part.c[n][e],
                                      scores.c[n][e]);
        }
        settle(column_tiles, scores);
        Acc dv;  // without beta; under way while dS is waited for
        products_begin<isa>(dv);
        with_output_terms([&](auto terms) { mma_AB<isa, terms.value, false>(dv, weights, sm.d_o, lane); });
        products_commit<isa>();
        products_wait<isa, 0>(dv);
        ptx::cp_async_wait<0>();
        publish_shared<isa>();
        __syncthreads();  // dS is there, and w or do has been used
        if (ct + 1 < column_tiles) fetch_outputs(ct + 1);
        const int column = threadIdx.x;
        if (!is_v && column < kChunk && col0 + column < a.problem.K)
            a.dlamb_parts[(int64_t(slot) * a.heads.all + head) * a.problem.K + col0 + column] =
                -column_total(sm.w_x, column);
#pragma unroll
        for (int n = 0; n < 8; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) dv.c[n][e] *= sign * weight_scale[e / 2];
        settle(column_tiles, dv);
        const float adjoint_scale = sm.adjoint_scale[ct];
#pragma unroll
        for (int kt = 0; kt < KTiles; ++kt) {
            products_begin<isa>(part);
            mma_panels<isa, false, true, Terms, 2, false>(part, values, first_row, sm.state + kt * 2 * kPanel, lane);
            products_end<isa>(part);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float scale = from_chunk_end[half] * adjoint_scale * value_scale(half);
#pragma unroll
                for (int n = 0; n < 8; ++n)
#pragma unroll
                    for (int e = half * 2; e < half * 2 + 2; ++e)
                        u[kt].c[n][e] = fmaf(scale, part.c[n][e], u[kt].c[n][e]);
            }
            settle(column_tiles, u[kt]);
        }
        products_begin<isa>(part);
        mma_panels<isa, false, false, Terms, 2, false>(part, sm.k, first_row, sm.state, lane);
        if constexpr (KTiles == 2)
            mma_panels<isa, false, false, Terms, 2>(part, sm.k + Terms * kPanel, first_row, sm.state + 2 * kPanel,
                                                    lane);
        products_end<isa>(part);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float scale = from_chunk_end[half] * adjoint_scale * sm.k_scale[row[half]];
            float sum = 0.f;
#pragma unroll
            for (int n = 0; n < 8; ++n) {
                const float2 v = panel_pair<Terms>(values, row[half], acc_col(lane, n));
                float* const p = &part.c[n][half * 2];
                sum = fmaf(v.x, p[0], fmaf(v.y, p[1], sum));
                dv.c[n][half * 2] = fmaf(scale, p[0], dv.c[n][half * 2]);
                dv.c[n][half * 2 + 1] = fmaf(scale, p[1], dv.c[n][half * 2 + 1]);
            }
            sum = quad_sum(sum);
            if (lane % 4 == 0) sm.to_end[row[half]] += scale * value_scale(half) * sum;
        }
        if (is_v) {
#pragma unroll
            for (int n = 0; n < 8; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e) dv.c[n][e] *= sm.gates.beta[row[e / 2]];
            store_strip(a.dv, chunk, head, first_row, col0, dv, lane);
        } else {
#pragma unroll
            for (int kt = 0; kt < KTiles; ++kt) {
                if (kt != ct) continue;
#pragma unroll
                for (int n = 0; n < 8; ++n)
#pragma unroll
                    for (int e = 0; e < 4; ++e) u[kt].c[n][e] += dv.c[n][e];
                ptx::wgmma_pin(u[kt].c);  // or the two branches would be made into an index of u
            }
        }

        if (ct + 1 == column_tiles) break;
        __syncthreads();  // this tile of dS and v has been used
        fetch_values(ct + 1);
        fetch_adjoint(ct + 1);
    }

    // Inside the chunk.
    float inside[2] = {0.f, 0.f};  // sum_i rho_ij (do'_i . v'_j) (x_i . k_j)
    {
        float crossing[8][2] = {};  // of this lane's two keys and columns t: sum over i >= t > j
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int j = row[half];
            const float beta = sm.gates.beta[j];
            float later = 0.f;  // sum over the columns behind tile n
#pragma unroll
            for (int n = 7; n >= 0; --n) {
                const int i = acc_col(lane, n);
                const float* const score = &scores.c[n][half * 2];
                const float4 own = qk_of_tile(n);
                const float first = i >= j ? (half ? own.z : own.x) * score[0] : 0.f;
                const float second = i + 1 >= j ? (half ? own.w : own.y) * score[1] : 0.f;
                // Sums over the quad's columns from this lane's first one on.
                float from_here = first + second;
                const float next = __shfl_down_sync(0xffffffffu, from_here, 1);
                if (lane % 4 < 3) from_here += next;
                const float after_next = __shfl_down_sync(0xffffffffu, from_here, 2);
                if (lane % 4 < 2) from_here += after_next;
                const float behind = __shfl_down_sync(0xffffffffu, from_here, 1);
                const float beyond = lane % 4 < 3 ? later + behind : later;
                if (i > j) crossing[n][0] = fmaf(beta, first + second + beyond, crossing[n][0]);
                if (i + 1 > j) crossing[n][1] = fmaf(beta, second + beyond, crossing[n][1]);
                later += __shfl_sync(0xffffffffu, from_here, lane & ~3);
            }
            inside[half] = later;
        }
        *reinterpret_cast<float2*>(&sm.crossing[warp][2 * lane]) = column_sums(crossing, lane);
    }
#pragma unroll
    for (int n = 0; n < 8; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int i = acc_col(lane, n) + e;
            const float scale = sm.x_scale[i];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float& score = scores.c[n][half * 2 + e];
                const float weight = sm.gates.decay(i, row[half]) * scale;
                score = i >= row[half] ? score * weight : 0.f;
            }
        }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int t = row[half];
        if (lane % 4 == 0) {
            const float end = sm.to_end[t];
            sm.to_end[t] = sm.gates.beta[t] * end;
            if (t < chunk.length)
                a.dbeta[token_index(a.problem, chunk, t, a.heads.all, head)] = end + inside[half];
        }
    }
    {
        float down[2];
        normalise_rows(scores, down, 8);
        Operand<2> operand;
        acc_operand(operand, scores);
        Acc part[KTiles];
        products_begin<isa>(part[0], part[KTiles - 1]);
        mma_AB<isa, 2, false>(part, operand, sm.x, 2 * kPanel, lane);
        products_end<isa>(part[0], part[KTiles - 1]);
#pragma unroll
        for (int kt = 0; kt < KTiles; ++kt) {
#pragma unroll
            for (int n = 0; n < 8; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e)
                    u[kt].c[n][e] = sm.gates.beta[row[e / 2]] * fmaf(down[e / 2], part[kt].c[n][e], u[kt].c[n][e]);
            store_strip(a.dk, chunk, head, first_row, kt * kChunk, u[kt], lane);
        }
    }

    // dg, two neighbouring tokens to a lane of one warp. What begins before a token or ends behind it is summed over
    // the tokens by shuffles.
    __syncthreads();
    if (threadIdx.x < 32) {
        const int t = 2 * lane;
        const float start[2] = {sm.from_start[t], sm.from_start[t + 1]};
        float from_here = start[0] + start[1], up_to_here = sm.to_end[t] + sm.to_end[t + 1];
#pragma unroll
        for (int d = 1; d < 32; d *= 2) {
            const float later = __shfl_down_sync(0xffffffffu, from_here, d);
            const float earlier = __shfl_up_sync(0xffffffffu, up_to_here, d);
            if (lane + d < 32) from_here += later;
            if (lane >= d) up_to_here += earlier;
        }
        const float later = __shfl_down_sync(0xffffffffu, from_here, 1);
        const float earlier = __shfl_up_sync(0xffffffffu, up_to_here, 1);
        const float behind = lane < 31 ? later : 0.f, before = lane > 0 ? earlier : 0.f;
        const float leaving = __shfl_sync(0xffffffffu, up_to_here, 31);
        if (lane == 0)
            a.crossings[int64_t(slot) * a.heads.all + head] = {from_here, leaving,
                                                               sm.gates.decay_from_start(kChunk - 1)};
        const float sum[2] = {from_here + before, start[1] + behind + (before + sm.to_end[t])};
#pragma unroll
        for (int i = 0; i < 2; ++i)
            if (t + i < chunk.length)
                a.dg[token_index(a.problem, chunk, t + i, a.heads.all, head)] =
                    sum[i] + column_total(sm.crossing, t + i);
    }
}

constexpr int kSumThreads = 256;

// Adds to dg what passes over a whole chunk. A warp's lanes are heads, and each warp has every eighth token.
__device__ __forceinline__ void add_passing(const GradArgs& a, int block) {
    const int heads = a.heads.count.value(), head_groups = (heads + 31) / 32;
    const int in_group = block % head_groups * 32 + threadIdx.x % 32, slot = block / head_groups;
    const Sequence sequence =
        find_sequence(a.problem, sequence_at(a.problem, slot, a.problem.chunks), a.problem.chunks);
    const int index = slot - sequence.first_slot, chunks = (sequence.length + kChunk - 1) / kChunk;
    if (index < 0 || index >= chunks || in_group >= heads) return;
    const int head = a.heads.first + in_group;
    const bool float32 = a.d_o.dtype == DType::f32;
    constexpr int kWarps = kSumThreads / 32;
    const Chunk chunk = chunk_of(sequence, index);
    float* const dg = a.dg + token_index(a.problem, chunk, threadIdx.x / 32, a.heads.all, head);
    const int own_tokens = (chunk.length - int(threadIdx.x) / 32 + kWarps - 1) / kWarps;
    float before[kChunk / kWarps];
#pragma unroll
    for (int i = 0; i < kChunk / kWarps; ++i)
        if (i < own_tokens) before[i] = dg[i * kWarps * a.heads.all];

    int last = index;  // which meets the state
    while (!meets_state(last, chunks, float32)) ++last;
    const int64_t place = int64_t(slot) * a.heads.all + head, last_place = place + (last - index) * a.heads.all;
    Crossings of[kOverlapDistance];
#pragma unroll
    for (int i = 0; i < kOverlapDistance; ++i)
        if (index + i <= last) of[i] = a.crossings[place + i * a.heads.all];
    const int parts = overlap_parts(a.problem);  // a multiple of four
    float overlap = 0.f;
#pragma unroll 4
    for (int i = 0; i < parts; i += 4) {
        const float4 v = *reinterpret_cast<const float4*>(a.overlaps + last_place * parts + i);
        overlap += (v.x + v.y) + (v.z + v.w);
    }
    float passing = 0.f;
#pragma unroll
    for (int i = kOverlapDistance - 1; i >= 0; --i) {
        if (index + i == last) passing = of[i].decay * overlap;
        else if (index + i < last) passing += of[i + 1].arriving - of[i].leaving;
        if (index + i <= last && of[i].decay == 0.f) passing = 0.f;  // exactly
    }
#pragma unroll
    for (int i = 0; i < kChunk / kWarps; ++i)
        if (i < own_tokens) dg[i * kWarps * a.heads.all] = before[i] + passing;
}

MESA_HOST_DEVICE int dlamb_blocks(const GradArgs& a) { return (a.heads.count.value() * a.problem.K + 31) / 32; }

// dlamb of 32 neighbouring elements, a lane each; every warp takes every eighth chunk.
__device__ __forceinline__ void sum_dlamb(const GradArgs& a, int block) {
    constexpr int kWarps = kSumThreads / 32, kAtOnce = 16;
    __shared__ float parts[kWarps][32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int element = block * 32 + lane, elements = a.heads.count.value() * a.problem.K;
    const int64_t first = int64_t(a.heads.first) * a.problem.K + element, stride = int64_t(a.heads.all) * a.problem.K;
    const int slots = static_cast<int>(a.problem.slots());
    float total = 0.f;
    for (int slot = warp; slot < slots; slot += kWarps * kAtOnce) {
        float addend[kAtOnce] = {};
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            const int at = slot + i * kWarps;
            if (element < elements && at < slots) addend[i] = a.dlamb_parts[first + at * stride];
        }
#pragma unroll
        for (int d = 1; d < kAtOnce; d *= 2)
#pragma unroll
            for (int i = 0; i < kAtOnce; i += d * 2) addend[i] += addend[i + d];
        total += addend[0];
    }
    parts[warp][lane] = total;
    __syncthreads();
    if (warp > 0 || element >= elements) return;
#pragma unroll
    for (int w = 1; w < kWarps; ++w) total += parts[w][lane];
    a.dlamb[first] = total;
}

// The sums over more than one chunk.
__global__ void __launch_bounds__(kSumThreads) sums_kernel(const __grid_constant__ GradArgs a) {
    const int block = blockIdx.x, passing_block = block - dlamb_blocks(a);
    if (passing_block < 0) sum_dlamb(a, block);
    else add_passing(a, passing_block);
}

template <Isa isa, int KTiles, int Terms>
cudaError_t launch_kernel(const GradArgs& a, cudaStream_t stream) {
    const cudaError_t status = launch(grad_kernel<isa, KTiles, Terms>, a, a.problem.slots() * a.heads.count.value(),
                                      sizeof(Shared<isa, KTiles, Terms>), stream);
    if (status != cudaSuccess) return status;
    const int64_t passing_blocks = a.problem.slots() * ((a.heads.count.value() + 31) / 32);
    return launch(sums_kernel, a, dlamb_blocks(a) + passing_blocks, 0, stream, kSumThreads);
}

template <Isa isa>
cudaError_t launch_for_shape(const GradArgs& a, cudaStream_t stream) {
    const bool two_terms = a.k.dtype == DType::f32;
    if (tiles(a.problem.K) == 1)
        return two_terms ? launch_kernel<isa, 1, 2>(a, stream) : launch_kernel<isa, 1, 1>(a, stream);
    return two_terms ? launch_kernel<isa, 2, 2>(a, stream) : launch_kernel<isa, 2, 1>(a, stream);
}

}  // namespace

cudaError_t launch_grad(const GradArgs& a, cudaStream_t stream) {
    return a.problem.hopper ? launch_for_shape<Isa::hopper>(a, stream) : launch_for_shape<Isa::portable>(a, stream);
}

}  // namespace mesa
