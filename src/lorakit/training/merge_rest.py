"""What a merged model's folder holds beside its weights: the base's files, and what the adapter changes in them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from ..core.reading import json_of
from ..formats.shards import INDEX
from .adapter_folder import beside
from .merge_plan import MergePlan
from .merging import write_generation_config
from .models import Loaded, load_tokenizer
from .style import Style

# How the names of weights end in formats that are not merged.
OTHER_WEIGHTS = (
    *(".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".onnx_data", ".tflite", ".mlmodel"),
    ".nemo",
)
# None of them may lie beside the merged ones.
_WEIGHTS = (".safetensors", ".index.json", *OTHER_WEIGHTS)
_OF_CLASSES = ("id2label", "label2id", "problem_type")


def carry_rest(plan: MergePlan, part: Path) -> None:
    """All that a model's folder holds beside its weights, as the merged model needs it."""
    for entry in others(plan.folder):
        if entry.is_dir():
            shutil.copytree(entry, part / entry.name, ignore=_left_out)
        else:
            shutil.copyfile(entry, part / entry.name)
    if plan.shards.index is not None:
        _write_json(part / INDEX, plan.index())
    config = json_of(plan.folder / "config.json", dict)
    tokenizer = _tokenizer(plan, part)
    if tokenizer is not None and config.get("pad_token_id") is None:
        config["pad_token_id"] = tokenizer.pad_token_id
    _write_json(part / "config.json", _config(config, plan))


def _tokenizer(plan: MergePlan, part: Path) -> Any:
    """Write what asks and answers need: the adapter's own tokenizer, its style, where answers end.

    Returns the tokenizer, None where neither base nor adapter has one.
    """
    adapter = plan.adapter if isinstance(plan.adapter, Path) else None
    own = beside(adapter, "tokenizer_config.json")
    if own is None and not (plan.folder / "tokenizer_config.json").is_file():
        return None
    tokenizer = load_tokenizer(str(plan.folder if own is None else own.parent))
    if own is not None:
        tokenizer.save_pretrained(part)
    if adapter is not None:
        Style.recorded(adapter, tokenizer).write(part)
    if plan.model.can_generate():
        from transformers import GenerationConfig

        if (plan.folder / "generation_config.json").is_file():
            plan.model.generation_config = GenerationConfig.from_pretrained(plan.folder)
        write_generation_config(Loaded(plan.model, tokenizer), part)
    return tokenizer


def _config(said: dict[str, Any], plan: MergePlan) -> dict[str, Any]:
    """The base's config.json, as the merged model needs it: its class, classes, dtype, whether the head is tied."""
    said = said | {"architectures": [type(plan.model).__name__]}
    own = plan.model.config.to_dict()
    if not plan.task.answers:
        said |= {name: own[name] for name in _OF_CLASSES if name in own}
    text = plan.model.config.get_text_config()
    parts = [said, *(said[name] for name, config in vars(plan.model.config).items() if config is text and name in said)]
    for part in parts:
        if plan.fold.untied:
            part["tie_word_embeddings"] = False
        if plan.dtype is not None:
            part.pop("torch_dtype", None)  # what transformers before 5 called it
            part["dtype"] = str(plan.dtype).removeprefix("torch.")
    return said


def others(folder: Path) -> list[Path]:
    """What lies in a base's folder beside its weights and config.json. Hidden entries are those of other programs."""
    own = [entry for entry in sorted(folder.iterdir()) if not entry.name.startswith(".") and not is_weight(entry)]
    return [entry for entry in own if entry.name != "config.json" and _holds_others(entry)]


def _holds_others(entry: Path) -> bool:
    return entry.is_file() or any(path.is_file() and not is_weight(path) for path in entry.rglob("*"))


def is_weight(path: Path) -> bool:
    return path.name.endswith(_WEIGHTS)


def _left_out(folder: str, names: list[str]) -> list[str]:
    """For `shutil.copytree`: what is left out."""
    return [name for name in names if name.startswith(".") or is_weight(Path(name))]


def _write_json(path: Path, said: dict[str, Any]) -> None:
    path.write_text(json.dumps(said, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
