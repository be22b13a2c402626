"""`lorakit check`: the data and the plan of a run, without loading weights or writing anything."""

from __future__ import annotations

import argparse

HELP = "check the data and plan a run, without training"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from ..training.config import TrainConfig
    from ..training.settings import add_setting_flags

    add_setting_flags(TrainConfig, parser)


def run(args: argparse.Namespace) -> None:
    from ..training.config import TrainConfig
    from ..training.settings import from_args

    if not hasattr(args, "output_dir"):
        args.output_dir = "-"  # nothing is written, so no folder is needed
    config = from_args(TrainConfig, args)
    from ..training.preflight import refuse_large_run
    from ..training.prepare import prepare
    from ..training.quiet import quiet_libraries
    from ..training.start_block import start_block

    with quiet_libraries():
        prepared = prepare(config)
    print(start_block(prepared, printed=True))
    refuse_large_run(prepared)
