"""The operators for CUDA, kernels and glue, on CPU tensors and the emulator, against the CPU's in float64.

MESA_EXT_EMULATED names the library, which CMake builds where there are CUDA's headers (target mesa_ext_emulated, with
-DTORCH_PYTHON=...); `.ci/run` does. Without it these tests skip themselves.
"""

import os

import pytest
import torch

from mesa_ext import MesaState, mesa_attention
from tests import regimes
from tests.regimes import (
    REGIMES,
    assert_close,
    draw,
    dtypes,
    evaluate,
    output_gradients,
    solver_steps,
)
from tests.test_decode import assert_accurate, copy

LIBRARY = os.environ.get("MESA_EXT_EMULATED")
pytestmark = pytest.mark.skipif(not LIBRARY, reason="needs MESA_EXT_EMULATED, the library")

NAMES = ("o", "x", "kept", "h_kk", "h_kv", "steps", "bound")
SHAPES = [
    dict(heads=(4, 1, 2), K=128, V=128, context=20, T=70),
    dict(heads=(1, 1, 3), K=100, V=36, lengths=[65, 0, 3], context=10),
    dict(heads=2, K=20, V=90, B=2, T=66),
    dict(heads=2, K=122, V=126, context=10, T=70),  # w lies where dk and dv will
]


@pytest.fixture(scope="module")
def operators():
    torch.ops.load_library(LIBRARY)
    return torch.ops.mesa_ext_emulated


@pytest.fixture(params=["hopper", "portable"])
def kernels(request, monkeypatch):
    monkeypatch.setenv("MESA_EXT_KERNELS", request.param)


def arguments(inputs):
    return *inputs.tokens(), inputs.lamb, *(inputs.initial_state or (None, None)), inputs.cu_seqlens


def bar_for(inputs):
    return regimes.bar_for(inputs, device="cuda")


def exact(inputs, gradients=(), **options):
    """The CPU's results in float64, of the very numbers that the narrower inputs hold."""
    return evaluate(mesa_attention, inputs, gradients, wide=True, max_cg_iterations=300, cg_tol=1e-13, **options)


def check(operators, inputs, gradients):
    """Values, and gradients for these of the outputs."""
    dtype = inputs.q.dtype
    solver = solver_steps(dtype), 1e-5 if dtype == torch.float32 else 1e-3
    result = dict(zip(NAMES, operators.chunk_forward(*arguments(inputs), *solver), strict=True))
    do, dh_kk, dh_kv = gradients if len(gradients) == 3 else (*gradients, None, None)
    grads = operators.chunk_backward(do, dh_kk, dh_kv, *arguments(inputs), result["x"], result["kept"], *solver)
    expected = exact(inputs, gradients, output_final_state=True)
    names = [name for name in expected if name.startswith("d")]
    actual = {name: result[name] for name in ("o", "h_kk", "h_kv")} | dict(zip(names, grads, strict=True))
    assert_close(actual, expected, bar_for(inputs))
    assert 0 < result["steps"].min() and (result["bound"].max() <= solver[1] or result["steps"].max() == solver[0])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", dtypes("cuda"), ids=str)
def test_values_and_gradients(operators, kernels, dtype, shape):
    inputs = draw("random", "cpu", dtype, **shape)
    check(operators, inputs, output_gradients(inputs, state=True))


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e4])
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("dtype", dtypes("cuda"), ids=str)
def test_every_regime(operators, kernels, dtype, regime, scale):
    if dtype == torch.float16 and scale != 1:
        pytest.skip("float16 does not hold such gradients or their results")
    inputs = draw(regime, "cpu", dtype, heads=1, T=70, context=4096)
    check(operators, inputs, output_gradients(inputs, scale=scale))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype, regime", [(torch.bfloat16, "random"), (torch.float32, "corr .9, Wk")], ids=str)
def test_groups_of_heads_change_nothing(operators, kernels, monkeypatch, dtype, shape, regime):
    """The same bits with one group of heads and with as many as there are; in float32 of rows to be refined, too.

    And in bf16 with states that are kept for the backward pass (all together, then; the adjoints in groups), which
    leaves them as they are.
    """
    inputs = draw(regime, "cpu", dtype, **shape | dict(context=3000 if regime != "random" else 10))
    results = []
    gradients = output_gradients(inputs, state=True)
    variants = [("1024", False), ("0", False), ("0", True)]
    for memory, keep_states in variants if dtype == torch.bfloat16 else variants[:2]:
        monkeypatch.setenv("MESA_EXT_STATE_MEMORY", memory)
        solver = solver_steps(dtype), 1e-5
        o, x, kept, *rest = operators.chunk_forward(*arguments(inputs), *solver, keep_states=keep_states)
        assert (kept.numel() > 0) == keep_states
        before = kept.clone()
        grads = operators.chunk_backward(*gradients, *arguments(inputs), x, kept, *solver)
        assert kept.equal(before)
        results.append([o, x, *rest, *grads])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_states_kept_for_the_backward_pass_change_nothing(operators, kernels):
    """The state before the second 4096 tokens: without it the backward pass makes the same once more."""
    inputs = draw("random", "cpu", torch.bfloat16, T=4100, heads=1, K=8, V=8)
    inputs.g.mul_(0.01)
    x, kept = operators.chunk_forward(*arguments(inputs), 30, 1e-3)[1:3]
    gradients = output_gradients(inputs, state=True)

    def backward(kept):
        return operators.chunk_backward(*gradients, *arguments(inputs), x, kept, 30, 1e-3)

    grads = backward(kept)
    assert all(torch.equal(a, b) for a, b in zip(grads, backward(kept[:0, 0, 0]), strict=True))
    assert not torch.equal(grads[0], backward(2 * kept)[0])  # they are what it starts from


def test_bad_memory(operators, monkeypatch):
    monkeypatch.setenv("MESA_EXT_STATE_MEMORY", "1 GB")
    with pytest.raises(RuntimeError, match="MESA_EXT_STATE_MEMORY.*1 GB"):
        operators.chunk_forward(*arguments(draw("random", "cpu", torch.bfloat16, T=9, K=8, V=8)), 30, 1e-3)


@pytest.mark.parametrize("wanted", [(True, False, True), (True, True, False), (False, False, False)], ids=str)
def test_only_what_is_wanted_is_made(operators, wanted):
    inputs = draw("random", "cpu", torch.bfloat16, T=70, K=24, V=16, context=10)
    o, x, kept, h_kk, h_kv, steps, bound = operators.chunk_forward(*arguments(inputs), 30, 1e-3)
    expected = [o] + [x, kept] * wanted[0] + [h_kk, h_kv] * wanted[1] + [steps, bound] * wanted[2]
    results = operators.chunk_forward(*arguments(inputs), 30, 1e-3, *wanted)
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def step(operators, inputs, state, rows):
    """o of a single token, and the state that was updated in place."""
    token = *(a[:, 0] for a in inputs.tokens()), inputs.lamb
    batch, q_heads, _ = token[0].shape
    _, heads, V = token[2].shape
    o = token[2].new_full((batch, max(q_heads, heads), V), torch.nan)
    operators.decode_step(*token, *state, rows, solver_steps(inputs.q.dtype), 1e-6, o)
    return {"o": o, **state._asdict()}


@pytest.mark.parametrize("K, V", [(128, 128), (64, 40), (32, 64), (16, 100)])
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("dtype", dtypes("cuda"), ids=str)
def test_decode(operators, dtype, regime, K, V):
    inputs = draw(regime, "cpu", dtype, T=1, heads=(4, 1, 2), K=K, V=V, context=4096)
    result = step(operators, inputs, copy(inputs.initial_state), None)
    assert_accurate(inputs, result["o"], MesaState(result["h_kk"], result["h_kv"]), device="cuda")


@pytest.mark.parametrize("K, V", [(128, 128), (64, 40), (32, 64), (16, 100)])
@pytest.mark.parametrize("dtype", dtypes("cuda"), ids=str)
def test_decode_packed_and_from_a_pool(operators, dtype, K, V):
    """The bits of the full states in order; a skipped sequence gets zeros, and no other row is touched."""
    inputs = draw("random", "cpu", dtype, B=4, T=1, heads=(4, 1, 2), K=K, V=V, context=50)
    upper = inputs.initial_state.h_kk.triu()
    start = MesaState(upper + upper.triu(1).mT, inputs.initial_state.h_kv)
    expected = step(operators, inputs, copy(start), None)
    expected["o"][1] = 0
    for packed in (False, True):
        states = start.packed() if packed else start
        pool = MesaState(*(torch.cat((h, h))[[3, 4, 0, 7, 2, 4]] for h in states))
        before = copy(pool)
        result = step(operators, inputs, pool, torch.tensor([2, -1, 4, 0]))
        assert torch.equal(result["o"], expected["o"])
        after = MesaState(expected["h_kk"], expected["h_kv"])
        for h, h_before, h_after in zip(pool, before, after.packed() if packed else after):
            assert torch.equal(h[[2, 4, 0]], h_after[[0, 2, 3]]) and torch.equal(h[[1, 3, 5]], h_before[[1, 3, 5]])


@pytest.mark.parametrize("T", [5, 9])
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("dtype", dtypes("cuda"), ids=str)
def test_piece_and_states_along_the_way(operators, dtype, regime, T):
    """By the decode kernel and by those for chunks."""
    inputs = draw(regime, "cpu", dtype, B=2, T=T, heads=(4, 1, 2), K=48, V=40, context=500)
    counts = torch.tensor([[0, T, 2], [4, 1, 1]])
    solver = solver_steps(dtype), 1e-5
    results = operators.chunk_forward(*arguments(inputs), *solver, False, True, False, state_at=counts)
    names = ("o", "h_kk", "h_kv")
    assert_close(
        dict(zip(names, results, strict=True)), exact(inputs, output_final_state=True, state_at=counts), bar_for(inputs)
    )
    last = operators.chunk_forward(*arguments(inputs), *solver, False, True, False)
    assert_close(dict(zip(names, last, strict=True)), exact(inputs, output_final_state=True), bar_for(inputs))
