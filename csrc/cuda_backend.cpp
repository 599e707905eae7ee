// The operators on CUDA tensors: allocation and the order of the kernels. All memory is torch's, all work goes to the
// current stream, nothing waits for the device.
#include <ATen/ATen.h>
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "mesa.h"
#include "results.h"

namespace mesa {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

DType dtype_of(const Tensor& t) {
    switch (t.scalar_type()) {
        case at::kHalf: return DType::f16;
        case at::kBFloat16: return DType::bf16;
        default: return DType::f32;
    }
}

constexpr int64_t kRowMultiple = 8;  // elements that the kernels load and store at once

int64_t rounded_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
int64_t padded_width(int64_t width) { return rounded_up(width, kRowMultiple); }

// The kernels count tokens, and the elements from one head to the next, in 31 bits.
constexpr int64_t kMostIndices = std::numeric_limits<int>::max();

bool head_stride_fits(const Tensor& t) { return t.size(-2) == 1 || t.stride(-2) <= kMostIndices; }

bool rows_are_aligned(const Tensor& t) {
    bool aligned =
        t.size(-1) % kRowMultiple == 0 && t.stride(-1) == 1 && reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0;
    for (int64_t d = 0; d + 1 < t.dim(); ++d)
        aligned = aligned && (t.size(d) == 1 || t.stride(d) * t.element_size() % 16 == 0);
    return aligned;
}

// t itself where its rows are as the kernels need them (whatever the strides between them), else a copy.
Tensor with_padded_rows(const Tensor& t) {
    if (t.numel() == 0 || (rows_are_aligned(t) && head_stride_fits(t))) return t;
    const int64_t width = t.size(-1);
    const Tensor padded = width % kRowMultiple ? at::constant_pad_nd(t, {0, padded_width(width) - width}) : t;
    return padded.clone(at::MemoryFormat::Contiguous);
}

// An output [B, T, heads, width] as the kernels write it, and as the caller gets it.
Tensor empty_padded(at::IntArrayRef shape, const at::TensorOptions& options) {
    return at::empty({shape[0], shape[1], shape[2], padded_width(shape[3])}, options);
}
Tensor without_padding(const Tensor& t, int64_t width) {
    return t.size(3) == width ? t : t.narrow(3, 0, width).contiguous();
}

// t [B, T, heads, width or padded width], seen by a kernel that works on `heads` heads.
Rows rows_of(const Tensor& t, int64_t heads, int64_t width) {
    return {t.data_ptr(), t.stride(0), t.stride(1), static_cast<int>(t.stride(2)), dtype_of(t),
            static_cast<int>(width), heads / t.size(2)};
}

// Rows of float32, one column tile wide, in the memory of a 16-bit tensor of two column tiles.
Rows float_tile_in(const Tensor& t, int64_t heads, int64_t width) {
    Rows rows = rows_of(t, heads, width);
    rows.batch_stride /= 2, rows.token_stride /= 2, rows.head_stride /= 2;
    rows.dtype = DType::f32;
    return rows;
}

OptionalTensor contiguous(const OptionalTensor& t) { return t ? OptionalTensor(t->contiguous()) : std::nullopt; }

void check_device_fits(const ProblemSize& p) {
    const auto& device = *at::cuda::getCurrentDeviceProperties();
    TORCH_CHECK(device.major >= 8, "mesa_ext needs compute capability 8.0 or newer, got ", device.name, " with ",
                device.major, ".", device.minor);
    TORCH_CHECK((p.K <= kChunk && p.V <= kChunk) || device.sharedMemPerBlockOptin >= kMostSharedBytes,
                "key and value widths above ", kChunk, " need ", kMostSharedBytes >> 10,
                " KB of shared memory per block, ", device.name, " has ", device.sharedMemPerBlockOptin >> 10,
                " KB; got widths ", p.K, " and ", p.V);
}

// Whether to use the kernels for compute capability 9.0: where the device and this binary have them, unless
// MESA_EXT_KERNELS=portable asks for the others.
bool use_hopper_kernels() {
    const char* const asked = std::getenv("MESA_EXT_KERNELS");
    const std::string kernels = asked && *asked ? asked : "hopper";
    TORCH_CHECK(kernels == "portable" || kernels == "hopper", "MESA_EXT_KERNELS must be 'portable' or 'hopper', got '",
                kernels, "'");
    const bool built = std::strstr(MESA_CUDA_ARCHS, "90a") != nullptr;
    return kernels == "hopper" && built && at::cuda::getCurrentDeviceProperties()->major == 9;
}

Problem make_problem(const ProblemSize& p, const int64_t* cu_seqlens, bool hopper) {
    TORCH_CHECK(p.B * p.T + kChunk * p.N <= kMostIndices, "expected B * T + ", kChunk,
                " * sequences below 2^31 on CUDA, got B = ", p.B, ", T = ", p.T, " and ", p.N, " sequences");
    return {p.T, static_cast<int>(p.N), cu_seqlens, static_cast<int>(p.K), static_cast<int>(p.V), hopper,
            kSegmentChunks};
}

// What the kernels of a chunked call have in common, with the tensors that they point into.
struct Call {
    ProblemSize size;
    Problem problem;
    Tensor k, v, g, beta, lamb, cu_seqlens;
    OptionalTensor h_kk, h_kv;
    cudaStream_t stream;

    Call(const ProblemSize& p, const Tensor& k_, const Tensor& v_, const Tensor& g_, const Tensor& beta_,
         const Tensor& lamb_, const OptionalTensor& h_kk_, const OptionalTensor& h_kv_,
         const OptionalTensor& cu_seqlens_)
        : size(p),
          k(with_padded_rows(k_)),
          v(with_padded_rows(v_)),
          g(g_.contiguous()),
          beta(beta_.contiguous()),
          lamb(lamb_.contiguous()),
          h_kk(contiguous(h_kk_)),
          h_kv(contiguous(h_kv_)),
          stream(at::cuda::getCurrentCUDAStream()) {
        check_device_fits(p);
        if (cu_seqlens_) cu_seqlens = cu_seqlens_->contiguous();
        problem = make_problem(p, cu_seqlens_ ? cu_seqlens.const_data_ptr<int64_t>() : nullptr, use_hopper_kernels());
    }

    Gates gates(int64_t heads) const {
        return {g.const_data_ptr<float>(), beta.const_data_ptr<float>(), static_cast<int>(size.HS),
                static_cast<int>(heads / size.HS)};
    }
    Rows k_rows(int64_t heads) const { return rows_of(k, heads, size.K); }
    Rows v_rows(int64_t heads) const { return rows_of(v, heads, size.V); }
    at::TensorOptions float_options() const { return g.options(); }
};

// The states are by far the largest tensor. Where they would take more than MESA_EXT_STATE_MEMORY (in MiB), the heads
// are worked on in groups, one after the other, each from its states to its results, in the same memory. No head's
// result depends on the others. The default leaves so much work for a launch that its last blocks, which do not fill
// the card, hardly count.
constexpr int64_t kStateMemory = 1024;

int64_t state_memory() {
    const char* const asked = std::getenv("MESA_EXT_STATE_MEMORY");
    if (!asked || !*asked) return kStateMemory << 20;
    char* end = nullptr;
    const long long mebibytes = std::strtoll(asked, &end, 10);
    TORCH_CHECK(*end == 0 && mebibytes >= 0 && mebibytes < 1 << 30,
                "MESA_EXT_STATE_MEMORY must be a number of MiB, got '", asked, "'");
    return static_cast<int64_t>(mebibytes) << 20;
}

int64_t state_bytes(const Call& c, int64_t heads) {
    return c.problem.slots() * heads * split_state_panels(c.problem) * kPanel * sizeof(__half);
}

int64_t head_groups(const Call& c) {
    const int64_t heads = c.size.HS, bytes = state_bytes(c, heads), most = state_memory();
    int64_t groups = 1;
    while (groups < heads && (heads % groups != 0 || bytes / groups > most)) ++groups;
    return groups;
}

// Of `all` heads, those of one group.
Heads heads_of_group(int64_t all, int64_t groups, int64_t group) {
    return {static_cast<int>(all), static_cast<int>(all / groups * group), static_cast<int>(all / groups)};
}

// Rows of a tensor that has a group's heads only, as seen by a kernel that counts all.
Rows rows_of_group(const Tensor& t, const Heads& heads, int64_t width) {
    Rows rows = rows_of(t, t.size(2), width);
    rows.data = static_cast<char*>(rows.data) - int64_t(heads.first) * rows.head_stride * t.element_size();
    return rows;
}

// Memory for the states of a group of heads before every chunk: the panels, then the scales; and behind them what
// solves need of lamb, which comes with the states.
struct States {
    int64_t all_heads, heads, panel_bytes, scale_bytes;
    Tensor memory;

    // `kept`: the memory, with the states of all heads in it.
    States(const Call& call, int64_t all_heads, int64_t groups, const Tensor& kept = {})
        : all_heads(all_heads),
          heads(all_heads / groups),
          panel_bytes(state_bytes(call, heads)),
          scale_bytes(rounded_up(
              call.problem.slots() * heads * (tiles(call.problem.V) + tiles(call.problem.K)) * sizeof(float),
              alignof(LambPair))),
          memory(kept) {
        const int64_t bytes = panel_bytes + scale_bytes + lamb_bytes(call);
        if (!kept.defined()) memory = at::empty({bytes}, call.float_options().dtype(at::kByte));
        TORCH_CHECK(memory.is_contiguous() && memory.numel() == bytes &&
                        reinterpret_cast<uintptr_t>(memory.data_ptr()) % alignof(LambPair) == 0,
                    "kept must be ", bytes, " bytes, contiguous and at a multiple of ", alignof(LambPair),
                    ", got shape ", memory.sizes(), " with strides ", memory.strides());
    }

    static int64_t lamb_bytes(const Call& call) {
        return call.size.HS * tiles(call.problem.K) * (kChunk / 2) * sizeof(LambPair);
    }
    LambPair* lamb() const {
        return reinterpret_cast<LambPair*>(memory.data_ptr<uint8_t>() + panel_bytes + scale_bytes);
    }

    // As seen by a kernel whose heads, all or those of a group, share them.
    SplitStates view(const Heads& kernel) const {
        uint8_t* const bytes = memory.data_ptr<uint8_t>();
        const int group = kernel.all / static_cast<int>(all_heads);
        return {reinterpret_cast<__half*>(bytes), reinterpret_cast<float*>(bytes + panel_bytes),
                static_cast<int>(heads), group, heads == all_heads ? 0 : kernel.first / group};
    }
};

// The states before the segments of long sequences, see StateArgs: made by launch_chunk_states, or known from the
// forward pass. Of short ones nothing.
struct Segments {
    Tensor starts, decays;
    bool known;

    // `kept`: the starts are a result, in which places that no segment has are zero.
    Segments(const Call& call, int64_t heads, const Tensor& known_starts = {}, bool kept = false)
        : starts(known_starts), known(known_starts.defined() && known_starts.numel() > 0) {
        const std::vector<int64_t> shape = starts_shape(call.problem, heads);
        if (known) {
            TORCH_CHECK(starts.sizes() == shape, "kept must be empty or of shape ", shape, ", got ", starts.sizes());
            starts = starts.contiguous();
        } else {
            starts = kept && call.problem.cu_seqlens ? at::zeros(shape, call.float_options())
                                                     : at::empty(shape, call.float_options());
            if (starts.numel() > 0) decays = at::empty({shape[0], heads}, call.float_options());
        }
    }
    static std::vector<int64_t> starts_shape(const Problem& p, int64_t heads) {
        if (!p.segmented()) return {0};
        return {p.segment_count(), heads, segment_sum_size(p)};
    }
};

// Two segments of every sequence go in turn where one of each fills the card: about a block for every multiprocessor.
constexpr int64_t kBlocksThatFill = 128;

void chunk_states(StateArgs args, cudaStream_t stream) {
    const Problem& p = args.problem;
    args.in_turn = !args.starts_known && goes_in_turn(args) &&
                   int64_t(p.N) * args.heads.count.value() * (tiles(p.V) + tiles(p.K)) >= kBlocksThatFill;
    C10_CUDA_CHECK(launch_chunk_states(args, stream));
}

void forward_states(const Call& c, const States& states, const Heads& heads, const Segments& segments, float* end_kk,
                    float* end_kv) {
    StateArgs args{c.problem,
                   c.k_rows(heads.all),
                   {c.v_rows(heads.all), c.k_rows(heads.all)},
                   c.gates(heads.all),
                   data_or_null<float>(c.h_kv),
                   data_or_null<float>(c.h_kk),
                   end_kv,
                   end_kk,
                   states.view(heads),
                   heads,
                   1,
                   false,
                   segments.starts.data_ptr<float>(),
                   data_or_null<float>(segments.decays),
                   c.lamb.const_data_ptr<float>(),
                   states.lamb(),
                   {},
                   nullptr};
    args.starts_known = segments.known;
    chunk_states(args, c.stream);
}

// What every solve has; the rest is for the caller to set.
SolveArgs solve_args(const Call& c, Solve kind, const States& states, const Heads& heads, const Rows& rhs,
                     int64_t max_iterations, double tolerance) {
    SolveArgs args{};
    args.problem = c.problem;
    args.kind = kind;
    args.rhs = rhs;
    args.keys = c.k_rows(heads.all);
    args.values = c.v_rows(heads.all);
    args.gates = c.gates(heads.all);
    args.lamb = states.lamb();
    args.states = states.view(heads);
    args.heads = heads;
    args.max_iterations = static_cast<int>(max_iterations);
    args.tolerance = static_cast<float>(tolerance);
    return args;
}

// x and o once more, where the solver has found rows that float32 is not enough for.
void refine(const Call& c, const States& states, const Heads& heads, const Tensor& q, const Tensor& x, const Tensor& o,
            HardRows* hard_rows, int64_t max_iterations) {
    const Tensor correction = at::empty_like(x);
    const RefineArgs args{c.problem,
                          rows_of(q, heads.all, c.size.K),
                          c.k_rows(heads.all),
                          c.v_rows(heads.all),
                          c.gates(heads.all),
                          states.lamb(),
                          data_or_null<float>(c.h_kv),
                          data_or_null<float>(c.h_kk),
                          hard_rows,
                          rows_of(x, heads.all, c.size.K),
                          rows_of(correction, heads.all, c.size.K),
                          rows_of(o, heads.all, c.size.V),
                          heads};
    C10_CUDA_CHECK(launch_residuals(args, c.stream));
    SolveArgs corrected =
        solve_args(c, Solve::correction, states, heads, args.correction, max_iterations, kCorrectionTolerance);
    corrected.x = args.correction;
    corrected.hard_rows = hard_rows;
    C10_CUDA_CHECK(launch_solve(corrected, c.stream));
    C10_CUDA_CHECK(launch_refined(args, c.stream));
}

// t in memory where its rows are dense, which is all that the kernels for single tokens ask of them.
Tensor with_dense_rows(const Tensor& t) { return t.stride(-1) == 1 && head_stride_fits(t) ? t : t.contiguous(); }

// t [B, T, heads, width], or [B, heads, width], the only token of every sequence, with dense rows.
Rows token_rows(const Tensor& t, int64_t heads, int64_t width) {
    return {t.data_ptr(), t.stride(0), t.dim() == 4 ? t.stride(1) : 0, static_cast<int>(t.stride(-2)), dtype_of(t),
            static_cast<int>(width), heads / t.size(-2)};
}

// The decode kernel on tokens [B, T, ...] or [B, ...].
void decode(const ProblemSize& p, const Tensor& q_, const Tensor& k_, const Tensor& v_, const Tensor& g_,
            const Tensor& beta_, const Tensor& lamb_, const float* start_kk, const float* start_kv, float* end_kk,
            float* end_kv, bool packed, const OptionalTensor& state_indices, int* steps, float* bound,
            int64_t max_cg_iterations, double cg_tol, const Tensor& out) {
    check_device_fits(p);
    const Tensor q = with_dense_rows(q_), k = with_dense_rows(k_), v = with_dense_rows(v_), g = g_.contiguous(),
                 beta = beta_.contiguous(), lamb = lamb_.contiguous();
    const OptionalTensor indices = contiguous(state_indices);
    C10_CUDA_CHECK(launch_decode(
        {token_rows(q, p.HO, p.K), token_rows(k, p.HS, p.K), token_rows(v, p.HS, p.V), token_rows(out, p.HO, p.V),
         g.const_data_ptr<float>(), beta.const_data_ptr<float>(), lamb.const_data_ptr<float>(), start_kk, start_kv,
         end_kk, end_kv, packed, indices ? indices->const_data_ptr<int64_t>() : nullptr, p.N, steps, bound,
         static_cast<int>(p.B), static_cast<int>(p.T), static_cast<int>(p.HS), static_cast<int>(p.HO),
         static_cast<int>(p.K), static_cast<int>(p.V), static_cast<int>(max_cg_iterations), static_cast<float>(cg_tol)},
        at::cuda::getCurrentCUDAStream()));
}

// The states after so many tokens, kk [N, M.., HS, K, K] and kv [N, M.., HS, K, V].
void make_states_at(const ProblemSize& p, const Tensor& k_, const Tensor& v_, const Tensor& g_, const Tensor& beta_,
                    const OptionalTensor& h_kk, const OptionalTensor& h_kv, const OptionalTensor& cu_seqlens_,
                    const Tensor& state_at_, const Tensor& kk, const Tensor& kv) {
    const Tensor k = with_dense_rows(k_), v = with_dense_rows(v_), g = g_.contiguous(), beta = beta_.contiguous(),
                 state_at = state_at_.contiguous();
    const OptionalTensor cu_seqlens = contiguous(cu_seqlens_);
    const int heads = static_cast<int>(p.HS);
    C10_CUDA_CHECK(launch_state_at(
        {make_problem(p, cu_seqlens ? cu_seqlens->const_data_ptr<int64_t>() : nullptr, false),
         token_rows(k, heads, p.K), token_rows(v, heads, p.V),
         {g.const_data_ptr<float>(), beta.const_data_ptr<float>(), heads, 1},
         data_or_null<float>(h_kk), data_or_null<float>(h_kv),
         state_at.const_data_ptr<int64_t>(), kk.data_ptr<float>(), kv.data_ptr<float>(), heads,
         state_at.dim() == 2 ? static_cast<int>(state_at.size(1)) : 1},
        at::cuda::getCurrentCUDAStream()));
}

std::vector<Tensor> chunk_forward(
    const Tensor& q_, const Tensor& k, const Tensor& v, const Tensor& g, const Tensor& beta, const Tensor& lamb,
    const OptionalTensor& h_kk_, const OptionalTensor& h_kv_, const OptionalTensor& cu_seqlens,
    int64_t max_cg_iterations, double cg_tol, bool solution, bool final_state, bool solver_info,
    const OptionalTensor& state_at, bool keep_states) {
    const ProblemSize p =
        check_chunk_inputs(q_, k, v, g, beta, lamb, h_kk_, h_kv_, cu_seqlens, max_cg_iterations, cg_tol);
    check_state_at(p, q_, cu_seqlens, state_at);
    const c10::cuda::CUDAGuard guard(q_.device());
    const OptionalTensor h_kk = contiguous(h_kk_), h_kv = contiguous(h_kv_);
    const auto f32 = g.options();
    const Tensor end_kk = if_wanted(final_state, state_shape(p, state_at, p.K), f32);
    const Tensor end_kv = if_wanted(final_state, state_shape(p, state_at, p.V), f32);
    const Tensor steps = if_wanted(solver_info, {p.B, p.T, p.HO}, f32.dtype(at::kInt));
    const Tensor bound = if_wanted(solver_info, {p.B, p.T, p.HO}, f32);
    if (state_at && final_state) make_states_at(p, k, v, g, beta, h_kk, h_kv, cu_seqlens, *state_at, end_kk, end_kv);
    float* const last_kk = state_at ? nullptr : data_or_null<float>(end_kk);
    float* const last_kv = state_at ? nullptr : data_or_null<float>(end_kv);

    // Which way a call goes may not depend on the batch; float32 may want refining, and packed lengths are not known.
    if (p.dtype != at::kFloat && !cu_seqlens && p.T >= 1 && p.T <= kPieceTokens && !solution) {
        const Tensor o = at::empty({p.B, p.T, p.HO, p.V}, q_.options());
        decode(p, q_, k, v, g, beta, lamb, data_or_null<float>(h_kk), data_or_null<float>(h_kv), last_kk, last_kv,
               false, std::nullopt, data_or_null<int>(steps), data_or_null<float>(bound), max_cg_iterations, cg_tol, o);
        return wanted({o, end_kk, end_kv, steps, bound});
    }

    const Call c(p, k, v, g, beta, lamb, h_kk, h_kv, cu_seqlens);
    keep_states = keep_states && solution;
    const int64_t groups = keep_states ? 1 : head_groups(c);
    const States states(c, p.HS, groups);
    const Segments segments(c, p.HS, {}, solution && !keep_states);
    const auto make_states = [&](int64_t group) {
        forward_states(c, states, heads_of_group(p.HS, groups, group), segments, last_kk, last_kv);
    };
    make_states(0);  // while the host does the rest

    const Tensor q = with_padded_rows(q_);
    const bool refines = p.dtype == at::kFloat;
    const Tensor o = empty_padded({p.B, p.T, p.HO, p.V}, q.options());
    const Tensor x = solution || refines ? empty_padded({p.B, p.T, p.HO, p.K}, f32) : Tensor();
    Tensor hard_rows;
    if (refines) hard_rows = at::empty({c.problem.slots(), p.HO}, f32.dtype(at::kLong));
    for (int64_t group = 0; group < groups; ++group) {
        const Heads heads = heads_of_group(p.HO, groups, group);
        if (group > 0) make_states(group);
        SolveArgs args = solve_args(c, Solve::forward, states, heads, rows_of(q, p.HO, p.K), max_cg_iterations, cg_tol);
        if (x.defined()) args.x = rows_of(x, p.HO, p.K);
        args.out = rows_of(o, p.HO, p.V);
        args.steps = data_or_null<int>(steps);
        args.bound = data_or_null<float>(bound);
        if (refines) args.hard_rows = static_cast<HardRows*>(hard_rows.data_ptr());
        C10_CUDA_CHECK(launch_solve(args, c.stream));
        if (refines) refine(c, states, heads, q, x, o, args.hard_rows, max_cg_iterations);
    }
    const Tensor kept = !solution ? Tensor() : keep_states ? states.memory : segments.starts;
    return wanted({without_padding(o, p.V), solution ? without_padding(x, p.K) : Tensor(), kept, end_kk, end_kv, steps,
                   bound});
}

// Sums neighbouring heads of t [.., heads, ..] (dimension `dim`) down to `heads`, in the dtype asked for.
Tensor sum_groups(const Tensor& t, int64_t dim, int64_t heads, at::ScalarType dtype) {
    if (!t.defined()) return t;
    if (t.size(dim) == heads) return t.to(dtype);
    return t.unflatten(dim, {heads, t.size(dim) / heads}).sum(dim + 1).to(dtype);
}

std::vector<Tensor> chunk_backward(
    const Tensor& grad_o, const OptionalTensor& dh_kk_final, const OptionalTensor& dh_kv_final, const Tensor& q,
    const Tensor& k, const Tensor& v, const Tensor& g, const Tensor& beta, const Tensor& lamb,
    const OptionalTensor& h_kk, const OptionalTensor& h_kv, const OptionalTensor& cu_seqlens, const Tensor& x_,
    const Tensor& kept, int64_t max_cg_iterations, double cg_tol) {
    const ProblemSize p = check_chunk_inputs(q, k, v, g, beta, lamb, h_kk, h_kv, cu_seqlens, max_cg_iterations, cg_tol);
    check_backward_inputs(p, q, grad_o, dh_kk_final, dh_kv_final, x_, kept);
    const c10::cuda::CUDAGuard guard(q.device());
    const Call c(p, k, v, g, beta, lamb, h_kk, h_kv, cu_seqlens);
    const Tensor d_o = with_padded_rows(grad_o), x = with_padded_rows(x_);
    const OptionalTensor start_kk = contiguous(dh_kk_final), start_kv = contiguous(dh_kv_final);
    const auto f32 = c.float_options();
    const Rows do_rows = rows_of(d_o, p.HO, p.V), x_rows = rows_of(x, p.HO, p.K);

    // With a head of q for every output head, dq is w in q's dtype. Grouped heads: every output head makes its own
    // gradients, in float32, which are then added up.
    const int64_t groups = head_groups(c);
    const bool own_dq = p.HO == p.HQ && q.scalar_type() != at::kFloat;
    const auto own = [&](int64_t shared_heads) { return p.HO == shared_heads ? q.options() : f32; };
    const Tensor dk = empty_padded({p.B, p.T, p.HO, p.K}, own(p.HK)),
                 dv = empty_padded({p.B, p.T, p.HO, p.V}, own(p.HS));
    // Where dk and dv are 128 wide and of 16 bits, a row of w is as long as theirs together, and lies there until they
    // are written.
    const auto holds_a_tile = [](const Tensor& t) { return t.element_size() == 2 && t.size(3) == kMaxWidth; };
    const bool w_in_place = own_dq && holds_a_tile(dk) && holds_a_tile(dv);
    Tensor w;
    if (!w_in_place) w = empty_padded({p.B, p.T, own_dq ? p.HO / groups : p.HO, p.K}, f32);
    const Tensor dq = own_dq ? empty_padded({p.B, p.T, p.HO, p.K}, q.options()) : w;
    const Tensor dg = at::empty({p.B, p.T, p.HO}, f32), dbeta = at::empty({p.B, p.T, p.HO}, f32);
    const std::vector<int64_t> parts_shape = {c.problem.slots(), p.HO, p.K};
    const Tensor dlamb_parts =
        cu_seqlens ? at::zeros(parts_shape, f32) : at::empty(parts_shape, f32);  // packed: some slots are not in use
    const Tensor dlamb = at::empty({p.HO, p.K}, f32);
    const Tensor end_kk = if_wanted(h_kk.has_value(), {p.N, p.HO, p.K, p.K}, f32);
    const Tensor end_kv = if_wanted(h_kv.has_value(), {p.N, p.HO, p.K, p.V}, f32);
    const Tensor from_start = at::empty({p.B, p.T, p.HO}, f32);
    const Tensor overlaps = at::empty({c.problem.slots() * p.HO * overlap_parts(c.problem)}, f32);
    const Tensor crossings = at::empty({c.problem.slots() * p.HO, sizeof(Crossings) / sizeof(float)}, f32);

    const bool has_states = kept.scalar_type() == at::kByte;
    const States states = has_states ? States(c, p.HS, 1, kept) : States(c, p.HS, groups);
    // The adjoints take the place of the states, which nobody needs any more, unless they were kept (there may be a
    // second backward pass) or output heads share them.
    const States adjoints = p.HO == p.HS && !has_states ? states : States(c, p.HO, groups);
    const Segments adjoint_segments(c, p.HO);
    std::optional<Segments> segments;
    if (!has_states) segments.emplace(c, p.HS, kept);
    for (int64_t group = 0; group < groups; ++group) {
        const Heads heads = heads_of_group(p.HO, groups, group);
        TiledRows w_rows;
        if (w_in_place) {
            w_rows.tile[0] = float_tile_in(dk, p.HO, kChunk);
            w_rows.tile[1] = float_tile_in(dv, p.HO, p.K - kChunk);
        } else {
            w_rows = own_dq ? rows_of_group(w, heads, p.K) : rows_of(w, p.HO, p.K);
        }
        if (segments) forward_states(c, states, heads_of_group(p.HS, groups, group), *segments, nullptr, nullptr);

        SolveArgs args = solve_args(c, Solve::adjoint, states, heads, do_rows, max_cg_iterations, cg_tol);
        args.x = w_rows;
        if (own_dq) args.rounded = rows_of(dq, p.HO, p.K);
        args.forward_x = x_rows;
        args.from_start = from_start.data_ptr<float>();
        C10_CUDA_CHECK(launch_solve(args, c.stream));

        chunk_states({c.problem,
                      x_rows,
                      {do_rows, w_rows},
                      c.gates(p.HO),
                      data_or_null<float>(start_kv),
                      data_or_null<float>(start_kk),
                      data_or_null<float>(end_kv),
                      data_or_null<float>(end_kk),
                      adjoints.view(heads),
                      heads,
                      static_cast<int>(p.outputs_per_state()),
                      true,
                      adjoint_segments.starts.data_ptr<float>(),
                      data_or_null<float>(adjoint_segments.decays),
                      nullptr,
                      nullptr,
                      states.view(heads),
                      overlaps.data_ptr<float>()},
                     c.stream);

        C10_CUDA_CHECK(launch_grad(
            {c.problem, x_rows, w_rows, do_rows, c.k_rows(p.HO), c.v_rows(p.HO), c.gates(p.HO), adjoints.view(heads),
             from_start.const_data_ptr<float>(), overlaps.const_data_ptr<float>(),
             reinterpret_cast<Crossings*>(crossings.data_ptr<float>()), rows_of(dk, p.HO, p.K), rows_of(dv, p.HO, p.V),
             dg.data_ptr<float>(), dbeta.data_ptr<float>(), dlamb_parts.data_ptr<float>(), dlamb.data_ptr<float>(),
             heads},
            c.stream));
    }

    return wanted({sum_groups(without_padding(dq, p.K), 2, p.HQ, p.dtype),
                   sum_groups(without_padding(dk, p.K), 2, p.HK, p.dtype),
                   sum_groups(without_padding(dv, p.V), 2, p.HS, p.dtype),
                   sum_groups(dg, 2, p.HS, at::kFloat),
                   sum_groups(dbeta, 2, p.HS, at::kFloat),
                   sum_groups(dlamb, 0, p.HS, at::kFloat),
                   sum_groups(end_kk, 1, p.HS, at::kFloat),
                   sum_groups(end_kv, 1, p.HS, at::kFloat)});
}

void decode_step(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& g, const Tensor& beta,
                 const Tensor& lamb, const Tensor& h_kk, const Tensor& h_kv, const OptionalTensor& state_indices,
                 int64_t max_cg_iterations, double cg_tol, const Tensor& out) {
    const ProblemSize p =
        check_decode_inputs(q, k, v, g, beta, lamb, h_kk, h_kv, state_indices, max_cg_iterations, cg_tol, out);
    const c10::cuda::CUDAGuard guard(q.device());
    float *const kk = h_kk.data_ptr<float>(), *const kv = h_kv.data_ptr<float>();
    decode(p, q, k, v, g, beta, lamb, kk, kv, kk, kv, is_packed(h_kk), state_indices, nullptr, nullptr,
           max_cg_iterations, cg_tol, out);
    mark_written({h_kk, h_kv, out});
}

}  // namespace
}  // namespace mesa

TORCH_LIBRARY_IMPL(mesa_ext, CUDA, m) {
    m.impl("chunk_forward", mesa::chunk_forward);
    m.impl("chunk_backward", mesa::chunk_backward);
    m.impl("decode_step", mesa::decode_step);
}
