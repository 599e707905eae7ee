// decode: one token for every sequence. States in fp32 are updated in place, the system is solved with the same rules
// as in the chunked path (cg.h), and the output is read from the updated G.
//
// One block of 8 warps owns a sequence and state head. H stays in registers: a warp holds KP / 8 rows, a lane the same
// KP / 32 columns of each. Since H is symmetric, H p is taken as the sum of p_i times row i: no shuffles, one exchange
// between the warps through shared memory. All vectors are spread over the lanes and kept by every warp alike.
#include "../cg.h"
#include "chunk.cuh"

namespace mesa {
namespace {

constexpr int kWarps = 8;
constexpr int kQueries = 4;  // heads of a query group that are read out together

template <int KP>
struct Shared {
    float partial[2][kWarps][kMaxWidth];
    float direction[kWarps][KP];  // a copy for every warp, so that a step needs one barrier
    float k[KP];
    float x[kQueries][KP];
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

// Element `col` of a [B, 1, heads, width] tensor's row, zero past the width.
__device__ __forceinline__ float row_value(const Rows& m, int b, int head, int col) {
    if (col >= m.width) return 0.f;
    const int64_t at = b * m.batch_stride + (head / m.group) * m.head_stride + col;
    switch (m.dtype) {
        case DType::f16: return __half2float(static_cast<const __half*>(m.data)[at]);
        case DType::bf16: return __bfloat162float(static_cast<const __nv_bfloat16*>(m.data)[at]);
        default: return static_cast<const float*>(m.data)[at];
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

// N elements of a row from column col on; zero past the width.
template <int N>
__device__ __forceinline__ void load_state_row(float (&v)[N], const float* row, int col, int width, bool vectors) {
    if (vectors && col < width) {
        if constexpr (N == 4) {
            const float4 f = *reinterpret_cast<const float4*>(row + col);
            v[0] = f.x, v[1] = f.y, v[2] = f.z, v[3] = f.w;
        } else {
            const float2 f = *reinterpret_cast<const float2*>(row + col);
            v[0] = f.x, v[1] = f.y;
        }
        return;
    }
#pragma unroll
    for (int e = 0; e < N; ++e) v[e] = col + e < width ? row[col + e] : 0.f;
}

template <int N>
__device__ __forceinline__ void store_state_row(float* row, const float (&v)[N], int col, int width, bool vectors) {
    if (vectors && col < width) {
        if constexpr (N == 4) *reinterpret_cast<float4*>(row + col) = {v[0], v[1], v[2], v[3]};
        else *reinterpret_cast<float2*>(row + col) = {v[0], v[1]};
        return;
    }
#pragma unroll
    for (int e = 0; e < N; ++e)
        if (col + e < width) row[col + e] = v[e];
}

template <int KP>
__global__ void __launch_bounds__(kWarps * 32, 2) decode_kernel(const __grid_constant__ DecodeArgs a) {
    constexpr int kRows = KP / kWarps, kCols = KP / 32;
    __shared__ Shared<KP> sm;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int b = blockIdx.x / a.HS, head = blockIdx.x % a.HS;
    const int queries = a.HO / a.HS;
    const int64_t state = a.state_indices ? a.state_indices[b] : b;
    if (state < 0 || state >= a.pool) {
        for (int i = threadIdx.x; i < queries * a.V; i += kWarps * 32)
            set_row_value(a.out, b, head * queries + i / a.V, i % a.V, 0.f);
        return;
    }

    const float decay = expf(a.g[int64_t(b) * a.HS + head]), beta = a.beta[int64_t(b) * a.HS + head];
    for (int i = threadIdx.x; i < KP; i += kWarps * 32) sm.k[i] = row_value(a.k, b, head, i);
    __syncthreads();

    // H <- decay H + beta k k'
    const int col = lane * kCols;
    const bool vectors = a.K % kCols == 0;
    float* const h_kk = a.h_kk + (state * a.HS + head) * a.K * a.K;
    float h[kRows][kCols], lamb[kCols];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
        const int row = warp * kRows + r;
        if (row < a.K) load_state_row(h[r], h_kk + int64_t(row) * a.K, col, a.K, vectors);
#pragma unroll
        for (int e = 0; e < kCols; ++e)
            h[r][e] = row < a.K ? fmaf(decay, h[r][e], beta * (sm.k[row] * sm.k[col + e])) : 0.f;
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
        const int row = warp * kRows + r;
        if (row < a.K) store_state_row(h_kk + int64_t(row) * a.K, h[r], col, a.K, vectors);
    }
#pragma unroll
    for (int e = 0; e < kCols; ++e) lamb[e] = col + e < a.K ? a.lamb[int64_t(head) * a.K + col + e] : 1.f;

    float* const h_kv = a.h_kv + (state * a.HS + head) * a.K * a.V;
    const float tol_squared = a.tolerance * a.tolerance;
    for (int first = 0; first < queries; first += kQueries) {
        const int count = min(kQueries, queries - first);
        for (int query = 0; query < count; ++query) {
            const int out_head = head * queries + first + query;
            float r[kCols], p[kCols], x[kCols], amax = 0.f, rz = 0.f;
#pragma unroll
            for (int e = 0; e < kCols; ++e) {
                r[e] = row_value(a.q, b, out_head, col + e);
                amax = fmaxf(amax, fabsf(r[e]));
            }
            const Pow2Scale scale = scale_to(warp_max(amax), 0);
#pragma unroll
            for (int e = 0; e < kCols; ++e) {
                r[e] *= scale.up;
                p[e] = __fdividef(r[e], lamb[e]);
                x[e] = 0.f;
                rz = fmaf(r[e], p[e], rz);
            }
            CgRow<float> row(warp_sum(rz));
            for (int step = 0; step < a.max_iterations && row.active; ++step) {
#pragma unroll
                for (int e = 0; e < kCols; ++e) sm.direction[warp][col + e] = p[e];
                __syncwarp();
                float ap[kCols] = {};
#pragma unroll
                for (int i = 0; i < kRows; ++i) {
                    const float pi = sm.direction[warp][warp * kRows + i];
#pragma unroll
                    for (int e = 0; e < kCols; ++e) ap[e] = fmaf(pi, h[i][e], ap[e]);
                }
                float(&partial)[kWarps][kMaxWidth] = sm.partial[step % 2];
#pragma unroll
                for (int e = 0; e < kCols; ++e) partial[warp][col + e] = ap[e];
                __syncthreads();
                float pAp = 0.f;
#pragma unroll
                for (int e = 0; e < kCols; ++e) {
                    ap[e] = lamb[e] * p[e];
#pragma unroll
                    for (int w = 0; w < kWarps; ++w) ap[e] += partial[w][col + e];
                    pAp = fmaf(p[e], ap[e], pAp);
                }
                const float alpha = row.alpha(warp_sum(pAp));
                rz = 0.f;
#pragma unroll
                for (int e = 0; e < kCols; ++e) {
                    x[e] = fmaf(alpha, p[e], x[e]);
                    r[e] = fmaf(-alpha, ap[e], r[e]);
                    rz = fmaf(r[e], __fdividef(r[e], lamb[e]), rz);
                }
                const float beta_cg = row.advance(warp_sum(rz), tol_squared);
#pragma unroll
                for (int e = 0; e < kCols; ++e) p[e] = fmaf(beta_cg, p[e], __fdividef(r[e], lamb[e]));
            }
            __syncthreads();  // `partial` and, of the last group, x are free again
            if (warp == 0)
#pragma unroll
                for (int e = 0; e < kCols; ++e) sm.x[query][col + e] = x[e] * scale.down;
        }
        __syncthreads();

        // G <- decay G + beta k v' (once), o = G' x. The lanes take the V columns four by four, warps the rows.
        const int v_col = lane * 4;
        const bool v_vectors = a.V % 4 == 0;
        float v[4], o[kQueries][4] = {};
#pragma unroll
        for (int e = 0; e < 4; ++e) v[e] = row_value(a.v, b, head, v_col + e);
#pragma unroll 4
        for (int i = 0; i < kRows; ++i) {
            const int row = warp * kRows + i;
            if (row >= a.K) break;
            float g[4];
            load_state_row(g, h_kv + int64_t(row) * a.V, v_col, a.V, v_vectors);
            if (first == 0) {
#pragma unroll
                for (int e = 0; e < 4; ++e) g[e] = fmaf(decay, g[e], beta * (sm.k[row] * v[e]));
                store_state_row(h_kv + int64_t(row) * a.V, g, v_col, a.V, v_vectors);
            }
#pragma unroll
            for (int query = 0; query < kQueries; ++query)
                if (query < count)
#pragma unroll
                    for (int e = 0; e < 4; ++e) o[query][e] = fmaf(sm.x[query][row], g[e], o[query][e]);
        }
#pragma unroll
        for (int query = 0; query < kQueries; ++query) {
            if (query >= count) break;
            float(&partial)[kWarps][kMaxWidth] = sm.partial[query % 2];
#pragma unroll
            for (int e = 0; e < 4; ++e) partial[warp][v_col + e] = o[query][e];
            __syncthreads();
            const int out_head = head * queries + first + query;
            for (int i = threadIdx.x; i < a.V; i += kWarps * 32) {
                float sum = 0.f;
#pragma unroll
                for (int w = 0; w < kWarps; ++w) sum += partial[w][i];
                set_row_value(a.out, b, out_head, i, sum);
            }
        }
        __syncthreads();
    }
}

template <int KP>
cudaError_t launch_decode_kernel(const DecodeArgs& a, cudaStream_t stream) {
    return launch(decode_kernel<KP>, a, int64_t(a.B) * a.HS, 0, stream, kWarps * 32);
}

}  // namespace

cudaError_t launch_decode(const DecodeArgs& a, cudaStream_t stream) {
    return a.K <= 64 ? launch_decode_kernel<64>(a, stream) : launch_decode_kernel<128>(a, stream);
}

}  // namespace mesa
