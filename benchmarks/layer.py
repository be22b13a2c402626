"""One adapted layer, forward and backward: time and kept bytes of lorakit, loralib and PEFT against the frozen layer.

    python benchmarks/layer.py        about two minutes on one thread

time: ratio to the floor, which is the frozen layer whose input needs a gradient. kept: bytes kept for the backward
pass, divided by the bytes of the input. Each library has its defaults: loralib's factors are in the weight's dtype,
those of PEFT and lorakit in float32. products alone: torch's eight products without autograd, dropout and casts,
divided by the frozen layer's two. It is the lower limit for code that computes the same products.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import measure
import torch
from torch import Tensor, nn

import lorakit

TOKENS, RANK, ALPHA = 1024, 16, 32
SHAPES = [(576, 576), (576, 1536), (2048, 2048)]
loralib, peft = measure.optional("loralib"), measure.optional("peft")


def variants(
    inputs: int, outputs: int, dtype: torch.dtype, dropout: float, rank: int = RANK, device: str = "cpu"
) -> dict[str, nn.Module]:
    """The frozen layer, and copies of it adapted by each installed library; alpha is twice the rank."""
    torch.manual_seed(0)
    floor = nn.Linear(inputs, outputs, device=device).to(dtype).requires_grad_(False)
    made = {"floor": floor}
    if loralib:
        theirs = loralib.Linear(inputs, outputs, r=rank, lora_alpha=2 * rank, lora_dropout=dropout)
        made["loralib"] = theirs.to(device, dtype)
    return {**made, **adapted(floor, dropout, rank)}


def adapted(floor: nn.Module, dropout: float, rank: int = RANK, dora: bool = False) -> dict[str, nn.Module]:
    """Copies of a frozen layer, adapted by lorakit and, if it is installed, by PEFT."""
    made = {}
    if peft:
        settings = dict(r=rank, lora_alpha=2 * rank, lora_dropout=dropout, use_dora=dora)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = peft.LoraConfig(target_modules=["0"], **settings)
            made["PEFT"] = peft.get_peft_model(nn.Sequential(copy.deepcopy(floor)), config).base_model.model
    mine = nn.Sequential(copy.deepcopy(floor))
    lorakit.attach(mine, "0", rank=rank, alpha=2 * rank, dropout=dropout, dora=dora)
    return {**made, "lorakit": mine}


def conv_variants(dtype: torch.dtype, dropout: float) -> dict[str, nn.Module]:
    """3 × 3 over 64 channels. loralib's factors give an update of three times the rank; its dropout does nothing."""
    torch.manual_seed(0)
    floor = nn.Conv2d(64, 64, 3, padding=1).to(dtype).requires_grad_(False)
    made: dict[str, nn.Module] = {"floor": floor}
    if loralib:
        theirs = loralib.Conv2d(64, 64, 3, r=RANK, lora_alpha=ALPHA, lora_dropout=dropout, padding=1)
        made["loralib"] = theirs.to(dtype)
    return {**made, **adapted(floor, dropout)}


def fused_variants(dtype: torch.dtype, dropout: float) -> dict[str, nn.Module]:
    """q and v of GPT-2's fused projection; PEFT adapts all of it or nothing."""
    torch.manual_seed(0)
    floor = nn.Linear(768, 2304).to(dtype).requires_grad_(False)
    arguments: dict[str, Any] = dict(r=RANK, lora_alpha=ALPHA, lora_dropout=dropout, enable_lora=[True, False, True])
    libraries = {"loralib": loralib, "lorakit": lorakit} if loralib else {"lorakit": lorakit}
    made = {name: library.MergedLinear(768, 2304, **arguments).to(dtype) for name, library in libraries.items()}
    return {"floor": floor, **made}


def training_steps(layers: dict[str, nn.Module], x: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Forward and backward through each layer, with an update that is not zero."""
    for layer in layers.values():
        for local, parameter in layer.named_parameters():
            if "lora_B" in local:
                nn.init.normal_(parameter)
    dy = torch.ones_like(layers["floor"](x))

    def step(layer: nn.Module) -> Tensor:
        x.grad = None
        y: Tensor = layer(x)
        y.backward(dy)
        return y

    return {key: partial(step, layer) for key, layer in layers.items()}


def bare_products(floor: nn.Linear, x: Tensor) -> dict[str, Callable[[], Any]]:
    """The two products of the frozen layer, and these with the six thin ones, both without autograd."""
    X, W = x.detach().flatten(0, -2), floor.weight
    A, B = torch.randn(RANK, X.shape[1]).to(x.dtype), torch.randn(len(W), RANK).to(x.dtype)
    dY = torch.randn(len(X), len(W)).to(x.dtype)

    def frozen() -> Any:
        return X @ W.T, dY @ W

    def adapted() -> Any:
        S, dS = X @ A.T, dY @ B
        return (S @ B.T).addmm_(X, W.T), (dS @ A).addmm_(dY, W), S.T @ dY, dS.T @ X

    return {"bare floor": frozen, "bare": adapted}


def row(name: str, layers: dict[str, nn.Module], x: Tensor, dropout: float) -> dict[str, Any]:
    x.requires_grad_()
    steps: dict[str, Callable[[], Any]] = training_steps(layers, x)
    floor = layers["floor"]
    if isinstance(floor, nn.Linear):
        steps |= bare_products(floor, x)
    times = measure.minima(steps)
    size = x.numel() * x.element_size()
    kept = {
        key: measure.kept_bytes(lambda own=layer: own(x), layer.parameters()) / size for key, layer in layers.items()
    }
    own = {key: round(times[key] / times["floor"], 3) for key in layers if key != "floor"}
    bare = {"time products alone": round(times["bare"] / times["bare floor"], 3)} if "bare" in times else {}
    return {
        "layer": name,
        "dtype": str(x.dtype).removeprefix("torch."),
        "dropout": str(dropout),
        **{f"time {key}": value for key, value in own.items()},
        **bare,
        **{f"kept {key}": round(kept[key], 3) for key in own},
    }


def shared_input(dtype: torch.dtype) -> dict[str, Any]:
    """q, k and v of SmolLM2: what it would save to stack their factors A, so that X is read only once."""
    X = torch.randn(TOKENS, 576).to(dtype)
    A = [torch.randn(RANK, 576).to(dtype) for _ in range(3)]
    dS = [torch.randn(TOKENS, RANK).to(dtype) for _ in range(3)]
    weights = [torch.randn(outputs, 576).to(dtype) for outputs in (576, 192, 192)]
    stacked_A, stacked_dS = torch.cat(A), torch.cat(dS, 1)
    dY = [torch.randn(TOKENS, len(weight)).to(dtype) for weight in weights]
    times = measure.minima(
        {
            "floor": lambda: [(X @ W.T, dy @ W) for W, dy in zip(weights, dY, strict=True)],
            "apart": lambda: [(X @ own.T, thin.T @ X) for own, thin in zip(A, dS, strict=True)],
            "stacked": lambda: (X @ stacked_A.T, stacked_dS.T @ X),
        }
    )
    saved = (times["apart"] - times["stacked"]) / times["floor"]
    return {
        "layer": "q, k and v, one input",
        "dtype": str(dtype).removeprefix("torch."),
        "stacking A would save": round(saved, 3),
    }


def cases(dtype: torch.dtype, dropout: float) -> Iterator[tuple[str, dict[str, nn.Module], Tensor]]:
    """Each layer's name, its variants, and an input."""
    for inputs, outputs in SHAPES:
        x = torch.randn(1, TOKENS, inputs).to(dtype)
        yield f"{inputs} → {outputs}", variants(inputs, outputs, dtype, dropout), x
    yield "768 → 2304, q and v", fused_variants(dtype, dropout), torch.randn(1, TOKENS, 768).to(dtype)
    floor = nn.Linear(576, 576).to(dtype).requires_grad_(False)
    layers = {"floor": floor, **adapted(floor, dropout, dora=True)}
    yield "576 → 576, DoRA", layers, torch.randn(1, TOKENS, 576).to(dtype)
    yield "conv 64 → 64, 3 × 3", conv_variants(dtype, dropout), torch.randn(8, 64, 28, 28).to(dtype)


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    for dtype in (torch.float32, torch.bfloat16) if measure.has_bfloat16() else (torch.float32,):
        for dropout in (0.0, 0.05):
            rows += [row(*case, dropout) for case in cases(dtype, dropout)]
        rows.append(shared_input(dtype))
    measure.print_table(rows)
    measure.write("layer", "python benchmarks/layer.py", rows)


if __name__ == "__main__":
    main()
