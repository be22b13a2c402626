"""`lorakit push`: upload an adapter to the Hugging Face hub."""

from __future__ import annotations

import argparse

from ..core.paths import expanded

HELP = "upload an adapter and its model card to the hub"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", type=expanded, help="an adapter's folder (PEFT's format)")
    parser.add_argument("--to", required=True, metavar="USER/NAME", help="the repository; it is made if there is none")
    parser.add_argument(
        "--base-model", metavar="USER/MODEL", help="the base model at the hub, if the adapter names a path"
    )
    parser.add_argument("--private", action="store_true", help="make the repository private, if it is new")


def run(args: argparse.Namespace) -> None:
    from ..training.push import push

    pushed = push(args.adapter, args.to, base=args.base_model, private=args.private)
    print(f"uploaded: {', '.join(pushed.files)}")
    if pushed.kept:
        print(f"kept here: {', '.join(pushed.kept)}")
    print(pushed.address)
