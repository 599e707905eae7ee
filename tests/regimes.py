"""Inputs in the regimes that decide whether a Mesa layer is right, the accuracy asked for, and how it is measured."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Callable, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from mesa_ext import MesaState
from mesa_ext.reference import mesa_condition, mesa_reference, mesa_states


class Bars(NamedTuple):
    """Largest relative error to the float64 reference, for every tensor."""

    o: float  # in every regime
    gradient: float  # condition number below MILD
    hard_gradient: float  # condition number up to 8000


MILD = 200
BARS_16_BIT = Bars(o=5e-3, gradient=1e-2, hard_gradient=2e-2)
BARS = {
    ("cuda", torch.float16): BARS_16_BIT,
    ("cuda", torch.bfloat16): BARS_16_BIT,
    ("cuda", torch.float32): Bars(o=5e-5, gradient=1e-3, hard_gradient=5e-3),
    ("cpu", torch.float16): BARS_16_BIT,
    ("cpu", torch.bfloat16): BARS_16_BIT,
    ("cpu", torch.float32): Bars(o=1e-4, gradient=1e-3, hard_gradient=2e-3),
    ("cpu", torch.float64): Bars(o=1e-9, gradient=1e-8, hard_gradient=1e-6),
}


CUDA_KERNELS_ON = {"cuda"}  # and the CPU with --emulated


def dtypes(device: str) -> list[torch.dtype]:
    return [dtype for kind, dtype in BARS if kind == device]


class Regime(NamedTuple):
    decay: tuple[float, float]  # range of exp(g)
    lamb: float  # centre of a range of a factor of 4
    correlation: float  # weight of the direction that all keys share
    linear_values: bool  # values are a noisy linear map of the keys: in-context regression


REGIMES = {
    "random": Regime((0.9, 0.999), 0.25, 0.0, False),
    "no decay": Regime((1.0, 1.0), 0.25, 0.0, False),
    "strong decay": Regime((0.01, 0.01), 0.25, 0.0, False),
    "small lamb": Regime((0.95, 1.0), 0.02, 0.0, False),
    "corr .5, Wk": Regime((1.0, 1.0), 0.25, 0.5, True),
    "corr .9, decay, Wk": Regime((0.99, 1.0), 0.25, 0.9, True),
    "corr .9": Regime((1.0, 1.0), 0.2, 0.9, False),
    "corr .9, Wk": Regime((1.0, 1.0), 0.2, 0.9, True),
}


@dataclass
class Inputs:
    """Arguments of mesa_attention; float64 holds the same numbers as the narrower dtype they were rounded to."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor
    lamb: Tensor
    initial_state: MesaState | None = None
    cu_seqlens: Tensor | None = None

    def tokens(self) -> tuple[Tensor, ...]:
        return self.q, self.k, self.v, self.g, self.beta

    def call(self, function: Callable, **options):
        keywords = {"initial_state": self.initial_state, "cu_seqlens": self.cu_seqlens} | options
        return function(*self.tokens(), self.lamb, **keywords)

    def map(self, change: Callable[[Tensor], Tensor]) -> Inputs:
        """Every floating tensor changed."""
        state = None if self.initial_state is None else MesaState(*map(change, self.initial_state))
        return Inputs(*map(change, (*self.tokens(), self.lamb)), state, self.cu_seqlens)

    def part(self, start: int, end: int, initial_state: MesaState | None = None) -> Inputs:
        return Inputs(*(a[:, start:end] for a in self.tokens()), self.lamb, initial_state)

    def sequences(self) -> list[Inputs]:
        """The packed sequences one by one."""
        bounds = self.cu_seqlens.tolist()
        return [
            self.part(a, b, self.initial_state and MesaState(*(h[n : n + 1] for h in self.initial_state)))
            for n, (a, b) in enumerate(zip(bounds, bounds[1:]))
        ]

    def condition(self) -> float:
        """Median condition number over tokens and heads."""
        runs = [self] if self.cu_seqlens is None else self.sequences()
        kappa = [
            mesa_condition(r.k, r.g, r.beta, r.lamb, initial_state=r.initial_state, stride=8).flatten() for r in runs
        ]
        kappa = torch.cat(kappa)
        return kappa.median().item() if kappa.numel() else 1.0


def draw(
    regime: str,
    device: str,
    dtype: torch.dtype,
    *,
    seed: int = 0,
    B: int = 1,
    T: int = 130,
    heads: int | tuple[int, int, int] = 2,
    K: int = 128,
    V: int = 128,
    context: int = 0,
    lengths: list[int] | None = None,
) -> Inputs:
    """Inputs of a regime with (HQ, HK, HS) heads, after `context` earlier tokens, packed if `lengths` are given."""
    decay, lamb, correlation, linear_values = REGIMES[regime]
    HQ, HK, HS = (heads,) * 3 if isinstance(heads, int) else heads
    N, (B, T) = (len(lengths), (1, sum(lengths))) if lengths is not None else (B, (B, T))
    generator = torch.Generator(device).manual_seed(seed)
    wide = {"device": device, "dtype": torch.float64}

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, **wide)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator, **wide)

    shared = normalize(randn(HK, K), dim=-1)
    linear_map = randn(HS, K, V) / math.sqrt(K)

    def memories(batch: int, count: int) -> tuple[Tensor, ...]:
        k = normalize(correlation * shared + (1 - correlation) * normalize(randn(batch, count, HK, K), dim=-1), dim=-1)
        v = randn(batch, count, HS, V)
        if linear_values:
            v = torch.einsum("bthk,hkv->bthv", k.repeat_interleave(HS // HK, 2), linear_map) + 0.01 * v
        return k, v, uniform(*decay, batch, count, HS).log(), uniform(0.5, 1.0, batch, count, HS)

    state = None
    if context:
        k, v, g, beta = memories(N, context)
        k = k.repeat_interleave(HS // HK, 2)
        weighted = k * (beta * (g.flip(1).cumsum(1).flip(1) - g).exp()).unsqueeze(-1)
        state = MesaState(torch.einsum("bthk,bthl->bhkl", weighted, k), torch.einsum("bthk,bthv->bhkv", weighted, v))
    k, v, g, beta = memories(B, T)
    q = normalize(randn(B, T, HQ, K), dim=-1)
    inputs = Inputs(q, k, v, g, beta, lamb * uniform(-1.0, 1.0, HS, K).exp2(), state)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    inputs = inputs.map(lambda a: a.to(compute))
    if lengths is not None:
        inputs.cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0)
    return replace(inputs, **{name: getattr(inputs, name).to(dtype) for name in ("q", "k", "v")})


def uneven(inputs: Inputs, columns: slice, size: float) -> Inputs:
    """Some columns of the keys times `size`, and of the system what makes them count as much as the others."""
    scale = torch.ones(inputs.k.shape[-1], device=inputs.k.device, dtype=inputs.lamb.dtype)
    scale[columns] = size
    h_kk, h_kv = inputs.initial_state
    state = MesaState(h_kk * scale * scale[:, None], h_kv * scale[:, None])
    lamb = inputs.lamb * scale**2 if size else inputs.lamb
    return replace(inputs, k=inputs.k * scale.to(inputs.k.dtype), lamb=lamb, initial_state=state)


def output_gradients(inputs: Inputs, *, scale: float = 1.0, seed: int = 1, state: bool = False) -> tuple[Tensor, ...]:
    """Gradients of o (in its dtype) and, if wanted, of the final state's two tensors."""
    generator = torch.Generator(inputs.q.device).manual_seed(seed)

    def randn(dtype: torch.dtype, *shape: int) -> Tensor:
        return (scale * torch.randn(shape, generator=generator, device=inputs.q.device)).to(dtype)

    B, T, HQ, K = inputs.q.shape
    HS, V = inputs.v.shape[2:]
    do = randn(inputs.q.dtype, B, T, max(HQ, HS), V)
    if not state:
        return (do,)
    n = B if inputs.cu_seqlens is None else len(inputs.cu_seqlens) - 1
    return do, randn(inputs.g.dtype, n, HS, K, K), randn(inputs.g.dtype, n, HS, K, V)


def evaluate(
    function: Callable, inputs: Inputs, gradients: tuple[Tensor, ...] = (), *, wide: bool = False, **options
) -> dict[str, Tensor]:
    """o, the final state and (given output gradients) every gradient of `function`, by name.

    With `wide`, for the reference: in float64, on the very numbers that the narrower inputs hold.
    """
    if wide:
        inputs, gradients = inputs.map(Tensor.double), tuple(d.double() for d in gradients)
    inputs = inputs.map(lambda a: a.detach().requires_grad_(bool(gradients)))
    o, state = inputs.call(function, **options)[:2]
    results = {"o": o} if state is None else {"o": o, "h_kk": state.h_kk, "h_kv": state.h_kv}
    if gradients:
        leaves = dict(q=inputs.q, k=inputs.k, v=inputs.v, g=inputs.g, beta=inputs.beta, lamb=inputs.lamb)
        if inputs.initial_state is not None:
            leaves |= inputs.initial_state._asdict()
        # Without tokens the reference's o depends on nothing.
        pairs = [(y, dy) for y, dy in zip(results.values(), gradients) if y.requires_grad]
        ys, dys = zip(*pairs) if pairs else ([inputs.q.sum()], [inputs.q.new_zeros(())])
        grads = torch.autograd.grad(ys, list(leaves.values()), dys, materialize_grads=True)
        results |= {f"d{name}": grad for name, grad in zip(leaves, grads)}
    return {name: tensor.detach() for name, tensor in results.items()}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """|actual - expected| / |expected|, norms over the whole tensor; NaN (which passes no bar) if anything is NaN."""
    assert actual.shape == expected.shape, f"shape {list(actual.shape)} instead of {list(expected.shape)}"
    expected = expected.double()
    scale = expected.abs().max().item() if expected.numel() else 0.0
    if scale == 0.0:
        return math.inf if actual.double().abs().sum().item() > 0 else actual.double().sum().item()
    # Scaled first: squares of gradients of 1e-200 or 1e200 are no numbers.
    return ((actual.double() - expected) / scale).norm().item() / (expected / scale).norm().item()


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], bar: float | Callable[[str], float]) -> None:
    """Every tensor within its bar; names all that are not. NaN never passes."""
    assert actual.keys() == expected.keys()
    errors = {name: relative_error(actual[name], expected[name]) for name in expected}
    bars = {name: bar(name) if callable(bar) else bar for name in expected}
    wrong = {name: f"{error:.2e} > {bars[name]:.0e}" for name, error in errors.items() if not error <= bars[name]}
    assert not wrong, wrong


def assert_bitwise(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Every tensor equal bit for bit; NaN never passes."""
    assert actual.keys() == expected.keys()
    wrong = [name for name in expected if not torch.equal(actual[name], expected[name])]
    assert not wrong, {name: f"relative error {relative_error(actual[name], expected[name]):.2e}" for name in wrong}


def bar_for(inputs: Inputs, kappa: float | None = None, device: str | None = None) -> Callable[[str], float]:
    """The bar of each tensor for these inputs, on their device or as if on another."""
    bars = BARS[device or inputs.q.device.type, inputs.q.dtype]
    kappa = inputs.condition() if kappa is None else kappa
    gradient = bars.gradient if kappa < MILD else bars.hard_gradient
    return lambda name: gradient if name.startswith("d") else bars.o


def bar_for_gates(inputs: Inputs, expected: dict[str, Tensor], do: Tensor) -> Callable[[str], float]:
    """The bars where inputs are drawn at will: as bar_for, but for what cancels, gradients of gates before all.

    With 16-bit inputs the CUDA solver rounds the weights by which the tokens of a chunk meet to 11 bits, so x and w are
    off by as much, which averages out in sums over many tokens. The gradient of one gate, x (do.v - w.k), may cancel,
    in a few tokens or a few columns: there the bar is twice what such errors of x and w do to it, and of fewer than 16
    numbers, where chance has more room, eight times. (In 1200 draws in the emulator 56 of 2100 so small tensors were
    past the plain bar, up to 1.5e-1, and the worst took 0.6 of this one. Of 2576 larger ones 6 were, and of 2912 at
    width 1 30, one of them at 2.4e-2; the worst took 0.4 of this one.)

    What a token's own key adds to its x cancels by up to the condition, and its errors with it. Of texts of fewer than
    16 tokens no bar but the states' is less than 11 bits times that, or 3e-2 (seen: o 1.3e-2, dk 1.1e-2, one token,
    lamb .02).
    """
    plain = bar_for(inputs)
    if inputs.q.device.type not in CUDA_KERNELS_ON or inputs.q.dtype.itemsize > 2:
        return plain
    tokens = inputs.q.shape[1] if inputs.cu_seqlens is None else inputs.cu_seqlens.diff().max().item()
    least = min(2**-11 * inputs.condition(), 3e-2) if 0 < tokens < 16 else 0.0
    gates = [name for name in ("dg", "dbeta") if name in expected and expected[name].norm() > 0]
    floors = _gate_floors(inputs, do) if gates else {}
    gate_bars = {
        name: (8 if expected[name].numel() < 16 else 2) * floors[name] / expected[name].norm().item() for name in gates
    }

    def bar(name: str) -> float:
        return plain(name) if name.startswith("h_") else max(plain(name), least, gate_bars.get(name, 0.0))

    return bar


def _gate_floors(inputs: Inputs, do: Tensor, draws: int = 8) -> dict[str, float]:
    """How far dg and dbeta move (norms, root mean squares of several draws) when x and w are off by 11 bits."""
    if inputs.cu_seqlens is not None:
        bounds = inputs.cu_seqlens.tolist()
        parts = [_gate_floors(r, do[:, a:b], draws) for r, a, b in zip(inputs.sequences(), bounds, bounds[1:]) if a < b]
        return {name: math.hypot(*(part[name] for part in parts)) for name in ("dg", "dbeta")}
    exact, do = inputs.map(Tensor.double), do.double()
    g, beta = exact.g.requires_grad_(), exact.beta.requires_grad_()
    states = mesa_states(exact.k, exact.v, g, beta, initial_state=exact.initial_state)
    H, G = (h.repeat_interleave(do.shape[2] // h.shape[2], 2) for h in states)
    system = (H + exact.lamb.diag_embed().repeat_interleave(do.shape[2] // len(exact.lamb), 0)).detach()
    q = exact.q.repeat_interleave(do.shape[2] // exact.q.shape[2], 2)
    x, w = (torch.linalg.solve(system, b.unsqueeze(-1)) for b in (q, (G.detach() @ do.unsqueeze(-1)).squeeze(-1)))
    generator = torch.Generator(q.device).manual_seed(2)

    def gradients(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:  # of the gates, given both solutions
        y = (x * (G @ do.unsqueeze(-1) - H @ w)).sum()
        return torch.autograd.grad(y, (g, beta), retain_graph=True)

    def rounded(a: Tensor) -> Tensor:
        return a * (1 + 2**-11 * torch.randn(a.shape, generator=generator, device=a.device, dtype=a.dtype))

    still, moved = gradients(x, w), [gradients(rounded(x), rounded(w)) for _ in range(draws)]
    rms = (math.hypot(*((m[i] - still[i]).norm().item() for m in moved)) / draws**0.5 for i in range(2))
    return dict(zip(("dg", "dbeta"), rms))


def assert_accurate(inputs: Inputs, actual: dict[str, Tensor], gradients: tuple[Tensor, ...] = ()) -> None:
    """Every tensor of `actual` (some of those of evaluate) within its bar."""
    expected = evaluate(mesa_reference, inputs, gradients, wide=True)
    assert_close(actual, {name: expected[name] for name in actual}, bar_for(inputs))


def solver_steps(dtype: torch.dtype) -> int:
    """Enough steps for the default tolerance in every regime; 16-bit keeps the default number."""
    return 256 if dtype in (torch.float32, torch.float64) else 30
