// chunk_states: the joint state [G | H] before every chunk, and the adjoint after every chunk by the same recurrence.
//
// One block owns a column tile (64 columns of [G | H], all K rows) of one segment and head, in fp32 registers (four
// warps for every 64 rows), and walks over the segment's chunks: store the state as hi + lo panels, then
// S <- decay S + keys' (w values) on tensor cores. The weights and the keys' row scales go into the values, which are
// split in two terms; 16-bit keys are exact in one. What the next chunk needs comes while this one is worked on.
//
// Sequences of several segments take three launches: the same walk without storing gives every segment's own sum,
// `combine` makes of these the states before the segments, and the walk starts from those.
#include "chunk.cuh"

namespace mesa {
namespace {

enum class Pass { sums, states };

template <int KTiles, int KeyTerms>
struct Shared {
    // Two of what the products of the last chunk may still be reading; with two terms there is no room.
    static constexpr int kBuffers = KeyTerms == 1 ? 2 : 1;
    __half keys[kBuffers][KTiles * KeyTerms * kPanel];
    __half values[2 * kPanel];
    __half staging[KTiles * 2 * kPanel];
    ChunkGates gates[kBuffers];
    float key_scale[kBuffers][kChunk];
    float state_max[KTiles * 4], value_max[KTiles * 4];  // of each warp
};

__device__ __forceinline__ void store_warp_max(float* warp_max, float v) {
#pragma unroll
    for (int d = 1; d < 32; d *= 2) v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, d));
    if (threadIdx.x % 32 == 0) warp_max[threadIdx.x / 32] = v;
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

// Element (row, column) of the K x width matrix that holds this column tile's part of a start or end state.
__device__ __forceinline__ int64_t state_offset(int K, int width, int row, int col, bool transposed) {
    return transposed ? int64_t(col) * K + row : int64_t(row) * width + col;
}

// A thread's 32 numbers of a segment's sum; the order within a tile is the blocks' own affair.
__device__ __forceinline__ float4* segment_part(const StateArgs& a, int64_t segment, int head, int column_tiles,
                                                int tile) {
    const int64_t place = (segment * a.heads + head) * column_tiles + tile;
    return reinterpret_cast<float4*>(a.segment_sums) + place * 8 * blockDim.x + threadIdx.x;
}

template <Pass pass, Isa isa, int KTiles, int KeyTerms>
__global__ void __launch_bounds__(KTiles * kThreads, 2) chunk_states_kernel(const __grid_constant__ StateArgs a) {
    if constexpr (isa == Isa::hopper && !ptx::kHasHopper) return;  // never launched
    MESA_DYNAMIC_SHARED(shared_bytes);
    auto& sm = *reinterpret_cast<Shared<KTiles, KeyTerms>*>(shared_bytes);
    constexpr int kBlock = KTiles * kThreads, kRowsAtOnce = kBlock / 8, kPasses = kChunk / kRowsAtOnce;
    constexpr bool kAhead =
        KeyTerms == 1;  // the next chunk comes to registers during the products (two terms: too many)
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int row_tile = warp / 4, first_row = warp % 4 * 16;  // of this warp's 16 rows
    const int value_tiles = (a.problem.V + kChunk - 1) / kChunk, column_tiles = value_tiles + KTiles;
    const int tile = blockIdx.x % column_tiles;
    const int head = (blockIdx.x / column_tiles) % a.heads;
    const int64_t segment = blockIdx.x / column_tiles / a.heads;

    // This segment's chunks, [first, end) in the order of time, and its place in the order of the walk.
    const int segment_tokens = a.problem.segment_chunks * kChunk;
    const int n = sequence_at(a.problem, segment, segment_tokens);
    const int index_of_segment = static_cast<int>(segment - find_sequence(a.problem, n, segment_tokens).first_slot);
    const Sequence sequence = find_sequence(a.problem, n, kChunk);
    const int chunks = static_cast<int>((sequence.length + kChunk - 1) / kChunk);
    const int first = index_of_segment * a.problem.segment_chunks;
    if (index_of_segment < 0 || (first >= chunks && index_of_segment > 0)) return;  // the place is not in use
    const int end = min(first + a.problem.segment_chunks, chunks);
    const bool is_first = a.reverse ? end == chunks : first == 0, is_last = a.reverse ? first == 0 : end == chunks;
    if (pass == Pass::sums && is_last) return;  // nothing comes after it

    // This tile's columns: col0 .. of G (source 0, values) or of H (source 1).
    const int source = tile < value_tiles ? 0 : 1;
    const int col0 = (tile - (source ? value_tiles : 0)) * kChunk;
    const Rows& values = a.values[source];
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
        start += (int64_t(n) * (a.heads / a.start_group) + head / a.start_group) * K * width;
#pragma unroll
        for (int i = 0; i < 8; ++i)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int row = row_tile * kChunk + first_row + acc_row(lane, e / 2),
                          col = col0 + acc_col(lane, i) + e % 2;
                if (row < K && col < width) state.c[i][e] = start[state_offset(K, width, row, col, transposed)];
            }
    }

    struct {
        GatePair gates;
        RowPart<KTiles, KeyTerms == 2> keys[kPasses];
        RowPart<1, KeyTerms == 2> values[kPasses];
    } ahead;
    const auto fetch = [&](const Chunk& chunk) {
        if (warp == 0) ahead.gates = fetch_gates(a.gates, a.problem, chunk, head);
#pragma unroll
        for (int i = 0; i < kPasses; ++i) {
            const int t = i * kRowsAtOnce + threadIdx.x / 8;
            ahead.keys[i].fetch(a.keys, chunk, head, t, 0);
            ahead.values[i].fetch(values, chunk, head, t, col0);
        }
    };
    const auto chunk_at = [&](int step) { return chunk_of(sequence, a.reverse ? end - 1 - step : first + step); };
    if (kAhead && first < end) fetch(chunk_at(0));

    float log_decay = 0.f;  // of the segment
    for (int step = 0; step < end - first; ++step) {
        const Chunk chunk = chunk_at(step);
        const int buffer = kAhead ? step % 2 : 0;
        ChunkGates& gates = sm.gates[buffer];
        __half* const keys = sm.keys[buffer];
        float* const key_scale = sm.key_scale[buffer];

        if (step + 1 < end - first) {
            prefetch_rows<kBlock>(a.keys, chunk_at(step + 1), head, 0, K);
            prefetch_rows<kBlock>(values, chunk_at(step + 1), head, col0, kChunk);
        }

        // The chunk's keys and gates, and the size of the state as it meets them.
        if constexpr (kAhead) {
            if (warp == 0) store_gates(gates, ahead.gates);
#pragma unroll
            for (int i = 0; i < kPasses; ++i)
                ahead.keys[i].template store<KeyTerms>(keys, key_scale, i * kRowsAtOnce + threadIdx.x / 8, a.keys.dtype,
                                                       0);
        } else {
            __syncthreads();  // the last products are done
            load_gates(gates, a.gates, a.problem, chunk, head);
            load_rows<KTiles, KeyTerms, true, kBlock>(keys, key_scale, a.keys, chunk, head, 0, 0);
        }
        if (pass == Pass::states) store_warp_max(sm.state_max, largest(state));
        __syncthreads();

        // The values with all weights; the state into its place in shared memory.
        float v[kPasses][8];
        float amax = 0.f;
#pragma unroll
        for (int i = 0; i < kPasses; ++i) {
            const int t = i * kRowsAtOnce + threadIdx.x / 8;
            if constexpr (kAhead) {
                convert8<false>(v[i], ahead.values[i].pieces[0], values.dtype);
            } else if (t < chunk.length) {
                load8(v[i], values, row_offset(values, chunk, t, head), col0 + part_column());
            } else {
#pragma unroll
                for (int e = 0; e < 8; ++e) v[i][e] = 0.f;
            }
            const float weight = a.reverse ? gates.decay_from_start(t) : gates.decay(kChunk - 1, t) * gates.beta[t];
            const float factor = sign * weight * key_scale[t];
#pragma unroll
            for (int e = 0; e < 8; ++e) v[i][e] *= factor;
            amax = fmaxf(amax, max_abs(v[i]));
        }
        store_warp_max(sm.value_max, amax);
        const int64_t slot = sequence.first_slot + (a.reverse ? end - 1 - step : first + step);
        const int64_t place = state_tile(a.states, slot, head, column_tiles, tile);
        if constexpr (pass == Pass::states) {
            const Pow2Scale s = scale_to(block_max(sm.state_max), 13);
#pragma unroll
            for (int i = 0; i < 8; ++i)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    uint32_t hi, lo;
                    split(state.c[i][half * 2] * s.up, state.c[i][half * 2 + 1] * s.up, hi, lo);
                    const int at =
                        row_tile * 2 * kPanel + panel_offset(first_row + acc_row(lane, half), acc_col(lane, i));
                    *reinterpret_cast<uint32_t*>(sm.staging + at) = hi;
                    *reinterpret_cast<uint32_t*>(sm.staging + at + kPanel) = lo;
                }
            if (threadIdx.x == 0) a.states.scales[place] = s.down;
        }
        __syncthreads();

        if constexpr (pass == Pass::states)
            copy_panels<KTiles * 2, kBlock>(a.states.panels + place * KTiles * 2 * kPanel, sm.staging);
        const Pow2Scale vs = scale_to(block_max(sm.value_max), 8);
#pragma unroll
        for (int i = 0; i < kPasses; ++i)
            store_panel8<2>(sm.values, i * kRowsAtOnce + threadIdx.x / 8, part_column(), v[i], vs.up);
        publish_shared<isa>();
        if (kAhead && step + 1 < end - first) fetch(chunk_at(step + 1));
        __syncthreads();

        const float chunk_log_decay = gates.hi[kChunk - 1] + gates.lo[kChunk - 1],
                    decay = ptx::exp2_approx(chunk_log_decay);
        log_decay += chunk_log_decay;
        Acc add;
        zero(add);
        products_begin<isa>(add);
        mma_panels<isa, true, false, KeyTerms, 2>(add, keys + row_tile * KeyTerms * kPanel, first_row, sm.values, lane);
        products_end<isa>(add);
#pragma unroll
        for (int i = 0; i < 8; ++i)
#pragma unroll
            for (int e = 0; e < 4; ++e) state.c[i][e] = decay * state.c[i][e] + vs.down * add.c[i][e];
    }

    if constexpr (pass == Pass::sums) {
        float4* const part = segment_part(a, segment, head, column_tiles, tile);
#pragma unroll
        for (int i = 0; i < 8; ++i) part[i * kBlock] = {state.c[i][0], state.c[i][1], state.c[i][2], state.c[i][3]};
        if (tile == 0 && threadIdx.x == 0) a.segment_decays[segment * a.heads + head] = ptx::exp2_approx(log_decay);
    } else {
        float* to = source ? a.end_kk : a.end_kv;
        if (!to || !is_last) return;
        to += (int64_t(n) * a.heads + head) * K * width;
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
    const int blocks = gridDim.x / (a.problem.N * a.heads), size = blocks * kThreads;  // of a segment and head
    const int part = blockIdx.x % blocks * kThreads + threadIdx.x;
    const int head = (blockIdx.x / blocks) % a.heads, n = blockIdx.x / blocks / a.heads;
    const int segment_tokens = a.problem.segment_chunks * kChunk;
    const Sequence sequence = find_sequence(a.problem, n, segment_tokens);
    const int64_t segments = (sequence.length + segment_tokens - 1) / segment_tokens;
    float4 state = {0.f, 0.f, 0.f, 0.f};
    for (int64_t i = 0; i < segments; ++i) {
        const int64_t place = (sequence.first_slot + (a.reverse ? segments - 1 - i : i)) * a.heads + head;
        float4& at = reinterpret_cast<float4*>(a.segment_sums)[place * size + part];
        if (i + 1 == segments) {  // whose sum nobody needs
            at = state;
            break;
        }
        const float4 sum = at;
        const float decay = a.segment_decays[place];
        at = state;
        state = {fmaf(decay, state.x, sum.x), fmaf(decay, state.y, sum.y), fmaf(decay, state.z, sum.z),
                 fmaf(decay, state.w, sum.w)};
    }
}

int64_t combine_blocks(const StateArgs& a) {
    return a.problem.N * a.heads * (segment_sum_size(a.problem) / 4 / kThreads);
}

template <Isa isa, int KTiles, int KeyTerms>
cudaError_t launch_states(const StateArgs& a, cudaStream_t stream) {
    const int64_t blocks = a.problem.segments() * a.heads * (tiles(a.problem.V) + KTiles);
    const size_t shared = sizeof(Shared<KTiles, KeyTerms>);
    const int threads = KTiles * kThreads;
    if (a.problem.segmented()) {
        cudaError_t status =
            launch(chunk_states_kernel<Pass::sums, isa, KTiles, KeyTerms>, a, blocks, shared, stream, threads);
        if (status != cudaSuccess) return status;
        status = launch(combine_kernel, a, combine_blocks(a), 0, stream);
        if (status != cudaSuccess) return status;
    }
    return launch(chunk_states_kernel<Pass::states, isa, KTiles, KeyTerms>, a, blocks, shared, stream, threads);
}

template <Isa isa>
cudaError_t launch_for_shape(const StateArgs& a, cudaStream_t stream) {
    const bool two_terms = a.keys.dtype == DType::f32;
    if (tiles(a.problem.K) == 1)
        return two_terms ? launch_states<isa, 1, 2>(a, stream) : launch_states<isa, 1, 1>(a, stream);
    return two_terms ? launch_states<isa, 2, 2>(a, stream) : launch_states<isa, 2, 1>(a, stream);
}

}  // namespace

cudaError_t launch_chunk_states(const StateArgs& a, cudaStream_t stream) {
    return a.problem.hopper ? launch_for_shape<Isa::hopper>(a, stream) : launch_for_shape<Isa::portable>(a, stream);
}

}  // namespace mesa
