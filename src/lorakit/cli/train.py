"""`lorakit train`: from a data file to a checked adapter."""

from __future__ import annotations

import argparse

HELP = "train an adapter on a data file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from ..training.config import TrainConfig
    from ..training.settings import add_setting_flags

    add_setting_flags(TrainConfig, parser)


def run(args: argparse.Namespace) -> None:
    from ..training.config import TrainConfig
    from ..training.settings import from_args

    config = from_args(TrainConfig, args)
    from ..training.loop import train

    train(config)
