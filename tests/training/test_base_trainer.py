"""The trainer that train and compare share, and its arguments."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from transformers import TrainingArguments
from trl import SFTConfig

from lorakit.study.comparison.config import CompareConfig
from lorakit.training.base_trainer import arguments
from lorakit.training.config import TrainConfig

SAME: dict[str, Any] = dict(batch_size=3, gradient_accumulation_steps=2, epochs=1.5, weight_decay=0.1)
SAME |= dict(scheduler="cosine", gradient_checkpointing=True)


def test_both_commands_train_by_the_same_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given: dict[str, Any] = dict(seed=7, learning_rate=1e-3, warmup=0.1, output_dir=str(tmp_path), report_to="none")
    one = arguments(SFTConfig, TrainConfig(model="", data="", output_dir="", **SAME), **given)
    two = arguments(TrainingArguments, CompareConfig(model="", output_dir="", **SAME), **given)
    shared = TrainingArguments(output_dir=str(tmp_path)).to_dict().keys() - {
        # Differs in TRL: it averages the loss over labels itself, and logs more.
        *("average_tokens_across_devices", "logging_steps", "bf16", "logging_dir", "gradient_checkpointing_kwargs")
    }
    differing = {key for key in shared if one.to_dict()[key] != two.to_dict()[key]}
    assert differing == set()
    assert (one.seed, one.data_seed, one.num_train_epochs, one.per_device_train_batch_size) == (7, 7, 1.5, 3)
    assert (one.learning_rate, one.warmup_steps, one.max_steps, one.gradient_accumulation_steps) == (1e-3, 0.1, -1, 2)
    assert capsys.readouterr().out == ""


def test_a_process_has_one_device() -> None:
    """Trainer would spread a batch over all the GPUs that it sees, and multiply the rows of a step by their number."""

    def kind(**settings: Any) -> Any:  # replaces a class of arguments
        return SimpleNamespace(n_gpu=settings["n_gpu"], _n_gpu=settings["n_gpu"])

    for seen, used in ((0, 0), (1, 1), (4, 1)):
        made: Any = arguments(
            cast("type[Any]", kind),
            TrainConfig(model="", data="", output_dir=""),
            seed=0,
            learning_rate=1,
            warmup=0,
            n_gpu=seen,
        )
        assert made._n_gpu == used
