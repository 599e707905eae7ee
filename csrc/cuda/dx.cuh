// dx_t = G_t do_t, the right-hand side of the backward solve, for the 64 tokens of a chunk:
//
//     dX = e^{gc} (dO G_c') + ((dO V') o M) K
//
// x' of the first part, which is wanted for dg, is made on the way.
// Everything that is not exact in fp16 is taken in two terms: this is where precision would be lost.
#pragma once

#include "chunk.cuh"

namespace mesa {

// The chunk in shared memory: rows as convert_rows leaves them, G as [tile of V][tile of K][hi, lo].
struct DxPanels {
    const __half *d_o, *values, *keys, *state;
    const PowersOfTwo* scales;  // of each token's row of do, v and k
    int value_tiles;
};

// Brings the rows' scales into dx, and of G's tiles along V those given. G may still be on its way to shared memory
// (by cp.async, as the thread's last group); keys, values and do have been published.
template <Isa isa, int KTiles, int Terms>
__device__ __forceinline__ void make_dx(Acc (&dx)[KTiles], float (&x_from_start)[2], const DxPanels& m,
                                        const float* state_scales, const ChunkGates& gates, const Rows& x,
                                        const Chunk& chunk, int head, int first_row, int lane) {
    constexpr int kTerms = Terms * kPanel;
    const int i[2] = {first_row + acc_row(lane, 0), first_row + acc_row(lane, 1)};
    const float do_scale[2] = {m.scales[i[0]].first(), m.scales[i[1]].first()};

    // (dO V') o M, with all scales in it but the one that brings each row back into fp16.
    float score_scale[2];
    Operand<2> weights;
    {
        Acc scores;
        products_begin<isa>(scores);
        mma_panels<isa, false, true, Terms, Terms, false>(scores, m.d_o, first_row, m.values, lane);
        if (m.value_tiles == 2)
            mma_panels<isa, false, true, Terms, Terms>(scores, m.d_o + kTerms, first_row, m.values + kTerms, lane);
        products_end<isa>(scores);
#pragma unroll
        for (int n = 0; n < 8; ++n)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const int j = acc_col(lane, n) + e;
                const float weight = gates.beta[j] * (m.scales[j].second() * m.scales[j].third());
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    float& s = scores.c[n][half * 2 + e];
                    s = j <= i[half] ? s * (gates.decay(i[half], j) * do_scale[half] * weight) : 0.f;
                }
            }
        normalise_rows(scores, score_scale, 8);
        acc_operand(weights, scores);
    }

    // The tokens' part, then the state's.
    products_begin<isa>(dx[0], dx[KTiles - 1]);
    mma_AB<isa, Terms, false>(dx, weights, m.keys, kTerms, lane);
    products_end<isa>(dx[0], dx[KTiles - 1]);
    // G's tiles along V have scales of their own. With wgmma they are worked on together (where there is one only, the
    // second part is zero), with mma.sync one after the other and the scores' scale brought in first, or some of a
    // thread's numbers would go to the stack.
    constexpr int kTogether = isa == Isa::hopper ? 2 : 1;
    const int rounds = isa == Isa::hopper ? 1 : m.value_tiles;
    const float state_scale[2] = {state_scales[0], state_scales[m.value_tiles - 1]};
    float start[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        start[half] = gates.decay_from_start(i[half]) * do_scale[half];
        x_from_start[half] = 0.f;
    }
    if constexpr (isa == Isa::portable) {
#pragma unroll
        for (int kt = 0; kt < KTiles; ++kt) scale_rows(dx[kt], score_scale[0], score_scale[1]);
        score_scale[0] = score_scale[1] = 1.f;
    }
    ptx::cp_async_wait<0>();
    publish_shared<isa>();
    __syncthreads();
#pragma unroll
    for (int kt = 0; kt < KTiles; ++kt)
#pragma unroll 1
        for (int first = 0; first < rounds; ++first) {
            const __half* const state = m.state + (first * KTiles + kt) * 2 * kPanel;
            Acc part[kTogether];
            zero(part[kTogether - 1]);
            products_begin<isa>(part[0], part[kTogether - 1]);
            mma_panels<isa, false, true, Terms, 2, false>(part[0], m.d_o + first * kTerms, first_row, state, lane);
            if (kTogether == 2 && m.value_tiles == 2)
                mma_panels<isa, false, true, Terms, 2>(part[kTogether - 1], m.d_o + kTerms, first_row,
                                                       state + KTiles * 2 * kPanel, lane);
            products_end<isa>(part[0], part[kTogether - 1]);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const StripRow row(x, chunk, head, i[half], kt * kChunk, ptx::opaque(lane));
                float scale[kTogether];
#pragma unroll
                for (int u = 0; u < kTogether; ++u)
                    scale[u] = start[half] * (first + u == 0 ? state_scale[0] : state_scale[1]);
#pragma unroll
                for (int n = 0; n < 8; ++n) {
                    const float2 x_pair = row.pair(n);
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        float sum = scale[0] * part[0].c[n][half * 2 + e];
#pragma unroll
                        for (int u = 1; u < kTogether; ++u) sum = fmaf(scale[u], part[u].c[n][half * 2 + e], sum);
                        x_from_start[half] = fmaf(e ? x_pair.y : x_pair.x, sum, x_from_start[half]);
                        float& out = dx[kt].c[n][half * 2 + e];
                        out = fmaf(out, score_scale[half], sum);
                    }
                }
            }
        }
    x_from_start[0] = quad_sum(x_from_start[0]), x_from_start[1] = quad_sum(x_from_start[1]);
}

}  // namespace mesa
