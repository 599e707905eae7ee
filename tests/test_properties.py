"""What must hold whatever the numbers are: causality, independence, composition, linearity, honest error bounds."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mesa_ext import MesaState, mesa_attention, mesa_decode_step
from mesa_ext.reference import mesa_states
from tests.regimes import (
    BARS,
    REGIMES,
    Inputs,
    assert_accurate,
    assert_bitwise,
    assert_close,
    draw,
    dtypes,
    evaluate,
    output_gradients,
    solver_steps,
)

TOKEN_RESULTS = ("o", "dq", "dk", "dv", "dg", "dbeta")


def attend(inputs, gradients=(), **options):
    return evaluate(mesa_attention, inputs, gradients, output_final_state=True, **options)


def full(inputs, **options):
    """The raw operator: o, x, kept, h_kk, h_kv, steps, bound."""
    state = inputs.initial_state or (None, None)
    options = {"max_cg_iterations": 30, "cg_tol": 1e-3} | options
    names = ("o", "x", "kept", "h_kk", "h_kv", "steps", "bound")
    results = torch.ops.mesa_ext.chunk_forward(
        *inputs.tokens(), inputs.lamb, *state, inputs.cu_seqlens, *options.values()
    )
    return dict(zip(names, results))


def same_bar(inputs):
    """How near two of our own ways to one result must be: no further than each may be from the truth."""
    bars = BARS[inputs.q.device.type, inputs.q.dtype]
    return lambda name: bars.gradient if name.startswith("d") else bars.o


@pytest.mark.parametrize("start", [1, 31, 32, 33, 63, 64, 65, 130])
def test_causality(device, start):
    """A change at a token alters nothing before it, bit for bit: not even the number of solver steps."""
    for dtype in dtypes(device):
        inputs = draw("random", device, dtype, T=150, K=32, V=16, context=50)
        other = draw("corr .9", device, dtype, T=150, K=32, V=16, seed=2)
        changed = Inputs(
            *(torch.cat((a[:, :start], b[:, start:]), 1) for a, b in zip(inputs.tokens(), other.tokens())),
            inputs.lamb,
            inputs.initial_state,
        )
        tokens = ("o", "x", "steps", "bound")
        before, after = full(inputs), full(changed)
        assert_bitwise({n: after[n][:, :start] for n in tokens}, {n: before[n][:, :start] for n in tokens})
        assert not torch.equal(after["o"], before["o"])


@pytest.mark.parametrize("gate, value", [("g", -torch.inf), ("g", -40.0), ("beta", 1e20)], ids=str)
@pytest.mark.parametrize("token, K", [(1, 32), (20, 32), (32, 32), (63, 32), (40, 128)], ids=str)
def test_an_extreme_token_alters_nothing_before_it(device, token, K, gate, value):
    """The solvers have a quicker way for decays and weights that are not extreme, but choose it row by row."""
    for dtype in dtypes(device):
        inputs = draw("random", device, dtype, T=70, K=K, V=16, context=50)
        before = full(inputs)
        getattr(inputs, gate)[:, token] = value
        after = full(inputs)
        tokens = ("o", "x", "steps", "bound")
        assert_bitwise({n: after[n][:, :token] for n in tokens}, {n: before[n][:, :token] for n in tokens})
        assert not torch.equal(after["x"], before["x"])
        if gate == "g":  # such a beta makes systems that no dtype can solve
            assert after["o"].isfinite().all() and after["x"].isfinite().all()


@pytest.mark.parametrize("cuts", [[64], [1, 65], [37, 100, 129]], ids=str)
def test_pieces_with_carried_state_equal_one_call(device, cuts):
    for dtype in dtypes(device):
        inputs = draw("random", device, dtype, B=2, T=150, heads=(4, 1, 2), K=16, V=24, context=30)
        gradients = output_gradients(inputs, state=True)

        def in_pieces(q, k, v, g, beta, lamb, *, initial_state, cu_seqlens):
            outputs, state = [], initial_state
            for start, end in zip([0, *cuts], [*cuts, 150]):
                o, state = mesa_attention(
                    *(a[:, start:end] for a in (q, k, v, g, beta)),
                    lamb,
                    initial_state=state,
                    output_final_state=True,
                    max_cg_iterations=solver_steps(dtype),
                )
                outputs.append(o)
            return torch.cat(outputs, 1), state

        whole = attend(inputs, gradients, max_cg_iterations=solver_steps(dtype))
        assert_close(evaluate(in_pieces, inputs, gradients), whole, same_bar(inputs))


def test_packed_equals_separate(device):
    """Bit for bit, but for the gradient of lamb, which the sequences share."""
    for dtype in dtypes(device):
        inputs = draw("random", device, dtype, lengths=[70, 0, 1, 64, 130], K=16, V=24, context=30)
        do, *dstate = output_gradients(inputs, state=True)
        packed = attend(inputs, (do, *dstate))
        bounds = inputs.cu_seqlens.tolist()
        dlamb = 0
        for n, sequence in enumerate(inputs.sequences()):
            start, end = bounds[n], bounds[n + 1]
            alone = attend(sequence, (do[:, start:end], *(d[n : n + 1] for d in dstate)))
            part = {
                name: value[:, start:end] if name in TOKEN_RESULTS else value[n : n + 1]
                for name, value in packed.items()
                if name != "dlamb"
            }
            dlamb = dlamb + alone.pop("dlamb").double()
            assert_bitwise(part, alone)
        assert_close({"dlamb": packed["dlamb"]}, {"dlamb": dlamb}, 1e-5)


def test_rows_that_float32_is_not_enough_for(device):
    """What is done again in float64 depends on nothing else either, bit for bit; NaN stays in its sequence."""
    size = {"lengths": [70, 0, 1, 64, 130], "heads": (4, 1, 2), "K": 40, "V": 24, "context": 2000}
    inputs = draw("corr .9, Wk", device, torch.float32, **size)
    options = {"max_cg_iterations": 256, "cg_tol": 1e-5}
    packed = full(inputs, **options)
    bounds = inputs.cu_seqlens.tolist()
    for n, sequence in enumerate(inputs.sequences()):
        start, end = bounds[n], bounds[n + 1]
        for length in {min(length, end - start) for length in (1, 65, 130)} - {0}:
            alone = full(sequence.part(0, length, sequence.initial_state), **options)
            assert_bitwise(
                {name: packed[name][:, start : start + length] for name in ("o", "x", "steps")},
                {name: alone[name] for name in ("o", "x", "steps")},
            )
    inputs.v[:, 30] = torch.nan
    spoiled = full(inputs, **options)["o"]
    assert spoiled[:, 30 : bounds[1]].isnan().all()
    assert torch.equal(spoiled[:, bounds[1] :], packed["o"][:, bounds[1] :])


@pytest.mark.gpu
def test_packed_equals_separate_beyond_a_segment():
    """Long sequences are cut into segments, at tokens that must not depend on what else is packed."""
    for dtype in dtypes("cuda"):
        inputs = draw("random", "cuda", dtype, lengths=[4100, 0, 8300, 70, 4096], heads=1, K=16, V=24, context=30)
        inputs.g.mul_(0.01)  # so that a segment's start still matters at its end
        do, *dstate = output_gradients(inputs, state=True)
        packed = attend(inputs, (do, *dstate))
        bounds = inputs.cu_seqlens.tolist()
        for n, sequence in enumerate(inputs.sequences()):
            start, end = bounds[n], bounds[n + 1]
            gradients = (do[:, start:end], *(d[n : n + 1] for d in dstate))
            alone = attend(sequence, gradients)
            alone.pop("dlamb")
            part = {name: packed[name][:, start:end] if name in TOKEN_RESULTS else packed[name][n : n + 1] for name in alone}
            assert_bitwise(part, alone)
            if n == 2:
                assert_accurate(sequence, alone, gradients)


@pytest.mark.gpu
@pytest.mark.parametrize("K", [16, 128])
def test_a_batch_that_fills_the_card_changes_nothing(K):
    """Then a sequence's two segments are worked on one after the other; alone they are worked on beside each other."""
    B, T, heads = 1024 // K, 4200, 2 if K == 16 else 4
    for dtype in dtypes("cuda"):
        inputs = draw("random", "cuda", dtype, B=B, T=T, heads=heads, K=K, V=K)
        inputs.g.mul_(0.01)  # so that a segment's start still matters at its end
        (do,) = output_gradients(inputs)
        batch = attend(inputs, (do,))
        for n in (0, B - 1):
            sequence = Inputs(*(a[n : n + 1] for a in inputs.tokens()), inputs.lamb)
            alone = attend(sequence, (do[n : n + 1],))
            alone.pop("dlamb")  # of all sequences together
            assert_bitwise({name: batch[name][n : n + 1] for name in alone}, alone)
        if K == 16:
            assert_accurate(sequence, alone, (do[n : n + 1],))


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [None, [70, 0, 4200, 8000]], ids=["batch", "packed"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_states_kept_for_the_backward_pass_change_nothing(dtype, lengths):
    """Those before every 4096 tokens: without them the backward pass makes the same once more."""
    inputs = draw("random", "cuda", dtype, B=3, T=9000, heads=(4, 1, 2), K=32, V=72, lengths=lengths, context=10)
    inputs.g.mul_(0.01)  # so that a start still matters at the end
    solution = full(inputs)
    kept = solution["kept"]
    assert kept.shape[:2] == ((9, 2) if lengths is None else (6, 2))

    def backward(kept):
        tensors = *inputs.tokens(), inputs.lamb, *inputs.initial_state, inputs.cu_seqlens, solution["x"], kept
        grads = torch.ops.mesa_ext.chunk_backward(*output_gradients(inputs, state=True), *tensors, 30, 1e-3)
        return dict(enumerate(grads))

    grads = backward(kept)
    assert_bitwise(grads, backward(kept[:0, 0, 0]))
    assert not torch.equal(grads[0], backward(2 * kept)[0])  # they are what it starts from
    with pytest.raises(RuntimeError, match="kept must be empty or of shape"):
        backward(kept[1:])

    every = full(inputs, solution=True, final_state=True, solver_info=True, state_at=None, keep_states=True)
    states = every.pop("kept")
    assert_bitwise(every, {name: solution[name] for name in every})
    assert_bitwise(grads, backward(states))
    assert_bitwise(grads, backward(states))  # once more
    with pytest.raises(RuntimeError, match="kept must be .* bytes"):
        backward(states[16:])
    assert not torch.equal(grads[0], backward(states.zero_())[0])


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [None, [70, 0, 4200]], ids=["batch", "packed"])
@pytest.mark.parametrize("heads", [4, (4, 1, 2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_groups_of_heads_change_nothing(dtype, heads, lengths, monkeypatch):
    """With little memory for the states the heads are worked on in groups, and a group needs less memory.

    Nor do states that are kept for the backward pass, for a second one too.
    """
    inputs = draw("random", "cuda", dtype, B=2, T=700, heads=heads, K=128, V=64, context=10, lengths=lengths)
    gradients = output_gradients(inputs, state=True)
    results, peaks = [], []
    for memory in ("1024", "8", "0"):
        monkeypatch.setenv("MESA_EXT_STATE_MEMORY", memory)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results.append(attend(inputs, gradients))
        peaks.append(torch.cuda.max_memory_allocated() - before)
        assert_bitwise(attend(inputs, gradients, keep_states=True), results[0])
    assert_bitwise(results[1], results[0])
    assert_bitwise(results[2], results[0])
    assert peaks[2] < peaks[0]

    q = inputs.q.detach().requires_grad_()
    o, _ = replace(inputs, q=q).call(mesa_attention, keep_states=True)
    first, second = (torch.autograd.grad(o, q, gradients[0], retain_graph=True)[0] for _ in range(2))
    assert first.equal(second) and not first.isnan().any()


@pytest.mark.gpu
@pytest.mark.parametrize("regime", REGIMES)
def test_both_sets_of_kernels(regime, monkeypatch):
    """The portable ones and Hopper's are right, and agree about the number of steps to within the rounding of a bound."""
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("has only the portable kernels")
    for dtype in dtypes("cuda"):
        for K, V in ((128, 128), (64, 96), (40, 24)):
            inputs = draw(regime, "cuda", dtype, T=150, K=K, V=V, context=1024)
            gradients = output_gradients(inputs, state=True)
            steps = {}
            for kernels in ("portable", "hopper"):
                monkeypatch.setenv("MESA_EXT_KERNELS", kernels)
                results = attend(inputs, gradients, max_cg_iterations=solver_steps(dtype))
                assert_accurate(inputs, results, gradients)
                assert_bitwise(attend(inputs, gradients, max_cg_iterations=solver_steps(dtype)), results)
                steps[kernels] = full(inputs, max_cg_iterations=solver_steps(dtype))["steps"]
            assert (steps["portable"] - steps["hopper"]).abs().max() <= 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_prefill_and_decode_equal_one_call(device, dtype):
    if dtype not in dtypes(device):
        pytest.skip("no float64 on CUDA")
    inputs = draw("corr .5, Wk", device, dtype, B=3, T=80, heads=(4, 1, 2), K=32, V=24, context=30)
    options = {"max_cg_iterations": solver_steps(dtype)}
    whole = attend(inputs, **options)
    o, state = inputs.part(0, 67, inputs.initial_state).call(mesa_attention, output_final_state=True, **options)
    outputs = [o]
    for t in range(67, 80):
        o = mesa_decode_step(*(a[:, t] for a in inputs.tokens()), inputs.lamb, state, **options)
        outputs.append(o.unsqueeze(1))
    stepwise = {"o": torch.cat(outputs, 1), "h_kk": state.h_kk, "h_kv": state.h_kv}
    assert_close(stepwise, whole, BARS[device, dtype].o)


def test_linear_in_values(device):
    inputs = draw("corr .5, Wk", device, torch.float32, T=130, K=32, V=24)
    options = {"max_cg_iterations": 256}
    other = Inputs(inputs.q, inputs.k, torch.randn_like(inputs.v), inputs.g, inputs.beta, inputs.lamb)
    both = Inputs(inputs.q, inputs.k, inputs.v + other.v, inputs.g, inputs.beta, inputs.lamb)
    o = {"o": attend(inputs, **options)["o"] + attend(other, **options)["o"]}
    assert_close({"o": attend(both, **options)["o"]}, o, 1e-5)
    scaled = Inputs(inputs.q, inputs.k, 2.0**20 * inputs.v, inputs.g, inputs.beta, inputs.lamb)
    assert_bitwise({"o": attend(scaled)["o"]}, {"o": 2.0**20 * attend(inputs)["o"]})


@pytest.mark.parametrize("exponent", [-60, -20, 40])
def test_linear_in_output_gradients(device, exponent):
    """No constant hides in the solver: gradients scale with do bit for bit (here by powers of two)."""
    inputs = draw("corr .5, Wk", device, torch.float32, T=130, K=32, V=24, context=50)
    gradients = output_gradients(inputs, state=True)
    scaled = attend(inputs, tuple(2.0**exponent * d for d in gradients))
    expected = {
        name: 2.0**exponent * value if name.startswith("d") else value
        for name, value in attend(inputs, gradients).items()
    }
    assert_bitwise(scaled, expected)


def test_batch_and_heads_can_be_permuted(device):
    for dtype in dtypes(device):
        inputs = draw("random", device, dtype, B=3, T=70, heads=4, K=16, V=24, context=30)
        gradients = output_gradients(inputs, state=True)
        rows, heads = torch.tensor([2, 0, 1], device=device), torch.tensor([1, 3, 0, 2], device=device)

        def permuted(name, a):
            if name.endswith("lamb"):
                return a[heads]
            return a[rows][:, heads] if "h_" in name else a[rows][:, :, heads]

        changed = Inputs(
            **{n: permuted(n, getattr(inputs, n)) for n in ("q", "k", "v", "g", "beta", "lamb")},
            initial_state=MesaState(*(permuted("h_", h) for h in inputs.initial_state)),
        )
        do, *dstate = gradients
        results = attend(changed, (permuted("o", do), *(permuted("h_", d) for d in dstate)))
        expected = {name: permuted(name, value) for name, value in attend(inputs, gradients).items()}
        # The sum over the batch in dlamb is in another order.
        assert_close({"dlamb": results.pop("dlamb")}, {"dlamb": expected.pop("dlamb")}, 1e-5)
        assert_bitwise(results, expected)


def test_a_sequence_does_not_see_its_batch(device):
    for dtype in dtypes(device):
        inputs = draw("random", device, dtype, B=5, T=130, K=32, V=16, context=30)
        gradients = output_gradients(inputs, state=True)
        batch = attend(inputs, gradients)
        state = MesaState(*(h[3:4] for h in inputs.initial_state))
        one = Inputs(*(a[3:4] for a in inputs.tokens()), inputs.lamb, state)
        alone = attend(one, tuple(d[3:4] for d in gradients))
        names = [name for name in alone if name != "dlamb"]
        assert_bitwise({n: alone[n] for n in names}, {n: batch[n][3:4] for n in names})


@pytest.mark.parametrize("lengths", [None, [70, 0, 1, 64, 400]], ids=["one sequence", "packed"])
@pytest.mark.parametrize("heads", [1, (6, 1, 3)], ids=str)
def test_threads_change_nothing(heads, lengths):
    """Sequences are cut for the threads, so that the states before the cuts are summed in a pass of their own."""
    inputs = draw("corr .5, Wk", "cpu", torch.float32, T=400, heads=heads, K=40, V=24, context=30, lengths=lengths)
    gradients = output_gradients(inputs, state=True)
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3, 7):
            torch.set_num_threads(n)
            results.append(attend(inputs, gradients) | full(inputs))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert_bitwise(other, results[0])


@given(
    regime=st.sampled_from(list(REGIMES)),
    tolerance=st.sampled_from([1e-1, 1e-2, 1e-3, 1e-4, 1e-8]),
    iterations=st.sampled_from([1, 3, 10, 30, 200]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=20)
def test_the_error_bound_holds(device, regime, tolerance, iterations, seed):
    """The error in the Lambda norm is below `bound`, and below cg_tol wherever the solver stopped by itself."""
    dtype = torch.float32 if device == "cuda" or tolerance > 1e-6 and seed % 2 else torch.float64
    tolerance = max(tolerance, 1e-4) if dtype == torch.float32 else tolerance
    inputs = draw(regime, device, dtype, seed=seed, T=70, K=32, V=4, context=300)
    results = full(inputs, max_cg_iterations=iterations, cg_tol=tolerance)
    h_kk, _ = mesa_states(inputs.k, inputs.v, inputs.g, inputs.beta, initial_state=inputs.initial_state)
    lamb = inputs.lamb.double()
    exact = torch.linalg.solve(h_kk + lamb.diag_embed(), inputs.q.double().unsqueeze(-1)).squeeze(-1)

    def norm(x):
        return (lamb * x.square()).sum(-1).sqrt()

    error = norm(results["x"] - exact) / norm(results["x"].double())
    # Rounding, which no residual shows, comes on top: the arithmetic's precision times the condition's square root.
    rounding = torch.finfo(dtype).eps * 10 * inputs.condition() ** 0.5
    steps, bound = results["steps"], results["bound"]
    assert (error <= bound.double() * (1 + 1e-3) + rounding).all()
    stopped = steps < iterations
    assert (error[stopped] <= tolerance * (1 + 1e-3) + rounding).all()
    assert (bound[stopped] <= tolerance * (1 + 1e-3)).all()
    assert (steps >= 1).all() and (steps <= iterations).all()


def test_solver_info(device):
    inputs = draw("small lamb", device, torch.float32, T=130, K=32, V=4, context=300)
    o, state, info = inputs.call(mesa_attention, return_solver_info=True, max_cg_iterations=5)
    assert state is None and info.steps.dtype == torch.int32
    assert info.steps.shape == info.error_bound.shape == o.shape[:3]
    assert info.steps.max() == 5 and info.error_bound.max() > 1e-5
    _, _, info = inputs.call(mesa_attention, return_solver_info=True, max_cg_iterations=500)
    assert info.steps.max() < 500 and info.error_bound.max() <= 1e-5
    _, _, info = inputs.call(mesa_attention, return_solver_info=True, max_cg_iterations=7, cg_tol=0.0)
    assert (info.steps == 7).all()


def test_nan_stays_in_its_sequence_and_block(device):
    for dtype in dtypes(device):
        for position in (0, 100, 149):
            inputs = draw("random", device, dtype, B=3, T=150, K=16, V=24, context=20)
            gradients = output_gradients(inputs)
            clean = attend(inputs, gradients)
            for name in ("q", "k", "v", "g", "beta"):
                spoilt = inputs.map(torch.clone)
                getattr(spoilt, name)[1, position] = torch.nan
                results = attend(spoilt, gradients)
                others = [n for n in results if n != "dlamb"]
                for row in (0, 2):
                    assert_bitwise({n: results[n][row] for n in others}, {n: clean[n][row] for n in others})
                block = position // 64 * 64
                assert torch.equal(results["o"][1, :block], clean["o"][1, :block])
                assert results["o"][1, position].isnan().any(), name
                assert results["h_kv"][1].isnan().any() or name == "q", name


def test_nan_in_a_packed_sequence_stays_there(device):
    for dtype in dtypes(device):
        inputs = draw("random", device, dtype, lengths=[30, 40, 80], K=16, V=24, context=20)
        gradients = output_gradients(inputs)
        clean = attend(inputs, gradients)
        inputs.k[:, 50], inputs.v[:, 50] = torch.nan, torch.nan
        results = attend(inputs, gradients)
        for part in (slice(0, 30), slice(70, 150)):
            expected = {n: clean[n][:, part] for n in TOKEN_RESULTS}
            assert_bitwise({n: results[n][:, part] for n in TOKEN_RESULTS}, expected)
        for name in ("h_kk", "h_kv", "dh_kk", "dh_kv"):
            assert torch.equal(results[name][[0, 2]], clean[name][[0, 2]])
            assert name.startswith("d") or results[name][1].isnan().any()


def test_200_runs_are_bitwise_equal(device):
    size = dict(B=2, T=70, K=16, V=16) if device == "cpu" else dict(B=4, T=1000, heads=8)
    inputs = draw("corr .5, Wk", device, torch.bfloat16, **size)
    gradients = output_gradients(inputs, state=True)
    first = attend(inputs, gradients)
    for _ in range(199):
        assert_bitwise(attend(inputs, gradients), first)


def test_200_training_steps_do_not_leak(device):
    inputs = draw("random", device, torch.float32, B=2, T=130, K=16, V=16, context=10)
    weight = torch.eye(16, device=device, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=1e-3)

    def allocated():
        if device == "cuda":
            return torch.cuda.memory_allocated()
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * 4096

    for step in range(200):
        o, _ = mesa_attention(inputs.q @ weight, *inputs.tokens()[1:], inputs.lamb, initial_state=inputs.initial_state)
        optimizer.zero_grad()
        o.square().mean().backward()
        optimizer.step()
        if step == 50:
            before = allocated()
    # A leak of the smallest saved tensor (16 KiB) would show as 2.4 MiB; the C allocator's own noise is below.
    assert allocated() - before <= (0 if device == "cuda" else 2**21)
