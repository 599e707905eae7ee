"""Shared by the benchmarks: inputs, timing, work counts and output."""

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from contextlib import contextmanager
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F

CHUNK = 64
# Ceilings measured on one H200: bf16 8192^3 matrix product, device-to-device copy.
PEAK_FLOPS = 783e12
PEAK_BYTES = 4179e9


# name -> (weight of a direction that all keys share, decay range, values a noisy linear map of the keys?, lamb or None
# for .25 + softplus(randn)). The condition number grows with T; at T = 4096 it is 8000 in the last two.
REGIMES = {
    "random, decay .9-.999": (0.0, (0.9, 0.999), False, None),
    "random, no decay": (0.0, (1.0, 1.0), False, 0.25),
    "lamb .02, decay .95-1": (0.0, (0.95, 1.0), False, 0.02),
    "corr .5, Wk, no decay": (0.5, (1.0, 1.0), True, 0.25),
    "corr .9, decay .99-1": (0.9, (0.99, 1.0), False, 0.25),
    "corr .9, no decay": (0.9, (1.0, 1.0), False, 0.17),
    "corr .9, Wk, no decay": (0.9, (1.0, 1.0), True, 0.17),
}
BENCH_REGIME = "random, decay .9-.999"


def make_inputs(B, T, H, K, V, dtype, device, regime=BENCH_REGIME, seed=0):
    """q, k, v, g, beta, lamb as keyword arguments; q and k of unit length, never zeros."""
    correlation, (low, high), linear_values, lamb = REGIMES[regime]
    generator = torch.Generator(device).manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, device=device)

    def rand(*shape):
        return torch.rand(*shape, generator=generator, device=device)

    k = F.normalize(randn(B, T, H, K), dim=-1)
    if correlation:
        common = F.normalize(randn(B, 1, H, K), dim=-1)
        k = F.normalize(correlation * common + (1 - correlation) * k, dim=-1)
    if linear_values:
        v = torch.einsum("bthk,bhkv->bthv", k, randn(B, H, K, V)) + 0.1 * randn(B, T, H, V)
    else:
        v = randn(B, T, H, V)
    return dict(
        q=F.normalize(randn(B, T, H, K), dim=-1).to(dtype),
        k=k.to(dtype),
        v=v.to(dtype),
        g=(low + (high - low) * rand(B, T, H)).log(),
        beta=rand(B, T, H),
        lamb=0.25 + F.softplus(randn(H, K)) if lamb is None else torch.full((H, K), lamb, device=device),
    )


def relative_error(actual, expected):
    """Norm of the difference over the norm of what is expected, in float64."""
    actual, expected = actual.double(), expected.double()
    return ((actual - expected).norm() / expected.norm()).item()


class Timer:
    """Median milliseconds of a call; on CUDA by events, with the L2 cache overwritten before every call."""

    def __init__(self, device, repeats=20, warmup=5, flush=True):
        self.device, self.repeats, self.warmup = torch.device(device), repeats, warmup
        self.cuda = self.device.type == "cuda"
        self.scratch = torch.empty(256 << 20, dtype=torch.int8, device=device) if self.cuda and flush else None

    def __call__(self, call):
        for _ in range(self.warmup):
            call()
        return statistics.median(self._once(call) for _ in range(self.repeats))

    def _once(self, call):
        if not self.cuda:
            start = time.perf_counter()
            call()
            return 1e3 * (time.perf_counter() - start)
        if self.scratch is not None:
            self.scratch.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)


def replayed(call):
    """A function that replays `call` as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def host_us(call, repeats=100):
    """Median microseconds until an eager call returns, its kernels still running."""
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        times.append(1e6 * (time.perf_counter() - start))
    torch.cuda.synchronize()
    return statistics.median(times)


def peak_memory(call, device):
    """Largest memory in MiB that a call holds beyond what was allocated before it; None on the CPU."""
    if torch.device(device).type != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def work(B, T, H, K, V, steps=6.0):
    """(flops, bytes) of forward and of backward, counted as in bench/NOTES.md."""
    chunk_heads = B * H * -(-T // CHUNK)
    width = (K + V) / 2
    unit = 2 * CHUNK * K * width
    tokens = 12 * CHUNK * width  # q, k, v, o in 16 bits, x in float32
    states = 10.4 * K * width  # G and H written and read, in two 16-bit terms where needed
    forward = chunk_heads * unit * (6 + 3 * steps), chunk_heads * (tokens + states)
    backward = chunk_heads * unit * (17 + 3 * steps), chunk_heads * (3 * tokens + 1.7 * states)
    return {"forward": forward, "backward": backward}


def floor_ms(*parts):
    """Milliseconds that the card's ceilings allow: the slower of products and memory, part after part."""
    return sum(1e3 * max(flops / PEAK_FLOPS, size / PEAK_BYTES) for flops, size in parts)


def kernel_paths(device):
    """The sets of chunked kernels that this device has; the one to use is asked for by MESA_EXT_KERNELS."""
    if torch.device(device).type != "cuda":
        return [None]
    return ["portable", "hopper"] if torch.cuda.get_device_capability()[0] == 9 else ["portable"]


@contextmanager
def using_kernels(path):
    """Asks for one of kernel_paths; None leaves the choice."""
    if path is None:
        yield
        return
    before = os.environ.get("MESA_EXT_KERNELS")
    os.environ["MESA_EXT_KERNELS"] = path
    try:
        yield
    finally:
        os.environ.pop("MESA_EXT_KERNELS") if before is None else os.environ.update(MESA_EXT_KERNELS=before)


def environment():
    """Where the figures come from."""
    found = {"date": date.today().isoformat(), "torch": torch.__version__, "python": platform.python_version()}
    if torch.cuda.is_available():
        found["device"] = torch.cuda.get_device_name()
        found["cuda"] = torch.version.cuda
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            found["driver"] = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
        except (OSError, subprocess.CalledProcessError, IndexError):
            found["driver"] = "unknown"
    else:
        found["device"] = f"CPU, {torch.get_num_threads()} threads"
    fla = import_fla()
    found["fla"] = fla.__version__ if fla else None
    return found


def import_fla():
    """The installed fla package, or None."""
    try:
        import fla
        import fla.ops.mesa_net

        return fla
    except ImportError:
        return None


def print_table(title, rows):
    """Rows are dictionaries; the columns are the keys in order of appearance."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_cell(row.get(column)) for column in columns] for row in rows]
    widths = [max(map(len, [column, *(line[i] for line in cells)])) for i, column in enumerate(columns)]
    print(f"\n{title}")
    for line in [columns, ["-" * width for width in widths], *cells]:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths)), flush=True)


def _cell(value):
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.2e}" if abs(value) < 1e-2 and value else f"{value:.4g}"
    return str(value)


def make_parser(doc):
    parser = argparse.ArgumentParser(description=doc.split("\n\n")[0])
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--plot", type=Path, help="draw them here (needs matplotlib)")
    parser.add_argument("--repeats", type=int, default=20, help="timed calls a figure, of which the median counts")
    return parser


def write_json(path, **content):
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"environment": environment(), **content}, indent=1) + "\n")


def plot_lines(path, lines, xlabel, ylabel):
    """`lines`: name -> list of (x, y); both axes logarithmic."""
    if not path:
        return
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name, points in lines.items():
        if points:
            axes.loglog(*zip(*sorted(points)), "o-", label=name)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
