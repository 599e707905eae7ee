"""Bad input raises an error that names the argument, what was expected and what came."""

import re

import pytest
import torch

import mesa_ext
from mesa_ext import MesaState, mesa_attention, mesa_decode_step

B, T, H, K, V = 2, 6, 2, 4, 3
ERRORS = (ValueError, TypeError, RuntimeError)


def arguments(device, tokens=(T,)):
    def full(*shape):
        return torch.full(shape, 0.5, device=device)

    return dict(
        q=full(B, *tokens, H, K),
        k=full(B, *tokens, H, K),
        v=full(B, *tokens, H, V),
        g=-full(B, *tokens, H),
        beta=full(B, *tokens, H),
        lamb=full(H, K),
    )


def state(device, n=B, heads=H, k=K, v=V, **options):
    return MesaState.zeros(n, heads, k, v, device=device, **options)


# What is changed, and what the message must tell.
BAD = {
    "q rank": (dict(q=lambda a: a[0]), r"q\b.*\[6, 2, 4\]"),
    "k rank": (dict(k=lambda a: a[0]), r"k\b.*\[6, 2, 4\]"),
    "v rank": (dict(v=lambda a: a[..., 0]), r"v\b.*\[2, 6, 2\]"),
    "g rank": (dict(g=lambda a: a.unsqueeze(-1)), r"g\b.*\[2, 6, 2, 1\]"),
    "lamb rank": (dict(lamb=lambda a: a[0]), r"lamb\b.*\[4\]"),
    "k width": (dict(k=lambda a: a[..., :3]), r"k\b.*\[2, 6, 2, 3\]"),
    "k tokens": (dict(k=lambda a: a[:, :5]), r"k\b.*\[2, 5, 2, 4\]"),
    "v tokens": (dict(v=lambda a: a[:, :5]), r"v\b.*\[2, 5, 2, 3\]"),
    "v batch": (dict(v=lambda a: a[:1]), r"v\b.*\[1, 6, 2, 3\]"),
    "g tokens": (dict(g=lambda a: a[:, :5]), r"g\b.*\[2, 5, 2\]"),
    "beta heads": (dict(beta=lambda a: a[..., :1]), r"beta\b.*\[2, 6, 1\]"),
    "lamb width": (dict(lamb=lambda a: a[:, :3]), r"lamb\b.*\[2, 3\]"),
    "heads of q": (dict(q=lambda a: a.repeat(1, 1, 2, 1)[:, :, :3]), r"heads of q.*3"),
    "heads of k": (dict(k=lambda a: a.repeat(1, 1, 2, 1)[:, :, :3]), r"k\b.*3"),
    "no heads": (dict(v=lambda a: a[:, :, :0]), r"v\b.*head"),
    "no width": (dict(q=lambda a: a[..., :0], k=lambda a: a[..., :0], lamb=lambda a: a[:, :0]), r"q\b.*width"),
    "k dtype": (dict(k=lambda a: a.bfloat16()), r"k\b.*(?i:bfloat16)"),
    "v dtype": (dict(v=lambda a: a.half()), r"v\b.*(?i:half|float16)"),
    "integer q": (dict(q=lambda a: a.long()), r"q\b.*int64"),
    "integer gate": (dict(beta=lambda a: a.long()), r"beta\b.*int64"),
    "complex q": (dict(q=lambda a: a.to(torch.complex64)), r"q\b.*complex64"),
    "no tensor": (dict(g=lambda a: 0.5), r"g\b.*float"),
    "sparse": (dict(lamb=lambda a: a.to_sparse()), r"lamb\b.*[Ss]parse|[Ss]parse"),
    "iterations 0": (dict(max_cg_iterations=0), r"max_cg_iterations\b.*0"),
    "iterations 1.5": (dict(max_cg_iterations=1.5), r"max_cg_iterations\b.*float"),
    "negative tolerance": (dict(cg_tol=-1e-3), r"cg_tol\b.*-0.001"),
    "NaN tolerance": (dict(cg_tol=float("nan")), r"cg_tol\b.*nan"),
}
BAD_STATES = {
    "rows": (dict(n=3), r"h_kk\b.*\[3, 2, 4, 4\]"),
    "heads": (dict(heads=1), r"h_kk\b.*\[2, 1, 4, 4\]"),
    "key width": (dict(k=5), r"h_kk\b.*\[2, 2, 5, 5\]"),
    "value width": (dict(v=5), r"h_kv\b.*\[2, 2, 4, 5\]"),
    "dtype": (dict(dtype=torch.float64), r"h_kk\b.*(?i:double|float64)"),
}
BAD_CU_SEQLENS = {
    "decreasing": ([0, 4, 2, T], r"cu_seqlens"),
    "late start": ([1, T], r"cu_seqlens must start at 0.*1"),
    "early end": ([0, T - 1], rf"cu_seqlens must.*end at T = {T}.*{T - 1}"),
    "late end": ([0, T + 1], rf"cu_seqlens must.*end at T = {T}.*{T + 1}"),
    "empty": ([], r"cu_seqlens"),
    "rank": ([[0, T]], r"cu_seqlens"),
    "dtype": ([0.0, float(T)], r"cu_seqlens\b.*float32"),
}


def changed(values, change):
    return values | {name: new(values[name]) if callable(new) else new for name, new in change.items()}


def raises(pattern, function, *args, **kwargs):
    with pytest.raises(ERRORS) as error:
        function(*args, **kwargs)
    assert re.search(pattern, str(error.value), re.DOTALL), str(error.value)


@pytest.mark.parametrize("case", BAD)
def test_attention_arguments(device, case):
    change, pattern = BAD[case]
    raises(pattern, mesa_attention, **changed(arguments(device), change))


@pytest.mark.parametrize("case", [case for case in BAD if "tokens" not in case and "rank" not in case])
def test_decode_arguments(device, case):
    change, pattern = BAD[case]
    change = {n: (lambda a, new=new: new(a.unsqueeze(1))) if callable(new) else new for n, new in change.items()}
    pattern = pattern.replace(", 6,", ",")
    values = changed(arguments(device, ()), {})
    for name, new in change.items():
        if not callable(new):
            values[name] = new
        elif name == "lamb":
            values[name] = BAD[case][0][name](values[name])
        else:
            result = new(values[name])
            values[name] = result.squeeze(1) if isinstance(result, torch.Tensor) else result
    before = state(device)
    h = MesaState(*(a.clone() for a in before))
    raises(pattern, mesa_decode_step, **values, state=h)
    assert all(torch.equal(a, b) for a, b in zip(h, before))


@pytest.mark.parametrize("case", BAD_STATES)
def test_states(device, case):
    options, pattern = BAD_STATES[case]
    raises(pattern, mesa_attention, **arguments(device), initial_state=state(device, **options))
    raises(pattern, mesa_decode_step, **arguments(device, ()), state=state(device, **options))


@pytest.mark.parametrize("wrong", [0, torch.zeros(3), (torch.zeros(3),), (torch.zeros(3), None)], ids=repr)
def test_things_that_are_no_state(device, wrong):
    raises("initial_state must be a MesaState", mesa_attention, **arguments(device), initial_state=wrong)
    raises("state must be a MesaState", mesa_decode_step, **arguments(device, ()), state=wrong)


@pytest.mark.parametrize("case", BAD_CU_SEQLENS)
def test_cu_seqlens_on_the_cpu(device, case):
    bounds, pattern = BAD_CU_SEQLENS[case]
    values = changed(arguments(device), {n: lambda a: a[:1] for n in ("q", "k", "v", "g", "beta")})
    dtype = torch.float32 if case == "dtype" else torch.int64
    raises(pattern, mesa_attention, **values, cu_seqlens=torch.tensor(bounds, dtype=dtype))


def test_packed_sequences_need_a_batch_of_one(device):
    cu_seqlens = torch.tensor([0, T], device=device)
    raises(r"cu_seqlens\b.*batch of 1.*2", mesa_attention, **arguments(device), cu_seqlens=cu_seqlens)
    raises(r"cu_seqlens must be a torch.Tensor, got list", mesa_attention, **arguments(device), cu_seqlens=[0, T])


def test_values_on_the_cpu():
    raises(r"lamb must be > 0.*-0.5", mesa_attention, **changed(arguments("cpu"), dict(lamb=torch.neg)))
    raises(r"lamb must be > 0.*0", mesa_attention, **changed(arguments("cpu"), dict(lamb=torch.zeros_like)))
    raises(r"beta must be >= 0.*-0.5", mesa_attention, **changed(arguments("cpu"), dict(beta=torch.neg)))


def test_state_indices(device):
    def step(rows, **options):
        indices = torch.tensor(rows, device=device, **options)
        mesa_decode_step(**arguments(device, ()), state=state(device, n=3), state_indices=indices)

    step([2, -1])
    raises(r"state_indices\b.*\[3\]", step, [0, 1, 2])
    raises(r"state_indices\b.*(?i:float)", step, [0.0, 1.0])
    raises(r"state_indices must be a torch.Tensor", lambda: mesa_decode_step(
        **arguments(device, ()), state=state(device, n=3), state_indices=[0, 1]))  # fmt: skip
    if device == "cpu":
        raises(r"state_indices\b.*3\b.*got 3", step, [0, 3])
        raises(r"state_indices\b.*got -2", step, [0, -2])


def test_a_decode_state_must_be_contiguous(device):
    h = state(device)
    raises(r"h_kk must be contiguous", mesa_decode_step, **arguments(device, ()), state=MesaState(h.h_kk.mT, h.h_kv))


BAD_OUT = {
    "type": (lambda o: [o], r"out must be a torch.Tensor, got list"),
    "shape": (lambda o: o[:, :1], r"out must have shape .*\[2, 2, 3\], got \[2, 1, 3\]"),
    "rank": (lambda o: o[0], r"out must have shape .*got \[2, 3\]"),
    "dtype": (lambda o: o.half(), r"out must be float32 .*got float16"),
    "rows": (lambda o: o.mT.contiguous().mT, r"out must have rows of contiguous.*got strides \[6, 1, 2\]"),
    "overlap": (lambda o: o[:1].expand(2, 2, 3), r"out must have rows .* not overlap, got strides \[0, 3, 1\]"),
    "gradient": (lambda o: o.requires_grad_(), r"an argument requires one"),
}


@pytest.mark.parametrize("case", BAD_OUT)
def test_out(device, case):
    change, pattern = BAD_OUT[case]
    h = state(device)
    out = change(torch.zeros(B, H, V, device=device))
    raises(pattern, mesa_decode_step, **arguments(device, ()), state=h, out=out)
    assert not any(a.any() for a in h)


@pytest.mark.parametrize("shape", [(), (H,), (B, K), (B, T, H, K)], ids=str)
def test_ranks_of_a_token(device, shape):
    for name in ("q", "k", "v"):
        values = arguments(device, ()) | {name: torch.zeros(shape, device=device)}
        raises(rf"{name} must have 3 dimensions.*got shape", mesa_decode_step, **values, state=state(device))


@pytest.mark.gpu
def test_devices_are_not_mixed():
    for name in ("q", "k", "v", "g", "beta", "lamb"):
        raises(rf"\b{name}\b|device", mesa_attention, **changed(arguments("cuda"), {name: torch.Tensor.cpu}))
        raises(rf"\b{name}\b|device", mesa_attention, **changed(arguments("cpu"), {name: torch.Tensor.cuda}))
    raises(r"h_kk\b.*cuda.*cpu", mesa_attention, **arguments("cuda"), initial_state=state("cpu"))


@pytest.mark.gpu
def test_what_cuda_does_not_do():
    wide = {n: (lambda a: a.repeat(*[1] * (a.ndim - 1), 40)) for n in ("q", "k", "lamb")}
    raises(r"128.*not supported on cuda.*160", mesa_attention, **changed(arguments("cuda"), wide))
    raises(r"128.*not supported on cuda.*150", mesa_attention, **changed(
        arguments("cuda"), dict(v=lambda a: a.repeat(1, 1, 1, 50))))  # fmt: skip
    doubles = {n: torch.Tensor.double for n in ("q", "k", "v")}
    raises(r"q must be.*float64.*", mesa_attention, **changed(arguments("cuda"), doubles))


@pytest.mark.gpu
def test_cuda_counts_tokens_in_31_bits():
    sequences = 2**31 // 64
    values = {n: a[:1] if a.ndim > 2 else a for n, a in arguments("cuda").items()}
    bounds = torch.zeros(sequences + 1, dtype=torch.int64, device="cuda")
    bounds[-1] = T
    raises(rf"below 2\^31.*T = {T} and {sequences} sequences", mesa_attention, **values, cu_seqlens=bounds)


def test_an_error_leaves_the_library_usable(device):
    raises("k", mesa_attention, **changed(arguments(device), dict(k=lambda a: a[..., :3])))
    o, _ = mesa_ext.mesa_attention(**arguments(device))
    assert o.isfinite().all()
