"""The drop-in for fla.ops.mesa_net: signatures, values, and gradients in the orientation fla's own tests expect."""

import inspect

import pytest
import torch
import torch.nn.functional as F

from mesa_ext import fla
from mesa_ext.reference import mesa_reference

# As `inspect.signature` prints the functions of fla-core 0.6.0, without annotations.
SIGNATURES = {
    "chunk_mesa_net": "(q, k, v, g, beta, lamb, h_kk_init=None, h_kv_init=None, output_final_state=False, "
    "max_CG_iteration=30, use_qk_l2norm_in_kernel=False, cu_seqlens=None, cu_seqlens_cpu=None)",
    "mesa_net_decoding_one_step": "(q, k, v, g, lamb, beta, prev_h_kk, prev_h_kv, max_CG_iteration=30)",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name):
    signature = inspect.signature(getattr(fla, name))
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    assert str(inspect.Signature(bare)) == SIGNATURES[name]


def make_inputs(B, T, H, D, n, dtype=torch.float32, device="cpu"):
    torch.manual_seed(0)
    q, v = torch.rand(2, B, T, H, D) / 10
    k = F.normalize(torch.rand(B, T, H, D), dim=-1)
    g = torch.empty(B, T, H).uniform_(0.8, 0.99).log()
    beta = torch.rand(B, T, H).sigmoid()
    lamb = torch.rand(H, D).sigmoid() * 0.75 + 0.25
    k0 = F.normalize(torch.rand(n, H, D), dim=-1)
    h_kk, h_kv = k0.unsqueeze(-1) * k0.unsqueeze(-2), torch.rand(n, H, D, D)
    inputs = dict(q=q, k=k, v=v, g=g, beta=beta, lamb=lamb)
    inputs = {name: a.to(device, dtype if name in "qkv" else torch.float32) for name, a in inputs.items()}
    return inputs, h_kk.to(device), h_kv.to(device)


def relative_error(actual, expected):
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("packed", [False, True])
def test_chunk_matches_the_dense_reference(packed, device):
    bounds = torch.tensor([0, 14, 14, 71], device=device) if packed else None
    n = 3 if packed else 2
    inputs, h_kk, h_kv = make_inputs(1 if packed else 2, 71, 2, 12, n, device=device)
    leaves = [a.requires_grad_() for a in (*inputs.values(), h_kk, h_kv)]

    actual = fla.chunk_mesa_net(
        **inputs, h_kk_init=h_kk, h_kv_init=h_kv, output_final_state=True, max_CG_iteration=12, cu_seqlens=bounds,
        cu_seqlens_cpu=bounds,
    )  # fmt: skip
    o, state = mesa_reference(**inputs, initial_state=(h_kk, h_kv), cu_seqlens=bounds)
    expected = (o, *state)
    grads_out = [torch.rand_like(a) for a in actual]  # not symmetric for h_kk: its orientation counts
    grads = torch.autograd.grad(actual, leaves, grads_out)
    grads_expected = torch.autograd.grad(expected, leaves, [a.double() for a in grads_out])
    for name, a, b in zip(("o", "h_kk", "h_kv"), actual, expected):
        assert relative_error(a, b) < 1e-4, name
    for name, a, b in zip((*inputs, "h_kk_init", "h_kv_init"), grads, grads_expected):
        assert relative_error(a, b) < 1e-3, name
    assert relative_error(grads[-2].mT, grads_expected[-2]) > 0.01  # the transpose would not have passed


def test_chunk_returns_no_state_unless_asked():
    inputs, _, h_kv = make_inputs(2, 9, 2, 12, 2)
    o, h_kk_final, h_kv_final = fla.chunk_mesa_net(**inputs)
    assert o.shape == inputs["v"].shape and h_kk_final is None and h_kv_final is None
    o, h_kk_final, h_kv_final = fla.chunk_mesa_net(**inputs, h_kv_init=h_kv, output_final_state=True)
    zeros = torch.zeros(2, 2, 12, 12)
    expected, _ = mesa_reference(**inputs, initial_state=(zeros, h_kv))
    assert relative_error(o, expected) < 1e-4 and h_kk_final.shape == h_kv_final.shape == zeros.shape


def test_chunk_normalises_q_and_k():
    inputs, *_ = make_inputs(2, 9, 2, 12, 2)
    o, *_ = fla.chunk_mesa_net(**{**inputs, "k": 3 * inputs["k"]}, use_qk_l2norm_in_kernel=True)
    expected, _ = mesa_reference(**{**inputs, "q": F.normalize(inputs["q"], dim=-1)})
    assert relative_error(o, expected) < 1e-3


def test_chunk_dtypes():
    inputs, h_kk, h_kv = make_inputs(2, 9, 2, 12, 2, torch.float16)
    half = {name: a.half() for name, a in inputs.items()}
    o, *state = fla.chunk_mesa_net(**half, h_kk_init=h_kk, h_kv_init=h_kv, output_final_state=True)
    assert o.dtype == torch.float16 and all(s.dtype == torch.float32 for s in state)
    mixed = {**inputs, "v": inputs["v"].float()}
    assert fla.chunk_mesa_net(**mixed)[0].dtype == torch.float32


def decode_inputs(dtype, device="cpu"):
    inputs, h_kk, h_kv = make_inputs(2, 1, 4, 20, 2, dtype, device)
    return {name: a if name == "lamb" else a[:, 0] for name, a in inputs.items()}, h_kk, h_kv


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_decoding(dtype, device):
    inputs, h_kk, h_kv = decode_inputs(dtype, device)
    kept = h_kk.clone(), h_kv.clone()
    h_kk.requires_grad_()
    o, h_kk_new, h_kv_new = fla.mesa_net_decoding_one_step(**inputs, prev_h_kk=h_kk, prev_h_kv=h_kv)
    assert torch.equal(h_kk, kept[0]) and torch.equal(h_kv, kept[1])
    expected, state = mesa_reference(
        *(inputs[name].unsqueeze(1) for name in ("q", "k", "v", "g", "beta")),
        inputs["lamb"],
        initial_state=(h_kk, h_kv),
    )
    assert o.dtype == dtype and h_kk_new.dtype == torch.float32
    assert relative_error(o, expected[:, 0]) < (1e-4 if dtype == torch.float32 else 3e-3)
    assert relative_error(h_kk_new, state.h_kk) < 1e-5 and relative_error(h_kv_new, state.h_kv) < 1e-5


def test_decoding_with_few_steps_is_a_truncated_solve():
    """One step from the diagonal guess goes down the gradient by the exact line search."""
    inputs, h_kk, h_kv = decode_inputs(torch.float64)
    o, h_kk, h_kv = fla.mesa_net_decoding_one_step(**inputs, prev_h_kk=h_kk, prev_h_kv=h_kv, max_CG_iteration=1)
    lamb = inputs["lamb"].double()
    system = h_kk.double() + lamb.diag_embed()
    x = inputs["q"] / system.diagonal(dim1=-2, dim2=-1)
    r = inputs["q"] - (system @ x.unsqueeze(-1)).squeeze(-1)
    step = (r * r).sum(-1) / (r.unsqueeze(-2) @ system @ r.unsqueeze(-1)).squeeze(-1).squeeze(-1)
    expected = h_kv.double().mT @ (x + step.unsqueeze(-1) * r).unsqueeze(-1)
    assert relative_error(o, expected.squeeze(-1)) < 1e-6
