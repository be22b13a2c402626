"""`lorakit chat`: a conversation in the terminal, streamed."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ..core.errors import LoraError
from .generate import add_model_arguments, add_quantize_argument, add_sampling_arguments, tools_in

if TYPE_CHECKING:
    from ..training.chat import Tools
    from ..training.models import Loaded
    from ..training.style import Style

HELP = "talk with a model or an adapter in the terminal"

_COMMANDS = "/clear starts over, {}/quit or Ctrl-D ends"
_OF_AN_ADAPTER = "/base switches the adapter off and on, "
_OF_TOOLS = "/tool TEXT answers the assistant's call, "


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    add_quantize_argument(parser)
    add_sampling_arguments(parser)


def run(args: argparse.Namespace) -> None:
    import contextlib
    import shlex

    import torch

    from ..core.switching import disabled
    from ..training.adapter_folder import base_and_adapter
    from ..training.generation import room, stream
    from ..training.models import load_with_adapter
    from ..training.style import Style
    from ..training.task import model_task

    base, adapter = base_and_adapter(args.model, args.adapter)
    task = model_task(base, adapter)
    if not task.answers:
        put_in = f" --adapter {shlex.quote(args.adapter)}" if args.adapter else ""
        raise LoraError(
            f"{args.model} is {task} and does not talk. Ask it about a text: "
            f"lorakit generate --model {shlex.quote(args.model)}{put_in} --prompt TEXT"
        )
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # line editing and history, where the platform has them

    loaded = load_with_adapter(args.model, args.adapter, dtype=args.dtype, quantize=args.quantize)
    style = Style.recorded(adapter or base, loaded.tokenizer, system=args.system, plain=args.plain)
    if not style.chat:
        why = "was trained" if loaded.tokenizer.chat_template and not args.plain else "is asked"
        print(
            f"(the model {why} without a chat template: each line is continued on its own; earlier lines are not seen)"
        )
    tools = tools_in(args.tools, style)
    commands = f"({_COMMANDS.format((_OF_AN_ADAPTER if adapter else '') + (_OF_TOOLS if tools else ''))})"
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
        if said == "/base" and adapter:
            base_only = not base_only
            print("(the base model answers)" if base_only else "(the adapter answers)")
            continue
        role = "user"
        if tools and said.startswith("/tool "):
            role, said = "tool", said.removeprefix("/tool ").strip()
        elif said.startswith("/"):
            print(commands)
            continue
        if not said:
            continue
        asked = [*(messages if style.chat else ()), {"role": role, "content": said}]
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
                    print(piece, end="", flush=True)
                    answer += piece
        except KeyboardInterrupt:
            print(" (stopped)", end="")  # Ctrl-C ends the answer, not the conversation
        print()
        messages = [*asked, {"role": "assistant", "content": answer}]


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
