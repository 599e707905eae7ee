"""The operators ``torch.ops.mesa_ext.*``: loads the compiled library and gives them fake kernels and gradients.

The schemas and kernels are C++ (``csrc/``); shapes below are those of the schemas, with HO = max(HQ, HS) output heads.
"""

from __future__ import annotations

import torch
from torch import Tensor

try:
    from mesa_ext import _C  # noqa: F401  importing it registers the operators
except ImportError as error:
    raise ImportError(
        f"mesa_ext: the compiled library does not load ({error}); build it for this Python and torch "
        f"{torch.__version__} with `pip install --no-build-isolation .` in the source tree"
    ) from error


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of gates, states and solutions for q, k, v of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _kept(q, v, g, cu_seqlens, keep_states):
    """What chunk_forward keeps for chunk_backward of the states, by tiles of 64 x 64.

    All of them as ``States`` of ``csrc/cuda_backend.cpp`` has them, or those before every 4096 tokens, as
    ``kSegmentChunks`` and ``segment_sum_size`` of ``csrc/mesa.h`` have it.
    """
    (batch, tokens, _, K), (heads, V) = q.shape, v.shape[2:]
    if q.device.type != "cuda" or (tokens <= 4096 and not keep_states):
        return g.new_empty(0)
    tiles_k, tiles_v = (-(-width // 64) for width in (K, V))
    columns = tiles_v + tiles_k

    def places(size):
        return batch * -(-tokens // size) if cu_seqlens is None else tokens // size + cu_seqlens.shape[0] - 1

    if not keep_states:
        return g.new_empty(places(4096), heads, columns * tiles_k * 64 * 64)
    states = places(64) * heads * columns
    panels, scales, lamb = states * tiles_k * 64 * 64 * 4, -(-states * 4 // 16) * 16, heads * tiles_k * 32 * 16
    return g.new_empty(panels + scales + lamb, dtype=torch.uint8)


@torch.library.register_fake("mesa_ext::chunk_forward")
def _chunk_forward_fake(
    q, k, v, g, beta, lamb, h_kk, h_kv, cu_seqlens, max_cg_iterations, cg_tol,
    solution=True, final_state=True, solver_info=True, state_at=None, keep_states=False,
):  # fmt: skip
    batch, tokens, q_heads, K = q.shape
    heads, V = v.shape[2:]
    out_heads = max(q_heads, heads)
    states = [batch if cu_seqlens is None else cu_seqlens.shape[0] - 1]
    if state_at is not None:
        states += state_at.shape[1:]

    results = [q.new_empty(batch, tokens, out_heads, V)]
    if solution:
        results += [g.new_empty(batch, tokens, out_heads, K), _kept(q, v, g, cu_seqlens, keep_states)]
    if final_state:
        results += [g.new_empty(*states, heads, K, width) for width in (K, V)]
    if solver_info:
        results += [g.new_empty(batch, tokens, out_heads, dtype=dtype) for dtype in (torch.int32, g.dtype)]
    return results


@torch.library.register_fake("mesa_ext::chunk_backward")
def _chunk_backward_fake(
    do, dh_kk_final, dh_kv_final, q, k, v, g, beta, lamb, h_kk, h_kv, cu_seqlens, x, kept,
    max_cg_iterations, cg_tol,
):  # fmt: skip
    K, (heads, V) = k.shape[3], v.shape[2:]
    results = [a.new_empty(a.shape) for a in (q, k, v, g, beta, lamb)]
    if h_kk is not None:
        n = len(q) if cu_seqlens is None else cu_seqlens.shape[0] - 1
        results += [g.new_empty(n, heads, K, width) for width in (K, V)]
    return results


@torch.library.register_fake("mesa_ext::decode_step")
def _decode_step_fake(q, k, v, g, beta, lamb, h_kk, h_kv, state_indices, max_cg_iterations, cg_tol, out):
    pass


# Looking them up takes time in every call.
decode_step = torch.ops.mesa_ext.decode_step.default
_chunk_forward = torch.ops.mesa_ext.chunk_forward.default
_chunk_backward = torch.ops.mesa_ext.chunk_backward.default


def _below_autograd(operator):
    """The operator without its gradient by torch.library, which takes time even where none is asked for."""

    def call(*inputs):
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*inputs)

    return call


_forward_alone, _backward_alone = _below_autograd(_chunk_forward), _below_autograd(_chunk_backward)


def _save_for_backward(ctx, inputs, output):
    *tensors, ctx.max_cg_iterations, ctx.cg_tol, solution, ctx.final_state, solver_info, state_at, _ = inputs
    ctx.has_state_at = state_at is not None
    if not solution:
        raise RuntimeError("mesa_ext::chunk_forward: a call with solution=False cannot be differentiated")
    (x, kept), info = output[1:3], output[-2:] if solver_info else []
    ctx.save_for_backward(*tensors, x, kept)
    ctx.mark_non_differentiable(x, kept, *info)
    ctx.set_materialize_grads(False)


def _backward(ctx, grads, chunk_backward=_chunk_backward):
    do, (dh_kk_final, dh_kv_final) = grads[0], grads[3:5] if ctx.final_state else (None, None)
    if ctx.has_state_at and (dh_kk_final is not None or dh_kv_final is not None):
        raise RuntimeError("mesa_attention: there is no gradient through the states that state_at asks for")
    q, k, v, g, beta, lamb, h_kk, h_kv, cu_seqlens, x, kept = ctx.saved_tensors
    if do is None:  # only the final state was used
        do = v.new_zeros(*x.shape[:3], v.shape[3])
    grads = chunk_backward(
        do, dh_kk_final, dh_kv_final, q, k, v, g, beta, lamb, h_kk, h_kv, cu_seqlens, x, kept,
        ctx.max_cg_iterations, ctx.cg_tol,
    )  # fmt: skip
    return *grads, *[None] * (len(ctx.needs_input_grad) - len(grads))  # none for those that follow


torch.library.register_autograd("mesa_ext::chunk_forward", _backward, setup_context=_save_for_backward)


class _ChunkForward(torch.autograd.Function):
    """The same gradient for eager calls, by shorter ways on the host than torch.library's.

    Its last argument are the results: the kernels are on their way before autograd is told of them.
    """

    @staticmethod
    def forward(ctx, *inputs_and_results):
        *inputs, results = inputs_and_results
        _save_for_backward(ctx, inputs, results)
        return tuple(results)

    @staticmethod
    def backward(ctx, *grads):
        return _backward(ctx, grads, _chunk_backward if torch.is_grad_enabled() else _backward_alone)


def chunk_forward(
    *inputs, final_state: bool, solver_info: bool, state_at: Tensor | None, keep_states: bool
) -> tuple[Tensor, tuple[Tensor, Tensor] | None, tuple[Tensor, Tensor] | None]:
    """``o``, ``(h_kk, h_kv)`` if ``final_state`` and ``(steps, bound)`` if ``solver_info``, else None.

    Of ``torch.ops.mesa_ext.chunk_forward``, which is asked for what these and a gradient need and no more.
    """
    differentiable = torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in inputs)
    inputs = *inputs, differentiable, final_state, solver_info, state_at, keep_states
    if torch.compiler.is_compiling():
        results = _chunk_forward(*inputs)
    else:
        results = _forward_alone(*inputs)
        if differentiable:
            results = _ChunkForward.apply(*inputs, results)
    first = 3 if differentiable else 1  # x and kept lie in between
    return results[0], results[first : first + 2] if final_state else None, results[-2:] if solver_info else None


def _refuse_second_derivative(ctx, *grads: Tensor):
    raise RuntimeError("mesa_attention: second derivatives are not implemented: its gradient is not differentiable")


# Without this, differentiating a gradient would give zeros or a vague error instead of an answer.
torch.library.register_autograd("mesa_ext::chunk_backward", _refuse_second_derivative)
