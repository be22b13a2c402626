"""A merged model as a plain transformers folder, checked by loading it back before it is given its name."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..core.attach import adapted_layers, detach
from ..core.errors import LoraError
from ..core.switching import merge
from ..formats.folder import OutputFolder, OutputKind
from .adapter_folder import base_and_adapter
from .generation import end_tokens
from .locating import locate
from .models import Loaded, load_with_adapter
from .positions import longest_row
from .style import Style

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# A product of 16-bit numbers keeps 8 (bfloat16) or 11 (float16) bits; the logits of many layers, a few less.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02, torch.float64: 1e-9}


# What 0.1.0 merged has no note and cannot be told from any other model, so it is never replaced.
MERGING = OutputKind("merge", keystone="config.json")


@dataclass(frozen=True)
class Difference:
    """Logits of the merged folder against base + adapter, over random tokens."""

    largest: float  # absolute
    relative: float  # to the largest logit
    same_choice: float  # share of positions with the same likeliest token or class

    def __str__(self) -> str:
        return (
            f"largest logit difference {self.largest:.3g} ({self.relative:.2g} of the largest logit), "
            f"same choice at {self.same_choice:.1%} of the positions"
        )


@dataclass(frozen=True)
class Merged:
    """What was written: how far from base + adapter, in which dtype, and what its reader must know."""

    difference: Difference
    dtype: str
    notes: tuple[str, ...] = ()


def merge_to_folder(
    model: str,
    adapter: str | None,
    output_dir: str,
    *,
    dtype: str = "base",
    overwrite: bool = False,
    tolerance: float | None = None,
) -> Merged:
    """Merge `adapter` into `model`, write a folder that `from_pretrained` loads, load it and compare the logits.

    dtype: of the merged weights; "base" is the one that the base's files have.

    The folder is filled only when the comparison is within `tolerance`; until then, what an earlier merge wrote there
    stays. Raises FileExistsError for a folder in use, or one that holds anything that no merge wrote; ValueError when
    there is nothing to merge or the difference is too large.
    """
    base, folder = base_and_adapter(model, adapter)
    if folder is None:
        raise LoraError(f"{model} is a base model without an adapter; give --adapter FOLDER.")
    out = OutputFolder(output_dir, MERGING)
    refuse_used(out, [base, folder], overwrite)
    loaded = load_with_adapter(model, adapter, dtype=dtype)
    inputs = _probe(loaded)
    expected = _logits(loaded.model, inputs)
    _bake(loaded.model)

    with out.held():
        out.refuse_others()
        out.drop_new()  # what an interrupted merge left
        try:
            out.new.begin({"model": model, "adapter": adapter})
            with out.new.writing() as part:
                _write_model(loaded, part)
                loaded.tokenizer.save_pretrained(part)
                Style.recorded(folder, loaded.tokenizer).write(part)
                difference = _difference(expected, _logits(_reload(loaded, part), inputs))
                limit = _TOLERANCE[loaded.model.dtype] if tolerance is None else tolerance
                if not difference.relative <= limit:
                    raise LoraError(
                        f"the merged model differs from base + adapter: {difference}; the limit is {limit:g} "
                        "(--tolerance). Nothing was written. --dtype float32 merges more exactly."
                    )
            out.put_new_in_place()
        finally:
            out.drop_new()
    return Merged(difference, str(loaded.model.dtype).removeprefix("torch."), _notes(base, dtype))


def _notes(base: str, dtype: str) -> tuple[str, ...]:
    if "gguf_file" not in locate(base)[1]:
        return ()
    note = f"{base} is a .gguf file: its weights were dequantised, and the merged model is a plain one"
    return (note + (" in float32 (--dtype bfloat16 makes it half the size)." if dtype == "base" else "."),)


def _write_model(loaded: Loaded, folder: Path) -> None:
    """The weights, and generation_config.json as the base has it, with where answers end: what was learnt may not be
    the base's own end.

    That file is written here, since transformers refuses to write settings that contradict each other, as those of
    well-known models do.
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
    """Raise FileExistsError where the folder holds what is merged, or anything else that no merge wrote."""
    out.refuse_unusable(inputs)
    out.recover()
    out.refuse_others()
    if out.own and not overwrite:
        raise FileExistsError(
            f"--output-dir {out} is not empty: it holds a merged model. Choose another, or add --overwrite to replace "
            "that."
        )


def _bake(model: PreTrainedModel) -> None:
    """Merge and detach one layer after another, so that no more than one weight is held twice."""
    *others, last = adapted_layers(model).values()
    for layer in others:
        merge(layer)
        detach(layer)
    merge(last)
    detach(model)  # with a layer merged: a head trained whole keeps its trained values
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    if outputs is not None and inputs.weight is not outputs.weight:
        # Otherwise a reload would tie them again and undo the merge of one of the two.
        model.config.get_text_config().tie_word_embeddings = False
        model.config.tie_word_embeddings = False


def _probe(loaded: Loaded) -> torch.Tensor:
    vocabulary = min(loaded.model.config.get_text_config().vocab_size, len(loaded.tokenizer))
    generator = torch.Generator().manual_seed(0)
    length = longest_row(32, loaded.model, loaded.tokenizer)
    return torch.randint(0, vocabulary, (4, length), generator=generator).to(loaded.device)


@torch.inference_mode()
def _logits(model: PreTrainedModel, inputs: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=inputs, attention_mask=torch.ones_like(inputs)).logits
    return logits.float()


def _reload(loaded: Loaded, folder: Path) -> PreTrainedModel:
    dtype = str(loaded.model.dtype).removeprefix("torch.")
    return load_with_adapter(str(folder), None, dtype=dtype, device=loaded.device).model


def _difference(expected: torch.Tensor, found: torch.Tensor) -> Difference:
    largest = float((expected - found).abs().max())
    same = (expected.argmax(-1) == found.argmax(-1)).float().mean()
    return Difference(largest, largest / max(float(expected.abs().max()), 1e-12), float(same))
