// Validation of operator arguments, shared by the CPU and CUDA backends.
//
// Every message names the argument, what was expected and what came. Wrong shapes and values raise ValueError, wrong
// dtypes TypeError, wrong devices RuntimeError. Values are looked at only where they already lie on the CPU, and NaN
// passes: it is the caller's data and must come out as NaN, not as an exception.
#pragma once

#include <ATen/ATen.h>
#include <ATen/MemoryOverlap.h>

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "packed.h"

namespace mesa {

// Resolved sizes of a call. Output head o uses state head o / (HO / HS) and query head o / (HO / HQ);
// state head s uses key head s / (HS / HK).
struct ProblemSize {
    int64_t B = 0, T = 1;                    // batch and tokens (T = 1 for a decode step)
    int64_t N = 0;                           // sequences: B, or the packed ones, or the rows of the decode pool
    int64_t HQ = 0, HK = 0, HS = 0, HO = 0;  // heads of q, of k, of the state (v, g, beta, lamb), of the output
    int64_t K = 0, V = 0;                    // key and value widths
    at::ScalarType dtype = at::kFloat;       // of q, k, v and o
    at::ScalarType compute = at::kFloat;     // of gates, lamb, states and x

    int64_t outputs_per_state() const { return HO / HS; }
    int64_t outputs_per_query() const { return HO / HQ; }
    int64_t states_per_key() const { return HS / HK; }
};

namespace detail {

constexpr int64_t kMaxCudaWidth = 128;

inline void check_rank(const at::Tensor& t, const char* name, int64_t rank, const char* layout) {
    TORCH_CHECK_VALUE(t.dim() == rank, name, " must have ", rank, " dimensions ", layout, ", got shape ", t.sizes());
}

inline void check_shape(const at::Tensor& t, const char* name, at::IntArrayRef shape, const char* layout) {
    TORCH_CHECK_VALUE(t.sizes() == shape, name, " must have shape ", layout, " = ", shape, ", got ", t.sizes());
}

// As Python spells it: float32, not Float.
inline std::string dtype_name(at::ScalarType dtype) { return std::string(c10::getDtypeNames(dtype).first); }

inline void check_dtype(const at::Tensor& t, const char* name, at::ScalarType dtype, const char* why) {
    TORCH_CHECK_TYPE(t.scalar_type() == dtype, name, " must be ", dtype_name(dtype), " (", why, "), got ",
                     dtype_name(t.scalar_type()));
}

inline void check_device(const at::Tensor& t, const char* name, const at::Tensor& q) {
    TORCH_CHECK(t.device() == q.device(), name, " must be on the device of q, ", q.device(), ", got ", t.device());
    TORCH_CHECK(t.layout() == at::kStrided, name, " must be a dense strided tensor, got layout ", t.layout());
}

inline void check_positive(const at::Tensor& t, const char* name, bool zero_allowed) {
    if (!t.is_cpu()) return;
    const auto wrong = zero_allowed ? t.lt(0) : t.le(0);
    TORCH_CHECK_VALUE(!wrong.any().item<bool>(), name, " must be ", zero_allowed ? ">= 0" : "> 0",
                      " everywhere, got a smallest value of ", t.masked_select(wrong).min().item<double>());
}

// dtypes, widths and heads: what chunked calls and decode steps have in common. The last two dimensions of q, k, v are
// heads and width.
inline ProblemSize check_heads(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
    check_device(q, "q", q);
    check_device(k, "k", q);
    check_device(v, "v", q);
    const auto dtype = q.scalar_type();
    const bool half = dtype == at::kHalf || dtype == at::kBFloat16;
    TORCH_CHECK_TYPE(half || dtype == at::kFloat || (dtype == at::kDouble && q.is_cpu()),
                     "q must be float16, bfloat16, float32", q.is_cpu() ? " or float64" : " (float64 works on CPU)",
                     ", got ", dtype_name(dtype));
    check_dtype(k, "k", dtype, "the dtype of q");
    check_dtype(v, "v", dtype, "the dtype of q");

    ProblemSize p;
    p.dtype = dtype;
    p.compute = dtype == at::kDouble ? at::kDouble : at::kFloat;
    p.HQ = q.size(-2);
    p.HK = k.size(-2);
    p.HS = v.size(-2);
    p.HO = std::max(p.HQ, p.HS);
    p.K = q.size(-1);
    p.V = v.size(-1);
    TORCH_CHECK_VALUE(p.HQ >= 1 && p.HK >= 1 && p.HS >= 1, "q, k and v must have at least one head, got ", p.HQ, ", ",
                      p.HK, " and ", p.HS);
    TORCH_CHECK_VALUE(p.K >= 1, "q must have a key width of at least 1, got shape ", q.sizes());
    TORCH_CHECK_VALUE(p.V >= 1, "v must have a value width of at least 1, got shape ", v.sizes());
    TORCH_CHECK_VALUE(p.HO % p.HQ == 0 && p.HO % p.HS == 0,
                      "the heads of q must be a multiple or a divisor of the heads of v, got ", p.HQ, " and ", p.HS);
    TORCH_CHECK_VALUE(p.HS % p.HK == 0, "the heads of k must divide the heads of v, got ", p.HK, " and ", p.HS);
    TORCH_CHECK_VALUE(q.is_cpu() || (p.K <= kMaxCudaWidth && p.V <= kMaxCudaWidth),
                      "key and value widths above ", kMaxCudaWidth, " are not supported on ", q.device(),
                      " (they are on CPU), got ", p.K, " and ", p.V);
    return p;
}

inline void check_gates(const ProblemSize& p, const at::Tensor& q, const at::Tensor& g, const at::Tensor& beta,
                        const at::Tensor& lamb, at::IntArrayRef shape, const char* layout) {
    const char* why = "the compute dtype: float64 for float64 q, else float32";
    check_device(g, "g", q);
    check_device(beta, "beta", q);
    check_device(lamb, "lamb", q);
    check_shape(g, "g", shape, layout);
    check_shape(beta, "beta", shape, layout);
    check_shape(lamb, "lamb", {p.HS, p.K}, "[heads of v, key width]");
    check_dtype(g, "g", p.compute, why);
    check_dtype(beta, "beta", p.compute, why);
    check_dtype(lamb, "lamb", p.compute, why);
    check_positive(beta, "beta", true);
    check_positive(lamb, "lamb", false);
}

inline void check_solver(int64_t max_cg_iterations, double cg_tol) {
    TORCH_CHECK_VALUE(max_cg_iterations >= 1 && max_cg_iterations <= std::numeric_limits<int>::max(),
                      "max_cg_iterations must be at least 1 and fit 32 bits, got ", max_cg_iterations);
    TORCH_CHECK_VALUE(cg_tol >= 0 && std::isfinite(cg_tol), "cg_tol must be finite and >= 0, got ", cg_tol);
}

inline void check_state(const ProblemSize& p, const at::Tensor& q, const at::Tensor& t, const char* name,
                        int64_t width) {
    check_device(t, name, q);
    check_shape(t, name, {p.N, p.HS, p.K, width},
                width == p.K ? "[sequences, heads of v, key width, key width]"
                             : "[sequences, heads of v, key width, value width]");
    check_dtype(t, name, p.compute, "the compute dtype: float64 for float64 q, else float32");
}

inline void check_cu_seqlens(const ProblemSize& p, const at::Tensor& q, const at::Tensor& cu_seqlens) {
    check_device(cu_seqlens, "cu_seqlens", q);
    check_dtype(cu_seqlens, "cu_seqlens", at::kLong, "offsets of the sequences");
    TORCH_CHECK_VALUE(cu_seqlens.dim() == 1 && cu_seqlens.numel() >= 1,
                      "cu_seqlens must have shape [sequences + 1], got ", cu_seqlens.sizes());
    TORCH_CHECK_VALUE(p.B == 1, "packed sequences (cu_seqlens) need a batch of 1, got q with a batch of ", p.B);
    if (!cu_seqlens.is_cpu()) return;
    const auto offsets = cu_seqlens.contiguous();
    const int64_t* at = offsets.const_data_ptr<int64_t>();
    const int64_t last = offsets.numel() - 1;
    TORCH_CHECK_VALUE(at[0] == 0, "cu_seqlens must start at 0, got ", at[0]);
    for (int64_t n = 0; n < last; ++n)
        TORCH_CHECK_VALUE(at[n] <= at[n + 1], "cu_seqlens must not decrease, got ", at[n], " followed by ", at[n + 1]);
    TORCH_CHECK_VALUE(at[last] == p.T, "cu_seqlens must end at T = ", p.T, ", got ", at[last]);
}

}  // namespace detail

// q [B,T,HQ,K], k [B,T,HK,K], v [B,T,HS,V], g and beta [B,T,HS], lamb [HS,K], h_kk [N,HS,K,K], h_kv [N,HS,K,V] (both or
// neither), cu_seqlens int64 [N+1] or none.
inline ProblemSize check_chunk_inputs(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                      const at::Tensor& g, const at::Tensor& beta, const at::Tensor& lamb,
                                      const std::optional<at::Tensor>& h_kk, const std::optional<at::Tensor>& h_kv,
                                      const std::optional<at::Tensor>& cu_seqlens, int64_t max_cg_iterations,
                                      double cg_tol) {
    detail::check_rank(q, "q", 4, "[B, T, heads, key width]");
    detail::check_rank(k, "k", 4, "[B, T, heads, key width]");
    detail::check_rank(v, "v", 4, "[B, T, heads, value width]");
    ProblemSize p = detail::check_heads(q, k, v);
    p.B = q.size(0);
    p.T = q.size(1);
    detail::check_shape(k, "k", {p.B, p.T, p.HK, p.K}, "[B, T, heads of k, key width of q]");
    detail::check_shape(v, "v", {p.B, p.T, p.HS, p.V}, "[B, T, heads of v, value width]");
    detail::check_gates(p, q, g, beta, lamb, {p.B, p.T, p.HS}, "[B, T, heads of v]");
    p.N = p.B;
    if (cu_seqlens) {
        detail::check_cu_seqlens(p, q, *cu_seqlens);
        p.N = cu_seqlens->numel() - 1;
    }
    TORCH_CHECK_VALUE(h_kk.has_value() == h_kv.has_value(), "h_kk and h_kv must be given together, got only ",
                      h_kk ? "h_kk" : "h_kv");
    if (h_kk) {
        detail::check_state(p, q, *h_kk, "h_kk", p.K);
        detail::check_state(p, q, *h_kv, "h_kv", p.V);
    }
    detail::check_solver(max_cg_iterations, cg_tol);
    return p;
}

// state_at int64 [N] or [N,M], numbers of tokens from the beginning of each sequence, or none.
inline void check_state_at(const ProblemSize& p, const at::Tensor& q, const std::optional<at::Tensor>& cu_seqlens,
                           const std::optional<at::Tensor>& state_at) {
    if (!state_at) return;
    detail::check_device(*state_at, "state_at", q);
    detail::check_dtype(*state_at, "state_at", at::kLong, "numbers of tokens");
    TORCH_CHECK_VALUE((state_at->dim() == 1 || state_at->dim() == 2) && state_at->size(0) == p.N,
                      "state_at must have shape [sequences] or [sequences, states], of ", p.N, " sequences, got ",
                      state_at->sizes());
    if (!state_at->is_cpu()) return;
    const at::Tensor counts = state_at->contiguous();
    const at::Tensor offsets = cu_seqlens ? cu_seqlens->contiguous() : at::Tensor();
    const int64_t each = p.N ? counts.numel() / p.N : 0;
    for (int64_t i = 0; i < counts.numel(); ++i) {
        const int64_t* const bounds = cu_seqlens ? offsets.const_data_ptr<int64_t>() + i / each : nullptr;
        const int64_t length = bounds ? bounds[1] - bounds[0] : p.T, count = counts.const_data_ptr<int64_t>()[i];
        TORCH_CHECK_VALUE(count >= 0 && count <= length, "state_at must lie between 0 and the length of the sequence, ",
                          length, " for sequence ", i / each, ", got ", count);
    }
}

// What chunk_backward takes on top: do [B,T,HO,V] in q's dtype, x [B,T,HO,K] and dh_*_final [N,HS,K,..] (each optional)
// and kept (see schemas.h; or bytes) in the compute dtype.
inline void check_backward_inputs(const ProblemSize& p, const at::Tensor& q, const at::Tensor& grad_o,
                                  const std::optional<at::Tensor>& dh_kk_final,
                                  const std::optional<at::Tensor>& dh_kv_final, const at::Tensor& x,
                                  const at::Tensor& kept) {
    for (const auto& [tensor, name] : {std::pair(&grad_o, "do"), std::pair(&x, "x"), std::pair(&kept, "kept")})
        detail::check_device(*tensor, name, q);
    const char* const compute = "the compute dtype: float64 for float64 q, else float32";
    detail::check_dtype(x, "x", p.compute, compute);
    if (kept.scalar_type() != at::kByte) detail::check_dtype(kept, "kept", p.compute, compute);
    detail::check_shape(grad_o, "do", {p.B, p.T, p.HO, p.V}, "[B, T, output heads, value width]");
    detail::check_shape(x, "x", {p.B, p.T, p.HO, p.K}, "[B, T, output heads, key width]");
    detail::check_dtype(grad_o, "do", p.dtype, "the dtype of q");
    if (dh_kk_final) detail::check_state(p, q, *dh_kk_final, "dh_kk_final", p.K);
    if (dh_kv_final) detail::check_state(p, q, *dh_kv_final, "dh_kv_final", p.V);
}

// Whether an h_kk with one row a sequence is packed.
inline bool is_packed(const at::Tensor& h_kk) { return h_kk.dim() == 5; }

// q [B,HQ,K], k [B,HK,K], v [B,HS,V], g and beta [B,HS], lamb [HS,K]; h_kk [P,HS,K,K], or [P,HS,packed_tiles(K),16,16],
// and h_kv [P,HS,K,V] contiguous;
// state_indices int64 [B], or none with P = B; out [B,max(HQ,HS),V]. The result's N is P.
inline ProblemSize check_decode_inputs(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                       const at::Tensor& g, const at::Tensor& beta, const at::Tensor& lamb,
                                       const at::Tensor& h_kk, const at::Tensor& h_kv,
                                       const std::optional<at::Tensor>& state_indices, int64_t max_cg_iterations,
                                       double cg_tol, const at::Tensor& out) {
    detail::check_rank(q, "q", 3, "[B, heads, key width]");
    detail::check_rank(k, "k", 3, "[B, heads, key width]");
    detail::check_rank(v, "v", 3, "[B, heads, value width]");
    ProblemSize p = detail::check_heads(q, k, v);
    p.B = q.size(0);
    detail::check_shape(k, "k", {p.B, p.HK, p.K}, "[B, heads of k, key width of q]");
    detail::check_shape(v, "v", {p.B, p.HS, p.V}, "[B, heads of v, value width]");
    detail::check_gates(p, q, g, beta, lamb, {p.B, p.HS}, "[B, heads of v]");
    if (!is_packed(h_kk)) detail::check_rank(h_kk, "h_kk", 4, "[states, heads of v, key width, key width]");
    p.N = state_indices ? h_kk.size(0) : p.B;
    if (is_packed(h_kk)) {
        detail::check_device(h_kk, "h_kk", q);
        detail::check_shape(h_kk, "h_kk", {p.N, p.HS, packed_tiles(p.K), kTile, kTile},
                            "[states, heads of v, tiles, 16, 16]");
        detail::check_dtype(h_kk, "h_kk", p.compute, "the compute dtype: float64 for float64 q, else float32");
        TORCH_CHECK_VALUE(reinterpret_cast<uintptr_t>(h_kk.const_data_ptr()) % 16 == 0 || q.is_cpu(),
                          "packed h_kk must start at a multiple of 16 bytes");
    } else {
        detail::check_state(p, q, h_kk, "h_kk", p.K);
    }
    detail::check_state(p, q, h_kv, "h_kv", p.V);
    TORCH_CHECK_VALUE(h_kk.is_contiguous(), "h_kk must be contiguous (it is updated in place), got strides ",
                      h_kk.strides());
    TORCH_CHECK_VALUE(h_kv.is_contiguous(), "h_kv must be contiguous (it is updated in place), got strides ",
                      h_kv.strides());
    if (state_indices) {
        detail::check_device(*state_indices, "state_indices", q);
        detail::check_dtype(*state_indices, "state_indices", at::kLong, "rows of the state pool");
        detail::check_shape(*state_indices, "state_indices", {p.B}, "[B]");
        if (state_indices->is_cpu()) {
            const auto indices = state_indices->contiguous();
            const int64_t* row = indices.const_data_ptr<int64_t>();
            for (int64_t b = 0; b < p.B; ++b)
                TORCH_CHECK_VALUE(row[b] >= -1 && row[b] < p.N, "state_indices must be -1 (skip) or below ", p.N,
                                  ", the number of states, got ", row[b]);
        }
    }
    detail::check_device(out, "out", q);
    detail::check_shape(out, "out", {p.B, p.HO, p.V}, "[B, output heads, value width]");
    detail::check_dtype(out, "out", p.dtype, "the dtype of q");
    TORCH_CHECK_VALUE((out.stride(2) == 1 || p.V == 1) && at::has_internal_overlap(out) != at::MemOverlap::Yes,
                      "out must have rows of contiguous elements that do not overlap, got strides ", out.strides());
    detail::check_solver(max_cg_iterations, cg_tol);
    return p;
}

}  // namespace mesa
