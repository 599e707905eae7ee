// The inputs of a chunked call, as its passes read them.
#pragma once

#include "../results.h"
#include "solve.h"
#include "states.h"

namespace mesa::cpu {

// Everything below computes in T on contiguous arrays: copies are made only of what is not that already.
template <typename T>
Tensor prepare(const Tensor& t) {
    return t.to(c10::CppTypeToScalarType<T>::value).contiguous();
}

template <typename T>
optional<Tensor> prepare(const optional<Tensor>& t) {
    return t ? optional<Tensor>(prepare<T>(*t)) : std::nullopt;
}

template <typename T>
struct Inputs {
    Tensor k_, v_, g_, beta_;
    optional<Tensor> h_kk, h_kv;
    Heads<T> k, v, g, beta;
    Regulariser<T> lamb;
    Layout layout;
    Segments segments;

    Inputs(const ProblemSize& p, const Tensor& k_in, const Tensor& v_in, const Tensor& g_in, const Tensor& beta_in,
           const Tensor& lamb_in, const optional<Tensor>& h_kk_in, const optional<Tensor>& h_kv_in,
           const optional<Tensor>& cu_seqlens)
        : k_(prepare<T>(k_in)), v_(prepare<T>(v_in)), g_(prepare<T>(g_in)), beta_(prepare<T>(beta_in)),
          h_kk(prepare<T>(h_kk_in)), h_kv(prepare<T>(h_kv_in)), k(k_), v(v_), g(g_.unsqueeze(-2)),
          beta(beta_.unsqueeze(-2)), lamb(prepare<T>(lamb_in)), layout(p, cu_seqlens),
          segments(p, layout, !cu_seqlens) {}

    Scan<T> scan(const ProblemSize& p, T* final_kk, T* final_kv) const {
        // x' H' = (H x)': only the transpose gives the gradient of an H that is perturbed without staying symmetric.
        return {p, layout, segments, g, beta, k,
                {{v, T(1), data_or_null<T>(h_kv), final_kv, false}, {k, T(1), data_or_null<T>(h_kk), final_kk, true}},
                false};
    }

    void load(const ProblemSize& p, Block<T>& block, Chunk chunk, int64_t head, bool transpose_v) const {
        block.load(k, k.of_state(p, head), v, g, beta, chunk, head, transpose_v);
    }
};

}  // namespace mesa::cpu
