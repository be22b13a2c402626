"""`lorakit merge`: write base model and adapter as one plain model, and verify it by loading it back."""

from __future__ import annotations

import argparse

from ..core.errors import LoraError
from ..core.paths import expanded
from ..training.settings import UsageError, number_type
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
    parser.add_argument(
        "--shard-by-shard",
        action="store_true",
        help="merge the base's safetensors files one tensor at a time, without the model in memory; go on with a merge "
        "that was interrupted",
    )


def run(args: argparse.Namespace) -> None:
    from pathlib import Path

    from ..training.preflight import check_output
    from ..training.report import next_commands
    from ..training.task import model_task

    check_output(Path(args.output_dir))
    if args.shard_by_shard:
        _merge_files(args)
    else:
        _merge_in_memory(args)
    print(next_commands(Path(args.output_dir), answers=model_task(args.output_dir, None).answers, merge=False))


def _merge_in_memory(args: argparse.Namespace) -> None:
    from ..training.merging import merge_to_folder

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


def _merge_files(args: argparse.Namespace) -> None:
    from ..training.adapter_folder import base_and_adapter
    from ..training.merging_files import merge_files

    for flag in ("tolerance", "data", "quantize", "onto"):
        if getattr(args, flag) is not None:
            raise UsageError(
                f"--{flag} is for a model in memory, and --shard-by-shard has none. Leave one of them out."
            )
    base, adapter = base_and_adapter(args.model, args.adapter)
    if adapter is None:
        raise LoraError(f"{args.model} is a base model without an adapter; give --adapter FOLDER.")
    merged = merge_files(
        base, adapter, args.output_dir, dtype=None if args.dtype == "auto" else args.dtype, overwrite=args.overwrite
    )
    print(f"written: {args.output_dir}")
    for note in merged.notes:
        print(f"note: {note}")
    print(f"verified in the files: {merged}")
