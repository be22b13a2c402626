"""`lorakit compare`: run methods × seeds × tasks on the user's model and data."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ..core.paths import expanded
from ..training.quiet import quiet_libraries

if TYPE_CHECKING:
    from ..study.comparison.config import CompareConfig

HELP = "compare LoRA with full fine-tuning, adapters, prefixes and others on your data"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from ..study.comparison.config import CompareConfig
    from ..training.settings import add_setting_flags

    parser.add_argument("file", nargs="?", type=expanded, help="YAML file with settings, same as --config")
    parser.add_argument("--json", action="store_true", help="print everything as JSON instead of the tables")
    add_setting_flags(CompareConfig, parser)


def run(args: argparse.Namespace) -> None:
    from ..study.comparison.config import config_of
    from ..training.settings import UsageError

    if args.file and args.config:
        raise UsageError(f"two files of settings, {args.file} and {args.config}; give one.")
    args.config = args.file or args.config
    _compare(config_of(args), as_json=args.json)


@quiet_libraries()
def _compare(config: CompareConfig, *, as_json: bool) -> None:
    from ..formats.folder import OutputFolder
    from ..study.comparison import table
    from ..study.comparison.files import COMPARISON, comparison_record, refuse_other, write_results
    from ..study.comparison.plan import plan_block, plans_of, refuse_large_comparison
    from ..study.comparison.processes import OwnProcess
    from ..study.comparison.results import Ledger
    from ..study.comparison.run import RUNS, compare
    from ..study.comparison.time_left import TimeLeft
    from ..training.preflight import check_output
    from ..training.settings import to_yaml
    from ..training.terminal import to_width

    out = OutputFolder(config.output_dir, COMPARISON)
    check_output(out.path)
    out.refuse_unusable()
    plans = plans_of(config)
    record = comparison_record(config.model, plans)
    refuse_other(out, record)
    if not as_json or config.dry_run:
        left = TimeLeft(plans, config.seeds, config.trials, Ledger(out.path / RUNS))
        print(plan_block(config, plans, left), flush=True)
    if not config.so_far:
        refuse_large_comparison(config, plans)
    if config.dry_run:
        return
    with out.held():
        out.begin(record)
        if not config.so_far:  # config.yaml holds the settings of the folder's runs, and --so-far makes no run
            with out.writing() as part:
                (part / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
        found = compare(
            config.model,
            plans,
            out.path,
            seeds=config.seeds,
            trials=config.trials,
            so_far=config.so_far,
            runner=OwnProcess(),
            one_pass=config.one_pass,
        )
        with out.writing() as part:
            names = [path.name for path in write_results(found, part)]
        out.end("finished" if found.finished else "unfinished")
    print(table.as_json(found) if as_json else table.tables_text(found), end="" if as_json else "\n")
    if not as_json:
        print("\n" + to_width(f"written: {', '.join(str(out.path / name) for name in names)}"))
