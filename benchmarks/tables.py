"""The tables of docs/performance.md and docs/results.md, from the results of the benchmarks and the experiments.

    python benchmarks/tables.py            writes them
    python benchmarks/tables.py --check    names the pages whose tables do not match the results, and fails

A table stands between <!-- layer --> and <!-- end -->: benchmarks/results/layer.json, or, in docs/results.md, what
`lorakit compare` wrote to benchmarks/experiments/results/NAME.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure

DOCS = measure.ROOT / "docs"
EXPERIMENTS = measure.ROOT / "benchmarks" / "experiments" / "results"
_TABLE = re.compile(r"<!-- (?P<name>[\w-]+) -->\n.*?<!-- end -->", re.DOTALL)


def measured(name: str) -> str:
    """The table of benchmarks/results/<name>.json."""
    return table(json.loads((measure.RESULTS / f"{name}.json").read_text(encoding="utf-8")))


def compared(name: str) -> str:
    """The tables that a comparison wrote, with headings one level lower."""
    return re.sub(r"^## ", "### ", (EXPERIMENTS / name / "compare.md").read_text(encoding="utf-8"), flags=re.M).rstrip()


PAGES: dict[Path, Callable[[str], str]] = {DOCS / "performance.md": measured, DOCS / "results.md": compared}


def table(record: dict[str, Any]) -> str:
    """The rows of a benchmark as Markdown, and where they come from. If nothing was measured, one line says so."""
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


def filled(page: str, content: Callable[[str], str]) -> str:
    """The page with every table replaced by a new one."""
    return _TABLE.sub(lambda match: f"<!-- {match['name']} -->\n{content(match['name'])}\n<!-- end -->", page)


def main(words: list[str]) -> int:
    stale = []
    for path, content in PAGES.items():
        page = path.read_text(encoding="utf-8")
        wanted = filled(page, content)
        if page == wanted:
            continue
        if words == ["--check"]:
            stale.append(path.name)
        else:
            path.write_text(wanted, encoding="utf-8")
    if stale:
        print(f"{', '.join(stale)} does not show the results: run python benchmarks/tables.py")
    return int(bool(stale))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
