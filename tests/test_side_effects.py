"""A call does not change the state of the process: environment, log levels, warnings, streams."""

import contextlib
import gc
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit.study.comparison.config import CompareConfig
from lorakit.study.comparison.plan import plans_of
from lorakit.study.comparison.run import compare
from lorakit.training.config import TrainConfig
from lorakit.training.loop import train
from lorakit.training.memory import few_kernels
from lorakit.training.models import load_causal_lm, load_classifier, load_tokenizer, skeleton
from lorakit.training.prepare import prepare
from lorakit.training.quiet import quiet_libraries

LIBRARIES = ("transformers", "trl", "accelerate", "datasets", "huggingface_hub", "torch", "safetensors", "peft")


def state() -> dict[str, Any]:
    import datasets
    from transformers.utils import logging as of_transformers

    names = [name for name in logging.root.manager.loggerDict if name.split(".")[0] in LIBRARIES]
    return {
        "environment": dict(os.environ),
        "levels": {name: logging.getLogger(name).level for name in ("root", *names)},
        "handlers": {name: list(logging.getLogger(name).handlers) for name in ("root", *LIBRARIES)},
        "transformers' verbosity": of_transformers.get_verbosity(),
        "bars": (of_transformers.is_progress_bar_enabled(), datasets.utils.logging.is_progress_bar_enabled()),
        "caching": datasets.is_caching_enabled(),
        "filters": list(warnings.filters),
        "streams": (sys.stdout, sys.stderr),
        "torch": (
            torch.get_default_dtype(),
            torch.is_grad_enabled(),
            torch.get_num_threads(),
            torch.get_default_device(),
        ),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "garbage": (gc.isenabled(), gc.get_threshold()),
        "folder": os.getcwd(),
        "excepthook": sys.excepthook,
    }


@contextlib.contextmanager
def unchanged() -> Iterator[None]:
    """The user's log levels before the block and after it."""
    import sklearn.metrics  # noqa: F401  an import sets up its library, once for the process
    import trl  # noqa: F401

    import lorakit.study.comparison.fit
    import lorakit.training.trainers  # noqa: F401

    levels = {name: logging.getLogger(name).level for name in LIBRARIES[:4]}
    for name in levels:
        logging.getLogger(name).setLevel(logging.INFO)
    before = state()
    yield
    after = state()
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    made = after["levels"].keys() - before["levels"].keys()  # loggers of modules that were imported meanwhile
    assert {name: after["levels"].pop(name) for name in made} == dict.fromkeys(made, logging.NOTSET)
    for what in before:
        assert after[what] == before[what], what


def rows(path: Path) -> str:
    path.write_text("".join(json.dumps({"prompt": f"turn {i % 6}", "completion": "on"}) + "\n" for i in range(16)))
    return str(path)


def config(model: Path, folder: Path, **settings: Any) -> TrainConfig:
    usual: dict[str, Any] = dict(batch_size=8, max_steps=2, eval_samples=2, holdout=0.2, dtype="float32", rank=2)
    return TrainConfig(str(model), rows(folder / "d.jsonl"), str(folder / "out"), **{**usual, **settings})


def test_of_training(tiny_lm: Path, tmp_path: Path) -> None:
    with unchanged():
        train(config(tiny_lm, tmp_path))


def test_of_a_training_that_fails(tiny_lm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lorakit.training.loop.train_one", fails)
    with unchanged(), pytest.raises(KeyboardInterrupt, match="interrupted"):
        train(config(tiny_lm, tmp_path))


def test_of_preparing_and_loading(tiny_lm: Path, tiny_encoder: Path, tmp_path: Path) -> None:
    with unchanged():
        prepare(config(tiny_lm, tmp_path))
        load_tokenizer(str(tiny_lm))
        load_causal_lm(str(tiny_lm))
        load_classifier(str(tiny_encoder), labels=("a", "b"))
        skeleton(str(tiny_lm), labels=None, dtype="float32")


def test_of_a_comparison(tiny_lm: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = dict(max_steps=1, batch_size=8, dtype="float32", max_new_tokens=2, methods=("lora",))
    data = tmp_path / "d.jsonl"
    own = CompareConfig(model=str(tiny_lm), output_dir=str(tmp_path / "out"), data=rows(data), **settings)
    with unchanged():
        compare(own.model, plans_of(own), tmp_path / "out", seeds=1, trials=1)


def test_a_user_s_own_limit_of_kernels_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "7")
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", raising=False)
    with few_kernels():
        assert (os.environ["LRU_CACHE_CAPACITY"], os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"]) == ("7", "32")
    assert os.environ["LRU_CACHE_CAPACITY"] == "7" and "ONEDNN_PRIMITIVE_CACHE_CAPACITY" not in os.environ


def test_libraries_are_quiet_within_the_block_alone() -> None:
    logger = logging.getLogger("accelerate")
    before, logger.level = logger.level, logging.DEBUG
    with quiet_libraries():
        assert not logger.isEnabledFor(logging.WARNING) and logger.isEnabledFor(logging.ERROR)
        logging.getLogger("trl").setLevel(logging.WARNING)  # as an import of it does
    assert logger.level == logging.DEBUG and logging.getLogger("trl").level == logging.WARNING
    logger.setLevel(before)
