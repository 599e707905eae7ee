"""Where naive code divides by zero, overflows, reads past an end or forgets to write."""

import pytest
import torch

from mesa_ext import MesaState, mesa_attention, mesa_decode_step
from mesa_ext.reference import mesa_reference
from tests.regimes import (
    BARS,
    Inputs,
    assert_accurate,
    assert_bitwise,
    assert_close,
    bar_for,
    draw,
    dtypes,
    evaluate,
    output_gradients,
    relative_error,
    solver_steps,
    uneven,
)


def compare(inputs, *, state=True, **draws):
    gradients = output_gradients(inputs, state=state, **draws)
    steps = solver_steps(inputs.q.dtype)
    ours = evaluate(mesa_attention, inputs, gradients, output_final_state=True, max_cg_iterations=steps)
    assert_accurate(inputs, ours, gradients)
    return ours


@pytest.fixture(scope="module", params=[torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def dtype(request, device):
    if request.param not in dtypes(device):
        pytest.skip("no float64 on CUDA")
    return request.param


def test_no_tokens(device, dtype):
    inputs = draw("random", device, dtype, B=2, T=0, K=16, V=8, context=20)
    results = compare(inputs)
    assert_bitwise({"h": results["h_kk"]}, {"h": inputs.initial_state.h_kk})
    o, state = inputs.call(mesa_attention, initial_state=None, output_final_state=True)
    assert o.shape == (2, 0, 2, 8) and not state.h_kk.any() and not state.h_kv.any()


def test_no_batch(device, dtype):
    inputs = draw("random", device, dtype, B=0, T=5, K=16, V=8)
    o, state = inputs.map(lambda a: a.requires_grad_()).call(mesa_attention, output_final_state=True)
    assert o.shape == (0, 5, 2, 8) and state.h_kk.shape == (0, 2, 16, 16)
    o.sum().backward()


@pytest.mark.parametrize("lengths", [[0], [0, 0, 0], [0, 5, 0, 0, 64, 0]], ids=str)
def test_empty_sequences(device, dtype, lengths):
    inputs = draw("random", device, dtype, K=16, V=8, context=20, lengths=lengths)
    results = compare(inputs)
    for n, length in enumerate(lengths):
        if length == 0:
            for name in ("h_kk", "h_kv"):
                assert torch.equal(results[name][n], getattr(inputs.initial_state, name)[n])


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("place", ["cpu", "device"])
def test_where_cu_seqlens_live(device, place, index_dtype):
    inputs = draw("random", device, torch.float32, K=16, V=8, lengths=[5, 0, 70])
    expected = inputs.call(mesa_attention)[0]
    inputs.cu_seqlens = inputs.cu_seqlens.to("cpu" if place == "cpu" else device, index_dtype)
    assert torch.equal(inputs.call(mesa_attention)[0], expected)


@pytest.mark.gpu
def test_wrong_cu_seqlens_on_the_device_stay_inside_the_tensors():
    """Unspecified numbers, but no access outside: for compute-sanitizer, and for what stands behind the tensors."""
    for bounds in ([0, 1000, 70], [-50, 30, 70], [0, 60, 20, 70], [5, 30, 60], [0, 2**40, -(2**40), 70]):
        inputs = draw("random", "cuda", torch.float32, K=16, V=8, T=70)
        inputs.cu_seqlens = torch.tensor(bounds, device="cuda")
        inputs = inputs.map(lambda a: a.requires_grad_())
        o, state = inputs.call(mesa_attention, output_final_state=True)
        (o.sum() + state.h_kk.sum()).backward()
        torch.cuda.synchronize()


@pytest.mark.parametrize("size", [1, 2**-10])
@pytest.mark.parametrize("name", ["k", "v", "beta", "q"])
def test_zeros(device, dtype, name, size):
    """All zero, and zero in half of the tokens, beside keys and values of any size."""
    for half in (False, True):
        inputs = draw("random", device, dtype, T=70, K=16, V=8)
        inputs.k *= size
        inputs.v *= size
        inputs.lamb *= size**2
        getattr(inputs, name)[:, 20:50 if half else None].zero_()
        if not half:
            getattr(inputs, name).zero_()
        results = compare(inputs)
        if not half:
            assert not results["o"].any()
    if name == "q":
        *_, info = inputs.call(mesa_attention, return_solver_info=True)
        assert (info.steps[:, 20:50] == 0).all() and (info.error_bound[:, 20:50] == 0).all()


@pytest.mark.parametrize("size", [0, 2**-6])
@pytest.mark.parametrize("columns", [slice(0, 64), slice(64, None)], ids=str)
def test_halves_of_the_keys_of_different_sizes(device, dtype, columns, size):
    """On CUDA the tiles of H have scales of their own, of which the solver makes one."""
    inputs = uneven(draw("random", device, dtype, T=150, K=100, V=16, context=10), columns, size)
    for a in (inputs.beta, inputs.lamb, *inputs.initial_state):
        a *= 1e9
    compare(inputs, state=False)


@pytest.mark.parametrize("size", [1e-9, 1e-4, 1e9])
def test_any_size_of_the_system(device, dtype, size):
    """x is as much larger as the system is smaller; and where the output has no gradient."""
    inputs = draw("random", device, dtype, T=150, K=16, V=16, context=10)
    for a in (inputs.beta, inputs.lamb, *inputs.initial_state):
        a *= size
    (do,) = output_gradients(inputs)
    do[..., :8] = do[:, 20:50] = 0
    results = evaluate(mesa_attention, inputs, (do,), max_cg_iterations=solver_steps(dtype))
    assert_accurate(inputs, results, (do,))


def test_a_reset_forgets_everything(device, dtype):
    inputs = draw("random", device, dtype, T=150, K=16, V=8, context=50)
    for position in (0, 37, 64, 100, 101):
        inputs.g[:, position] = -torch.inf
    results = compare(inputs)
    assert not results["dg"][:, [0, 37, 64, 100, 101]].any()
    assert not results["dh_kk"].any() and not results["dh_kv"].any()
    fresh = inputs.part(64, 100).call(mesa_attention)[0]
    assert_close({"o": results["o"][:, 64:100]}, {"o": fresh}, BARS[device, dtype].o)


def test_gates_gradients_before_a_reset(device, dtype):
    """Small ones, over many chunks, are not lost in large ones behind the reset."""
    T, reset = 1100, 700
    inputs = draw("random", device, dtype, T=T, K=16, V=8, context=50)
    inputs.g[:, reset] = -torch.inf
    (do,) = output_gradients(inputs)
    do[:, :reset] *= 1e-3
    do[:, reset:] *= 1e3
    ours = evaluate(mesa_attention, inputs, (do,), max_cg_iterations=solver_steps(dtype))["dg"]
    expected = evaluate(mesa_reference, inputs, (do,), wide=True)["dg"]
    for part in (slice(0, reset), slice(reset + 1, T)):
        assert relative_error(ours[:, part], expected[:, part]) <= BARS[device, dtype].gradient


@pytest.mark.parametrize("g", [-5.0, -14.0, -60.0])
def test_a_strong_decay_within_a_chunk(device, dtype, g):
    """On CUDA the solver's rows before and behind it may be in different units, the state's or their own."""
    inputs = draw("random", device, dtype, T=150, K=100, V=70, context=50)
    inputs.g[:, 100] = g
    compare(inputs)


@pytest.mark.parametrize("g", [-1e-7, -0.15, -0.25, -1.0, -20.0, -100.0, -1e4])
def test_any_decay(device, dtype, g):
    """exp(g) from nearly 1 to below the smallest number; products of it are never formed apart."""
    inputs = draw("random", device, dtype, T=130, K=16, V=8, context=50)
    inputs.g.fill_(g)
    gradients = output_gradients(inputs)
    ours = evaluate(mesa_attention, inputs, gradients, output_final_state=True, max_cg_iterations=solver_steps(dtype))
    expected = evaluate(mesa_reference, inputs, gradients, wide=True)
    if g < -50:  # gradients in proportion to exp(g) are then no normal numbers of float32
        for name in ("dg", "dh_kk", "dh_kv"):
            assert ours.pop(name).abs().max() <= 1e-36 and expected.pop(name).abs().max() <= 1e-36
    assert_close(ours, expected, bar_for(inputs))


def test_no_decay_over_32k_tokens(device):
    T = 2**15
    inputs = draw("no decay", device, torch.float32, T=T, heads=1, K=8, V=4)
    o, state, info = inputs.call(mesa_attention, output_final_state=True, return_solver_info=True)
    expected, expected_state = inputs.map(torch.Tensor.double).call(mesa_reference)
    expected = {"o": expected, **expected_state._asdict()}
    assert_close({"o": o, **state._asdict()}, expected, BARS[device, torch.float32].o)
    assert info.steps.max() < 30


def test_repeated_tokens(device, dtype):
    """Identical keys: a matrix of rank one plus lamb, and gradients that nearly cancel."""
    inputs = draw("no decay", device, dtype, T=150, K=16, V=8)
    inputs = Inputs(*(a[:, :1].expand_as(a) for a in inputs.tokens()), inputs.lamb)
    gradients = output_gradients(inputs)
    ours = evaluate(mesa_attention, inputs, gradients, output_final_state=True, max_cg_iterations=solver_steps(dtype))
    expected = evaluate(mesa_reference, inputs, gradients, wide=True)
    if dtype != torch.float64:
        # o = G'x cancels by a factor of |G| |x| / |o| = 3000 here: rounding x to float32 alone puts o off by 2e-4. What
        # is left of the gradients of the gates after both solves cancel (1e-3 of dq) is below float32's reach.
        assert relative_error(ours.pop("o"), expected.pop("o")) <= max(BARS[device, dtype].o, 1e-3)
        for name in ("dg", "dbeta"):
            assert (ours.pop(name) - expected.pop(name)).norm() <= 1e-3 * expected["dq"].norm()
    assert_close(ours, expected, bar_for(inputs))


@pytest.mark.parametrize("lamb", [1e-3, 1e-1, 1e3])
def test_any_lamb(device, dtype, lamb):
    inputs = draw("no decay", device, dtype, T=150, K=16, V=8, context=64)
    inputs.lamb.fill_(lamb)
    compare(inputs, state=False)


def test_lamb_over_six_decades(device):
    inputs = draw("no decay", device, torch.float32, T=150, K=16, V=8, context=64)
    inputs.lamb.copy_(torch.logspace(-3, 3, 16).expand(2, 16))
    compare(inputs, state=False)


@pytest.mark.parametrize("scale", [1e-30, 1e-15, 1e15, 1e30])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_any_size_of_queries(device, dtype, scale):
    inputs = draw("random", device, dtype, T=70, K=16, V=8, context=20)
    inputs.q = (inputs.q.double() * scale).to(dtype)
    o, _ = inputs.call(mesa_attention)
    expected, _ = inputs.map(torch.Tensor.double).call(mesa_reference)
    assert relative_error(o, expected) <= BARS[device, dtype].o


def test_queries_of_very_different_size(device):
    """Each row is solved in its own scale, tiny rows beside huge ones."""
    inputs = draw("random", device, torch.float32, T=70, K=16, V=8, context=20)
    inputs.q = inputs.q * torch.logspace(-30, 30, 70, device=device).view(1, 70, 1, 1)
    o, _ = inputs.call(mesa_attention)
    expected, _ = inputs.map(torch.Tensor.double).call(mesa_reference)
    error = (o - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert error.max() <= BARS[device, torch.float32].o


@pytest.mark.parametrize("K, V", [(1, 1), (1, 128), (128, 1), (3, 5), (63, 65), (64, 64), (65, 63), (127, 128)])
def test_any_width(device, K, V):
    for dtype in dtypes(device):
        compare(draw("random", device, dtype, T=67, heads=1, K=K, V=V, context=40))


def test_wide_heads_on_the_cpu():
    compare(draw("random", "cpu", torch.float32, T=67, heads=1, K=150, V=140, context=40))


@pytest.mark.parametrize("T", [1, 2, 63, 64, 65, 127, 128, 129, 192])
def test_any_length(device, T):
    for dtype in dtypes(device):
        compare(draw("random", device, dtype, B=2, T=T, heads=(2, 1, 2), K=16, V=8, context=40))


@pytest.mark.parametrize("heads", [(8, 8, 8), (8, 2, 2), (8, 1, 2), (2, 2, 8), (1, 1, 8), (2, 4, 8)], ids=str)
def test_grouped_heads(device, heads):
    for dtype in dtypes(device):
        compare(draw("random", device, dtype, B=2, T=70, heads=heads, K=16, V=8, context=40))


def test_results_are_fresh_tensors(device):
    """The initial state is not written, and nothing returned shares its memory: decode steps write in place."""
    for T in (0, 5):
        inputs = draw("random", device, torch.float32, T=T, K=16, V=8, context=20)
        before = [h.clone() for h in inputs.initial_state]
        _, state = inputs.call(mesa_attention, output_final_state=True)
        token = draw("random", device, torch.float32, T=1, K=16, V=8)
        mesa_decode_step(*(a[:, 0] for a in token.tokens()), token.lamb, state)
        assert all(torch.equal(h, b) for h, b in zip(inputs.initial_state, before))


def test_a_state_with_any_strides(device):
    inputs = draw("random", device, torch.float32, T=70, K=16, V=8, context=20)
    expected = inputs.call(mesa_attention)[0]
    state = MesaState(inputs.initial_state.h_kk.mT, inputs.initial_state.h_kv.mT.contiguous().mT)
    assert relative_error(inputs.call(mesa_attention, initial_state=state)[0], expected) <= 1e-6


@pytest.mark.gpu
def test_heads_further_apart_than_the_kernels_count():
    if torch.cuda.mem_get_info()[0] < 10 << 30:
        pytest.skip("2^31 elements take 4 GiB")
    inputs = draw("random", "cuda", torch.bfloat16, B=1, T=100, K=16, V=8)
    storage = torch.empty(2**31 + inputs.q.numel(), dtype=torch.bfloat16, device="cuda")
    far = storage.as_strided(inputs.q.shape, (0, 16, 2**31, 1)).copy_(inputs.q)
    moved = inputs.map(lambda a: far if a is inputs.q else a)
    assert moved.q.stride(2) == 2**31
    for tokens in (100, 1):  # the kernels for chunks, and for single tokens
        (o, _), (expected, _) = (x.part(0, tokens).call(mesa_attention) for x in (moved, inputs))
        assert torch.equal(o, expected)
