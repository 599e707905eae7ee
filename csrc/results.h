// What the operators of both backends do about their results and optional arguments.
#pragma once

#include <ATen/ATen.h>

#include <initializer_list>
#include <optional>
#include <vector>

#include "checks.h"

namespace mesa {

// Even empty tensors are much of what a small call costs: results that are not wanted stay undefined, and an operator's
// list of results goes without them.
inline at::Tensor if_wanted(bool wanted, at::IntArrayRef shape, const at::TensorOptions& options) {
    return wanted ? at::empty(shape, options) : at::Tensor();
}
inline std::vector<at::Tensor> wanted(std::initializer_list<at::Tensor> results) {
    std::vector<at::Tensor> list;
    for (const at::Tensor& t : results)
        if (t.defined()) list.push_back(t);
    return list;
}

template <typename T>
T* data_or_null(const at::Tensor& t) {
    return t.defined() ? t.data_ptr<T>() : nullptr;
}

template <typename T>
const T* data_or_null(const std::optional<at::Tensor>& t) {
    return t ? t->const_data_ptr<T>() : nullptr;
}

// Shape of the states that a chunked call returns, [N, HS, K, width] or, with state_at [N,M], [N, M, HS, K, width].
inline std::vector<int64_t> state_shape(const ProblemSize& p, const std::optional<at::Tensor>& state_at,
                                        int64_t width) {
    if (state_at && state_at->dim() == 2) return {p.N, state_at->size(1), p.HS, p.K, width};
    return {p.N, p.HS, p.K, width};
}

// Tells autograd, which is below no operator that writes in place, that these tensors are not what they were.
inline void mark_written(std::initializer_list<at::Tensor> tensors) {
    for (const at::Tensor& t : tensors)
        if (!t.is_inference()) t.unsafeGetTensorImpl()->bump_version();
}

}  // namespace mesa
