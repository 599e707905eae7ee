// Single tokens, read and written element by element: their rows need no padding or alignment.
#pragma once

#include <cuda_bf16.h>

#include "../mesa.h"

namespace mesa {

// Element `col` of a [B, T, heads, width] tensor's row as it lies there, zero past the width: to be fetched early and
// converted when it is needed, so that no load waits for another.
__device__ __forceinline__ uint32_t fetch_row_value(const Rows& m, int b, int64_t t, int head, int col) {
    if (col >= m.width) return 0;
    const int64_t at =
        b * m.batch_stride + t * m.token_stride + int64_t(head / m.group) * m.head_stride + col;
    if (m.dtype == DType::f32) return static_cast<const uint32_t*>(m.data)[at];
    return static_cast<const uint16_t*>(m.data)[at];
}

__device__ __forceinline__ float converted(uint32_t bits, DType dtype) {
    switch (dtype) {
        case DType::f16: return __half2float(__ushort_as_half(static_cast<uint16_t>(bits)));
        case DType::bf16: return __uint_as_float(bits << 16);
        default: return __uint_as_float(bits);
    }
}

__device__ __forceinline__ void set_row_value(const Rows& m, int b, int64_t t, int head, int col, float v) {
    const int64_t at = b * m.batch_stride + t * m.token_stride + int64_t(head) * m.head_stride + col;
    switch (m.dtype) {
        case DType::f16: static_cast<__half*>(m.data)[at] = __float2half_rn(v); break;
        case DType::bf16: static_cast<__nv_bfloat16*>(m.data)[at] = __float2bfloat16_rn(v); break;
        default: static_cast<float*>(m.data)[at] = v;
    }
}

}  // namespace mesa
