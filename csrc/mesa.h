// The CUDA kernels' interface: plain pointers, sizes, strides and a stream; no torch.
//
// Names follow DESIGN: per head a state S = [G | H] is a linear-attention state with keys k and values [v | k]; the
// adjoint of it is one with keys x and values [do | -w]. Work is cut into chunks of 64 tokens, numbered by "slots"
// (see Problem). Sizes: B batch, N sequences, T tokens, K key width, V value width; HQ, HK heads of q and k, HS heads
// of the state (v, g, beta, lamb), HO = max(HQ, HS) output heads.
#pragma once

#include <cstdint>

#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include "divisor.h"
#include "packed.h"

namespace mesa {

constexpr int kChunk = 64;               // tokens of a chunk, and width and height of a panel
constexpr int kPanel = kChunk * kChunk;  // elements of a panel
constexpr int kMaxWidth = 128;           // of K and V
constexpr size_t kMostSharedBytes = 161 << 10;  // that a kernel takes: float32's backward solve at width 128

enum class DType : int { f16, bf16, f32 };

// A [B, T, H, width] tensor; strides in elements. Every row is contiguous, starts at a multiple of 16 bytes and is
// padded to a multiple of 8 elements with zeros, which the kernels write too. A kernel's head h uses head h / group, so
// that grouped heads need no copies.
struct Rows {
    void* data;
    int64_t batch_stride, token_stride;
    int head_stride;
    DType dtype;
    int width;  // without the padding
    Divisor group;
};

// The same by column tiles of 64, which may lie in different places.
struct TiledRows {
    Rows tile[kMaxWidth / kChunk];

    TiledRows() : tile{} {}
    TiledRows(const Rows& whole) {  // one behind the other
        for (int i = 0; i < kMaxWidth / kChunk; ++i) {
            const int column = i * kChunk, left = whole.width > column ? whole.width - column : 0;
            tile[i] = whole;
            tile[i].width = left < kChunk ? left : kChunk;
            if (left) tile[i].data = static_cast<char*>(whole.data) + column * (whole.dtype == DType::f32 ? 4 : 2);
        }
    }
};

// Sequences cut into places of so many tokens each.
struct Places {
    Divisor tokens;
    Divisor of_each;  // places of each of the sequences, where all have the same length (an empty one has one too)

    Places(int64_t tokens, int64_t length)
        : tokens(tokens), of_each(length == 0 ? 1 : (length + tokens - 1) / tokens) {}
};

// Where the sequences lie. A chunk slot is a place for one chunk's state; sequence n owns the slots from first_slot(n)
// on. Packed sequences start at cu_seqlens[n] / 64 + n: never too close together, and known without a host sync.
// Segments (see StateArgs) have places of the same kind.
struct Problem {
    int T;  // tokens are counted in 31 bits: B T + 64 N < 2^31
    int N;
    const int64_t* cu_seqlens;  // [N + 1] on the device, or null: N sequences of T tokens, one per batch row
    int K, V;
    bool hopper;  // use the kernels for compute capability 9.0 where there are any
    int segment_chunks;
    Places chunks, segments;

    Problem() : Problem(0, 0, nullptr, 0, 0, false, 1) {}
    Problem(int64_t T, int N, const int64_t* cu_seqlens, int K, int V, bool hopper, int segment_chunks)
        : T(static_cast<int>(T)), N(N), cu_seqlens(cu_seqlens), K(K), V(V), hopper(hopper),
          segment_chunks(segment_chunks), chunks(kChunk, T), segments(int64_t(segment_chunks) * kChunk, T) {}

    MESA_HOST_DEVICE int64_t slots() const { return T == 0 && !cu_seqlens ? 0 : count(chunks); }
    int64_t segment_count() const { return count(segments); }  // of an empty sequence one too: its final state
    bool segmented() const { return T > segments.tokens.value(); }

  private:
    MESA_HOST_DEVICE int64_t count(const Places& p) const {
        return cu_seqlens ? T / p.tokens + int64_t(N) : int64_t(N) * p.of_each.value();
    }
};

// Long sequences are cut into segments of so many chunks, always at the same tokens, so that no result depends on what
// else is in the batch.
constexpr int kSegmentChunks = 64;

// A kernel's heads: of all that its arrays have, those that it works on. The states' memory is only for these.
struct Heads {
    int all, first;
    Divisor count;

    Heads(int heads = 0) : all(heads), first(0), count(heads) {}
    Heads(int all_, int first_, int count_) : all(all_), first(first_), count(count_) {}
};

struct Gates {
    const float* g;     // [B, T, heads / group] natural logarithm of the decay
    const float* beta;  // [B, T, heads / group]
    int heads;          // heads / group
    Divisor group;
};

// States before each chunk (or adjoints after it) as 64 x 64 panels of fp16 pairs hi + lo, swizzled as in shared
// memory: panels [slot, head, column tile, row tile, hi/lo, 64, 64], scales [slot, head, column tile].
// Column tiles are those of G (V wide) followed by those of H (K wide). value = scale * (hi + lo). H's tile above the
// diagonal need not be there but for chunks that meets_state() names.
struct SplitStates {
    __half* panels;
    float* scales;
    int heads;      // of the arrays
    Divisor group;  // a kernel's head h uses head h / group - first
    int first = 0;
};

__host__ __device__ inline int tiles(int width) { return (width + kChunk - 1) / kChunk; }
inline int64_t split_state_panels(const Problem& p) {  // panels of one slot and head
    return int64_t(tiles(p.V) + tiles(p.K)) * tiles(p.K) * 2;
}

// Elements of one segment's joint state: column tiles of 64 columns, in no particular order.
inline int64_t segment_sum_size(const Problem& p) { return int64_t(tiles(p.V) + tiles(p.K)) * tiles(p.K) * kPanel; }

// Two neighbouring elements of lamb as the solver wants them.
struct alignas(16) LambPair {
    float lamb[2], inverse[2];
};

// S <- decay S + sum_j w_j keys_j values_j', chunk by chunk, forwards from the initial state or (reverse) backwards
// from the gradient of the final state. The state that a chunk meets is stored in `states`. Sequences longer than a
// segment are worked on in parallel: the sum of every segment first, then the states before them, then all chunks. Or
// `in_turn`, see below.
struct StateArgs {
    Problem problem;
    Rows keys;       // k, or x (reverse)
    TiledRows values[2];  // v and k, or do and w (reverse; w enters negated)
    Gates gates;
    const float* start_kv;  // [N, heads / start_group, K, V] or null
    const float* start_kk;  // [N, heads / start_group, K, K] or null; transposed when reverse
    float* end_kv;          // [N, heads, K, V] or null
    float* end_kk;          // [N, heads, K, K] or null; transposed when reverse
    SplitStates states;
    Heads heads;
    Divisor start_group;  // only heads with h % start_group == 0 take the start
    bool reverse;
    float* segment_sums;    // [segment_count, heads.all, segment_sum_size], where problem.segmented(): written, and
                            // then the states before the segments (of a sequence's first, zeros); or these, if known
    float* segment_decays;  // [segment_count, heads.all], for the kernels' own use
    const float* lamb;      // [heads, K] } with this the kernel fills in what the solver will want (not reverse)
    LambPair* lamb_pairs;   // [heads, K / 2 padded to a multiple of 32 (with ones)], or null
    // Reverse: the states before the chunks (they may lie in `states`, and are overwritten then), and <adjoint, state>
    // of the chunks that meets_state() names, in overlap_parts() addends [slots, heads, parts], or null.
    SplitStates before;
    float* overlaps;
    // Of a sequence's two segments the first before the second, which starts from where that ends: one pass less, but
    // half as many blocks at a time. With no start this is the first one's sum, so that it changes no bit. Needs
    // goes_in_turn().
    bool in_turn = false;
    bool starts_known = false;  // segment_sums is what an earlier launch has left
    int turn = -1;  // for the kernels' own use: the segment of every sequence that is worked on, or -1: all
};
// Whether the segments may be worked on in turn.
inline bool goes_in_turn(const StateArgs& a) {
    return !a.problem.cu_seqlens && a.problem.segments.of_each.value() == 2 && !a.start_kv && !a.start_kk;
}
// Addends of one chunk and head's <adjoint, state>: one of each warp of each column tile, at most 32.
__host__ __device__ inline int overlap_parts(const Problem& p) { return (tiles(p.V) + tiles(p.K)) * tiles(p.K) * 4; }
// Whether <adjoint, state> is made for chunk `index` of a sequence of so many chunks. The kernel that makes adjoints
// takes 40 % longer where it reads the states too. So with 16-bit inputs it is made for every eighth chunk and the last
// one, from which those of the others follow (grad.cu).
constexpr int kOverlapDistance = 8;
__host__ __device__ inline bool meets_state(int64_t index, int64_t chunks, bool float32) {
    return float32 || index % kOverlapDistance == kOverlapDistance - 1 || index == chunks - 1;
}
cudaError_t launch_chunk_states(const StateArgs&, cudaStream_t);

using HardRows = uint64_t;  // of the rows of a chunk, bit t for row t, those that have shown a bad condition

// x_t = (H_t + diag(lamb))^-1 rhs_t by conjugate gradient.
enum class Solve : int {
    forward,     // for q; then the read-out out_t = G_t' x_t
    adjoint,     // for dx_t = G_t do_t, which is made on the way
    correction,  // see below; float32 keys only
};

struct SolveArgs {
    Problem problem;
    Solve kind;
    Rows rhs;  // q; or do; or a residual
    Rows keys, values;
    Gates gates;
    const LambPair* lamb;  // [heads of the state, K / 2 padded to a multiple of 32 (with ones)]
    SplitStates states;
    TiledRows x;      // float32; the solution (may be rhs itself), or data null where it is not wanted
    Rows out;         // forward
    Rows rounded;     // adjoint: the solution in 16 bits too, or data null
    Rows forward_x;   // adjoint: x of the forward pass, float32
    float* from_start;  // adjoint: [B, T, heads] e^{gc} forward_x' (G do - H x), of the state before each chunk
    int* steps;    // [B, T, heads] or null
    float* bound;  // [B, T, heads] or null
    Heads heads;
    int max_iterations;
    float tolerance;
    HardRows* hard_rows;  // [slots, heads] with float32 keys: written (forward) or read (correction), else null
};
cudaError_t launch_solve(const SolveArgs&, cudaStream_t);

// Float32 inputs: the rows of badly conditioned systems, whose o = G'x cancels by up to the condition number, are done
// again with G and H in float64 from the start of their sequence on:
//     the forward solve finds rows that show a bad condition,
//     launch_residuals makes rhs - (H + Lambda) x of these and of the rows behind them in their chunks,
//     a solve for these makes of that a correction of x,
//     launch_refined adds it to x and reads out again.
// Where no row has shown it, each of the last three does nothing.
struct RefineArgs {
    Problem problem;
    Rows rhs, keys, values;  // float32, like all rows here
    Gates gates;
    const LambPair* lamb;   // as the solver's
    const float* start_kv;  // [N, heads of the state, K, V] or null
    const float* start_kk;  // [N, heads of the state, K, K] or null
    const HardRows* hard_rows;  // [slots, heads]
    Rows x;
    Rows correction;  // in: of x; out: of launch_residuals, with zeros in the other rows of such chunks
    Rows out;
    Heads heads;
};
cudaError_t launch_residuals(const RefineArgs&, cudaStream_t);
cudaError_t launch_refined(const RefineArgs&, cudaStream_t);

// Of a chunk and head: dg's sums over the pairs of a key before the chunk with an output gradient in it, and of a key
// in the chunk with an output gradient behind it; and the chunk's decay.
struct Crossings {
    float arriving, leaving, decay;
};

// Gradients of the linear attention with queries x, keys k, values [v | k] and output gradients [do | -w].
struct GradArgs {
    Problem problem;
    Rows x;
    TiledRows w;  // may lie where dk (the first tile) and dv (the second) will, row by row
    Rows d_o, k, v;
    Gates gates;
    SplitStates adjoints;     // after each chunk
    const float* from_start;  // [B, T, heads] as the solver leaves it
    const float* overlaps;    // see StateArgs
    Crossings* crossings;     // [slots, heads], for the kernels' own use
    Rows dk, dv;           // heads as the kernel's
    float* dg;             // [B, T, heads]
    float* dbeta;          // [B, T, heads]
    float* dlamb_parts;    // [slots, heads, K], every chunk's own part; zeros in slots that are not in use
    float* dlamb;          // [heads, K]
    Heads heads;
};
cudaError_t launch_grad(const GradArgs&, cudaStream_t);

// A few tokens for every sequence, one after the other; states in float32.
struct DecodeArgs {
    Rows q, k, v, out;  // [B, T, heads, width]; these rows need no padding or alignment
    const float* g;     // [B, T, HS]
    const float* beta;  // [B, T, HS]
    const float* lamb;  // [HS, K]
    const float* start_kk;  // [pool, HS, K, K]  } the states before the tokens, or null: zeros
    const float* start_kv;  // [pool, HS, K, V]  }
    float* end_kk;  // the states after them, which may be in the same place, or null
    float* end_kv;
    bool packed;  // start_kk and end_kk, then the same: [pool, HS, packed_tiles(K), 16, 16], see packed.h; T = 1
    const int64_t* state_indices;  // [B] rows of the pool, or null
    int64_t pool;
    int* steps;    // [B, T, HO] or null
    float* bound;  // [B, T, HO] or null
    int B, T, HS, HO, K, V;
    int max_iterations;
    float tolerance;
};
constexpr int kPieceTokens = 8;  // up to so many tokens the decode kernel is faster than those for chunks
cudaError_t launch_decode(const DecodeArgs&, cudaStream_t);
cudaError_t launch_narrow_decode(const DecodeArgs&, cudaStream_t);  // of narrow heads, for launch_decode

// States after the first tokens of each sequence, as single steps would leave them: a block reads the state before the
// sequence and walks from there.
struct StateAtArgs {
    Problem problem;
    Rows keys, values;  // these need no padding or alignment
    Gates gates;
    const float* start_kk;  // [N, heads, K, K] or null
    const float* start_kv;  // [N, heads, K, V] or null
    const int64_t* state_at;  // [N, M] numbers of tokens; taken into the range from 0 to the sequence's length
    float* kk;  // [N, M, heads, K, K]
    float* kv;  // [N, M, heads, K, V]
    int heads, M;
};
cudaError_t launch_state_at(const StateAtArgs&, cudaStream_t);

}  // namespace mesa
