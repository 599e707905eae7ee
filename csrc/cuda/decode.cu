// decode: one token for every sequence. States in fp32 are updated in place, the system is solved with the same rules
// as in the chunked path (cg.h), and the output is read from the updated G.
//
// One block of 8 warps owns a sequence and state head. All that it reads is asked for at once: H comes to registers, a
// warp holding KP / 8 rows, a lane the same KP / 32 columns of each; G comes to shared memory while the system is being
// solved, every thread fetching what it will use itself. So the memory has work while the warps compute.
//
// Since H is symmetric, H p is taken as the sum of p_i times row i: no shuffles, but an exchange between the warps, of
// which each sums the elements of its own rows only and keeps r and x for these. A step has two barriers: one for the
// shares of A p and p.Ap, one for z and the shares of r.z. All warps keep p, spread over the lanes, and take the same
// scalar steps, from the same numbers summed in the same order.
#include <type_traits>

#include "../cg.h"
#include "chunk.cuh"

namespace mesa {
namespace {

constexpr int kWarps = 8;
constexpr int kQueries = 4;  // heads of a query group that are read out together

template <int KP>
struct alignas(16) Shared {
    // Every warp's share of a sum over all rows. Padded, so that a warp reads its columns of two or four shares at once
    // from different banks.
    float partial[2][kWarps][kMaxWidth + 4];
    float k[KP], v[kMaxWidth];
    float q[2][KP];     // of one query and the next
    float inverse[KP];  // of lamb
    float z[KP];
    // Of these, warps read only the elements of their own rows: no barrier needed.
    float direction[KP];
    float x[kQueries][KP];
    float pAp[kWarps], rz[kWarps];  // shares of the dot products
};

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
    for (int d = 16; d; d /= 2) v += __shfl_xor_sync(0xffffffffu, v, d);
    return v;
}

__device__ __forceinline__ float warp_max(float v) {
#pragma unroll
    for (int d = 16; d; d /= 2) v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, d));
    return v;
}

// The sum of every warp's share, in the same order for all.
__device__ __forceinline__ float sum_shares(const float (&shares)[kWarps]) {
    static_assert(kWarps == 8);
    const float4 a = reinterpret_cast<const float4*>(shares)[0], b = reinterpret_cast<const float4*>(shares)[1];
    return ((a.x + a.y) + (a.z + a.w)) + ((b.x + b.y) + (b.z + b.w));
}

// N neighbouring elements, at a multiple of their size.
template <int N>
__device__ __forceinline__ void load_vector(float (&v)[N], const float* from) {
    static_assert(N == 2 || N == 4);
    if constexpr (N == 4) {
        const float4 f = *reinterpret_cast<const float4*>(from);
        v[0] = f.x, v[1] = f.y, v[2] = f.z, v[3] = f.w;
    } else {
        const float2 f = *reinterpret_cast<const float2*>(from);
        v[0] = f.x, v[1] = f.y;
    }
}

template <int N>
__device__ __forceinline__ void store_vector(float* to, const float (&v)[N]) {
    static_assert(N == 2 || N == 4);
    if constexpr (N == 4) *reinterpret_cast<float4*>(to) = {v[0], v[1], v[2], v[3]};
    else *reinterpret_cast<float2*>(to) = {v[0], v[1]};
}

// Element `col` of a [B, 1, heads, width] tensor's row as it lies there, zero past the width: to be fetched early and
// converted when it is needed, so that no load waits for another.
__device__ __forceinline__ uint32_t fetch_row_value(const Rows& m, int b, int head, int col) {
    if (col >= m.width) return 0;
    const int64_t at = b * m.batch_stride + (m.group == 1 ? head : head / m.group) * m.head_stride + col;
    if (m.dtype == DType::f32) return static_cast<const uint32_t*>(m.data)[at];
    return static_cast<const uint16_t*>(m.data)[at];
}

__device__ __forceinline__ float converted(uint32_t bits, DType dtype) {
    switch (dtype) {
        case DType::f16: return __half2float(__ushort_as_half(static_cast<uint16_t>(bits)));
        case DType::bf16: return __uint_as_float(bits << 16);
        default: return __uint_as_float(bits);
    }
}

__device__ __forceinline__ void set_row_value(const Rows& m, int b, int head, int col, float v) {
    const int64_t at = b * m.batch_stride + head * m.head_stride + col;
    switch (m.dtype) {
        case DType::f16: static_cast<__half*>(m.data)[at] = __float2half_rn(v); break;
        case DType::bf16: static_cast<__nv_bfloat16*>(m.data)[at] = __float2bfloat16_rn(v); break;
        default: static_cast<float*>(m.data)[at] = v;
    }
}

// N elements of a state's row, of which `left` > 0 are there; with Aligned all, at a multiple of their size.
template <bool Aligned, int N>
__device__ __forceinline__ void load_state_row(float (&v)[N], const float* from, int left) {
    if constexpr (Aligned) {
        load_vector(v, from);
    } else {
#pragma unroll
        for (int e = 0; e < N; ++e) v[e] = e < left ? from[e] : 0.f;
    }
}

template <bool Aligned, int N>
__device__ __forceinline__ void store_state_row(float* to, const float (&v)[N], int left) {
    if constexpr (Aligned) {
        ptx::store_streaming(to, v);
    } else {
#pragma unroll
        for (int e = 0; e < N; ++e)
            if (e < left) to[e] = v[e];
    }
}

template <int KP, bool Aligned>
__global__ void __launch_bounds__(kWarps * 32, KP == 64 ? 3 : 2) decode_kernel(const __grid_constant__ DecodeArgs a) {
    constexpr int kRows = KP / kWarps, kCols = KP / 32;
    constexpr int kSharers = 32 / kRows;  // lanes to an element of the warp's own rows
    __shared__ Shared<KP> shared;
    Shared<KP>& sm = *ptx::opaque_shared(&shared);
    MESA_DYNAMIC_SHARED(dynamic_shared);
    // Opaque, or with so few registers left they would be made anew in every step.
    const int lane = ptx::opaque(threadIdx.x % 32), warp = ptx::opaque(threadIdx.x / 32);
    const int b = blockIdx.x / a.HS, head = blockIdx.x % a.HS;
    const int queries = a.HO / a.HS;
    const int first_row = warp * kRows, own = first_row + lane % kRows;
    const int col = lane * kCols, v_col = lane * 4;

    // Everything is asked for before anything is used; what the row of the pool does not matter for, first.
    const int64_t state = a.state_indices ? a.state_indices[b] : b;
    const float g = a.g[int64_t(b) * a.HS + head], beta = a.beta[int64_t(b) * a.HS + head];
    const uint32_t k_bits = fetch_row_value(a.k, b, head, own);
    const uint32_t v_bits = fetch_row_value(a.v, b, head, threadIdx.x);
    uint32_t q_bits = fetch_row_value(a.q, b, head * queries, own);
    const float lamb_own = own < a.K ? a.lamb[int64_t(head) * a.K + own] : 1.f;
    if (state < 0 || state >= a.pool) {
#pragma unroll 1
        for (int i = threadIdx.x; i < queries * a.V; i += kWarps * 32)
            set_row_value(a.out, b, head * queries + i / a.V, i % a.V, 0.f);
        return;
    }

    float h[kRows][kCols];
    const int h_rows = col < a.K ? a.K - first_row : 0;  // of which the lane has elements
    float* const h_first = a.h_kk + ((state * a.HS + head) * a.K + first_row) * a.K + col;
    float* h_row = ptx::opaque_global(h_first);
#pragma unroll
    for (int r = 0; r < kRows; ++r, h_row = ptx::opaque_global(h_row + a.K)) {
#pragma unroll
        for (int e = 0; e < kCols; ++e) h[r][e] = 0.f;
        if (r < h_rows) load_state_row<Aligned>(h[r], h_row, a.K - col);
    }

    // All warps want these whole. (And the compiler would put H's loads behind G's, but leaves them before a barrier.)
    const float decay = expf(g), inverse_own = __frcp_rn(lamb_own);
    if (lane < kRows) {
        sm.k[own] = converted(k_bits, a.k.dtype);
        sm.q[0][own] = converted(q_bits, a.q.dtype);
        sm.inverse[own] = inverse_own;
    }
    if (threadIdx.x < kMaxWidth) sm.v[threadIdx.x] = converted(v_bits, a.v.dtype);
    __syncthreads();

    // The rows of G, the lanes taking the columns four by four.
    float* const g_first = a.h_kv + ((state * a.HS + head) * a.K + first_row) * a.V + v_col;
    const int g_rows = v_col < a.V ? a.K - first_row : 0;
    float* const stage = reinterpret_cast<float*>(dynamic_shared) + first_row * kMaxWidth + v_col;
    if constexpr (Aligned) {
        float* g_row = ptx::opaque_global(g_first);
#pragma unroll
        for (int r = 0; r < kRows; ++r, g_row = ptx::opaque_global(g_row + a.V))
            if (r < g_rows) ptx::cp_async16(stage + r * kMaxWidth, g_row);
        ptx::cp_async_commit();
    }

    // H <- decay H + beta k k'
    {
        float k[kCols];
        load_vector(k, &sm.k[col]);
        const int h_rows_again = ptx::opaque(h_rows);  // compared anew: kept, the predicates would fill registers
        h_row = ptx::opaque_global(h_first);
#pragma unroll
        for (int r = 0; r < kRows; r += 4) {
            float k_row[4];
            load_vector(k_row, &sm.k[first_row + r]);
#pragma unroll
            for (int i = 0; i < 4; ++i, h_row = ptx::opaque_global(h_row + a.K)) {
#pragma unroll
                for (int e = 0; e < kCols; ++e) h[r + i][e] = fmaf(decay, h[r + i][e], beta * (k_row[i] * k[e]));
                if (r + i < h_rows_again) store_state_row<Aligned>(h_row, h[r + i], a.K - col);
            }
        }
    }

    const float tol_squared = a.tolerance * a.tolerance;

    // G <- decay G + beta k v' (with the first queries; kept in shared memory if others follow), o = G' x, `batch` rows
    // of a warp together.
    const auto read_out = [&](auto batch, int first, int count, bool last) {
        constexpr int kBatch = decltype(batch)::value;
        if constexpr (Aligned) ptx::cp_async_wait<0>();
        __syncwarp();
        float o[kQueries][4] = {};
        float* g_row = ptx::opaque_global(g_first);
#pragma unroll 1
        for (int r = 0; r < kRows; r += kBatch, g_row += kBatch * a.V) {
            float rows[kBatch][4] = {};
#pragma unroll
            for (int i = 0; i < kBatch; ++i) {
                if (r + i >= g_rows) continue;
                if constexpr (Aligned) load_vector(rows[i], stage + (r + i) * kMaxWidth);
                else load_state_row<false>(rows[i], g_row + i * a.V, a.V - v_col);
            }
            if (first == 0) {
                float v[4];
                load_vector(v, &sm.v[v_col]);
#pragma unroll
                for (int i = 0; i < kBatch; ++i) {
                    if (r + i >= g_rows) continue;
                    const float k_row = sm.k[first_row + r + i];
#pragma unroll
                    for (int e = 0; e < 4; ++e) rows[i][e] = fmaf(decay, rows[i][e], beta * (k_row * v[e]));
                    store_state_row<Aligned>(g_row + i * a.V, rows[i], a.V - v_col);
                    if (Aligned && !last) store_vector(stage + (r + i) * kMaxWidth, rows[i]);
                }
            }
#pragma unroll
            for (int query = 0; query < kQueries; ++query) {
                if (query >= count) break;
#pragma unroll
                for (int i = 0; i < kBatch; ++i) {
                    const float x = sm.x[query][first_row + r + i];
#pragma unroll
                    for (int e = 0; e < 4; ++e) o[query][e] = fmaf(x, rows[i][e], o[query][e]);
                }
            }
        }
#pragma unroll 1
        for (int query = 0; query < count; ++query) {
            float(&partial)[kWarps][kMaxWidth + 4] = sm.partial[query % 2];
#pragma unroll
            for (int i = 0; i < kQueries; ++i)
                if (i == query) store_vector(&partial[warp][v_col], o[i]);
            __syncthreads();
            static_assert(kMaxWidth <= kWarps * 32);
            if (int(threadIdx.x) < a.V) {
                float sum = 0.f;
#pragma unroll
                for (int w = 0; w < kWarps; ++w) sum += partial[w][threadIdx.x];
                set_row_value(a.out, b, head * queries + first + query, threadIdx.x, sum);
            }
        }
    };

    for (int first = 0;; first += kQueries) {
        const int count = min(kQueries, queries - first);
        for (int query = 0; query < count; ++query) {
            const float q_own = converted(q_bits, a.q.dtype);
            float(&q)[KP] = sm.q[(first + query) % 2];
            if (first + query > 0) {
                if (lane < kRows) q[own] = q_own;
                __syncthreads();
            }
            if (first + query + 1 < queries) q_bits = fetch_row_value(a.q, b, head * queries + first + query + 1, own);
            float p[kCols], inverse[kCols], amax = 0.f, rz = 0.f;
            load_vector(p, &q[col]);
            load_vector(inverse, &sm.inverse[col]);
#pragma unroll
            for (int e = 0; e < kCols; ++e) amax = fmaxf(amax, fabsf(p[e]));
            const Pow2Scale scale = scale_to(warp_max(amax), 0);
#pragma unroll
            for (int e = 0; e < kCols; ++e) {
                const float r = p[e] * scale.up;
                p[e] = r * inverse[e];
                rz = fmaf(r, p[e], rz);
            }
            float r_own = q_own * scale.up, p_own = r_own * inverse_own, x_own = 0.f;
            CgRow<float> row(warp_sum(rz));
            for (int step = 0; step < a.max_iterations && row.active(); ++step) {
                // A p: lamb p is left to the warp that owns the element.
                if (lane < kRows) sm.direction[own] = p_own;
                __syncwarp();
                const float lamb_p = lamb_own * p_own;
                float ap[kCols] = {}, pAp = lane < kRows ? lamb_p * p_own : 0.f;
#pragma unroll
                for (int r = 0; r < kRows; r += 4) {
                    float p_row[4];
                    load_vector(p_row, &sm.direction[first_row + r]);
#pragma unroll
                    for (int i = 0; i < 4; ++i)
#pragma unroll
                        for (int e = 0; e < kCols; ++e) ap[e] = fmaf(p_row[i], h[r + i][e], ap[e]);
                }
                store_vector(&sm.partial[0][warp][col], ap);
#pragma unroll
                for (int e = 0; e < kCols; ++e) pAp = fmaf(p[e], ap[e], pAp);
                pAp = warp_sum(pAp);
                if (lane == 0) sm.pAp[warp] = pAp;
                __syncthreads();

                const float* shares = &sm.partial[0][lane / kRows * (kWarps / kSharers)][own];
                float ap_own = shares[0];
#pragma unroll
                for (int w = 1; w < kWarps / kSharers; ++w) ap_own += shares[w * (kMaxWidth + 4)];
#pragma unroll
                for (int d = kRows; d < 32; d *= 2) ap_own += __shfl_xor_sync(0xffffffffu, ap_own, d);
                ap_own += lamb_p;
                const float alpha = row.alpha(sum_shares(sm.pAp));
                x_own = fmaf(alpha, p_own, x_own);
                r_own = fmaf(-alpha, ap_own, r_own);
                const float z_own = r_own * inverse_own;
                if (lane < kRows) sm.z[own] = z_own;
                float rz_share = r_own * z_own;
#pragma unroll
                for (int d = kRows / 2; d; d /= 2) rz_share += __shfl_xor_sync(0xffffffffu, rz_share, d);
                if (lane == 0) sm.rz[warp] = rz_share;
                __syncthreads();

                const float beta_cg = row.advance(sum_shares(sm.rz), tol_squared);
                p_own = fmaf(beta_cg, p_own, z_own);
                float z[kCols];
                load_vector(z, &sm.z[col]);
#pragma unroll
                for (int e = 0; e < kCols; ++e) p[e] = fmaf(beta_cg, p[e], z[e]);
            }
            if (lane < kRows) sm.x[query][own] = x_own * scale.down;
        }
        if (first + kQueries >= queries) {
            // A copy of its own, since H's registers are free here.
            read_out(std::integral_constant<int, 8>(), first, count, true);
            return;
        }
        read_out(std::integral_constant<int, 2>(), first, count, false);
        __syncthreads();  // `partial` is free again
    }
}

template <int KP>
cudaError_t launch_decode_kernel(const DecodeArgs& a, cudaStream_t stream) {
    const int64_t blocks = int64_t(a.B) * a.HS;
    const auto aligned = [](const float* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
    if (a.K % (KP / 32) == 0 && a.V % 4 == 0 && aligned(a.h_kk) && aligned(a.h_kv))
        return launch(decode_kernel<KP, true>, a, blocks, KP * kMaxWidth * sizeof(float), stream, kWarps * 32);
    return launch(decode_kernel<KP, false>, a, blocks, 0, stream, kWarps * 32);
}

}  // namespace

cudaError_t launch_decode(const DecodeArgs& a, cudaStream_t stream) {
    return a.K <= 64 ? launch_decode_kernel<64>(a, stream) : launch_decode_kernel<128>(a, stream);
}

}  // namespace mesa
