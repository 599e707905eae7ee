// Decode for narrow heads, with the rules of decode.cu: K <= 32 and V <= 64. What takes time there is the length of the
// chain from the first load to the last store, so that here nothing waits for another warp: 16 or 32 lanes own a
// sequence and head, each with a column of H and some of G in its registers. Vectors that all rows want go through a
// few words of shared memory, dot products through shuffles.
#include "../cg.h"
#include "chunk.cuh"
#include "token.cuh"

namespace mesa {
namespace {

constexpr int kNarrowThreads = 64;

// Blocks on a multiprocessor, as many as the states' registers allow.
template <int KP, int VColumns>
constexpr int kNarrowBlocks = KP * (1 + VColumns) == 32 ? 10 : KP * (1 + VColumns) == 64 ? 8 : VColumns == 4 ? 6 : 4;

// KP lanes to a head; a lane has columns own, own + KP, .. of G.
template <int KP, int VColumns, bool Packed>
__global__ void __launch_bounds__(kNarrowThreads, kNarrowBlocks<KP, VColumns>)
    narrow_decode_kernel(const __grid_constant__ DecodeArgs a) {
    constexpr int kHeads = kNarrowThreads / KP;
    struct alignas(16) Vectors {
        float of[2][kHeads][KP];
    };
    __shared__ Vectors vectors;
    const int own = threadIdx.x % KP, in_block = threadIdx.x / KP, queries = a.HO / a.HS;
    // The sequence and head, made anew where they are wanted: kept, they would fill registers.
    struct Place {
        int b, head;
    };
    const int heads = a.B * a.HS;
    const auto place = [&] {
        const int at = min(int(ptx::opaque(blockIdx.x)) * kHeads + in_block, heads - 1);
        return Place{at / a.HS, at % a.HS};
    };
    const bool is_head = int(blockIdx.x) * kHeads + in_block < heads;  // all lanes of a warp stay, for its shuffles
    const auto [first_b, first_head] = place();
    const int64_t pool_row = a.state_indices ? a.state_indices[first_b] : first_b;
    const bool has_state = is_head && pool_row >= 0 && pool_row < a.pool;
    const int64_t state = has_state ? pool_row * a.HS + first_head : 0;

    // Everything is asked for before anything is used.
    float g, beta;
    uint32_t k_bits, q_bits, v_bits[VColumns];
    const auto fetch_token = [&](int t) {
        const auto [b, head] = place();
        const int64_t at = (int64_t(b) * a.T + t) * a.HS + head;
        g = a.g[at], beta = a.beta[at];
        k_bits = fetch_row_value(a.k, b, t, head, own);
        q_bits = fetch_row_value(a.q, b, t, head * queries, own);
#pragma unroll
        for (int j = 0; j < VColumns; ++j) v_bits[j] = fetch_row_value(a.v, b, t, head, own + j * KP);
    };
    fetch_token(0);
    const float lamb = own < a.K ? a.lamb[int64_t(first_head) * a.K + own] : 1.f;

    // Rows and columns that this lane has something of. Addresses go from row to row, opaque: the compiler would keep
    // one for every row.
    const auto rows_of_h = [&] { return has_state && ptx::opaque(own) < a.K ? a.K : 0; };
    const auto rows_of_g = [&] { return has_state ? a.K : 0; };
    const auto columns_of_g = [&] { return (a.V - ptx::opaque(own) + KP - 1) / KP; };
    // Packed, the part of H at and above this column's tile lies as it is, the rest as rows of other tiles.
    const int col_tile = own / kTile;
    const auto tile = [&](int i, int j) {
        return (state * packed_tiles(a.K) + packed_tile(a.K, i, j)) * kTile * kTile;
    };
    float h[KP] = {};
    if (a.start_kk) {
        const int h_rows = rows_of_h();
        if constexpr (Packed) {
#pragma unroll
            for (int i = 0; i < KP / kTile; ++i) {
                if (i * kTile >= h_rows) continue;
                const int step = i <= col_tile ? kTile : 1;
                const float* from = ptx::opaque_global(a.start_kk + tile(min(i, col_tile), max(i, col_tile)) +
                                                       own % kTile * (kTile + 1 - step));
#pragma unroll
                for (int r = 0; r < kTile; ++r, from = ptx::opaque_global(from + step)) h[i * kTile + r] = *from;
            }
        } else {
            const float* from = ptx::opaque_global(a.start_kk + state * a.K * a.K + own);
#pragma unroll
            for (int r = 0; r < KP; ++r, from = ptx::opaque_global(from + a.K))
                if (r < h_rows) h[r] = *from;
        }
    }
    float state_g[VColumns][KP] = {};
    if (a.start_kv) {
        const int g_rows = rows_of_g(), g_columns = columns_of_g();
        const float* from = ptx::opaque_global(a.start_kv + state * a.K * a.V + own);
#pragma unroll
        for (int r = 0; r < KP; ++r, from = ptx::opaque_global(from + a.V))
#pragma unroll
            for (int j = 0; j < VColumns; ++j)
                if (r < g_rows && j < g_columns) state_g[j][r] = from[j * KP];
    }

    const float inverse = __frcp_rn(lamb);
    int side = 0;
    // The numbers of all the head's lanes, four at a time.
    const auto every_lanes = [&](float mine) {
        float* const shared = vectors.of[side ^= 1][in_block];  // the others may still read those before
        shared[own] = mine;
        __syncwarp();
        return reinterpret_cast<const float4*>(shared);
    };
    const auto sum = [](float v) {
#pragma unroll
        for (int d = KP / 2; d; d /= 2) v += __shfl_xor_sync(0xffffffffu, v, d);
        return v;
    };
    const auto dot = [](const float4* x, const float (&y)[KP]) {
        float4 sums = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
        for (int r = 0; r < KP; r += 4) {
            const float4 four = x[r / 4];
            sums.x = fmaf(four.x, y[r], sums.x), sums.y = fmaf(four.y, y[r + 1], sums.y);
            sums.z = fmaf(four.z, y[r + 2], sums.z), sums.w = fmaf(four.w, y[r + 3], sums.w);
        }
        return (sums.x + sums.y) + (sums.z + sums.w);
    };

#pragma unroll 1
    for (int t = 0; t < a.T; ++t) {
        const bool store = t + 1 == a.T;
        {
            const float decay = expf(g), k = converted(k_bits, a.k.dtype);
            float v[VColumns];
#pragma unroll
            for (int j = 0; j < VColumns; ++j) v[j] = converted(v_bits[j], a.v.dtype);
            const float4* const all_k = every_lanes(k);
#pragma unroll
            for (int i = 0; i < KP; ++i) {
                const float4 four = all_k[i / 4];
                const float k_row = i % 4 == 0 ? four.x : i % 4 == 1 ? four.y : i % 4 == 2 ? four.z : four.w;
                h[i] = fmaf(decay, h[i], beta * (k_row * k));
#pragma unroll
                for (int j = 0; j < VColumns; ++j)
                    state_g[j][i] = fmaf(decay, state_g[j][i], beta * (k_row * v[j]));
            }
        }
        const int h_stored = ptx::opaque(store && a.end_kk ? rows_of_h() : 0);
        if constexpr (Packed) {
#pragma unroll
            for (int i = 0; i < KP / kTile; ++i) {
                if (i * kTile >= h_stored || i > col_tile) continue;
                float* to = ptx::opaque_global(a.end_kk + tile(i, col_tile) + own % kTile);
#pragma unroll
                for (int r = 0; r < kTile; ++r, to = ptx::opaque_global(to + kTile))
                    ptx::store_streaming(to, {h[i * kTile + r]});
            }
        } else {
            float* to = ptx::opaque_global(a.end_kk + state * ptx::opaque(a.K * a.K) + own);
#pragma unroll
            for (int r = 0; r < KP; ++r, to = ptx::opaque_global(to + a.K))
                if (r < h_stored) ptx::store_streaming(to, {h[r]});
        }
        const int g_stored = ptx::opaque(store && a.end_kv ? rows_of_g() : 0), columns = columns_of_g();
        float* to = ptx::opaque_global(a.end_kv + state * ptx::opaque(a.K * a.V) + own);
#pragma unroll
        for (int r = 0; r < KP; ++r, to = ptx::opaque_global(to + a.V))
#pragma unroll
            for (int j = 0; j < VColumns; ++j)
                if (r < g_stored && j < columns) ptx::store_streaming(to + j * KP, {state_g[j][r]});

#pragma unroll 1
        for (int query = 0; query < queries; ++query) {
            const float q = converted(q_bits, a.q.dtype);
            if (query + 1 < queries)
                q_bits = fetch_row_value(a.q, place().b, t, place().head * queries + query + 1, own);
            else if (!store) fetch_token(t + 1);
            float amax = fabsf(q);
#pragma unroll
            for (int d = KP / 2; d; d /= 2) amax = fmaxf(amax, __shfl_xor_sync(0xffffffffu, amax, d));
            const Pow2Scale scale = scale_to(amax, 0);
            float r = q * scale.up, p = r * inverse, x = 0.f;
            const float rz = sum(r * p);
            CgRow<float> row(has_state ? rz : 0.f);
            for (int step = 0; step < a.max_iterations && __any_sync(0xffffffffu, row.active()); ++step) {
                const float ap = fmaf(lamb, p, dot(every_lanes(p), h));
                const float alpha = row.alpha(sum(p * ap));
                x = fmaf(alpha, p, x);
                r = fmaf(-alpha, ap, r);
                const float z = r * inverse;
                const float beta_cg = row.advance(sum(r * z), a.tolerance * a.tolerance);
                p = fmaf(beta_cg, p, z);
            }
            const float4* const all_x = every_lanes(x * scale.down);
            if (!is_head) continue;
            const auto [b, head] = place();
            const int out_head = head * queries + query;
#pragma unroll
            for (int j = 0; j < VColumns; ++j)
                if (j < columns_of_g())
                    set_row_value(a.out, b, t, out_head, own + j * KP, has_state ? dot(all_x, state_g[j]) : 0.f);
            const int64_t at = (int64_t(b) * a.T + t) * a.HO + out_head;
            if (own == 0 && a.steps) a.steps[at] = row.steps();
            if (own == 0 && a.bound) a.bound[at] = sqrtf(row.bound_squared());
        }
    }
}

template <int KP, int VColumns>
cudaError_t launch_narrow(const DecodeArgs& a, cudaStream_t stream) {
    constexpr int kHeads = kNarrowThreads / KP;
    const int64_t heads = int64_t(a.B) * a.HS, blocks = (heads + kHeads - 1) / kHeads;
    if (heads > INT_MAX - kHeads) return cudaErrorInvalidConfiguration;
    const auto kernel = a.packed ? narrow_decode_kernel<KP, VColumns, true> : narrow_decode_kernel<KP, VColumns, false>;
    return launch(kernel, a, blocks, 0, stream, kNarrowThreads);
}

}  // namespace

cudaError_t launch_narrow_decode(const DecodeArgs& a, cudaStream_t stream) {
    if (a.K <= 16) return a.V <= 16 ? launch_narrow<16, 1>(a, stream) : launch_narrow<16, 4>(a, stream);
    return a.V <= 32 ? launch_narrow<32, 1>(a, stream) : launch_narrow<32, 2>(a, stream);
}

}  // namespace mesa
