"""What a comparison leaves in its folder, besides runs.jsonl."""

from __future__ import annotations

from pathlib import Path

from ...formats.files import replacing
from . import page, table
from .results import Comparison


def write(found: Comparison, folder: Path) -> list[Path]:
    """compare.json with everything, compare.md with the tables, compare.html with the plots; returns their paths."""
    contents = {"json": table.as_json(found), "md": table.markdown(found), "html": page.render(found)}
    written = [folder / f"compare.{suffix}" for suffix in contents]
    for final, content in zip(written, contents.values(), strict=True):
        with replacing(final) as path:
            path.write_text(content, encoding="utf-8")
    return written
