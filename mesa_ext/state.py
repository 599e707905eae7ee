"""The recurrent state of the Mesa layer."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

_TILE = 16


def _tile_rows(K: int) -> int:
    return -(-K // _TILE)


class MesaState(NamedTuple):
    """What the layer remembers of the tokens so far; one row per sequence.

    Attributes:
        h_kk: key covariance ``sum_i decay_i beta_i k_i k_i'``, symmetric, ``[N, HS, K, K]``. Packed, its tiles of
            16 x 16 on and above the diagonal, ``[N, HS, P, 16, 16]`` with ``P = R (R + 1) / 2`` for
            ``R = ceil(K / 16)``, row of tiles after row, the last ones padded with zeros: 56 % of the memory at
            K = 128, 63 % at 64.
        h_kv: key-value memory ``sum_i decay_i beta_i k_i v_i'``, ``[N, HS, K, V]``.

    Both in float32 (float64 for float64 inputs). A decode step reads and writes the packed layout directly;
    :func:`mesa_ext.mesa_attention` converts it.
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
        packed: bool = False,
    ) -> MesaState:
        """The state of ``n`` sequences that have seen nothing, for ``heads`` heads of key width K, value width V."""
        rows = _tile_rows(K)
        shape = (rows * (rows + 1) // 2, _TILE, _TILE) if packed else (K, K)
        return cls(
            torch.zeros(n, heads, *shape, device=device, dtype=dtype),
            torch.zeros(n, heads, K, V, device=device, dtype=dtype),
        )

    @property
    def is_packed(self) -> bool:
        """Whether ``h_kk`` is packed: it has a dimension more than ``h_kv`` then."""
        return self.h_kk.ndim == self.h_kv.ndim + 1

    def packed(self) -> MesaState:
        """This state with ``h_kk`` packed; what its tiles below the diagonal hold is taken to be the transpose of those
        above. ``h_kv`` (and all, if it is packed already) is shared. Differentiable; no synchronisation."""
        if self.is_packed:
            return self
        K, rows = self.h_kk.shape[-1], _tile_rows(self.h_kk.shape[-1])
        padding = rows * _TILE - K
        tiles = pad(self.h_kk, (0, padding, 0, padding)).unflatten(-2, (rows, _TILE)).unflatten(-1, (rows, _TILE))
        i, j = torch.triu_indices(rows, rows, device=tiles.device)
        return MesaState(tiles.transpose(-3, -2)[..., i, j, :, :].contiguous(), self.h_kv)

    def full(self) -> MesaState:
        """This state with ``h_kk [..., K, K]``. ``h_kv`` (and all, if it is not packed) is shared. Differentiable; no
        synchronisation.

        Raises:
            ValueError: ``h_kk`` has neither layout for the K of ``h_kv``.
        """
        if not self.is_packed:
            return self
        *batch, K, _ = self.h_kv.shape
        rows = _tile_rows(K)
        expected = [*batch, rows * (rows + 1) // 2, _TILE, _TILE]
        if list(self.h_kk.shape) != expected:
            raise ValueError(
                f"MesaState: packed h_kk must have shape {expected} beside h_kv {list(self.h_kv.shape)}, "
                f"got {list(self.h_kk.shape)}"
            )
        i = torch.arange(rows, device=self.h_kk.device)
        low, high = torch.minimum(i[:, None], i), torch.maximum(i[:, None], i)
        tiles = self.h_kk[..., low * (2 * rows - low - 1) // 2 + high, :, :]  # [..., rows, rows, 16, 16]
        tiles = torch.where((i[:, None] > i)[..., None, None], tiles.mT, tiles)
        h_kk = tiles.transpose(-3, -2).flatten(-4, -3).flatten(-2, -1)
        return MesaState(h_kk[..., :K, :K].contiguous(), self.h_kv)
