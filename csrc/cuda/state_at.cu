// state_at: the states after given numbers of tokens, for rolling back to a token that was accepted.
//
// Each state is a task of its own, whatever others are wanted of its sequence: it starts from the state before the
// sequence, which the cache has when its neighbours have read it, and adds token after token. For short pieces that
// hides behind writing the result; a state after a thousand tokens costs a thousand times 16 additions a thread.
#include "chunk.cuh"
#include "token.cuh"

namespace mesa {
namespace {

constexpr int kRows = 16;    // of the state that a block makes; of its columns [v | k], a thread has one
constexpr int kTokens = 8;   // that are read together

__global__ void __launch_bounds__(2 * kMaxWidth) state_at_kernel(const __grid_constant__ StateAtArgs a) {
    __shared__ float keys[kTokens][kRows], decay[kTokens], beta[kTokens];
    const int K = a.problem.K, V = a.problem.V, tiles = (K + kRows - 1) / kRows;
    // Neighbouring blocks start from the same state.
    const int block = blockIdx.x, m = block % a.M, tile = block / a.M % tiles, head = block / a.M / tiles % a.heads;
    const int n = block / a.M / tiles / a.heads;
    const Sequence sequence = find_sequence(a.problem, n, a.problem.chunks);
    const int64_t wanted = a.state_at[int64_t(n) * a.M + m];
    const int count = wanted < 0 ? 0 : (wanted < sequence.length ? static_cast<int>(wanted) : sequence.length);

    const int first_row = tile * kRows, rows = min(kRows, K - first_row);
    const bool is_v = int(threadIdx.x) < V;
    const int width = is_v ? V : K, col = is_v ? threadIdx.x : threadIdx.x - V;
    const int own_rows = col < width ? rows : 0;
    const Rows& values = is_v ? a.values : a.keys;
    const auto place = [&](int64_t state) { return ((state * a.heads + head) * K + first_row) * width + col; };

    float s[kRows];
    const float* const start = is_v ? a.start_kv : a.start_kk;
#pragma unroll
    for (int r = 0; r < kRows; ++r) s[r] = start && r < own_rows ? start[place(n) + int64_t(r) * width] : 0.f;

    for (int first = 0; first < count; first += kTokens) {
        const int token = sequence.token + first, tokens = min(count - first, kTokens);
        uint32_t bits[kTokens];
#pragma unroll
        for (int t = 0; t < kTokens; ++t)
            bits[t] = t < tokens ? fetch_row_value(values, sequence.batch, token + t, head, col) : 0;
        __syncthreads();
        for (int i = threadIdx.x; i < tokens * kRows; i += blockDim.x) {
            const int t = i / kRows, row = i % kRows;
            keys[t][row] =
                converted(fetch_row_value(a.keys, sequence.batch, token + t, head, first_row + row), a.keys.dtype);
        }
        if (int(threadIdx.x) < tokens) {
            const int64_t at =
                int64_t(sequence.batch * a.problem.T + token + int(threadIdx.x)) * a.gates.heads + head / a.gates.group;
            decay[threadIdx.x] = expf(a.gates.g[at]);
            beta[threadIdx.x] = a.gates.beta[at];
        }
        __syncthreads();
#pragma unroll
        for (int t = 0; t < kTokens; ++t) {
            if (t >= tokens) break;
            const float value = converted(bits[t], values.dtype);
#pragma unroll
            for (int r = 0; r < kRows; ++r) s[r] = fmaf(decay[t], s[r], beta[t] * (keys[t][r] * value));
        }
    }
    const int rows_to_store = ptx::opaque(own_rows);  // kept, predicates would fill registers
    float* const to = (is_v ? a.kv : a.kk) + place(int64_t(n) * a.M + m);
#pragma unroll
    for (int r = 0; r < kRows; ++r)
        if (r < rows_to_store) to[int64_t(r) * width] = s[r];
}

}  // namespace

cudaError_t launch_state_at(const StateAtArgs& a, cudaStream_t stream) {
    const Problem& p = a.problem;
    const int threads = (p.K + p.V + 31) / 32 * 32;
    return launch(state_at_kernel, a, int64_t(p.N) * a.M * a.heads * ((p.K + kRows - 1) / kRows), 0, stream, threads);
}

}  // namespace mesa
