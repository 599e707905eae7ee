// chunk_states: the joint state [G | H] before every chunk, and the adjoint after every chunk by the same recurrence.
//
// One block owns a column tile (64 columns of [G | H], all K rows) of one segment and head, in fp32 registers (four
// warps for every 64 rows), and walks over the segment's chunks: store the state as hi + lo panels, then
// S <- decay S + keys' (w values) on tensor cores. The weights go into the values, which are split in two terms; 16-bit
// keys are exact in one. A step has two halves with a barrier after each:
//   1. The products are under way, and the state goes out; then it takes in the products.
//   2. This chunk's buffer is free, and the chunk after the next is sent for by cp.async. The next one has come, and is
//      made into operands in its place. (With wgmma float32 keys are sent for behind that: publish_shared() waits for
//      what is under way, and of these there is too much.)
// With bf16 keys the operands are bf16, which has float32's range: keys are operands as they come, and weighed values
// need no scale. The two terms of these have 16 bits, which is little beside the 22 that a state is stored with; but
// here every addend is rounded by itself, and over the tokens that averages out.
// With other keys they are fp16. Rows come to shared memory row by row, but warps convert them by columns. A warp's
// columns of the keys are its rows of the state, so that their scale stays in the warp; every eight (or sixteen)
// columns of the values have a scale of their own. So no scale needs a barrier before it can be used.
//
// Sequences of several segments take three launches: the same walk without storing gives every segment's own sum, but
// of chunks of which nothing is left at the segment's end; `combine` makes of these the states before the segments, and
// the walk starts from those. In turn (see StateArgs), the walk over the first segments leaves its end where that over
// the second ones starts. What is there then, the states before the segments, is the backward pass's to start from.
#include <cfloat>
#include <type_traits>

#include "chunk.cuh"

namespace mesa {
namespace {

enum class Pass { sums, states };

template <int KTiles, int KeyTerms>
struct Shared {
    __half keys[2][KTiles * KeyTerms * kPanel];  // of one chunk while the other's come
    __half values[2][2 * kPanel];
    __half staging[KTiles * 4][2][8 * kChunk];  // of each warp: eight rows of the state on their way out, hi and lo
    // The next chunk's (written in the first half of a step, read in the second) ...
    float weights[kChunk];
    float decay, log_decay;
    float state_max[KTiles * 4];  // of each warp's part of the state
    // ... and this chunk's (the other way round).
    alignas(16) float value_scale[8];  // of every eight columns
    float state_scale;
    float before_scale;
};

// The largest of a warp's numbers, none of them negative or NaN: their bits are in the same order.
__device__ __forceinline__ float warp_max(float v) {
    return __uint_as_float(__reduce_max_sync(0xffffffffu, __float_as_uint(v)));
}

template <int Warps>
__device__ __forceinline__ float block_max(const float (&warp_max)[Warps]) {
    float v = warp_max[0];
#pragma unroll
    for (int w = 1; w < Warps; ++w) v = fmaxf(v, warp_max[w]);
    return v;
}

__device__ __forceinline__ float largest(const Acc& acc) {
    float m = 0.f;
#pragma unroll
    for (int i = 0; i < 8; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e) m = fmaxf(m, fabsf(acc.c[i][e]));
    return m;
}

// Brings the largest number of a state's column tile into [2^10, 2^14): powers of 16, so that those of H's tiles, which
// the solver wants to be the same, mostly are. Zeros get the least, since the solver takes the larger one.
__device__ __forceinline__ Pow2Scale state_scale(float amax) {
    const int exponent = static_cast<int>(__float_as_uint(scale_to(fmaxf(amax, FLT_MIN), 13).up) >> 23) - 127;
    return {pow2(exponent & ~3), pow2(-(exponent & ~3))};
}

// ---- what a chunk's gates come to -------------------------------------------------------------------------------

// In the registers of a warp: what the values of tokens 2 lane + {0, 1} are multiplied by, and the chunk's log2 decay.
struct Weights {
    float w[2], log_decay;
};

// Two tokens for each lane; `at` is the first one's place among the gates. Tokens past the end neither decay nor enter.
__device__ __forceinline__ Weights chunk_weights(const Gates& gates, int64_t at, int length, bool reverse, float sign) {
    const int lane = threadIdx.x % 32;
    float beta[2] = {0.f, 0.f};
    double sum[2] = {0., 0.};
    at += lane * 2 * gates.heads;
#pragma unroll
    for (int i = 0; i < 2; ++i, at += gates.heads)
        if (lane * 2 + i < length) {
            const float g = gates.g[at];
            // Leaves NaN. Never one operation with the sums: every instance of the kernel is to make the same bits.
            sum[i] = __dmul_rn(g < kSmallestLogDecay ? kSmallestLogDecay : g, 1.4426950408889634);
            beta[i] = gates.beta[at];
        }
    double total = sum[0] + sum[1];
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
        const double other = __shfl_up_sync(0xffffffffu, total, d);
        if (lane >= d) total += other;
    }
    const double last[2] = {total - sum[1], total}, all = __shfl_sync(0xffffffffu, total, 31);
    Weights out;
#pragma unroll
    for (int i = 0; i < 2; ++i)
        out.w[i] = sign * (reverse ? ptx::exp2_approx(static_cast<float>(last[i]))
                                   : ptx::exp2_approx(static_cast<float>(all - last[i])) * beta[i]);
    out.log_decay = static_cast<float>(all);
    return out;
}

// The first step of a segment's walk that is worth taking when only its end is wanted: what the steps before it add is
// decayed by less than 2^-160 after it, which leaves nothing in float32 of numbers up to 2^10.
// `gate` is the first token's place among the gates at step 0, `way` what leads to the next step's; every step but
// `short_step`, whose tokens are `short_length`, has a whole chunk of tokens.
template <int Warps>
__device__ __forceinline__ int first_lasting_step(const Gates& gates, int64_t gate, int64_t way, int steps,
                                                  int short_step, int short_length, float (&scratch)[kChunk]) {
    constexpr float kLeast = -160 * 0.693147181f;
    constexpr int kAtOnce = 16, kOfWarp = kAtOnce / Warps;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float log_decay = 0.f;
    for (int last = steps - 1; last > 0; last -= kAtOnce) {
        float sum[kOfWarp] = {};  // of step last - warp - i Warps
#pragma unroll
        for (int i = 0; i < kOfWarp; ++i) {
            const int step = last - warp - i * Warps;
            const int length = step < 0 ? 0 : step == short_step ? short_length : kChunk;
#pragma unroll
            for (int t = lane; t < kChunk; t += 32)
                if (t < length) sum[i] += gates.g[gate + step * way + t * gates.heads];
        }
#pragma unroll
        for (int i = 0; i < kOfWarp; ++i) {
#pragma unroll
            for (int d = 16; d; d /= 2) sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], d);
            if (lane == 0) scratch[warp + i * Warps] = sum[i];
        }
        __syncthreads();
        int back = 0;  // NaN among the gates leaves all steps
        while (back < kAtOnce && !(log_decay < kLeast)) log_decay += scratch[back++];
        __syncthreads();
        if (log_decay < kLeast) return last + 1 - back;
    }
    return 0;
}

// ---- rows -------------------------------------------------------------------------------------------------------

// Sends for the rows of one chunk after the other, columns col0 .. col0 + 64 Panels - 1, as fetch_rows does.
template <int Panels, int Terms, int Threads>
struct RowWalk {
    static constexpr int kRowsAtOnce = Threads / 8;
    const char* at;  // this thread's first piece of the chunk that comes next
    int left;        // bytes from there to the end of the width

    __device__ __forceinline__ RowWalk(const Rows& m, const Chunk& first, int head, int col0) {
        const int size = m.dtype == DType::f32 ? 4 : 2, part = threadIdx.x % 8 * 16;
        at = static_cast<const char*>(m.data) + (row_offset(m, first, threadIdx.x / 8, head) + col0) * size + part;
        left = (m.width - col0) * size - part;
    }

    template <bool Float32>
    __device__ __forceinline__ void fetch(__half* panels, int64_t token_stride, int length, bool reverse) {
        constexpr int kSize = Float32 ? 4 : 2;
        const int first = threadIdx.x / 8, part = threadIdx.x % 8;
        const char* row = at;
#pragma unroll
        for (int i = 0; i < kChunk / kRowsAtOnce; ++i, row += token_stride * (kRowsAtOnce * kSize))
#pragma unroll
            for (int line = 0; line < Panels * (Float32 ? 2 : 1); ++line) {
                const int at_row = Float32 ? line / 2 * Terms * kPanel + waiting_offset(first, line % 2 * 8 + part)
                                           : line * Terms * kPanel + panel_offset(first, part * 8);
                ptx::cp_async16_or_zero(panels + i * kRowsAtOnce * kChunk + at_row, row + line * 8 * 16,
                                        first + i * kRowsAtOnce < length && line * 8 * 16 < left);
            }
        at += (reverse ? -token_stride : token_stride) * (kChunk * kSize);
    }
};

// A lane's part of a warp's columns of a panel as they wait: rows lane and lane + 32.
template <bool Float32, int Pieces>
struct RawColumns {
    Raw8<Float32> raw[2][Pieces];

    __device__ __forceinline__ RawColumns(const __half* panel, int col0, int lane) {
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
            for (int p = 0; p < Pieces; ++p) raw[i][p] = waiting_piece<Float32>(panel, i * 32 + lane, col0 + p * 8);
    }
};

// The largest magnitude among eight elements, like max_abs: NaNs do not count.
template <DType dtype>
__device__ __forceinline__ float largest(const Raw8<dtype == DType::f32>& raw) {
    if constexpr (dtype == DType::f32) {
        float v[8];
        convert8<true>(v, raw, dtype);
        return max_abs(v);
    } else {
        const auto pair = largest_of<HalfPair<dtype>>(raw.words[0]);
        return fmaxf(fmaxf(0.f, __low2float(pair)), __high2float(pair));
    }
}

// A warp's part of the keys or values is scaled by a power of two so that the largest magnitude lies in [2^14, 2^15):
// what is up to 2^29 times smaller is still a normal fp16 number. Numbers count as if they were at least kSmallestMax,
// which leaves scales, and their products with the weights, finite.
constexpr int kTarget = 14;
constexpr float kSmallestMax = 0x1p-100f;

// The sixteen columns of a warp, all 64 rows, of a panel of float32 keys; returns what undoes their scale.
__device__ __forceinline__ float convert_keys(__half* panel, const RawColumns<true, 2>& columns, int col0, int lane) {
    const auto& raw = columns.raw;
    float amax = kSmallestMax;
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int p = 0; p < 2; ++p) amax = fmaxf(amax, largest<DType::f32>(raw[i][p]));
    const Pow2Scale s = scale_to(warp_max(amax), kTarget);
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int p = 0; p < 2; ++p) {
            float v[8];
            convert8<true>(v, raw[i][p], DType::f32);
            store_panel8<2>(panel, i * 32 + lane, col0 + p * 8, v, s.up);
        }
    return s.down;
}

// A warp's share of the columns of the values' panels, all 64 rows, times the weights.
template <DType dtype, int kPieces>
__device__ __forceinline__ void convert_values(__half* panels, const RawColumns<dtype == DType::f32, kPieces>& columns,
                                               float* scale, const float* weights, int warp, int lane) {
    constexpr bool kFloat32 = dtype == DType::f32;
    const auto& raw = columns.raw;
    float weight[2];
    float amax = 0.f;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        float row_max = kSmallestMax;
#pragma unroll
        for (int p = 0; p < kPieces; ++p) row_max = fmaxf(row_max, largest<dtype>(raw[i][p]));
        weight[i] = weights[i * 32 + lane];
        amax = fmaxf(amax, row_max * fabsf(weight[i]));
    }
    const Pow2Scale s = scale_to(warp_max(amax), kTarget);
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int p = 0; p < kPieces; ++p) {
            float v[8];
            convert8<kFloat32>(v, raw[i][p], dtype);
            store_panel8<2>(panels, i * 32 + lane, (warp * kPieces + p) * 8, v, weight[i] * s.up);
        }
    if (lane < kPieces) scale[warp * kPieces + lane] = s.down;
}

// The 64 rows of a chunk of bf16 values times the weights, split in two terms; every thread takes what it has sent for.
template <int Threads>
__device__ __forceinline__ void split_rows(__half* panels, const float* weights) {
#pragma unroll
    for (int t = threadIdx.x / 8; t < kChunk; t += Threads / 8) {
        float v[8];
        convert8<false>(v, waiting_piece<false>(panels, t, part_column()), DType::bf16);
        store_piece8<2, true>(panels + panel_offset(t, part_column()), v, weights[t]);
    }
}

// f(std::integral_constant<DType, dtype>) for the one of the two 16-bit types, so that f is compiled for each.
template <typename F>
__device__ __forceinline__ void with_half_type(DType dtype, const F& f) {
    if (dtype == DType::f16) f(std::integral_constant<DType, DType::f16>());
    else f(std::integral_constant<DType, DType::bf16>());
}

// ---- states -----------------------------------------------------------------------------------------------------

// Element (row, column) of the K x width matrix that holds this column tile's part of a start or end state.
__device__ __forceinline__ int64_t state_offset(int K, int width, int row, int col, bool transposed) {
    return transposed ? int64_t(col) * K + row : int64_t(row) * width + col;
}

// A thread's 32 numbers of a segment's sum; the order within a tile is the blocks' own affair.
__device__ __forceinline__ float4* segment_part(const StateArgs& a, int segment, int head, int column_tiles,
                                                int tile) {
    const int64_t place = (int64_t(segment) * a.heads.all + head) * column_tiles + tile;
    return reinterpret_cast<float4*>(a.segment_sums) + place * 8 * blockDim.x + threadIdx.x;
}

// Sum of the products of eight numbers hi + lo with eight others.
__device__ __forceinline__ float dot8(const uint4& a_hi, const uint4& a_lo, const uint4& b_hi, const uint4& b_lo) {
    const uint32_t a[4] = {a_hi.x, a_hi.y, a_hi.z, a_hi.w}, b[4] = {a_lo.x, a_lo.y, a_lo.z, a_lo.w};
    const uint32_t c[4] = {b_hi.x, b_hi.y, b_hi.z, b_hi.w}, d[4] = {b_lo.x, b_lo.y, b_lo.z, b_lo.w};
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float2 f = unpack(a[i]), g = unpack(b[i]), h = unpack(c[i]), t = unpack(d[i]);
        sum = fmaf(f.x + g.x, h.x + t.x, fmaf(f.y + g.y, h.y + t.y, sum));
    }
    return sum;
}

// A number of this type in two terms if it is not exact in one.
template <DType dtype>
constexpr int kTermsOf = dtype == DType::f32 ? 2 : 1;

template <Pass pass, Isa isa, int KTiles, DType Keys>
__global__ void __launch_bounds__(KTiles * kThreads, KTiles == 1 ? 3 : 2)
    chunk_states_kernel(const __grid_constant__ StateArgs a) {
    if constexpr (isa == Isa::hopper && !ptx::kHasHopper) return;  // never launched
    MESA_DYNAMIC_SHARED(shared_bytes);
    constexpr int KeyTerms = kTermsOf<Keys>;
    constexpr bool kBf16 = Keys == DType::bf16;  // so are the operands
    auto& sm = *reinterpret_cast<Shared<KTiles, KeyTerms>*>(shared_bytes);
    constexpr int kBlock = KTiles * kThreads, kWarps = kBlock / 32;
    constexpr bool kFetchLast = isa == Isa::hopper && KeyTerms == 2;
    const int lane = threadIdx.x % 32;
    const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);  // so that ptxas knows it to be the warp's
    const int row_tile = warp / 4, first_row = warp % 4 * 16;  // of this warp's 16 rows
    const int value_tiles = (a.problem.V + kChunk - 1) / kChunk, column_tiles = value_tiles + KTiles;
    const int tile = blockIdx.x % column_tiles;
    const int head = a.heads.first + (blockIdx.x / column_tiles) % a.heads.count;
    const int segment_block = blockIdx.x / column_tiles / a.heads.count;
    const int segment = pass == Pass::sums || a.turn < 0 ? segment_block : segment_block * 2 + a.turn;

    // This segment's chunks, [first, end) in the order of time, and its place in the order of the walk.
    const int n = sequence_at(a.problem, segment, a.problem.segments);
    const int index_of_segment = segment - find_sequence(a.problem, n, a.problem.segments).first_slot;
    const Sequence sequence = find_sequence(a.problem, n, a.problem.chunks);
    const int chunks = (sequence.length + kChunk - 1) / kChunk;
    const int first = index_of_segment * a.problem.segment_chunks;
    if (index_of_segment < 0 || (first >= chunks && index_of_segment > 0)) return;  // the place is not in use
    const int end = min(first + a.problem.segment_chunks, chunks);
    const bool is_first = a.reverse ? end == chunks : first == 0, is_last = a.reverse ? first == 0 : end == chunks;
    if (pass == Pass::sums && is_last) return;  // nothing comes after it

    // This tile's columns: col0 .. of G (source 0, values) or of H (source 1).
    const int source = tile < value_tiles ? 0 : 1;
    const int tile_of_source = tile - (source ? value_tiles : 0), col0 = tile_of_source * kChunk;
    const Rows& values = a.values[source].tile[tile_of_source];
    const int K = a.problem.K, width = source ? K : a.problem.V;
    const bool transposed = a.reverse && source == 1;
    const float sign = transposed ? -1.f : 1.f;  // the adjoint's second values are -w

    if (pass == Pass::states && a.lamb_pairs && segment == 0 && tile == 0 && threadIdx.x < KTiles * kChunk / 2) {
        LambPair pair;
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int i = threadIdx.x * 2 + e;
            pair.lamb[e] = i < K ? a.lamb[int64_t(head) * K + i] : 1.f;
            pair.inverse[e] = __frcp_rn(pair.lamb[e]);
        }
        a.lamb_pairs[head * (KTiles * kChunk / 2) + threadIdx.x] = pair;
    }

    // Step i of the walk is at chunk first_index + i or, reverse, - i. Only a sequence's last chunk may be short.
    int steps = end - first, first_index = a.reverse ? end - 1 : first;
    bool forgets = false;  // what was before the segment
    const int last_length = sequence.length - (chunks - 1) * kChunk;
    if constexpr (pass == Pass::sums) {
        const int way = a.reverse ? -1 : 1;
        const int64_t gate =
            token_index(a.problem, chunk_of(sequence, first_index), 0, a.gates.heads, head / a.gates.group);
        const int skipped = first_lasting_step<kWarps>(a.gates, gate, way * kChunk * a.gates.heads, steps,
                                                       way * (chunks - 1 - first_index), last_length, sm.weights);
        steps -= skipped, first_index += way * skipped, forgets = skipped > 0;
    }
    const int last_step = a.reverse ? first_index - (chunks - 1) : chunks - 1 - first_index;
    const auto length_at = [&](int step) { return step == last_step ? last_length : kChunk; };

    // Rows on their way; the values may be of any dtype where the keys are float32.
    const Chunk first_chunk = chunk_of(sequence, first_index);
    RowWalk<KTiles, KeyTerms, kBlock> key_rows(a.keys, first_chunk, head, 0);
    RowWalk<1, 2, kBlock> value_rows(values, first_chunk, head, 0);
    const auto fetch = [&](int step) {
        if (step < steps) {
            const int length = length_at(step);
            key_rows.template fetch<KeyTerms == 2>(sm.keys[step % 2], a.keys.token_stride, length, a.reverse);
            if (KeyTerms == 2 && values.dtype == DType::f32)
                value_rows.template fetch<KeyTerms == 2>(sm.values[step % 2], values.token_stride, length, a.reverse);
            else value_rows.template fetch<false>(sm.values[step % 2], values.token_stride, length, a.reverse);
        }
        ptx::cp_async_commit();
    };
    if (steps > 0) fetch(0), fetch(1);

    Acc state;
    zero(state);
    if (pass == Pass::states && !is_first) {
        const float4* const part = segment_part(a, segment, head, column_tiles, tile);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const float4 v = part[i * kBlock];
            state.c[i][0] = v.x, state.c[i][1] = v.y, state.c[i][2] = v.z, state.c[i][3] = v.w;
        }
    }
    const float* start = source ? a.start_kk : a.start_kv;
    if (is_first && start && head % a.start_group == 0) {
        start += (int64_t(n) * (a.heads.all / a.start_group) + head / a.start_group) * K * width;
#pragma unroll
        for (int i = 0; i < 8; ++i)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int row = row_tile * kChunk + first_row + acc_row(lane, e / 2),
                          col = col0 + acc_col(lane, i) + e % 2;
                if (row < K && col < width) state.c[i][e] = start[state_offset(K, width, row, col, transposed)];
            }
    }

    const auto put_state = [&](int segment_of_it) {
        float4* const part = segment_part(a, segment_of_it, head, column_tiles, tile);
#pragma unroll
        for (int i = 0; i < 8; ++i) part[i * kBlock] = {state.c[i][0], state.c[i][1], state.c[i][2], state.c[i][3]};
    };
    if (pass == Pass::states && a.turn >= 0 && is_first) put_state(segment);

    // Each warp has the weights of one of kWarps chunks in its registers, and hands them over when their turn comes.
    const int64_t first_gate = token_index(a.problem, first_chunk, 0, a.gates.heads, head / a.gates.group);
    Weights weights;
    const auto hand_over_weights = [&](int step) {
        if (step % kWarps == 0) {
            const int own = step + warp;
            weights = chunk_weights(a.gates, first_gate + int64_t(a.reverse ? -own : own) * kChunk * a.gates.heads,
                                    own < steps ? length_at(own) : 0, a.reverse, sign);
        }
        if (step % kWarps != warp) return;
        *reinterpret_cast<float2*>(sm.weights + lane * 2) = {weights.w[0], weights.w[1]};
        if (lane == 0) sm.log_decay = weights.log_decay, sm.decay = ptx::exp2_approx(weights.log_decay);
    };

    // The place of the first state and the way to the next.
    const int64_t place = state_tile(a.states, sequence.first_slot + first_index, head, column_tiles, tile);
    const int places = (a.reverse ? -1 : 1) * a.states.heads * column_tiles;

    // The same for the states that the adjoints meet.
    constexpr bool kOverlaps = pass == Pass::states && KeyTerms == 2;  // adjoints are of float32 keys
    const auto meets = [&](int step) {
        const bool float32 = a.values[0].tile[0].dtype == DType::f32;
        return kOverlaps && a.overlaps && meets_state(first_index - step, chunks, float32);
    };
    const auto before_place = [&](int step) {
        return state_tile(a.before, sequence.first_slot + first_index - step, head, column_tiles, tile);
    };
    const auto before_panel = [&](int step) {
        return a.before.panels + (before_place(step) * KTiles + row_tile) * 2 * kPanel + first_row * kChunk;
    };

    // H is symmetric, and the solver leaves its tile above the diagonal alone: only adjoints meet it. (Those of float32
    // meet all. The portable kernel is slower with the question than with the store.)
    const bool above_diagonal =
        isa == Isa::hopper && KTiles == 2 && KeyTerms == 1 && source == 1 && row_tile * kChunk < col0;
    const auto is_wanted = [&](int step) { return !above_diagonal || meets_state(first_index + step, chunks, false); };

    // The second half of a step is for what the next one needs.
    float decay = 1.f, log_decay = 0.f, key_scale = 1.f;
    const auto prepare = [&](int step) {
        constexpr int kPieces = 8 / kWarps;
        __half* const keys = sm.keys[step % 2] + row_tile * KeyTerms * kPanel;
        __half* const value_panels = sm.values[step % 2];
        const auto convert_half_values = [&](auto half_type) {
            constexpr DType dtype = decltype(half_type)::value;
            const RawColumns<false, kPieces> raw(value_panels, warp * kPieces * 8, lane);
            convert_values<dtype, kPieces>(value_panels, raw, sm.value_scale, sm.weights, warp, lane);
        };
        if constexpr (kBf16) {
            split_rows<kBlock>(value_panels, sm.weights);
        } else if constexpr (KeyTerms == 1) {
            convert_half_values(std::integral_constant<DType, Keys>());
        } else {  // float32 waits where other warps' terms are to be, which only a barrier allows to write
            const RawColumns<true, 2> raw_keys(keys, first_row, lane);
            if (values.dtype == DType::f32) {
                const RawColumns<true, kPieces> raw(value_panels, warp * kPieces * 8, lane);
                __syncthreads();
                key_scale = convert_keys(keys, raw_keys, first_row, lane);
                convert_values<DType::f32, kPieces>(value_panels, raw, sm.value_scale, sm.weights, warp, lane);
            } else {
                __syncthreads();
                key_scale = convert_keys(keys, raw_keys, first_row, lane);
                with_half_type(values.dtype, convert_half_values);
            }
        }
        decay = sm.decay, log_decay = sm.log_decay;
        if (pass == Pass::states && warp == step % kWarps && lane == 0) {  // the warps take turns
            const Pow2Scale s = state_scale(block_max(sm.state_max));
            sm.state_scale = s.up;
            if (meets(step)) sm.before_scale = a.before.scales[before_place(step)];
            a.states.scales[place + int64_t(places) * step] = s.down;
        }
        publish_shared<isa>();
    };

    // Where this warp's part of the state goes.
    __half* panel_place =
        a.states.panels + (place * KTiles + row_tile) * 2 * kPanel + first_row * kChunk + lane * 8;
    uint4 before[2][2];  // half of this lane's part of the state that the adjoint meets
    const auto load_before = [&](int step, int half) {
        const __half* const from = before_panel(step) + half * 8 * kChunk + lane * 8;
#pragma unroll
        for (int term = 0; term < 2; ++term)
#pragma unroll
            for (int i = 0; i < 2; ++i)
                before[term][i] = *reinterpret_cast<const uint4*>(from + term * kPanel + i * 32 * 8);
    };
    const auto store_state = [&](int step) {
        const int own = ptx::opaque(lane);  // the addresses are not kept
        const bool overlaps = meets(step);
        float sum = 0.f;  // this lane's part of <adjoint, state>
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            __syncwarp();  // the rows before these have been read
            const float scale = sm.state_scale;
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                uint32_t hi, lo;
                split(state.c[i][half * 2] * scale, state.c[i][half * 2 + 1] * scale, hi, lo);
                const int at = panel_offset(own / 4, acc_col(own, i));
                *reinterpret_cast<uint32_t*>(sm.staging[warp][0] + at) = hi;
                *reinterpret_cast<uint32_t*>(sm.staging[warp][1] + at) = lo;
            }
            __syncwarp();
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                uint4 pieces[2];
#pragma unroll
                for (int term = 0; term < 2; ++term) {
                    pieces[term] = *reinterpret_cast<const uint4*>(sm.staging[warp][term] + (i * 32 + own) * 8);
                    auto* const to =
                        reinterpret_cast<uint4*>(panel_place + term * kPanel + half * 8 * kChunk + i * 32 * 8);
                    // What the head's other blocks are still to read of the rows is to stay in L2, and not this. (The
                    // portable kernel is slower so.)
                    if constexpr (isa == Isa::hopper) ptx::store_streaming(to, pieces[term]);
                    else *to = pieces[term];
                }
                if (overlaps) sum += dot8(pieces[0], pieces[1], before[0][i], before[1][i]);
            }
            if (overlaps && half == 0) load_before(step, 1);
        }
        if (overlaps) {
#pragma unroll
            for (int d = 16; d; d /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, d);
            const int64_t chunk_and_head = int64_t(sequence.first_slot + first_index - step) * a.heads.all + head;
            if (lane == 0)
                a.overlaps[(chunk_and_head * column_tiles + tile) * kWarps + warp] =
                    sum * pow2_inverse(sm.state_scale) * sm.before_scale;
        }
        if (step + 1 < steps && meets(step + 1))  // a line for every lane
            ptx::prefetch_l2(before_panel(step + 1) + own / 16 * kPanel + own % 16 * kChunk);
    };

    float segment_log_decay = 0.f;
    if (steps > 0) {
        hand_over_weights(0);
        if (pass == Pass::states) {
            const float amax = warp_max(largest(state));
            if (lane == 0) sm.state_max[warp] = amax;
        }
        ptx::cp_async_wait<1>();
        __syncthreads();
        if (meets(0)) load_before(0, 0);
        prepare(0);
        __syncthreads();
    }
    for (int step = 0; step < steps; ++step) {
        Acc add;
        zero(add);
        products_begin<isa>(add);
        mma_panels<isa, true, false, KeyTerms, 2, true, kBf16>(add, sm.keys[step % 2] + row_tile * KeyTerms * kPanel,
                                                               first_row, sm.values[step % 2], lane);
        products_commit<isa>();
        if (pass == Pass::states) {
            if (is_wanted(step)) store_state(step);
            panel_place += int64_t(places) * (KTiles * 2 * kPanel);
        }
        products_wait<isa, 0>(add);

        segment_log_decay += log_decay;
        float amax = 0.f;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const float scale = kBf16 ? 1.f : sm.value_scale[i] * key_scale;
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                // Rounded in the same way in either pass: a sum must be what a walk from zero ends with.
                state.c[i][e] = fmaf(decay, state.c[i][e], scale * add.c[i][e]);
                amax = fmaxf(amax, fabsf(state.c[i][e]));
            }
        }
        if (step + 1 == steps) break;
        if (pass == Pass::states) {
            amax = warp_max(amax);
            if (lane == 0) sm.state_max[warp] = amax;
        }
        hand_over_weights(step + 1);
        ptx::cp_async_wait<0>();  // the next chunk has come
        __syncthreads();

        if constexpr (!kFetchLast) fetch(step + 2);
        if (meets(step + 1)) load_before(step + 1, 0);
        prepare(step + 1);
        if constexpr (kFetchLast) fetch(step + 2);
        __syncthreads();
    }

    const bool hands_over = pass == Pass::states && a.turn >= 0 && !is_last;
    if (pass == Pass::sums || hands_over) {
        put_state(!hands_over ? segment : a.reverse ? segment - 1 : segment + 1);
        if (pass == Pass::sums && tile == 0 && threadIdx.x == 0)
            a.segment_decays[int64_t(segment) * a.heads.all + head] =
                forgets ? 0.f : ptx::exp2_approx(segment_log_decay);
    } else {
        float* to = source ? a.end_kk : a.end_kv;
        if (!to || !is_last) return;
        to += (int64_t(n) * a.heads.all + head) * K * width;
#pragma unroll
        for (int i = 0; i < 8; ++i)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int row = row_tile * kChunk + first_row + acc_row(lane, e / 2),
                          col = col0 + acc_col(lane, i) + e % 2;
                if (row < K && col < width) to[state_offset(K, width, row, col, transposed)] = state.c[i][e];
            }
    }
}

// The state before a segment takes the place of the segment's sum; one thread for four numbers of a sequence and head.
__global__ void __launch_bounds__(kThreads) combine_kernel(const __grid_constant__ StateArgs a) {
    const int blocks = gridDim.x / (a.problem.N * a.heads.count.value());  // of a segment and head
    const int size = blocks * kThreads;
    const int part = blockIdx.x % blocks * kThreads + threadIdx.x;
    const int head = a.heads.first + (blockIdx.x / blocks) % a.heads.count;
    const int n = blockIdx.x / blocks / a.heads.count;
    const Places& places = a.problem.segments;
    const Sequence sequence = find_sequence(a.problem, n, places);
    const int segments = (sequence.length + places.tokens.value() - 1) / places.tokens;
    const auto place_of = [&](int i) {
        const int segment = sequence.first_slot + (a.reverse ? segments - 1 - i : i);
        return int64_t(segment) * a.heads.all + head;
    };
    float4* const sums = reinterpret_cast<float4*>(a.segment_sums) + part;
    float4 state = {0.f, 0.f, 0.f, 0.f};
    constexpr int kAtOnce = 4;  // asked for together: to the compiler each might lie where the one before is stored
    for (int first = 0; first < segments; first += kAtOnce) {
        float4 sum[kAtOnce] = {};
        float decay[kAtOnce] = {};
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i)
            if (first + i + 1 < segments) {  // the last one's sum nobody needs
                sum[i] = sums[place_of(first + i) * size];
                decay[i] = a.segment_decays[place_of(first + i)];
            }
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i)
            if (first + i < segments) {
                sums[place_of(first + i) * size] = state;
                state = {fmaf(decay[i], state.x, sum[i].x), fmaf(decay[i], state.y, sum[i].y),
                         fmaf(decay[i], state.z, sum[i].z), fmaf(decay[i], state.w, sum[i].w)};
            }
    }
}

int64_t combine_blocks(const StateArgs& a) {
    return int64_t(a.problem.N) * a.heads.count.value() * (segment_sum_size(a.problem) / 4 / kThreads);
}

template <Isa isa, int KTiles, DType Keys>
cudaError_t launch_states(const StateArgs& a, cudaStream_t stream) {
    const int64_t blocks = a.problem.segment_count() * a.heads.count.value() * (tiles(a.problem.V) + KTiles);
    const auto walk = [&](auto kernel, const StateArgs& args, int64_t of_blocks) {
        return launch(kernel, args, of_blocks, sizeof(Shared<KTiles, kTermsOf<Keys>>), stream, KTiles * kThreads);
    };
    const auto states = chunk_states_kernel<Pass::states, isa, KTiles, Keys>;
    if (a.in_turn) {
        if (!goes_in_turn(a)) return cudaErrorInvalidValue;
        StateArgs turn = a;
        turn.turn = a.reverse ? 1 : 0;
        const cudaError_t status = walk(states, turn, blocks / 2);
        if (status != cudaSuccess) return status;
        turn.turn = 1 - turn.turn;
        return walk(states, turn, blocks / 2);
    }
    if (a.problem.segmented() && !a.starts_known) {
        cudaError_t status = walk(chunk_states_kernel<Pass::sums, isa, KTiles, Keys>, a, blocks);
        if (status != cudaSuccess) return status;
        status = launch(combine_kernel, a, combine_blocks(a), 0, stream);
        if (status != cudaSuccess) return status;
    }
    return walk(states, a, blocks);
}

template <Isa isa, DType Keys>
cudaError_t launch_for_width(const StateArgs& a, cudaStream_t stream) {
    return tiles(a.problem.K) == 1 ? launch_states<isa, 1, Keys>(a, stream) : launch_states<isa, 2, Keys>(a, stream);
}

template <Isa isa>
cudaError_t launch_for_type(const StateArgs& a, cudaStream_t stream) {
    switch (a.keys.dtype) {
        case DType::f16: return launch_for_width<isa, DType::f16>(a, stream);
        case DType::bf16: return launch_for_width<isa, DType::bf16>(a, stream);
        default: return launch_for_width<isa, DType::f32>(a, stream);
    }
}

}  // namespace

cudaError_t launch_chunk_states(const StateArgs& a, cudaStream_t stream) {
    return a.problem.hopper ? launch_for_type<Isa::hopper>(a, stream) : launch_for_type<Isa::portable>(a, stream);
}

}  // namespace mesa
