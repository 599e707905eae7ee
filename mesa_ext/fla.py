"""The two functions of ``fla.ops.mesa_net`` (flash-linear-attention 0.6), computed by mesa_ext.

Same names, argument order, defaults and return values, so that replacing the import is all it takes:

>>> from mesa_ext.fla import chunk_mesa_net, mesa_net_decoding_one_step

``max_CG_iteration`` is the largest number of solver steps, as in fla; a token whose error bound has met mesa_ext's
default tolerance stops earlier. Gradients of ``h_kk_init`` have the orientation of autograd through a dense solve,
which is fla's too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mesa_ext.attention import mesa_attention, mesa_decode_step
from mesa_ext.state import MesaState

# Up to here a decode step of fla returns a visibly unconverged iterate, which depends on the solver that made it.
_TRUNCATED_STEPS = 4


def chunk_mesa_net(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    lamb: Tensor,
    h_kk_init: Tensor | None = None,
    h_kv_init: Tensor | None = None,
    output_final_state: bool = False,
    max_CG_iteration: int = 30,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Whole sequences; see :func:`mesa_ext.mesa_attention`.

    Args:
        q, k: ``[B, T, H, K]``. fla rounds them to float16; here they take the dtype of v.
        v: ``[B, T, H, V]``.
        g, beta: log decay and input gate ``[B, T, H]``.
        lamb: diagonal regulariser ``[H, K]``.
        h_kk_init, h_kv_init: float32 states ``[N, H, K, K]`` and ``[N, H, K, V]`` to start from; zeros where None.
        output_final_state: whether to return the states after the last token.
        max_CG_iteration: largest number of solver steps.
        use_qk_l2norm_in_kernel: divides q and k by their length first.
        cu_seqlens: boundaries ``[N + 1]`` of sequences packed along T, for B = 1.
        cu_seqlens_cpu: accepted; it saves fla a synchronisation that does not happen here.

    Returns:
        ``(o, h_kk, h_kv)``: ``o [B, T, H, V]`` in the dtype of v, and the final states, or None for both.
    """
    initial_state = None
    if h_kk_init is not None or h_kv_init is not None:
        n = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        zeros = MesaState.zeros(n, v.shape[2], q.shape[3], v.shape[3], device=q.device)
        initial_state = MesaState(
            zeros.h_kk if h_kk_init is None else h_kk_init, zeros.h_kv if h_kv_init is None else h_kv_init
        )
    o, state = mesa_attention(
        q.to(v.dtype),
        k.to(v.dtype),
        v,
        g,
        beta,
        lamb,
        initial_state=initial_state,
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
        max_cg_iterations=max_CG_iteration,
        use_qk_l2norm=use_qk_l2norm_in_kernel,
    )
    h_kk, h_kv = (None, None) if state is None else state
    return o.to(v.dtype), h_kk, h_kv


@torch.no_grad()
def mesa_net_decoding_one_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    lamb: Tensor,
    beta: Tensor,
    prev_h_kk: Tensor,
    prev_h_kv: Tensor,
    max_CG_iteration: int = 30,
) -> tuple[Tensor, Tensor, Tensor]:
    """One token for each sequence; see :func:`mesa_ext.mesa_decode_step`. Mind fla's order of ``lamb`` and ``beta``.

    Args:
        q, k: ``[B, H, K]``.
        v: ``[B, H, V]``.
        g: log decay ``[B, H]``.
        lamb: diagonal regulariser ``[H, K]``.
        beta: input gate ``[B, H]``.
        prev_h_kk, prev_h_kv: states ``[B, H, K, K]`` and ``[B, H, K, V]``; not modified.
        max_CG_iteration: largest number of solver steps. Up to 4, the result is fla's own truncated iterate (its
            start from ``q / (diag(H) + lamb)``, no preconditioner); beyond that, the converged solution.

    Returns:
        ``(o, h_kk, h_kv)``: ``o [B, H, V]`` in the dtype of q and the new states, without gradients.
    """
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    state = MesaState(
        *(h.to(wide, memory_format=torch.contiguous_format, copy=True).contiguous() for h in (prev_h_kk, prev_h_kv))
    )
    o = mesa_decode_step(
        q, k.to(q.dtype), v.to(q.dtype), g, beta, lamb, state, max_cg_iterations=max(max_CG_iteration, 1)
    )
    if max_CG_iteration <= _TRUNCATED_STEPS:
        x = _truncated_solve(q.to(wide), state.h_kk, lamb.to(wide), max_CG_iteration)
        o = (x.unsqueeze(-2) @ state.h_kv).squeeze(-2).to(q.dtype)
    return o, state.h_kk.to(prev_h_kk.dtype), state.h_kv.to(prev_h_kv.dtype)


def _truncated_solve(q: Tensor, h_kk: Tensor, lamb: Tensor, steps: int) -> Tensor:
    """`steps` plain conjugate-gradient steps on ``(H + Lambda) x = q`` from the diagonal guess."""

    def apply(x: Tensor) -> Tensor:
        return (x.unsqueeze(-2) @ h_kk).squeeze(-2) + lamb * x

    x = q / (h_kk.diagonal(dim1=-2, dim2=-1) + lamb)
    r = q - apply(x)
    p, rr = r, r.square().sum(-1, keepdim=True)
    for _ in range(steps):
        ap = apply(p)
        alpha = torch.where(rr > 0, rr / (p * ap).sum(-1, keepdim=True), 0)
        x = x + alpha * p
        r = r - alpha * ap
        rr, last = r.square().sum(-1, keepdim=True), rr
        p = r + torch.where(last > 0, rr / last, 0) * p
    return x
