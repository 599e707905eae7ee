"""Relative errors of outputs and gradients against the dense float64 reference, over regimes and gradient sizes.

    python bench/accuracy.py --json accuracy.json

fla's errors stand beside ours where it is installed and there is a CUDA device. Both run with their default settings,
but that float32 and float64 inputs may take more than 30 steps to meet their tolerance.
"""

import torch
from common import REGIMES, environment, import_fla, make_inputs, make_parser, print_table, relative_error, write_json

from mesa_ext import mesa_attention
from mesa_ext.reference import mesa_reference

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}


def implementations(dtype, device, peers):
    """name -> function of the inputs that returns o."""
    steps = 30 if dtype.itemsize == 2 else 256
    found = {"ours": lambda **inputs: mesa_attention(**inputs, max_cg_iterations=steps)[0]}
    if peers and torch.device(device).type == "cuda" and dtype.itemsize <= 4 and import_fla():
        from fla.ops.mesa_net import chunk_mesa_net

        found["fla"] = lambda **inputs: chunk_mesa_net(**inputs)[0]
    return found


def evaluate(function, inputs, do):
    """name -> o and every gradient."""
    leaves = {name: a.detach().clone().requires_grad_() for name, a in inputs.items()}
    o = function(**leaves)
    grads = torch.autograd.grad(o, list(leaves.values()), do.to(o.dtype))
    return {"o": o.detach(), **{f"d{name}": grad for name, grad in zip(leaves, grads)}}


def compare(regime, dtype, device, tokens, width=128, heads=2, scale=1.0, peers=True):
    """One row of errors for each implementation, with output gradients of size `scale`."""
    inputs = make_inputs(1, tokens, heads, width, width, dtype, device, regime)
    if dtype == torch.float64:
        inputs = {name: a.double() for name, a in inputs.items()}
    generator = torch.Generator(device).manual_seed(1)
    do = (scale * torch.randn(1, tokens, heads, width, generator=generator, device=device)).to(dtype)
    expected = evaluate(lambda **a: mesa_reference(**a)[0], inputs, do)
    _, state = mesa_reference(**inputs)
    eigenvalues = torch.linalg.eigvalsh(state.h_kk + inputs["lamb"].double().diag_embed())
    kappa = (eigenvalues[..., -1] / eigenvalues[..., 0]).median().item()
    about = {"regime": regime, "T": tokens, "do": scale, "kappa": round(kappa)}
    rows = []
    for name, function in implementations(dtype, device, peers).items():
        actual = evaluate(function, inputs, do)
        rows.append({"who": name, **about, **{key: relative_error(actual[key], expected[key]) for key in expected}})
    return rows


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES)
    parser.add_argument("--tokens", nargs="+", type=int)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--scales", nargs="+", type=float, default=[1.0, 1e-6])
    parser.add_argument("--no-peers", action="store_true", help="ours alone: fla's kernels take minutes to compile")
    args = parser.parse_args()
    print(", ".join(f"{name} {value}" for name, value in environment().items()))
    cuda = torch.device(args.device).type == "cuda"
    tables = {}
    for dtype in args.dtypes or (["bf16", "fp32"] if cuda else ["fp32", "fp64"]):
        tables[dtype] = []
        for tokens in args.tokens or ([512, 4096] if cuda else [512]):
            for regime in REGIMES:
                for scale in args.scales:
                    about = regime, DTYPES[dtype], args.device, tokens, args.width
                    tables[dtype] += compare(*about, scale=scale, peers=not args.no_peers)
                write_json(args.json, accuracy=tables)  # in case it does not get further
        print_table(f"{dtype} inputs, K = V = {args.width}, relative errors", tables[dtype])


if __name__ == "__main__":
    main()
