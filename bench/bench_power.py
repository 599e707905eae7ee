"""What the card's power limit costs: time of a call in longer and longer runs, clock and power in the longest.

python bench/bench_power.py --shape 8x2048x16x128 --steps 30
"""

import subprocess
import time

import torch
from common import environment, make_inputs, make_parser, print_table, write_json

from mesa_ext import mesa_attention

QUERY = ("clocks.sm", "power.draw.instant", "clocks_event_reasons.active")  # the last a mask; 0x4: the power limit


def sample():
    """The card's clock in MHz, power in W and what holds the clock back, by nvidia-smi, which takes about 0.1 s."""
    card = f"--id=GPU-{torch.cuda.get_device_properties().uuid}"
    line = ["nvidia-smi", card, f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader"]
    try:
        output = subprocess.run(line, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        return {"nvidia-smi": str(error)}
    return dict(zip(QUERY, (field.strip() for field in output.split(","))))


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--shape", default="8x2048x16x128", help="B x T x heads x width")
    parser.add_argument("--steps", type=int, help="exactly so many solver steps")
    parser.add_argument("--runs", type=int, nargs="+", default=[20, 200, 2000], help="calls in a row")
    args = parser.parse_args()
    B, T, H, D = (int(n) for n in args.shape.split("x"))
    inputs = make_inputs(B, T, H, D, D, torch.bfloat16, "cuda")
    options = {"max_cg_iterations": args.steps, "cg_tol": 0.0} if args.steps else {}
    for _ in range(10):
        mesa_attention(**inputs, **options)
    rows = []
    for calls in args.runs:
        torch.cuda.synchronize()
        time.sleep(0.5)  # the card's average power is low again
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            mesa_attention(**inputs, **options)
        end.record()
        row = {"calls": calls}
        if calls == max(args.runs):
            row |= sample() | {"taken while running": not end.query()}
        end.synchronize()
        rows.append(row | {"ms a call": start.elapsed_time(end) / calls})
    print(", ".join(f"{name} {value}" for name, value in environment().items()))
    print_table(f"forward, {args.shape}, bf16", rows)
    write_json(args.json, shape=args.shape, exact_steps=args.steps, power=rows)


if __name__ == "__main__":
    main()
