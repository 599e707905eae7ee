"""MesaLayer: every way of cutting a sequence up gives what one call gives."""

import math

import pytest
import torch

from mesa_ext import mesa_attention
from mesa_ext.nn import CausalConv, MesaLayer, MesaLayerState

D = 24


def make_layer(dtype=torch.float64, **options):
    torch.manual_seed(0)
    return MesaLayer(D, **{"num_heads": 3, "head_dim": 8, **options}).to(dtype)


def random_state(layer, n):
    """A state that real tokens have left, so that h_kk is symmetric and positive."""
    with torch.no_grad():
        return layer(torch.randn(n, 9, D, dtype=layer.q_proj.weight.dtype))[1]


def tensors(state):
    return [*state.mesa, state.conv_q, state.conv_k]


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(
    "options", [{}, {"value_head_dim": 5, "use_output_gate": True}, {"conv_size": 1}, {"num_heads": 1}]
)
def test_shapes_and_gradients(options):
    layer = make_layer(**options)
    x = torch.randn(2, 70, D, dtype=torch.float64, requires_grad=True)
    y, state, info = layer(x, return_solver_info=True)
    assert y.shape == x.shape
    heads, K, V = layer.num_heads, layer.head_dim, layer.value_head_dim
    past = layer.q_conv.size - 1
    expected = [(2, heads, K, K), (2, heads, K, V), (2, past, heads * K), (2, past, heads * K)]
    assert [tuple(s.shape) for s in tensors(state)] == expected
    assert [s.shape for s in tensors(layer.init_state(2))] == [s.shape for s in tensors(state)]
    assert info.steps.shape == (2, 70, heads)
    y.square().mean().backward()
    for name, parameter in [("x", x), *layer.named_parameters()]:
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_initial_gates_and_regulariser():
    layer = make_layer()
    decays = layer.decay_proj.bias.sigmoid()
    torch.testing.assert_close(decays, decays.new_tensor([0.9, 0.99, 0.999]))
    seen = {}
    layer.attend = lambda q, k, v, g, beta, lamb, *rest: seen.update(g=g, beta=beta, lamb=lamb) or (v, None, None)
    layer(torch.zeros(1, 2, D, dtype=torch.float64))
    torch.testing.assert_close(seen["lamb"], torch.ones_like(seen["lamb"]))
    torch.testing.assert_close(seen["beta"], torch.full_like(seen["beta"], 0.5))
    torch.testing.assert_close(seen["g"].exp()[0, 0], decays * (1 - (1 - 0.9975) * 0.25))


def test_the_operator_is_what_the_layer_says():
    layer = make_layer(conv_size=2)
    x = torch.randn(1, 6, D, dtype=torch.float64)

    def conv(module, a):
        shifted = torch.cat([torch.zeros_like(a[:, :1]), a[:, :-1]], 1)
        return torch.nn.functional.silu(module.weight[0] * shifted + module.weight[1] * a)

    q, k = conv(layer.q_conv, layer.q_proj(x)), conv(layer.k_conv, layer.k_proj(x))
    q, k, v = (a.unflatten(-1, (3, 8)) for a in (q, k, layer.v_proj(x)))
    q, k = (torch.nn.functional.normalize(a, dim=-1) for a in (q, k))
    beta = layer.beta_proj(x).sigmoid()
    g = (layer.decay_proj(x).sigmoid() * (1 - (1 - 0.9975) * beta**2)).log()
    o, _ = mesa_attention(q, k, v, g, beta, torch.ones(3, 8, dtype=torch.float64))
    o = o * (o.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    torch.testing.assert_close(layer(x)[0], layer.o_proj(o.flatten(-2)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("start", [False, True])
def test_generation_token_by_token(start):
    layer = make_layer()
    x = torch.randn(2, 21, D, dtype=torch.float64)
    state = random_state(layer, 2) if start else None
    y, final = layer(x, state)
    with torch.no_grad():
        pieces = []
        y_prompt, running = layer(x[:, :8], state)
        addresses = [s.data_ptr() for s in tensors(running)]
        for t in range(8, 21):
            y_t, running = layer(x[:, t : t + 1], running)
            pieces.append(y_t)
    assert [s.data_ptr() for s in tensors(running)] == addresses  # updated in place
    assert_same(torch.cat([y_prompt, *pieces], 1), y)
    for a, b in zip(tensors(running), tensors(final)):
        assert_same(a, b)


def test_generation_from_nothing():
    layer = make_layer()
    x = torch.randn(2, 5, D, dtype=torch.float64)
    state = layer.init_state(2)
    with torch.no_grad():
        y = torch.cat([layer(x[:, t : t + 1], state)[0] for t in range(5)], 1)
    assert_same(y, layer(x)[0])


def test_pieces_with_gradients_through_the_state():
    layer = make_layer()
    x = torch.randn(1, 75, D, dtype=torch.float64)
    dy = torch.randn_like(x)

    def gradients(cuts):
        layer.zero_grad()
        state, outputs = None, []
        for a, b in zip(cuts, cuts[1:]):
            y, state = layer(x[:, a:b], state)
            outputs.append(y)
        y = torch.cat(outputs, 1)
        (y * dy).sum().backward()
        return [y.detach(), *tensors(state), *(p.grad.clone() for p in layer.parameters())]

    for a, b in zip(gradients([0, 1, 3, 3, 68, 75]), gradients([0, 75])):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_packed_equals_separate(start, dtype):
    layer = make_layer()
    lengths = [1, 0, 66, 2, 0, 9]
    n = len(lengths)
    bounds = torch.tensor([0, *lengths], dtype=dtype).cumsum(0, dtype=dtype)
    x = torch.randn(1, sum(lengths), D, dtype=torch.float64, requires_grad=True)
    dy = torch.randn_like(x)
    state = random_state(layer, n) if start else None

    def part(i):
        return state and MesaLayerState(
            type(state.mesa)(*(h[i : i + 1] for h in state.mesa)), state.conv_q[i : i + 1], state.conv_k[i : i + 1]
        )

    y, final = layer(x, state, bounds)
    separate = [layer(x[:, bounds[i] : bounds[i + 1]], part(i)) for i in range(n)]
    y_separate = torch.cat([s[0] for s in separate], 1)
    assert_same(y, y_separate)
    for i, (_, final_i) in enumerate(separate):
        for a, b in zip(tensors(final), tensors(final_i)):
            assert_same(a[i : i + 1], b)
    for a, b in zip(*(torch.autograd.grad(out, [x, layer.k_conv.weight], dy) for out in (y, y_separate))):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_empty_sequence_keeps_the_state():
    layer = make_layer()
    state = random_state(layer, 2)
    y, after = layer(torch.zeros(2, 0, D, dtype=torch.float64), state)
    assert y.shape == (2, 0, D)
    for a, b in zip(tensors(after), tensors(state)):
        assert_same(a, b)


def test_with_gradients_one_token_leaves_the_state_alone():
    layer = make_layer()
    state = random_state(layer, 1)
    before = [s.clone() for s in tensors(state)]
    x = torch.randn(1, 1, D, dtype=torch.float64, requires_grad=True)
    layer(x, state)[0].sum().backward()
    assert x.grad.abs().max() > 0
    assert all(torch.equal(a, b) for a, b in zip(tensors(state), before))


def test_convolution_is_causal_and_forgets_no_neighbour():
    conv = CausalConv(4, 3).double()
    x = torch.randn(1, 7, 4, dtype=torch.float64)
    weight = conv.weight.flip(0).T.unsqueeze(1).flip(-1)
    expected = torch.nn.functional.conv1d(x.mT, weight, padding=2, groups=4)[..., :7].mT
    assert_same(conv(x)[0], torch.nn.functional.silu(expected))


def test_autocast():
    layer = make_layer(torch.float32)
    x = torch.randn(2, 40, D)
    exact = layer(x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        y, state = layer(x)
        y.float().sum().backward()
        with torch.no_grad():
            y_next, _ = layer(x[:, :1], state)
    assert y.dtype == torch.bfloat16 and state.mesa.h_kk.dtype == torch.float32 and y_next.shape == (2, 1, D)
    assert (y.float() - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_weights(dtype):
    layer = make_layer(torch.float32).to(dtype)
    x = torch.randn(2, 40, D).to(dtype)
    y, state = layer(x)
    with torch.no_grad():
        layer(x[:, :1], state)
    assert y.dtype == dtype and state.conv_q.dtype == dtype and state.mesa.h_kv.dtype == torch.float32
    assert y.isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_on_cuda(dtype):
    """Prompt, generation and gradients as on the CPU in float64, with the same rounded weights and inputs."""
    layer = make_layer(torch.float32).to(dtype)
    exact = make_layer()
    exact.load_state_dict(layer.state_dict())
    x = torch.randn(2, 150, D).to(dtype)
    expected = exact(x.double())[0]
    layer, x = layer.cuda(), x.cuda()
    with torch.no_grad():
        y, state = layer(x[:, :140])
        y = torch.cat([y, *(layer(x[:, t : t + 1], state)[0] for t in range(140, 150))], 1)
    bar = 3e-2 if dtype == torch.bfloat16 else 1e-4
    assert (y.cpu().double() - expected).norm() < bar * expected.norm()
    layer(x)[0].float().square().mean().backward()
    expected.square().mean().backward()
    for name, parameter in layer.named_parameters():
        reference = exact.get_parameter(name).grad
        assert (parameter.grad.cpu().double() - reference).norm() < 5 * bar * reference.norm(), name


def test_compile_without_graph_break():
    layer = make_layer(torch.float32)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 20, D)
    y, state = compiled(x)
    torch.testing.assert_close(y, layer(x)[0])
    y.sum().backward()
    bounds = torch.tensor([0, 7, 20])
    torch.testing.assert_close(compiled(x[:1], None, bounds)[0], layer(x[:1], None, bounds)[0])
    with torch.no_grad():
        eager = [s.clone() for s in tensors(state)]
        y_eager, _ = layer(x[:, :1], MesaLayerState(type(state.mesa)(*eager[:2]), *eager[2:]))
        torch.testing.assert_close(compiled(x[:, :1], state)[0], y_eager)
    for a, b in zip(tensors(state), eager):
        torch.testing.assert_close(a, b)


def test_activation_checkpointing():
    layer = make_layer()
    x = torch.randn(1, 30, D, dtype=torch.float64, requires_grad=True)
    plain = torch.autograd.grad(layer(x)[0].square().sum(), x)[0]
    again = torch.autograd.grad(
        torch.utils.checkpoint.checkpoint(lambda a: layer(a)[0], x, use_reentrant=False).square().sum(), x
    )[0]
    assert_same(again, plain)


def test_keep_states(device):
    """On CUDA they are kept for the backward pass; they change nothing."""
    x = torch.randn(2, 500, D, device=device)
    gradients, kept = [], []
    for keep_states in (False, True):
        layer = make_layer(torch.float32, keep_states=keep_states).to(device)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
            loss = layer(x)[0].square().sum()
        loss.backward()
        gradients.append([p.grad for p in layer.parameters()])
        kept.append(sum(sizes))
    assert all(a.equal(b) for a, b in zip(*gradients, strict=True))
    # Sequences x chunks x heads x [G | H], each 64 x 64 in two terms.
    states = 2 * 8 * layer.num_heads * 2 * 64 * 64 * 4
    if device == "cuda":
        assert states <= kept[1] - kept[0] <= 1.01 * states
    else:
        assert kept[0] == kept[1]


@pytest.mark.parametrize("options", [{"conv_size": 0}, {"lambda_min": 0.0}, {"lambda_min": math.inf}])
def test_bad_options(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        make_layer(**options)
