"""The table of PEFT's fields in docs/formats.md, made from lorakit's own rules.

python docs/fields.py            write it
python docs/fields.py --check    say whether it is right (exit code 1: it is not)
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lorakit.formats.peft_config import FIELDS

PAGE = Path(__file__).parent / "formats.md"
BEGIN, END = "<!-- fields: made by docs/fields.py -->\n", "<!-- /fields -->"


def table() -> str:
    """One row for each field."""
    rows = [f"| `{name}` | {rule.verdict} | {rule.says} |" for name, rule in FIELDS.items()]
    return "\n".join(["", "| field | | what it says |", "|---|---|---|", *rows, "", ""])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write the table of PEFT's fields into docs/formats.md.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if the table is not right")
    check = parser.parse_args(arguments).check
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    wanted = before + BEGIN + table() + END + after
    if check:
        return int(page != wanted)
    PAGE.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
