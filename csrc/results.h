// What the operators of both backends do about their results and optional arguments.
#pragma once

#include <ATen/ATen.h>

#include <initializer_list>
#include <optional>
#include <vector>

#include "checks.h"

namespace mesa {

// Allocations are much of what a small call costs: results that are not wanted have no elements.
inline at::Tensor if_wanted(bool wanted, at::IntArrayRef shape, const at::TensorOptions& options) {
    return wanted ? at::empty(shape, options) : at::empty({0}, options);
}

template <typename T>
T* data_or_null(const at::Tensor& t) {
    return t.numel() ? t.data_ptr<T>() : nullptr;
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
