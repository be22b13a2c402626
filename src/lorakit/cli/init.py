"""`lorakit init`: a commented configuration file to start from."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..core.paths import expanded

HELP = "write a commented configuration file"
EXTRA = ""  # needs no extra packages


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file", nargs="?", type=expanded, help="where to write it; - prints it (default: lora.yaml, or compare.yaml)"
    )
    parser.add_argument("--compare", action="store_true", help="settings of lorakit compare instead of lorakit train")
    parser.add_argument("--force", action="store_true", help="replace an existing file")


def run(args: argparse.Namespace) -> None:
    from ..formats.files import replacing
    from ..training.settings import commented_yaml

    if args.compare:
        from ..study.comparison.config import CompareConfig

        text, name, check = commented_yaml(CompareConfig, "compare"), "compare.yaml", "lorakit compare --dry-run"
    else:
        from ..training.config import TrainConfig

        text, name, check = commented_yaml(TrainConfig, "train"), "lora.yaml", "lorakit check"
    if args.file == "-":
        print(text, end="")
        return
    path = Path(args.file or name)
    if path.exists() and not args.force:
        raise FileExistsError(f"{path} exists already. Choose another name, or add --force.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent}: no such folder.")
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(f"written: {path}. Set model and data in it, then: {check} --config {path}")
