"""`lorakit analyze`: what an adapter did to the weights, alone or beside another adapter."""

from __future__ import annotations

import argparse

HELP = "measure what an adapter did to the weights, and how alike two adapters are"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", help="an adapter's folder (PEFT's format)")
    parser.add_argument("other", nargs="?", help="a second one, of any rank or seed, to compare the directions with")
    parser.add_argument(
        "--model",
        "--model-name-or-path",
        help="the base model: folder, .gguf or hub id (default: the one the adapter names, if it is on this machine)",
    )
    parser.add_argument(
        "--dtype", default="float32", choices=["auto", "float32", "bfloat16", "float16"], help="to hold the model in"
    )
    parser.add_argument("--output-dir", "-o", help="folder for analysis.json and analysis.html")
    parser.add_argument("--modules", action="store_true", help="a line for every module")
    parser.add_argument("--json", action="store_true", help="print everything as JSON instead of the tables")


def run(args: argparse.Namespace) -> None:
    from pathlib import Path

    from ..formats.files import replacing
    from ..study.analysis import page, report
    from ..study.analysis.run import study_of
    from ..training.preflight import check_output

    if args.output_dir:
        check_output(Path(args.output_dir))
    study = study_of(args.adapter, args.other, args.model, dtype=args.dtype)
    print(report.as_json(study) if args.json else report.text(study, every=args.modules), end="" if args.json else "\n")
    if args.output_dir:
        out = Path(args.output_dir)
        out.mkdir(parents=True, exist_ok=True)
        for name, content in (("analysis.json", report.as_json(study)), ("analysis.html", page.render(study))):
            with replacing(out / name) as path:
                path.write_text(content, encoding="utf-8")
        if not args.json:
            print(f"\nwritten: {out}/analysis.json, {out}/analysis.html")
