"""`lorakit chat`: a conversation in the terminal, streamed."""

from __future__ import annotations

import argparse

from .generate import add_model_arguments, add_sampling_arguments

HELP = "talk with a model or an adapter in the terminal"

_COMMANDS = "/clear starts anew, /base switches the adapter off and on, /quit or Ctrl-D ends"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    add_sampling_arguments(parser)


def run(args: argparse.Namespace) -> None:
    import contextlib

    from ..core.attach import disabled
    from ..training.evaluate import Style
    from ..training.generation import stream
    from ..training.models import adapter_of, load_with_adapter
    from ..training.tokens import prompt_ids

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # line editing and history, where the platform has them

    loaded = load_with_adapter(args.model, args.adapter, dtype=args.dtype)
    style = Style.of_adapter(adapter_of(args.model, args.adapter), loaded.tokenizer, args.system)
    if not style.chat:
        print("(this model has no chat template: each line is continued as it stands, without the lines before it)")
    print(f"({_COMMANDS})")
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
        if said == "/base":
            base_only = not base_only
            print("(the base model answers)" if base_only else "(the adapter answers)")
            continue
        if said.startswith("/"):
            print(f"({_COMMANDS})")
            continue
        if not said:
            continue
        messages.append({"role": "user", "content": said})
        asked = messages if style.chat else said
        answer = ""
        ids = prompt_ids(asked, loaded.tokenizer, system=style.system, chat=style.chat)
        try:
            with disabled(loaded.model) if base_only else contextlib.nullcontext():
                for piece in stream(
                    loaded, ids, max_new_tokens=args.max_new_tokens, temperature=args.temperature, top_p=args.top_p
                ):
                    print(piece, end="", flush=True)
                    answer += piece
        except KeyboardInterrupt:
            print(" (stopped)", end="")  # Ctrl-C ends the answer, not the conversation
        print()
        messages.append({"role": "assistant", "content": answer})
