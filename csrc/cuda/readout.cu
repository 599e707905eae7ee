// readout: o_t = G_t' x_t, and (transposed) dx_t = G_t do_t, for the 64 tokens of a chunk.
//
//     O = e^{gc} (X G_c) + ((X K') o M) V          dX = e^{gc} (dO G_c') + ((dO V') o M) K
//
// Everything that is not exact in fp16 is taken in two terms: this is where precision would be lost last.
#include "chunk.cuh"

namespace mesa {
namespace {

// DTiles: tiles of the width that is contracted (K, or V if transposed).
template <int DTiles, int QueryTerms, int Terms>
struct Shared {
    __half queries[DTiles * QueryTerms * kPanel];
    __half keys[DTiles * Terms * kPanel];
    __half values[kMaxWidth / kChunk * Terms * kPanel];
    __half state[DTiles * 2 * kPanel];
    ChunkGates gates;
    float query_scale[kChunk], key_scale[kChunk], value_scale[kChunk];
};

template <int DTiles, int QueryTerms, int Terms, bool Transposed>
__global__ void __launch_bounds__(kThreads, DTiles == 1 && Terms == 1 ? 3 : 2) readout_kernel(const __grid_constant__ ReadoutArgs a) {
    extern __shared__ __align__(1024) unsigned char shared_bytes[];
    auto& sm = *reinterpret_cast<Shared<DTiles, QueryTerms, Terms>*>(shared_bytes);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int64_t slot = blockIdx.x / a.heads;
    const int head = blockIdx.x % a.heads;
    const Chunk chunk = find_chunk(a.problem, slot);
    if (chunk.length == 0) return;

    const int out_tiles = (a.values.width + kChunk - 1) / kChunk;
    load_gates(sm.gates, a.gates, a.problem, chunk, head);
    load_rows<DTiles, QueryTerms>(sm.queries, sm.query_scale, a.queries, chunk, head, 0, 4);
    load_rows<DTiles, Terms>(sm.keys, sm.key_scale, a.keys, chunk, head, 0, 0);
    if (out_tiles == 1) load_rows<1, Terms>(sm.values, sm.value_scale, a.values, chunk, head, 0, 0);
    else load_rows<2, Terms>(sm.values, sm.value_scale, a.values, chunk, head, 0, 0);
    __syncthreads();

    // (X K') o M, with all scales in it but the one that brings each row back into fp16.
    const int first_row = warp * 16;
    float score_scale[2], start_scale[2];
    Acc scores;
    zero(scores);
#pragma unroll
    for (int i = 0; i < DTiles; ++i) {
        Operand<QueryTerms> x;
        load_operand(x, sm.queries + i * QueryTerms * kPanel, first_row, lane);
        mma_ABt<Terms>(scores, x, sm.keys + i * Terms * kPanel, lane);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int i = first_row + acc_row(lane, half);
        start_scale[half] = sm.gates.decay_from_start(i) * sm.query_scale[i];
#pragma unroll
        for (int n = 0; n < 8; ++n)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const int j = acc_col(lane, n) + e;
                const float weight = sm.gates.decay(i, j) * sm.gates.beta[j] * sm.query_scale[i] * (sm.key_scale[j] * sm.value_scale[j]);
                float& s = scores.c[n][half * 2 + e];
                s = j <= i ? s * weight : 0.f;
            }
    }
    normalise_rows(scores, score_scale, 8);

    const int k_tiles = Transposed ? out_tiles : DTiles, v_tiles = Transposed ? DTiles : out_tiles;
    const int64_t place = state_tile(a.states, slot, head, v_tiles + k_tiles, 0);
    for (int tile = 0; tile < out_tiles; ++tile) {
        __syncthreads();  // the last tile's state has been used
        if constexpr (Transposed)
            for (int i = 0; i < DTiles; ++i)
                copy_panels<2>(sm.state + i * 2 * kPanel, a.states.panels + ((place + i) * k_tiles + tile) * 2 * kPanel);
        else
            copy_panels<DTiles * 2>(sm.state, a.states.panels + (place + tile) * DTiles * 2 * kPanel);

        Acc out[1];
        zero(out[0]);
        mma_acc_AB<Terms, 2>(out, scores, sm.values + tile * Terms * kPanel, lane);
#pragma unroll
        for (int n = 0; n < 8; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) out[0].c[n][e] *= score_scale[e / 2];
        __syncthreads();
#pragma unroll
        for (int i = 0; i < DTiles; ++i) {
            Operand<QueryTerms> x;
            load_operand(x, sm.queries + i * QueryTerms * kPanel, first_row, lane);
            Acc part;
            zero(part);
            if constexpr (Transposed) mma_ABt<2>(part, x, sm.state + i * 2 * kPanel, lane);
            else mma_AB<2>(part, x, sm.state + i * 2 * kPanel, lane);
            const float state_scale = a.states.scales[place + (Transposed ? i : tile)];
#pragma unroll
            for (int n = 0; n < 8; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e) out[0].c[n][e] = fmaf(start_scale[e / 2] * state_scale, part.c[n][e], out[0].c[n][e]);
        }
        store_strip(a.out, chunk, head, first_row, tile * kChunk, out[0], lane);
    }
}

template <int DTiles, int QueryTerms, int Terms, bool Transposed>
cudaError_t launch_readout_kernel(const ReadoutArgs& a, cudaStream_t stream) {
    return launch(readout_kernel<DTiles, QueryTerms, Terms, Transposed>, a, a.problem.slots() * a.heads,
                  sizeof(Shared<DTiles, QueryTerms, Terms>), stream);
}

template <int DTiles>
cudaError_t launch_for_width(const ReadoutArgs& a, cudaStream_t stream) {
    const bool two_terms = a.keys.dtype == DType::f32;
    if (a.transposed)
        return two_terms ? launch_readout_kernel<DTiles, 2, 2, true>(a, stream) : launch_readout_kernel<DTiles, 1, 1, true>(a, stream);
    return two_terms ? launch_readout_kernel<DTiles, 2, 2, false>(a, stream) : launch_readout_kernel<DTiles, 2, 1, false>(a, stream);
}

}  // namespace

cudaError_t launch_readout(const ReadoutArgs& a, cudaStream_t stream) {
    return tiles(a.keys.width) == 1 ? launch_for_width<1>(a, stream) : launch_for_width<2>(a, stream);
}

}  // namespace mesa
