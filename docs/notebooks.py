"""Runs the notebooks in docs/notebooks and keeps what their cells print.

    python docs/notebooks.py            runs them and writes what each cell printed into the file
    python docs/notebooks.py --check    prints the cells that print something else than the file has, and exits with 1

The cells of a notebook are run in order, in one namespace, with exec. That needs neither Jupyter nor a kernel. A cell
that raises is an error either way. What is printed must be the same everywhere: shapes, counts, rounded numbers.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent / "notebooks"


def run(notebook: dict[str, Any], name: str) -> list[tuple[dict[str, Any], str]]:
    """Each code cell with what it printed."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    printed = []
    for number, cell in enumerate(notebook["cells"], 1):
        if cell["cell_type"] != "code":
            continue
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile("".join(cell["source"]), f"{name}, cell {number}", "exec"), namespace)
        printed.append((cell, out.getvalue()))
    return printed


def output(printed: str) -> list[dict[str, Any]]:
    """What a cell printed, as the file has it."""
    return [{"name": "stdout", "output_type": "stream", "text": printed.splitlines(keepends=True)}] if printed else []


def main(arguments: list[str], folder: Path = FOLDER) -> int:
    check = "--check" in arguments
    failed = False
    for path in sorted(folder.glob("*.ipynb")):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        for cell, printed in run(notebook, path.name):
            new = output(printed)
            if check and cell["outputs"] != new:
                failed = True
                print(f"{path.name}: {cell['id']} prints\n{printed}and the file has\n{cell['outputs']}")
            cell["outputs"] = new
        if not check:
            text = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
            path.write_text(text, encoding="utf-8")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
