"""Loading the base model and its tokenizer, and a base model together with an adapter.

A .gguf file is loaded dequantised: LoRA's factors need a weight of plain numbers beside them.
"""

from __future__ import annotations

import contextlib
import io
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..core.reading import json_of, missing
from ..formats import load as load_adapter
from ..formats import peft
from .locating import locate, reading

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LABELS = "labels.json"  # beside a classifier's adapter: the names of its classes, none for a regression


@dataclass(frozen=True)
class Loaded:
    """A model ready to use: on its device, in eval mode."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    new_parameters: tuple[str, ...] = ()  # drawn at random because the files do not hold them: a new head

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device


def best_device() -> torch.device:
    if torch.cuda.is_available():
        # One process a device under torchrun; accelerate moves the model where it belongs.
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("mps") if torch.backends.mps.is_available() else torch.device("cpu")


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 products run on the hardware rather than through float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        return bool(_cpu_flags() & {"avx512_bf16", "amx_bf16"})
    return False


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The dtype of the base weights: bfloat16 where it is fast, otherwise float32."""
    if dtype == "auto":
        return torch.bfloat16 if has_fast_bfloat16(device) else torch.float32
    resolved: torch.dtype = getattr(torch, dtype)
    return resolved


def load_causal_lm(
    name: str,
    *,
    dtype: str = "auto",
    device: torch.device | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Loaded:
    """A causal language model and its tokenizer from a folder, a .gguf file or a hub id.

    tokenizer: the model's own, where it is loaded already.
    """
    from transformers import AutoModelForCausalLM

    return _load(AutoModelForCausalLM, name, dtype, device, tokenizer)


def load_classifier(
    name: str,
    *,
    labels: tuple[str, ...],
    dtype: str = "auto",
    device: torch.device | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Loaded:
    """A sequence classifier with a head for `labels`; no labels make it a regression on one number."""
    from transformers import AutoModelForSequenceClassification

    settings: dict[str, Any] = {"num_labels": len(labels) or 1}
    if labels:
        settings |= {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
        settings["problem_type"] = "single_label_classification"
    else:
        settings["problem_type"] = "regression"
    return _load(AutoModelForSequenceClassification, name, dtype, device, tokenizer, **settings)


def skeleton(name: str, *, labels: tuple[str, ...] | None, dtype: str) -> PreTrainedModel:
    """The model as its configuration describes it, with no weights read; labels=None: a causal LM.

    Called under FakeTensorMode it holds no memory: for counting what a run will take.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    folder, options = locate(name)
    with _quietly(), reading(name, folder):
        config = AutoConfig.from_pretrained(folder, **options)
        auto = AutoModelForCausalLM
        if labels is not None:
            auto = AutoModelForSequenceClassification
            config.num_labels = len(labels) or 1
        with best_device():
            model: PreTrainedModel = auto.from_config(config, dtype=resolve_dtype(dtype, best_device()))
    return model


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer alone: rows are checked with it before any weight is loaded."""
    from transformers import AutoTokenizer

    folder, options = locate(name)
    with _quietly(), reading(name, folder):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, **options)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def is_adapter(path: str) -> bool:
    """Whether `path` is an adapter's folder rather than a model's."""
    return (Path(path) / peft.CONFIG).is_file()


def adapter_of(name: str, adapter: str | None) -> str | None:
    """The adapter's folder in "--model NAME --adapter ADAPTER", where the model may itself be an adapter's folder."""
    return name if adapter is None and is_adapter(name) else adapter


def load_with_adapter(
    name: str, adapter: str | None, *, dtype: str = "auto", device: torch.device | None = None
) -> Loaded:
    """A language model or a classifier, with `adapter` put in.

    name: a base model; or an adapter's folder, whose base is then the one it names.
    """
    if adapter is None and is_adapter(name):
        name, adapter = base_of(name), name
    if adapter is None:
        return load_causal_lm(name, dtype=dtype, device=device)
    # All that the adapter's folder holds is read before the base, which may take minutes.
    labels = _labels_of(adapter) if _adapter_config(adapter).get("task_type") == "SEQ_CLS" else None
    peft.read(adapter)
    # The chat template that training used travels with the adapter.
    own = load_tokenizer(adapter) if (Path(adapter) / "tokenizer_config.json").is_file() else None
    if labels is not None:
        loaded = load_classifier(name, labels=labels, dtype=dtype, device=device, tokenizer=own)
    else:
        loaded = load_causal_lm(name, dtype=dtype, device=device, tokenizer=own)
    load_adapter(loaded.model, adapter)
    return loaded


def base_of(adapter: str) -> str:
    """The base model that an adapter's folder names. Raises ValueError when it names none."""
    base = _adapter_config(adapter).get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{adapter}/{peft.CONFIG} names no base model; give it: --model BASE --adapter {adapter}")
    return str(base)


def _adapter_config(adapter: str) -> dict[str, Any]:
    path = Path(adapter) / peft.CONFIG
    if not path.is_file():
        if not Path(adapter).is_dir():
            raise FileNotFoundError(f"--adapter {missing(Path(adapter))}")
        raise FileNotFoundError(f"{adapter} is no adapter folder: it has no {peft.CONFIG}.")
    return json_of(path, dict)


def _labels_of(adapter: str) -> tuple[str, ...]:
    """The classes an adapter was trained for; none for a regression."""
    path = Path(adapter) / LABELS
    if not path.is_file():
        raise FileNotFoundError(f"{adapter} has no {LABELS}: the names of the classes are not known.")
    labels = json_of(path, list)
    if not all(isinstance(label, str) for label in labels):
        raise ValueError(f"{path}: expected a list of names, found {labels}.")
    return tuple(labels)


def _load(
    auto: Any,
    name: str,
    dtype: str,
    device: torch.device | None,
    tokenizer: PreTrainedTokenizerBase | None,
    **settings: Any,
) -> Loaded:
    device = device or best_device()
    folder, options = locate(name)
    tokenizer = load_tokenizer(name) if tokenizer is None else tokenizer
    if "gguf_file" in options:
        from transformers import GgufConfig

        options["quantization_config"] = GgufConfig(dequantize=True)
    with _quietly(), reading(name, folder):
        model, info = auto.from_pretrained(
            folder, dtype=resolve_dtype(dtype, device), output_loading_info=True, **options, **settings
        )
    if getattr(model, "is_quantized", False):
        raise ValueError(f"{name} is quantised; load a version with plain weights.")
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    new = tuple(sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}))
    return Loaded(model.to(device).eval(), tokenizer, new)


def _cpu_flags() -> set[str]:
    with contextlib.suppress(OSError):
        return set(Path("/proc/cpuinfo").read_text(encoding="ascii", errors="ignore").split())
    return set()


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without the notices of loading, and without its progress bars where nobody watches them."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    unseen = contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())
    try:
        with warnings.catch_warnings(), unseen:
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
