"""Decide what a run begins with, before any work: an empty folder, a new folder beside an old run, or a checkpoint.

    nothing in OUT                    a new run
    a run that left nothing to keep   it is removed, a new run
    any other run                     refused, unless --resume or --overwrite is given
    anything else                     refused

`--overwrite` writes the new run into OUT/.lorakit/new, and it takes the old one's place when it is whole.
`--resume auto` goes on with the newest whole checkpoint. The checkpoints of an interrupted `--overwrite` come before
those of the run that it should replace. Without a checkpoint it starts a new run, so one command serves for all starts.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..formats import peft
from ..formats.folder import OutputFolder, OutputKind
from .adapter_folder import adapters_in
from .checkpoints import checkpoints, fault_of, newest_whole, record_in, search_in, step_of
from .config import TrainConfig
from .preflight import check_output
from .record import record_of_released
from .settings import UsageError

_FILES = (
    r"adapter_config\.json|adapter_model\.safetensors|labels\.json|config\.yaml|metrics\.jsonl|README\.md|report\.html"
    r"|checkpoint-\d+"
)
TOKENIZER_FILES = (  # lorakit 0.1.0 listed them nowhere; now the note of a folder has each file
    r"tokenizer.*|chat_template\.jinja|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)|merges\.txt"
    r"|spiece\.model|sentencepiece.*\.model|normalizer\.json"
)


def settings_in(folder: Path) -> dict[str, Any]:
    """The settings in a folder's config.yaml; empty if there is no readable one."""
    import yaml

    try:
        found = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def _is_released(folder: Path) -> bool:
    return {"model", "data", "output_dir", "rank", "learning_rate"} <= settings_in(folder).keys()


TRAINING = OutputKind(
    "train", peft.CONFIG, names=_FILES, released=_is_released, released_names=f"{TOKENIZER_FILES}|runs"
)


@dataclass(frozen=True)
class Start:
    """How a run begins.

    beside: the run is written beside an old one. anew: what an earlier run left in its folder is removed first.
    checkpoint: the run goes on from it. record: that of the run that goes on. finished: that run is complete.
    said: sentences for the user.
    """

    beside: bool = False
    anew: bool = False
    checkpoint: Path | None = None
    record: dict[str, Any] | None = None
    finished: bool = False
    said: tuple[str, ...] = ()

    def folder(self, out: OutputFolder) -> OutputFolder:
        """Where the run writes."""
        return out.new if self.beside else out


def start_of(config: TrainConfig) -> Start:
    """Decide how a run begins. Writes nothing, but completes an exchange of folders that was interrupted.

    Raises FileExistsError for a folder in use, FileNotFoundError or ValueError for a checkpoint that cannot be used,
    UsageError for flags that contradict each other.
    """
    out = OutputFolder(config.output_dir, TRAINING)
    check_output(out.path)
    out.refuse_unusable([config.model, *([config.from_adapter] if config.from_adapter else [])])
    out.recover()
    return decided(config, out)


def decided(config: TrainConfig, out: OutputFolder) -> Start:
    """`start_of`, for a folder that can be written to."""
    if config.resume is not None:
        return _resumed(config, out)
    if not out.own:
        out.refuse_others()
        return Start()
    if config.overwrite:
        out.refuse_others()
        said = f"the run in {out} stays as it is until the new one is whole"
        return Start(beside=True, anew=True, said=(f"{said}, which grows in {out.new}.",))
    if _nothing_to_keep(out):
        out.refuse_others()
        return Start(anew=True, said=(f"{out} holds a run that came to nothing; a new one takes its place.",))
    finished = (out.path / peft.CONFIG).is_file() or bool(adapters_in(out.path))
    begun = checkpoints(out.path) or search_in(out.path)
    holds = "a finished run" if finished else "an interrupted run" if begun else "an adapter"
    beside = " A new run beside it was interrupted: --resume auto goes on with that." if out.new.own else ""
    raise FileExistsError(
        f"--output-dir {out} is not empty: it holds {holds}.{beside} Add --resume auto to go on with it, or "
        "--overwrite to replace it by a new one."
    )


def _resumed(config: TrainConfig, out: OutputFolder) -> Start:
    assert config.resume is not None
    auto, given = config.resume == "auto", Path(config.resume)
    beside = bool(out.new.own) and (auto or given.resolve().is_relative_to(out.new.path.resolve()))
    here = out.new if beside else out
    if not out.own:
        out.refuse_others()
    if not auto:
        return _from_given(config, out, here, given, beside)
    if config.overwrite:
        raise UsageError("--resume goes on with a run and --overwrite starts a new one; give one of them.")
    checkpoint, passed = newest_whole(here.path)
    note = here.note
    products = {name for name in note.files if step_of(name) < 0} if note else set()
    whole = note is not None and note.state == "finished" and products <= set(here.own)
    if not whole and note is not None and (tried := search_in(here.path)) is not None:
        return Start(beside, record=note.record, said=(*passed, f"goes on with the search of which {tried} tells."))
    if checkpoint is None and not whole:
        if (here.path / peft.TENSORS).is_file():
            raise FileNotFoundError(
                f"--resume auto: {here} holds an adapter and no whole checkpoint to go on from. --overwrite starts "
                "a new run in its place."
            )
        said = (
            f"--resume auto: {here} holds no {'whole ' if passed else ''}checkpoint; the run starts from the beginning."
        )
        return Start(beside, anew=bool(here.own), said=(*passed, said))
    assert note is not None
    record = record_in(checkpoint) if checkpoint else note.record
    return Start(
        beside,
        checkpoint=checkpoint,
        record=record or note.record or record_of_released(settings_in(here.path)),
        finished=whole,
        said=(*passed, *([f"goes on from {checkpoint}."] if checkpoint else [])),
    )


def _from_given(config: TrainConfig, out: OutputFolder, here: OutputFolder, given: Path, beside: bool) -> Start:
    if not given.is_dir():
        raise FileNotFoundError(f"--resume {given}: no such checkpoint.")
    if (fault := fault_of(given)) is not None:
        inside = checkpoints(given)
        hint = (
            f" Name one of {', '.join(p.name for p in inside)} in it."
            if inside
            else " --resume auto finds a whole one."
        )
        raise FileNotFoundError(f"--resume {given} is no whole checkpoint of lorakit: {fault}.{hint}")
    in_it = given.resolve().parent == here.path.resolve()
    if in_it and config.overwrite:
        raise UsageError("--resume goes on with a run and --overwrite starts a new one; give one of them.")
    if not in_it and out.own and not config.overwrite:
        raise FileExistsError(
            f"--output-dir {out} holds a run already, and {given} is a checkpoint of another one. Choose another "
            "--output-dir, or add --overwrite."
        )
    record = record_in(given) or record_of_released(settings_in(given.parent))
    said = (f"goes on from {given}.",)
    if in_it:
        return Start(beside, checkpoint=given, record=record, said=said)
    if out.own:
        out.refuse_others()
    return Start(bool(out.own), anew=bool(out.own), checkpoint=given, record=record, said=said)


def _nothing_to_keep(out: OutputFolder) -> bool:
    """Whether the run in a folder failed, or ended before its first checkpoint."""
    note = out.note
    if note is None or (out.path / peft.TENSORS).is_file() or adapters_in(out.path):
        return False
    return note.state == "failed" or not (checkpoints(out.path) or search_in(out.path))
