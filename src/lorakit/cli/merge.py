"""`lorakit merge`: base model and adapter as one plain model, verified before it is called done."""

from __future__ import annotations

import argparse

from ..core.errors import LoraError
from ..core.paths import expanded
from ..training.settings import UsageError, number
from .generate import add_model_arguments

HELP = "fold an adapter into its base model and write a plain transformers folder"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser, dtype="auto: the base model's own")
    parser.add_argument(
        "--output-dir",
        "-o",
        required=True,
        type=expanded,
        help="folder to write: new, empty, or with --overwrite a merged model's",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the merged model in --output-dir")
    parser.add_argument(
        "--tolerance",
        type=number(float, above=0),
        help="largest difference of logits allowed, relative to their size (default by dtype)",
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
    from ..training.task import task_of

    check_output(Path(args.output_dir))
    if args.shard_by_shard:
        _merge_files(args)
    else:
        _merge_in_memory(args)
    print(next_commands(Path(args.output_dir), answers=task_of(args.output_dir, None).answers, merge=False))


def _merge_in_memory(args: argparse.Namespace) -> None:
    from ..training.merging import merge_to_folder

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


def _merge_files(args: argparse.Namespace) -> None:
    from ..training.adapter_folder import base_and_adapter
    from ..training.merging_files import merge_files

    if args.tolerance is not None:
        raise UsageError("--tolerance is for logits, and --shard-by-shard computes none. Leave one of them out.")
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
