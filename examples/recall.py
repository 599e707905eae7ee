"""Where solving pays: in-context regression and associative recall, with the solve and without it.

1. Regression, nothing trained: keys are inputs x, values are W x + noise, and after n pairs the operator is asked for
   fresh x. The Mesa layer answers with the ridge regression of the n pairs; linear attention with sum_i v_i (k_i' q),
   which is one gradient step (it gets the best possible scale for each n as a present).
2. Recall, trained: sequences of key-value pairs, then the keys again in another order; the model names their values.
   Same small model with and without the solve, same batches; then tested on fewer and on more pairs.

    python examples/recall.py               # about two minutes on two CPU cores
    python examples/recall.py --seeds 3
"""

import argparse
import json
import statistics
from pathlib import Path

import torch
import torch.nn.functional as F
from model import TokenModel, linear_attention, make_optimizer
from progress import Progress

from mesa_ext import mesa_attention

KINDS = ("mesa", "linear")
TRAINED_PAIRS = 24
TESTED_PAIRS = (8, 16, 24, 32, 48, 64)


def regression(seed, dim=32, pairs=128, tasks=64, noise=0.05):
    """Relative error of the prediction after n pairs, for both operators -> name -> [pairs]."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=generator)

    spread = torch.logspace(0, -1, dim)  # inputs vary ten times more along some directions than along others
    x, fresh = (F.normalize(spread * randn(tasks, pairs, 1, dim), dim=-1) for _ in range(2))
    weights = randn(tasks, dim, dim)
    y = torch.einsum("btnd,bde->btne", x, weights)
    v = y + noise * randn(*y.shape)
    wanted = torch.einsum("btnd,bde->btne", fresh, weights)
    g, beta = torch.zeros(tasks, pairs, 1), torch.ones(tasks, pairs, 1)
    lamb = torch.full((1, dim), noise**2)  # the variance of the noise over that of the weights: the best choice
    o, _, info = mesa_attention(fresh, x, v, g, beta, lamb, max_cg_iterations=100, return_solver_info=True)
    guess, _ = linear_attention(fresh, x, v, g, beta, torch.zeros(tasks, 1, dim, dim))
    scale = (guess * wanted).sum((0, 2, 3), keepdim=True) / guess.square().sum((0, 2, 3), keepdim=True)

    def error(prediction):
        return ((prediction - wanted).square().sum((0, 2, 3)) / wanted.square().sum((0, 2, 3))).sqrt().tolist()

    return {"mesa": error(o), "linear": error(scale * guess), "steps": info.steps.float().mean((0, 2)).tolist()}


def recall_batch(generator, batch, pairs, keys, values):
    """Tokens k1 v1 k2 v2 ... then keys alone, shuffled; the target at each of those is its value."""

    def shuffled(count, take):
        return torch.rand(batch, count, generator=generator).argsort(1)[:, :take]

    key = shuffled(keys, pairs)
    value = torch.randint(values, (batch, pairs), generator=generator)
    order = shuffled(pairs, pairs)
    told = torch.stack([key, keys + value], 2).flatten(1)
    return torch.cat([told, key.gather(1, order)], 1), value.gather(1, order)


def recall(seed, steps, device, keys=64, values=64, batch=32):
    """Trains both models on TRAINED_PAIRS -> name -> accuracy on new sequences of each of TESTED_PAIRS."""
    models, optimizers = {}, {}
    for kind in KINDS:
        torch.manual_seed(seed)
        models[kind] = TokenModel(kind, keys + values, width=64, heads=1, head_dim=32, depth=2).to(device)
        optimizers[kind] = make_optimizer(models[kind], 3e-3)
    generator = torch.Generator().manual_seed(seed)

    def answer(model, pairs, batch):
        tokens, targets = (a.to(device) for a in recall_batch(generator, batch, pairs, keys, values))
        return model(tokens)[0][:, 2 * pairs :, keys:], targets

    bar, recent = Progress(f"recall, seed {seed}"), {}
    for step in range(1, steps + 1):
        start = generator.get_state()
        for kind, model in models.items():
            generator.set_state(start)  # the same batch for both
            for group in optimizers[kind].param_groups:
                group["lr"] = 3e-3 * min(1, step / 30, 0.05 + 1.5 * (1 - step / steps))
            logits, targets = answer(model, TRAINED_PAIRS, batch)
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
            optimizers[kind].zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizers[kind].step()
            recent[kind] = loss.item()
        bar.update(step / steps, ", ".join(f"{kind} loss {value:.3f}" for kind, value in recent.items()))
    accuracy = {kind: [] for kind in KINDS}
    with torch.no_grad():
        for pairs in TESTED_PAIRS:
            start = generator.get_state()
            for kind, model in models.items():
                generator.set_state(start)
                logits, targets = answer(model, pairs, 64)
                accuracy[kind].append((logits.argmax(-1) == targets).float().mean().item())
    return accuracy


def plot(regressions, recalls, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    labels = {"mesa": "Mesa layer", "linear": "linear attention (no solve)"}
    for kind, color in zip(KINDS, ("tab:blue", "tab:orange")):
        for i, (errors, accuracy) in enumerate(zip(regressions, recalls)):
            label = labels[kind] if i == 0 else None
            left.semilogy(range(1, len(errors[kind]) + 1), errors[kind], color=color, label=label)
            right.plot(TESTED_PAIRS, [100 * a for a in accuracy[kind]], "o-", color=color, markersize=4, label=label)
    left.set(
        xlabel="pairs seen", ylabel="relative error of the prediction", title="in-context regression, 32 dimensions"
    )
    right.set(xlabel="pairs", ylabel="% of values right", title=f"associative recall, trained on {TRAINED_PAIRS} pairs")
    right.set_ylim(0, 100)
    for axes in (left, right):
        axes.legend()
    figure.savefig(path, dpi=120)


def mean_and_spread(values, form):
    text = format(statistics.fmean(values), form)
    return text + (f" +- {format(statistics.stdev(values), form)}" if len(values) > 1 else "")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=300, help="training steps of the recall task")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("demo_output"), help="folder for the picture and the numbers")
    args = parser.parse_args()

    regressions = [regression(seed) for seed in range(args.seeds)]
    print("in-context regression, 32 dimensions, 5 % noise: relative error of the prediction after n pairs")
    print("      n   Mesa layer        linear attention   solver steps")
    for n in (8, 16, 32, 64, 128):
        cells = [mean_and_spread([r[name][n - 1] for r in regressions], ".3f") for name in KINDS]
        steps = mean_and_spread([r["steps"][n - 1] for r in regressions], ".1f")
        print(f"    {n:>3}   {cells[0]:<17} {cells[1]:<18} {steps}")

    recalls = [recall(seed, args.steps, args.device) for seed in range(args.seeds)]
    print(f"associative recall, one head of 32, trained on {TRAINED_PAIRS} pairs: % of values right (chance: 1.6)")
    print("  pairs   Mesa layer        linear attention")
    for i, pairs in enumerate(TESTED_PAIRS):
        cells = [mean_and_spread([100 * r[kind][i] for r in recalls], ".1f") for kind in KINDS]
        print(f"    {pairs:>3}   {cells[0]:<17} {cells[1]}")

    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "recall.json").write_text(json.dumps({"regression": regressions, "recall": recalls}))
    try:
        plot(regressions, recalls, args.out / "recall.png")
        print(f"picture: {args.out / 'recall.png'}")
    except ImportError:
        print("no picture: matplotlib is not installed")


if __name__ == "__main__":
    main()
