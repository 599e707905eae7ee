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
    union {
        struct {
            __half keys[DTiles * Terms * kPanel];
            __half values[kMaxWidth / kChunk * Terms * kPanel];
        };
        __half second_state[DTiles * 2 * kPanel];  // of the second tile, once the tokens' part is done
    };
    __half state[DTiles * 2 * kPanel];  // of the first tile of the output
    ChunkGates gates;
    float query_scale[kChunk], key_scale[kChunk], value_scale[kChunk];
};

template <Isa isa, int DTiles, int QueryTerms, int Terms, bool Transposed>
__global__ void __launch_bounds__(kThreads, DTiles == 1 && Terms == 1 ? 3 : 2)
    readout_kernel(const __grid_constant__ ReadoutArgs a) {
    if constexpr (isa == Isa::hopper && !ptx::kHasHopper) return;  // never launched
    MESA_DYNAMIC_SHARED(shared_bytes);
    auto& sm = *reinterpret_cast<Shared<DTiles, QueryTerms, Terms>*>(shared_bytes);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int64_t slot = blockIdx.x / a.heads;
    const int head = blockIdx.x % a.heads;
    const Chunk chunk = find_chunk(a.problem, slot);
    if (chunk.length == 0) return;

    // Loads: everything is asked for at once; the state comes while the tokens' part is worked on.
    const int out_tiles = (a.values.width + kChunk - 1) / kChunk;
    const int k_tiles = Transposed ? out_tiles : DTiles, v_tiles = Transposed ? DTiles : out_tiles;
    const int64_t place = state_tile(a.states, slot, head, v_tiles + k_tiles, 0);
    const auto fetch_state = [&](__half* to, int tile) {
        if constexpr (Transposed)
            for (int i = 0; i < DTiles; ++i)
                copy_panels_async<2>(to + i * 2 * kPanel,
                                     a.states.panels + ((place + i) * k_tiles + tile) * 2 * kPanel);
        else
            copy_panels_async<DTiles * 2>(to, a.states.panels + (place + tile) * DTiles * 2 * kPanel);
        ptx::cp_async_commit();
    };
    fetch_rows<DTiles, QueryTerms>(sm.queries, a.queries, chunk, head, 0);
    fetch_rows<DTiles, Terms>(sm.keys, a.keys, chunk, head, 0);
    if (out_tiles == 1) fetch_rows<1, Terms>(sm.values, a.values, chunk, head, 0);
    else fetch_rows<2, Terms>(sm.values, a.values, chunk, head, 0);
    ptx::cp_async_commit();
    fetch_state(sm.state, 0);
    load_gates(sm.gates, a.gates, a.problem, chunk, head);
    ptx::cp_async_wait<1>();
    convert_rows<DTiles, QueryTerms>(sm.queries, sm.query_scale, a.queries.dtype, 4);
    convert_rows<DTiles, Terms>(sm.keys, sm.key_scale, a.keys.dtype, 0);
    if (out_tiles == 1) convert_rows<1, Terms>(sm.values, sm.value_scale, a.values.dtype, 0);
    else convert_rows<2, Terms>(sm.values, sm.value_scale, a.values.dtype, 0);
    publish_shared<isa>();
    __syncthreads();

    // (X K') o M, with all scales in it but the one that brings each row back into fp16.
    const int first_row = warp * 16;
    float score_scale[2], start_scale[2];
    Operand<2> weights;
    {
        Acc scores;
        products_begin<isa>(scores);
        mma_panels<isa, false, true, QueryTerms, Terms, false>(scores, sm.queries, first_row, sm.keys, lane);
        if constexpr (DTiles == 2)
            mma_panels<isa, false, true, QueryTerms, Terms>(scores, sm.queries + QueryTerms * kPanel, first_row,
                                                            sm.keys + Terms * kPanel, lane);
        products_end<isa>(scores);
        const int i[2] = {first_row + acc_row(lane, 0), first_row + acc_row(lane, 1)};
#pragma unroll
        for (int half = 0; half < 2; ++half)
            start_scale[half] = sm.gates.decay_from_start(i[half]) * sm.query_scale[i[half]];
#pragma unroll
        for (int n = 0; n < 8; ++n)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const int j = acc_col(lane, n) + e;
                const float weight = sm.gates.beta[j] * (sm.key_scale[j] * sm.value_scale[j]);
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    float& s = scores.c[n][half * 2 + e];
                    s = j <= i[half] ? s * (sm.gates.decay(i[half], j) * sm.query_scale[i[half]] * weight) : 0.f;
                }
            }
        normalise_rows(scores, score_scale, 8);
        acc_operand(weights, scores);
    }

    // The tokens' part of both tiles of the output, then the state's.
    Acc out[2];
    products_begin<isa>(out[0], out[1]);
    if (out_tiles == 1) mma_AB<isa, Terms, false>(out[0], weights, sm.values, lane);
    else mma_AB<isa, Terms, false>(out, weights, sm.values, Terms * kPanel, lane);
    products_end<isa>(out[0], out[1]);
    if (out_tiles == 2) {
        __syncthreads();  // keys and values have been used
        fetch_state(sm.second_state, 1);
    }
    const auto add_state = [&](Acc& to, const __half* state, int tile) {
        publish_shared<isa>();
        __syncthreads();
        Acc part[Transposed ? DTiles : 1];  // the state's tiles along V have scales of their own
        products_begin<isa>(part[0], part[(Transposed ? DTiles : 1) - 1]);
        mma_panels<isa, false, Transposed, QueryTerms, 2, false>(part[0], sm.queries, first_row, state, lane);
        if constexpr (DTiles == 2)
            mma_panels<isa, false, Transposed, QueryTerms, 2, !Transposed>(
                part[Transposed], sm.queries + QueryTerms * kPanel, first_row, state + 2 * kPanel, lane);
        products_end<isa>(part[0], part[(Transposed ? DTiles : 1) - 1]);
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int n = 0; n < 8; ++n)
#pragma unroll
                for (int e = half * 2; e < half * 2 + 2; ++e) {
                    float sum = to.c[n][e] * score_scale[half];
#pragma unroll
                    for (int i = 0; i < (Transposed ? DTiles : 1); ++i)
                        sum = fmaf(start_scale[half] * a.states.scales[place + (Transposed ? i : tile)],
                                   part[i].c[n][e], sum);
                    to.c[n][e] = sum;
                }
        store_strip(a.out, chunk, head, first_row, tile * kChunk, to, lane);
    };
    if (out_tiles == 2) ptx::cp_async_wait<1>();
    else ptx::cp_async_wait<0>();
    add_state(out[0], sm.state, 0);
    if (out_tiles == 2) {
        ptx::cp_async_wait<0>();
        add_state(out[1], sm.second_state, 1);
    }
}

template <Isa isa, int DTiles, int QueryTerms, int Terms, bool Transposed>
cudaError_t launch_kernel(const ReadoutArgs& a, cudaStream_t stream) {
    return launch(readout_kernel<isa, DTiles, QueryTerms, Terms, Transposed>, a, a.problem.slots() * a.heads,
                  sizeof(Shared<DTiles, QueryTerms, Terms>), stream);
}

template <Isa isa, int DTiles>
cudaError_t launch_for_dtype(const ReadoutArgs& a, cudaStream_t stream) {
    const bool two_terms = a.keys.dtype == DType::f32;
    if (a.transposed)
        return two_terms ? launch_kernel<isa, DTiles, 2, 2, true>(a, stream)
                         : launch_kernel<isa, DTiles, 1, 1, true>(a, stream);
    return two_terms ? launch_kernel<isa, DTiles, 2, 2, false>(a, stream)
                     : launch_kernel<isa, DTiles, 2, 1, false>(a, stream);
}

template <Isa isa>
cudaError_t launch_for_shape(const ReadoutArgs& a, cudaStream_t stream) {
    return tiles(a.keys.width) == 1 ? launch_for_dtype<isa, 1>(a, stream) : launch_for_dtype<isa, 2>(a, stream);
}

}  // namespace

cudaError_t launch_readout(const ReadoutArgs& a, cudaStream_t stream) {
    return a.problem.hopper ? launch_for_shape<Isa::hopper>(a, stream) : launch_for_shape<Isa::portable>(a, stream);
}

}  // namespace mesa
