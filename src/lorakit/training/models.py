"""Loading the base model and its tokenizer, and a base model together with an adapter.

A .gguf file is loaded dequantised: LoRA's factors need a weight of plain numbers beside them. `locating.py` says where
a model lies, `task.py` what it is for.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..core.errors import LoraError
from ..formats import load as load_adapter
from ..formats import peft
from .adapter_folder import base_and_adapter, beside
from .adapter_folder import base_of as base_of
from .adapter_folder import is_adapter as is_adapter
from .locating import locate, reading
from .quiet import quietly
from .task import LABELS as LABELS
from .task import task_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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
    named: bool = True,
    dtype: str = "auto",
    device: torch.device | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Loaded:
    """A sequence classifier with a head for `labels`; no labels make it a regression on one number.

    named=False: the labels are no names that the model's configuration should hold.
    """
    from transformers import AutoModelForSequenceClassification

    settings = _of_labels(labels, named)
    return _load(AutoModelForSequenceClassification, name, dtype, device, tokenizer, **settings)


def skeleton(name: str, *, labels: tuple[str, ...] | None, dtype: str) -> PreTrainedModel:
    """The model as its configuration describes it, with no weights read; labels=None: a causal LM.

    Called under FakeTensorMode it holds no memory: for counting what a run will take.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    folder, options = locate(name)
    with quietly(), reading(name, folder):
        config = AutoConfig.from_pretrained(folder, **options)
        auto = AutoModelForCausalLM
        if labels is not None:
            auto = AutoModelForSequenceClassification
            config.num_labels = len(labels) or 1
        with best_device():
            model: PreTrainedModel = auto.from_config(config, dtype=resolve_dtype(dtype, best_device()))
    return model


def structure(
    name: str, *, labels: tuple[str, ...] | None, named: bool = True, speaks: bool = False
) -> PreTrainedModel:
    """The model on the meta device: names and shapes, no memory.

    labels: makes it a classifier as `load_classifier` does. None: it is of the class that its configuration names, or
    a causal LM where `speaks` says so and that class has no head: a base that was saved without one.
    """
    import transformers

    folder, options = locate(name)
    settings = {} if labels is None else _of_labels(labels, named)
    with quietly(), reading(name, folder), torch.device("meta"):
        config = transformers.AutoConfig.from_pretrained(folder, **options, **settings)
        own = next(iter(getattr(config, "architectures", None) or ()), "")
        cls = getattr(transformers, own, None)
        if labels is not None:
            model = transformers.AutoModelForSequenceClassification.from_config(config)
        elif cls is None or (speaks and own.endswith("Model") and not own.endswith("LMHeadModel")):
            model = transformers.AutoModelForCausalLM.from_config(config)
        else:
            model = cls._from_config(config)
    built: PreTrainedModel = model
    return built


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer alone: rows are checked with it before any weight is loaded."""
    from transformers import AutoTokenizer

    folder, options = locate(name)
    with quietly(), reading(name, folder):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, **options)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def load_with_adapter(
    name: str, adapter: str | None, *, dtype: str = "auto", device: torch.device | None = None
) -> Loaded:
    """A language model or a classifier, with `adapter` put in.

    name: a base model; or an adapter's folder, whose base is then the one it names. dtype: "base" is the one in which
    the base's files hold its weights. The adapter's files are read before the base is loaded.
    """
    base, adapter = base_and_adapter(name, adapter)
    task = task_of(base, adapter)
    trained = peft.read(adapter).trained if adapter is not None else {}
    # The chat template that training used travels with the adapter.
    own = beside(adapter, "tokenizer_config.json")
    tokenizer = load_tokenizer(str(own.parent)) if own is not None else None
    if task.answers:
        loaded = load_causal_lm(base, dtype=dtype, device=device, tokenizer=tokenizer)
        missing = [name for name in loaded.new_parameters if name not in trained]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise LoraError(
                f"{base} is no language model that can answer: its files hold no weights for {missing[0]}{more}."
            )
    else:
        loaded = load_classifier(
            base, labels=task.labels, named=task.named, dtype=dtype, device=device, tokenizer=tokenizer
        )
    if adapter is not None:
        load_adapter(loaded.model, adapter)
    return loaded


def _of_labels(labels: tuple[str, ...], named: bool) -> dict[str, Any]:
    """What the configuration of a classifier says of its classes."""
    settings: dict[str, Any] = {"num_labels": len(labels) or 1}
    settings["problem_type"] = "single_label_classification" if labels else "regression"
    if labels and named:
        settings |= {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    return settings


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
    wanted: torch.dtype | str = resolve_dtype("float32" if dtype == "base" else dtype, device)
    if dtype == "base" and "gguf_file" not in options:
        wanted = "auto"  # in transformers' words: the configuration's, or else the weights' own
    with quietly(), reading(name, folder):
        model, info = auto.from_pretrained(folder, dtype=wanted, output_loading_info=True, **options, **settings)
    if getattr(model, "is_quantized", False):
        raise LoraError(f"{name} is quantised; load a version with plain weights.")
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    new = tuple(sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}))
    return Loaded(model.to(device).eval(), tokenizer, new)


def _cpu_flags() -> set[str]:
    with contextlib.suppress(OSError):
        return set(Path("/proc/cpuinfo").read_text(encoding="ascii", errors="ignore").split())
    return set()
