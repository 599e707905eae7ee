"""Short pieces of text on top of a state, and states along the way for rolling back."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mesa_ext import MesaState, mesa_attention, mesa_decode_step
from mesa_ext.reference import mesa_states
from tests.regimes import (
    BARS,
    REGIMES,
    Inputs,
    assert_bitwise,
    assert_close,
    draw,
    dtypes,
    evaluate,
    output_gradients,
    solver_steps,
)
from tests.test_decode import assert_accurate


def attend(inputs, **options):
    options = {"output_final_state": True, "max_cg_iterations": solver_steps(inputs.q.dtype)} | options
    return evaluate(mesa_attention, inputs, **options)


def every_count(inputs):
    """0, 1, .. T for every sequence."""
    return torch.arange(inputs.q.shape[1] + 1, device=inputs.q.device).expand(len(inputs.q), -1)


def reference_states(inputs, counts):
    """The states after `counts` [N, M] tokens in float64, from the reference's states after every token."""
    runs = [inputs] if inputs.cu_seqlens is None else inputs.sequences()
    kept = {"h_kk": [], "h_kv": []}
    for n, run in enumerate(runs):
        states = mesa_states(run.k, run.v, run.g, run.beta, initial_state=run.initial_state)
        start = run.initial_state or MesaState(*(torch.zeros_like(h[:, 0]) for h in states))
        rows = counts if inputs.cu_seqlens is None else counts[n : n + 1]
        for name, first, others in zip(kept, start, states):
            all_states = torch.cat((first.double().unsqueeze(1), others), 1)
            kept[name].append(torch.stack([all_states[b, row] for b, row in enumerate(rows)]))
    return {name: torch.cat(parts) for name, parts in kept.items()}


@given(data=st.data())
def test_against_the_reference(device, data):
    dtype = data.draw(st.sampled_from(dtypes(device)))
    inputs = draw(
        data.draw(st.sampled_from(list(REGIMES))),
        device,
        dtype,
        seed=data.draw(st.integers(0, 2**31)),
        B=data.draw(st.integers(1, 3)),
        T=data.draw(st.integers(1, 17)),
        heads=data.draw(st.sampled_from([(1, 1, 1), (3, 3, 3), (4, 1, 2), (1, 1, 3), (6, 1, 1)])),
        K=data.draw(st.sampled_from([1, 3, 16, 33, 64, 127, 128])),
        V=data.draw(st.sampled_from([1, 5, 16, 33, 64, 127, 128])),
        context=data.draw(st.sampled_from([0, 1, 100, 2000])),
    )
    # A single short read-out may cancel to less than the solver's tolerance, which is therefore finer than the default.
    options = {"cg_tol": {2: 1e-5, 4: 1e-7, 8: None}[dtype.itemsize], "max_cg_iterations": 256}
    results = attend(inputs, **options)
    assert_accurate(inputs, results["o"], MesaState(results["h_kk"], results["h_kv"]))
    counts = every_count(inputs)
    bar = BARS[device, dtype].o
    along = attend(inputs, state_at=counts, **options)
    assert_bitwise({"o": along.pop("o")}, {"o": results["o"]})
    assert_close(along, reference_states(inputs, counts), bar)


@pytest.mark.parametrize("T", [1, 2, 4, 8, 9, 16])
@pytest.mark.parametrize("regime", REGIMES)
def test_every_regime_at_the_default_tolerance(device, regime, T):
    for dtype in dtypes(device):
        inputs = draw(regime, device, dtype, B=2, T=T, context=4096)
        results = attend(inputs)
        assert_accurate(inputs, results["o"], MesaState(results["h_kk"], results["h_kv"]))
        counts = every_count(inputs)[:, [0, T // 2, T]]
        along = attend(inputs, state_at=counts)
        assert_bitwise({"o": along.pop("o")}, {"o": results["o"]})
        assert_close(along, reference_states(inputs, counts), BARS[device, dtype].o)


def test_a_piece_is_so_many_decode_steps(device):
    """On CUDA bit for bit with 16-bit inputs; there the states along the way are those of the steps in float32, too."""
    for dtype in dtypes(device):
        inputs = draw("corr .5, Wk", device, dtype, B=3, T=7, heads=(4, 1, 2), K=48, V=40, context=100)
        options = {"max_cg_iterations": solver_steps(dtype)}
        state = MesaState(*(h.clone() for h in inputs.initial_state))
        states, o = [[h.clone() for h in state]], []
        for t in range(7):
            o.append(mesa_decode_step(*(a[:, t] for a in inputs.tokens()), inputs.lamb, state, **options))
            states.append([h.clone() for h in state])
        steps = {"o": torch.stack(o, 1), "h_kk": state.h_kk, "h_kv": state.h_kv}
        along = {name: torch.stack(h, 1) for name, h in zip(("h_kk", "h_kv"), zip(*states))}
        whole, result = attend(inputs), attend(inputs, state_at=every_count(inputs))
        result.pop("o")
        if device == "cuda":
            assert_bitwise(result, along)
        if device == "cuda" and dtype.itemsize == 2:
            assert_bitwise(whole, steps)
        assert_close(whole, steps, BARS[device, dtype].o)
        assert_close(result, along, BARS[device, dtype].o)


@pytest.mark.parametrize("lengths", [[5, 0, 9, 1], [200, 0, 63, 64, 65]], ids=str)
def test_states_of_packed_sequences(device, lengths):
    for dtype in dtypes(device):
        inputs = draw("random", device, dtype, lengths=lengths, heads=(4, 1, 2), K=24, V=40, context=30)
        ends = torch.tensor(lengths, device=device)
        counts = torch.stack((ends, ends // 2, 0 * ends, ends), 1)
        results, last = attend(inputs, state_at=counts), attend(inputs)
        assert_bitwise({"o": results.pop("o")}, {"o": last["o"]})
        assert_close(results, reference_states(inputs, counts), BARS[device, dtype].o)
        assert_close({n: h[:, 0] for n, h in results.items()}, {n: last[n] for n in results}, BARS[device, dtype].o)
        one = attend(inputs, state_at=(ends // 2).int())
        assert_bitwise({n: one[n] for n in results}, {n: h[:, 1] for n, h in results.items()})


@pytest.mark.parametrize("T", [1, 5, 300])
def test_states_without_a_start(device, T):
    for dtype in dtypes(device):
        inputs = draw("random", device, dtype, B=2, T=T, K=24, V=40)
        counts = torch.tensor([[0, T, T // 2, T // 2], [T, 0, 1, 0]], device=device)
        results = attend(inputs, state_at=counts)
        results.pop("o")
        assert_close(results, reference_states(inputs, counts), BARS[device, dtype].o)


def test_no_tokens_and_no_states(device):
    inputs = draw("random", device, torch.float32, B=2, T=0, K=16, V=8, context=20)
    o, state = inputs.call(mesa_attention, output_final_state=True, state_at=torch.zeros(2, 3, dtype=torch.long))
    assert o.shape == (2, 0, 2, 8)
    assert all(torch.equal(h, start.unsqueeze(1).expand_as(h)) for h, start in zip(state, inputs.initial_state))
    inputs = draw("random", device, torch.float32, B=2, T=3, K=16, V=8, context=20)
    _, state = inputs.call(mesa_attention, output_final_state=True, state_at=torch.zeros(2, 0, dtype=torch.long))
    assert state.h_kk.shape == (2, 0, 2, 16, 16) and state.h_kv.shape == (2, 0, 2, 16, 8)
    empty = draw("random", device, torch.float32, B=0, T=3, K=16, V=8)
    _, state = empty.call(mesa_attention, output_final_state=True, state_at=torch.zeros(0, 4, dtype=torch.long))
    assert state.h_kk.shape == (0, 4, 2, 16, 16)


def test_rolling_back_a_draft(device):
    """Of eight drafted tokens 0, 3 and 8 are accepted; the next piece goes on as if the others had never been."""
    for dtype in dtypes(device):
        inputs = draw("random", device, dtype, B=3, T=8, K=32, V=24, context=100)
        after = draw("random", device, dtype, B=3, T=4, K=32, V=24, seed=3)
        accepted = torch.tensor([0, 3, 8], device=device)
        options = {"output_final_state": True, "max_cg_iterations": solver_steps(dtype)}
        _, state = inputs.call(mesa_attention, state_at=accepted, **options)
        start = MesaState(*(h.clone() for h in state))
        o, _ = mesa_attention(*after.tokens(), inputs.lamb, initial_state=state, **options)
        assert all(torch.equal(a, b) for a, b in zip(state, start))
        for n, count in enumerate(accepted.tolist()):
            first = MesaState(*(h[n : n + 1] for h in inputs.initial_state))
            pairs = zip(inputs.tokens(), after.tokens())
            alone = Inputs(*(torch.cat((a[n : n + 1, :count], b[n : n + 1]), 1) for a, b in pairs), inputs.lamb, first)
            assert_close({"o": o[n : n + 1]}, {"o": attend(alone)["o"][:, count:]}, BARS[device, dtype].o)


@pytest.mark.parametrize("T", [1, 4, 16])
def test_a_sequence_does_not_see_its_batch(device, T):
    for dtype in dtypes(device):
        inputs = draw("random", device, dtype, B=5, T=T, heads=(4, 1, 2), K=32, V=24, context=50)
        counts = every_count(inputs)
        batch, along = attend(inputs), attend(inputs, state_at=counts)
        state = MesaState(*(h[3:4] for h in inputs.initial_state))
        one = Inputs(*(a[3:4] for a in inputs.tokens()), inputs.lamb, state)
        assert_bitwise(attend(one), {name: a[3:4] for name, a in batch.items()})
        assert_bitwise(attend(one, state_at=counts[3:4]), {name: a[3:4] for name, a in along.items()})


def test_a_later_token_alters_nothing(device):
    for dtype in dtypes(device):
        inputs = draw("random", device, dtype, B=2, T=9, K=32, V=24, context=50)
        clean = attend(inputs, state_at=every_count(inputs))
        for name in ("q", "k", "v", "g", "beta"):
            changed = inputs.map(torch.clone)
            getattr(changed, name)[1, 5] *= 3
            results = attend(changed, state_at=every_count(inputs))
            for n in results:
                same = 6 if n.startswith("h") else 5
                assert torch.equal(results[n][0], clean[n][0]) and torch.equal(results[n][1, :same], clean[n][1, :same])
            assert not torch.equal(results["o"][1, 5], clean["o"][1, 5])
            assert name == "q" or not torch.equal(results["h_kv"][1, 6], clean["h_kv"][1, 6])


def test_solver_info_of_a_piece(device):
    for dtype in dtypes(device):
        inputs = draw("small lamb", device, dtype, B=2, T=6, heads=(4, 1, 2), K=32, V=24, context=300)
        o, _, info = inputs.call(mesa_attention, return_solver_info=True, max_cg_iterations=256, cg_tol=1e-3)
        assert info.steps.shape == info.error_bound.shape == o.shape[:3] and info.steps.dtype == torch.int32
        assert (info.steps >= 1).all() and (info.steps < 256).all() and (info.error_bound <= 1e-3).all()
        _, _, info = inputs.call(mesa_attention, return_solver_info=True, max_cg_iterations=2)
        assert (info.steps == 2).all() and (info.error_bound > 1e-3).all()


def test_strided_rows(device):
    """Neither a transposed layout nor rows that are no multiple of 16 bytes apart change a bit."""
    for dtype in dtypes(device):
        inputs = draw("random", device, dtype, B=2, T=5, heads=2, K=16, V=24, context=20)
        expected = attend(inputs)
        heads_first = inputs.map(torch.clone)
        for name in ("q", "k", "v"):
            heads_first.__dict__[name] = getattr(inputs, name).transpose(1, 2).contiguous().transpose(1, 2)
        assert_bitwise(attend(heads_first), expected)
        odd = inputs.map(torch.clone)
        for name in ("q", "k", "v"):
            a = getattr(inputs, name)
            odd.__dict__[name] = torch.cat((a[..., :1], a), -1)[..., 1:]
        assert_bitwise(attend(odd), expected)


def test_no_gradient_through_states_along_the_way(device):
    inputs = draw("random", device, torch.float32, B=2, T=5, K=16, V=8, context=20)
    leaves = inputs.map(lambda a: a.requires_grad_())
    counts = torch.tensor([2, 5], device=device)
    o, state = leaves.call(mesa_attention, output_final_state=True, state_at=counts)
    with pytest.raises(RuntimeError, match="no gradient.*state_at"):
        (o.sum() + state.h_kv.sum()).backward()
    # That of o is what it is without.
    gradients = output_gradients(inputs)

    def outputs(*tensors, **options):
        return mesa_attention(*tensors, output_final_state=True, state_at=counts, **options)[0], None

    assert_bitwise(evaluate(outputs, inputs, gradients), evaluate(mesa_attention, inputs, gradients))


def test_state_at_errors(device):
    inputs = draw("random", device, torch.float32, B=2, T=5, K=16, V=8)

    def call(state_at, **options):
        return inputs.call(mesa_attention, **({"output_final_state": True, "state_at": state_at} | options))

    def raises(pattern, *args, **options):
        with pytest.raises((TypeError, ValueError), match=pattern):
            call(*args, **options)

    good = torch.tensor([1, 5], device=device)
    call(good)
    raises("state_at needs output_final_state=True", good, output_final_state=False)
    raises("state_at must be a torch.Tensor, got list", [1, 5])
    raises(r"state_at must be int32 or int64, got torch.float32", good.float())
    raises(r"state_at must have shape .*2 sequences, got \[3\]", torch.tensor([1, 2, 3], device=device))
    raises(r"state_at must have shape .*got \[2, 1, 1\]", good[:, None, None])
    raises(r"state_at must have shape .*got \[\]", good[0])
    beyond = torch.tensor([[-1, 3], [2, 6]], device=device)
    if device == "cpu":
        raises("state_at must lie between 0 and .* 5 for sequence 0, got -1", beyond)
        raises("state_at must lie between 0 and .* 5 for sequence 1, got 6", beyond.abs())
    else:
        for h, clamped in zip(call(beyond)[1], call(beyond.clamp(0, 5))[1]):
            assert torch.equal(h, clamped)
