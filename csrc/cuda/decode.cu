// decode: one token for every sequence, or a piece of a few, one after the other. States in fp32 are read and written
// once, the system is solved with the same rules as in the chunked path (cg.h), and the output is read from the updated
// G. Each token is computed as in a call of its own, so that a piece gives, bit for bit, what single steps do. Narrow
// heads have a kernel of their own (decode_narrow.cu).
//
// One block owns a sequence and state head. All that it reads is asked for at once: H comes to registers, a warp
// holding 16 rows, a lane the same KP / 32 columns of each (so a block has 8 or 4 warps); G comes to shared memory
// while the system is being solved, every thread fetching what it will use itself. So the memory has work while the
// warps compute. In a piece both stay where they are from token to token.
//
// Since H is symmetric, H p is taken as the sum of p_i times row i: no shuffles, but an exchange between the warps, of
// which each sums the elements of its own rows only and keeps r and x for these. A step has two barriers: one for the
// shares of A p and p.Ap, one for z and the shares of r.z. All warps keep p, spread over the lanes, and take the same
// scalar steps, from the same numbers summed in the same order.
#include <type_traits>

#include "../cg.h"
#include "chunk.cuh"
#include "token.cuh"

namespace mesa {
namespace {

constexpr int kRows = 16;  // of H and G to a warp

template <int KP>
constexpr int kWarps = KP / kRows;

enum class Kind {
    step,         // one token in place
    packed_step,  // the same with H packed
    piece,        // T tokens, from a state that may be none to one that may be none
};

// Heads of a query group that are read out together; in a piece there are too few registers for more than one.
template <Kind kind>
constexpr int kQueries = kind == Kind::piece ? 1 : 4;

template <int KP, Kind kind>
struct alignas(16) Shared {
    // Every warp's share of a sum over all rows. Padded, so that a warp reads its columns of two shares at once from
    // different banks.
    float partial[2][kWarps<KP>][kMaxWidth + 4];
    float k[KP], v[kMaxWidth];
    float q[2][KP];     // of one query and the next
    float inverse[KP];  // of lamb
    float z[KP];
    // Of these, warps read only the elements of their own rows: no barrier needed.
    float direction[KP];
    float x[kQueries<kind>][KP];
    float pAp[kWarps<KP>], rz[kWarps<KP>];  // shares of the dot products
    float decay, beta;                      // behind the arrays, which are read up to four numbers at a time
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

// The sum of every warp's share, in the same order for all.
template <int N>
__device__ __forceinline__ float sum_shares(const float (&shares)[N]) {
    float sum[N];
#pragma unroll
    for (int i = 0; i < N; i += 4) load_vector(reinterpret_cast<float(&)[4]>(sum[i]), shares + i);
#pragma unroll
    for (int half = N / 2; half; half /= 2)
#pragma unroll
        for (int i = 0; i < half; ++i) sum[i] = sum[2 * i] + sum[2 * i + 1];
    return sum[0];
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

// Blocks on a multiprocessor, as many as registers (128 a thread in a piece) and shared memory allow. (Six leave up
// to 32 bytes of stack, which the solver's steps do without.)
template <int KP, int VP, Kind kind>
constexpr int kBlocks = kind == Kind::piece || KP == 128 ? 256 / KP : VP == 128 ? 5 : 6;

template <int KP, int VP, bool Aligned, Kind kind>
__global__ void __launch_bounds__(kWarps<KP> * 32, kBlocks<KP, VP, kind>)
    decode_kernel(const __grid_constant__ DecodeArgs a) {
    constexpr bool Piece = kind == Kind::piece, Packed = kind == Kind::packed_step;
    constexpr int kCols = KP / 32, kBlockThreads = kWarps<KP> * 32, kPitch = VP;
    constexpr int kSharers = 32 / kRows;  // lanes to an element of the warp's own rows
    constexpr int kTogether = kQueries<kind>;
    __shared__ Shared<KP, kind> shared;
    auto& sm = *ptx::opaque_shared(&shared);
    MESA_DYNAMIC_SHARED(dynamic_shared);
    // Opaque, or with so few registers left they would be made anew in every step.
    const int lane = ptx::opaque(threadIdx.x % 32), warp = ptx::opaque(threadIdx.x / 32);
    const int queries = a.HO / a.HS;
    const int first_row = warp * kRows, own = first_row + lane % kRows;
    const int col = lane * kCols, v_col = lane * 4;
    // The sequence and head, in a piece made anew for every token: kept, they would fill registers.
    struct Place {
        int b, head;
    };
    const auto place = [&] {
        const int block = Piece ? ptx::opaque(int(blockIdx.x)) : int(blockIdx.x);
        return Place{block / a.HS, block % a.HS};
    };

    // Everything is asked for before anything is used; what the row of the pool does not matter for, first.
    const int64_t pool_row = a.state_indices ? a.state_indices[place().b] : place().b;
    const auto state = [&] { return (Piece ? place().b : pool_row) * a.HS + place().head; };
    const int tokens = Piece ? a.T : 1;
    float g, beta;
    uint32_t k_bits, v_bits, q_bits;
    const auto fetch_token = [&](int t) {
        const auto [b, head] = place();
        const int64_t at = (int64_t(b) * tokens + t) * a.HS + head;
        g = a.g[at], beta = a.beta[at];
        k_bits = fetch_row_value(a.k, b, t, head, own);
        v_bits = fetch_row_value(a.v, b, t, head, threadIdx.x);
        q_bits = fetch_row_value(a.q, b, t, head * queries, own);
    };
    fetch_token(0);
    const float lamb_own = own < a.K ? a.lamb[int64_t(place().head) * a.K + own] : 1.f;
    if (pool_row < 0 || pool_row >= a.pool) {
        const auto [b, head] = place();
#pragma unroll 1
        for (int i = threadIdx.x; i < queries * a.V; i += kBlockThreads)
            set_row_value(a.out, b, 0, head * queries + i / a.V, i % a.V, 0.f);
        return;  // a piece skips none
    }

    float h[kRows][kCols];
    const int h_rows = col < a.K ? a.K - first_row : 0;  // of which the lane has elements
    const auto h_first = [&] { return (state() * a.K + first_row) * a.K + col; };
    // Packed, a warp's rows are those of a tile; below the diagonal, the columns of another.
    static_assert(kRows == kTile);
    const int row_tile = warp, col_tile = col / kTile;
    const auto tile = [&](int i, int j) {  // i <= j
        return (state() * packed_tiles(a.K) + packed_tile(a.K, i, j)) * kTile * kTile;
    };
    const bool in_tiles = max(row_tile, col_tile) * kTile < a.K;
    if constexpr (Packed) {
#pragma unroll
        for (int r = 0; r < kRows; ++r)
#pragma unroll
            for (int e = 0; e < kCols; ++e) h[r][e] = 0.f;
        if (in_tiles && row_tile <= col_tile) {
            const float* const from = a.start_kk + tile(row_tile, col_tile) + col % kTile;
#pragma unroll
            for (int r = 0; r < kRows; ++r) load_vector(h[r], from + r * kTile);
        } else if (in_tiles) {
            const float* const from = a.start_kk + tile(col_tile, row_tile) + col % kTile * kTile;
#pragma unroll
            for (int e = 0; e < kCols; ++e)
#pragma unroll
                for (int r = 0; r < kRows; r += 4) {
                    float part[4];
                    load_vector(part, from + e * kTile + r);
#pragma unroll
                    for (int i = 0; i < 4; ++i) h[r + i][e] = part[i];
                }
        }
    } else {
        const bool from_zero = Piece && !a.start_kk;
        const float* h_row = ptx::opaque_global(a.start_kk + h_first());
#pragma unroll
        for (int r = 0; r < kRows; ++r, h_row = ptx::opaque_global(h_row + a.K)) {
#pragma unroll
            for (int e = 0; e < kCols; ++e) h[r][e] = 0.f;
            if (r < h_rows && !from_zero) load_state_row<Aligned>(h[r], h_row, a.K - col);
        }
    }
    const float inverse_own = __frcp_rn(lamb_own);
    if (lane < kRows) sm.inverse[own] = inverse_own;

    // The rows of G, the lanes taking the columns four by four.
    const auto g_first = [&] { return (state() * a.K + first_row) * a.V + v_col; };
    const int g_rows = v_col < a.V ? a.K - first_row : 0;
    const auto stage_of_thread = [&] {
        return reinterpret_cast<float*>(dynamic_shared) + ptx::opaque(first_row) * kPitch + v_col;
    };
    const auto fetch_g = [&] {
        float* const stage = stage_of_thread();
        const bool from_zero = Piece && !a.start_kv;
        const float* g_row = ptx::opaque_global(a.start_kv + g_first());
#pragma unroll
        for (int r = 0; r < kRows; ++r, g_row = ptx::opaque_global(g_row + a.V)) {
            if (r >= g_rows) continue;
            if (from_zero) {
                store_vector(stage + r * kPitch, {0.f, 0.f, 0.f, 0.f});
            } else if constexpr (Aligned) {
                ptx::cp_async16(stage + r * kPitch, g_row);
            } else {
                float row[4];
                load_state_row<false>(row, g_row, a.V - v_col);
                store_vector(stage + r * kPitch, row);
            }
        }
        ptx::cp_async_commit();
    };

    // H <- decay H + beta k k'
    const auto update_h = [&](bool last) {
        const float decay = sm.decay, beta = sm.beta;
        float k[kCols];
        load_vector(k, &sm.k[col]);
        // Kept, the predicates would fill registers. Tiles are stored whole, by those that have them as they lie.
        const int rows_here = Packed ? (in_tiles && row_tile <= col_tile ? kRows : 0) : h_rows;
        const int rows_to_store = ptx::opaque(last && a.end_kk ? rows_here : 0);
        float* h_row = ptx::opaque_global(
            a.end_kk +
            (Packed ? tile(row_tile, col_tile) + col % kTile : h_first()));
#pragma unroll
        for (int r = 0; r < kRows; r += 4) {
            float k_row[4];
            load_vector(k_row, &sm.k[first_row + r]);
#pragma unroll
            for (int i = 0; i < 4; ++i, h_row = ptx::opaque_global(h_row + (Packed ? kTile : a.K))) {
#pragma unroll
                for (int e = 0; e < kCols; ++e) h[r + i][e] = fmaf(decay, h[r + i][e], beta * (k_row[i] * k[e]));
                if (r + i < rows_to_store) store_state_row<Aligned || Packed>(h_row, h[r + i], a.K - col);
            }
        }
    };

    // G <- decay G + beta k v' (with the first queries; kept in shared memory if others follow), o = G' x, `batch` rows
    // of a warp together.
    const auto read_out = [&](auto batch, int t, int first, int count, bool last) {
        constexpr int kBatch = decltype(batch)::value;
        const int v_col = ptx::opaque(lane) * 4;  // made anew, not kept over the solve
        if constexpr (Aligned) ptx::cp_async_wait<0>();
        __syncwarp();
        float* const stage = stage_of_thread();
        float o[kTogether][4] = {};
        const bool store = t + 1 == tokens && a.end_kv;
        float* g_row = ptx::opaque_global(a.end_kv + g_first());
#pragma unroll 1
        for (int r = 0; r < kRows; r += kBatch, g_row += kBatch * a.V) {
            float rows[kBatch][4] = {};
#pragma unroll
            for (int i = 0; i < kBatch; ++i) {
                if (r + i >= g_rows) continue;
                load_vector(rows[i], stage + (r + i) * kPitch);
            }
            if (first == 0) {
                const float decay = sm.decay, beta = sm.beta;
                float v[4];
                load_vector(v, &sm.v[v_col]);
#pragma unroll
                for (int i = 0; i < kBatch; ++i) {
                    if (r + i >= g_rows) continue;
                    const float k_row = sm.k[first_row + r + i];
#pragma unroll
                    for (int e = 0; e < 4; ++e) rows[i][e] = fmaf(decay, rows[i][e], beta * (k_row * v[e]));
                    if (store) store_state_row<Aligned>(g_row + i * a.V, rows[i], a.V - v_col);
                    if (!last) store_vector(stage + (r + i) * kPitch, rows[i]);
                }
            }
#pragma unroll
            for (int query = 0; query < kTogether; ++query) {
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
            auto& partial = sm.partial[query % 2];
#pragma unroll
            for (int i = 0; i < kTogether; ++i)
                if (i == query) store_vector(&partial[warp][v_col], o[i]);
            __syncthreads();
            static_assert(kMaxWidth <= kBlockThreads);
            if (int(threadIdx.x) < a.V) {
                float sum = 0.f;
#pragma unroll
                for (int w = 0; w < kWarps<KP>; ++w) sum += partial[w][threadIdx.x];
                const auto [b, head] = place();
                set_row_value(a.out, b, t, head * queries + first + query, threadIdx.x, sum);
            }
        }
    };

    const float tol_squared = a.tolerance * a.tolerance;
    int t = 0;
    const auto begin_token = [&] {
        // All warps want these whole; of the token before, nobody does any more.
        if (lane < kRows) {
            const int element = ptx::opaque(own);
            sm.k[element] = converted(k_bits, a.k.dtype);
            sm.q[0][element] = converted(q_bits, a.q.dtype);
        }
        if (threadIdx.x < kMaxWidth) sm.v[threadIdx.x] = converted(v_bits, a.v.dtype);
        if (threadIdx.x == 0) sm.decay = expf(g), sm.beta = beta;
        __syncthreads();
        if (t == 0) fetch_g();  // here, since the compiler leaves H's loads before a barrier, and not before G's
        update_h(t + 1 == tokens);
    };
    begin_token();  // here and at the end of the loop: once, at its beginning, it would cost registers

    for (int first = 0;;) {
        const int count = min(kTogether, queries - first);
        for (int query = 0; query < count; ++query) {
            const float q_own = converted(q_bits, a.q.dtype);
            float(&q)[KP] = sm.q[(first + query) % 2];
            if (first + query > 0) {
                if (lane < kRows) q[own] = q_own;
                __syncthreads();
            }
            if (first + query + 1 < queries)
                q_bits = fetch_row_value(a.q, place().b, t, place().head * queries + first + query + 1, own);
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
            float r_own = q_own * scale.up, p_own = r_own * sm.inverse[own], x_own = 0.f;
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

                const float* shares = &sm.partial[0][lane / kRows * (kWarps<KP> / kSharers)][own];
                float ap_own = shares[0];
#pragma unroll
                for (int w = 1; w < kWarps<KP> / kSharers; ++w) ap_own += shares[w * (kMaxWidth + 4)];
#pragma unroll
                for (int d = kRows; d < 32; d *= 2) ap_own += __shfl_xor_sync(0xffffffffu, ap_own, d);
                ap_own += lamb_p;
                const float alpha = row.alpha(sum_shares(sm.pAp));
                x_own = fmaf(alpha, p_own, x_own);
                r_own = fmaf(-alpha, ap_own, r_own);
                const float z_own = r_own * sm.inverse[own];
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
            if (Piece && threadIdx.x == 0) {
                const auto [b, head] = place();
                const int64_t at = (int64_t(b) * tokens + t) * a.HO + head * queries + first + query;
                if (a.steps) a.steps[at] = row.steps();
                if (a.bound) a.bound[at] = sqrtf(row.bound_squared());
            }
        }
        const bool last = first + kTogether >= queries;
        if (last && t + 1 == tokens) {
            // A copy of its own, since H's registers are free here.
            read_out(std::integral_constant<int, 8>(), t, first, count, true);
            return;
        }
        read_out(std::integral_constant<int, Piece ? 4 : 2>(), t, first, count, false);
        first += kTogether;
        if (Piece && last) {
            first = 0;
            fetch_token(++t);
            begin_token();
        } else {
            __syncthreads();  // `partial` is free again
        }
    }
}

template <int KP, int VP, bool Aligned>
cudaError_t launch_decode_kernel(const DecodeArgs& a, cudaStream_t stream) {
    const bool step = a.T == 1 && a.end_kk && a.start_kk == a.end_kk && a.start_kv == a.end_kv && !a.steps && !a.bound;
    const auto kernel = a.packed ? decode_kernel<KP, VP, Aligned, Kind::packed_step>
                        : step   ? decode_kernel<KP, VP, Aligned, Kind::step>
                                 : decode_kernel<KP, VP, Aligned, Kind::piece>;
    if (a.packed && !step) return cudaErrorInvalidValue;
    return launch(kernel, a, int64_t(a.B) * a.HS, KP * VP * sizeof(float), stream, kWarps<KP> * 32);
}

template <int KP, int VP>
cudaError_t launch_decode_kernel(const DecodeArgs& a, cudaStream_t stream) {
    const auto multiple_of_16 = [](const float* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
    const bool kk_aligned = multiple_of_16(a.start_kk) && multiple_of_16(a.end_kk);
    const bool kv_aligned = multiple_of_16(a.start_kv) && multiple_of_16(a.end_kv) && a.V % 4 == 0;
    if (a.packed && !kk_aligned) return cudaErrorMisalignedAddress;
    const bool aligned = kv_aligned && kk_aligned && (a.packed || a.K % (KP / 32) == 0);
    return aligned ? launch_decode_kernel<KP, VP, true>(a, stream) : launch_decode_kernel<KP, VP, false>(a, stream);
}

}  // namespace

cudaError_t launch_decode(const DecodeArgs& a, cudaStream_t stream) {
    if (a.K <= 32 && a.V <= 64) return launch_narrow_decode(a, stream);
    if (a.K > 64) return launch_decode_kernel<128, 128>(a, stream);
    return a.V > 64 ? launch_decode_kernel<64, 128>(a, stream) : launch_decode_kernel<64, 64>(a, stream);
}

}  // namespace mesa
