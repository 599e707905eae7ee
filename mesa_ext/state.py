"""The recurrent state of the Mesa layer."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class MesaState(NamedTuple):
    """What the layer remembers of the tokens so far; one row per sequence.

    Attributes:
        h_kk: key covariance ``sum_i decay_i beta_i k_i k_i'``, ``[N, HS, K, K]``.
        h_kv: key-value memory ``sum_i decay_i beta_i k_i v_i'``, ``[N, HS, K, V]``.

    Both in float32 (float64 for float64 inputs).
    """

    h_kk: Tensor
    h_kv: Tensor

    @classmethod
    def zeros(
        cls,
        n: int,
        heads: int,
        K: int,
        V: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> MesaState:
        """The state of ``n`` sequences that have seen nothing, for ``heads`` heads of key width K, value width V."""
        return cls(
            torch.zeros(n, heads, K, K, device=device, dtype=dtype),
            torch.zeros(n, heads, K, V, device=device, dtype=dtype),
        )
