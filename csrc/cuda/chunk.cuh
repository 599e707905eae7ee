// Where a chunk lies, its gates, and the way of rows from global memory into panels.
#pragma once

#include <climits>

#include <cuda_bf16.h>

#include "tile.cuh"

namespace mesa {

struct Sequence {
    int batch;          // row of the batch
    int64_t token;      // first token in that row
    int64_t length;
    int64_t first_slot;
};

struct Chunk {
    int batch;
    int64_t token;  // first token
    int length;     // 0 where the slot is not in use
};

// cu_seqlens is not trusted: whatever it holds, spans stay inside [0, T) and slots inside their array.
__device__ __forceinline__ int64_t sequence_start(const Problem& p, int n) {
    const int64_t start = p.cu_seqlens[n];
    return start < 0 ? 0 : (start > p.T ? p.T : start);
}

__device__ __forceinline__ Sequence find_sequence(const Problem& p, int n) {
    if (!p.cu_seqlens) {
        const int64_t chunks = (p.T + kChunk - 1) / kChunk;
        return {n, 0, p.T, n * chunks};
    }
    const int64_t start = sequence_start(p, n), end = sequence_start(p, n + 1);
    return {0, start, end > start ? end - start : 0, start / kChunk + n};
}

__device__ __forceinline__ Chunk chunk_of(const Sequence& s, int64_t index) {
    const int64_t left = s.length - index * kChunk;
    return {s.batch, s.token + index * kChunk, static_cast<int>(left < 0 ? 0 : (left < kChunk ? left : kChunk))};
}

__device__ __forceinline__ Chunk find_chunk(const Problem& p, int64_t slot) {
    int n;
    if (!p.cu_seqlens) {
        n = static_cast<int>(slot / ((p.T + kChunk - 1) / kChunk));
    } else {  // the last sequence that starts at or before the slot
        int low = 0, high = p.N - 1;
        while (low < high) {
            const int mid = (low + high + 1) / 2;
            if (sequence_start(p, mid) / kChunk + mid <= slot) low = mid;
            else high = mid - 1;
        }
        n = low;
    }
    const Sequence s = find_sequence(p, n);
    return slot < s.first_slot ? Chunk{s.batch, s.token, 0} : chunk_of(s, slot - s.first_slot);
}

// ---- gates ------------------------------------------------------------------------------------------------------

// Running sums of log2 decay inside the chunk, each as hi + lo: differences stay exact however large the sums are.
struct ChunkGates {
    float hi[kChunk], lo[kChunk];
    float beta[kChunk];

    // exp(g_{i+1} + ... + g_j reversed): decay from token j to token i >= j.
    __device__ __forceinline__ float decay(int i, int j) const { return ptx::exp2_approx((hi[i] - hi[j]) + (lo[i] - lo[j])); }
    __device__ __forceinline__ float decay_from_start(int i) const { return ptx::exp2_approx(hi[i] + lo[i]); }
};

// Below this exp(g) is zero in float32; -inf would make differences of sums undefined.
constexpr float kSmallestLogDecay = -128.f;

// By warp 0; tokens past the end neither decay nor enter.
__device__ __forceinline__ void load_gates(ChunkGates& out, const Gates& gates, const Problem& p, const Chunk& c, int head) {
    if (threadIdx.x >= 32) return;
    const int lane = threadIdx.x;
    double sum[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int t = lane * 2 + i;
        float g = 0.f, beta = 0.f;
        if (t < c.length) {
            const int64_t at = (c.batch * p.T + c.token + t) * gates.heads + head / gates.group;
            g = gates.g[at];
            beta = gates.beta[at];
        }
        if (g < kSmallestLogDecay) g = kSmallestLogDecay;  // leaves NaN
        out.beta[t] = beta;
        sum[i] = g * 1.4426950408889634;
    }
    double total = sum[0] + sum[1];
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
        const double other = __shfl_up_sync(0xffffffffu, total, d);
        if (lane >= d) total += other;
    }
    const double last[2] = {total - sum[1], total};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const float hi = static_cast<float>(last[i]);
        out.hi[lane * 2 + i] = hi;
        out.lo[lane * 2 + i] = static_cast<float>(last[i] - hi);
    }
}

// ---- rows -------------------------------------------------------------------------------------------------------

__device__ __forceinline__ int padded_width(const Rows& m) { return (m.width + 7) & ~7; }

__device__ __forceinline__ int64_t row_offset(const Rows& m, const Chunk& c, int token, int head) {
    return c.batch * m.batch_stride + (c.token + token) * m.token_stride + (head / m.group) * m.head_stride;
}

// Columns col .. col + 7 (col a multiple of 8); zero past the width and its padding.
template <bool Float32>
__device__ __forceinline__ void load8(float (&v)[8], const Rows& m, int64_t at, int col) {
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = 0.f;
    if (col >= m.width) return;
    if constexpr (Float32) {
        const float4* p = reinterpret_cast<const float4*>(static_cast<const float*>(m.data) + at + col);
        const float4 a = p[0], b = p[1];
        v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w, v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
    } else {
        const uint4 raw = *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(m.data) + at + col);
        const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float2 f = m.dtype == DType::f16 ? unpack(words[i])
                                                   : float2{__uint_as_float(words[i] << 16), __uint_as_float(words[i] & 0xffff0000u)};
            v[i * 2] = f.x, v[i * 2 + 1] = f.y;
        }
    }
}

__device__ __forceinline__ void load8(float (&v)[8], const Rows& m, int64_t at, int col) {
    if (m.dtype == DType::f32) load8<true>(v, m, at, col);
    else load8<false>(v, m, at, col);
}

// A warp's 16 rows from first_row on, columns col0 .. col0 + 63.
__device__ __forceinline__ void store_strip(const Rows& m, const Chunk& c, int head, int first_row, int col0, const Acc& acc, int lane) {
    const int columns = padded_width(m) - col0 - acc_col(lane, 0);  // from this lane's first one on
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int t = first_row + acc_row(lane, half);
        if (t >= c.length) continue;
        const int64_t at = row_offset(m, c, t, head) + col0 + acc_col(lane, 0);
        if (m.dtype == DType::f32) {
            float* const to = static_cast<float*>(m.data) + at;
#pragma unroll
            for (int n = 0; n < 8; ++n)
                if (n * 8 < columns) *reinterpret_cast<float2*>(to + n * 8) = {acc.c[n][half * 2], acc.c[n][half * 2 + 1]};
        } else {
            uint16_t* const to = static_cast<uint16_t*>(m.data) + at;
#pragma unroll
            for (int n = 0; n < 8; ++n) {
                const float a = acc.c[n][half * 2], b = acc.c[n][half * 2 + 1];
                const __nv_bfloat162 brain = __floats2bfloat162_rn(a, b);
                const uint32_t pair = m.dtype == DType::f16 ? pack(a, b) : reinterpret_cast<const uint32_t&>(brain);
                if (n * 8 < columns) *reinterpret_cast<uint32_t*>(to + n * 8) = pair;
            }
        }
    }
}

// Asks for the rows of a chunk, columns col0 .. col0 + columns - 1, to come to the L2 cache.
template <int Threads>
__device__ __forceinline__ void prefetch_rows(const Rows& m, const Chunk& c, int head, int col0, int columns) {
    constexpr int kLine = 128, kLanes = Threads / kChunk;  // bytes; threads for a row
    const int t = threadIdx.x / kLanes, size = m.dtype == DType::f32 ? 4 : 2, end = min(col0 + columns, m.width) * size;
    if (t >= c.length) return;
    const char* const row = static_cast<const char*>(m.data) + row_offset(m, c, t, head) * size;
    for (int at = col0 * size + threadIdx.x % kLanes * kLine; at < end; at += kLanes * kLine) ptx::prefetch_l2(row + at);
}

__device__ __forceinline__ float max_abs(const float (&v)[8]) {
    float m = 0.f;
#pragma unroll
    for (int i = 0; i < 8; ++i) m = fmaxf(m, fabsf(v[i]));
    return m;
}

// Eight numbers times `scale`, as one or two terms, into row `row`, columns col .. col + 7 of a panel.
template <int Terms>
__device__ __forceinline__ void store_panel8(__half* panel, int row, int col, const float (&v)[8], float scale) {
    uint32_t hi[4], lo[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if constexpr (Terms == 2) split(v[i * 2] * scale, v[i * 2 + 1] * scale, hi[i], lo[i]);
        else hi[i] = pack(v[i * 2] * scale, v[i * 2 + 1] * scale);
    }
    const int at = panel_offset(row, col);
    *reinterpret_cast<uint4*>(panel + at) = {hi[0], hi[1], hi[2], hi[3]};
    if constexpr (Terms == 2) *reinterpret_cast<uint4*>(panel + kPanel + at) = {lo[0], lo[1], lo[2], lo[3]};
}

// The 64 rows of a chunk, columns col0 .. col0 + 64 Panels - 1, into panels; every row is scaled by a power of two so
// that its largest element lies in [2^target, 2^(target + 1)). row_scale[t] undoes it. Eight lanes share a row. Two terms
// are for what is not exact in one: float32.
template <int Panels, int Terms, bool Float32 = Terms == 2, int Threads = kThreads>
__device__ __forceinline__ void load_rows(__half* panels, float* row_scale, const Rows& m, const Chunk& c, int head, int col0,
                                          int target) {
    constexpr int kRowsAtOnce = Threads / 8;
#pragma unroll 2  // all four of 128 threads at once would need more registers than there are
    for (int pass = 0; pass < kChunk / kRowsAtOnce; ++pass) {
        const int t = pass * kRowsAtOnce + threadIdx.x / 8, col = (threadIdx.x % 8) * 8;
        float v[Panels][8];
        float amax = 0.f;
#pragma unroll
        for (int i = 0; i < Panels; ++i) {
            const int past = t < c.length ? 0 : m.width;  // rows past the end read as zero like columns past the width
            load8<Float32>(v[i], m, row_offset(m, c, t, head), col0 + i * kChunk + col + past);
            amax = fmaxf(amax, max_abs(v[i]));
        }
#pragma unroll
        for (int d = 1; d < 8; d *= 2) amax = fmaxf(amax, __shfl_xor_sync(0xffffffffu, amax, d));
        const Pow2Scale s = scale_to(amax, target);
#pragma unroll
        for (int i = 0; i < Panels; ++i) store_panel8<Terms>(panels + i * Terms * kPanel, t, col, v[i], s.up);
        if (threadIdx.x % 8 == 0) row_scale[t] = s.down;
    }
}

// The 64 rows of a chunk as float32 [64][64 Panels] (zero past the end and the width), pieces exchanged as in panels.
template <int Panels>
__device__ __forceinline__ int staged_offset(int row, int col) {
    return row * (Panels * kChunk) + (col ^ ((row & 7) << 3));
}

template <int Panels>
__device__ __forceinline__ void stage_rows(float* to, const Rows& m, const Chunk& c, int head) {
    for (int i = threadIdx.x; i < kChunk * Panels * 8; i += kThreads) {
        const int t = i / (Panels * 8), col = i % (Panels * 8) * 8;
        float v[8] = {};
        if (t < c.length) load8(v, m, row_offset(m, c, t, head), col);
        float4* at = reinterpret_cast<float4*>(to + staged_offset<Panels>(t, col));
        at[0] = {v[0], v[1], v[2], v[3]};
        at[1] = {v[4], v[5], v[6], v[7]};
    }
}

// ---- split states -----------------------------------------------------------------------------------------------

// Index of a column tile in `scales`; times twice the row tiles, of its first panel.
__device__ __forceinline__ int64_t state_tile(const SplitStates& s, int64_t slot, int head, int column_tiles, int tile) {
    return (slot * s.heads + head / s.group) * column_tiles + tile;
}

// Copies panels as they lie.
template <int Panels, int Threads = kThreads>
__device__ __forceinline__ void copy_panels(__half* to, const __half* from) {
#pragma unroll 8
    for (int i = threadIdx.x; i < Panels * kPanel / 8; i += Threads)
        reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(from)[i];
}

// ---- launching --------------------------------------------------------------------------------------------------

// Launches `kernel` with more than 48 KB of shared memory allowed.
template <typename Args>
cudaError_t launch(void (*kernel)(Args), const Args& args, int64_t blocks, size_t shared_bytes, cudaStream_t stream,
                   int threads = kThreads) {
    if (blocks == 0) return cudaSuccess;
    if (blocks > INT_MAX) return cudaErrorInvalidConfiguration;
    const cudaError_t status =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (status != cudaSuccess) return status;
    kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes, stream>>>(args);
    return cudaGetLastError();
}

}  // namespace mesa
