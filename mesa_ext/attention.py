"""The public functions of the Mesa layer: a whole sequence at once, or one token at a time."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mesa_ext.ops import chunk_forward, compute_dtype, decode_step
from mesa_ext.state import MesaState

# The rounding of the inputs themselves is near 1e-3 in 16 bits and 1e-7 in float32: solving further buys nothing.
_CG_TOL = {torch.float16: 1e-3, torch.bfloat16: 1e-3, torch.float32: 3e-6, torch.float64: 1e-12}


class SolverInfo(NamedTuple):
    """How the solver fared, per token and output head ``[B, T, HO]``; carries no gradient.

    Attributes:
        steps: conjugate-gradient steps taken, int32.
        error_bound: guaranteed bound of the relative error of the solution x of ``(H + Lambda) x = q`` in the norm
            ``|x|_Lambda = sqrt(sum_i lamb_i x_i^2)``. Above ``cg_tol`` where ``max_cg_iterations`` ended the solve.
    """

    steps: Tensor
    error_bound: Tensor


_ARGUMENTS = ("q", "k", "v", "g", "beta", "lamb")


# Of the time of a decode step from Python, what happens in these functions is a good part: the usual case goes the
# shortest way.
def _check_tensors(function: str, *tensors: Tensor) -> None:
    try:
        if all(map(torch.is_floating_point, tensors)):
            return
    except TypeError:  # not a tensor; which one, it does not tell
        pass
    for name, tensor in zip(_ARGUMENTS, tensors):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{function}: {name} must be a torch.Tensor, got {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise ValueError(f"{function}: {name} must have a floating dtype, got {tensor.dtype}")


def _as_computed(q: Tensor, g: Tensor, beta: Tensor, lamb: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """g, beta and lamb in the dtype that goes with q."""
    dtype = compute_dtype(q.dtype)
    if g.dtype == beta.dtype == lamb.dtype == dtype:  # quicker than conversions that do nothing
        return g, beta, lamb
    return g.to(dtype), beta.to(dtype), lamb.to(dtype)


def _state_pair(function: str, name: str, state: MesaState) -> tuple[Tensor, Tensor]:
    if isinstance(state, (tuple, list)) and len(state) == 2:
        h_kk, h_kv = state
        if isinstance(h_kk, Tensor) and isinstance(h_kv, Tensor):
            return h_kk, h_kv
    raise TypeError(
        f"{function}: {name} must be a MesaState or a pair (h_kk, h_kv) of tensors, got {type(state).__name__}"
    )


def _autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Casts q, k and v as torch.autocast does for a matrix product: float64 is left alone."""
    device = "cuda" if q.is_cuda else q.device.type
    if not torch.is_autocast_enabled(device):
        return q, k, v
    dtype = torch.get_autocast_dtype(device)
    return tuple(a if a.dtype == torch.float64 else a.to(dtype) for a in (q, k, v))


def _empty_output(q: Tensor, v: Tensor) -> Tensor:
    """For ``q [B, HQ, K]`` and ``v [B, HS, V]``; of other ranks q itself, for the operator to report."""
    if q.ndim != 3 or v.ndim != 3:
        return q
    (batch, q_heads, _), (_, heads, width) = q.shape, v.shape
    if q_heads <= heads:
        return torch.empty_like(v, memory_format=torch.contiguous_format)
    return q.new_empty((batch, q_heads, width))


def _l2norm(x: Tensor) -> Tensor:
    """Unit length over the last axis, computed in at least float32; zero vectors stay zero."""
    wide = x.to(compute_dtype(x.dtype))
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + 1e-6)).to(x.dtype)


def _sequence_bounds(cu_seqlens: Tensor, q: Tensor) -> Tensor:
    """cu_seqlens in int64 on q's device, without synchronisation. Values on q's device are the operator's to check."""
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"mesa_attention: cu_seqlens must be a torch.Tensor, got {type(cu_seqlens).__name__}")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"mesa_attention: cu_seqlens must be int32 or int64, got {cu_seqlens.dtype}")
    if cu_seqlens.device == q.device:
        return cu_seqlens.long()
    # Reading values would break the graph of torch.compile; the CUDA kernels stay inside the tensors whatever comes.
    if cu_seqlens.is_cpu and q.ndim == 4 and not torch.compiler.is_compiling():
        bounds, tokens = cu_seqlens.flatten().tolist(), q.shape[1]
        if bounds[:1] != [0] or bounds[-1] != tokens or any(a > b for a, b in zip(bounds, bounds[1:])):
            shown = bounds if len(bounds) <= 8 else f"[{', '.join(map(str, bounds[:4]))}, ..., {bounds[-1]}]"
            raise ValueError(
                f"mesa_attention: cu_seqlens must start at 0, never decrease and end at T = {tokens}, got {shown}"
            )
    return cu_seqlens.to(q.device, torch.int64, non_blocking=True)


def _token_counts(state_at: Tensor, q: Tensor, output_final_state: bool) -> Tensor:
    """state_at in int64 on q's device, without synchronisation."""
    if not isinstance(state_at, Tensor):
        raise TypeError(f"mesa_attention: state_at must be a torch.Tensor, got {type(state_at).__name__}")
    if state_at.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"mesa_attention: state_at must be int32 or int64, got {state_at.dtype}")
    if not output_final_state:
        raise ValueError("mesa_attention: state_at needs output_final_state=True, got output_final_state=False")
    return state_at.to(q.device, torch.int64, non_blocking=True)


def mesa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    lamb: Tensor,
    *,
    initial_state: MesaState | None = None,
    output_final_state: bool = False,
    state_at: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_cg_iterations: int = 30,
    cg_tol: float | None = None,
    use_qk_l2norm: bool = False,
    return_solver_info: bool = False,
    keep_states: bool = False,
) -> tuple[Tensor, MesaState | None] | tuple[Tensor, MesaState | None, SolverInfo]:
    """The Mesa layer over whole sequences: every token reads out of the ridge regression of all values on keys so far.

    Per sequence and head, with ``Lambda = diag(lamb)``::

        H_t = exp(g_t) H_{t-1} + beta_t k_t k_t'
        G_t = exp(g_t) G_{t-1} + beta_t k_t v_t'
        o_t = G_t' (H_t + Lambda)^{-1} q_t

    The linear system of each token is solved by conjugate gradients, preconditioned by Lambda and stopped row by row on
    a guaranteed error. Nothing depends on the scale of the inputs or of the gradients, and a token's result depends,
    bit for bit, on no later token and on no other sequence. (On CUDA, up to 8 tokens of 16-bit inputs without
    ``cu_seqlens`` and gradients are computed as so many decode steps, and round differently from a longer call.)

    Differentiable once in every floating argument, the states included.

    Args:
        q: queries ``[B, T, HQ, K]`` in float16, bfloat16 or float32, or in float64 on the CPU; any strides. T may be 0.
        k: keys ``[B, T, HK, K]``, dtype of q. HK divides HS: state head s reads key head ``s // (HS // HK)``.
        v: values ``[B, T, HS, V]``, dtype of q. K and V from 1 to 128 (no upper limit on the CPU).
        g: natural logarithm of the decay of each token, ``[B, T, HS]``, at most 0; ``-inf`` forgets everything before
            the token. Any floating dtype; used in float32, as beta and lamb are (float64 if q is float64).
        beta: input gate of each token, ``[B, T, HS]``, at least 0.
        lamb: diagonal regulariser ``[HS, K]``, above 0.
        initial_state: the :class:`MesaState` to start from (N rows, float32, or float64 if q is float64), with a
            symmetric ``h_kk``, packed or not; zeros if None. It is not modified.
        output_final_state: whether to return the state after the last token of each sequence.
        state_at: after how many tokens of each sequence to return its state instead, ``[N]`` or ``[N, M]`` (int32 or
            int64): the number of tokens of a draft that were accepted, say, or ``0, 1, .. T`` for the state after every
            token, ``initial_state`` first. Needs ``output_final_state``. Out of range (0 to the sequence's length) is
            an error on the CPU, and taken into it on CUDA, where looking would take a synchronisation. Each state costs
            a walk over the tokens up to it: meant for short pieces. No gradient flows through these states.
        cu_seqlens: boundaries ``[N + 1]`` (int32 or int64) of sequences packed along T, for B = 1: sequence n is
            ``[cu_seqlens[n], cu_seqlens[n + 1])`` and may be empty. On the CPU its values are checked (but under
            torch.compile for CUDA); on the device they are used as they come, without synchronisation. N = B if None.
        max_cg_iterations: most solver steps for a token, at least 1. Enough for the default tolerance of 16-bit inputs.
            In float32 and float64 it may end the solve first (at lamb .02 about 55 steps meet 3e-6): then raise it;
            ``return_solver_info`` tells.
        cg_tol: relative error, in the norm ``sqrt(sum_i lamb_i x_i^2)``, at which a token's solve stops; 0 takes
            ``max_cg_iterations`` steps. Default: 1e-3 for 16-bit inputs, 3e-6 for float32, 1e-12 for float64.
        use_qk_l2norm: divides q and k by their Euclidean length over K first (``x * rsqrt(sum x^2 + 1e-6)``).
        return_solver_info: whether to return a :class:`SolverInfo` as well.
        keep_states: whether to keep the states before every 64 tokens for the backward pass, on CUDA, instead of making
            them again there: less time for memory, ``HS K (K + V) / 16`` bytes a token (K and V in multiples of 64),
            until the backward pass has been. Results are the same bit for bit. Where activation checkpointing runs the
            forward pass just before the backward pass, it costs memory for only one layer at a time.

    Returns:
        ``(o, state)``, or ``(o, state, info)`` if ``return_solver_info``. ``o [B, T, HO, V]`` has the dtype of q and
        HO = max(HQ, HS) heads. HQ is a multiple of HS (grouped queries) or divides it (grouped values): output head h
        uses state head ``h // (HO // HS)`` and query head ``h // (HO // HQ)``. ``state`` is a :class:`MesaState` that
        shares no memory with ``initial_state`` and is packed if that is, or None without ``output_final_state``; with
        ``state_at [N, M]`` its tensors are ``[N, M, HS, K, K]`` and ``[N, M, HS, K, V]``.

        Under ``torch.autocast``, q, k and v are cast to its dtype.

    Raises:
        TypeError, ValueError, RuntimeError: an argument has the wrong type, rank, shape, dtype, device or value; the
            message names the argument, what was expected and what came. Differentiating twice is a RuntimeError too,
            and so is asking for the gradient of what depends on the states of ``state_at``.

    Example::

        B, T, H, K, V = 2, 1024, 4, 64, 64
        q, k = torch.randn(2, B, T, H, K)
        v = torch.randn(B, T, H, V)
        g = -0.05 * torch.rand(B, T, H)  # keeps 95 to 100 % from token to token
        beta = torch.rand(B, T, H)
        lamb = torch.ones(H, K)
        o, state = mesa_attention(q, k, v, g, beta, lamb, use_qk_l2norm=True, output_final_state=True)
        # `state` is the initial_state of a call on the text that follows, or of mesa_decode_step

    Source: "MesaNet: Sequence Modeling by Locally Optimal Test-Time Training", https://arxiv.org/abs/2506.05233.
    """
    _check_tensors("mesa_attention", q, k, v, g, beta, lamb)
    q, k, v = _autocast(q, k, v)
    h_kk = h_kv = None
    packed = False
    if initial_state is not None:
        start = MesaState(*_state_pair("mesa_attention", "initial_state", initial_state))
        packed = start.is_packed
        h_kk, h_kv = start.full()
    if cu_seqlens is not None:
        cu_seqlens = _sequence_bounds(cu_seqlens, q)
    if state_at is not None:
        state_at = _token_counts(state_at, q, output_final_state)
    if use_qk_l2norm:
        q, k = _l2norm(q), _l2norm(k)
    if cg_tol is None:
        cg_tol = _CG_TOL.get(q.dtype, 0.0)
    gates = _as_computed(q, g, beta, lamb)
    o, state, info = chunk_forward(
        q, k, v, *gates, h_kk, h_kv, cu_seqlens, max_cg_iterations, cg_tol,
        final_state=output_final_state, solver_info=return_solver_info, state_at=state_at,
        keep_states=keep_states,
    )  # fmt: skip
    if state is not None:
        state = MesaState(*state)
        state = state.packed() if packed else state
    return (o, state) if info is None else (o, state, SolverInfo(*info))


def mesa_decode_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    lamb: Tensor,
    state: MesaState,
    *,
    max_cg_iterations: int = 30,
    cg_tol: float | None = None,
    use_qk_l2norm: bool = False,
    state_indices: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """One token for each of B sequences, as :func:`mesa_attention` would compute it; ``state`` is updated in place.

    The solver, its start and its stopping rule are those of :func:`mesa_attention`, so that a prompt followed by single
    tokens gives what one call over all of them gives (up to rounding). Computes no gradients.

    Args:
        q, k, v: ``[B, HQ, K]``, ``[B, HK, K]``, ``[B, HS, V]``; heads, dtypes and strides as in :func:`mesa_attention`.
        g, beta: log decay and input gate ``[B, HS]`` in any floating dtype.
        lamb: diagonal regulariser ``[HS, K]`` in any floating dtype.
        state: :class:`MesaState` of contiguous tensors, ``h_kk [P, HS, K, K]`` or packed, ``h_kv [P, HS, K, V]``, in
            float32 (float64 if q is float64). **Updated in place.** P = B without ``state_indices``. A packed one makes
            22 % less memory traffic at K = V = 128.
        max_cg_iterations, cg_tol, use_qk_l2norm: as in :func:`mesa_attention`.
        state_indices: which row of the state each sequence owns, ``[B]`` (int32 or int64) on q's device; -1 skips the
            sequence: its output is zero. No other row of the state is touched. Rows must not repeat (-1 may). An index
            out of range is an error on the CPU, and skipped on CUDA, where looking would take a synchronisation.
        out: where the result goes, ``[B, max(HQ, HS), V]`` in the dtype of q (autocast's, under autocast), with rows of
            V contiguous elements and any other strides; it shares no memory with an argument. New memory if None.

    Returns:
        ``o [B, max(HQ, HS), V]`` in the dtype of q; ``out`` itself if it was given.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`mesa_attention`; nothing has been written then. RuntimeError also
            if an argument requires a gradient outside ``torch.no_grad()`` and ``torch.inference_mode()``.

    Example::

        o, state = mesa_attention(q, k, v, g, beta, lamb, output_final_state=True)  # the prompt
        with torch.no_grad():
            o_next = mesa_decode_step(q_next, k_next, v_next, g_next, beta_next, lamb, state)
    """
    _check_tensors("mesa_decode_step", q, k, v, g, beta, lamb)
    h_kk, h_kv = _state_pair("mesa_decode_step", "state", state)
    if out is not None and not isinstance(out, Tensor):
        raise TypeError(f"mesa_decode_step: out must be a torch.Tensor, got {type(out).__name__}")
    arguments = (q, k, v, g, beta, lamb, h_kk, h_kv, out)
    if torch.is_grad_enabled() and any(a is not None and a.requires_grad for a in arguments):
        raise RuntimeError(
            "mesa_decode_step: computes no gradients, but an argument requires one: "
            "call it under torch.no_grad(), or use mesa_attention"
        )
    q, k, v = _autocast(q, k, v)
    if state_indices is not None:
        if not isinstance(state_indices, Tensor):
            kind = type(state_indices).__name__
            raise TypeError(f"mesa_decode_step: state_indices must be a torch.Tensor, got {kind}")
        if state_indices.dtype == torch.int32:
            state_indices = state_indices.long()
    if use_qk_l2norm:
        q, k = _l2norm(q), _l2norm(k)
    if cg_tol is None:
        cg_tol = _CG_TOL.get(q.dtype, 0.0)
    gates = _as_computed(q, g, beta, lamb)
    if out is None:
        out = _empty_output(q, v)
    decode_step(q, k, v, *gates, h_kk, h_kv, state_indices, max_cg_iterations, cg_tol, out)
    return out
