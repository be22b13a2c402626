"""`lorakit train`: from a data file to a checked adapter."""

from __future__ import annotations

import argparse

HELP = "train an adapter on a data file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from ..training.config import add_arguments

    add_arguments(parser)


def run(args: argparse.Namespace) -> None:
    from ..training.config import from_args

    config = from_args(args)
    from ..training.loop import train

    train(config)
