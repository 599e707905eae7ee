"""The compiled CPU backend beside the same chunked algorithm in plain PyTorch operations (torch_chunked.py).

    python bench/bench_cpu.py --json cpu.json

Same float32 inputs, same tolerance, same number of threads; also one decode step beside a copy of its states.
"""

import torch
from common import Timer, environment, make_inputs, make_parser, plot_lines, print_table, relative_error, write_json
from torch_chunked import torch_chunked

from mesa_ext import MesaState, mesa_attention, mesa_decode_step

SHAPES = [(8, 256, 4, 32), (2, 1024, 4, 64), (1, 4096, 4, 64), (1, 1024, 4, 128)]  # B, T, heads, width


def measure(shape, timer):
    B, T, H, D = shape
    inputs = {name: a.requires_grad_() for name, a in make_inputs(B, T, H, D, D, torch.float32, "cpu").items()}
    do = torch.randn(B, T, H, D)
    leaves = list(inputs.values())

    def compiled():
        return mesa_attention(**inputs)[0]

    def plain():
        return torch_chunked(**inputs)[0]

    row = {"shape": "x".join(map(str, shape)), "difference": relative_error(plain(), compiled())}
    for name, call in (("mesa_ext", compiled), ("torch", plain)):
        with torch.no_grad():
            row[f"{name} fwd ms"] = timer(call)
        row[f"{name} f+b ms"] = timer(lambda: torch.autograd.grad(call(), leaves, do))
    row["fwd speed-up"] = row["torch fwd ms"] / row["mesa_ext fwd ms"]
    row["f+b speed-up"] = row["torch f+b ms"] / row["mesa_ext f+b ms"]
    return row


@torch.no_grad()
def measure_decode(B, H, D, timer):
    """States well beyond the cache; the traffic of a copy of as many bytes sets the floor."""
    inputs = make_inputs(B, 64, H, D, D, torch.float32, "cpu")
    lamb = inputs.pop("lamb")
    _, state = mesa_attention(**inputs, lamb=lamb, output_final_state=True)
    token = {name: a[:, -1].contiguous() for name, a in inputs.items()}
    copies = MesaState(*(torch.empty_like(h) for h in state))
    copy = timer(lambda: [a.copy_(b) for a, b in zip(copies, state)])
    step = timer(lambda: mesa_decode_step(**token, lamb=lamb, state=state))
    size = sum(h.numel() * 4 for h in state)
    return {
        "batch": B,
        "heads": H,
        "width": D,
        "state MiB": size / 2**20,
        "ms": step,
        "copy ms": copy,
        "ratio": step / copy,
    }


def main():
    parser = make_parser(__doc__)
    parser.set_defaults(repeats=15)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    timer = Timer("cpu", args.repeats, warmup=1)
    print(", ".join(f"{name} {value}" for name, value in environment().items()))
    rows = [measure(shape, timer) for shape in SHAPES]
    print_table("chunked Mesa layer on the CPU, float32", rows)
    decode = [measure_decode(64, 16, 128, timer)]
    print_table("decode on the CPU", decode)
    lines = {
        name: [(i + 1, row[f"{key} f+b ms"]) for i, row in enumerate(rows)]
        for name, key in (("mesa_ext", "mesa_ext"), ("plain PyTorch", "torch"))
    }
    plot_lines(args.plot, lines, "shape (row of the table)", "forward + backward, ms")
    write_json(args.json, threads=torch.get_num_threads(), chunk=rows, decode=decode)


if __name__ == "__main__":
    main()
