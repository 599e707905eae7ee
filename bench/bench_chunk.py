"""Forward and forward + backward of mesa_attention over shapes, beside fla's Mesa op and softmax attention.

    python bench/bench_chunk.py --json chunk.json --plot chunk.png
    python bench/bench_chunk.py --shapes 8x2048x16x128 --steps 30    # exactly 30 steps

A shape is B x T x heads x width. fla runs at its default of 30 steps; it is left out where it is not installed.
"""

import torch
import torch.nn.functional as F
from accuracy import compare
from common import (
    BENCH_REGIME,
    REGIMES,
    Timer,
    environment,
    floor_ms,
    host_us,
    import_fla,
    kernel_paths,
    make_inputs,
    make_parser,
    peak_memory,
    plot_lines,
    print_table,
    replayed,
    using_kernels,
    work,
    write_json,
)

from mesa_ext import mesa_attention

SHAPES = {
    "cuda": ["8x2048x16x128", "4x8192x16x128", "1x32768x16x128", "8x4096x16x64", "1x131072x4x128"],
    "cpu": ["1x512x4x64"],
}
SWEEP = [512, 1024, 2048, 4096, 8192, 16384, 32768, 65536]  # tokens in a sequence, 32k in a call (64k in the last)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


# Each of these gives a forward call and the tensors that its gradients are taken for.


def ours(inputs, options):
    return lambda: mesa_attention(**inputs, **options)[0], list(inputs.values())


def fla_chunk(inputs):
    from fla.ops.mesa_net import chunk_mesa_net

    return lambda: chunk_mesa_net(**inputs)[0], list(inputs.values())


def softmax(inputs):
    q, k, v = leaves = [inputs[name].detach().transpose(1, 2).contiguous().requires_grad_() for name in "qkv"]
    return lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True), leaves


def time_call(forward, leaves, timer):
    """(forward ms, forward + backward ms, peak MiB of the latter, inputs included); None for what does not fit."""
    try:
        with torch.no_grad():
            do = torch.randn_like(forward())
            forward_ms = timer(forward)

        def both():
            return torch.autograd.grad(forward(), leaves, do)

        both_ms, peak = timer(both), peak_memory(both, timer.device)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return None, None, None
    size = sum(a.numel() * a.element_size() for a in [*leaves, do])
    return forward_ms, both_ms, None if peak is None else peak + size / 2**20


def inputs_of(shape, args):
    B, T, H, D = (int(n) for n in shape.split("x"))
    return make_inputs(B, T, H, D, D, DTYPES[args.dtype], args.device, args.regime)


def measure(shape, args, timer):
    """One row for each set of kernels."""
    inputs = inputs_of(shape, args)
    options = {"max_cg_iterations": args.steps, "cg_tol": 0.0} if args.steps else {}
    options |= {"keep_states": True} if args.keep_states else {}
    rows = []
    for kernels in kernel_paths(args.device):
        with using_kernels(kernels):
            rows.append({"shape": shape, "kernels": kernels, **measure_kernels(inputs, options, timer)})
    return rows


def measure_peers(shape, args, timer):
    """What the peers' figures add to a row."""
    inputs = {name: a.requires_grad_() for name, a in inputs_of(shape, args).items()}
    row = {}
    if args.dtype != "fp32":
        row["softmax fwd"], row["softmax f+b"], _ = time_call(*softmax(inputs), timer)
    if import_fla() and args.device == "cuda":
        row["fla fwd"], row["fla f+b"], row["fla MiB"] = time_call(*fla_chunk(inputs), timer)
    return row


def measure_kernels(inputs, options, timer):
    B, T, H, D = inputs["q"].shape
    steps = mesa_attention(**inputs, **options, return_solver_info=True)[2].steps.float()
    row = {"steps": steps.mean().item(), "max": int(steps.max())}
    leaves = {name: a.detach().requires_grad_() for name, a in inputs.items()}
    forward_ms, both_ms, peak = time_call(*ours(leaves, options), timer)
    executed = work(B, T, H, D, D, row["steps"])
    needed = work(B, T, H, D, D)
    row |= {"fwd ms": forward_ms, "fwd+bwd ms": both_ms, "peak MiB": peak}
    if forward_ms and timer.cuda:
        seconds = forward_ms / 1e3
        row |= {
            "fwd TFLOP/s": executed["forward"][0] / seconds / 1e12,
            "fwd GB/s": executed["forward"][1] / seconds / 1e9,
            "fwd floor share": floor_ms(needed["forward"]) / forward_ms,
            "f+b floor share": floor_ms(*needed.values()) / both_ms,
        }
    return row


def measure_small_call(kernels, timer):
    """B=1, T=512, 16 heads: CUDA-graph replay and the Python side of an eager call, in microseconds."""
    inputs = make_inputs(1, 512, 16, 128, 128, torch.bfloat16, "cuda")
    call, _ = ours(inputs, {})
    with torch.no_grad(), using_kernels(kernels):
        replay = replayed(call)
        replay_us = 1e3 * Timer("cuda", timer.repeats, flush=False)(lambda: [replay() for _ in range(20)]) / 20
        return {
            "call": "1x512x16x128 forward",
            "kernels": kernels,
            "graph replay us": replay_us,
            "eager host us": host_us(call),
        }


def plot_sweep(path, rows):
    """Microseconds a token against the length of a sequence."""

    def points(key, kernels=None):
        for row in rows:
            B, T = (int(n) for n in row["shape"].split("x")[:2])
            if row.get(key) and kernels in (None, row["kernels"]):
                yield T, 1e3 * row[key] / (B * T)

    peers = {"fla": "fla f+b", "softmax (SDPA)": "softmax f+b"}
    lines = {
        f"mesa_ext, {kernels}" if kernels else "mesa_ext": list(points("fwd+bwd ms", kernels))
        for kernels in dict.fromkeys(row["kernels"] for row in rows)
    }
    lines |= {name: list(points(key)) for name, key in peers.items()}
    plot_lines(path, lines, "tokens in a sequence", "forward + backward, microseconds a token")


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--shapes", nargs="+")
    parser.add_argument("--regime", choices=REGIMES, default=BENCH_REGIME, help="decays and keys of what is timed")
    parser.add_argument("--steps", type=int, help="exactly so many solver steps (cg_tol = 0)")
    parser.add_argument("--keep-states", action="store_true", help="from the forward pass for the backward pass")
    parser.add_argument("--no-peers", action="store_true", help="ours alone")
    parser.add_argument("--sweep", action="store_true", help="time against T at 32k tokens a call, for --plot")
    args = parser.parse_args()
    timer = Timer(args.device, args.repeats)
    print(", ".join(f"{name} {value}" for name, value in environment().items()))

    figures = {name: getattr(args, name) for name in ("dtype", "regime", "keep_states")}
    figures |= {"exact_steps": args.steps, "chunk": []}

    def keep():  # after every shape, in case it does not get further
        write_json(args.json, **figures)

    def measure_all(key, shapes):
        """Ours first: fla's kernels take minutes to compile."""
        figures[key] = []
        for shape in shapes:
            figures[key] += measure(shape, args, timer)
            keep()
        if args.no_peers:
            return
        for shape in shapes:
            last = [row for row in figures[key] if row["shape"] == shape][-1]
            last |= measure_peers(shape, args, timer)
            keep()

    if timer.cuda:
        figures["small_call"] = [measure_small_call(kernels, timer) for kernels in kernel_paths(args.device)]
        print_table("small call", figures["small_call"])
    measure_all("chunk", args.shapes or SHAPES[torch.device(args.device).type])
    title = f"mesa_attention, {args.dtype}, {args.regime}" + (f", exactly {args.steps} steps" if args.steps else "")
    title += ", states kept" if args.keep_states else ""
    print_table(title, figures["chunk"])
    figures["errors"] = compare(args.regime, DTYPES[args.dtype], args.device, tokens=512, peers=not args.no_peers)
    print_table("relative error to the float64 reference, T = 512, K = V = 128", figures["errors"])
    if args.sweep or args.plot:
        tokens = SWEEP if timer.cuda else [256, 512]
        total = max(tokens) // 2 if timer.cuda else max(tokens)
        measure_all("sweep", [f"{max(1, total // t)}x{t}x16x128" for t in tokens])
        print_table("time against T", figures["sweep"])
        plot_sweep(args.plot, figures["sweep"])
    keep()


if __name__ == "__main__":
    main()
