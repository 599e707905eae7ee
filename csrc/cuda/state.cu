// chunk_states: the joint state [G | H] before every chunk, and the adjoint after every chunk by the same recurrence.
//
// One block owns a column tile (64 columns of [G | H], all K rows) of one sequence and head, in fp32 registers (four
// warps for every 64 rows), and walks over its chunks: store the state as hi + lo panels, then S <- decay S + keys' (w values) on tensor cores. The
// weights and the keys' row scales go into the values, which are split in two terms; 16-bit keys are exact in one.
#include "chunk.cuh"

namespace mesa {
namespace {

template <int KTiles, int KeyTerms>
struct Shared {
    __half keys[KTiles * KeyTerms * kPanel];
    __half values[2 * kPanel];
    __half staging[KTiles * 2 * kPanel];
    ChunkGates gates;
    float key_scale[kChunk];
    float warp_max[KTiles * 4];
};

template <int Warps>
__device__ __forceinline__ float block_max(float v, float (&warp_max)[Warps]) {
#pragma unroll
    for (int d = 1; d < 32; d *= 2) v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, d));
    __syncthreads();  // the last call's readers are done
    if (threadIdx.x % 32 == 0) warp_max[threadIdx.x / 32] = v;
    __syncthreads();
#pragma unroll
    for (int w = 0; w < Warps; ++w) v = fmaxf(v, warp_max[w]);
    return v;
}

// Element (row, column) of the K x width matrix that holds this column tile's part of a start or end state.
__device__ __forceinline__ int64_t state_offset(int K, int width, int row, int col, bool transposed) {
    return transposed ? int64_t(col) * K + row : int64_t(row) * width + col;
}

template <int KTiles, int KeyTerms>
__global__ void __launch_bounds__(KTiles * kThreads, 2) chunk_states_kernel(const __grid_constant__ StateArgs a) {
    extern __shared__ __align__(1024) unsigned char shared_bytes[];
    auto& sm = *reinterpret_cast<Shared<KTiles, KeyTerms>*>(shared_bytes);
    constexpr int kBlock = KTiles * kThreads, kRowsAtOnce = kBlock / 8, kPasses = kChunk / kRowsAtOnce;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int row_tile = warp / 4, first_row = warp % 4 * 16;  // of this warp's 16 rows
    const int value_tiles = (a.problem.V + kChunk - 1) / kChunk, column_tiles = value_tiles + KTiles;
    const int tile = blockIdx.x % column_tiles;
    const int head = (blockIdx.x / column_tiles) % a.heads;
    const int n = blockIdx.x / column_tiles / a.heads;

    // This tile's columns: col0 .. of G (source 0, values) or of H (source 1).
    const int source = tile < value_tiles ? 0 : 1;
    const int col0 = (tile - (source ? value_tiles : 0)) * kChunk;
    const Rows& values = a.values[source];
    const int K = a.problem.K, width = source ? K : a.problem.V;
    const bool transposed = a.reverse && source == 1;
    const float sign = transposed ? -1.f : 1.f;  // the adjoint's second values are -w
    const float* start = source ? a.start_kk : a.start_kv;
    float* end = source ? a.end_kk : a.end_kv;

    Acc state;
    zero(state);
    if (start && head % a.start_group == 0) {
        start += (int64_t(n) * (a.heads / a.start_group) + head / a.start_group) * K * width;
#pragma unroll
        for (int i = 0; i < 8; ++i)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int row = row_tile * kChunk + first_row + acc_row(lane, e / 2), col = col0 + acc_col(lane, i) + e % 2;
                if (row < K && col < width) state.c[i][e] = start[state_offset(K, width, row, col, transposed)];
            }
    }

    const Sequence sequence = find_sequence(a.problem, n);
    const int64_t chunks = (sequence.length + kChunk - 1) / kChunk;
    for (int64_t step = 0; step < chunks; ++step) {
        const int64_t index = a.reverse ? chunks - 1 - step : step;
        const Chunk chunk = chunk_of(sequence, index);

        if (step + 1 < chunks) {
            const Chunk next = chunk_of(sequence, a.reverse ? index - 1 : index + 1);
            prefetch_rows<kBlock>(a.keys, next, head, 0, K);
            prefetch_rows<kBlock>(values, next, head, col0, kChunk);
        }

        // The state as it meets this chunk, to memory.
        float amax = 0.f;
#pragma unroll
        for (int i = 0; i < 8; ++i)
#pragma unroll
            for (int e = 0; e < 4; ++e) amax = fmaxf(amax, fabsf(state.c[i][e]));
        const Pow2Scale s = scale_to(block_max(amax, sm.warp_max), 13);
#pragma unroll
        for (int i = 0; i < 8; ++i)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                uint32_t hi, lo;
                split(state.c[i][half * 2] * s.up, state.c[i][half * 2 + 1] * s.up, hi, lo);
                const int at = row_tile * 2 * kPanel + panel_offset(first_row + acc_row(lane, half), acc_col(lane, i));
                *reinterpret_cast<uint32_t*>(sm.staging + at) = hi;
                *reinterpret_cast<uint32_t*>(sm.staging + at + kPanel) = lo;
            }
        const int64_t place = state_tile(a.states, sequence.first_slot + index, head, column_tiles, tile);
        if (threadIdx.x == 0) a.states.scales[place] = s.down;

        // The chunk's keys and gates; then its values with all weights.
        load_gates(sm.gates, a.gates, a.problem, chunk, head);
        load_rows<KTiles, KeyTerms, KeyTerms == 2, kBlock>(sm.keys, sm.key_scale, a.keys, chunk, head, 0, 0);
        __syncthreads();
        copy_panels<KTiles * 2, kBlock>(a.states.panels + place * KTiles * 2 * kPanel, sm.staging);

        float v[kPasses][8];
        amax = 0.f;
#pragma unroll
        for (int pass = 0; pass < kPasses; ++pass) {
            const int t = pass * kRowsAtOnce + threadIdx.x / 8, col = (threadIdx.x % 8) * 8;
            if (t < chunk.length) {
                const int64_t at = row_offset(values, chunk, t, head);
                if (KeyTerms == 1 || values.dtype != DType::f32) load8<false>(v[pass], values, at, col0 + col);
                else load8<true>(v[pass], values, at, col0 + col);
                const float weight = a.reverse ? sm.gates.decay_from_start(t) : sm.gates.decay(kChunk - 1, t) * sm.gates.beta[t];
                const float factor = sign * weight * sm.key_scale[t];
#pragma unroll
                for (int e = 0; e < 8; ++e) v[pass][e] *= factor;
            } else {
#pragma unroll
                for (int e = 0; e < 8; ++e) v[pass][e] = 0.f;
            }
            amax = fmaxf(amax, max_abs(v[pass]));
        }
        const Pow2Scale vs = scale_to(block_max(amax, sm.warp_max), 8);
#pragma unroll
        for (int pass = 0; pass < kPasses; ++pass)
            store_panel8<2>(sm.values, pass * kRowsAtOnce + threadIdx.x / 8, (threadIdx.x % 8) * 8, v[pass], vs.up);
        __syncthreads();

        const float decay = sm.gates.decay_from_start(kChunk - 1);
        Operand<KeyTerms> keys;
        load_operand_t(keys, sm.keys + row_tile * KeyTerms * kPanel, first_row, lane);
        Acc add;
        zero(add);
        mma_AB<2>(add, keys, sm.values, lane);
#pragma unroll
        for (int i = 0; i < 8; ++i)
#pragma unroll
            for (int e = 0; e < 4; ++e) state.c[i][e] = decay * state.c[i][e] + vs.down * add.c[i][e];
    }

    if (!end) return;
    end += (int64_t(n) * a.heads + head) * K * width;
#pragma unroll
    for (int i = 0; i < 8; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const int row = row_tile * kChunk + first_row + acc_row(lane, e / 2), col = col0 + acc_col(lane, i) + e % 2;
            if (row < K && col < width) end[state_offset(K, width, row, col, transposed)] = state.c[i][e];
        }
}

template <int KTiles, int KeyTerms>
cudaError_t launch_states(const StateArgs& a, cudaStream_t stream) {
    const int64_t blocks = int64_t(a.problem.N) * a.heads * (tiles(a.problem.V) + KTiles);
    return launch(chunk_states_kernel<KTiles, KeyTerms>, a, blocks, sizeof(Shared<KTiles, KeyTerms>), stream,
                  KTiles * kThreads);
}

}  // namespace

cudaError_t launch_chunk_states(const StateArgs& a, cudaStream_t stream) {
    const bool two_terms = a.keys.dtype == DType::f32;
    if (tiles(a.problem.K) == 1) return two_terms ? launch_states<1, 2>(a, stream) : launch_states<1, 1>(a, stream);
    return two_terms ? launch_states<2, 2>(a, stream) : launch_states<2, 1>(a, stream);
}

}  // namespace mesa
