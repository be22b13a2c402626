"""`lorakit merge`: base model and adapter as one plain model, verified before it is called done."""

from __future__ import annotations

import argparse

from ..training.settings import number
from .generate import add_model_arguments

HELP = "fold an adapter into its base model and write a plain transformers folder"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument(
        "--output-dir", "-o", required=True, help="folder to write: new, empty, or with --overwrite a merged model's"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the merged model in --output-dir")
    parser.add_argument(
        "--tolerance",
        type=number(float, above=0),
        help="largest difference of logits allowed, relative to their size (default by dtype)",
    )


def run(args: argparse.Namespace) -> None:
    from pathlib import Path

    from ..training.merging import merge_to_folder
    from ..training.preflight import check_output

    check_output(Path(args.output_dir))

    difference = merge_to_folder(
        args.model,
        args.adapter,
        args.output_dir,
        dtype=args.dtype,
        overwrite=args.overwrite,
        tolerance=args.tolerance,
    )
    print(f"written: {args.output_dir}")
    print(f"verified by loading it back: {difference}")
    print(f"next: lorakit chat --model {args.output_dir}")
