"""Values and gradients over drawn shapes, dtypes, strides, gates and regimes; first and second derivatives."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mesa_ext import MesaState, mesa_attention
from mesa_ext.reference import mesa_reference
from tests.regimes import (
    REGIMES,
    assert_close,
    bar_for,
    bar_for_gates,
    draw,
    dtypes,
    evaluate,
    output_gradients,
)

HEADS = [(1, 1, 1), (2, 2, 2), (4, 2, 2), (4, 1, 2), (1, 1, 3), (2, 2, 4), (2, 4, 4)]  # HQ, HK, HS


def restride(tensor, kind):
    """The same numbers in another memory layout."""
    if kind == "heads first":
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    if kind == "slice of a wider tensor":
        wide = tensor.new_full((*tensor.shape[:-1], tensor.shape[-1] + 3), torch.nan)
        wide[..., 1:-2] = tensor
        return wide[..., 1:-2]
    if kind == "every other element":
        wide = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1]), torch.nan)
        wide[..., ::2] = tensor
        return wide[..., ::2]
    if kind == "last axis strided":
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    return tensor


@st.composite
def problems(draw_from, device):
    def pick(options):
        return draw_from(st.sampled_from(options))

    dtype = pick(dtypes(device))
    packed = draw_from(st.booleans())
    width = st.one_of(st.integers(1, 8), st.sampled_from([16, 32, 33, 48, 64]))
    lengths = draw_from(st.lists(st.sampled_from([0, 1, 2, 17, 63, 64, 65, 100]), min_size=1, max_size=4))
    inputs = draw(
        pick(list(REGIMES)),
        device,
        dtype,
        seed=draw_from(st.integers(0, 2**31)),
        B=draw_from(st.integers(1, 3)),
        T=pick([1, 2, 15, 63, 64, 65, 129, 150]),
        heads=pick(HEADS),
        K=draw_from(width),
        V=draw_from(width),
        context=pick([0, 0, 10, 500]),
        lengths=lengths if packed else None,
    )
    layout = pick(["contiguous", "heads first", "slice of a wider tensor", "every other element", "last axis strided"])
    inputs = inputs.map(lambda a: restride(a, layout) if a.ndim > 2 and a.shape != inputs.lamb.shape else a)
    scales = [1.0, 64.0] if dtype == torch.float16 else [1e-8, 1e-4, 1.0, 1e4]
    return inputs, output_gradients(inputs, scale=pick(scales), state=draw_from(st.booleans()))


@given(data=st.data())
def test_against_the_reference(device, data):
    """Every tensor, however small, with the solver's own error out of the way.

    A dg of two tokens can cancel to 1e-3 of what it is summed from, and an o of one number to less than 1e-1, which
    magnifies the default tolerances (1e-3 and, in float32, 3e-6) past the bars. These are judged in test_accuracy.py,
    in all regimes, on tensors of real size.
    """
    inputs, gradients = data.draw(problems(device))
    ours = evaluate(
        mesa_attention,
        inputs,
        gradients,
        output_final_state=True,
        max_cg_iterations=256,
        cg_tol={2: 1e-5, 4: 1e-7, 8: None}[inputs.q.dtype.itemsize],
    )
    expected = evaluate(mesa_reference, inputs, gradients, wide=True)
    assert_close(ours, {name: expected[name] for name in ours}, bar_for_gates(inputs, expected, gradients[0]))


@pytest.mark.parametrize("heads", [(1, 1, 1), (4, 1, 2), (1, 1, 2)], ids=str)
@pytest.mark.parametrize("lengths", [None, [2, 0, 1]], ids=["batch", "packed"])
def test_gradcheck(heads, lengths):
    """Against finite differences, which know nothing of our reference."""
    inputs = draw("random", "cpu", torch.float64, B=1, T=3, heads=heads, K=3, V=2, context=7, lengths=lengths)

    def attention(*tensors):
        h_kk, h_kv = tensors[6:]
        state = MesaState((h_kk + h_kk.mT) / 2, h_kv)  # conjugate gradients are for symmetric matrices
        o, state = mesa_attention(
            *tensors[:6], initial_state=state, cu_seqlens=inputs.cu_seqlens, output_final_state=True, cg_tol=1e-14
        )
        return o, *state

    tensors = [a.requires_grad_() for a in (*inputs.tokens(), inputs.lamb, *inputs.initial_state)]
    assert torch.autograd.gradcheck(attention, tensors)


def test_second_derivatives_are_refused(device):
    inputs = draw("random", device, torch.float32, T=5, K=4, V=4)
    q, beta = inputs.q.requires_grad_(), inputs.beta.requires_grad_()
    o, _ = inputs.call(mesa_attention)
    dq, dbeta = torch.autograd.grad(o.sum(), (q, beta), create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives are not implemented"):
        torch.autograd.grad(dbeta.sum(), q)


def test_gradients_only_where_asked(device):
    """Each argument alone gets the gradient that it gets together with all others."""
    inputs = draw("random", device, torch.float32, T=70, K=8, V=5, context=20)
    gradients = output_gradients(inputs, state=True)
    expected = evaluate(mesa_attention, inputs, gradients, output_final_state=True)
    names = ["q", "k", "v", "g", "beta", "lamb", "h_kk", "h_kv"]
    for i, name in enumerate(names):
        tensors = [a.detach() for a in (*inputs.tokens(), inputs.lamb, *inputs.initial_state)]
        tensors[i].requires_grad_()
        o, state = mesa_attention(*tensors[:6], initial_state=MesaState(*tensors[6:]), output_final_state=True)
        (grad,) = torch.autograd.grad((o, *state), tensors[i], gradients)
        assert torch.equal(grad, expected[f"d{name}"]), name
        # The final state's gradient alone, o unused.
        _, state = mesa_attention(*tensors[:6], initial_state=MesaState(*tensors[6:]), output_final_state=True)
        (grad,) = torch.autograd.grad(state.h_kk, tensors[i], gradients[1])
        assert grad.isfinite().all() and grad.any() == (name in ("k", "g", "beta", "h_kk")), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_gates_in_other_dtypes(device, dtype):
    """g, beta and lamb come in any floating dtype, are used in float32, and get gradients in their own dtype."""
    inputs = draw("random", device, torch.float32, T=70, K=8, V=5)
    gates = [a.to(dtype).requires_grad_() for a in (inputs.g, inputs.beta, inputs.lamb)]
    o, _ = mesa_attention(inputs.q, inputs.k, inputs.v, *gates)
    grads = torch.autograd.grad(o.sum(), gates)
    floats = [a.detach().float().requires_grad_() for a in gates]
    o_float, _ = mesa_attention(inputs.q, inputs.k, inputs.v, *floats)
    assert torch.equal(o, o_float)
    for grad, expected in zip(grads, torch.autograd.grad(o_float.sum(), floats)):
        assert grad.dtype == dtype and torch.equal(grad, expected.to(dtype))


def test_qk_l2norm(device):
    inputs = draw("random", device, torch.float32, T=70, K=8, V=5)
    gradients = output_gradients(inputs)
    inputs.q, inputs.k = 3 * inputs.q, 0.1 * inputs.k

    def reference(q, k, *rest, **keywords):
        q, k = (a * (a.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for a in (q, k))
        return mesa_reference(q, k, *rest, **keywords)

    ours = evaluate(mesa_attention, inputs, gradients, output_final_state=True, use_qk_l2norm=True)
    assert_close(ours, evaluate(reference, inputs, gradients, wide=True), bar_for(inputs))
