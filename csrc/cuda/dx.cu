// dx: dx_t = G_t do_t, the right-hand side of the backward solve, for the 64 tokens of a chunk.
//
//     dX = e^{gc} (dO G_c') + ((dO V') o M) K
//
// x' of the first part, which is wanted for dg, is made on the way.
// Everything that is not exact in fp16 is taken in two terms: this is where precision would be lost.
#include "chunk.cuh"

namespace mesa {
namespace {

template <int VTiles, int Terms>
struct Shared {
    __half d_o[VTiles * Terms * kPanel];
    union {
        struct {
            __half values[VTiles * Terms * kPanel];
            __half keys[kMaxWidth / kChunk * Terms * kPanel];
        };
        __half second_state[VTiles * 2 * kPanel];  // of the second tile, once the tokens' part is done
    };
    __half state[VTiles * 2 * kPanel];  // G' of the first tile of dx
    ChunkGates gates;
    float do_scale[kChunk], value_scale[kChunk], key_scale[kChunk];
};

template <Isa isa, int VTiles, int Terms>
__global__ void __launch_bounds__(kThreads, VTiles == 1 && Terms == 1 ? 3 : 2)
    dx_kernel(const __grid_constant__ DxArgs a) {
    if constexpr (isa == Isa::hopper && !ptx::kHasHopper) return;  // never launched
    MESA_DYNAMIC_SHARED(shared_bytes);
    auto& sm = *reinterpret_cast<Shared<VTiles, Terms>*>(shared_bytes);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int64_t slot = blockIdx.x / a.heads;
    const int head = blockIdx.x % a.heads;
    const Chunk chunk = find_chunk(a.problem, slot);
    if (chunk.length == 0) return;

    // Loads: everything is asked for at once; the state comes while the tokens' part is worked on.
    const int k_tiles = (a.problem.K + kChunk - 1) / kChunk;
    const int64_t place = state_tile(a.states, slot, head, VTiles + k_tiles, 0);
    const auto fetch_state = [&](__half* to, int tile) {
        for (int i = 0; i < VTiles; ++i)
            copy_panels_async<2>(to + i * 2 * kPanel, a.states.panels + ((place + i) * k_tiles + tile) * 2 * kPanel);
        ptx::cp_async_commit();
    };
    const GatePair gates = fetch_gates(a.gates, a.problem, chunk, head);
    fetch_rows<VTiles, Terms>(sm.d_o, a.d_o, chunk, head, 0);
    fetch_rows<VTiles, Terms>(sm.values, a.values, chunk, head, 0);
    if (k_tiles == 1) fetch_rows<1, Terms>(sm.keys, a.keys, chunk, head, 0);
    else fetch_rows<2, Terms>(sm.keys, a.keys, chunk, head, 0);
    ptx::cp_async_commit();
    fetch_state(sm.state, 0);
    prefetch_rows(a.x, chunk, head);
    store_gates(sm.gates, gates);
    ptx::cp_async_wait<1>();
    convert_rows<VTiles, Terms>(sm.d_o, sm.do_scale, a.d_o.dtype, 4);
    convert_rows<VTiles, Terms>(sm.values, sm.value_scale, a.values.dtype, 0);
    if (k_tiles == 1) convert_rows<1, Terms>(sm.keys, sm.key_scale, a.keys.dtype, 0);
    else convert_rows<2, Terms>(sm.keys, sm.key_scale, a.keys.dtype, 0);
    publish_shared<isa>();
    __syncthreads();

    // (dO V') o M, with all scales in it but the one that brings each row back into fp16.
    const int first_row = warp * 16;
    float score_scale[2], start_scale[2];
    Operand<2> weights;
    {
        Acc scores;
        products_begin<isa>(scores);
        mma_panels<isa, false, true, Terms, Terms, false>(scores, sm.d_o, first_row, sm.values, lane);
        if constexpr (VTiles == 2)
            mma_panels<isa, false, true, Terms, Terms>(scores, sm.d_o + Terms * kPanel, first_row,
                                                            sm.values + Terms * kPanel, lane);
        products_end<isa>(scores);
        const int i[2] = {first_row + acc_row(lane, 0), first_row + acc_row(lane, 1)};
#pragma unroll
        for (int half = 0; half < 2; ++half)
            start_scale[half] = sm.gates.decay_from_start(i[half]) * sm.do_scale[i[half]];
#pragma unroll
        for (int n = 0; n < 8; ++n)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const int j = acc_col(lane, n) + e;
                const float weight = sm.gates.beta[j] * (sm.key_scale[j] * sm.value_scale[j]);
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    float& s = scores.c[n][half * 2 + e];
                    s = j <= i[half] ? s * (sm.gates.decay(i[half], j) * sm.do_scale[i[half]] * weight) : 0.f;
                }
            }
        normalise_rows(scores, score_scale, 8);
        acc_operand(weights, scores);
    }

    // The tokens' part of both tiles of dx, then the state's.
    Acc out[2];
    products_begin<isa>(out[0], out[1]);
    if (k_tiles == 1) mma_AB<isa, Terms, false>(out[0], weights, sm.keys, lane);
    else mma_AB<isa, Terms, false>(out, weights, sm.keys, Terms * kPanel, lane);
    products_end<isa>(out[0], out[1]);
    if (k_tiles == 2) {
        __syncthreads();  // keys and values have been used
        fetch_state(sm.second_state, 1);
    }
    float from_start[2] = {0.f, 0.f};
    const auto add_state = [&](Acc& to, const __half* state, int tile) {
        publish_shared<isa>();
        __syncthreads();
        Acc part[VTiles];  // the state's tiles along V have scales of their own
        products_begin<isa>(part[0], part[VTiles - 1]);
        mma_panels<isa, false, true, Terms, 2, false>(part[0], sm.d_o, first_row, state, lane);
        if constexpr (VTiles == 2)
            mma_panels<isa, false, true, Terms, 2, false>(part[1], sm.d_o + Terms * kPanel, first_row,
                                                          state + 2 * kPanel, lane);
        products_end<isa>(part[0], part[VTiles - 1]);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const StripRow x(a.x, chunk, head, first_row + acc_row(lane, half), tile * kChunk, lane);
#pragma unroll
            for (int n = 0; n < 8; ++n) {
                const float2 x_pair = x.pair(n);
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    float sum = 0.f;
#pragma unroll
                    for (int i = 0; i < VTiles; ++i)
                        sum = fmaf(start_scale[half] * a.states.scales[place + i], part[i].c[n][half * 2 + e], sum);
                    from_start[half] = fmaf(e ? x_pair.y : x_pair.x, sum, from_start[half]);
                    float& out = to.c[n][half * 2 + e];
                    out = fmaf(out, score_scale[half], sum);
                }
            }
        }
        store_strip<true>(a.dx, chunk, head, first_row, tile * kChunk, to, lane);
    };
    if (k_tiles == 2) ptx::cp_async_wait<1>();
    else ptx::cp_async_wait<0>();
    add_state(out[0], sm.state, 0);
    if (k_tiles == 2) {
        ptx::cp_async_wait<0>();
        add_state(out[1], sm.second_state, 1);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int t = first_row + acc_row(lane, half);
        const float sum = quad_sum(from_start[half]);
        if (lane % 4 == 0 && t < chunk.length)
            a.from_start[(chunk.batch * a.problem.T + chunk.token + t) * a.heads + head] = sum;
    }
}

template <Isa isa, int VTiles, int Terms>
cudaError_t launch_kernel(const DxArgs& a, cudaStream_t stream) {
    return launch(dx_kernel<isa, VTiles, Terms>, a, a.problem.slots() * a.heads, sizeof(Shared<VTiles, Terms>), stream);
}

template <Isa isa>
cudaError_t launch_for_shape(const DxArgs& a, cudaStream_t stream) {
    const bool two_terms = a.keys.dtype == DType::f32;
    if (tiles(a.problem.V) == 1)
        return two_terms ? launch_kernel<isa, 1, 2>(a, stream) : launch_kernel<isa, 1, 1>(a, stream);
    return two_terms ? launch_kernel<isa, 2, 2>(a, stream) : launch_kernel<isa, 2, 1>(a, stream);
}

}  // namespace

cudaError_t launch_dx(const DxArgs& a, cudaStream_t stream) {
    return a.problem.hopper ? launch_for_shape<Isa::hopper>(a, stream) : launch_for_shape<Isa::portable>(a, stream);
}

}  // namespace mesa
