"""`lorakit chat`: a conversation in the terminal, streamed."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ..core.errors import LoraError
from .generate import add_model_arguments, add_quantize_argument, add_sampling_arguments

if TYPE_CHECKING:
    from ..training.models import Loaded
    from ..training.style import Style

HELP = "talk with a model or an adapter in the terminal"

_COMMANDS = "/clear starts over, {}/quit or Ctrl-D ends"
_OF_AN_ADAPTER = "/base switches the adapter off and on, "
_OF_SEVERAL = "/use NAME chooses who answers: {}, none (the base), or a sum such as {}; "


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser, several=True)
    add_quantize_argument(parser)
    add_sampling_arguments(parser)


def run(args: argparse.Namespace) -> None:
    import contextlib
    import shlex

    import torch

    from ..core.switching import disabled
    from ..training.adapter_names import shown_path, shown_use, use_of
    from ..training.generation import room, stream
    from ..training.several import load_several, named_adapters

    named = named_adapters(args.model, args.adapter)
    names = list(named.folders)
    if not named.task.answers:
        own = [f"--model {shlex.quote(args.model)}"] if args.model else []
        own += [f"--adapter {shlex.quote(shown_path(*given))}" for given in args.adapter]
        raise LoraError(
            f"{args.model or args.adapter[0][1]} is {named.task} and does not talk. Ask it about a text: "
            f"lorakit generate {' '.join(own)} --prompt TEXT"
        )
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # line editing and history, where the platform has them

    several = load_several(named, dtype=args.dtype, quantize=args.quantize)
    asking = several.asking(names[0] if names else None, system=args.system, plain=args.plain)
    loaded, style = asking.loaded, asking.style
    if not style.chat:
        why = "was trained" if loaded.tokenizer.chat_template and not args.plain else "is asked"
        print(
            f"(the model {why} without a chat template: each line is continued on its own; earlier lines are not seen)"
        )
    for note in several.notes(names):
        print(f"({note})")
    of_several = _OF_SEVERAL.format(", ".join(names), ",".join(f"{name}=0.5" for name in names[:2]))
    commands = f"({_COMMANDS.format((_OF_AN_ADAPTER if names else '') + (of_several if args.adapter else ''))})"
    print(commands)
    if args.seed is not None:
        torch.manual_seed(args.seed)
    messages: list[dict[str, str]] = []
    base_only = False
    while True:
        try:
            said = input("\n> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if said in ("/quit", "/exit"):
            return
        if said == "/clear":
            messages = []
            continue
        if args.adapter and (said == "/use" or said.startswith("/use ")):
            try:
                used = use_of(said.removeprefix("/use"), names)
                several.bank.use(used)
            except LoraError as problem:
                print(f"({problem})")
                continue
            base_only = False
            if used is not None:  # the base model is asked as the adapter before it
                asking = several.asking(used, system=args.system, plain=args.plain)
                loaded, style = asking.loaded, asking.style
            print("(the base model answers)" if used is None else f"({shown_use(used)} answers)")
            for note in several.notes([used]):
                print(f"({note})")
            continue
        if said == "/base" and names:
            base_only = not base_only and several.bank.used is not None
            print("(the base model answers)" if base_only or several.bank.used is None else "(the adapter answers)")
            continue
        if said.startswith("/"):
            print(commands)
            continue
        if not said:
            continue
        asked = [*(messages if style.chat else ()), {"role": "user", "content": said}]
        whole = len(asked)
        try:
            asked, ids = _fitting(asked, loaded, style, args.max_new_tokens)
            limit = room(loaded, ids, args.max_new_tokens)
        except ValueError as problem:
            print(f"({problem})")
            continue
        if (left := whole - len(asked)) > 0:
            print(f"(the conversation is longer than the model's positions: its {left} oldest messages are forgotten)")
        answer = ""
        try:
            with disabled(loaded.model) if base_only else contextlib.nullcontext():
                for piece in stream(loaded, ids, max_new_tokens=limit, temperature=args.temperature, top_p=args.top_p):
                    print(piece, end="", flush=True)
                    answer += piece
        except KeyboardInterrupt:
            print(" (stopped)", end="")  # Ctrl-C ends the answer, not the conversation
        print()
        messages = [*asked, {"role": "assistant", "content": answer}]


def _fitting(
    messages: list[dict[str, str]], loaded: Loaded, style: Style, wanted: int
) -> tuple[list[dict[str, str]], list[int]]:
    """The newest messages that leave room for an answer, and their token ids. The last message is always kept.

    The room is `wanted` tokens, or half of the model's positions if that is less.
    """
    from ..training.positions import positions
    from ..training.tokens import prompt_ids

    limit = positions(loaded.model, loaded.tokenizer)
    while True:
        asked = messages if style.chat else messages[-1]["content"]
        ids = prompt_ids(asked, loaded.tokenizer, system=style.system, chat=style.chat)
        if limit is None or len(messages) == 1 or len(ids) + min(wanted, limit // 2) <= limit:
            return messages, ids
        messages = messages[2:]  # a question with its answer
