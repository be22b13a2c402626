"""Write a merged model as a plain transformers folder, and check it by loading it back before it gets its name."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..core.errors import LoraError
from ..formats.folder import OutputFolder, OutputKind
from .adapter_folder import base_and_adapter
from .config import Quantize
from .generation import end_tokens
from .locating import locate
from .merged_model import Difference, MergedModel, Onto, merged_model
from .models import Loaded, load_with_adapter
from .style import Style, trained_on

if TYPE_CHECKING:
    pass

# A product of 16-bit numbers keeps 8 (bfloat16) or 11 (float16) bits. Logits, after many layers, keep a few less.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02, torch.float64: 1e-9}


# A folder that lorakit 0.1.0 merged has no note and looks like any other model, so it is never replaced.
MERGING = OutputKind("merge", keystone="config.json")


@dataclass(frozen=True)
class Merged:
    """What was written: its difference from the model that was to be written, its dtype, and notes for the user.

    tried: of a quantised base, how far each merged model was from base + adapter. onto: which of them was written.
    rows: where the rows came from on which they were compared.
    """

    difference: Difference
    dtype: str
    notes: tuple[str, ...] = ()
    tried: dict[Onto, Difference] = field(default_factory=dict)
    onto: Onto = "original"
    rows: str = ""


def merge_to_folder(
    model: str,
    adapter: str | None,
    output_dir: str,
    *,
    dtype: str = "base",
    quantize: Quantize | None = None,
    onto: Onto | None = None,
    data: str | None = None,
    overwrite: bool = False,
    tolerance: float | None = None,
) -> Merged:
    """Merge `adapter` into `model`, write a folder that `from_pretrained` loads, load it and compare the logits.

    dtype: dtype of the merged weights; "base" is that of the base model's files. quantize: how the base was quantised
    when the adapter was trained; None: as its folder says. onto: for such a base the original weights or the quantised
    ones as numbers; None: what comes nearer to base + adapter. data: rows to compare on.

    The folder is filled only when the comparison is within `tolerance`; until then, what an earlier merge wrote there
    stays. Raises FileExistsError for a folder in use, or one that holds files that no merge wrote; ValueError if there
    is nothing to merge, no weight changes, or the difference is too large.
    """
    base, folder = base_and_adapter(model, adapter)
    if folder is None:
        raise LoraError(f"{model} is a base model without an adapter; give --adapter FOLDER.")
    out = OutputFolder(output_dir, MERGING)
    refuse_used(out, [base, folder], overwrite)
    how = trained_on(folder) if quantize is None else quantize
    merged = merged_model(model, adapter, dtype=dtype, quantize=how, onto=onto, data=data)
    loaded = merged.loaded

    with out.held():
        out.refuse_others()
        out.drop_new()  # what an interrupted merge left
        try:
            out.new.begin({"model": model, "adapter": adapter})
            with out.new.writing() as part:
                _write_model(loaded, part)
                loaded.tokenizer.save_pretrained(part)
                Style.recorded(folder, loaded.tokenizer).write(part)
                difference = merged.reference.difference(_reload(loaded, part))
                limit = _TOLERANCE[loaded.model.dtype] if tolerance is None else tolerance
                if not difference.relative <= limit:
                    raise LoraError(
                        f"the merged model differs from base + adapter: {difference}; the limit is {limit:g} "
                        "(--tolerance). Nothing was written. --dtype float32 merges more exactly."
                    )
            out.put_new_in_place()
        finally:
            out.drop_new()
    written = str(loaded.model.dtype).removeprefix("torch.")
    notes = (*_unmoved(merged), *_notes(base, dtype))
    return Merged(difference, written, notes, merged.tried, merged.onto, merged.reference.heldout.source)


def _unmoved(merged: MergedModel) -> tuple[str, ...]:
    if not merged.unmoved:
        return ()
    return (
        f"{merged.unmoved} of {merged.updates} updates changed no number of their weight: they are zero, or smaller "
        "than its last digit (--dtype float32 keeps those).",
    )


def _notes(base: str, dtype: str) -> tuple[str, ...]:
    if "gguf_file" not in locate(base)[1]:
        return ()
    note = f"{base} is a .gguf file: its weights were dequantised, and the merged model is a plain one"
    return (note + (" in float32 (--dtype bfloat16 makes it half the size)." if dtype == "base" else "."),)


def _write_model(loaded: Loaded, folder: Path) -> None:
    """Write the weights, and the base's generation_config.json with the end tokens of the adapted model.

    Training may have taught another end token than the base's. The file is written here because transformers refuses
    to write settings that contradict each other, as those of well-known models do.
    """
    model = loaded.model
    if not model.can_generate():
        model.save_pretrained(folder)
        return
    own = model.generation_config
    model.generation_config = type(own)()
    model.save_pretrained(folder)
    model.generation_config = own
    write_generation_config(loaded, folder)


def write_generation_config(loaded: Loaded, folder: Path) -> None:
    """The settings that the model generates by, with where answers end in the tokenizer's words."""
    settings = loaded.model.generation_config.to_diff_dict() | {"eos_token_id": end_tokens(loaded) or None}
    (folder / "generation_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def refuse_used(out: OutputFolder, inputs: list[str], overwrite: bool) -> None:
    """Raise FileExistsError if the folder holds an input of the merge, files that no merge wrote, or, without
    `overwrite`, an earlier merged model.
    """
    out.refuse_unusable(inputs)
    out.recover()
    out.refuse_others()
    if out.own and not overwrite:
        raise FileExistsError(
            f"--output-dir {out} is not empty: it holds a merged model. Choose another, or add --overwrite to replace "
            "that."
        )


def _reload(loaded: Loaded, folder: Path) -> Loaded:
    dtype = str(loaded.model.dtype).removeprefix("torch.")
    return load_with_adapter(str(folder), None, dtype=dtype, device=loaded.device)
