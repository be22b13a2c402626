"""Why a loss is NaN or infinite, and whether training made a model worse: the errors of a run that failed.

A loss that is NaN or infinite has one of three causes, which a check of the model tells apart:

    a weight of the base model is NaN or infinite   the file is damaged, or its dtype is too narrow
    a row causes it even without the adapter        the row's label or its text is wrong
    neither                                         the factors have diverged: the learning rate is too high
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..core.evaluating import evaluating
from ..core.switching import disabled
from .changes import together, weight_changes

Batch = dict[str, Any]
LossOf = Callable[[Batch], Tensor]  # the mean loss of a batch
When = Literal["at the end", "on the way"]

# Training lowers the loss of the rows that it has just seen. A run has diverged if their loss is above a times the base
# model's plus b. On the way a loss may rise for some steps and fall again, so a and b are larger there: a model of
# language that knows nothing has a loss of about 11, one that learns has 1 to 4.
_WORSE: dict[When, tuple[float, float]] = {"at the end": (1.05, 0.05), "on the way": (2.0, 1.0)}
# ‖ΔW‖/‖W‖ over all adapted weights. It is about 0.01 after a usual training run, and 15 for a model of a few thousand
# random weights that learns twelve rows by heart.
_RUN_AWAY = 1e4
_NAMED = 5


class Diverged(FloatingPointError):
    """The error of a run whose loss or weights became NaN, infinite, or much worse than the base model's."""


def why_no_number(
    model: nn.Module,
    batch: Batch,
    loss: float,
    loss_of: LossOf,
    name_of: Callable[[Batch], str],
    step: int,
    rate: float,
) -> Diverged:
    """The error that says why the loss of `batch` is NaN or infinite at `step`.

    loss_of: the mean loss of a batch. name_of: where the row of a one-row batch comes from.
    """
    said = f"the loss is {loss} at step {step}"
    broken = _not_finite(model, trained=False)
    rows = _rows_of(batch)
    with torch.no_grad(), disabled(model), evaluating(model):
        bad = [row for row in rows if not torch.isfinite(loss_of(row)).all()]
    if broken:
        met = f" This step met it in: {_listed(bad, name_of)}." if bad else ""
        return Diverged(
            f"{said}: the base model has weights that are NaN or infinite, whatever the learning rate: "
            f"{_names(broken)}.{met} Load another copy of it, or another --dtype."
        )
    if bad:
        return Diverged(
            f"{said}, with the adapter switched off too. These rows make it so: {_listed(bad, name_of)}. "
            "Mend them or leave them out."
        )
    return too_high(said, rate, f" The step's rows: {_listed(rows, name_of)}.")


def too_high(said: str, rate: float, more: str = "") -> Diverged:
    """The error for factors that have diverged."""
    return Diverged(f"{said}. The learning rate is probably too high (now {rate:g}); try a tenth of it.{more}")


def refuse_diverged(
    model: nn.Module,
    batches: Sequence[Batch],
    loss_of: LossOf,
    name_of: Callable[[Batch], str],
    rate: float,
    step: int,
    *,
    when: When = "at the end",
) -> tuple[float, float]:
    """The loss of the last batches without and with the adapter. Raises Diverged if the adapter makes it worse.

    Weights that are further from the base model's than training can usefully take them also count as divergence.
    name_of: where the row of a one-row batch comes from. when: on the way more is allowed.
    """
    change = relative_change(model)

    def met() -> str:
        return f" The last step's rows: {_listed(_rows_of(batches[-1]), name_of)}." if batches else ""

    if not change <= _RUN_AWAY:
        raise too_high(f"the run has diverged after {step} steps: ‖ΔW‖ is {change:.3g} times ‖W‖", rate, met())
    with torch.no_grad(), evaluating(model):
        after = _mean(loss_of(batch) for batch in batches)
        with disabled(model):
            before = _mean(loss_of(batch) for batch in batches)
    factor, more = _WORSE[when]
    if not after <= before * factor + more:
        raise too_high(
            f"the run has diverged after {step} steps: on the rows of its last steps the loss is {after:.4g} with the "
            f"adapter and {before:.4g} without it (‖ΔW‖ is {change:.3g} times ‖W‖)",
            rate,
            met(),
        )
    return before, after


def refuse_broken_factors(model: nn.Module, rate: float, step: int) -> None:
    """Raise Diverged if a trained parameter holds NaN or infinite numbers."""
    if broken := _not_finite(model, trained=True):
        raise too_high(f"{_names(broken)} after step {step}: NaN or infinite", rate)


def relative_change(model: nn.Module) -> float:
    """‖ΔW‖ / ‖W‖ over all adapted weights together."""
    return together("", weight_changes(model)).ratio


def _not_finite(model: nn.Module, trained: bool) -> list[str]:
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad == trained and not torch.isfinite(parameter).all()
    ]


def _rows_of(batch: Batch) -> list[Batch]:
    """The rows of a batch, each as a batch of one row."""
    count = len(batch["labels"])
    return [
        {key: value[i : i + 1] if isinstance(value, Tensor) else value for key, value in batch.items()}
        for i in range(count)
    ]


def _listed(rows: Sequence[Batch], name_of: Callable[[Batch], str]) -> str:
    more = f" and {len(rows) - _NAMED} more" if len(rows) > _NAMED else ""
    return ", ".join(name_of(row) for row in rows[:_NAMED]) + more


def _names(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")


def _mean(losses: Any) -> float:
    found = [float(loss.mean()) for loss in losses]
    return sum(found) / len(found) if found else 0.0
