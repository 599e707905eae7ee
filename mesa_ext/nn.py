"""The Mesa layer as a module: projections, short convolutions, gates, the operator, output norm and projection."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mesa_ext.attention import SolverInfo, mesa_attention, mesa_decode_step
from mesa_ext.state import MesaState

# A token that writes with beta = 1 multiplies the memory by at most this; one that writes nothing may keep all of it.
MAX_DECAY_WHEN_WRITING = 0.9975


class MesaLayerState(NamedTuple):
    """What :class:`MesaLayer` remembers of the tokens so far; one row per sequence, constant in their number.

    ``heads * (K * K + K * V)`` float32 numbers in ``mesa`` and ``2 * (conv_size - 1) * heads * K`` numbers of the
    activations' dtype in the convolutions: 257 KiB per head at K = V = 128 in bfloat16, nearly all of it in ``mesa``.

    Attributes:
        mesa: the operator's :class:`mesa_ext.MesaState`.
        conv_q, conv_k: the last ``conv_size - 1`` inputs of the two convolutions, ``[N, conv_size - 1, heads * K]``.
    """

    mesa: MesaState
    conv_q: Tensor
    conv_k: Tensor


class CausalConv(nn.Module):
    """Depthwise causal convolution over time followed by SiLU, for packed sequences and pieces of one sequence.

    Weight ``[size, channels]``: the last row meets the present token.
    """

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        self.size = size
        self.weight = nn.Parameter(torch.empty(size, channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.uniform_(self.weight, -(self.size**-0.5), self.size**-0.5)

    def forward(
        self, x: Tensor, state: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """``x [B, T, C]``, inputs before it ``[N, size - 1, C]`` (zeros if None) -> ``y [B, T, C]``, new state."""
        past = self.size - 1
        n = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        state = x.new_zeros(n, past, x.shape[2]) if state is None else state.to(x.dtype)
        if cu_seqlens is None:
            extended = torch.cat([state, x], 1)
            return self._convolve(extended), extended[:, extended.shape[1] - past :].clone()

        # Every sequence is laid out behind its own past, so that one convolution over all of them mixes nothing.
        ends = cu_seqlens[1:]
        token = torch.arange(x.shape[1], device=x.device)
        token = token + past * (1 + torch.searchsorted(ends, token, right=True))
        first = cu_seqlens[:-1] + past * torch.arange(n, device=x.device)
        offset = torch.arange(past, device=x.device)
        before = (first[:, None] + offset).flatten()
        last = (first + cu_seqlens.diff())[:, None] + offset
        extended = x.new_zeros(1, x.shape[1] + n * past, x.shape[2])
        extended = extended.index_copy(1, token, x).index_copy(1, before, state.reshape(1, n * past, x.shape[2]))
        y = self._convolve(extended).index_select(1, token - past)
        return y, extended[0].index_select(0, last.flatten()).view(n, past, x.shape[2])

    def _convolve(self, x: Tensor) -> Tensor:
        tokens = x.shape[1] - self.size + 1
        weight = self.weight.float() if x.dtype.itemsize < 4 else self.weight  # sums in float32 at least
        y = sum(weight[i] * x[:, i : i + tokens] for i in range(self.size))
        return F.silu(y.to(x.dtype))


class MesaLayer(nn.Module):
    """A sequence-mixing layer that reads, at every token, from the ridge regression of all values on all keys so far.

    Per head: ``q, k = silu(conv(Wx))`` (unit length), ``v = Wx``; input gate ``beta = sigmoid(.)``; decay
    ``sigmoid(.) * (1 - (1 - 0.9975) beta^2)``; ``lamb = lambda_min + softplus(.)``, 1 at the start; then
    :func:`mesa_ext.mesa_attention`, an RMS norm per head (times ``silu(Wx)`` with ``use_output_gate``), a projection.

    The decays start spread over the heads from 0.9 to 0.999 a token, so that some heads remember from the first step.

    Args:
        hidden_size: width D of the input and the output.
        num_heads: number of heads.
        head_dim: width K of queries and keys, at most 128 on CUDA.
        value_head_dim: width V of values; head_dim if None.
        conv_size: tokens that the convolutions on q and k see; 1 leaves a scaling per channel.
        use_output_gate: multiplies the normed output by ``silu`` of one more projection.
        norm_eps: of the output norm.
        lambda_min: smallest regulariser.
        max_cg_iterations, cg_tol, keep_states: see :func:`mesa_ext.mesa_attention`.

    Example::

        layer = MesaLayer(hidden_size=256, num_heads=4, head_dim=64)
        y, state = layer(prompt)  # [B, T, 256]
        with torch.no_grad():
            y, state = layer(token, state)  # [B, 1, 256], one decode step, state updated in place

    Source: "MesaNet: Sequence Modeling by Locally Optimal Test-Time Training", https://arxiv.org/abs/2506.05233.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        head_dim: int,
        *,
        value_head_dim: int | None = None,
        conv_size: int = 4,
        use_output_gate: bool = False,
        norm_eps: float = 1e-5,
        lambda_min: float = 0.25,
        max_cg_iterations: int = 30,
        cg_tol: float | None = None,
        keep_states: bool = False,
    ) -> None:
        super().__init__()
        if conv_size < 1:
            raise ValueError(f"MesaLayer: conv_size must be at least 1, got {conv_size}")
        if not 0 < lambda_min < 1:
            raise ValueError(f"MesaLayer: lambda_min must lie between 0 and 1, got {lambda_min}")
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.value_head_dim = head_dim if value_head_dim is None else value_head_dim
        self.lambda_min = lambda_min
        self.max_cg_iterations = max_cg_iterations
        self.cg_tol = cg_tol
        self.keep_states = keep_states
        keys, values = num_heads * head_dim, num_heads * self.value_head_dim
        self.q_proj = nn.Linear(hidden_size, keys, bias=False)
        self.k_proj = nn.Linear(hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(hidden_size, values, bias=False)
        self.q_conv = CausalConv(keys, conv_size)
        self.k_conv = CausalConv(keys, conv_size)
        self.beta_proj = nn.Linear(hidden_size, num_heads)
        self.decay_proj = nn.Linear(hidden_size, num_heads)
        self.lamb_param = nn.Parameter(torch.empty(num_heads, head_dim))
        self.gate_proj = nn.Linear(hidden_size, values, bias=False) if use_output_gate else None
        self.norm = nn.RMSNorm(self.value_head_dim, eps=norm_eps)
        self.o_proj = nn.Linear(values, hidden_size, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialises the parameters that have a meaning of their own: gates and regulariser."""
        nn.init.zeros_(self.beta_proj.bias)
        # 1 - decay evenly spaced in the logarithm from 0.1 to 0.001; sigmoid(log((1 - f) / f)) = 1 - f.
        forget = torch.logspace(-1, -3, self.num_heads) if self.num_heads > 1 else torch.tensor([0.01])
        self.decay_proj.bias.copy_(torch.log((1 - forget) / forget))
        nn.init.constant_(self.lamb_param, math.log(math.expm1(1 - self.lambda_min)))

    def init_state(self, n: int) -> MesaLayerState:
        """The state of ``n`` sequences that have seen nothing."""
        weight = self.q_proj.weight
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        conv = (weight.new_zeros(n, self.q_conv.size - 1, self.num_heads * self.head_dim) for _ in range(2))
        mesa = MesaState.zeros(n, self.num_heads, self.head_dim, self.value_head_dim, device=weight.device, dtype=wide)
        return MesaLayerState(mesa, *conv)

    def forward(
        self,
        x: Tensor,
        state: MesaLayerState | None = None,
        cu_seqlens: Tensor | None = None,
        return_solver_info: bool = False,
    ) -> tuple[Tensor, MesaLayerState] | tuple[Tensor, MesaLayerState, SolverInfo]:
        """Mixes a sequence, or continues one.

        One token (T = 1) on top of a state, with gradients disabled and no ``cu_seqlens``, is a decode step: it updates
        ``state`` **in place** and returns it. Every other call leaves ``state`` alone and is differentiable through it.

        Args:
            x: ``[B, T, D]``; T may be 0.
            state: what the tokens before x left behind (N rows), or None at the beginning.
            cu_seqlens: boundaries ``[N + 1]`` of sequences packed along T, for B = 1; N = B if None.
            return_solver_info: whether to return the solver's steps and error bounds per token and head as well
                (this never takes the decode step).

        Returns:
            ``(y, state)`` or ``(y, state, info)`` with ``y [B, T, D]``.
        """
        if cu_seqlens is not None:
            cu_seqlens = cu_seqlens.to(x.device, torch.int64, non_blocking=True)
        q, conv_q = self.q_conv(self.q_proj(x), state and state.conv_q, cu_seqlens)
        k, conv_k = self.k_conv(self.k_proj(x), state and state.conv_k, cu_seqlens)
        v = self.v_proj(x)
        q, k, v = (a.unflatten(-1, (self.num_heads, -1)) for a in (q, k, v))
        wide = torch.promote_types(x.dtype, torch.float32)
        beta = self.beta_proj(x).to(wide).sigmoid()
        decay = F.logsigmoid(self.decay_proj(x).to(wide)) + torch.log1p((MAX_DECAY_WHEN_WRITING - 1) * beta.square())
        lamb = self.lambda_min + F.softplus(self.lamb_param.to(wide))

        one_token = state is not None and x.shape[1] == 1 and cu_seqlens is None
        if one_token and not torch.is_grad_enabled() and not return_solver_info:
            o = self.decode(*(a.squeeze(1) for a in (q, k, v, decay, beta)), lamb, state.mesa).unsqueeze(1)
            state.conv_q.copy_(conv_q)
            state.conv_k.copy_(conv_k)
            return self._output(o, x), state
        o, mesa, info = self.attend(q, k, v, decay, beta, lamb, state and state.mesa, cu_seqlens)
        result = self._output(o, x), MesaLayerState(mesa, conv_q, conv_k)
        return (*result, info) if return_solver_info else result

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        lamb: Tensor,
        state: MesaState | None,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, MesaState, SolverInfo | None]:
        """The operator on whole sequences, ``[B, T, heads, ...]``; subclasses may put another one here."""
        return mesa_attention(
            q,
            k,
            v,
            g,
            beta,
            lamb,
            initial_state=state,
            output_final_state=True,
            cu_seqlens=cu_seqlens,
            max_cg_iterations=self.max_cg_iterations,
            cg_tol=self.cg_tol,
            use_qk_l2norm=True,
            return_solver_info=True,
            keep_states=self.keep_states,
        )

    def decode(
        self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, lamb: Tensor, state: MesaState
    ) -> Tensor:
        """The operator on one token, ``[B, heads, ...]``, updating ``state`` in place."""
        return mesa_decode_step(
            q,
            k,
            v,
            g,
            beta,
            lamb,
            state,
            max_cg_iterations=self.max_cg_iterations,
            cg_tol=self.cg_tol,
            use_qk_l2norm=True,
        )

    def _output(self, o: Tensor, x: Tensor) -> Tensor:
        o = self.norm(o.to(self.norm.weight.dtype))
        if self.gate_proj is not None:
            o = o * F.silu(self.gate_proj(x)).unflatten(-1, (self.num_heads, -1))
        return self.o_proj(o.flatten(-2))

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, head_dim={self.head_dim}, value_head_dim={self.value_head_dim}"
