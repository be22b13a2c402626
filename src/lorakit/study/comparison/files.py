"""What a comparison leaves in its folder, besides its runs and the machine they were made on."""

from __future__ import annotations

import re
from pathlib import Path

from ...formats.files import replacing
from . import page, plots, table
from .results import Comparison


def write(found: Comparison, folder: Path) -> list[Path]:
    """The tables as JSON and Markdown, the page, and the plot of each task as a picture; returns their paths."""
    contents = {
        "compare.json": table.as_json(found),
        "compare.md": table.markdown(found),
        "compare.html": page.render(found),
    }
    for task in found.tasks:
        if points := plots.points_of(found, task):
            drawing = plots.scatter(points, task.metrics[0], plots.families(found))
            name = re.sub(r"[^\w-]", "_", task.name)
            contents[f"compare-{name}.svg"] = plots.standalone(drawing)
    for name, content in contents.items():
        with replacing(folder / name) as path:
            path.write_text(content, encoding="utf-8")
    return [folder / name for name in contents]
