"""An adapter folded into its base's safetensors files, one tensor at a time: the model is never in memory.

    OUT/.lorakit/new/model-00001-of-00006.safetensors      each file appears when it is whole, checked and on the disk
    OUT/                                                   all of them at once, with config.json last

What is interrupted goes on with the same command at the file that it was writing. `fold.py` says which tensors change,
`stored.py` how files and model go together, `merge_check.py` what is compared afterwards; everything that can be
refused is refused before the first byte is written.
"""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.adapter import Adapter
from ..core.errors import LoraError
from ..core.numbers import size
from ..core.paths import expanded
from ..core.reading import json_of
from ..formats import peft
from ..formats.files import remove
from ..formats.folder import OutputFolder
from ..formats.shards import (
    CODES,
    DTYPES,
    Entry,
    ShardWriter,
    header_of,
    raw_bytes,
    read_header,
    same_bytes,
    total_size,
)
from .adapter_folder import is_adapter
from .bars import Bar, progress_bar
from .fold import as_dtype
from .locating import locate
from .merge_plan import MergePlan, Output
from .merge_rest import OTHER_WEIGHTS, carry_rest, is_weight, others
from .merging import MERGING, refuse_used
from .style import FILE as STYLE
from .task import LABELS


@dataclass(frozen=True)
class MergedFiles:
    """What was written and checked.

    files, tensors: how many in all; changed: tensors that are not the base's; updates: of the adapter, each of which
    found its weight. resumed: files that an earlier call had written. unmoved: updates too small to change any of
    the rows that were looked at, in the dtype of the weights. untied: whether head and embedding were one and are two.
    """

    files: int
    tensors: int
    changed: int
    updates: int
    resumed: int
    unmoved: int
    untied: bool

    def __str__(self) -> str:
        return (
            f"{self.changed} of {self.tensors} tensors in {self.files} {'file' if self.files == 1 else 'files'} "
            f"changed; all {self.updates} updates found their weights, and sampled rows are base + adapter"
        )

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader must know."""
        notes = []
        if self.resumed:
            notes.append(
                f"{self.resumed} of {self.files} files were there already: they are of an earlier call of this merge."
            )
        if self.unmoved:
            notes.append(
                f"{self.unmoved} of {self.updates} updates changed none of the numbers that were looked at: they are "
                "smaller than the last digit of the weights (--dtype float32 keeps them)."
            )
        if self.untied:
            notes.append("The head and the embedding were one matrix and are two now (tie_word_embeddings is false).")
        return tuple(notes)


def merge_files(
    base: str | Path,
    adapter: str | Path | Adapter,
    output_dir: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    overwrite: bool = False,
) -> MergedFiles:
    """Fold `adapter` into the safetensors files of `base` and write a folder like it, with no model in memory.

    base: a transformers model's folder with `model.safetensors`, or with several files and their index. adapter: a
    path, or an `Adapter`. output_dir: new, empty, or with `overwrite` one that holds a merged model. dtype: of the
    weights; None keeps the dtype that each tensor has.

    Each tensor has the bits that a merge in memory gives it: the sum is made in float32 at least and rounded once. At
    most a tensor and its update are in memory (of a converted weight, the tensors that become one; with DoRA some
    float32 copies of a weight). Rows of each merged tensor are read again and compared with the equation in float64.
    The rest of the folder is carried over: configuration, tokenizer, generation settings, and the adapter's own
    tokenizer and style where it has them.

    The folder appears whole or not at all. A call that was interrupted is continued by the same call. Raises LoraError,
    before anything is written, for an update without a weight, a quantised base and too little space on the disk;
    FileNotFoundError for a missing file; FileExistsError for a folder in use.
    """
    folder = _folder_of(base)
    source = adapter if isinstance(adapter, Adapter) else Path(expanded(adapter))
    out = OutputFolder(expanded(output_dir), MERGING)
    inputs = [folder] if isinstance(source, Adapter) else [folder, source]
    wanted = _dtype_of(dtype)
    record = _record(folder, source, wanted)
    out.refuse_unusable(inputs)
    out.recover()
    finished = out.note is not None and out.note.state == "finished" and out.note.record == record
    if not finished:
        refuse_used(out, [str(path) for path in inputs], overwrite)
    plan = MergePlan(folder, source, wanted)
    if finished and not overwrite:  # interrupted when all that was left was to say so
        return _merged(plan, resumed=len(plan.files), unmoved=_check(out.path, plan))
    with out.held():
        out.refuse_others()
        new = out.new
        goes_on = new.note is not None and new.note.record == record
        written = [file for file in plan.files if goes_on and file in new.own]
        if not goes_on:
            out.drop_new()
        remove(new.hidden / "part")  # half of a file, whose room is needed
        _refuse_full(out, plan, written)
        if not goes_on:
            new.begin(record)
        try:
            _write(new, plan, written)
            unmoved = _check(new.path, plan)
        except LoraError:
            out.drop_new()
            raise
        except KeyboardInterrupt:
            raise KeyboardInterrupt("interrupted; the same command goes on where it was") from None
        out.put_new_in_place()
    return _merged(plan, len(written), unmoved)


def _merged(plan: MergePlan, resumed: int, unmoved: int) -> MergedFiles:
    outputs = [output for own in plan.outputs.values() for output in own.values()]
    changed = sum(output.unit is not None or output.value is not None for output in outputs)
    untied = bool(plan.fold.untied)
    return MergedFiles(len(plan.files), len(outputs), changed, len(plan.fold.updates), resumed, unmoved, untied)


def _write(new: OutputFolder, plan: MergePlan, written: list[str]) -> None:
    """Write the safetensors files that are not there yet, and all others, into the new folder."""
    left = [file for file in plan.files if file not in written]
    size_left = sum(total_size(plan.tensors(file).values()) for file in left)
    with progress_bar(total=size_left, doing="merging", unit="B", leave=True) as shown:
        for file in left:
            with new.writing() as part:
                _write_file(part / file, plan, file, shown)
    with new.writing() as part:
        carry_rest(plan, part)


def _write_file(path: Path, plan: MergePlan, file: str, shown: Bar) -> None:
    outputs, tensors = plan.outputs[file], plan.tensors(file)
    ready: dict[str, Tensor] = {}  # of a unit whose other tensors come later in this file
    with ShardWriter(path, tensors, plan.shards.metadata[file]) as writer:
        for name, planned in tensors.items():
            output = outputs[name]
            if output.unit is not None:
                if name not in ready:
                    found = plan.fold.tensors(output.unit, plan.dtype_of(output.unit))
                    alike = {name, *output.unit.names} & outputs.keys()
                    ready |= {own: found[outputs[own].source] for own in alike if outputs[own].unit is output.unit}
                    del found
                writer.write(name, ready.pop(name))
            elif output.value is not None:
                writer.write(name, output.value)
            elif planned.dtype == plan.shards.tensors[output.source].dtype:
                writer.carry(name, plan.shards.tensors[output.source])
            else:
                writer.write(name, as_dtype(plan.shards.tensors[output.source].read(), DTYPES[planned.dtype]))
            shown.update(planned.size)


def _check(folder: Path, plan: MergePlan) -> int:
    """Read what was written again, and compare it with base + adapter. Returns how many updates moved no row.

    Raises LoraError where the two differ.
    """
    written = {name: entry for file in plan.files for name, entry in read_header(folder / file)[1].items()}
    outputs = {name: output for own in plan.outputs.values() for name, output in own.items()}
    if written.keys() != outputs.keys():
        raise LoraError(f"{folder}: its files hold other tensors than were to be written. Nothing was put in place.")
    moved: dict[str, bool] = {}
    checked: set[int] = set()  # units
    with progress_bar(total=len(outputs), doing="checking", unit="tensor", leave=True) as shown:
        for name, output in outputs.items():
            if output.unit is None:
                _check_kept(name, written[name], output, plan)
            elif id(output.unit) not in checked:
                checked.add(id(output.unit))
                here = {own: written[own] for own in output.unit.names} | {output.source: written[name]}
                for target, rows in plan.fold.check(output.unit, here, plan.dtype_of(output.unit)).items():
                    moved[target] = moved.get(target, False) or rows
            shown.update()
    return list(moved.values()).count(False)


def _check_kept(name: str, entry: Entry, output: Output, plan: MergePlan) -> None:
    """Raise LoraError where a tensor that the adapter does not update is not what it was, or was to be."""
    if output.value is not None:
        same = torch.equal(entry.read(), output.value)
    else:
        base = plan.shards.tensors[output.source]
        same = same_bytes(base, entry) if base.dtype == entry.dtype else entry.shape == base.shape
    if not same:
        raise LoraError(f"{entry.path}: {name} is not what it was to be. Nothing was put in place.")


def _folder_of(base: str | Path) -> Path:
    """The base's folder; a model of the hub is fetched first, as far as it is not here already.

    Raises FileNotFoundError for what is none, LoraError for one that is quantised or no safetensors.
    """
    if is_adapter(expanded(base)):
        raise LoraError(f"{base} is an adapter's folder; the base is to be a model's.")
    found, options = locate(str(base))
    if "gguf_file" in options:
        raise LoraError(f"{base} is a .gguf file; only safetensors files are merged shard by shard. Merge in memory.")
    folder = Path(found) if Path(found).is_dir() else _fetched(found)
    config = json_of(folder / "config.json", dict)
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        if quantised := part.get("quantization_config"):
            method = quantised.get("quant_method", "quantised") if isinstance(quantised, dict) else "quantised"
            raise LoraError(
                f"{folder} is quantised ({method}). Merge into the base in plain weights (bfloat16, float16, float32)."
            )
    return folder


def _fetched(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download

    # Mistral's models have all weights a second time in files of this name.
    others = ["consolidated*", *(f"*{end}" for end in OTHER_WEIGHTS)]
    return Path(snapshot_download(hub_id, ignore_patterns=others))


def _dtype_of(said: str | torch.dtype | None) -> torch.dtype | None:
    dtype = getattr(torch, said, None) if isinstance(said, str) else said
    if said is not None and not (isinstance(dtype, torch.dtype) and dtype in CODES and dtype.is_floating_point):
        raise LoraError(f"dtype={said!r}: expected float32, bfloat16, float16 or float64.")
    return dtype


def _record(folder: Path, adapter: Adapter | Path, dtype: torch.dtype | None) -> dict[str, Any]:
    """What tells two merges apart: only the files of the same one are gone on with."""
    files = {
        path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(folder.glob("*")) if path.is_file()
    }
    return {
        "base": str(folder.resolve()),
        "files": files,
        "adapter": _digest(adapter),
        "dtype": None if dtype is None else str(dtype).removeprefix("torch."),
    }


def _digest(adapter: Adapter | Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    if isinstance(adapter, Adapter):
        for name, update in adapter.updates.items():
            digest.update(repr((name, update.layout, update.scale)).encode())
            for tensor in update.tensors().values():
                digest.update(raw_bytes(tensor.detach().cpu().contiguous()))
        for name, tensor in adapter.trained.items():
            digest.update(name.encode())
            digest.update(raw_bytes(tensor.detach().cpu().contiguous()))
        for name, rows in adapter.token_rows.items():
            digest.update(repr((name, rows.tokens)).encode())
            digest.update(raw_bytes(rows.values.detach().cpu().contiguous()))
        return digest.hexdigest()
    names = (*peft.FILES, LABELS, STYLE, "tokenizer_config.json", "tokenizer.json", "chat_template.jinja")
    for path in [adapter] if adapter.is_file() else [adapter / name for name in names if (adapter / name).is_file()]:
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _refuse_full(out: OutputFolder, plan: MergePlan, written: list[str]) -> None:
    """Raise LoraError where the disk has no space for what is still to be written."""
    needed = sum(
        len(header_of(plan.tensors(file), plan.shards.metadata[file])) + total_size(plan.tensors(file).values())
        for file in plan.files
        if file not in written
    )
    for entry in others(plan.folder):
        inside = entry.rglob("*") if entry.is_dir() else [entry]
        needed += sum(path.stat().st_size for path in inside if path.is_file() and not is_weight(path))
    free = shutil.disk_usage(out.hidden).free
    if needed > free:
        raise LoraError(
            f"--output-dir {out} needs {size(needed)} more, and {size(free)} are free there. Nothing was written. "
            "Choose another disk, or make room."
        )
