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
from ..core.table import Table
from ..formats import peft, save
from ..formats.files import remove, replacing
from ..formats.folder import OutputFolder
from . import page, report
from .adapter_folder import ADAPTERS
from .card import model_card, public
from .changes import weight_changes
from .checkpoints import SEARCH, checkpoints, newest_whole, search_in
from .config import TrainConfig
from .divergence import Diverged
from .evaluate import compare_general, evaluate, question
from .fitting import Chosen, train_each, train_one
from .interrupt import Interrupted
from .labels import MULTI_LABEL
from .loss import check_causal
from .memory import few_kernels
from .models import LABELS, Loaded, best_device, load_causal_lm, load_classifier
from .outcome import RESULTS, Outcome, device_name, last_losses, scores_of, trained_seconds
from .packing import check_packing
from .plan import processes
from .preflight import refuse_large_run
from .prepare import Prepared, adapt, labels_of, prepare, weights_dtype
from .processes import is_main, of_main, say
from .quiet import quiet_libraries
from .record import base_fingerprint, refuse_differences, run_record
from .settings import settings_table, to_command, to_yaml
from .start import TRAINING, Start, decided, start_of
from .start_block import start_block
from .task import Task, write_labels
from .terminal import to_width
from .tried import Tried
from .vocabulary import grow

if TYPE_CHECKING:
    from .progress import Progress

_SETTINGS, _CARD = "config.yaml", "README.md"
_OPTIMISTIC = "the settings were chosen by the loss on these rows; expect slightly worse scores on other rows"


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
        say(f"{out} holds this run, finished after {record['steps']} steps: nothing remains to be done.")
        return out.path
    say(start_block(prepared, printed=True))
    for line in start.said:
        say(to_width(line))
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
    if not (config.sweep or config.auto or prepared.learners):
        adapt(config, loaded.model, prepared.new_tokens, new_head=prepared.data.task != "causal-lm")
    out = OutputFolder(config.output_dir, TRAINING)
    folder = start.folder(out)
    with out.held() if is_main() else contextlib.nullcontext():
        if is_main():
            if decided(config, out) != start:
                raise FileExistsError(f"{out} was changed by another process meanwhile. Run the command again.")
            _begin(folder, start, record, config.report_to or ())
        try:
            ended = _run(prepared, loaded, folder, start, record)
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
        say(_end_block(prepared, out, ended))
    return out.path


@dataclasses.dataclass(frozen=True)
class _Ended:
    """How a run ended. result: the scores on held-out rows. adapters, several: if rows name adapters, a table of
    what each came to, and the scores of each. general: those on general text. told: what was printed before training.
    tried: the settings among which those of the run were chosen.
    """

    progress: Progress
    result: report.Evaluation | None = None
    adapters: Table | None = None
    several: report.SeveralEvaluations | None = None
    general: report.Evaluation | None = None
    told: str = ""
    tried: Tried | None = None


def _run(prepared: Prepared, loaded: Loaded, folder: OutputFolder, start: Start, record: dict[str, Any]) -> _Ended:
    """Train and write everything into `folder`."""
    if is_main() and not (folder.path / peft.TENSORS).is_file():  # an adapter that is there keeps its settings
        with folder.writing() as part:
            _write_settings(prepared, loaded, part)
    if prepared.learners:
        return _run_each(prepared, loaded, folder, record)
    told, tried = start_block(prepared), None
    if prepared.config.sweep is None and prepared.config.auto is None:
        progress = train_one(prepared, loaded, folder, start, record)
    else:
        progress, chosen = _chosen_of(prepared, loaded, folder, record)
        prepared, tried = _as_chosen(prepared, chosen), chosen.tried
    if not is_main():
        return _Ended(progress)
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
        if tried is not None and tried.by_heldout and split == "valid":
            result = dataclasses.replace(result, notes=(*result.notes, _OPTIMISTIC))
    general = None
    if prepared.general:
        general = compare_general(loaded, prepared.general, config.max_seq_length)
        before, after = general.metrics["perplexity"]
        progress.note({"step": record["steps"], "general_perplexity_base": before, "general_perplexity": after})
    ended = _Ended(progress, result, general=general, told=told, tried=tried)
    with folder.writing() as part:
        _write_reports(prepared, loaded, part, ended)
        card = _card(prepared, result, progress.seconds, tried=tried)
        (part / _CARD).write_text(card, encoding="utf-8")
    remove(folder.path / SEARCH)  # all of it is in the files of the run now
    folder.end("finished")
    return ended


def _run_each(prepared: Prepared, loaded: Loaded, folder: OutputFolder, record: dict[str, Any]) -> _Ended:
    """Train every adapter on the rows that name it, and write a folder for each."""
    from .each_adapter import card_of_all, save_each, score_each, table_of

    told = start_block(prepared)
    progress, bank = train_each(prepared, loaded, folder, record)
    with folder.writing() as part:
        save_each(bank, list(bank), part, functools.partial(_write_settings, prepared, loaded))
        _write_settings(prepared, loaded, part)
    several = score_each(prepared, loaded, bank, folder.path)
    table = table_of(bank, progress.history, several)
    ended = _Ended(progress, None if several is None else several.all, table, several, told=told)
    with folder.writing() as part:
        _write_reports(prepared, loaded, part, ended)
        card = card_of_all(prepared.config.model, prepared.config.data, table)
        (part / _CARD).write_text(card, encoding="utf-8")
    for name in bank:
        own = several.by_adapter.get(name) if several is not None else None
        beside = f"; trained in one pass with {len(prepared.learners) - 1} others"
        with replacing(folder.path / ADAPTERS / name / _CARD) as path:
            path.write_text(_card(prepared, own, progress.seconds, beside), encoding="utf-8")
    folder.end("finished")
    return ended


def _chosen_of(
    prepared: Prepared, loaded: Loaded, folder: OutputFolder, record: dict[str, Any]
) -> tuple[Progress, Chosen]:
    """Train several settings, as --sweep or --auto says."""
    if prepared.search is None:
        from .sweep import train_swept

        def write_settings(config: TrainConfig, out: Path) -> None:
            _write_settings(dataclasses.replace(prepared, config=config), loaded, out)

        return train_swept(prepared, loaded, folder, record, write_settings)
    from .auto_run import train_searched

    return train_searched(prepared, loaded, folder, record)


def _as_chosen(prepared: Prepared, chosen: Chosen) -> Prepared:
    """The run as if only the chosen settings had been given."""
    attached = prepared.attached
    total = attached.total - attached.trainable + chosen.parameters
    return dataclasses.replace(
        prepared,
        config=chosen.config,
        attached=dataclasses.replace(attached, trainable=chosen.parameters, total=total),
    )


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
    if (tried := search_in(folder.path)) is not None:
        return Interrupted(
            f"interrupted; {tried} holds what was tried. The same command goes on with it with --resume auto (in place "
            "of --overwrite, where that was given).",
            code,
        )
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
    kept = checkpoints(folder.path) or search_in(folder.path) or (folder.path / peft.TENSORS).is_file()
    if not is_main() or kept:
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


def _write_reports(prepared: Prepared, loaded: Loaded, out: Path, ended: _Ended) -> None:
    config, progress, result = prepared.config, ended.progress, ended.result
    again = dataclasses.replace(config, resume=None, overwrite=False)
    outcome = _outcome(prepared, progress, result, to_command(again, "train"))
    html = page.render(
        title=Path(config.output_dir).name,
        facts=_facts(prepared, outcome),
        command=outcome.command,
        settings=settings_table(again),
        summary=ended.told,
        history=progress.history,
        result=result,
        changes=weight_changes(loaded.model),
        tried=ended.tried,
        adapters=ended.adapters,
    )
    for name, text in (("report.html", html), (RESULTS, outcome.as_json())):
        (out / name).write_text(text, encoding="utf-8")


def _card(
    prepared: Prepared,
    result: report.Evaluation | None,
    seconds: float,
    beside: str = "",
    tried: Tried | None = None,
) -> str:
    """The card of one adapter. beside: what to say of how it was trained."""
    config = prepared.config
    data = ",".join(map(public, config.data.split(",")))  # of several data sets, each
    return model_card(
        base_model=config.model,
        data=data,
        settings=dataclasses.asdict(config) | {"data": data},
        parameters=str(prepared.attached).splitlines()[-1] + beside,
        result=result,
        seconds=seconds,
        labels=labels_of(prepared.data),
        multi_label=prepared.data.task == MULTI_LABEL,
        tried=tried,
    )


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
    adapter = f"rank {config.rank}, {outcome.trained_parameters:,} parameters trained ({share:.2%})"
    several = {"adapters": f"{', '.join(data.adapters)}; of each: {adapter}"}
    return {
        "model": outcome.model,
        "data": f"{outcome.data}: {rows} rows",
        **(several if data.adapters else {"adapter": adapter}),
        "training": f"{outcome.steps:,} steps, learning rate {config.learning_rate:g}, seed {config.seed}",
        "time of training": f"{duration(outcome.seconds)} on {outcome.device}",
        "peak memory": _peak(outcome.peak_bytes, outcome.planned_bytes),
        "finished": outcome.finished.replace("T", " ", 1),
        "lorakit": outcome.lorakit,
    }


def _peak(measured: int, planned: int | None) -> str:
    return f"{size(measured)} ({'not planned' if planned is None else f'planned {size(planned)}'})"


def _end_block(prepared: Prepared, out: OutputFolder, ended: _Ended) -> str:
    progress, result, general = ended.progress, ended.result, ended.general
    peak = f"peak memory {_peak(progress.peak_bytes, prepared.plan.peak_bytes)}"
    if progress.loading_bytes > progress.peak_bytes:
        peak += f"; {size(progress.loading_bytes)} while the model was loaded"
    lines = [report.heading("done"), to_width(f"trained in {duration(progress.seconds)}; {peak}")]
    if ended.several is not None:
        lines.append(report.comparison_of_several(ended.several, rows="held-out rows"))
    elif result is not None and result.rows:
        lines.append(report.comparison(result))
    if general is not None:
        lines.append(report.comparison(general, rows=f"rows of {prepared.config.general_data}"))
    files = ", ".join(name for name in out.own if (out.path / name).is_file())
    lines += [report.heading("written"), to_width(f"{out}/: {files}")]
    example = (prepared.data.heldout[1] or prepared.data.train)[0]
    prompt, answers = example.text or question(example) or "TEXT", prepared.data.task == "causal-lm"
    lines.append(report.next_commands(out.path, answers=answers, prompt=prompt, pair=example.text_pair))
    return "\n".join(lines)
