"""Checks before a folder is made or a model is loaded: is the folder usable, are trackers there, is memory enough."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import LoraError
from ..core.numbers import size
from ..core.reading import json_of
from ..core.words import first_line, suggestion
from . import report
from .memory import memory_of
from .models import best_device
from .processes import is_main
from .scores import metrics_for

if TYPE_CHECKING:
    from .config import TrainConfig
    from .data import Data
    from .plan import Plan
    from .prepare import Prepared

_PACKAGES = {"azure_ml": "azureml-core", "flyte": "flytekit"}  # of trackers whose name is not their package's


def check_output(path: Path, flag: str = "--output-dir") -> None:
    """Raise OSError if no folder can be made or written at `path`."""
    if path.is_file():
        raise FileExistsError(f"{flag} {path} is a file.")
    for own in (path, *path.parents):
        if own.is_symlink() and not own.exists():
            raise FileNotFoundError(f"{flag} {path}: the link {own} leads to {own.readlink()}, which is not there.")
    there = next(own for own in (path, *path.absolute().parents) if own.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"{flag} {path}: {there} is a file, not a folder.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"{flag} {path}: {there} may not be written to.")


def check_file(path: Path, flag: str) -> None:
    """Raise OSError if no file can be written at `path`. Its folder must exist."""
    if path.is_dir():
        raise IsADirectoryError(f"{flag} {path} is a folder; name a file in it.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{flag} {path}: there is no folder {path.parent}.")
    check_output(path.parent, flag)


def check_result(path: Path, flag: str) -> None:
    """`check_file` for the result of an evaluation, which may replace only an earlier result.

    Raises FileExistsError for any other file, because it may be the data or belong to an adapter.
    """
    check_file(path, flag)
    if os.path.lexists(path) and not _is_result(path):
        raise FileExistsError(f"{flag} {path} is there already, and is no earlier result. Name another file.")


def _is_result(path: Path) -> bool:
    try:
        keys = json_of(path, dict).keys()
    except (OSError, ValueError):
        return False
    kinds = report.Evaluation, report.SeveralEvaluations
    return any(
        keys >= {own.name for own in dataclasses.fields(kind) if own.default is dataclasses.MISSING} for kind in kinds
    )


def check_reporters(names: Sequence[str]) -> None:
    """Raise LoraError for a program of --report-to that transformers does not know, that is not installed, or that
    cannot begin: W&B asks for a key on a terminal, and without one it needs a login.
    """
    from transformers.integrations.integration_utils import (
        INTEGRATION_TO_CALLBACK,
        get_available_reporting_integrations,
    )

    known, usable = sorted(INTEGRATION_TO_CALLBACK), get_available_reporting_integrations()
    for name in names:
        if name in ("all", "none") or name in usable:
            continue
        if name not in known:
            raise LoraError(f"--report-to {name}: expected one of {', '.join(known)}.{suggestion(name, known)}")
        if importlib.util.find_spec(name) is not None:  # comet_ml without its key, for example
            raise LoraError(f"--report-to {name}: {name} is installed and not set up. Set it up, or leave it out.")
        package = _PACKAGES.get(name, name)
        raise LoraError(
            f"--report-to {name}: {name} is not installed. Install it (pip install {package}), or leave it out."
        )
    if "wandb" in usable and {"wandb", "all"} & set(names) and is_main():
        _log_in_to_wandb()


def _log_in_to_wandb() -> None:
    """Raise LoraError without a login, as W&B would after the model was loaded. Offline it needs none."""
    import wandb

    try:
        wandb.login()
    except wandb.Error as error:
        raise LoraError(
            f"--report-to wandb: {first_line(error)} WANDB_MODE=offline keeps the run on this machine."
        ) from None


def check_metric(config: TrainConfig, data: Data, held_out: int) -> None:
    """Raise ValueError if --metric, --patience or --keep cannot judge the held-out rows; ImportError without what
    computes the metric. held_out: the number of rows that the loss is computed on.
    """
    if config.metric == "loss" and config.patience is None and config.keep == "last":
        return
    flag = (
        f"--metric {config.metric}" if config.metric != "loss" else "--patience" if config.patience else "--keep best"
    )
    if not held_out:
        raise LoraError(f"{flag}: {config.data} has no held-out rows; add a valid file, or --holdout above 0.")
    if config.metric == "loss":
        return
    if not config.eval_samples:
        raise LoraError(f"{flag}: --eval-samples 0 leaves no row to answer.")
    judged = data.valid[: config.eval_samples]
    answered = any(example.text is None for example in judged)
    (metric,) = metrics_for([config.metric], data.task, answered)
    same: dict[str, tuple[list[Any], list[Any]]] = {
        "texts": (["a b c d"], [("a b c d",)]),
        "classes": (["a", "b"], ["a", "b"]),
        "class lists": ([("a", "b")], [("a", "b")]),
        "numbers": ([0.0, 1.0], [0.0, 1.0]),
    }
    metric.score(*same[metric.of])  # imports what it needs


def refuse_large_run(prepared: Prepared) -> None:
    """Raise ValueError if the plan needs more memory than the machine has, unless --ignore-memory is set."""
    config, peak = prepared.config, prepared.plan.peak_bytes
    if config.ignore_memory or peak is None:
        return
    refuse_more_than_there_is(peak * sharing(), "the plan needs about", ways_to_need_less(config))


def exceeds_memory(plan: Plan) -> bool:
    """Whether a plan needs more memory than the machine has, as far as both are known."""
    there = memory_of(best_device())
    if not there or plan.peak_bytes is None:
        return False
    return plan.peak_bytes * sharing() > there


def sharing() -> int:
    """How many processes share the memory of a device: all of one machine its memory, but each has its own GPU."""
    return 1 if best_device().type == "cuda" else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def ways_to_need_less(config: TrainConfig) -> list[str]:
    """What a user can change so that a run needs less memory, two or more ways."""
    ways = [f"--batch-size below {config.batch_size}"] if config.batch_size > 1 else []
    ways += [f"--max-seq-length below {config.max_seq_length}", f"--rank below {config.rank}"]
    ways += [] if config.gradient_checkpointing else ["--gradient-checkpointing"]
    return [*ways, "a smaller model"]


def refuse_more_than_there_is(needed: int, what: str, ways: Sequence[str]) -> None:
    """Raise ValueError if `needed` bytes are more than the machine's memory.

    what: how the error begins. ways: two or more ways to need less.
    """
    there = memory_of(best_device())
    if there and needed > there:
        raise LoraError(
            f"{what} {size(needed)} of memory, and this machine has {size(there)}. "
            f"Less is needed with {', '.join(ways[:-1])} or {ways[-1]}; --ignore-memory begins all the same."
        )
