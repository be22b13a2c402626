"""What a run says in words: the block it starts with, the comparison it ends with, the model card.

Plain functions from values to text; printing is the caller's.
"""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Sample:
    """One held-out row: what was asked, what the base model and the adapted one answer, what was expected."""

    prompt: str
    base: str
    adapter: str
    expected: str


@dataclass(frozen=True)
class Comparison:
    """Base and adapted model on the held-out rows. Metrics by name: (base, adapter); rates in [0, 1]."""

    rows: int
    split: str
    metrics: dict[str, tuple[float, float]]
    samples: tuple[Sample, ...]
    right: tuple[bool, ...] = ()  # whether the adapted model's answer to each sample is the expected one


def heading(title: str) -> str:
    return f"\n── {title} " + "─" * max(4, 76 - len(title))


def marked(pieces: Sequence[tuple[str, bool]], colour: bool) -> str:
    """An example with the tokens that bear loss set off: in green on a terminal, between ⟦ ⟧ elsewhere."""
    opening, closing = ("\033[32m", "\033[0m") if colour else ("⟦", "⟧")
    text, inside = "", False
    for piece, bears_loss in pieces:
        if bears_loss != inside:
            text += opening if bears_loss else closing
            inside = bears_loss
        text += piece
    return text + (closing if inside else "")


def size(count: float) -> str:
    """Bytes as a person reads them."""
    if count >= 1e6:
        return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
    return f"{count / 1e3:.0f} kB"


def duration(seconds: float) -> str:
    if seconds < 180:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def comparison(result: Comparison, shown: int = 3) -> str:
    """The metrics before and after, and a few answers side by side."""
    lines = [heading(f"{result.rows} held-out rows ({result.split}): base → adapter")]
    lines += [
        f"{name:<16} {metric_value(name, before):>9} → {metric_value(name, after)}"
        for name, (before, after) in result.metrics.items()
    ]
    for sample in _telling(result.samples)[:shown]:
        lines += ["", f"  {_line(sample.prompt)}"]
        lines += [f"    base      {_line(sample.base)}", f"    adapter   {_line(sample.adapter)}"]
        lines += [f"    expected  {_line(sample.expected)}"]
    return "\n".join(lines)


def next_commands(folder: Path, prompt: str | None) -> str:
    """The commands to copy, for what people do next."""
    lorakit, where = _program(), shlex.quote(str(folder))
    lines = [f"  {lorakit} chat --model {where}", f"  {lorakit} merge --model {where} --output-dir {where}-merged"]
    if prompt is not None:
        lines.insert(0, f"  {lorakit} generate --model {where} --prompt {shlex.quote(prompt)}")
    else:
        lines[0] = f"  {lorakit} eval --model {where} --data test.jsonl"
    return "\n".join([heading("next"), *lines])


def _program() -> str:
    """How this program can be called again: by its name, or by its path where the name would not find it."""
    called, here = Path(sys.argv[0]), Path.cwd()
    called = called.relative_to(here) if called.is_relative_to(here) else called
    return shlex.quote(str(called)) if called.name == "lorakit" and not shutil.which("lorakit") else "lorakit"


def model_card(
    *,
    base_model: str,
    data: str,
    settings: dict[str, object],
    parameters: str,
    result: Comparison | None,
    seconds: float,
) -> str:
    """README.md of an output folder: what it is, how it was made, what it does, how to use it."""
    front = ["---", f"base_model: {base_model}", "library_name: peft", "tags: [lora, lorakit]", "---", ""]
    body = [
        f"# LoRA adapter for {Path(base_model).name}",
        "",
        f"Base model: `{base_model}`  ",
        f"Data: `{data}`  ",
        f"Training took {duration(seconds)}; {parameters}.",
        "",
        "## Use",
        "",
        "```python",
        "import lorakit",
        "from transformers import AutoModelForCausalLM",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("{base_model}")',
        'lorakit.load(model, "THIS_FOLDER")',
        "```",
        "",
        'The folder is PEFT\'s format: `PeftModel.from_pretrained(model, "THIS_FOLDER")` reads it too.',
        "",
    ]
    if result is not None:
        body += ["## Results", "", f"On {result.rows} held-out rows ({result.split}):", ""]
        body += ["| metric | base | adapter |", "|---|---|---|"]
        body += [
            f"| {n} | {metric_value(n, before)} | {metric_value(n, after)} |"
            for n, (before, after) in result.metrics.items()
        ]
        body += ["", "| asked | base | adapter | expected |", "|---|---|---|---|"]
        body += [
            "| " + " | ".join(_cell(text) for text in (s.prompt, s.base, s.adapter, s.expected)) + " |"
            for s in _telling(result.samples)[:5]
        ]
        body += [""]
    body += ["## Settings", "", "| setting | value |", "|---|---|"]
    body += [f"| {name} | {value} |" for name, value in settings.items()]
    return "\n".join([*front, *body]) + "\n"


def _telling(samples: Sequence[Sample]) -> list[Sample]:
    """Samples in which base and adapter differ come first: they show what was learnt."""
    return sorted(samples, key=lambda sample: sample.base.strip() == sample.adapter.strip())


def metric_value(name: str, value: float) -> str:
    """A rate as a percentage, anything else as a number."""
    return f"{value:.1%}" if name in ("exact match", "accuracy") else f"{value:.3f}"


def _line(text: str, width: int = 110) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= width else flat[: width - 1] + "…"


def _cell(text: str) -> str:
    return _line(text).replace("|", "\\|").replace("<", "&lt;")
