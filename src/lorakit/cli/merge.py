"""`lorakit merge`: write base model and adapter as one plain model, and verify it by loading it back."""

from __future__ import annotations

import argparse

from ..core.paths import expanded
from ..training.settings import number_type
from .generate import add_model_arguments, add_quantize_argument

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
        type=number_type(float, above=0),
        help="largest allowed difference of logits, relative to the largest logit (default by dtype)",
    )
    add_quantize_argument(parser)
    parser.add_argument(
        "--onto",
        choices=["original", "dequantised"],
        help="after training on a quantised base: merge onto its original weights, or onto the quantised ones as "
        "numbers (default: the nearer to base + adapter)",
    )
    parser.add_argument(
        "--data", type=expanded, help="rows to compare on (default: those that training held out, or random tokens)"
    )


def run(args: argparse.Namespace) -> None:
    from pathlib import Path

    from ..training.merging import merge_to_folder
    from ..training.preflight import check_output
    from ..training.report import next_commands
    from ..training.task import model_task

    check_output(Path(args.output_dir))
    merged = merge_to_folder(
        args.model,
        args.adapter,
        args.output_dir,
        dtype="base" if args.dtype == "auto" else args.dtype,
        quantize=args.quantize,
        onto=args.onto,
        data=args.data,
        overwrite=args.overwrite,
        tolerance=args.tolerance,
    )
    if merged.tried:
        print(f"against base + adapter as trained, on rows of {merged.rows}:")
        for onto, difference in merged.tried.items():
            print(f"  onto {onto}: {difference}" + (" (written)" if onto == merged.onto else ""))
    print(f"written: {args.output_dir} ({merged.dtype})")
    for note in merged.notes:
        print(f"note: {note}")
    print(f"verified by loading it back: {merged.difference}")
    print(next_commands(Path(args.output_dir), answers=model_task(args.output_dir, None).answers, merge=False))
