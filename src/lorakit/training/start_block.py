"""What a person reads before training, of a run that was prepared."""

from __future__ import annotations

from ..core.numbers import size
from . import report
from .auto_settings import AutoSearch
from .config import TrainConfig, warnings_for
from .labels import MULTI_LABEL
from .models import best_device
from .plan import Plan, processes
from .prepare import Prepared, weights_dtype
from .terminal import takes_colours, to_width
from .tokens import encode_all, preview


def start_block(prepared: Prepared, *, printed: bool = False) -> str:
    """What a person reads before training: the data, one row with its loss-bearing tokens, the model, the plan.

    printed: in the width of the terminal and with its colours; otherwise as a page holds it.
    """
    config, data, plan = prepared.config, prepared.data, prepared.plan
    splits = {"train": data.train, "valid": data.valid, "test": data.test}
    counts = ", ".join(f"{name} {len(rows)}" for name, rows in splits.items() if rows)
    each = " for each adapter" if prepared.learners else ""

    def sentences(*lines: str) -> list[str]:
        return [to_width(line) for line in lines] if printed else [*lines]

    lines = [
        report.heading("data", printed),
        *sentences(
            f"{config.data}: {data.shape}; rows: {counts}; {prepared.tokens:,} tokens to train on",
            *prepared.notes,
            *(f"warning: {warning}" for warning in warnings_for(config)),
        ),
        "",
        *_example_lines(prepared, printed),
        report.heading("model", printed),
        *sentences(f"{config.model}: {_weights(prepared)} on {best_device()}"),
        *([f"goes on with the adapter {config.from_adapter}"] if config.from_adapter else []),
        str(prepared.attached),
        report.heading("plan", printed),
        *sentences(
            f"{plan.steps} steps of {_rows_a_step(config)} rows{each}, {plan.tokens:,} tokens; "
            f"learning rate {_rate(prepared)}, {config.scheduler}; seed {config.seed}",
            *prepared.fit,
            f"{_memory(plan)}; the time is told after the first steps of training",
        ),
    ]
    if prepared.search is not None:
        lines += [report.heading("search", printed), *sentences(*_search_lines(prepared, prepared.search))]
    return "\n".join(lines)


def _rate(prepared: Prepared) -> str:
    searched = prepared.search is not None and "learning_rate" in prepared.search.axes
    return "searched" if searched else f"{prepared.config.learning_rate:g}"


def _search_lines(prepared: Prepared, search: AutoSearch) -> list[str]:
    adapters = "1 adapter" if search.at_once == 1 else f"{search.at_once} adapters"
    searched = " and ".join(name.replace("_", " ") for name in search.axes)
    return [
        f"{searched}: begins with {search.name(search.start)}, and goes to what has a lower loss on the "
        f"{len(prepared.valid)} held-out rows; budget {search.budget.text}",
        f"memory is planned for {adapters} of rank {search.largest} at a time",
    ]


def _weights(prepared: Prepared) -> str:
    dtype = weights_dtype(prepared.config, prepared.data)
    packed, plain = prepared.weights
    if packed == plain:
        return dtype
    how = "quantised" if prepared.config.quantize == "none" else f"in {prepared.config.quantize}"
    return f"linear layers {how}, the rest in {dtype}; {size(packed)} of weights, {size(plain)} with all in {dtype}"


def _rows_a_step(config: TrainConfig) -> int:
    return config.batch_size * config.gradient_accumulation_steps * processes()


def _memory(plan: Plan) -> str:
    if plan.peak_bytes is None:
        return f"memory not planned ({plan.unplanned})"
    each = " in each process" if processes() > 1 else ""
    return f"about {size(plan.peak_bytes)} of memory{each} at the peak of training"


def _example_lines(prepared: Prepared, printed: bool) -> list[str]:
    if prepared.data.task != "causal-lm":
        several = "any number of: " if prepared.data.task == MULTI_LABEL else ""
        return [f"predicts: {several}{', '.join(prepared.data.labels) or 'a number'}"]
    config, style = prepared.config, prepared.style
    rows = encode_all(
        prepared.data.train[:1],
        prepared.tokenizer,
        max_length=config.max_seq_length,
        too_long="truncate",
        system=style.system,
        chat=style.chat,
    ).rows
    coloured = printed and takes_colours()
    how = "in green" if coloured else "between ⟦ ⟧"
    said = f"one row as the model reads it; it learns to write what is {how}, the rest is masked out of the loss:"
    return [to_width(said) if printed else said] + [
        report.marked(preview(row, prepared.tokenizer), coloured) for row in rows
    ]
