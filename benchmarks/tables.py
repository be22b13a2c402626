"""The tables of docs/performance.md, out of benchmarks/results.

    python benchmarks/tables.py            writes them
    python benchmarks/tables.py --check    says which are not those of the results, and fails

A table stands between <!-- layer --> and <!-- end -->, the name being that of the file.
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import measure

PAGE = measure.ROOT / "docs" / "performance.md"
_TABLE = re.compile(r"<!-- (?P<name>[\w-]+) -->\n.*?<!-- end -->", re.DOTALL)


def table(record: dict[str, Any]) -> str:
    """The rows as Markdown, and where they come from. Rows that all say the same make one line."""
    rows = record["rows"]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    said = {value for row in rows for value in row.values() if str(value).startswith("not measured")}
    if said:
        lines = [f"{len(rows)} rows: {', '.join(sorted(said))}."]
    else:
        lines = ["| " + " | ".join(columns) + " |", "|" + "|".join("---" for _ in columns) + "|"]
        lines += ["| " + " | ".join(measure.text(row.get(column, "")) for column in columns) + " |" for row in rows]
    made_on = ", ".join(f"{name} {value}" for name, value in record["machine"].items())
    return "\n".join([*lines, "", f"`{record['command']}` at {record['commit']}; {made_on}."])


def filled(page: str) -> str:
    """The page with every table made anew."""

    def one(match: re.Match[str]) -> str:
        name = match["name"]
        record = json.loads((measure.RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        return f"<!-- {name} -->\n{table(record)}\n<!-- end -->"

    return _TABLE.sub(one, page)


def main(words: list[str]) -> int:
    page = PAGE.read_text(encoding="utf-8")
    wanted = filled(page)
    if words == ["--check"]:
        if page != wanted:
            print(f"{PAGE.name} does not show benchmarks/results: run python benchmarks/tables.py")
        return int(page != wanted)
    PAGE.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
