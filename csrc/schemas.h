// The operators' schemas.
#pragma once

#include <torch/library.h>

namespace mesa {

inline void define_operators(torch::Library& m) {
    // o; x and kept, which are for chunk_backward, if `solution`; h_kk and h_kv if `final_state`; steps and bound if
    // `solver_info`. kept: of the states on CUDA, as the kernels have them, those before every 4096 tokens, where
    // sequences are longer than that; with `keep_states` all of them, as bytes; else empty. What is not there
    // chunk_backward makes once more.
    m.def(
        "chunk_forward(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor lamb, Tensor? h_kk, Tensor? h_kv, "
        "Tensor? cu_seqlens, int max_cg_iterations, float cg_tol, bool solution=True, bool final_state=True, "
        "bool solver_info=True, Tensor? state_at=None, bool keep_states=False) -> Tensor[]");
    // dq, dk, dv, dg, dbeta, dlamb; dh_kk and dh_kv if there are h_kk and h_kv.
    m.def(
        "chunk_backward(Tensor do, Tensor? dh_kk_final, Tensor? dh_kv_final, Tensor q, Tensor k, Tensor v, Tensor g, "
        "Tensor beta, Tensor lamb, Tensor? h_kk, Tensor? h_kv, Tensor? cu_seqlens, Tensor x, Tensor kept, "
        "int max_cg_iterations, float cg_tol) -> Tensor[]");
    m.def(
        "decode_step(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor lamb, Tensor(a!) h_kk, "
        "Tensor(b!) h_kv, Tensor? state_indices, int max_cg_iterations, float cg_tol, Tensor(c!) out) -> ()");
}

}  // namespace mesa
