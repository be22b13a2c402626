"""`lorakit train --fit 24GB`: the first settings, in a fixed order, whose planned memory is within a size.

    1. as given
    2. half the batch and twice the accumulation, down to one row: a step has the same rows, so training is the same
    3. gradient checkpointing, which takes more time, again from the whole batch down
    4. nf4, which changes the weights that are trained on, again from the whole batch down

What a flag or a file gives stays as it is. If a given batch does not fit, the error names the largest one that does. A
run that is resumed keeps what was chosen when it began, because less may be free now. Several processes take the choice
of the first one.
"""

from __future__ import annotations

import bisect
import dataclasses
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from typing import Any

from ..core.errors import LoraError
from ..core.numbers import size, size_in
from .config import TrainConfig, is_given
from .memory import free_memory_of
from .models import best_device
from .plan import Plan
from .preflight import sharing, ways_to_need_less
from .processes import of_main

_CHOSEN = ("batch_size", "gradient_accumulation_steps", "gradient_checkpointing", "quantize")
_BATCH = {"batch_size", "gradient_accumulation_steps"}  # one is not changed without the other


def fitted(
    config: TrainConfig,
    plan_with: Callable[[TrainConfig], Plan],
    *,
    given: TrainConfig,
    can_checkpoint: bool,
    can_quantise: bool,
    begun: Mapping[str, Any] | None,
) -> tuple[TrainConfig, Plan, tuple[str, ...]]:
    """The settings without --fit and with what it chose; their plan; lines that say what was chosen and why.

    given: the settings as the user gave them. can_checkpoint, can_quantise: whether model and task allow it. begun: the
    settings of the run that this one goes on with. Raises LoraError if nothing fits, or if memory cannot be planned.
    """
    assert config.fit is not None
    limit = of_main(_limit(config.fit))
    free = {name for name in _CHOSEN if not is_given(given, name)}
    config = dataclasses.replace(config, fit=None)
    if begun is not None:
        own = dataclasses.replace(config, **{name: begun[name] for name in free & begun.keys()})
        plan = plan_with(own)
        needed = _needed(plan)
        than = f", more than the {size(limit)} of now" if needed > limit else ""
        return own, plan, (f"--fit: as the run was begun, {_said(own)}: {size(needed)}{than}",)
    with_nf4 = can_quantise and config.quantize == "none" and "quantize" in free
    installed = importlib.util.find_spec("bitsandbytes") is not None
    if not can_checkpoint:
        free -= {"gradient_checkpointing"}
    tried: list[tuple[int, TrainConfig]] = []
    lines: list[str] = []
    for own in _in_order(config, free, with_nf4 and installed):
        plan = plan_with(own)
        needed = _needed(plan)
        if tried:
            before, last = tried[-1]
            comma = "," if "," in _said(last) else ""
            need = "needs" if last.batch_size == 1 else "need"
            lines.append(f"{_said(last)}{comma} {need} {size(before)}; {_said(own)}: {size(needed)}")
        tried.append((needed, own))
        if needed <= limit:
            lines = lines or [f"{_said(own)}: {size(needed)}; nothing is changed"]
            return own, plan, (f"fitted into {size(limit)}:", *lines)
    least, smallest = min(tried, key=lambda one: one[0])
    ways = ways_to_need_less(smallest)
    if with_nf4 and not installed:
        ways.insert(0, "nf4 (pip install 'lorakit[quantize]')")
    kept = [f"--{name.replace('_', '-')}" for name in _CHOSEN if is_given(given, name)]
    stays = f" {', '.join(kept)} {'was' if len(kept) == 1 else 'were'} given and not changed." if kept else ""
    if not free >= _BATCH:
        stays += _would_fit([own for _, own in tried], lambda own: _needed(plan_with(own)), limit)
    raise LoraError(
        f"--fit {given.fit}: no plan is within {size(limit)}. The smallest, {_said(smallest)}, needs about "
        f"{size(least)}.{stays} Less is needed with {', '.join(ways[:-1])} or {ways[-1]}."
    )


def _limit(text: str) -> int:
    if text != "auto":
        return size_in(text)
    found = free_memory_of(best_device())
    if not found:
        raise LoraError("--fit auto: this system does not say how much memory it has. Give a size, such as --fit 24GB.")
    return found


def _needed(plan: Plan) -> int:
    peak = of_main(plan.peak_bytes)
    if peak is None:
        raise LoraError(
            f"--fit: the memory of this run cannot be planned ({plan.unplanned}). Leave --fit out, and choose "
            "--batch-size yourself."
        )
    return peak * sharing()


def _in_order(config: TrainConfig, free: Set[str], with_nf4: bool) -> Iterator[TrainConfig]:
    """The settings to try, those that cost least first."""

    def batches(own: TrainConfig) -> Iterator[TrainConfig]:
        yield own
        while own.batch_size % 2 == 0 and free >= _BATCH:
            own = dataclasses.replace(
                own,
                batch_size=own.batch_size // 2,
                gradient_accumulation_steps=2 * own.gradient_accumulation_steps,
            )
            yield own

    yield from batches(config)
    if "gradient_checkpointing" in free and not config.gradient_checkpointing:
        config = dataclasses.replace(config, gradient_checkpointing=True)
        yield from batches(config)
    if with_nf4:
        yield from batches(dataclasses.replace(config, quantize="nf4"))


def _would_fit(tried: Sequence[TrainConfig], needed: Callable[[TrainConfig], int], limit: int) -> str:
    """A sentence on the largest batch with which a step of as many rows fits, of the first settings that allow one."""
    for own in tried:
        rows = own.batch_size * own.gradient_accumulation_steps
        fewer = [
            dataclasses.replace(own, batch_size=batch, gradient_accumulation_steps=rows // batch)
            for batch in range(1, own.batch_size)
            if rows % batch == 0
        ]
        if count := bisect.bisect_right(fewer, limit, key=needed):
            most = fewer[count - 1]
            flags = f"--batch-size {most.batch_size} --gradient-accumulation-steps {most.gradient_accumulation_steps}"
            return f" It fits with {flags}, and a step has the same rows ({_said(most)}: {size(needed(most))})."
    return ""


def _said(config: TrainConfig) -> str:
    """8 rows at once; 8 rows at once with nf4; 4 rows, twice; 1 row, 8 times, with gradient checkpointing and nf4."""
    times = config.gradient_accumulation_steps
    rows = "1 row" if config.batch_size == 1 else f"{config.batch_size} rows"
    often = " at once" if times == 1 else ", twice" if times == 2 else f", {times} times"
    ways = ["gradient checkpointing"] if config.gradient_checkpointing else []
    ways += [config.quantize] if config.quantize != "none" else []
    comma = "" if times == 1 else ","
    return rows + often + (f"{comma} with {' and '.join(ways)}" if ways else "")
