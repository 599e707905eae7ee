"""Trains a small Mesa language model on the sources of Python's standard library, beside plain linear attention.

Both models have the same parameters, start from the same seed and see the same batches; the only difference is that
the Mesa layer solves (H + Lambda) x = q where linear attention takes x = q. Prints the held-out loss in bits per byte
and a sample written through the decode step, and draws both loss curves and the solver's steps.

    python examples/demo.py                 # about two minutes on two CPU cores; takes a CUDA device if there is one
    python examples/demo.py --seeds 3       # three runs, mean and spread
"""

import argparse
import json
import math
import statistics
import sysconfig
import time
import zlib
from pathlib import Path

import torch
import torch.nn.functional as F
from model import TokenModel, make_optimizer
from progress import Progress

KINDS = ("mesa", "linear")
LN2 = math.log(2)
CONFIGS = {
    "cpu": dict(width=128, heads=4, head_dim=32, depth=2, batch=8, length=256, learning_rate=4e-3),
    "cuda": dict(width=512, heads=4, head_dim=128, depth=4, batch=32, length=1024, learning_rate=1.5e-3),
}
SHAPE = ("width", "heads", "head_dim", "depth")
HELD_OUT_SHARE = 20  # one file in twenty


def load_text():
    """The standard library's own .py files as (training bytes, held-out bytes), split by file."""
    root = Path(sysconfig.get_path("stdlib"))
    skip = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    files = sorted(p for p in root.rglob("*.py") if not skip & set(p.relative_to(root).parts))
    parts = {True: [], False: []}
    for path in files:
        name = path.relative_to(root).as_posix()
        parts[zlib.crc32(name.encode()) % HELD_OUT_SHARE == 0].append(path.read_bytes())
    if not parts[True] or not parts[False]:
        raise SystemExit(f"no Python sources under {root}: this Python comes without its standard library's text")
    train, held_out = (torch.frombuffer(bytearray(b"\n".join(parts[h])), dtype=torch.uint8) for h in (False, True))
    print(
        f"text: {len(files)} files under {root}, {len(train) / 1e6:.1f} MB to train on, "
        f"{len(held_out) / 1e6:.2f} MB held out"
    )
    return train, held_out


def windows(text, starts, length, device):
    """Inputs and targets [B, length] from `starts` on."""
    index = starts.unsqueeze(1) + torch.arange(length + 1)
    batch = text[index].long().to(device)
    return batch[:, :-1], batch[:, 1:]


def bits_per_byte(model, batch, autocast):
    tokens, targets = batch
    with autocast():
        logits, _ = model(tokens)
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten()) / LN2


@torch.no_grad()
def evaluate(model, batches, autocast):
    return statistics.fmean(bits_per_byte(model, batch, autocast).item() for batch in batches)


def schedule(step, progress):
    """Share of the learning rate: up over twenty steps, then a cosine down to a tenth."""
    return min((step + 1) / 20, 0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


def run(seed, text, config, device, steps, minutes):
    """Trains both models on the same batches, in turns, for `steps` or `minutes` -> models, curves and times."""
    train, held_out = text
    length, batch = config["length"], config["batch"]
    shape = {name: config[name] for name in SHAPE}

    def autocast():
        return torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda")

    models, optimizers = {}, {}
    for kind in KINDS:
        torch.manual_seed(seed)
        models[kind] = TokenModel(kind, 256, **shape).to(device)
        optimizers[kind] = make_optimizer(models[kind], config["learning_rate"])
    generator = torch.Generator().manual_seed(seed)
    grid = torch.linspace(0, len(held_out) - length - 1, 8 * batch).long()
    test = [windows(held_out, starts, length, device) for starts in grid.split(batch)]

    seconds = dict.fromkeys(KINDS, 0.0)
    curves = {kind: {"train": [], "held_out": []} for kind in KINDS}
    solver_steps = []
    bar, began = Progress(f"seed {seed}"), time.monotonic()
    step, progress = 0, 0.0
    while progress < 1:
        data = windows(train, torch.randint(len(train) - length, (batch,), generator=generator), length, device)
        for kind, model in models.items():
            start = time.monotonic()
            for group in optimizers[kind].param_groups:
                group["lr"] = config["learning_rate"] * schedule(step, progress)
            loss = bits_per_byte(model, data, autocast)
            optimizers[kind].zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizers[kind].step()
            curves[kind]["train"].append(loss.item())
            seconds[kind] += time.monotonic() - start
        step += 1
        # A tenth of the time is for evaluation, the sample and the picture.
        last, progress = progress, min(1, step / steps if steps else (time.monotonic() - began) / (0.9 * 60 * minutes))
        recent = ", ".join(f"{kind} {statistics.fmean(curves[kind]['train'][-10:]):.2f}" for kind in KINDS)
        bar.update(progress, f"step {step}: {recent} bits/byte")
        if int(5 * progress) > int(5 * last):
            for kind, model in models.items():
                curves[kind]["held_out"].append((step, evaluate(model, test, autocast)))
            with autocast():
                solver_steps.append((step, models["mesa"].solver_steps(test[0][0])))
    return {"models": models, "curves": curves, "solver_steps": solver_steps, "steps": step, "seconds": seconds}


def sample(model, device, seed):
    prompt = b"import os\n\n\ndef "
    tokens = torch.tensor([list(prompt)], device=device)
    generator = torch.Generator().manual_seed(seed)
    written = model.generate(tokens, 240, generator=generator)[0].tolist()
    return (prompt + bytes(written)).decode("utf-8", "replace")


def plot(runs, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for kind, color in zip(KINDS, ("tab:blue", "tab:orange")):
        for i, result in enumerate(runs):
            train, held_out = result["curves"][kind]["train"], result["curves"][kind]["held_out"]
            width = max(1, len(train) // 50)
            smooth = [statistics.fmean(train[max(0, j - width) : j + 1]) for j in range(len(train))]
            left.plot(range(1, len(train) + 1), smooth, color=color, alpha=0.4, linewidth=1)
            label = {"mesa": "Mesa layer", "linear": "linear attention (no solve)"}[kind] if i == 0 else None
            left.plot(*zip(*held_out), "o-", color=color, markersize=4, label=label)
    left.set(xlabel="training step", ylabel="bits per byte", title="loss (dots: held out)")
    left.set_ylim(top=min(6, left.get_ylim()[1]))
    left.legend()
    for i, result in enumerate(runs):
        steps, means = zip(*result["solver_steps"])
        for layer, values in enumerate(zip(*means)):
            right.plot(
                steps, values, "o-", color=f"C{layer}", markersize=4, label=f"layer {layer + 1}" if i == 0 else None
            )
    right.set(xlabel="training step", ylabel="mean steps per token", title="conjugate-gradient steps to the tolerance")
    right.set_xlim(left=0)
    right.set_ylim(0, 1.2 * right.get_ylim()[1])
    right.legend()
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seeds", type=int, default=1, help="number of runs")
    parser.add_argument("--minutes", type=float, default=2.0, help="time for one run of both models")
    parser.add_argument("--steps", type=int, help="training steps, instead of as many as --minutes allows")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("demo_output"), help="folder for the picture and the numbers")
    args = parser.parse_args()

    device = torch.device(args.device)
    config = CONFIGS[device.type]
    text = load_text()
    model = TokenModel("mesa", 256, **{name: config[name] for name in SHAPE})
    size = sum(p.numel() for p in model.parameters())
    print(
        f"model: {config['depth']} layers of {config['heads']} heads of {config['head_dim']}, "
        f"{size / 1e6:.2f} M parameters; "
        f"batches of {config['batch']} x {config['length']} bytes on {device}"
        + (
            f" ({torch.get_num_threads()} threads)"
            if device.type == "cpu"
            else f" ({torch.cuda.get_device_name(device)})"
        )
    )
    runs = []
    for seed in range(args.seeds):  # the first run's clock sets the number of steps of all
        steps = runs[0]["steps"] if runs else args.steps
        runs.append(run(seed, text, config, device, steps, args.minutes))

    print(f"\nwritten by the Mesa model (seed 0), one decode step a byte:\n{'-' * 60}")
    print(sample(runs[0]["models"]["mesa"], device, 0))
    print("-" * 60)
    summary = {"device": str(device), "config": config, "runs": []}
    finals = {kind: [result["curves"][kind]["held_out"][-1][1] for result in runs] for kind in KINDS}
    for kind, values in finals.items():
        spread = f" +- {statistics.stdev(values):.3f} over {len(values)} seeds" if len(values) > 1 else ""
        pace = statistics.fmean(result["seconds"][kind] / result["steps"] for result in runs)
        print(f"{kind:>7}: {statistics.fmean(values):.3f}{spread} bits per byte held out, {1e3 * pace:.0f} ms a step")
    gaps = [linear - mesa for mesa, linear in zip(finals["mesa"], finals["linear"])]
    spread = f" +- {statistics.stdev(gaps):.3f}" if len(gaps) > 1 else ""
    print(f"solving gains {statistics.fmean(gaps):+.3f}{spread} bits per byte after {runs[0]['steps']} steps")
    means = ", ".join(f"{value:.1f}" for value in runs[0]["solver_steps"][-1][1])
    print(f"solver steps per token at the end, layer by layer: {means}")

    args.out.mkdir(parents=True, exist_ok=True)
    for result in runs:
        summary["runs"].append({name: result[name] for name in ("steps", "seconds", "curves", "solver_steps")})
    (args.out / "demo.json").write_text(json.dumps(summary))
    try:
        plot(runs, args.out / "demo.png")
        print(f"picture: {args.out / 'demo.png'}")
    except ImportError:
        print("no picture: matplotlib is not installed")


if __name__ == "__main__":
    main()
