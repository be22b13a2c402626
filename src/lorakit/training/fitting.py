"""From prepared rows and a loaded model to a trained adapter: the trainer of a run, and what it ends with.

One adapter is trained from where the run begins. If rows name their adapters, one is trained for each name, in one
pass. `candidates.py` trains several settings.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..core.settings import LoRASettings
from ..formats.folder import OutputFolder
from . import report
from .checkpoints import history_in, step_of
from .config import TrainConfig
from .divergence import Diverged
from .interrupt import SaveAndStop
from .models import Loaded
from .own_run import OwnRun
from .pace import Pace, padded_tokens
from .packing import PackCollator, unpacked
from .plan import processes
from .prepare import Prepared, uses_autocast, weights_dtype
from .processes import is_main, say
from .record import longer_or_shorter
from .spool import as_dataset
from .start import Start
from .terminal import columns, to_width
from .tokens import encode, encode_text
from .tried import Tried

if TYPE_CHECKING:
    from ..bank.bank import Bank
    from .one_pass_trainer import OnePassTrainer
    from .progress import Progress


def train_one(
    prepared: Prepared, loaded: Loaded, folder: OutputFolder, start: Start, record: dict[str, Any]
) -> Progress:
    """Train, and return what was logged on the way."""
    with _trainer_on(prepared, loaded, folder, record) as (trainer, progress, stop):
        return _fitted(trainer, progress, stop, prepared, loaded, folder, start, record)


def _fitted(
    trainer: Any,
    progress: Progress,
    stop: SaveAndStop,
    prepared: Prepared,
    loaded: Loaded,
    folder: OutputFolder,
    start: Start,
    record: dict[str, Any],
) -> Progress:
    """Train from where the run begins, and put the adapter on the model that it ends with."""
    from .best import Best, score_of
    from .scores import logged_as

    config = prepared.config
    best = Best(config.metric, config.patience, trainer.hold_best if config.keep == "best" else None)
    trainer.add_callback(best)
    if config.metric != "loss":
        trainer.score = logged_as(config.metric), score_of(prepared, loaded)
    step = step_of(start.checkpoint) if start.checkpoint else 0
    if start.checkpoint and start.record is not None:
        for line in longer_or_shorter(start.record, record, step):
            say(line)
    history = history_in(start.checkpoint) if start.checkpoint else []
    trains = step < record["steps"] and not best.is_over(history)
    if trains:
        with stop.heeding():
            trainer.train(resume_from_checkpoint=str(start.checkpoint) if start.checkpoint else None)
        history = trainer.state.log_history
    else:
        assert start.checkpoint is not None
        trainer.take(start.checkpoint)
        progress.take(step)
    if config.keep == "best":
        trainer.take_best()
        say(best.told(history))
    if trains and is_main():
        _refuse_diverged(trainer, folder)
    loaded.model.eval()
    return progress


@dataclass(frozen=True)
class Chosen:
    """The best of several settings. Its adapter, of so many trained parameters, is on the model."""

    config: TrainConfig
    parameters: int
    tried: Tried


def frozen_bank(model: nn.Module) -> Bank:
    """A bank without adapters, on a frozen model."""
    from ..bank.bank import Bank

    model.requires_grad_(False)
    return Bank(model)


def add_fresh(bank: Bank, settings: Mapping[str, LoRASettings]) -> None:
    """Add a fresh adapter for each of the settings. Each begins as it would alone, from the present random state."""
    state = torch.get_rng_state()
    for name, own in settings.items():
        torch.set_rng_state(state)
        bank[name] = own
        bank.seeds[name] = 0  # the masks that each would draw alone


def train_each(
    prepared: Prepared, loaded: Loaded, folder: OutputFolder, record: dict[str, Any]
) -> tuple[Progress, Bank]:
    """Train an adapter for each name that rows give, on its own rows. Those that diverged are not in the bank."""
    bank = frozen_bank(loaded.model)
    add_fresh(bank, dict.fromkeys(prepared.learners, prepared.settings_on(loaded.model, prepared.config)))
    with at_once(prepared, loaded, folder, record, bank, prepared.learners) as (trainer, progress):
        trainer.train()
    if len(trainer.diverged) == len(bank):
        raise Diverged(f"all {len(bank)} adapters diverged; lower the learning rate.")
    for name, step in trainer.diverged.items():
        say(f"{name} diverged at step {step} and is not kept; lower the learning rate.")
        del bank[name]
    loaded.model.eval()
    return progress, bank


@contextlib.contextmanager
def at_once(
    prepared: Prepared,
    loaded: Loaded,
    folder: OutputFolder,
    record: dict[str, Any],
    bank: Bank,
    runs: Mapping[str, OwnRun],
) -> Iterator[tuple[OnePassTrainer, Progress]]:
    """The trainer of several adapters of the bank, by name. Afterwards none is in use."""
    from .one_pass_trainer import mean_of_finite

    overall = mean_of_finite if prepared.learners else min  # they learn other rows, or the same
    bank.use(next(iter(runs)))  # a trainer looks at what is adapted, which is the same for all of them
    made = _trainer_on(prepared, loaded, folder, record, bank=bank, runs=runs, overall=overall)
    with made as (trainer, progress, stop), bank.rows(list(runs)), stop.heeding():
        yield trainer, progress
    bank.use(None)


@contextlib.contextmanager
def alone(
    prepared: Prepared, loaded: Loaded, folder: OutputFolder, record: dict[str, Any], bank: Bank, name: str
) -> Iterator[tuple[Any, Progress]]:
    """The trainer of one adapter of the bank, which writes no checkpoints. Afterwards none is in use."""
    bank.use(name)
    with _trainer_on(prepared, loaded, folder, record) as (trainer, progress, stop), stop.heeding():
        trainer.keeps_checkpoints = False
        yield trainer, progress
    bank.use(None)


def put_on(loaded: Loaded, bank: Bank, config: TrainConfig, tried: Tried) -> Chosen:
    """Put the best adapter of a bank on the model, and print what was tried."""
    bank.use(tried.best)
    loaded.model.eval()
    say("\n".join((report.heading("tried"), *tried.table().lines(columns(80)), to_width(tried.choice))))
    return Chosen(config, sum(parameter.numel() for parameter in bank.parameters(tried.best)), tried)


@contextlib.contextmanager
def _trainer_on(
    prepared: Prepared, loaded: Loaded, folder: OutputFolder, record: dict[str, Any], **of_several: Any
) -> Iterator[tuple[Any, Progress, SaveAndStop]]:
    """What `_trainer_of` gives, on the rows of the run."""
    with as_dataset(prepared.train) as train_rows, as_dataset(prepared.valid) as valid_rows:
        yield _trainer_of(train_rows, valid_rows, prepared, loaded, folder, record, **of_several)


def _trainer_of(
    train_rows: Any,
    valid_rows: Any,
    prepared: Prepared,
    loaded: Loaded,
    folder: OutputFolder,
    record: dict[str, Any],
    **of_several: Any,
) -> tuple[Any, Progress, SaveAndStop]:
    """The trainer of a run, what shows its progress, and what ends it early.

    of_several: the bank and the runs of several adapters in one pass, and what their losses are together.
    """
    from transformers import DataCollatorWithPadding, TrainingArguments
    from trl import SFTConfig

    from .base_trainer import arguments
    from .one_pass_trainer import OnePassTrainer
    from .progress import Progress
    from .trainers import CausalTrainer, ClassifierTrainer

    config, causal = prepared.config, prepared.data.task == "causal-lm"
    evaluated = bool(prepared.valid)
    by_steps = config.eval_steps is not None
    settings: dict[str, Any] = dict(
        seed=config.seed,
        learning_rate=config.learning_rate,
        warmup=config.warmup_ratio,
        output_dir=str(folder),
        per_device_eval_batch_size=config.batch_size,
        bf16=uses_autocast(config, prepared.data),
        fp16=weights_dtype(config, prepared.data) == "float16" and loaded.device.type == "cuda",
        eval_strategy="no" if not evaluated else "steps" if by_steps else "epoch",
        eval_steps=config.eval_steps,
        save_strategy="steps" if config.save_steps else "epoch",
        save_steps=config.save_steps or 500,
        save_total_limit=2,
        logging_steps=config.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        report_to=list(config.report_to or ("none",)),
        remove_unused_columns=causal,
    )
    pace = _pace(prepared, of_several.get("runs", {}).values() or [prepared])
    progress, stop = Progress(folder.path, pace), SaveAndStop()
    common: dict[str, Any] = dict(
        model=loaded.model,
        train_dataset=train_rows,
        eval_dataset=valid_rows if evaluated else None,
        processing_class=loaded.tokenizer,
        callbacks=[progress, stop],
        folder=folder,
        record=record,
        pace=pace,
    )
    if config.packing:
        common["data_collator"] = PackCollator(loaded.tokenizer.pad_token_id)
    trainer: Any
    if causal:
        settings |= dict(max_length=None, dataset_kwargs={"skip_prepare_dataset": True})
        kind = OnePassTrainer if of_several else CausalTrainer
        if of_several:
            config = dataclasses.replace(config, gradient_accumulation_steps=1)  # each run has its own
        trainer = kind(args=arguments(SFTConfig, config, **settings), **common, **of_several)
    else:
        collator = DataCollatorWithPadding(loaded.tokenizer)
        made = arguments(TrainingArguments, config, **settings)
        weights = prepared.class_weights
        trainer = ClassifierTrainer(args=made, data_collator=collator, class_weights=weights, **common)
    trainer.name_of = functools.partial(_where, prepared)
    return trainer, progress, stop


def _pace(prepared: Prepared, runs: Iterable[Prepared | OwnRun]) -> Pace:
    """The pace of one process, for its share of the rows. runs: what has the rows."""
    size, tokens, heldout = prepared.config.batch_size, 0, 0
    for run in runs:
        tokens += padded_tokens([len(row["input_ids"]) for row in run.train], size, shuffled=True)
        heldout += padded_tokens([len(row["input_ids"]) for row in run.valid], size, shuffled=False)
    return Pace(tokens / processes() / prepared.plan.steps_an_epoch, heldout // processes())


def _refuse_diverged(trainer: Any, folder: OutputFolder) -> None:
    try:
        trainer.refuse_diverged()
    except Diverged:
        folder.end("failed")
        raise


def _where(prepared: Prepared, row: dict[str, Any]) -> str:
    """Where a row of a batch comes from, or each row of a pack: file and line, and how it begins."""
    if not prepared.config.packing:
        return _place(prepared, row["input_ids"][0].tolist())
    pad = prepared.tokenizer.pad_token_id
    return ", ".join(_place(prepared, ids) for ids in unpacked(row) if ids != [pad])


def _place(prepared: Prepared, ids: list[int]) -> str:
    for example in prepared.data.train:
        if prepared.data.task == "causal-lm":
            tokens = encode(example, prepared.tokenizer, system=prepared.style.system, chat=prepared.style.chat)
            found = tokens.input_ids
        else:
            found = encode_text(example, prepared.tokenizer, prepared.limit)["input_ids"]
        cut = found[: prepared.limit]
        if ids[: len(cut)] == cut and set(ids[len(cut) :]) <= {prepared.tokenizer.pad_token_id}:
            return example.where
    return "one that begins " + repr(prepared.tokenizer.decode(ids[:12]))
