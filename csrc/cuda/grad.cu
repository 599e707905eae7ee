// grad: gradients of the linear attention with queries x, keys k, values v' = [v | k], output gradients do' = [do | -w].
//
// With S the state before the chunk, dS the adjoint after it, rho_ij = decay(i, j) for j <= i and C the last token:
//
//     u_j   = rho_Cj dS v'_j + sum_i rho_ij (do'_i . v'_j) x_i        dk_j = beta_j u_j + (k part of dv'_j)
//     dv'_j = beta_j (rho_Cj dS' k_j + sum_i rho_ij (x_i . k_j) do'_i)      dbeta_j = k_j . u_j
//     dg_t  = e^{gc_C} <dS, S> + sum_{i >= t} e^{gc_i} x_i' S do'_i + sum_{j < t} beta_j rho_Cj k_j' dS v'_j
//           + sum_{i >= t > j} beta_j rho_ij (x_i . k_j) (do'_i . v'_j)
//
// The scores do'.v' = do.v - w.k are residuals: both terms meet in one fp32 sum, before anything is rounded. dg is a sum
// of what crosses token t and not a difference of running totals, which would lose small gradients in large ones.
// Rows are keys: a warp owns 16 tokens j. Column tiles of 64 of [v | k] are taken one after the other.
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

// Copies a column tile of S and returns this thread's part of <dS, S>, in the tiles' units.
template <int KTiles>
__device__ __forceinline__ float copy_and_dot(__half* to, const __half* s, const __half* ds) {
    float sum = 0.f;
#pragma unroll 2
    for (int i = threadIdx.x; i < KTiles * kPanel / 8; i += kThreads) {
        const int at = i / (kPanel / 8) * 2 * (kPanel / 8) + i % (kPanel / 8);  // of hi; lo lies a panel further on
        uint4 hi = reinterpret_cast<const uint4*>(s)[at], lo = reinterpret_cast<const uint4*>(s)[at + kPanel / 8];
        reinterpret_cast<uint4*>(to)[at] = hi;
        reinterpret_cast<uint4*>(to)[at + kPanel / 8] = lo;
        const uint4 dhi = reinterpret_cast<const uint4*>(ds)[at], dlo = reinterpret_cast<const uint4*>(ds)[at + kPanel / 8];
        const uint32_t a[4] = {hi.x, hi.y, hi.z, hi.w}, b[4] = {lo.x, lo.y, lo.z, lo.w};
        const uint32_t c[4] = {dhi.x, dhi.y, dhi.z, dhi.w}, d[4] = {dlo.x, dlo.y, dlo.z, dlo.w};
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const float2 p = unpack(a[e]), q = unpack(b[e]), r = unpack(c[e]), t = unpack(d[e]);
            sum = fmaf(p.x + q.x, r.x + t.x, fmaf(p.y + q.y, r.y + t.y, sum));
        }
    }
    return sum;
}

template <int KTiles, int Terms>
__global__ void __launch_bounds__(kThreads, 2) grad_kernel(const __grid_constant__ GradArgs a) {
    extern __shared__ __align__(1024) unsigned char shared_bytes[];
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

    load_gates(sm.gates, a.gates, a.problem, chunk, head);
    load_rows<KTiles, 2>(sm.x, sm.x_scale, a.x, chunk, head, 0, 4);
    load_rows<KTiles, Terms>(sm.k, sm.k_scale, a.k, chunk, head, 0, 0);

    // First pass over the column tiles: u from the end of the chunk, the scores, and what reaches dg from outside.
    Acc u[KTiles], scores;
    zero(scores);
#pragma unroll
    for (int kt = 0; kt < KTiles; ++kt) zero(u[kt]);
    float from_start[2] = {0.f, 0.f}, across = 0.f;
    for (int ct = 0; ct < column_tiles; ++ct) {
        const bool is_v = ct < v_tiles;
        const int col0 = (is_v ? ct : ct - v_tiles) * kChunk;
        const float sign = is_v ? 1.f : -1.f;
        __syncthreads();
        if (is_v) load_rows<1, 2, Terms == 2>(sm.d_o, sm.do_scale, a.d_o, chunk, head, col0, 4);
        else load_rows<1, 2>(sm.d_o, sm.do_scale, a.w, chunk, head, col0, 4);
        if (is_v) load_rows<1, Terms>(sm.v, sm.v_scale, a.v, chunk, head, col0, 0);
        copy_panels<KTiles * 2>(sm.state, tile_of(a.adjoints, ds_place + ct));
        __syncthreads();

        {
            Operand<Terms> values;
            load_operand(values, is_v ? sm.v : sm.k + (ct - v_tiles) * Terms * kPanel, first_row, lane);
            const float* value_scale = is_v ? sm.v_scale : sm.k_scale;
            const float scale[2] = {value_scale[first_row + acc_row(lane, 0)], value_scale[first_row + acc_row(lane, 1)]};
            Acc part;
            zero(part);
            mma_ABt<2>(part, values, sm.d_o, lane);
#pragma unroll
            for (int n = 0; n < 8; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e)
                    scores.c[n][e] = fmaf(sign * scale[e / 2] * sm.do_scale[acc_col(lane, n) + e % 2], part.c[n][e], scores.c[n][e]);
            const float state_scale = a.adjoints.scales[ds_place + ct];
#pragma unroll
            for (int kt = 0; kt < KTiles; ++kt) {
                zero(part);
                mma_ABt<2>(part, values, sm.state + kt * 2 * kPanel, lane);
#pragma unroll
                for (int n = 0; n < 8; ++n)
#pragma unroll
                    for (int e = 0; e < 4; ++e) u[kt].c[n][e] = fmaf(state_scale * scale[e / 2], part.c[n][e], u[kt].c[n][e]);
            }
        }
        __syncthreads();
        const float state_scale = a.states.scales[s_place + ct];
        const float dot = copy_and_dot<KTiles>(sm.state, tile_of(a.states, s_place + ct), tile_of(a.adjoints, ds_place + ct));
        across = fmaf(dot * a.adjoints.scales[ds_place + ct], state_scale, across);
        __syncthreads();
        Acc part;
        zero(part);
#pragma unroll
        for (int kt = 0; kt < KTiles; ++kt) {
            Operand<2> x;
            load_operand(x, sm.x + kt * 2 * kPanel, first_row, lane);
            mma_AB<2>(part, x, sm.state + kt * 2 * kPanel, lane);
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int i = first_row + acc_row(lane, half);
            float sum = 0.f;
#pragma unroll
            for (int n = 0; n < 8; ++n) {
                const float2 d = panel_pair<2>(sm.d_o, i, acc_col(lane, n));
                sum = fmaf(d.x, part.c[n][half * 2], fmaf(d.y, part.c[n][half * 2 + 1], sum));
            }
            from_start[half] = fmaf(sum * sign * sm.do_scale[i], sm.x_scale[i] * state_scale, from_start[half]);
        }
    }

#pragma unroll
    for (int d = 16; d; d /= 2) across += __shfl_xor_sync(0xffffffffu, across, d);
    if (lane == 0) sm.warp_sum[warp] = across;
    // k_j . u_j for the lane's two rows, summed over the quad.
    const auto dot_with_keys = [&](float (&sum)[2]) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int j = first_row + acc_row(lane, half);
            sum[half] = 0.f;
#pragma unroll
            for (int kt = 0; kt < KTiles; ++kt)
#pragma unroll
                for (int n = 0; n < 8; ++n) {
                    const float2 k = panel_pair<Terms>(sm.k + kt * Terms * kPanel, j, acc_col(lane, n));
                    sum[half] = fmaf(k.x, u[kt].c[n][half * 2], fmaf(k.y, u[kt].c[n][half * 2 + 1], sum[half]));
                }
            sum[half] = quad_sum(sum[half]) * sm.k_scale[j];
        }
    };
    float to_end[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const float decay = sm.gates.decay(kChunk - 1, first_row + acc_row(lane, half));
#pragma unroll
        for (int kt = 0; kt < KTiles; ++kt)
#pragma unroll
            for (int n = 0; n < 8; ++n) u[kt].c[n][half * 2] *= decay, u[kt].c[n][half * 2 + 1] *= decay;
    }
    dot_with_keys(to_end);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int t = first_row + acc_row(lane, half);
        const float sum = quad_sum(from_start[half]);
        if (lane % 4 == 0) {
            sm.from_start[t] = sm.gates.decay_from_start(t) * sum;
            sm.to_end[t] = sm.gates.beta[t] * to_end[half];
        }
    }
    __syncthreads();  // the state's place is taken over by `crossing`

    // Inside the chunk: qk_ji = rho_ij x_i . k_j, scores_ji = rho_ij do'_i . v'_j, their product for dg.
    Acc qk;
    zero(qk);
#pragma unroll
    for (int kt = 0; kt < KTiles; ++kt) {
        Operand<Terms> k;
        load_operand(k, sm.k + kt * Terms * kPanel, first_row, lane);
        mma_ABt<2>(qk, k, sm.x + kt * 2 * kPanel, lane);
    }
#pragma unroll
    for (int n = 0; n < 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const int j = first_row + acc_row(lane, e / 2), i = acc_col(lane, n) + e % 2;
            const float rho = sm.gates.decay(i, j) * sm.x_scale[i];
            float& product = qk.c[n][e];
            float& score = scores.c[n][e];
            product = i >= j ? product * (rho * sm.k_scale[j]) : 0.f;
            sm.crossing[crossing_offset(j, i)] = i >= j ? product * score * sm.gates.beta[j] : 0.f;
            score = i >= j ? score * rho : 0.f;
        }
    float down[2];
    normalise_rows(scores, down, 8);
#pragma unroll
    for (int kt = 0; kt < KTiles; ++kt) {
        Acc part[1];
        zero(part[0]);
        mma_acc_AB<2, 2>(part, scores, sm.x + kt * 2 * kPanel, lane);
#pragma unroll
        for (int n = 0; n < 8; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) u[kt].c[n][e] = fmaf(down[e / 2], part[0].c[n][e], u[kt].c[n][e]);
    }
    float dbeta[2];
    dot_with_keys(dbeta);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int j = first_row + acc_row(lane, half);
        if (lane % 4 == 0 && j < chunk.length) a.dbeta[(chunk.batch * a.problem.T + chunk.token + j) * a.heads + head] = dbeta[half];
        const float beta = sm.gates.beta[j];
#pragma unroll
        for (int kt = 0; kt < KTiles; ++kt)
#pragma unroll
            for (int n = 0; n < 8; ++n) u[kt].c[n][half * 2] *= beta, u[kt].c[n][half * 2 + 1] *= beta;
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
        float sum = (sm.warp_sum[0] + sm.warp_sum[1] + sm.warp_sum[2] + sm.warp_sum[3]) * sm.gates.decay_from_start(kChunk - 1);
        for (int i = t; i < kChunk; ++i) sum += sm.from_start[i];
        for (int j = 0; j < t; ++j) sum += sm.to_end[j] + sm.crossing[crossing_offset(j, t)];
        a.dg[(chunk.batch * a.problem.T + chunk.token + t) * a.heads + head] = sum;
    }

    // Second pass: dv' tile by tile; its k part joins dk.
    for (int ct = 0; ct < column_tiles; ++ct) {
        const bool is_v = ct < v_tiles;
        const int col0 = (is_v ? ct : ct - v_tiles) * kChunk;
        const float sign = is_v ? 1.f : -1.f;
        __syncthreads();
        if (is_v) load_rows<1, 2, Terms == 2>(sm.d_o, sm.do_scale, a.d_o, chunk, head, col0, 4);
        else load_rows<1, 2>(sm.d_o, sm.do_scale, a.w, chunk, head, col0, 4);
        copy_panels<KTiles * 2>(sm.state, tile_of(a.adjoints, ds_place + ct));
        __syncthreads();

        Acc dv[1], weights;
        zero(dv[0]);
#pragma unroll
        for (int n = 0; n < 8; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) weights.c[n][e] = qk.c[n][e] * (sign * sm.do_scale[acc_col(lane, n) + e % 2]);
        normalise_rows(weights, down, 8);
        mma_acc_AB<2, 2>(dv, weights, sm.d_o, lane);
        Acc part;
        zero(part);
#pragma unroll
        for (int kt = 0; kt < KTiles; ++kt) {
            Operand<Terms> k;
            load_operand(k, sm.k + kt * Terms * kPanel, first_row, lane);
            mma_AB<2>(part, k, sm.state + kt * 2 * kPanel, lane);
        }
        const float state_scale = a.adjoints.scales[ds_place + ct];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int j = first_row + acc_row(lane, half);
            const float beta = sm.gates.beta[j], end = sm.gates.decay(kChunk - 1, j) * sm.k_scale[j] * state_scale;
#pragma unroll
            for (int n = 0; n < 8; ++n)
#pragma unroll
                for (int e = half * 2; e < half * 2 + 2; ++e)
                    dv[0].c[n][e] = beta * fmaf(end, part.c[n][e], down[half] * dv[0].c[n][e]);
        }
        if (is_v) {
            store_strip(a.dv, chunk, head, first_row, col0, dv[0], lane);
        } else {
#pragma unroll
            for (int kt = 0; kt < KTiles; ++kt)  // selects, not branches: these would be made into an index of u
#pragma unroll
                for (int n = 0; n < 8; ++n)
#pragma unroll
                    for (int e = 0; e < 4; ++e) u[kt].c[n][e] += kt == ct - v_tiles ? dv[0].c[n][e] : 0.f;
        }
    }
#pragma unroll
    for (int kt = 0; kt < KTiles; ++kt) store_strip(a.dk, chunk, head, first_row, kt * kChunk, u[kt], lane);

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

template <int KTiles, int Terms>
cudaError_t launch_grad_kernel(const GradArgs& a, cudaStream_t stream) {
    return launch(grad_kernel<KTiles, Terms>, a, a.problem.slots() * a.heads, sizeof(Shared<KTiles, Terms>), stream);
}

}  // namespace

cudaError_t launch_grad(const GradArgs& a, cudaStream_t stream) {
    const bool two_terms = a.k.dtype == DType::f32;
    if (tiles(a.problem.K) == 1) return two_terms ? launch_grad_kernel<1, 2>(a, stream) : launch_grad_kernel<1, 1>(a, stream);
    return two_terms ? launch_grad_kernel<2, 2>(a, stream) : launch_grad_kernel<2, 1>(a, stream);
}

}  // namespace mesa
