"""`lorakit init`: a commented configuration file to start from."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

HELP = "write a commented configuration file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file", nargs="?", default="lora.yaml", help="where to write it; - prints it (default: lora.yaml)"
    )
    parser.add_argument("--force", action="store_true", help="replace an existing file")


def run(args: argparse.Namespace) -> None:
    from ..training.config import TrainConfig
    from ..training.settings import commented_yaml

    if args.file == "-":
        print(commented_yaml(TrainConfig, "train"), end="")
        return
    path = Path(args.file)
    if path.exists() and not args.force:
        raise FileExistsError(f"{path} exists already. Choose another name, or add --force.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent}: no such folder.")
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(commented_yaml(TrainConfig, "train"), encoding="utf-8")
    os.replace(temporary, path)
    print(f"written: {path}. Set model and data in it, then: lorakit check --config {path}")
