"""The table of docs/bases.md: what happens to each class of base, found by doing it.

python docs/bases.py            write it (it needs what the tests need)
python docs/bases.py --check    say whether it is right (exit code 1: it is not)

Each base is adapted, trained for a few steps, merged, saved, loaded again by lorakit, and read by PEFT.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import page_tables
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import lorakit

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
PAGE = ROOT / "docs" / "bases.md"
_STEPS = (1e-5, 1e-3, 1e-1)  # an error is shown as the smallest of these that it is under


class Row(NamedTuple):
    """make: a fresh model with the same weights on each call. x: its input. targets: what is adapted. real: whether the
    library itself runs. peft: whether PEFT is asked.
    """

    name: str
    make: Callable[[], Any]
    x: Callable[[], Tensor]
    targets: Any = "all-linear"
    real: bool = True
    peft: bool = True


def _numbers(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(shape, generator=torch.Generator().manual_seed(1))


def _tokens() -> Tensor:
    return torch.arange(24).view(2, 12)


def _one(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(make(), nn.Tanh(), nn.Flatten(), nn.LazyLinear(8))

    def called() -> nn.Module:
        made = model()
        made(_INPUTS[make]())
        return made

    return called


_INPUTS: dict[Any, Callable[[], Tensor]] = {}


def _layer(name: str, make: Callable[[], nn.Module], x: Callable[[], Tensor], peft: bool = True) -> Row:
    _INPUTS[make] = x
    return Row(name, _one(make), x, targets=["0"], peft=peft)


def rows() -> list[Row]:
    from accelerate import hooks

    import models
    import quantised

    class Falcon(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight.T + (0 if self.bias is None else self.bias)

    def lazy() -> nn.Module:
        layer = nn.LazyLinear(32)
        layer(torch.randn(2, 64))
        return layer

    def gpt2() -> Any:
        model: Any = models.gpt2()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        return model

    def spread() -> Any:
        model: Any = models.llama()
        hooks.attach_execution_device_hook(model, torch.device("cpu"))
        return model

    flat, image = _numbers(6, 64), _numbers(2, 3, 8, 8)
    found = [
        _layer("nn.Linear", lambda: nn.Linear(64, 32), flat),
        _layer("nn.Embedding", lambda: nn.Embedding(32, 16), lambda: _tokens()),
        _layer("nn.Conv2d", lambda: nn.Conv2d(3, 6, 3), image),
        Row("transformers' Conv1D (GPT-2)", gpt2, _tokens, targets=["c_attn", "c_proj", "c_fc"]),
        Row("several experts in one parameter (Qwen3-MoE)", models.qwen_moe, _tokens, "all-linear+experts", peft=False),
        _layer("a subclass with a forward of its own (Falcon)", lambda: Falcon(64, 32), flat),
        _layer("nn.LazyLinear after its first call", lazy, flat),
        _layer(
            "weight_norm (parametrisation)", lambda: parametrizations.weight_norm(nn.Linear(64, 32)), flat, peft=False
        ),
        Row("a device_map over several devices (accelerate)", spread, _tokens),
    ]
    return found + [
        Row(base.name, base.model, flat, targets=["0", "2"], real=base.real, peft=base.real) for base in quantised.BASES
    ]


def _output(model: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = model(x)
    found: Tensor = y if isinstance(y, Tensor) else y.logits
    return found


def _trained(model: Any, x: Tensor) -> bool:
    """Whether the loss falls. The factors are afterwards not zero."""
    optimizer = torch.optim.Adam(lorakit.parameters(model), 2e-2)
    losses = []
    for _ in range(12):
        y = model(x)
        loss = (y if isinstance(y, Tensor) else y.logits).float().sub(1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses[-1] < losses[0]


def _merged(model: Any, x: Tensor, expected: Tensor) -> str:
    how = ""
    try:
        lorakit.merge(model)
    except lorakit.LoraError as error:
        if "dequantize" not in str(error):
            return "refused"
        how = "dequantised, "
        lorakit.dequantize(model)
        lorakit.merge(model)
    off = float((_output(model, x) - expected).abs().max() / expected.abs().max())
    return how + next((f"under {step:g}" for step in _STEPS if off < step), f"{off:.0e}")


def _by_peft(row: Row, folder: str, expected: Tensor) -> str:
    import peft

    if not row.peft:
        return "not tried"
    with contextlib.suppress(ValueError):
        theirs = peft.PeftModel.from_pretrained(row.make(), folder).train(True)
        for module in theirs.modules():
            module.training = True  # bitsandbytes computes with other weights in eval()
        same = torch.allclose(_output(theirs, row.x()), expected, atol=1e-4)
        return "the same" if same else "differs"
    return "refused"


def cells(row: Row) -> list[str]:
    """The row of the table."""
    model, x = row.make().train(), row.x()
    report = lorakit.attach(model, row.targets, rank=4)
    kinds = sorted({type(layer) for layer in lorakit.adapted_layers(model).values()}, key=lambda kind: kind.__name__)
    beside = any(issubclass(kind, lorakit.Beside) for kind in kinds)
    learns = _trained(model, x)
    expected = _output(model, x)
    with tempfile.TemporaryDirectory() as folder:
        lorakit.save(model, folder)
        again = row.make().train()
        lorakit.load(again, folder)
        same = torch.equal(_output(again, x), expected)
        by_peft = _by_peft(row, folder, expected)
    assert report.rows
    where = "beside" if beside else "in the product"
    words = [row.name if row.real else f"{row.name}, a double", where, "yes" if learns else "no"]
    return [*words, _merged(model, x, expected), "the same" if same else "differs", by_peft]


def table() -> str:
    head = ["base", "the update is", "learns", "merged: error", "saved and loaded", "read by PEFT"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries
        lines = [head, ["---"] * len(head), *map(cells, rows())]
    return "\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    return page_tables.main(PAGE, "bases", table, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
