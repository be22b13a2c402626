"""The flags that name a model and one or several adapters, for the verbs that answer or score."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from ..core.errors import LoraError
from ..training.adapter_names import named_path, use_of
from ..training.settings import UsageError

if TYPE_CHECKING:
    from collections.abc import Collection

    from ..bank.bank import Used


def add_adapters_argument(parser: argparse.ArgumentParser) -> None:
    """Add --adapter NAME=PATH, which may be given several times. Then --model is not required any more."""
    parser.add_argument(
        "--adapter",
        action=_Adapters,
        default=[],
        type=named_path_type,
        metavar="NAME=PATH",
        help="folder of an adapter to load into the base --model, and a name for it (default: the folder's). It may be "
        "given several times for adapters of one base; --model may then be left out",
    )


def use_from(text: str, names: Collection[str]) -> Used:
    """What --use means; the error names the flag."""
    try:
        return use_of(text, names)
    except LoraError as error:
        raise UsageError(f"--use: {error}") from None


def named_path_type(text: str) -> tuple[str, str]:
    """argparse's `type` of a path that may have a name: both."""
    try:
        return named_path(text)
    except LoraError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


class _Adapters(argparse.Action):
    """Collect the adapters. Their folders name the base, so argparse need not ask for --model."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: Any = None
    ) -> None:
        setattr(namespace, self.dest, [*getattr(namespace, self.dest), values])
        for action in parser._actions:
            if action.dest == "model":
                action.required = False
