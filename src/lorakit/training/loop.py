"""From a data file to a checked adapter: check, train, compare, write.

Errors in the data or the settings are found before a weight is loaded or a file is written. docs/design.md lists what
the output folder holds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..core.numbers import duration, size
from ..formats import peft, save
from ..formats.folder import OutputFolder
from . import page, report
from .card import model_card, public
from .changes import weight_changes
from .checkpoints import checkpoints, history_in, newest_whole, step_of
from .config import TrainConfig
from .divergence import Diverged
from .evaluate import compare_general, evaluate, question
from .interrupt import Interrupted, SaveAndStop
from .labels import MULTI_LABEL
from .loss import check_causal
from .memory import few_kernels
from .models import LABELS, Loaded, best_device, load_causal_lm, load_classifier
from .outcome import RESULTS, Outcome, device_name, last_losses, scores_of, trained_seconds
from .pace import Pace, padded_tokens
from .packing import PackCollator, check_packing, unpacked
from .plan import processes
from .preflight import refuse_large_run
from .prepare import Prepared, adapt, labels_of, prepare, start_block, uses_autocast, weights_dtype
from .processes import is_main, of_main
from .quiet import quiet_libraries
from .record import base_fingerprint, longer_or_shorter, refuse_differences, run_record
from .settings import settings_table, to_command, to_yaml
from .spool import as_dataset
from .start import TRAINING, Start, decided, start_of
from .sweep_settings import swept
from .task import Task, write_labels
from .tokens import encode, encode_text
from .vocabulary import grow

if TYPE_CHECKING:
    from .progress import Progress

_SETTINGS = "config.yaml"


@quiet_libraries()
@few_kernels()
def train(config: TrainConfig) -> Path:
    """Train an adapter as `config` says and return the output folder.

    Prints the start block, progress, and at the end the base model and the adapter side by side on held-out rows.
    Raises what `prepare` and `start_of` raise; ValueError for a checkpoint of a run with other settings; Diverged, a
    FloatingPointError, for a run that diverged; Interrupted, a KeyboardInterrupt, with what to do next. Runs under
    torchrun and `accelerate launch`, where only the first process decides, prints and writes.
    """
    start = start_of(config) if is_main() and not config.dry_run else Start()
    prepared = prepare(config, begun=of_main(start.record["settings"] if start.record else None))
    config = prepared.config  # with what --fit chose, and what an adapter that it goes on with decides
    record = run_record(prepared)
    if is_main() and start.record is not None:
        refuse_differences(start.record, record, start.checkpoint or config.output_dir)
        if start.finished and start.checkpoint is None and start.record.get("steps") != record["steps"]:
            raise FileNotFoundError(
                f"--resume auto: {config.output_dir} holds a finished run, and no whole checkpoint to go on from to "
                f"{record['steps']} steps. --overwrite starts a new run in its place."
            )
    start = of_main(start)
    if start.finished and start.record is not None and start.record.get("steps") == record["steps"]:
        out = start.folder(OutputFolder(config.output_dir, TRAINING))
        _say(f"{out} holds this run, finished after {record['steps']} steps: nothing remains to be done.")
        return out.path
    _say(start_block(prepared))
    for line in start.said:
        _say(line)
    refuse_large_run(prepared)
    if config.dry_run:
        return Path(config.output_dir)

    torch.manual_seed(config.seed)
    loaded = _load(prepared)
    record["base"] = base_fingerprint(loaded)
    if is_main() and start.record is not None:
        refuse_differences(start.record, record, start.checkpoint or config.output_dir)
    if prepared.data.task == "causal-lm":
        check_causal(loaded.model)
    if config.packing:
        check_packing(loaded.model)
    if config.sweep is None:
        adapt(config, loaded.model, prepared.new_tokens, new_head=prepared.data.task != "causal-lm")
    out = OutputFolder(config.output_dir, TRAINING)
    folder = start.folder(out)
    with out.held() if is_main() else contextlib.nullcontext():
        if is_main():
            if decided(config, out) != start:
                raise FileExistsError(f"{out} was changed by another process meanwhile. Run the command again.")
            _begin(folder, start, record, config.report_to or ())
        try:
            result = _run(prepared, loaded, folder, start, record)
        except KeyboardInterrupt as error:
            raise _interrupted(config, out, folder, error) from None
        except BaseException as error:
            _leave_nothing_unless_trained(out, folder)
            if isinstance(error, Diverged) and checkpoints(folder.path):
                raise Diverged(
                    f"{error} {folder} keeps its checkpoints; --overwrite replaces it by a new run."
                ) from None
            raise
        if is_main() and start.beside:
            out.put_new_in_place()
    if is_main():
        _say(_end_block(prepared, out, *result))
    return out.path


def _run(
    prepared: Prepared, loaded: Loaded, folder: OutputFolder, start: Start, record: dict[str, Any]
) -> tuple[Progress, report.Evaluation | None, report.Evaluation | None]:
    """Train and write everything into `folder`. Returns also the scores on held-out rows and on general text."""
    if is_main() and not (folder.path / peft.TENSORS).is_file():  # an adapter that is there keeps its settings
        with folder.writing() as part:
            _write_settings(prepared, loaded, part)
    if prepared.config.sweep is None:
        progress = _fit(prepared, loaded, folder, start, record)
    else:
        progress, best = _fit_sweep(prepared, loaded, folder, record)
        prepared = dataclasses.replace(prepared, config=best)
    if not is_main():
        return progress, None, None
    config = prepared.config
    with folder.writing() as part:
        save(loaded.model, part)
        _write_settings(prepared, loaded, part)
    split, examples = prepared.data.heldout
    result = None
    if examples:
        result = evaluate(
            loaded,
            prepared.data,
            split,
            examples[: config.eval_samples],
            prepared.style,
            max_length=config.max_seq_length,
            max_new_tokens=config.max_new_tokens,
        )
    general = None
    if prepared.general:
        general = compare_general(loaded, prepared.general, config.max_seq_length)
        before, after = general.metrics["perplexity"]
        progress.note({"step": record["steps"], "general_perplexity_base": before, "general_perplexity": after})
    with folder.writing() as part:
        _write_reports(prepared, loaded, part, progress, result)
    folder.end("finished")
    return progress, result, general


def _begin(folder: OutputFolder, start: Start, record: dict[str, Any], trackers: tuple[str, ...]) -> None:
    """Remove what an earlier run left, if this run starts from the beginning, and write the note of this run."""
    if start.anew:
        folder.clear()
    folder.begin(record)
    # These grow during the run. "all" may include TensorBoard.
    folder.add("metrics.jsonl", *(["runs"] if {"tensorboard", "all"} & set(trackers) else []))


def _interrupted(config: TrainConfig, out: OutputFolder, folder: OutputFolder, error: KeyboardInterrupt) -> Interrupted:
    """The error that says how to continue: with the command that does, if the folder holds the settings of this run."""
    code = error.code if isinstance(error, Interrupted) else 130
    checkpoint, _ = newest_whole(folder.path)
    if checkpoint is None:
        _leave_nothing_unless_trained(out, folder)
        return Interrupted("interrupted before the first checkpoint: the same command starts over.", code)
    written = folder.path / _SETTINGS
    if processes() == 1 and written.is_file() and written.read_text(encoding="utf-8") == _settings(config):
        command = f"{report.program_name()} train {report.flag_text('--config', str(written))} --resume auto"
        return Interrupted(f"interrupted; {checkpoint} is saved. Go on with:\n  {command}", code)
    return Interrupted(
        f"interrupted; {checkpoint} is saved. The same command goes on from it with --resume auto "
        "(in place of --overwrite, where that was given).",
        code,
    )


def _leave_nothing_unless_trained(out: OutputFolder, folder: OutputFolder) -> None:
    """Remove the files of a run that failed before its first step was logged."""
    if not is_main() or checkpoints(folder.path) or (folder.path / peft.TENSORS).is_file():
        return
    metrics = folder.path / "metrics.jsonl"
    if not metrics.is_file() or not metrics.stat().st_size:
        folder.clear()
        if folder.path != out.path:
            out.drop_new()


def _load(prepared: Prepared) -> Loaded:
    config, labels = prepared.config, labels_of(prepared.data)
    how: dict[str, Any] = dict(
        dtype=weights_dtype(config, prepared.data), quantize=config.quantize, tokenizer=prepared.tokenizer
    )
    if labels is None:
        loaded = load_causal_lm(config.model, **how)
    else:
        several = prepared.data.task == MULTI_LABEL
        loaded = load_classifier(config.model, labels=labels, multi_label=several, **how)
    grow(loaded.model, max(prepared.new_tokens, default=-1) + 1)
    return loaded


def _fit(prepared: Prepared, loaded: Loaded, folder: OutputFolder, start: Start, record: dict[str, Any]) -> Progress:
    """Train, and return what was logged on the way."""
    with as_dataset(prepared.train) as train_rows, as_dataset(prepared.valid) as valid_rows:
        trainer, progress, stop = _trainer_of(train_rows, valid_rows, prepared, loaded, folder, record)
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
            _say(line)
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
        _say(best.told(history))
    if trains and is_main():
        _refuse_diverged(trainer, folder)
    loaded.model.eval()
    return progress


def _fit_sweep(
    prepared: Prepared, loaded: Loaded, folder: OutputFolder, record: dict[str, Any]
) -> tuple[Progress, TrainConfig]:
    """Train all adapters of a sweep, put the best one on the model, and return its settings."""
    from . import sweep

    choices = swept(prepared.config)
    bank = sweep.bank_of(loaded.model, choices)
    bank.use(next(iter(choices)))  # a trainer looks at what is adapted, which is the same for all of them
    with as_dataset(prepared.train) as train_rows, as_dataset(prepared.valid) as valid_rows:
        rows = train_rows, valid_rows
        trainer, progress, stop = _trainer_of(*rows, prepared, loaded, folder, record, bank=bank, choices=choices)
        with bank.rows(list(choices)), stop.heeding():
            trainer.train()
    best = sweep.best_of(trainer)
    with folder.writing() as part:
        _say(sweep.write_sweep(trainer, bank, best, part))
    folder.add(sweep.FILE, sweep.FOLDER)
    bank.use(best)
    loaded.model.eval()
    return progress, choices[best]


def _trainer_of(
    train_rows: Any,
    valid_rows: Any,
    prepared: Prepared,
    loaded: Loaded,
    folder: OutputFolder,
    record: dict[str, Any],
    **of_sweep: Any,
) -> tuple[Any, Progress, SaveAndStop]:
    """The trainer of a run, what shows its progress, and what ends it early. of_sweep: what only a sweep gives it."""
    from transformers import DataCollatorWithPadding, TrainingArguments
    from trl import SFTConfig

    from .base_trainer import arguments
    from .progress import Progress
    from .sweep import SweepTrainer
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
    pace = _pace(prepared)
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
        kind = SweepTrainer if of_sweep else CausalTrainer
        trainer = kind(args=arguments(SFTConfig, config, **settings), **common, **of_sweep)
    else:
        collator = DataCollatorWithPadding(loaded.tokenizer)
        made = arguments(TrainingArguments, config, **settings)
        weights = prepared.class_weights
        trainer = ClassifierTrainer(args=made, data_collator=collator, class_weights=weights, **common)
    trainer.name_of = functools.partial(_where, prepared)
    return trainer, progress, stop


def _pace(prepared: Prepared) -> Pace:
    """The pace of one process, for its share of the rows."""
    config, steps_an_epoch = prepared.config, prepared.plan.steps_an_epoch
    lengths, heldout = ([len(row["input_ids"]) for row in part] for part in (prepared.train, prepared.valid))
    tokens = padded_tokens(lengths, config.batch_size, shuffled=True) / processes()
    return Pace(tokens / steps_an_epoch, padded_tokens(heldout, config.batch_size, shuffled=False) // processes())


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


def _settings(config: TrainConfig) -> str:
    """The settings as YAML, without --resume and --overwrite: a repeated run overwrites nothing."""
    return to_yaml(dataclasses.replace(config, resume=None, overwrite=False))


def _write_settings(prepared: Prepared, loaded: Loaded, out: Path) -> None:
    """Write what is needed to run this again."""
    (out / _SETTINGS).write_text(_settings(prepared.config), encoding="utf-8")
    labels = labels_of(prepared.data)
    if labels is not None:
        kind: Any = prepared.data.task
        write_labels(out / LABELS, Task(kind, labels))
    prepared.style.write(out)
    loaded.tokenizer.save_pretrained(out)


def _write_reports(
    prepared: Prepared,
    loaded: Loaded,
    out: Path,
    progress: Progress,
    result: report.Evaluation | None,
) -> None:
    config = prepared.config
    again = dataclasses.replace(config, resume=None, overwrite=False)
    outcome = _outcome(prepared, progress, result, to_command(again, "train"))
    data = ",".join(map(public, config.data.split(",")))  # of several data sets, each
    card = model_card(
        base_model=config.model,
        data=data,
        settings=dataclasses.asdict(config) | {"data": data},
        parameters=str(prepared.attached).splitlines()[-1],
        result=result,
        seconds=outcome.seconds,
        labels=labels_of(prepared.data),
    )
    html = page.render(
        title=Path(config.output_dir).name,
        facts=_facts(prepared, outcome),
        command=outcome.command,
        settings=settings_table(again),
        summary=start_block(prepared),
        history=progress.history,
        result=result,
        changes=weight_changes(loaded.model),
    )
    for name, text in (("README.md", card), ("report.html", html), (RESULTS, outcome.as_json())):
        (out / name).write_text(text, encoding="utf-8")


def _outcome(prepared: Prepared, progress: Progress, result: report.Evaluation | None, command: str) -> Outcome:
    config = prepared.config
    return Outcome(
        lorakit=version("lorakit"),
        finished=datetime.now().astimezone().isoformat(timespec="minutes"),
        model=config.model,
        data=config.data,
        command=command,
        device=device_name(best_device()),
        seconds=trained_seconds(progress.history, progress.seconds),
        peak_bytes=progress.peak_bytes,
        planned_bytes=prepared.plan.peak_bytes,
        steps=prepared.plan.steps,
        trained_parameters=prepared.attached.trainable,
        losses=last_losses(progress.history),
        rows=result.rows if result is not None else 0,
        split=result.split if result is not None else "",
        scores=scores_of(result),
    )


def _facts(prepared: Prepared, outcome: Outcome) -> dict[str, str]:
    """What the page says of a run, by name."""
    config, attached, data = prepared.config, prepared.attached, prepared.data
    splits = {"train": data.train, "valid": data.valid, "test": data.test}
    rows = ", ".join(f"{len(part):,} {name}" for name, part in splits.items() if part)
    share = attached.trainable / max(attached.total, 1)
    return {
        "model": outcome.model,
        "data": f"{outcome.data}: {rows} rows",
        "adapter": f"rank {config.rank}, {outcome.trained_parameters:,} parameters trained ({share:.2%})",
        "training": f"{outcome.steps:,} steps, learning rate {config.learning_rate:g}, seed {config.seed}",
        "time of training": f"{duration(outcome.seconds)} on {outcome.device}",
        "peak memory": _peak(outcome.peak_bytes, outcome.planned_bytes),
        "finished": outcome.finished.replace("T", " ", 1),
        "lorakit": outcome.lorakit,
    }


def _peak(measured: int, planned: int | None) -> str:
    return f"{size(measured)} ({'not planned' if planned is None else f'planned {size(planned)}'})"


def _end_block(
    prepared: Prepared,
    out: OutputFolder,
    progress: Progress,
    result: report.Evaluation | None,
    general: report.Evaluation | None,
) -> str:
    peak = f"peak memory {_peak(progress.peak_bytes, prepared.plan.peak_bytes)}"
    if progress.loading_bytes > progress.peak_bytes:
        peak += f"; {size(progress.loading_bytes)} while the model was loaded"
    lines = [report.heading("done"), f"trained in {duration(progress.seconds)}; {peak}"]
    if result is not None and result.rows:
        lines.append(report.comparison(result))
    if general is not None:
        lines.append(report.comparison(general, rows=f"rows of {prepared.config.general_data}"))
    files = ", ".join(name for name in out.own if (out.path / name).is_file())
    lines += [report.heading("written"), f"{out}/: {files}"]
    example = (prepared.data.heldout[1] or prepared.data.train)[0]
    prompt, answers = example.text or question(example) or "TEXT", prepared.data.task == "causal-lm"
    lines.append(report.next_commands(out.path, answers=answers, prompt=prompt, pair=example.text_pair))
    return "\n".join(lines)


def _say(text: str) -> None:
    if is_main():
        print(text, flush=True)
