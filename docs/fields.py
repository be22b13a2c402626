"""The table of PEFT's fields in docs/formats.md, made from lorakit's own rules.

python docs/fields.py            write it
python docs/fields.py --check    say whether it is right (exit code 1: it is not)
"""

from __future__ import annotations

from pathlib import Path

import page_tables

from lorakit.formats.peft_config import FIELDS

PAGE = Path(__file__).parent / "formats.md"


def table() -> str:
    """One row for each field."""
    rows = [f"| `{name}` | {rule.verdict} | {rule.says} |" for name, rule in FIELDS.items()]
    return "\n".join(["", "| field | | what it says |", "|---|---|---|", *rows, "", ""])


def main(arguments: list[str] | None = None) -> int:
    return page_tables.main(PAGE, "fields", table, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
