"""`lorakit chat`: a conversation in the terminal, streamed."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.errors import LoraError
from ..core.paths import expanded
from .generate import add_model_arguments, add_quantize_argument, add_sampling_arguments, tools_in

if TYPE_CHECKING:
    from ..training.chat import Tools
    from ..training.models import Loaded
    from ..training.style import Style

HELP = "talk with a model or an adapter in the terminal"

_COMMANDS = {
    "/clear": "starts over",
    "/retry": "answers the last question again",
    "/system TEXT": "sets the system message",
    "/save FILE": "adds the conversation to a .jsonl file, as a row to train on",
    "/base": "switches the adapter off and on",
    "/use NAME": "chooses who answers: {}, none (the base), or a sum such as {}",
    "/tool TEXT": "answers the assistant's call",
    '"""': "begins and ends a message of several lines",
    "/quit": "or Ctrl-D ends",
}
_QUOTES = '"""'


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
    from ..training.terminal import streamed, to_width

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
    tools = tools_in(args.tools, style)
    if args.seed is not None:
        torch.manual_seed(args.seed)
    has = {"/base": bool(names), "/use NAME": bool(args.adapter), "/tool TEXT": bool(tools)}
    said_of = ", ".join(names), ",".join(f"{name}=0.5" for name in names[:2])
    commands = {name: what.format(*said_of) for name, what in _COMMANDS.items() if has.get(name, True)}
    listed = "\n".join(f"  {name:<14}{what}" for name, what in commands.items())
    hints = ["/help lists the commands"]
    hints += [f"{name} {what}" for name, what in commands.items() if name in ("/base", "/tool TEXT")]
    print(to_width(f"({', '.join(hints)}, /quit ends)"))
    messages: list[dict[str, str]] = []
    base_only = False
    while True:
        try:
            said = _read()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        command, _, rest = said.partition(" ")
        rest = rest.strip()
        if command in ("/quit", "/exit"):
            return
        if command == "/clear":
            messages = []
            continue
        if command == "/use" and args.adapter:
            try:
                used = use_of(rest, names)
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
        if command == "/base" and names:
            base_only = not base_only and several.bank.used is not None
            print("(the base model answers)" if base_only or several.bank.used is None else "(the adapter answers)")
            continue
        if command == "/system":
            style = _with_system(style, rest)
            continue
        if command == "/save":
            _save(messages, style, rest)
            continue
        role, earlier = "user", messages
        if command == "/retry":
            if not messages:
                print("(there is no question yet)")
                continue
            (role, said), earlier = (messages[-2][key] for key in ("role", "content")), messages[:-2]
        elif command == "/tool" and tools:
            role, said = "tool", rest
        elif said.startswith("/"):
            print(listed)
            continue
        if not said:
            continue
        asked = [*(earlier if style.chat else ()), {"role": role, "content": said}]
        whole = len(asked)
        try:
            asked, ids = _fitting(asked, loaded, style, tools, args.max_new_tokens)
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
                    print(streamed(piece), end="", flush=True)
                    answer += piece
        except KeyboardInterrupt:
            print(" (stopped)", end="")  # Ctrl-C ends the answer, not the conversation
        print()
        messages = [*asked, {"role": "assistant", "content": answer}]


def _read() -> str:
    """One message of the user. Between two lines with three quotes it may have several lines."""
    said = input("\n> ").strip()
    if not said.startswith(_QUOTES):
        return said
    lines = [said.removeprefix(_QUOTES)]
    while not lines[-1].rstrip().endswith(_QUOTES):
        lines.append(input("  "))
    lines[-1] = lines[-1].rstrip().removesuffix(_QUOTES)
    return "\n".join(lines).strip("\n")


def _with_system(style: Style, text: str) -> Style:
    """The style with this system message; without a text, it is only shown."""
    if not style.chat:
        print("(without a chat template there is no system message)")
    elif text:
        style = dataclasses.replace(style, system=text)
        print("(the system message is set; /clear starts over)")
    else:
        print(f"(the system message: {style.system})" if style.system else "(there is no system message)")
    return style


def _save(messages: Sequence[dict[str, str]], style: Style, name: str) -> None:
    """Add the conversation to a .jsonl file as a row of `messages`, or say why it is not done."""
    path = Path(expanded(name))
    if not messages:
        print("(there is nothing to save yet)")
    elif path.suffix != ".jsonl":
        print("(name a file that ends in .jsonl: /save chat.jsonl)")
    else:
        system = [{"role": "system", "content": style.system}] if style.system else []
        row = json.dumps({"messages": [*system, *messages]}, ensure_ascii=False)
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(row + "\n")
        except OSError as problem:
            print(f"({path}: {problem.strerror})")
        else:
            print(f"(added to {path}: {len(messages)} messages)")


def _fitting(
    messages: list[dict[str, str]], loaded: Loaded, style: Style, tools: Tools, wanted: int
) -> tuple[list[dict[str, str]], list[int]]:
    """The newest messages that leave room for an answer, and their token ids. The last message is always kept.

    The room is `wanted` tokens, or half of the model's positions if that is less.
    """
    from ..training.positions import positions
    from ..training.tokens import prompt_ids

    limit = positions(loaded.model, loaded.tokenizer)
    while True:
        asked = messages if style.chat else messages[-1]["content"]
        ids = prompt_ids(asked, loaded.tokenizer, system=style.system, chat=style.chat, tools=tools)
        if limit is None or len(messages) == 1 or len(ids) + min(wanted, limit // 2) <= limit:
            return messages, ids
        messages = messages[2:]  # a question with its answer
