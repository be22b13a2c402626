"""`lorakit export`: write an adapter as another program reads it, after asking whether that program can."""

from __future__ import annotations

import argparse

from ..core.paths import expanded

HELP = "write an adapter for vLLM, SGLang or llama.cpp, and check that they can read it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", type=expanded, help="an adapter's folder (PEFT's format)")
    parser.add_argument("--target", required=True, choices=["vllm", "sglang", "llama.cpp"], help="what is to read it")
    parser.add_argument(
        "--output-dir",
        "-o",
        required=True,
        type=expanded,
        help="folder to write: new or empty; with --overwrite it may hold an earlier export",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the export in --output-dir")


def run(args: argparse.Namespace) -> None:
    from ..training.exporting import export, next_command

    exported = export(args.adapter, args.target, args.output_dir, overwrite=args.overwrite)
    print(f"written: {args.output_dir}")
    print(
        f"one rank ({exported.rank}), one scale ({exported.scale:g}): {exported.changed} of {exported.updates} modules "
        "had others; the update is the same"
    )
    print(f"\nnext\n  {next_command(exported, args.target, args.output_dir)}")
