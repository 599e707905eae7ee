// Where a chunk lies, its gates, and the way of rows from global memory into panels.
#pragma once

#include <cfloat>
#include <climits>
#include <mutex>
#include <set>
#include <utility>

#include <cuda_bf16.h>

#include "tile.cuh"

namespace mesa {

struct Sequence {
    int batch;       // row of the batch
    int token;       // first token in that row
    int length;
    int first_slot;  // or segment
};

struct Chunk {
    int batch;
    int token;   // first token
    int length;  // 0 where the slot is not in use
};

// cu_seqlens is not trusted: whatever it holds, spans stay inside [0, T) and slots inside their array.
__device__ __forceinline__ int sequence_start(const Problem& p, int n) {
    const int64_t start = p.cu_seqlens[n];
    return start < 0 ? 0 : (start > p.T ? p.T : static_cast<int>(start));
}

// Sequence n and its first place.
__device__ __forceinline__ Sequence find_sequence(const Problem& p, int n, const Places& places) {
    if (!p.cu_seqlens) return {n, 0, p.T, n * places.of_each.value()};
    const int start = sequence_start(p, n), end = sequence_start(p, n + 1);
    return {0, start, end > start ? end - start : 0, start / places.tokens + n};
}

// The last sequence whose first place is at or before `place`.
__device__ __forceinline__ int sequence_at(const Problem& p, int place, const Places& places) {
    if (!p.cu_seqlens) return place / places.of_each;
    int low = 0, high = p.N - 1;
    while (low < high) {
        const int mid = (low + high + 1) / 2;
        if (sequence_start(p, mid) / places.tokens + mid <= place) low = mid;
        else high = mid - 1;
    }
    return low;
}

__device__ __forceinline__ Chunk chunk_of(const Sequence& s, int index) {
    return {s.batch, s.token + index * kChunk, min(max(s.length - index * kChunk, 0), kChunk)};
}

__device__ __forceinline__ Chunk find_chunk(const Problem& p, int slot) {
    const Sequence s = find_sequence(p, sequence_at(p, slot, p.chunks), p.chunks);
    return slot < s.first_slot ? Chunk{s.batch, s.token, 0} : chunk_of(s, slot - s.first_slot);
}

// Index of a token and head in arrays [B, T, heads].
__device__ __forceinline__ int64_t token_index(const Problem& p, const Chunk& c, int token, int heads, int head) {
    return int64_t(c.batch * p.T + c.token + token) * heads + head;
}

// ---- gates ------------------------------------------------------------------------------------------------------

// Running sums of log2 decay inside the chunk, each as hi + lo: differences stay exact however large the sums are.
struct ChunkGates {
    float hi[kChunk], lo[kChunk];
    float beta[kChunk];

    // exp(g_{i+1} + ... + g_j reversed): decay from token j to token i >= j.
    __device__ __forceinline__ float decay(int i, int j) const {
        return ptx::exp2_approx((hi[i] - hi[j]) + (lo[i] - lo[j]));
    }
    __device__ __forceinline__ float decay_from_start(int i) const { return ptx::exp2_approx(hi[i] + lo[i]); }
};

// Below this exp(g) is zero in float32; -inf would make differences of sums undefined.
constexpr float kSmallestLogDecay = -128.f;

// Gates come in two moves: fetch_gates asks for them, store_gates makes the sums of what has come. Both are for the
// first warp, whose lanes take two neighbouring tokens each; tokens past the end neither decay nor enter.
struct GatePair {
    float g[2], beta[2];
};

__device__ __forceinline__ GatePair fetch_gates(const Gates& gates, const Problem& p, const Chunk& c, int head) {
    GatePair pair = {};
    if (threadIdx.x >= 32) return pair;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int t = threadIdx.x * 2 + i;
        if (t < c.length) {
            const int64_t at = token_index(p, c, t, gates.heads, head / gates.group);
            pair.g[i] = gates.g[at];
            pair.beta[i] = gates.beta[at];
        }
    }
    return pair;
}

__device__ __forceinline__ void store_gates(ChunkGates& out, const GatePair& pair) {
    if (threadIdx.x >= 32) return;
    const int lane = threadIdx.x;
    double sum[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const float g = pair.g[i] < kSmallestLogDecay ? kSmallestLogDecay : pair.g[i];  // leaves NaN
        out.beta[lane * 2 + i] = pair.beta[i];
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
    return c.batch * m.batch_stride + (c.token + token) * m.token_stride +
           int64_t(head / m.group) * m.head_stride;
}

// Two neighbouring elements of 16 bits.
__device__ __forceinline__ float2 unpack(DType dtype, uint32_t pair) {
    return dtype == DType::f16 ? unpack(pair) : unpack_bf16(pair);
}

// Eight neighbouring elements as they lie in memory.
template <bool Float32>
struct Raw8 {
    uint4 words[Float32 ? 2 : 1];
};

template <bool Float32>
__device__ __forceinline__ void convert8(float (&v)[8], const Raw8<Float32>& raw, DType dtype) {
#pragma unroll
    for (int w = 0; w < (Float32 ? 2 : 1); ++w) {
        const uint32_t words[4] = {raw.words[w].x, raw.words[w].y, raw.words[w].z, raw.words[w].w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if constexpr (Float32) {
                v[w * 4 + i] = __uint_as_float(words[i]);
            } else {
                const float2 f = unpack(dtype, words[i]);
                v[i * 2] = f.x, v[i * 2 + 1] = f.y;
            }
        }
    }
}

// Two neighbouring elements in 16 bits.
__device__ __forceinline__ uint32_t pack(DType dtype, float a, float b) {
    return dtype == DType::f16 ? pack(a, b) : pack_bf16(a, b);
}

// Four numbers of each of the four lanes that share a row, transposed: v[n] of lane q goes to v[q] of lane n.
__device__ __forceinline__ void quad_transpose(uint32_t (&v)[4], int lane) {
#pragma unroll
    for (int d = 1; d < 4; d *= 2)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            uint32_t& low = v[d == 1 ? i * 2 : i];
            uint32_t& high = v[d == 1 ? i * 2 + 1 : i + 2];
            const uint32_t other = __shfl_xor_sync(0xffffffffu, lane & d ? low : high, d);
            if (lane & d) low = other;
            else high = other;
        }
}

// A warp's 16 rows from first_row on, columns col0 .. col0 + 63.
template <bool Float32>
__device__ __forceinline__ void store_strip(const Rows& m, const Chunk& c, int head, int first_row, int col0,
                                            const Acc& acc, int lane) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int t = first_row + acc_row(lane, half);
        const int64_t at = row_offset(m, c, t, head) + col0;
        const int columns = t < c.length ? padded_width(m) - col0 : 0;
        if constexpr (Float32) {
            float* const to = static_cast<float*>(m.data) + at + acc_col(lane, 0);
#pragma unroll
            for (int n = 0; n < 8; ++n)
                if (n * 8 < columns)
                    *reinterpret_cast<float2*>(to + n * 8) = {acc.c[n][half * 2], acc.c[n][half * 2 + 1]};
        } else {
            uint16_t* const to = static_cast<uint16_t*>(m.data) + at;
#pragma unroll
            for (int n = 0; n < 8; n += 4) {
                uint32_t pairs[4];
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    pairs[i] = pack(m.dtype, acc.c[n + i][half * 2], acc.c[n + i][half * 2 + 1]);
                quad_transpose(pairs, lane);
                const int col = (n + lane % 4) * 8;
                if (col < columns) *reinterpret_cast<uint4*>(to + col) = {pairs[0], pairs[1], pairs[2], pairs[3]};
            }
        }
    }
}

__device__ __forceinline__ void store_strip(const Rows& m, const Chunk& c, int head, int first_row, int col0,
                                            const Acc& acc, int lane) {
    if (m.dtype == DType::f32) store_strip<true>(m, c, head, first_row, col0, acc, lane);
    else store_strip<false>(m, c, head, first_row, col0, acc, lane);
}

// One of a lane's two rows of float32 [64][64 ..] from column col0 on, read where it lies: zero past the end.
struct StripRow {
    const float* row;
    int columns;  // that are left from this lane's first on

    __device__ __forceinline__ StripRow(const Rows& m, const Chunk& c, int head, int t, int col0, int lane)
        : row(static_cast<const float*>(m.data) + row_offset(m, c, t, head) + col0 + acc_col(lane, 0)),
          columns(t < c.length ? m.width - col0 - acc_col(lane, 0) : 0) {}

    __device__ __forceinline__ float2 pair(int n) const {
        return n * 8 < columns ? *reinterpret_cast<const float2*>(row + n * 8) : float2{0.f, 0.f};
    }
};

// Asks for the rows of a chunk to come to the L2 cache.
__device__ __forceinline__ void prefetch_rows(const Rows& m, const Chunk& c, int head) {
    constexpr int kLine = 128, kLanes = kThreads / kChunk;  // bytes; threads for a row
    const int t = threadIdx.x / kLanes, size = m.dtype == DType::f32 ? 4 : 2;
    if (t >= c.length) return;
    const char* const row = static_cast<const char*>(m.data) + row_offset(m, c, t, head) * size;
#pragma unroll 1  // as in convert_rows
    for (int at = threadIdx.x % kLanes * kLine; at < m.width * size; at += kLanes * kLine) ptx::prefetch_l2(row + at);
}

__device__ __forceinline__ float max_abs(const float (&v)[8]) {
    float m = 0.f;
#pragma unroll
    for (int i = 0; i < 8; ++i) m = fmaxf(m, fabsf(v[i]));
    return m;
}

// Eight numbers times `scale`, as one or two terms, into a panel's piece of 16 bytes.
template <int Terms, bool Bf16 = false>
__device__ __forceinline__ void store_piece8(__half* to, const float (&v)[8], float scale) {
    static_assert(Terms == 2 || !Bf16);
    uint32_t hi[4], lo[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if constexpr (Terms == 2) split<Bf16>(v[i * 2] * scale, v[i * 2 + 1] * scale, hi[i], lo[i]);
        else hi[i] = pack(v[i * 2] * scale, v[i * 2 + 1] * scale);
    }
    *reinterpret_cast<uint4*>(to) = {hi[0], hi[1], hi[2], hi[3]};
    if constexpr (Terms == 2) *reinterpret_cast<uint4*>(to + kPanel) = {lo[0], lo[1], lo[2], lo[3]};
}

// Row `row`, columns col .. col + 7 of a panel.
template <int Terms>
__device__ __forceinline__ void store_panel8(__half* panel, int row, int col, const float (&v)[8], float scale) {
    store_piece8<Terms>(panel + panel_offset(row, col), v, scale);
}

// Rows come into panels in two moves, so that all that a block needs can be on its way at once: fetch_rows sends them
// by cp.async to the very rows of the panels that their elements will have, convert_rows makes fp16 of them there.
// Eight neighbouring threads fetch a row; of float32 a thread converts eight columns of every panel too: part_column()
// and the next.
__device__ __forceinline__ int part_column() { return threadIdx.x % 8 * 8; }

// Where a float32 row's 16-byte piece `piece` of a panel's width (0 to 15) waits: the first half of the row in that of
// the first term, the second in that of the second. 128 bytes of memory come to 128 of shared memory, or L2 would be
// asked for every sector twice; pieces of the second half are exchanged, so that no banks conflict where a thread reads
// two neighbours.
__device__ __forceinline__ int waiting_offset(int row, int piece) {
    const int half = piece / 8;
    return half * kPanel + panel_offset(row, (piece % 8 ^ half) * 8);
}

// Eight elements as they wait.
template <bool Float32>
__device__ __forceinline__ Raw8<Float32> waiting_piece(const __half* panel, int row, int col) {
    Raw8<Float32> raw;
    if constexpr (Float32) {
#pragma unroll
        for (int w = 0; w < 2; ++w)
            raw.words[w] = *reinterpret_cast<const uint4*>(panel + waiting_offset(row, col / 4 + w));
    } else {
        raw.words[0] = *reinterpret_cast<const uint4*>(panel + panel_offset(row, col));
    }
    return raw;
}

// Columns col0 .. col0 + 64 Panels - 1 of the 64 rows of a chunk; zeros past the end and the width. float32 fills both
// terms of its elements.
template <int Panels, int Terms, bool Float32 = Terms == 2, int Threads = kThreads>
__device__ __forceinline__ void fetch_rows(__half* panels, const Rows& m, const Chunk& c, int head, int col0) {
    static_assert(Terms == 2 || !Float32);
    constexpr int kSize = Float32 ? 4 : 2, kElements = 16 / kSize, kRowsAtOnce = Threads / 8;
    const int first = threadIdx.x / 8, part = threadIdx.x % 8;
    const char* row = static_cast<const char*>(m.data) + (row_offset(m, c, first, head) + col0) * kSize;
    const int64_t step = m.token_stride * (kRowsAtOnce * kSize);
#pragma unroll 1  // as in convert_rows
    for (int t = first; t < kChunk; t += kRowsAtOnce, row += step)
#pragma unroll
        for (int i = 0; i < Panels * (Float32 ? 2 : 1); ++i) {
            const int col = (i * 8 + part) * kElements;
            const bool inside = t < c.length && col0 + col < m.width;
            __half* const to = panels + (Float32 ? i / 2 * Terms * kPanel + waiting_offset(t, i % 2 * 8 + part)
                                                 : i * Terms * kPanel + panel_offset(t, part * 8));
            ptx::cp_async16_or_zero(to, row + col * kSize, inside);
        }
}

// Two neighbouring numbers of 16 bits: their magnitudes, and the larger ones of four pairs (NaNs do not count).
template <DType dtype>
using HalfPair = std::conditional_t<dtype == DType::f16, __half2, __nv_bfloat162>;
__device__ __forceinline__ __half2 magnitudes(__half2 pair) { return __habs2(pair); }
__device__ __forceinline__ __nv_bfloat162 magnitudes(__nv_bfloat162 pair) {
    reinterpret_cast<uint32_t&>(pair) &= 0x7fff7fff;
    return pair;
}
template <typename Pair>
__device__ __forceinline__ Pair largest_of(const uint4& words) {
    const auto at = [](const uint32_t& word) { return magnitudes(reinterpret_cast<const Pair&>(word)); };
    return __hmax2(__hmax2(at(words.x), at(words.y)), __hmax2(at(words.z), at(words.w)));
}

// Scales of rows are factors of weights, the largest of which sets the unit of the others: zeros get the least.
__device__ __forceinline__ Pow2Scale row_scale_to(float amax, int target) {
    return scale_to(fmaxf(amax, FLT_MIN), target);
}

// convert_rows of 16-bit numbers. Two threads share a row, one of those that their warp has fetched. Of these rows some
// are 16 apart and lie in the same banks: there every second one begins with the other half.
template <DType dtype, int Panels, int Terms, typename PutScale>
__device__ __forceinline__ void convert_narrow_rows(__half* panels, const PutScale& put_scale, int target) {
    using Pair = HalfPair<dtype>;
    constexpr int kPieces = Panels * 4;  // of 16 bytes, a thread's part of the row
    const unsigned thread = ptx::opaque(threadIdx.x);  // or places would be kept from one call to the next
    const int lane = thread % 32, other_half = lane >> 2 & 1;
    const int row = thread / 32 * 4 + lane % 16 / 4 * 16 + lane % 4;
    const int panel = Panels == 2 ? lane / 16 : 0;
    const int first_piece = (Panels == 2 ? other_half : lane / 16 ^ other_half) * 4;
    __half* const row_at = panels + panel * Terms * kPanel + row * kChunk;
    const auto piece = [&](int p) { return row_at + ((first_piece ^ row % 8) ^ p) * 8; };
    uint4 raw[kPieces];
    Pair largest;
#pragma unroll
    for (int p = 0; p < kPieces; ++p) {
        raw[p] = *reinterpret_cast<const uint4*>(piece(p));
        largest = p ? __hmax2(largest, largest_of<Pair>(raw[p])) : largest_of<Pair>(raw[p]);
    }
    largest = __hmax2(largest, __shfl_xor_sync(0xffffffffu, largest, 16));
    const float2 pair = unpack(dtype, reinterpret_cast<const uint32_t&>(largest));
    const Pow2Scale s = row_scale_to(fmaxf(pair.x, pair.y), target);
#pragma unroll
    for (int p = 0; p < kPieces; ++p) {
        float v[8];
        convert8<false>(v, Raw8<false>{{raw[p]}}, dtype);
        store_piece8<Terms>(piece(p), v, s.up);
    }
    if (lane < 16) put_scale(row, s.down);
}

// convert_rows of float32, two rows of a thread at once. observe(row, v) sees its columns, v[panel][0 .. 7].
template <int Panels, typename PutScale, typename Observe>
__device__ __forceinline__ void convert_float_rows(__half* panels, const PutScale& put_scale, int target,
                                                   const Observe& observe) {
    constexpr int kRows = 2, kRowsAtOnce = kThreads / 8;
    __syncwarp();  // other threads of the row have fetched parts of this thread's
#pragma unroll 1  // the kernels are long: what misses the instruction cache costs more than the loop
    for (int first = threadIdx.x / 8; first < kChunk; first += kRows * kRowsAtOnce) {
        float v[kRows][Panels][8], amax[kRows] = {};
#pragma unroll
        for (int r = 0; r < kRows; ++r)
#pragma unroll
            for (int i = 0; i < Panels; ++i) {
                const int col = ptx::opaque(part_column());  // or addresses would be kept from row to row
                const auto raw = waiting_piece<true>(panels + i * 2 * kPanel, first + r * kRowsAtOnce, col);
                convert8<true>(v[r][i], raw, DType::f32);
                amax[r] = fmaxf(amax[r], max_abs(v[r][i]));
            }
#pragma unroll
        for (int d = 1; d < 8; d *= 2)
#pragma unroll
            for (int r = 0; r < kRows; ++r) amax[r] = fmaxf(amax[r], __shfl_xor_sync(0xffffffffu, amax[r], d));
        __syncwarp();  // the rows have been read
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            const int t = first + r * kRowsAtOnce;
            const Pow2Scale s = row_scale_to(amax[r], target);
#pragma unroll
            for (int i = 0; i < Panels; ++i)
                store_panel8<2>(panels + i * 2 * kPanel, t, part_column(), v[r][i], s.up);
            if (threadIdx.x % 8 == 0) put_scale(t, s.down);
            observe(t, v[r]);
        }
    }
}

// Once this thread's cp.async are complete: rows scaled by powers of two so that a row's largest element lies in
// [2^target, 2^(target + 1)); put_scale(row, what undoes it) is called by one thread for each, always the same. Two
// terms are for what is not exact in one.
template <int Panels, int Terms, bool Float32 = Terms == 2, typename PutScale>
__device__ __forceinline__ void convert_rows(__half* panels, const PutScale& put_scale, DType dtype, int target) {
    if constexpr (Float32) {
        convert_float_rows<Panels>(panels, put_scale, target, [](int, const auto&) {});
    } else {
        __syncwarp();  // as above
        if (dtype == DType::f16) convert_narrow_rows<DType::f16, Panels, Terms>(panels, put_scale, target);
        else convert_narrow_rows<DType::bf16, Panels, Terms>(panels, put_scale, target);
    }
}

template <int Panels, int Terms, bool Float32 = Terms == 2>
__device__ __forceinline__ void convert_rows(__half* panels, float* row_scale, DType dtype, int target) {
    convert_rows<Panels, Terms, Float32>(
        panels, [row_scale](int t, float scale) { row_scale[t] = scale; }, dtype, target);
}

// The 64 rows of a chunk in float32 as they are, [64][64 Panels] (zero past the end and the width), pieces exchanged as
// in panels.
template <int Panels>
__device__ __forceinline__ int staged_offset(int row, int col) {
    return row * (Panels * kChunk) + (col ^ ((row & 7) << 3));
}

template <int Panels>
__device__ __forceinline__ void fetch_staged_rows(float* to, const Rows& m, const Chunk& c, int head) {
    constexpr int kElements = 4, kPieces = Panels * kChunk / kElements, kRowsAtOnce = kThreads / kPieces;
    const int first = threadIdx.x / kPieces, col = threadIdx.x % kPieces * kElements;
    const float* row = static_cast<const float*>(m.data) + row_offset(m, c, first, head) + col;
    const int64_t step = m.token_stride * kRowsAtOnce;
#pragma unroll 4
    for (int t = first; t < kChunk; t += kRowsAtOnce, row += step) {
        const bool inside = t < c.length && col < m.width;
        ptx::cp_async16_or_zero(to + staged_offset<Panels>(t, col), row, inside);
    }
}

// ---- split states -----------------------------------------------------------------------------------------------

// Index of a column tile in `scales`; times twice the row tiles, of its first panel.
__device__ __forceinline__ int64_t state_tile(const SplitStates& s, int slot, int head, int column_tiles, int tile) {
    return int64_t(slot * s.heads + head / s.group - s.first) * column_tiles + tile;
}

// Copies panels as they lie; complete after ptx::cp_async_wait and a barrier.
template <int Panels, int Threads = kThreads>
__device__ __forceinline__ void copy_panels_async(__half* to, const __half* from) {
#pragma unroll 8
    for (int i = threadIdx.x; i < Panels * kPanel / 8; i += Threads) ptx::cp_async16(to + i * 8, from + i * 8);
}

// Asks for panels to come to the L2 cache.
template <int Panels>
__device__ __forceinline__ void prefetch_panels(const __half* from) {
    constexpr int kLine = 128 / sizeof(__half);
#pragma unroll 1
    for (int i = threadIdx.x; i < Panels * kPanel / kLine; i += kThreads) ptx::prefetch_l2(from + i * kLine);
}

// ---- launching --------------------------------------------------------------------------------------------------

// More than the usual 48 KB of shared memory. The driver takes 2 us to allow them, so it is asked once for every kernel
// (which always has the same) and device.
template <typename Args>
cudaError_t allow_shared_bytes(void (*kernel)(Args), size_t bytes) {
    static std::mutex mutex;
    static std::set<std::pair<void (*)(Args), int>> allowed;
    int device = 0;
    cudaError_t status = cudaGetDevice(&device);
    if (status != cudaSuccess) return status;
    const std::lock_guard<std::mutex> lock(mutex);
    if (allowed.count({kernel, device})) return cudaSuccess;
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
    if (status == cudaSuccess) allowed.insert({kernel, device});
    return status;
}

// Launches `kernel`, with more than the usual 48 KB of shared memory where it needs them.
template <typename Args>
cudaError_t launch(void (*kernel)(Args), const Args& args, int64_t blocks, size_t shared_bytes, cudaStream_t stream,
                   int threads = kThreads) {
    if (blocks == 0) return cudaSuccess;
    if (blocks > INT_MAX || shared_bytes > kMostSharedBytes) return cudaErrorInvalidConfiguration;
    if (shared_bytes > 48 * 1024) {
        const cudaError_t status = allow_shared_bytes(kernel, shared_bytes);
        if (status != cudaSuccess) return status;
    }
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    return cudaLaunchKernelEx(&config, kernel, args);
}

}  // namespace mesa
