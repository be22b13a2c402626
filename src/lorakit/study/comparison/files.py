"""The folder of a comparison: which comparison it holds, and the tables, page and plots that are written into it.

A comparison goes on in its own folder, with more seeds, methods or tasks. A comparison of another model or of other
rows is refused there, because its tables would replace those of the first one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...formats.files import replacing
from ...formats.folder import OutputFolder, OutputKind
from ...training.start import settings_in
from ...training.svg import standalone
from . import page, plots, table
from .plan import TaskPlan
from .results import Comparison
from .tasks import StudyTask, digest_of

_FILES = r"runs\.jsonl|machine\.json|config\.yaml|compare\.(json|md|html)|compare-[\w-]+\.svg"


def _is_released(folder: Path) -> bool:
    return {"model", "output_dir", "methods", "seeds", "trials"} <= settings_in(folder).keys()


COMPARISON = OutputKind("compare", names=_FILES, released=_is_released)


def comparison_record(model: str, plans: Sequence[TaskPlan]) -> dict[str, Any]:
    """What identifies a comparison: the model, and for each task the source of its rows and their fingerprint."""
    return {"model": model, "tasks": {plan.task.name: [plan.task.source, _rows(plan.task)] for plan in plans}}


def refuse_other(folder: OutputFolder, record: dict[str, Any]) -> None:
    """Raise FileExistsError if the folder holds anything but this comparison. The message names what differs."""
    folder.refuse_unusable()
    note = folder.note
    if note is None:
        folder.refuse_others()
        return
    if not (folder.path / "runs.jsonl").is_file():
        return  # the earlier comparison finished no run
    before = note.record or _released_record(folder.path)
    differing = []
    if not _same_place(before["model"], record["model"]):
        differing.append(f"  the model: {before['model']} then, {record['model']} now")
    for name, (source, rows) in before["tasks"].items():
        if name not in record["tasks"]:
            differing.append(f"  the task {name} ({source}): not asked for now")
            continue
        now, rows_now = record["tasks"][name]
        if rows != rows_now if rows is not None else not _same_place(source, now):
            differing.append(f"  the rows of the task {name}: {source} then, {now} now, and not the same ones")
    if differing:
        raise FileExistsError(
            "\n".join([f"--output-dir {folder} holds another comparison:", *differing])
            + "\nIts tables would be lost. Choose another --output-dir."
        )


def _rows(task: StudyTask) -> str:
    data = getattr(task, "data", None)
    if data is None:
        return task.fingerprint
    rows = (*data.train, *data.valid, *data.test)
    return digest_of(*({**asdict(row), "where": None} for row in rows))


def _released_record(folder: Path) -> dict[str, Any]:
    """The record of a comparison of lorakit 0.1.0, from its settings. Only the source of its rows is known."""
    settings = settings_in(folder)
    data = settings.get("data")
    tasks = settings.get("tasks") or ({Path(data).resolve().stem: {}} if data else {})
    return {
        "model": settings["model"],
        "tasks": {name: [str(own.get("data") or data), None] for name, own in tasks.items()},
    }


def _same_place(one: str, other: str) -> bool:
    return one == other or (Path(one).exists() and Path(other).exists() and Path(one).samefile(other))


def write_results(found: Comparison, folder: Path) -> list[Path]:
    """Write the tables as JSON and Markdown, the page, and the plot of each task as SVG; return their paths."""
    contents = {
        "compare.json": table.as_json(found),
        "compare.md": table.markdown(found),
        "compare.html": page.render(found),
    }
    for task in found.tasks:
        if points := plots.points_of(found, task):
            drawing = plots.scatter(points, task.metrics[0], plots.families(found))
            name = re.sub(r"[^\w-]", "_", task.name)
            contents[f"compare-{name}.svg"] = standalone(drawing)
    for name, content in contents.items():
        with replacing(folder / name) as path:
            path.write_text(content, encoding="utf-8")
    return [folder / name for name in contents]
