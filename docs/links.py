"""Keeps the line numbers of links into the code right: [`symbol`](path#Lnn) points at the definition of the symbol.

    python docs/links.py            rewrites the numbers in the pages (*.md, docs/*.md) and the notebooks
    python docs/links.py --check    prints the stale ones and exits with 1

A symbol is a class, a function, a module's variable, or one of these in a class (`Class.method`). A symbol or a file
that does not exist is an error either way.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("*.md", "docs/*.md", "docs/notebooks/*.ipynb")
LINK = re.compile(r"\[`([\w.]+)`\]\(([^()#\s]+)#L(\d+)\)")


def definitions(body: Iterable[ast.stmt], prefix: str = "") -> dict[str, int]:
    """The line of each definition; the first one where a name has several."""
    lines: dict[str, int] = {}
    for node in body:
        names: list[str] = []
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            names = [node.name]
        elif isinstance(node, ast.Assign):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names = [node.target.id]
        for name in names:
            lines.setdefault(prefix + name, node.lineno)
        if isinstance(node, ast.ClassDef):
            lines |= definitions(node.body, f"{prefix}{node.name}.")
    return lines


def renumbered(page: Path) -> tuple[str, list[str], list[str]]:
    """The page with the right numbers, its stale links, and its links to what does not exist."""
    stale: list[str] = []
    broken: list[str] = []

    def right(link: re.Match[str]) -> str:
        symbol, path, number = link.groups()
        where = f"{page.name}:{link.string.count(chr(10), 0, link.start()) + 1}: `{symbol}`"
        source = page.parent / path
        if not source.is_file():
            broken.append(f"{where}: there is no file {path}")
            return link[0]
        line = definitions(ast.parse(source.read_text(encoding="utf-8")).body).get(symbol)
        if line is None:
            broken.append(f"{where}: {path} defines no such name")
            return link[0]
        if line != int(number):
            stale.append(f"{where}: {path}#L{number} is now #L{line}")
        return f"[`{symbol}`]({path}#L{line})"

    return LINK.sub(right, page.read_text(encoding="utf-8")), stale, broken


def main(arguments: list[str], root: Path = ROOT) -> int:
    check = "--check" in arguments
    failed = False
    pages = [path for pattern in PAGES for path in sorted(root.glob(pattern))]
    for page in pages:
        text, stale, broken = renumbered(page)
        print(*stale, *broken, sep="\n", end="\n" if stale or broken else "")
        failed |= bool(broken) or (check and bool(stale))
        if stale and not check:
            page.write_text(text, encoding="utf-8")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
