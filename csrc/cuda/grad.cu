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
// Rows are keys: a warp owns 16 tokens j. Column tiles of 64 of [v | k] are taken one after the other, each of them
// with its part of dS and then of S in the same place.
#include "chunk.cuh"

namespace mesa {
namespace {

template <int KTiles, int Terms>
struct Shared {
    __half x[KTiles * 2 * kPanel];
    __half k[KTiles * Terms * kPanel];
    __half d_o[2 * kPanel];    // the current column tile of do or w
    __half v[Terms * kPanel];  // the current column tile of v
    union {
        __half state[KTiles * 2 * kPanel];  // the current column tile of dS or S
        float crossing[kChunk * kChunk];    // the addends of dg, swizzled by key
    };
    ChunkGates gates;
    float x_scale[kChunk], k_scale[kChunk], do_scale[kChunk], v_scale[kChunk];
    float from_start[kChunk];  // e^{gc_i} x_i' S do'_i
    float to_end[kChunk];      // beta_j rho_Cj k_j' dS v'_j
    float warp_sum[4];
};

__device__ __forceinline__ int crossing_offset(int j, int i) { return j * kChunk + (i ^ (j & 31)); }

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

// Puts a column tile of S in the place of the same tile of dS; returns this thread's part of <dS, S>, in the tiles'
// units.
template <int KTiles>
__device__ __forceinline__ float replace_and_dot(__half* ds, const __half* s) {
    float sum = 0.f;
#pragma unroll 2
    for (int i = threadIdx.x; i < KTiles * kPanel / 8; i += kThreads) {
        const int at = i / (kPanel / 8) * 2 * (kPanel / 8) + i % (kPanel / 8);  // of hi; lo lies a panel further on
        const uint4 hi = reinterpret_cast<const uint4*>(s)[at], lo = reinterpret_cast<const uint4*>(s)[at + kPanel / 8];
        uint4& to_hi = reinterpret_cast<uint4*>(ds)[at];
        uint4& to_lo = reinterpret_cast<uint4*>(ds)[at + kPanel / 8];
        const uint32_t a[4] = {hi.x, hi.y, hi.z, hi.w}, b[4] = {lo.x, lo.y, lo.z, lo.w};
        const uint32_t c[4] = {to_hi.x, to_hi.y, to_hi.z, to_hi.w}, d[4] = {to_lo.x, to_lo.y, to_lo.z, to_lo.w};
        to_hi = hi, to_lo = lo;
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const float2 p = unpack(a[e]), q = unpack(b[e]), r = unpack(c[e]), t = unpack(d[e]);
            sum = fmaf(p.x + q.x, r.x + t.x, fmaf(p.y + q.y, r.y + t.y, sum));
        }
    }
    return sum;
}

template <Isa isa, int KTiles, int Terms>
__global__ void __launch_bounds__(kThreads, 2) grad_kernel(const __grid_constant__ GradArgs a) {
    if constexpr (isa == Isa::hopper && !ptx::kHasHopper) return;  // never launched
    MESA_DYNAMIC_SHARED(shared_bytes);
    auto& sm = *reinterpret_cast<Shared<KTiles, Terms>*>(shared_bytes);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, first_row = warp * 16;
    const int64_t slot = blockIdx.x / a.heads;
    const int head = blockIdx.x % a.heads;
    const Chunk chunk = find_chunk(a.problem, slot);
    if (chunk.length == 0) return;
    const int v_tiles = (a.problem.V + kChunk - 1) / kChunk, column_tiles = v_tiles + KTiles;
    const int64_t s_place = state_tile(a.states, slot, head, column_tiles, 0);
    const int64_t ds_place = state_tile(a.adjoints, slot, head, column_tiles, 0);
    const auto tile_of = [](const SplitStates& s, int64_t place) { return s.panels + place * KTiles * 2 * kPanel; };
    const auto fetch_adjoint = [&](int ct) {
        copy_panels_async<KTiles * 2>(sm.state, tile_of(a.adjoints, ds_place + ct));
        ptx::cp_async_commit();
    };

    fetch_adjoint(0);
    prefetch_rows<kThreads>(a.k, chunk, head, 0, a.problem.K);
    load_gates(sm.gates, a.gates, a.problem, chunk, head);
    load_rows<KTiles, 2>(sm.x, sm.x_scale, a.x, chunk, head, 0, 4);
    load_rows<KTiles, Terms>(sm.k, sm.k_scale, a.k, chunk, head, 0, 0);
    publish_shared<isa>();
    __syncthreads();

    // qk_ji = rho_ij x_i . k_j
    const int row[2] = {first_row + acc_row(lane, 0), first_row + acc_row(lane, 1)};
    Acc qk;
    zero(qk);
    products_begin<isa>(qk);
#pragma unroll
    for (int kt = 0; kt < KTiles; ++kt)
        mma_panels<isa, false, true, Terms, 2>(qk, sm.k + kt * Terms * kPanel, first_row, sm.x + kt * 2 * kPanel, lane);
    products_end<isa>(qk);
#pragma unroll
    for (int n = 0; n < 8; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int i = acc_col(lane, n) + e;
            const float scale = sm.x_scale[i];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float& s = qk.c[n][half * 2 + e];
                s = i >= row[half] ? s * (sm.gates.decay(i, row[half]) * sm.k_scale[row[half]] * scale) : 0.f;
            }
        }
    float from_chunk_end[2];  // rho_Cj
#pragma unroll
    for (int half = 0; half < 2; ++half) from_chunk_end[half] = sm.gates.decay(kChunk - 1, row[half]);

    // Tile by tile: u and dv' from the end of the chunk, dv' from inside it, the scores, and what reaches dg from
    // outside.
    Acc u[KTiles], scores;
    zero(scores);
#pragma unroll
    for (int kt = 0; kt < KTiles; ++kt) zero(u[kt]);
    float from_start[2] = {0.f, 0.f}, to_end[2] = {0.f, 0.f}, across = 0.f;
    for (int ct = 0; ct < column_tiles; ++ct) {
        const bool is_v = ct < v_tiles;
        const int col0 = (is_v ? ct : ct - v_tiles) * kChunk;
        const float sign = is_v ? 1.f : -1.f;
        prefetch_panels<KTiles * 2>(tile_of(a.states, s_place + ct));
        if (is_v) prefetch_rows<kThreads>(a.v, chunk, head, col0, kChunk);
        if (is_v) load_rows<1, 2, Terms == 2>(sm.d_o, sm.do_scale, a.d_o, chunk, head, col0, 4);
        else load_rows<1, 2>(sm.d_o, sm.do_scale, a.w, chunk, head, col0, 4);
        if (is_v) load_rows<1, Terms>(sm.v, sm.v_scale, a.v, chunk, head, col0, 0);
        ptx::cp_async_wait<0>();
        publish_shared<isa>();
        __syncthreads();

        const __half* const values = is_v ? sm.v : sm.k + (ct - v_tiles) * Terms * kPanel;
        const float* const value_scales = is_v ? sm.v_scale : sm.k_scale;
        const float value_scale[2] = {value_scales[row[0]], value_scales[row[1]]};
        const float adjoint_scale = a.adjoints.scales[ds_place + ct];
        Acc part;
        zero(part);
        products_begin<isa>(part);
        mma_panels<isa, false, true, Terms, 2>(part, values, first_row, sm.d_o, lane);
        products_end<isa>(part);
#pragma unroll
        for (int n = 0; n < 8; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e)
                scores.c[n][e] = fmaf(sign * value_scale[e / 2] * sm.do_scale[acc_col(lane, n) + e % 2], part.c[n][e],
                                      scores.c[n][e]);
#pragma unroll
        for (int kt = 0; kt < KTiles; ++kt) {
            zero(part);
            products_begin<isa>(part);
            mma_panels<isa, false, true, Terms, 2>(part, values, first_row, sm.state + kt * 2 * kPanel, lane);
            products_end<isa>(part);
#pragma unroll
            for (int n = 0; n < 8; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e)
                    u[kt].c[n][e] =
                        fmaf(from_chunk_end[e / 2] * adjoint_scale * value_scale[e / 2], part.c[n][e], u[kt].c[n][e]);
        }

        Acc dv;  // without beta
        {
            Acc weights;
            float down[2];
#pragma unroll
            for (int n = 0; n < 8; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e)
                    weights.c[n][e] = qk.c[n][e] * (sign * sm.do_scale[acc_col(lane, n) + e % 2]);
            normalise_rows(weights, down, 8);
            Operand<2> operand;
            acc_operand(operand, weights);
            zero(dv);
            products_begin<isa>(dv);
            mma_AB<isa, 2>(dv, operand, sm.d_o, lane);
            products_end<isa>(dv);
#pragma unroll
            for (int n = 0; n < 8; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e) dv.c[n][e] *= down[e / 2];
        }
        zero(part);
        products_begin<isa>(part);
#pragma unroll
        for (int kt = 0; kt < KTiles; ++kt)
            mma_panels<isa, false, false, Terms, 2>(part, sm.k + kt * Terms * kPanel, first_row,
                                                    sm.state + kt * 2 * kPanel, lane);
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
            to_end[half] = fmaf(scale * value_scale[half], sum, to_end[half]);
        }
        if (is_v) {
#pragma unroll
            for (int n = 0; n < 8; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e) dv.c[n][e] *= sm.gates.beta[row[e / 2]];
            store_strip(a.dv, chunk, head, first_row, col0, dv, lane);
        } else {
#pragma unroll
            for (int kt = 0; kt < KTiles; ++kt)  // selects, not branches: these would be made into an index of u
#pragma unroll
                for (int n = 0; n < 8; ++n)
#pragma unroll
                    for (int e = 0; e < 4; ++e) u[kt].c[n][e] += kt == ct - v_tiles ? dv.c[n][e] : 0.f;
        }

        __syncthreads();  // this tile of dS has been used
        const float state_scale = a.states.scales[s_place + ct];
        across = fmaf(replace_and_dot<KTiles>(sm.state, tile_of(a.states, s_place + ct)) * adjoint_scale, state_scale,
                      across);
        publish_shared<isa>();
        __syncthreads();
        zero(part);
        products_begin<isa>(part);
#pragma unroll
        for (int kt = 0; kt < KTiles; ++kt)
            mma_panels<isa, false, false, 2, 2>(part, sm.x + kt * 2 * kPanel, first_row, sm.state + kt * 2 * kPanel,
                                                lane);
        products_end<isa>(part);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int i = row[half];
            float sum = 0.f;
#pragma unroll
            for (int n = 0; n < 8; ++n) {
                const float2 d = panel_pair<2>(sm.d_o, i, acc_col(lane, n));
                sum = fmaf(d.x, part.c[n][half * 2], fmaf(d.y, part.c[n][half * 2 + 1], sum));
            }
            from_start[half] = fmaf(sum * sign * sm.do_scale[i], sm.x_scale[i] * state_scale, from_start[half]);
        }
        __syncthreads();  // this tile of S and its do and v have been used
        if (ct + 1 < column_tiles) fetch_adjoint(ct + 1);
    }

    // Inside the chunk. The state's place is taken over by `crossing`.
    float inside[2] = {0.f, 0.f};  // sum_i rho_ij (do'_i . v'_j) (x_i . k_j)
#pragma unroll
    for (int n = 0; n < 8; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int i = acc_col(lane, n) + e;
            const float scale = sm.x_scale[i];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int j = row[half];
                float& score = scores.c[n][half * 2 + e];
                const float product = i >= j ? qk.c[n][half * 2 + e] * score : 0.f;
                inside[half] += product;
                sm.crossing[crossing_offset(j, i)] = product * sm.gates.beta[j];
                score = i >= j ? score * (sm.gates.decay(i, j) * scale) : 0.f;
            }
        }
#pragma unroll
    for (int d = 16; d; d /= 2) across += __shfl_xor_sync(0xffffffffu, across, d);
    if (lane == 0) sm.warp_sum[warp] = across;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int t = row[half];
        const float start = quad_sum(from_start[half]), end = quad_sum(to_end[half]),
                    dbeta = end + quad_sum(inside[half]);
        if (lane % 4 == 0) {
            sm.from_start[t] = sm.gates.decay_from_start(t) * start;
            sm.to_end[t] = sm.gates.beta[t] * end;
            if (t < chunk.length) a.dbeta[(chunk.batch * a.problem.T + chunk.token + t) * a.heads + head] = dbeta;
        }
    }
    {
        float down[2];
        normalise_rows(scores, down, 8);
        Operand<2> operand;
        acc_operand(operand, scores);
#pragma unroll
        for (int kt = 0; kt < KTiles; ++kt) {
            Acc part;
            zero(part);
            products_begin<isa>(part);
            mma_AB<isa, 2>(part, operand, sm.x + kt * 2 * kPanel, lane);
            products_end<isa>(part);
#pragma unroll
            for (int n = 0; n < 8; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e)
                    u[kt].c[n][e] = sm.gates.beta[row[e / 2]] * fmaf(down[e / 2], part.c[n][e], u[kt].c[n][e]);
            store_strip(a.dk, chunk, head, first_row, kt * kChunk, u[kt], lane);
        }
    }

    // dg: sums of `crossing` along i from the end (thread = key), then along j up to t (thread = token).
    __syncthreads();
    const int t = threadIdx.x;
    if (t < kChunk) {
        float sum = 0.f;
        for (int i = kChunk - 1; i >= 0; --i) {
            float& c = sm.crossing[crossing_offset(t, i)];
            c = sum += c;
        }
    }
    __syncthreads();
    if (t < chunk.length) {
        float sum =
            (sm.warp_sum[0] + sm.warp_sum[1] + sm.warp_sum[2] + sm.warp_sum[3]) * sm.gates.decay_from_start(kChunk - 1);
        for (int i = t; i < kChunk; ++i) sum += sm.from_start[i];
        for (int j = 0; j < t; ++j) sum += sm.to_end[j] + sm.crossing[crossing_offset(j, t)];
        a.dg[(chunk.batch * a.problem.T + chunk.token + t) * a.heads + head] = sum;
    }

    // dlamb = -sum_t w_t o x_t
    if (t < a.problem.K) {
        const float* const w = static_cast<const float*>(a.w.data) + row_offset(a.w, chunk, 0, head) + t;
        const float* const x = static_cast<const float*>(a.x.data) + row_offset(a.x, chunk, 0, head) + t;
        float sum = 0.f;
#pragma unroll 8
        for (int i = 0; i < chunk.length; ++i) sum -= w[i * a.w.token_stride] * x[i * a.x.token_stride];
        a.dlamb[(slot * a.heads + head) * a.problem.K + t] = sum;
    }
}

template <Isa isa, int KTiles, int Terms>
cudaError_t launch_kernel(const GradArgs& a, cudaStream_t stream) {
    return launch(grad_kernel<isa, KTiles, Terms>, a, a.problem.slots() * a.heads, sizeof(Shared<KTiles, Terms>),
                  stream);
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
