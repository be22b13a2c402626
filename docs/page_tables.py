"""A table of a page that a program makes: written between two marks, or compared with what stands there."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path


def main(page: Path, name: str, table: Callable[[], str], arguments: list[str] | None) -> int:
    """Write the table into `page`, between the marks of this name.

    arguments: of the command line; with --check nothing is written, and 1 says that the table is not right.
    """
    parser = argparse.ArgumentParser(description=f"Write the table of {name} into {page.parent.name}/{page.name}.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if the table is not right")
    check = parser.parse_args(arguments).check
    begin, end = f"<!-- {name}: made by docs/{name}.py -->\n", f"<!-- /{name} -->"
    text = page.read_text(encoding="utf-8")
    before, rest = text.split(begin)
    _, after = rest.split(end)
    wanted = before + begin + table() + end + after
    if check:
        return int(text != wanted)
    page.write_text(wanted, encoding="utf-8")
    return 0
