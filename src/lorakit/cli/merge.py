"""`lorakit merge`: write base model and adapter as one plain model, and verify it by loading it back."""

from __future__ import annotations

import argparse

from ..core.paths import expanded
from ..training.settings import number
from .generate import add_model_arguments

HELP = "fold an adapter into its base model and write a plain transformers folder"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser, dtype="auto: the base model's own")
    parser.add_argument(
        "--output-dir",
        "-o",
        required=True,
        type=expanded,
        help="folder to write: new or empty; with --overwrite it may hold a merged model",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the merged model in --output-dir")
    parser.add_argument(
        "--tolerance",
        type=number(float, above=0),
        help="largest allowed difference of logits, relative to the largest logit (default by dtype)",
    )


def run(args: argparse.Namespace) -> None:
    from pathlib import Path

    from ..training.merging import merge_to_folder
    from ..training.preflight import check_output
    from ..training.report import next_commands
    from ..training.task import task_of

    check_output(Path(args.output_dir))
    merged = merge_to_folder(
        args.model,
        args.adapter,
        args.output_dir,
        dtype="base" if args.dtype == "auto" else args.dtype,
        overwrite=args.overwrite,
        tolerance=args.tolerance,
    )
    print(f"written: {args.output_dir} ({merged.dtype})")
    for note in merged.notes:
        print(f"note: {note}")
    print(f"verified by loading it back: {merged.difference}")
    print(next_commands(Path(args.output_dir), answers=task_of(args.output_dir, None).answers, merge=False))
