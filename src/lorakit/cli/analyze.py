"""`lorakit analyze`: what an adapter did to the weights, alone or compared with another adapter."""

from __future__ import annotations

import argparse

from ..core.paths import expanded

HELP = "measure what an adapter did to the weights, and how alike two adapters are"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", type=expanded, help="an adapter's folder (PEFT's format)")
    parser.add_argument(
        "other",
        nargs="?",
        type=expanded,
        help="a second adapter, of any rank or seed, to compare the directions with",
    )
    parser.add_argument(
        "--model",
        "--model-name-or-path",
        type=expanded,
        help="the base model: folder, .gguf or hub id (default: the one the adapter names, if it is on this machine)",
    )
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=["auto", "float32", "bfloat16", "float16"],
        help="dtype to load the model in",
    )
    parser.add_argument("--output-dir", "-o", type=expanded, help="folder for analysis.json and analysis.html")
    parser.add_argument("--modules", action="store_true", help="show a line for every module")
    parser.add_argument("--json", action="store_true", help="print everything as JSON instead of the tables")


def run(args: argparse.Namespace) -> None:
    from ..formats.folder import OutputFolder
    from ..study.analysis import page, report
    from ..study.analysis.run import ANALYSIS, study_of
    from ..training.preflight import check_output

    out = OutputFolder(args.output_dir, ANALYSIS) if args.output_dir else None
    if out is not None:
        check_output(out.path)
        out.refuse_unusable()
        out.refuse_taken(["analysis.json", "analysis.html"])
    study = study_of(args.adapter, args.other, args.model, dtype=args.dtype)
    print(
        report.as_json(study) if args.json else report.tables_text(study, every=args.modules),
        end="" if args.json else "\n",
    )
    if out is not None:
        with out.held(), out.writing() as part:
            (part / "analysis.json").write_text(report.as_json(study), encoding="utf-8")
            (part / "analysis.html").write_text(page.render(study), encoding="utf-8")
        if not args.json:
            print(f"\nwritten: {out}/analysis.json, {out}/analysis.html")
