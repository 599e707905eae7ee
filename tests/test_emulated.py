"""The operators for CUDA, kernels and glue, on CPU tensors and the emulator, against the CPU's in float64.

MESA_EXT_EMULATED names the library, which CMake builds where there are CUDA's headers (target mesa_ext_emulated, with
-DTORCH_PYTHON=...); `.ci/run` does. Without it these tests skip themselves.
"""

import os

import pytest
import torch

from mesa_ext import MesaState, mesa_attention, mesa_decode_step
from tests.regimes import (
    BARS,
    assert_bitwise,
    assert_close,
    bar_for,
    draw,
    dtypes,
    evaluate,
    output_gradients,
    solver_steps,
)

LIBRARY = os.environ.get("MESA_EXT_EMULATED")
pytestmark = pytest.mark.skipif(not LIBRARY, reason="needs MESA_EXT_EMULATED, the library")

NAMES = ("o", "x", "h_kk", "h_kv", "steps", "bound")
SHAPES = [
    dict(heads=(4, 1, 2), K=128, V=128, context=20, T=70),
    dict(heads=(1, 1, 3), K=100, V=36, lengths=[65, 0, 3], context=10),
    dict(heads=2, K=20, V=90, B=2, T=66),
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


def bars(inputs):
    """Those of CUDA."""
    cuda = BARS["cuda", inputs.q.dtype]
    assert bar_for(inputs)("dq") == BARS["cpu", inputs.q.dtype].gradient, "not a mild regime"
    return lambda name: cuda.gradient if name.startswith("d") else cuda.o


def exact(inputs, gradients=(), **options):
    """The CPU's results in float64, of the very numbers that the narrower inputs hold."""
    return evaluate(mesa_attention, inputs, gradients, wide=True, max_cg_iterations=300, cg_tol=1e-13, **options)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", dtypes("cuda"), ids=str)
def test_values_and_gradients(operators, kernels, dtype, shape):
    inputs = draw("random", "cpu", dtype, **shape)
    gradients = output_gradients(inputs, scale=1e-3, state=True)
    solver = solver_steps(dtype), 1e-5 if dtype == torch.float32 else 1e-3
    result = dict(zip(NAMES, operators.chunk_forward(*arguments(inputs), *solver), strict=True))
    grads = operators.chunk_backward(*gradients, *arguments(inputs), result["x"], *solver)
    expected = exact(inputs, gradients, output_final_state=True)
    names = [name for name in expected if name.startswith("d")]
    actual = {name: result[name] for name in ("o", "h_kk", "h_kv")} | dict(zip(names, grads, strict=True))
    assert_close(actual, expected, bars(inputs))
    assert 0 < result["steps"].min() and result["bound"].max() <= solver[1]


@pytest.mark.parametrize("wanted", [(True, False, True), (True, True, False), (False, False, False)], ids=str)
def test_only_what_is_wanted_is_made(operators, wanted):
    inputs = draw("random", "cpu", torch.bfloat16, T=70, K=24, V=16, context=10)
    o, x, h_kk, h_kv, steps, bound = operators.chunk_forward(*arguments(inputs), 30, 1e-3)
    expected = [o] + [x] * wanted[0] + [h_kk, h_kv] * wanted[1] + [steps, bound] * wanted[2]
    results = operators.chunk_forward(*arguments(inputs), 30, 1e-3, *wanted)
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@pytest.mark.parametrize("K, V", [(128, 128), (64, 40), (32, 64), (16, 100)])
@pytest.mark.parametrize("dtype", dtypes("cuda"), ids=str)
def test_decode(operators, dtype, K, V):
    """Full and packed, with rows of a pool: the same bits, and no other row touched."""
    inputs = draw("random", "cpu", dtype, B=4, T=1, heads=(4, 1, 2), K=K, V=V, context=50)
    inputs.initial_state = MesaState(*(torch.cat((h, h[:3])) for h in inputs.initial_state))
    rows = torch.tensor([5, -1, 3, 0])
    token = *(a[:, 0] for a in inputs.tokens()), inputs.lamb

    def step(state):
        o = token[2].new_full((4, 4, V), torch.nan)
        operators.decode_step(*token, *state, rows, solver_steps(dtype), 1e-6, o)
        return {"o": o, **state._asdict()}

    def copy(state, dtype=torch.float32):
        return MesaState(*(h.to(dtype, copy=True) for h in state))

    state = copy(inputs.initial_state)
    upper = state.h_kk.triu()
    state = MesaState(upper + upper.triu(1).mT, state.h_kv)
    wide = copy(state, torch.float64)
    packed = step(copy(state.packed()))
    actual = step(state)
    assert_bitwise(packed, actual | {"h_kk": state.packed().h_kk})
    o = mesa_decode_step(*(a.double() for a in token), wide, state_indices=rows, max_cg_iterations=300)
    assert_close(actual, {"o": o, **wide._asdict()}, BARS["cuda", dtype].o)
    assert not actual["o"][1].any()


@pytest.mark.parametrize("T", [5, 9])
@pytest.mark.parametrize("dtype", dtypes("cuda"), ids=str)
def test_piece_and_states_along_the_way(operators, dtype, T):
    """By the decode kernel and by those for chunks."""
    inputs = draw("random", "cpu", dtype, B=2, T=T, heads=(4, 1, 2), K=48, V=40, context=50)
    counts = torch.tensor([[0, T, 2], [4, 1, 1]])
    solver = solver_steps(dtype), 1e-5
    results = operators.chunk_forward(*arguments(inputs), *solver, False, True, False, state_at=counts)
    names = ("o", "h_kk", "h_kv")
    assert_close(
        dict(zip(names, results, strict=True)), exact(inputs, output_final_state=True, state_at=counts), bars(inputs)
    )
    last = operators.chunk_forward(*arguments(inputs), *solver, False, True, False)
    assert_close(dict(zip(names, last, strict=True)), exact(inputs, output_final_state=True), bars(inputs))
