"""The Mesa layer written down plainly: one dense solve per token in float64, differentiable by autograd.

Everything else in this package is measured against these few lines. They trade speed and memory (every state of every
token is kept, T * K * (K + V) numbers a head) for being obvious.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mesa_ext.state import MesaState


def mesa_states(
    k: Tensor, v: Tensor, g: Tensor, beta: Tensor, *, initial_state: tuple[Tensor, Tensor] | None = None
) -> MesaState:
    """The states after every token, ``h_kk [B, T, HS, K, K]`` and ``h_kv [B, T, HS, K, V]``, in float64.

    Arguments as in :func:`mesa_reference`, without packed sequences.
    """
    k, v, g, beta = (a.double() for a in (k, v, g, beta))
    heads = v.shape[2]
    k = k.repeat_interleave(heads // k.shape[2], dim=2)
    if initial_state is None:
        initial_state = MesaState.zeros(len(k), heads, k.shape[-1], v.shape[-1], device=k.device, dtype=torch.float64)
    h_kk, h_kv = (h.double() for h in initial_state)
    kk, kv = [], []
    for t in range(k.shape[1]):
        decay, gate = g[:, t, :, None, None].exp(), beta[:, t, :, None, None]
        h_kk = decay * h_kk + gate * k[:, t, :, :, None] * k[:, t, :, None, :]
        h_kv = decay * h_kv + gate * k[:, t, :, :, None] * v[:, t, :, None, :]
        kk.append(h_kk)
        kv.append(h_kv)
    if not kk:
        return MesaState(*(h.unsqueeze(1)[:, :0] for h in (h_kk, h_kv)))
    return MesaState(torch.stack(kk, 1), torch.stack(kv, 1))


def mesa_condition(
    k: Tensor,
    g: Tensor,
    beta: Tensor,
    lamb: Tensor,
    *,
    initial_state: tuple[Tensor, Tensor] | None = None,
    stride: int = 1,
) -> Tensor:
    """The condition number of ``H_t + diag(lamb)``, ``[B, T / stride, HS]``: of every `stride`-th token and head."""
    v = k.new_zeros(*g.shape, 0)
    if initial_state is not None:
        initial_state = (initial_state[0], initial_state[0][..., :0])
    h_kk, _ = mesa_states(k, v, g, beta, initial_state=initial_state)
    eigenvalues = torch.linalg.eigvalsh(h_kk[:, ::stride] + lamb.double().diag_embed())
    return eigenvalues[..., -1] / eigenvalues[..., 0]


def mesa_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    lamb: Tensor,
    *,
    initial_state: tuple[Tensor, Tensor] | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, MesaState]:
    """What :func:`mesa_ext.mesa_attention` approximates, by ``torch.linalg.solve`` in float64.

    Args:
        q: queries ``[B, T, HQ, K]``; any dtype here and below, converted to float64.
        k: keys ``[B, T, HK, K]``, HK dividing HS.
        v: values ``[B, T, HS, V]``.
        g: log decay ``[B, T, HS]``, at most 0; ``-inf`` forgets everything before the token.
        beta: input gate ``[B, T, HS]``.
        lamb: diagonal regulariser ``[HS, K]``.
        initial_state: ``(h_kk [N, HS, K, K], h_kv [N, HS, K, V])``; zeros if None.
        cu_seqlens: boundaries ``[N + 1]`` of the sequences packed along T (B must be 1); N = B if None.

    Returns:
        ``o [B, T, max(HQ, HS), V]`` and the final :class:`mesa_ext.MesaState`, both float64.

    Source: equations of arXiv 2506.05233, section 3.
    """
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        runs = [
            mesa_reference(
                *(a[:, start:end] for a in (q, k, v, g, beta)),
                lamb,
                initial_state=None if initial_state is None else tuple(h[n : n + 1] for h in initial_state),
            )
            for n, (start, end) in enumerate(zip(bounds, bounds[1:]))
        ]
        outputs, states = zip(*runs)
        return torch.cat(outputs, 1), MesaState(*(torch.cat(h) for h in zip(*states)))

    q_heads, heads = q.shape[2], v.shape[2]
    out_heads = max(q_heads, heads)
    if q.shape[1] == 0:
        if initial_state is None:
            initial_state = MesaState.zeros(
                len(q), heads, q.shape[3], v.shape[3], device=q.device, dtype=torch.float64
            )
        return q.new_zeros(len(q), 0, out_heads, v.shape[3], dtype=torch.float64), MesaState(
            *(h.double() for h in initial_state)
        )

    h_kk, h_kv = mesa_states(k, v, g, beta, initial_state=initial_state)
    system = (h_kk + lamb.double().diag_embed()).repeat_interleave(out_heads // heads, dim=2)
    x = torch.linalg.solve(system, q.double().repeat_interleave(out_heads // q_heads, dim=2).unsqueeze(-1))
    o = h_kv.repeat_interleave(out_heads // heads, dim=2).mT @ x
    return o.squeeze(-1), MesaState(h_kk[:, -1], h_kv[:, -1])
