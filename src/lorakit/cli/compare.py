"""`lorakit compare`: methods × seeds × tasks on a model and data of the user's."""

from __future__ import annotations

import argparse

HELP = "compare LoRA with full fine-tuning, adapters, prefixes and others on your data"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from ..study.comparison.config import CompareConfig
    from ..training.settings import add_arguments

    parser.add_argument("file", nargs="?", help="YAML file with settings, as --config")
    parser.add_argument("--json", action="store_true", help="print everything as JSON instead of the tables")
    add_arguments(CompareConfig, parser)


def run(args: argparse.Namespace) -> None:
    from ..study.comparison.config import config_of
    from ..training.settings import UsageError

    if args.file and args.config:
        raise UsageError(f"two files of settings, {args.file} and {args.config}; give one.")
    args.config = args.file or args.config
    config = config_of(args)
    from pathlib import Path

    from ..formats.files import replacing
    from ..study.comparison import table
    from ..study.comparison.files import write
    from ..study.comparison.plan import plan_block, plans_of
    from ..study.comparison.run import compare
    from ..training.loop import quiet_libraries
    from ..training.preflight import check_output
    from ..training.settings import to_yaml

    out = Path(config.output_dir)
    check_output(out)
    quiet_libraries()
    plans = plans_of(config)
    if not args.json or config.dry_run:
        print(plan_block(config, plans), flush=True)
    if config.dry_run:
        return
    out.mkdir(parents=True, exist_ok=True)
    if not config.so_far:  # the folder's settings are those that its runs are made with
        with replacing(out / "config.yaml") as path:
            path.write_text(to_yaml(config), encoding="utf-8")
    found = compare(config.model, plans, out, seeds=config.seeds, trials=config.trials, so_far=config.so_far)
    written = write(found, out)
    print(table.as_json(found) if args.json else table.text(found), end="" if args.json else "\n")
    if not args.json:
        print(f"\nwritten: {', '.join(map(str, written))}")
