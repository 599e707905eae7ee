"""Time of every CUDA kernel in forward, backward and decode, through torch.profiler.

python bench/profile_kernels.py --shape 8x2048x16x128
"""

import torch
from common import environment, make_inputs, make_parser, print_table, write_json
from torch.profiler import ProfilerActivity, profile

from mesa_ext import MesaState, mesa_attention, mesa_decode_step


def short_name(kernel):
    """Without namespaces, and not so long that a table would not fit."""
    name = kernel.replace("(anonymous namespace)::", "").replace("mesa::", "").removeprefix("void ")
    return name if len(name) <= 90 else name[:87] + "..."


def kernel_times(call, repeats):
    """Per kernel: launches in one call, mean microseconds of a launch, share of the whole."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        for _ in range(repeats):
            call()
        torch.cuda.synchronize()
    events = [event for event in recorded.key_averages() if event.self_device_time_total > 0]
    total = sum(event.self_device_time_total for event in events)
    return [
        {
            "kernel": short_name(event.key),
            "launches": event.count / repeats,
            "us a launch": event.self_device_time_total / event.count,
            "us a call": event.self_device_time_total / repeats,
            "share": event.self_device_time_total / total,
        }
        for event in sorted(events, key=lambda event: -event.self_device_time_total)
    ]


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--shape", default="8x2048x16x128", help="B x T x heads x width")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--steps", type=int, help="exactly so many solver steps")
    args = parser.parse_args()
    B, T, H, D = (int(n) for n in args.shape.split("x"))
    inputs = make_inputs(B, T, H, D, D, getattr(torch, args.dtype), "cuda")
    options = {"max_cg_iterations": args.steps, "cg_tol": 0.0} if args.steps else {}
    leaves = {name: a.clone().requires_grad_() for name, a in inputs.items()}
    o, _ = mesa_attention(**leaves, **options)
    do = torch.randn_like(o)
    token = {name: a if name == "lamb" else a[:, 0].contiguous() for name, a in inputs.items()}
    state = MesaState(*(h.contiguous() for h in mesa_attention(**inputs, output_final_state=True)[1]))
    calls = {
        "forward": lambda: mesa_attention(**inputs, **options),
        "backward": lambda: torch.autograd.grad(o, list(leaves.values()), do, retain_graph=True),
        "decode": lambda: mesa_decode_step(**token, state=state, **options),
    }
    print(", ".join(f"{name} {value}" for name, value in environment().items()))
    tables = {}
    for name, call in calls.items():
        tables[name] = kernel_times(call, args.repeats)
        total = sum(row["us a call"] for row in tables[name])
        print_table(f"{name}, {args.shape}, {args.dtype}: {total:.1f} us in kernels", tables[name])
    write_json(args.json, shape=args.shape, dtype=args.dtype, exact_steps=args.steps, kernels=tables)


if __name__ == "__main__":
    main()
