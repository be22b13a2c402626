"""`lorakit generate`: the answer to one prompt, streamed."""

from __future__ import annotations

import argparse

from ..training.settings import number

HELP = "answer one prompt with a model or an adapter"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    add_sampling_arguments(parser)
    parser.add_argument("--prompt", "-p", required=True, help="what to ask; - reads it from standard input")
    parser.add_argument("--base", action="store_true", help="answer with the base model, without the adapter")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that say which model, for every verb that uses one."""
    parser.add_argument(
        "--model",
        "--model-name-or-path",
        required=True,
        help="an adapter's folder, or a base model (folder, .gguf, hub id)",
    )
    parser.add_argument("--adapter", help="an adapter's folder to put into --model")
    parser.add_argument(
        "--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"], help="of the weights"
    )


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that say how to answer."""
    parser.add_argument("--system", help="system message (default: the one used in training)")
    parser.add_argument("--max-new-tokens", type=number(int, at_least=1), default=256, help="longest answer")
    parser.add_argument(
        "--temperature", type=number(float, at_least=0), default=0.0, help="0 always takes the likeliest token"
    )
    parser.add_argument(
        "--top-p", type=number(float, above=0, at_most=1), default=1.0, help="sample from this share of the probability"
    )


def run(args: argparse.Namespace) -> None:
    import contextlib
    import sys

    from ..core.attach import disabled
    from ..training.evaluate import Style
    from ..training.generation import stream
    from ..training.models import adapter_of, load_with_adapter
    from ..training.tokens import prompt_ids

    adapter = adapter_of(args.model, args.adapter)
    loaded = load_with_adapter(args.model, args.adapter, dtype=args.dtype)
    style = Style.of_adapter(adapter, loaded.tokenizer, args.system)
    prompt = sys.stdin.read().strip() if args.prompt == "-" else args.prompt
    ids = prompt_ids(prompt, loaded.tokenizer, system=style.system, chat=style.chat)
    with disabled(loaded.model) if args.base else contextlib.nullcontext():
        for piece in stream(
            loaded, ids, max_new_tokens=args.max_new_tokens, temperature=args.temperature, top_p=args.top_p
        ):
            print(piece, end="", flush=True)
    print()
