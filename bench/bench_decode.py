"""One decode step over batch sizes, by CUDA-graph replay, beside fla's kernel and the memory floor.

    python bench/bench_decode.py --json decode.json --plot decode.png

Every replay takes eight different tokens in turn. The floor is the time to read and write both float32 states once, at
the rate of a large copy on the same device in the same run; "equal copy" is a copy that reads and writes as much as the
step, launched in the same way. "pool" has the states in drawn rows of a pool of twice the size, "half idle" a batch of
which every other row is skipped (-1).
"""

import torch
from common import (
    Timer,
    environment,
    host_us,
    import_fla,
    make_inputs,
    make_parser,
    plot_lines,
    print_table,
    replayed,
    write_json,
)

from mesa_ext import MesaState, mesa_attention, mesa_decode_step

BATCHES = {"cuda": [1, 8, 32, 128, 512], "cpu": [1, 16]}
TOKENS = 8


def start_state(B, H, D, device):
    """States that 512 tokens have left, repeated over the batch."""
    few = make_inputs(min(B, 4), 512, H, D, D, torch.bfloat16 if device == "cuda" else torch.float32, device, seed=1)
    _, state = mesa_attention(**few, output_final_state=True)
    copies = -(-B // len(state.h_kk))
    return MesaState(*(h.repeat(copies, 1, 1, 1)[:B].contiguous() for h in state))


def copy_rate(device, timer):
    """Bytes a second that a large copy reads and writes."""
    source = torch.randn(2**28 if timer.cuda else 2**26, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / (1e-3 * timer(lambda: target.copy_(source)))


@torch.no_grad()
def measure(B, H, D, rate, args, timer):
    inputs = make_inputs(B, TOKENS, H, D, D, torch.bfloat16 if timer.cuda else torch.float32, args.device)
    lamb = inputs.pop("lamb")
    tokens = [{name: a[:, t].contiguous() for name, a in inputs.items()} for t in range(TOKENS)]
    traffic = 2 * 4 * B * H * 2 * D * D
    row = {"batch": B, "heads": H, "width": D}

    def run(step):
        def steps():
            for token in tokens:
                step(**token, lamb=lamb)

        if not timer.cuda:
            return timer(steps) / TOKENS
        replay = replayed(steps)
        return timer(lambda: [replay() for _ in range(4)]) / (4 * TOKENS)

    state = start_state(B, H, D, args.device)
    row["ms"] = run(lambda **token: mesa_decode_step(**token, state=state))
    row["30 steps ms"] = run(lambda **token: mesa_decode_step(**token, state=state, max_cg_iterations=30, cg_tol=0.0))
    row["GB/s"] = traffic / row["ms"] / 1e6
    packed = state.packed()
    row["packed ms"] = run(lambda **token: mesa_decode_step(**token, state=packed))
    row["packed GB/s"] = 2 * sum(h.nbytes for h in packed) / row["packed ms"] / 1e6
    pool = start_state(2 * B, H, D, args.device)
    rows = torch.randperm(2 * B, device=args.device)[:B]
    half = torch.where(torch.arange(B, device=args.device) % 2 == 0, rows, -1)
    row["pool ms"] = run(lambda **token: mesa_decode_step(**token, state=pool, state_indices=rows))
    row["half idle ms"] = run(lambda **token: mesa_decode_step(**token, state=pool, state_indices=half))
    row["floor ms"] = 1e3 * traffic / rate
    row["share of a copy"] = row["floor ms"] / row["ms"]
    source = torch.randn(traffic // 8, device=args.device)
    target = torch.empty_like(source)
    row["equal copy ms"] = run(lambda **token: target.copy_(source))
    if timer.cuda and import_fla():
        from fla.ops.mesa_net import mesa_net_decoding_one_step

        h_kk, h_kv = start_state(B, H, D, args.device)
        row["fla ms"] = run(lambda **token: mesa_net_decoding_one_step(**token, prev_h_kk=h_kk, prev_h_kv=h_kv))
    return row


@torch.no_grad()
def measure_piece(T, B, H, D, args, timer):
    """T tokens at once on top of a state: without states along the way, with one, and with all of them."""
    inputs = make_inputs(B, T, H, D, D, torch.bfloat16 if timer.cuda else torch.float32, args.device)
    inputs["initial_state"] = start_state(B, H, D, args.device)
    counts = torch.arange(T + 1, device=args.device).expand(B, -1).contiguous()

    def run(call):
        if not timer.cuda:
            return timer(call)
        replay = replayed(call)
        return timer(lambda: [replay() for _ in range(16)]) / 16

    def piece(**options):
        return run(lambda: mesa_attention(**inputs, output_final_state=True, **options))

    row = {"tokens": T, "ms": piece()}
    row["one state ms"], row["all states ms"] = piece(state_at=counts[:, T // 2]), piece(state_at=counts)
    if timer.cuda:  # by the kernels for longer calls, which keep the solution
        tensors = [inputs[name] for name in ("q", "k", "v", "g", "beta", "lamb")]
        chunked = torch.ops.mesa_ext.chunk_forward
        row["chunked ms"] = run(lambda: chunked(*tensors, *inputs["initial_state"], None, 30, 1e-3, True, True, False))
    return row


@torch.no_grad()
def measure_host(H, D, device):
    """The Python side of an eager call at batch 1, in microseconds."""
    token = {
        name: a[:, 0] if name != "lamb" else a for name, a in make_inputs(1, 1, H, D, D, torch.bfloat16, device).items()
    }
    state = start_state(1, H, D, device)
    out = torch.empty_like(token["v"])
    return {
        "eager_host_us": host_us(lambda: mesa_decode_step(**token, state=state)),
        "eager_host_us, out=": host_us(lambda: mesa_decode_step(**token, state=state, out=out)),
    }


def plot_batches(path, rows):
    """Milliseconds a step against the batch, for the first width of the table."""
    first = [row for row in rows if row["width"] == rows[0]["width"]]
    columns = {
        "mesa_ext": "ms",
        "mesa_ext, exactly 30 steps": "30 steps ms",
        "mesa_ext, packed state": "packed ms",
        "fla, 30 steps": "fla ms",
        "memory floor, full state": "floor ms",
    }
    lines = {name: [(row["batch"], row[key]) for row in first if row.get(key)] for name, key in columns.items()}
    plot_lines(path, lines, "batch", f"milliseconds a step ({first[0]['heads']} heads of {first[0]['width']})")


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batches", nargs="+", type=int)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--widths", nargs="+", type=int, default=[128, 64, 96, 32, 16])
    parser.add_argument("--pieces", nargs="*", type=int, default=[1, 2, 4, 8, 16], help="tokens of short pieces")
    parser.add_argument("--piece-batch", type=int, default=32)
    args = parser.parse_args()
    timer = Timer(
        args.device, args.repeats, flush=False
    )  # a decode loop finds its states where the last step left them
    print(", ".join(f"{name} {value}" for name, value in environment().items()))
    batches = args.batches or BATCHES[args.device]
    rate = copy_rate(args.device, timer)
    print(f"a copy moves {rate / 1e9:.0f} GB/s")
    rows = [measure(B, args.heads, D, rate, args, timer) for D in args.widths for B in batches]
    print_table("mesa_decode_step, milliseconds a token" + (", CUDA-graph replay" if timer.cuda else ""), rows)
    pieces = [measure_piece(T, args.piece_batch, args.heads, args.widths[0], args, timer) for T in args.pieces]
    if pieces:
        shape = args.piece_batch, args.widths[0]
        known = {(row["batch"], row["width"]): row["ms"] for row in rows}
        step = known.get(shape) or measure(shape[0], args.heads, shape[1], rate, args, timer)["ms"]
        for row in pieces:
            row["steps"] = row["ms"] / step
        print_table(f"Short pieces, batch {shape[0]}, width {shape[1]}, in steps of {step:.4g} ms", pieces)
    extra = {"copy_bytes_per_second": rate, "pieces": pieces}
    if timer.cuda:
        host = measure_host(args.heads, args.widths[0], args.device)
        print("\nPython side of an eager call: " + ", ".join(f"{name} {us:.1f}" for name, us in host.items()))
        extra |= host
    plot_batches(args.plot, rows)
    write_json(args.json, decode=rows, **extra)


if __name__ == "__main__":
    main()
