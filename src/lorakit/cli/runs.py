"""`lorakit runs`: the runs of `lorakit train` in some folders, compared."""

from __future__ import annotations

import argparse

from ..core.paths import expanded

HELP = "list the runs in folders, with what they differ in and what they came to"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folders",
        nargs="*",
        metavar="FOLDER",
        type=expanded,
        help="runs, or folders with runs in them (default: the current one)",
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON instead of the table")


def run(args: argparse.Namespace) -> None:
    from ..training.runs import common_lines, runs_in, runs_json, runs_table
    from ..training.terminal import columns

    found = runs_in(args.folders or ["."])
    if args.json:
        print(runs_json(found), end="")
        return
    if common := common_lines(found):
        print("\n".join(common), end="\n\n")
    print("\n".join(runs_table(found).lines(columns(80))))
