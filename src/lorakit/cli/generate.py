"""`lorakit generate`: stream the answer to one prompt, or print what a classifier predicts for a text."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from ..core.errors import LoraError
from ..core.paths import expanded
from ..training.config import Quantize
from ..training.settings import UsageError, number_type
from .adapters import add_adapters_argument, use_from

if TYPE_CHECKING:
    from ..bank.bank import Used
    from ..training.several import Asking
    from ..training.style import Style
    from ..training.task import Task

HELP = "answer one prompt with a model or an adapter"

_CLASSES_SHOWN = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser, several=True)
    add_quantize_argument(parser)
    add_sampling_arguments(parser)
    parser.add_argument(
        "--prompt", "-p", required=True, help="what to ask, or the text to classify; - reads it from standard input"
    )
    parser.add_argument("--pair", metavar="TEXT", help="the second text, for a classifier of pairs")
    parser.add_argument("--base", action="store_true", help="answer with the base model, without the adapter")
    parser.add_argument(
        "--use",
        metavar="NAME",
        help="which of several adapters answers: a name, or a weighted sum such as fr=0.7,de=0.3, or none for the base "
        "model (default: each of them)",
    )


def add_model_arguments(
    parser: argparse.ArgumentParser, dtype: str = "auto: bfloat16 where it is fast", *, several: bool = False
) -> None:
    """Add the arguments that choose a model. dtype: the help's words for what `auto` means. several: of adapters."""
    parser.add_argument(
        "--model",
        "--model-name-or-path",
        required=True,
        type=expanded,
        help="an adapter's folder, or a base model (folder, .gguf, hub id)",
    )
    if several:
        add_adapters_argument(parser)
    else:
        parser.add_argument("--adapter", type=expanded, help="folder of an adapter to load into --model")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16", "float16"],
        help=f"dtype of the weights ({dtype})",
    )


def add_quantize_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--quantize",
        choices=get_args(Quantize),
        help="how to quantise the base model's weights (default: as in training)",
    )


def add_style_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say how a prompt is formatted. The defaults are the settings used in training."""
    parser.add_argument("--system", help="system message (default: the one used in training)")
    parser.add_argument(
        "--plain",
        action=argparse.BooleanOptionalAction,
        help="do not wrap the prompt in the chat template (default: as in training)",
    )


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say how to answer."""
    add_style_arguments(parser)
    parser.add_argument(
        "--tools", metavar="FILE", type=expanded, help="JSON file with the tools that may be called, as rows hold them"
    )
    parser.add_argument(
        "--max-new-tokens", type=number_type(int, at_least=1), default=256, help="longest answer in tokens"
    )
    parser.add_argument(
        "--temperature",
        type=number_type(float, at_least=0),
        default=0.0,
        help="sampling temperature; 0 always takes the likeliest token",
    )
    parser.add_argument(
        "--top-p",
        type=number_type(float, above=0, at_most=1),
        default=1.0,
        help="sample only from the likeliest tokens that together have this probability",
    )
    parser.add_argument(
        "--seed", type=number_type(int, at_least=0), help="random seed (default: a different one each time)"
    )


def tools_in(path: str | None, style: Style) -> tuple[dict[str, Any], ...]:
    """The tools of --tools; none without it."""
    from ..core.reading import text_of
    from ..training.conversations import BadRow, tools_of

    if path is None:
        return ()
    if not style.chat:
        raise UsageError("--tools: only a chat template prints tools, and this model is asked without one.")
    try:
        return tools_of(text_of(Path(path)))
    except BadRow as bad:
        raise LoraError(f"--tools {path}: {bad}") from None


def run(args: argparse.Namespace) -> None:
    import sys

    from ..training.adapter_names import shown_use
    from ..training.several import load_several, named_adapters, refuse_sum

    if args.base and args.use is not None:
        raise UsageError("--base answers with the base model, as --use none does. Leave one of them out.")
    named = named_adapters(args.model, args.adapter)
    use = use_from(args.use, named.folders) if args.use is not None else None
    chosen: list[Used] = [use] if args.base or args.use is not None else [*named.folders] or [None]
    task, who = named.task, args.model or args.adapter[0][1]
    prompt = sys.stdin.read().strip() if args.prompt == "-" else args.prompt
    if args.pair is not None and task.answers:
        raise UsageError(f"--pair is the second text for a classifier of pairs, and {who} is {task}.")
    if not task.answers and not prompt.strip():
        raise LoraError(f"--prompt is empty: {who} is {task} and needs a text.")
    if isinstance(use, Mapping):
        refuse_sum(named, use)
    several = load_several(named.only(chosen), dtype=args.dtype, quantize=args.quantize)
    for note in several.notes(chosen):
        print(f"note: {note}", file=sys.stderr)
    for used in chosen:
        if len(chosen) > 1:
            print(f"── {shown_use(used)}")
        several.bank.use(used)
        if used is None and named.folders and several.new_parameters and not task.answers:
            raise LoraError(f"--base: {named.base} has no trained head for {task}; only the adapter has one.")
        asking = several.asking(used, system=args.system, plain=args.plain)
        if task.answers:
            _stream(asking, prompt, args)
        else:
            print(_verdict(asking, task, prompt, args.pair))


def _stream(asking: Asking, prompt: str, args: argparse.Namespace) -> None:
    import sys

    import torch

    from ..training.generation import room, stream
    from ..training.terminal import streamed
    from ..training.tokens import prompt_ids

    loaded, style = asking.loaded, asking.style
    ids = prompt_ids(prompt, loaded.tokenizer, system=style.system, chat=style.chat, tools=tools_in(args.tools, style))
    if (limit := room(loaded, ids, args.max_new_tokens)) < args.max_new_tokens:
        print(f"note: the model has positions for an answer of {limit} tokens at most.", file=sys.stderr)
    if args.seed is not None:
        torch.manual_seed(args.seed)
    for piece in stream(loaded, ids, max_new_tokens=limit, temperature=args.temperature, top_p=args.top_p):
        print(streamed(piece), end="", flush=True)
    print()


def _verdict(asking: Asking, task: Task, text: str, pair: str | None) -> str:
    """The number that a regression predicts, or a line for each likely class: its name and its probability.

    Of a multi-label classifier these are all classes with a probability of at least 0.5.
    """
    from ..core.table import Table
    from ..training.data import Example
    from ..training.evaluate import outputs

    example = Example("--prompt", text=text, text_pair=pair)
    found = outputs(asking.loaded, [example], asking.max_length, "reading")[0]
    if not task.labels:
        return f"{float(found[0]):.4g}"
    if task.several:
        ranked = sorted(zip(found.sigmoid().tolist(), task.labels, strict=True), key=lambda one: -one[0])
        likely = tuple((label, f"{probability:6.1%}") for probability, label in ranked if probability >= 0.5)
        probability, label = ranked[0]
        return (
            "\n".join(Table((), likely).lines()) if likely else f"no class (the likeliest: {label} {probability:.1%})"
        )
    ranked = sorted(zip(found.softmax(-1).tolist(), task.labels, strict=True), key=lambda one: -one[0])
    shown = ((label, f"{probability:6.1%}") for probability, label in ranked[:_CLASSES_SHOWN])
    lines = Table((), tuple(shown)).lines()
    if len(ranked) > _CLASSES_SHOWN:
        rest = sum(probability for probability, _ in ranked[_CLASSES_SHOWN:])
        lines.append(f"({len(ranked) - _CLASSES_SHOWN} more classes: {rest:.1%})")
    return "\n".join(lines)
