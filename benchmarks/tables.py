"""The tables of docs/performance.md and docs/results.md, from the results of the benchmarks and the experiments.

    python benchmarks/tables.py            writes them
    python benchmarks/tables.py --check    names the pages whose tables do not match the results, and fails

A table stands between <!-- layer --> and <!-- end -->: benchmarks/results/layer.json, or, in docs/results.md, the
tables of benchmarks/experiments/results/NAME. These are made again from the runs in that folder, as is all else that
`lorakit compare` writes there, so they are what today's code makes of runs that an earlier one made.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure

from lorakit.study.comparison import table as comparison_table
from lorakit.study.comparison.files import write_results
from lorakit.study.comparison.results import Comparison, Ledger, MethodRow, TaskFacts, row_of

DOCS = measure.ROOT / "docs"
EXPERIMENTS = measure.ROOT / "benchmarks" / "experiments" / "results"
_TABLE = re.compile(r"<!-- (?P<name>[\w-]+) -->\n.*?<!-- end -->", re.DOTALL)


def measured(name: str) -> str:
    """The table of benchmarks/results/<name>.json."""
    return table(json.loads((measure.RESULTS / f"{name}.json").read_text(encoding="utf-8")))


def compared(name: str) -> str:
    """The tables of a comparison, with headings one level lower."""
    return re.sub(r"^## ", "### ", comparison_table.markdown(remade(EXPERIMENTS / name)), flags=re.M).rstrip()


def remade(folder: Path) -> Comparison:
    """The comparison of a folder: its rows from runs.jsonl, and from compare.json what does not come from runs."""
    said = json.loads((folder / "compare.json").read_text(encoding="utf-8"))
    tasks = {task["name"]: TaskFacts(**{**task, "metrics": tuple(task["metrics"])}) for task in said["tasks"]}
    runs = list(Ledger(folder / "runs.jsonl"))

    def row(old: dict[str, Any]) -> MethodRow:
        own = [run for run in runs if (run.task, run.method) == (old["task"], old["method"])]
        seeds = sorted((run for run in own if run.learning_rate == old["learning_rate"]), key=lambda run: run.seed)
        tried = {float(rate) for rate in old["tried"]}
        searched = [run for run in own if run.seed == 0 and run.learning_rate in tried]
        return row_of(seeds, searched, tasks[old["task"]].chosen_by)

    return Comparison(
        model=said["model"],
        tasks=tuple(tasks.values()),
        rows=tuple(map(row, said["rows"])),
        left_out=tuple((one["task"], one["method"], one["reason"]) for one in said["left_out"]),
        seeds=tuple(said["seeds"]),
        trials=said["trials"],
        machine=said["machine"],
        finished=said["finished"],
    )


def stale(folder: Path) -> bool:
    """Whether the tables in the folder are not those of its runs."""
    found = remade(folder)
    made = {"compare.md": comparison_table.markdown(found), "compare.json": comparison_table.as_json(found)}
    return any((folder / name).read_text(encoding="utf-8") != content for name, content in made.items())


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
    wrong = []
    for folder in sorted(path.parent for path in EXPERIMENTS.glob("*/compare.json")):
        if words == ["--check"]:
            wrong += [folder.name] if stale(folder) else []
        else:
            write_results(remade(folder), folder)
    for path, content in PAGES.items():
        page = path.read_text(encoding="utf-8")
        wanted = filled(page, content)
        if page == wanted:
            continue
        if words == ["--check"]:
            wrong.append(path.name)
        else:
            path.write_text(wanted, encoding="utf-8")
    if wrong:
        print(f"{', '.join(wrong)} does not show the results: run python benchmarks/tables.py")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
