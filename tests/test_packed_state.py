"""The packed layout of the symmetric h_kk: conversions, decode steps, whole calls."""

import re

import pytest
import torch

from mesa_ext import MesaState, mesa_attention, mesa_decode_step
from mesa_ext.reference import mesa_reference
from tests.regimes import (
    BARS,
    REGIMES,
    assert_bitwise,
    assert_close,
    draw,
    dtypes,
    evaluate,
    output_gradients,
    solver_steps,
)
from tests.test_decode import assert_accurate, copy

WIDTHS = [1, 2, 15, 16, 17, 33, 64, 100, 128]


def symmetric(inputs):
    """The inputs with an initial h_kk that is symmetric to the last bit."""
    inputs.initial_state = copy(inputs.initial_state.packed().full())
    return inputs


@pytest.mark.parametrize("K", WIDTHS)
def test_conversions(device, K):
    h = torch.randn(2, 3, K, K, device=device)
    state = MesaState(h + h.mT, torch.randn(2, 3, K, 5, device=device))
    packed = state.packed()
    rows = (K + 15) // 16
    assert packed.h_kk.shape == (2, 3, rows * (rows + 1) // 2, 16, 16) and packed.is_packed and not state.is_packed
    assert packed.h_kk.is_contiguous()
    assert torch.equal(packed.full().h_kk, state.h_kk) and packed.h_kv is state.h_kv is packed.full().h_kv
    assert packed.full().h_kk.is_contiguous() and packed.packed() is packed and state.full() is state
    # Where a number lies: in row i and column j >= i of the tiles.
    for a, b in [(0, 0), (0, K - 1), (K // 2, K - 1), (K - 1, K - 1)]:
        i, j = a // 16, b // 16
        tile = sum(rows - r for r in range(i)) + j - i
        assert torch.equal(packed.h_kk[:, :, tile, a % 16, b % 16], state.h_kk[:, :, a, b])
    # Every number once (or as two mirrored ones of a diagonal tile), and zeros beside them.
    assert packed.h_kk.count_nonzero() == 6 * sum((K - 16 * i) * min(16, K - 16 * i) for i in range(rows))
    zeros = MesaState.zeros(2, 3, K, 5, device=device, packed=True)
    assert zeros.h_kk.shape == packed.h_kk.shape and not zeros.h_kk.any() and zeros.h_kv.shape == state.h_kv.shape


def test_conversions_of_states_along_the_way(device):
    h = torch.randn(2, 4, 3, 20, 20, device=device)
    state = MesaState(h + h.mT, torch.randn(2, 4, 3, 20, 5, device=device))
    assert not state.is_packed and state.packed().h_kk.shape == (2, 4, 3, 3, 16, 16)
    assert torch.equal(state.packed().full().h_kk, state.h_kk)


@pytest.mark.parametrize("K", [1, 16, 37, 100, 128])
@pytest.mark.parametrize("V", [5, 64])
@pytest.mark.parametrize("rows", [None, [5, -1, 3, 0]], ids=str)
def test_a_step_is_that_of_the_full_state(device, K, V, rows):
    """Bit for bit on CUDA; the CPU's full h_kk is symmetric only up to rounding."""
    for dtype in dtypes(device):
        inputs = symmetric(draw("random", device, dtype, B=4, T=1, heads=(4, 1, 2), K=K, V=V, context=50))
        full = copy(inputs.initial_state)
        indices = None
        if rows is not None:
            full = MesaState(*(torch.cat((h, h[:3])) for h in full))
            indices = torch.tensor(rows, device=device)
        packed, start = copy(full.packed()), copy(full.packed())
        token = [a[:, 0] for a in inputs.tokens()]
        options = {"state_indices": indices, "max_cg_iterations": solver_steps(dtype)}
        expected = mesa_decode_step(*token, inputs.lamb, full, **options)
        o = mesa_decode_step(*token, inputs.lamb, packed, **options)
        results, wanted = {"o": o, **packed._asdict()}, {"o": expected, **full.packed()._asdict()}
        if device == "cuda":
            assert_bitwise(results, wanted)
        assert_close(results, wanted, 1e-5 if dtype.itemsize > 2 else BARS[device, dtype].o)
        if rows is not None:  # no other row has been touched
            others = [row for row in range(7) if row not in rows]
            assert torch.equal(packed.h_kk[others], start.h_kk[others]) and not o[1].any()


@pytest.mark.parametrize("regime", REGIMES)
def test_every_regime(device, regime):
    for dtype in dtypes(device):
        inputs = symmetric(draw(regime, device, dtype, B=8, T=1, context=4096))
        state = copy(inputs.initial_state.packed())
        token = [a[:, 0] for a in inputs.tokens()]
        o = mesa_decode_step(*token, inputs.lamb, state, max_cg_iterations=solver_steps(dtype))
        assert_accurate(inputs, o, state.full())


def test_many_steps(device):
    inputs = symmetric(draw("random", device, torch.float32, B=2, T=300, K=40, V=24, context=50))
    state = copy(inputs.initial_state.packed())
    o = [
        mesa_decode_step(*(a[:, t] for a in inputs.tokens()), inputs.lamb, state, max_cg_iterations=256)
        for t in range(300)
    ]
    expected, end = inputs.map(torch.Tensor.double).call(mesa_reference)
    results = {"o": torch.stack(o, 1), **state.full()._asdict()}
    assert_close(results, {"o": expected, **end._asdict()}, BARS[device, torch.float32].o)


@pytest.mark.parametrize("T", [0, 5, 70])
def test_whole_calls(device, T):
    """What comes back is packed, too, and everything is what it is with the full state, gradients included."""
    for dtype in dtypes(device):
        inputs = symmetric(draw("random", device, dtype, B=2, T=T, heads=(4, 1, 2), K=40, V=24, context=50))
        start = inputs.initial_state.packed()
        counts = torch.tensor([[0, T], [T // 2, T]], device=device)
        for options in ({}, {"state_at": counts}):
            options |= {"output_final_state": True}
            o, state = mesa_attention(*inputs.tokens(), inputs.lamb, initial_state=start, **options)
            expected, full = inputs.call(mesa_attention, **options)
            assert state.is_packed and torch.equal(o, expected) and torch.equal(state.h_kv, full.h_kv)
            assert torch.equal(state.h_kk, full.packed().h_kk)

        do, dkk, dkv = output_gradients(inputs, state=True)
        dkk = dkk + dkk.mT

        def through_packed(*tensors, initial_state, cu_seqlens):
            o, end = mesa_attention(*tensors, initial_state=initial_state.packed(), output_final_state=True)
            return o, end.full()

        def through_full(*tensors, initial_state, cu_seqlens):
            h_kk = initial_state.packed().full().h_kk  # the same numbers of h_kk count
            start = MesaState(h_kk, initial_state.h_kv)
            o, end = mesa_attention(*tensors, initial_state=start, output_final_state=True)
            return o, end.packed().full()

        gradients = do, dkk, dkv
        assert_bitwise(evaluate(through_packed, inputs, gradients), evaluate(through_full, inputs, gradients))


def test_compile_and_opcheck(device):
    inputs = symmetric(draw("random", device, torch.float32, B=2, T=1, K=20, V=5, context=10))
    token = [a[:, 0] for a in inputs.tokens()]
    states = [copy(inputs.initial_state.packed()) for _ in range(3)]
    compiled = torch.compile(mesa_decode_step, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        outputs = [f(*token, inputs.lamb, s) for f, s in zip((mesa_decode_step, compiled), states)]
    assert torch.equal(*outputs) and torch.equal(states[0].h_kk, states[1].h_kk)
    arguments = *token, inputs.lamb, *states[2], None, 30, 1e-3, torch.empty_like(outputs[0])
    torch.library.opcheck(torch.ops.mesa_ext.decode_step.default, arguments)

    attention = torch.compile(mesa_attention, fullgraph=True, backend="aot_eager")
    packed = inputs.initial_state.packed()
    results = [
        f(*inputs.tokens(), inputs.lamb, initial_state=packed, output_final_state=True)
        for f in (mesa_attention, attention)
    ]
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1].h_kk, results[1][1].h_kk)


def test_errors(device):
    inputs = draw("random", device, torch.float32, B=2, T=1, K=20, V=5, context=10)
    good = copy(inputs.initial_state.packed())
    token = [a[:, 0] for a in inputs.tokens()]
    transposed = torch.empty(3, 2, 2, 16, 16, device=device).transpose(0, 2)
    wrong = {
        r"\[2, 2, 1, 16, 16\]": good.h_kk[:, :, :1],
        r"\[2, 2, 3, 8, 16\]": good.h_kk[..., :8, :],
        r"\[1, 2, 3, 16, 16\]": good.h_kk[:1],
    }
    for pattern, h_kk in wrong.items():
        for call in (
            lambda state: mesa_decode_step(*token, inputs.lamb, state),
            lambda state: mesa_attention(*inputs.tokens(), inputs.lamb, initial_state=state),
        ):
            with pytest.raises(ValueError, match=r"h_kk must have shape .*2, 3, 16, 16\].*got " + pattern):
                call(MesaState(h_kk, good.h_kv))
    for pattern, h_kk in {"h_kk must be contiguous": transposed, "h_kk must be float32": good.h_kk.double()}.items():
        with pytest.raises((ValueError, TypeError), match=pattern):
            mesa_decode_step(*token, inputs.lamb, MesaState(h_kk, good.h_kv))
    with pytest.raises(ValueError, match=re.escape("packed h_kk must have shape [2, 2, 3, 16, 16]")):
        MesaState(good.h_kk[:, :1], good.h_kv).full()
    assert all(torch.equal(a, b) for a, b in zip(good, inputs.initial_state.packed()))


@pytest.mark.gpu
def test_cuda_graph():
    inputs = symmetric(draw("random", "cuda", torch.bfloat16, B=4, T=1, K=64, V=32, context=10))
    token = [a[:, 0] for a in inputs.tokens()]
    state, other = copy(inputs.initial_state.packed()), copy(inputs.initial_state.packed())
    mesa_decode_step(*token, inputs.lamb, state)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = mesa_decode_step(*token, inputs.lamb, state)
    for h, start in zip(state, other):
        h.copy_(start)
    graph.replay()
    assert torch.equal(o, mesa_decode_step(*token, inputs.lamb, other))
    assert torch.equal(state.h_kk, other.h_kk) and torch.equal(state.h_kv, other.h_kv)
