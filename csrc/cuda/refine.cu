// refine: the badly conditioned rows of float32 inputs (see RefineArgs), in float64.
//
// One block owns a column tile (64 columns of G, or of H) of one sequence and head in registers and walks over the
// sequence token by token, as the recurrence is written down: S <- e^g S + beta key value', and x' S where that is
// wanted. So nothing is rounded on the way, however long it is: where o cancels by a factor of 1000, the two fp16 terms
// of the solver's states would put it off by more than 5e-5, and float32 states would too after some dozens of chunks.
// A sequence without hard rows costs a look at its flags; the others' walks end with their last chunk of them.
//
// Eight neighbouring lanes own all rows of four columns. Keys and x are made double once, on their way to shared
// memory: conversions are slower than products.
#include "chunk.cuh"

namespace mesa {
namespace {

constexpr int kTokens = 16;   // that are staged together
constexpr int kColumns = 4;   // of a lane
constexpr int kRowLanes = 8;  // lanes that share these, each with two rows of every sixteen
static_assert(kThreads / kRowLanes * kColumns == kChunk);

template <int KTiles>
struct Shared {
    double2 keys[kTokens][KTiles * kChunk / 2];
    double2 x[kTokens][KTiles * kChunk / 2];  // of the rows to refine
    double2 values[kTokens][kChunk / 2];      // times beta
    double2 minuends[kTokens][kChunk / 2];    // rhs - Lambda x, for the residuals
    double decay[kTokens];
    int last_hard[kThreads / 32];
};

// A chunk's rows from the first on that has shown a bad condition: that of the next ones is hardly better, but their
// steps need not show it, where the right-hand side has little in the direction that makes it bad.
__device__ __forceinline__ HardRows rows_to_refine(HardRows shown) { return shown | (0 - shown); }

// Two neighbouring elements of a row of float32, zero past the end.
__device__ __forceinline__ double2 row_pair(const Rows& m, const Chunk& c, int token, int head, int col) {
    if (token >= c.length || col >= m.width) return {0., 0.};
    const float* const row = static_cast<const float*>(m.data) + row_offset(m, c, token, head);
    const float2 pair = *reinterpret_cast<const float2*>(row + col);
    return {pair.x, pair.y};
}

// Chunks of the sequence up to its last one with hard rows, of which `flags` are the first chunk's.
template <int KTiles>
__device__ __forceinline__ int chunks_to_walk(Shared<KTiles>& sm, const HardRows* flags, int heads, int length) {
    int last = 0;
    for (int i = threadIdx.x; i < (length + kChunk - 1) / kChunk; i += kThreads)
        if (flags[int64_t(i) * heads]) last = i + 1;
    last = static_cast<int>(__reduce_max_sync(0xffffffffu, static_cast<unsigned>(last)));
    if (threadIdx.x % 32 == 0) sm.last_hard[threadIdx.x / 32] = last;
    __syncthreads();
#pragma unroll
    for (int w = 0; w < kThreads / 32; ++w) last = max(last, sm.last_hard[w]);
    return last;
}

enum class Product { residual, read_out };

template <Product product, int KTiles>
__global__ void __launch_bounds__(kThreads, 2) walk_kernel(const __grid_constant__ RefineArgs a) {
    MESA_DYNAMIC_SHARED(shared_bytes);
    auto& sm = *reinterpret_cast<Shared<KTiles>*>(shared_bytes);
    constexpr bool kResidual = product == Product::residual;
    constexpr int kRowPairs = KTiles * kChunk / 2, kPairs = kRowPairs / kRowLanes;  // of the state; of a lane
    const Rows& values = kResidual ? a.keys : a.values;
    const Rows& to = kResidual ? a.correction : a.out;
    const int K = a.problem.K, width = values.width;
    const int column_tiles = (width + kChunk - 1) / kChunk;
    const int tile_col = blockIdx.x % column_tiles * kChunk;
    const int head = a.heads.first + (blockIdx.x / column_tiles) % a.heads.count;
    const int n = blockIdx.x / column_tiles / a.heads.count;
    const int state_head = head / a.gates.group;
    const Sequence sequence = find_sequence(a.problem, n, a.problem.chunks);
    const HardRows* const flags = a.hard_rows + int64_t(sequence.first_slot) * a.heads.all + head;
    const int chunks = chunks_to_walk(sm, flags, a.heads.all, sequence.length);
    if (chunks == 0) return;
    const auto gate_at = [&](int token) {
        return int64_t(sequence.batch * a.problem.T + sequence.token + token) * a.gates.heads + state_head;
    };

    const int row_lane = threadIdx.x % kRowLanes, own_col = threadIdx.x / kRowLanes * kColumns;
    double state[kColumns][kPairs][2];
    const float* const start = kResidual ? a.start_kk : a.start_kv;
#pragma unroll
    for (int c = 0; c < kColumns; ++c)
#pragma unroll
        for (int i = 0; i < kPairs; ++i)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const int row = (i * kRowLanes + row_lane) * 2 + e, col = tile_col + own_col + c;
                state[c][i][e] = start && row < K && col < width
                                     ? start[((int64_t(n) * a.gates.heads + state_head) * K + row) * width + col]
                                     : 0.;
            }

    const int end = min(sequence.length, chunks * kChunk);
    for (int first = 0; first < end; first += kTokens) {
        const Chunk chunk = chunk_of(sequence, first / kChunk);
        const int first_token = first % kChunk, tokens = min(kTokens, chunk.length - first_token);
        const HardRows rows = rows_to_refine(flags[int64_t(first / kChunk) * a.heads.all]);
        const auto refines = [&](int t) { return (rows >> (first_token + t) & 1) != 0; };

        __syncthreads();  // what was staged before has been read
        for (int i = threadIdx.x; i < tokens * kRowPairs; i += kThreads) {
            const int t = i / kRowPairs, pair = i % kRowPairs;
            sm.keys[t][pair] = row_pair(a.keys, chunk, first_token + t, head, pair * 2);
            if (!refines(t)) continue;
            double2 x = row_pair(a.x, chunk, first_token + t, head, pair * 2);
            if constexpr (!kResidual) {
                const double2 more = row_pair(a.correction, chunk, first_token + t, head, pair * 2);
                x = {x.x + more.x, x.y + more.y};
            }
            sm.x[t][pair] = x;
        }
        for (int i = threadIdx.x; i < tokens * kChunk / 2; i += kThreads) {
            const int t = i / (kChunk / 2), pair = i % (kChunk / 2), col = tile_col + pair * 2;
            const double beta = a.gates.beta[gate_at(first + t)];
            const double2 value = row_pair(values, chunk, first_token + t, head, col);
            sm.values[t][pair] = {beta * value.x, beta * value.y};
            if (!kResidual || !refines(t)) continue;
            const double2 b = row_pair(a.rhs, chunk, first_token + t, head, col);
            const double2 x = row_pair(a.x, chunk, first_token + t, head, col);
            const LambPair lamb = a.lamb[(state_head * KTiles * kChunk + col) / 2];
            sm.minuends[t][pair] = {b.x - lamb.lamb[0] * x.x, b.y - lamb.lamb[1] * x.y};
        }
        if (int(threadIdx.x) < tokens) sm.decay[threadIdx.x] = exp(double(a.gates.g[gate_at(first + threadIdx.x)]));
        __syncthreads();

        for (int t = 0; t < tokens; ++t) {
            const double decay = sm.decay[t];
            const double* const value = &sm.values[t][0].x + own_col;
#pragma unroll
            for (int i = 0; i < kPairs; ++i) {
                const double2 key = sm.keys[t][i * kRowLanes + row_lane];
#pragma unroll
                for (int c = 0; c < kColumns; ++c) {
                    double(&s)[2] = state[c][i];
                    s[0] = fma(key.x, value[c], decay * s[0]), s[1] = fma(key.y, value[c], decay * s[1]);
                }
            }
            double sum[kColumns] = {};
            if (refines(t)) {
#pragma unroll
                for (int i = 0; i < kPairs; ++i) {
                    const double2 x = sm.x[t][i * kRowLanes + row_lane];
#pragma unroll
                    for (int c = 0; c < kColumns; ++c)
                        sum[c] = fma(x.x, state[c][i][0], fma(x.y, state[c][i][1], sum[c]));
                }
#pragma unroll
                for (int c = 0; c < kColumns; ++c) {
#pragma unroll
                    for (int d = 1; d < kRowLanes; d *= 2) sum[c] += __shfl_xor_sync(0xffffffffu, sum[c], d);
                    if constexpr (kResidual) sum[c] = (&sm.minuends[t][0].x)[own_col + c] - sum[c];
                }
            }
            const bool wanted = kResidual ? rows != 0 : refines(t);
            if (wanted && row_lane == 0 && tile_col + own_col < padded_width(to)) {
                float* const row = static_cast<float*>(to.data) + row_offset(to, chunk, first_token + t, head);
                *reinterpret_cast<float4*>(row + tile_col + own_col) = {float(sum[0]), float(sum[1]), float(sum[2]),
                                                                        float(sum[3])};
            }
        }
    }
}

// x += correction. After the read-out, whose blocks all read x.
__global__ void __launch_bounds__(kThreads) add_correction_kernel(const __grid_constant__ RefineArgs a) {
    const int slot = blockIdx.x / a.heads.count;
    const int head = a.heads.first + blockIdx.x % a.heads.count, lane = threadIdx.x % 32;
    const Chunk chunk = find_chunk(a.problem, slot);
    if (chunk.length == 0) return;
    const HardRows rows = rows_to_refine(a.hard_rows[int64_t(slot) * a.heads.all + head]);
    if (rows == 0) return;
    float* const x = static_cast<float*>(a.x.data) + row_offset(a.x, chunk, 0, head);
    const float* const correction = static_cast<const float*>(a.correction.data) +
                                    row_offset(a.correction, chunk, 0, head);
    for (int t = threadIdx.x / 32; t < chunk.length; t += kThreads / 32)
        for (int col = lane; col < a.problem.K && (rows >> t & 1); col += 32)
            x[t * a.x.token_stride + col] += correction[t * a.correction.token_stride + col];
}

template <Product product>
cudaError_t launch_walk(const RefineArgs& a, cudaStream_t stream) {
    const int width = product == Product::residual ? a.problem.K : a.problem.V;
    const int64_t blocks = int64_t(a.problem.N) * a.heads.count.value() * tiles(width);
    if (tiles(a.problem.K) == 1) return launch(walk_kernel<product, 1>, a, blocks, sizeof(Shared<1>), stream);
    return launch(walk_kernel<product, 2>, a, blocks, sizeof(Shared<2>), stream);
}

}  // namespace

cudaError_t launch_residuals(const RefineArgs& a, cudaStream_t stream) {
    return launch_walk<Product::residual>(a, stream);
}

cudaError_t launch_refined(const RefineArgs& a, cudaStream_t stream) {
    const cudaError_t status = launch_walk<Product::read_out>(a, stream);
    if (status != cudaSuccess) return status;
    return launch(add_correction_kernel, a, a.problem.slots() * a.heads.count.value(), 0, stream);
}

}  // namespace mesa
