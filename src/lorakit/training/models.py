"""Load the base model and its tokenizer, or a base model together with an adapter.

A .gguf file is loaded dequantised, unless `--quantize` asks for something else (`quantize.py`). `locating.py` says
where a model lies, `task.py` what it is for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ..core.errors import LoraError
from ..formats import load as load_adapter
from ..formats import peft
from .adapter_folder import base_and_adapter, beside
from .adapter_folder import is_adapter as is_adapter
from .config import Quantize
from .locating import locate, reading
from .quantize import heads, keep_as_stored, loading_options, quantise_layers, refuse_unusable, stand_in
from .quiet import quietly
from .style import trained_on
from .task import LABELS as LABELS
from .task import Task, model_task
from .vocabulary import grow, rows_needed

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Loaded:
    """A model ready to use: on its device, in eval mode."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    new_parameters: tuple[str, ...] = ()  # random, because the files do not hold them: a new head

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device


def best_device() -> torch.device:
    if torch.cuda.is_available():
        # Under torchrun each process has one device; accelerate moves the model to it.
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
    """The dtype that a name means. "auto": bfloat16 if it is fast on the device, otherwise float32."""
    if dtype == "auto":
        return torch.bfloat16 if has_fast_bfloat16(device) else torch.float32
    resolved: torch.dtype = getattr(torch, dtype)
    return resolved


def load_causal_lm(
    name: str,
    *,
    dtype: str = "auto",
    quantize: Quantize = "none",
    device: torch.device | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Loaded:
    """A causal language model and its tokenizer from a folder, a .gguf file or a hub id.

    tokenizer: the model's tokenizer, if it is loaded already.
    """
    return _load(None, name, dtype, quantize, device, tokenizer)


def load_classifier(
    name: str,
    *,
    labels: tuple[str, ...],
    multi_label: bool = False,
    named: bool = True,
    dtype: str = "auto",
    quantize: Quantize = "none",
    device: torch.device | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Loaded:
    """A sequence classifier with a head for `labels`; without labels, a regression on one number.

    multi_label: a text has any number of them. named=False: do not write the labels into the model's configuration.
    """
    settings = _of_labels(labels, named, multi_label)
    return _load(labels, name, dtype, quantize, device, tokenizer, **settings)


def skeleton(
    name: str,
    *,
    labels: tuple[str, ...] | None,
    multi_label: bool = False,
    dtype: str,
    quantize: Quantize = "none",
) -> PreTrainedModel:
    """The model as its configuration describes it, without reading weights. labels=None: a causal LM.

    Called under FakeTensorMode it takes no memory. It is used to count the memory that a run will take.
    """
    from transformers import AutoConfig

    folder, options = locate(name)
    with quietly(), reading(name, folder):
        config = AutoConfig.from_pretrained(folder, **options)
        quantised = _method(config)
        refuse_unusable(quantize, name, is_gguf="gguf_file" in options, quantised=quantised)
        if labels is not None:
            config.num_labels = len(labels) or 1
            config.problem_type = _problem(labels, multi_label)
        with best_device():
            model: PreTrainedModel = _auto(labels).from_config(config, dtype=resolve_dtype(dtype, best_device()))
    if quantised or quantize == "gguf":
        stand_in(model, quantize, stored=_stored_bytes(folder, options))
    elif quantize != "none":
        stand_in(model, quantize)
    return model


def structure(
    name: str,
    *,
    labels: tuple[str, ...] | None,
    multi_label: bool = False,
    named: bool = True,
    speaks: bool = False,
) -> PreTrainedModel:
    """The model on the meta device: names and shapes, no memory.

    labels: makes it a classifier as `load_classifier` does. None: it is of the class that its configuration names, or
    a causal LM where `speaks` says so and that class has no head: a base that was saved without one.
    """
    import transformers

    folder, options = locate(name)
    settings = {} if labels is None else _of_labels(labels, named, multi_label)
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
    """Load only the tokenizer, with which rows are checked before any weight is loaded."""
    from transformers import AutoTokenizer

    folder, options = locate(name)
    with quietly(), reading(name, folder):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, **options)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def load_with_adapter(
    name: str,
    adapter: str | None,
    *,
    dtype: str = "auto",
    quantize: Quantize | None = "none",
    device: torch.device | None = None,
) -> Loaded:
    """A language model or a classifier, with `adapter` loaded into it.

    name: a base model, or an adapter's folder, which names its base. dtype: "base" is the dtype of the base model's
    files. quantize: None loads the base as it was loaded to train the adapter. The adapter's files are read before the
    base is loaded.
    """
    base, adapter = base_and_adapter(name, adapter)
    task = model_task(base, adapter)
    if quantize is None:
        quantize = "none" if adapter is None else trained_on(adapter)
    # The chat template that training used travels with the adapter.
    own = beside(adapter, "tokenizer_config.json")
    tokenizer = load_tokenizer(str(own.parent)) if own is not None else None
    folders = [] if adapter is None else [adapter]
    loaded = load_base(base, task, folders, dtype=dtype, quantize=quantize, device=device, tokenizer=tokenizer)
    if adapter is not None:
        load_adapter(loaded.model, adapter)
    return loaded


def load_base(
    base: str,
    task: Task,
    adapters: Iterable[str],
    *,
    dtype: str = "auto",
    quantize: Quantize = "none",
    device: torch.device | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Loaded:
    """The base model that these adapters' folders will be loaded into, for their task. Their files are read first.

    Its tables of tokens get rows where the adapters have trained rows beyond them. Raises LoraError for a language
    model whose files lack weights that not all of the adapters hold.
    """
    stored = [peft.stored_adapter(folder) for folder in adapters]
    trained = [adapter.trained for adapter in stored]
    options: dict[str, Any] = {"dtype": dtype, "quantize": quantize, "device": device, "tokenizer": tokenizer}
    if not task.answers:
        loaded = load_classifier(base, labels=task.labels, multi_label=task.several, named=task.named, **options)
        grow(loaded.model, rows_needed(stored))
        return loaded
    loaded = load_causal_lm(base, **options)
    grow(loaded.model, rows_needed(stored))
    missing = [name for name in loaded.new_parameters if not trained or any(name not in own for own in trained)]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise LoraError(
            f"{base} is no language model that can answer: its files hold no weights for {missing[0]}{more}."
        )
    return loaded


def _problem(labels: tuple[str, ...], multi_label: bool) -> str:
    """transformers' name of the task."""
    if multi_label:
        return "multi_label_classification"
    return "single_label_classification" if labels else "regression"


def _of_labels(labels: tuple[str, ...], named: bool, multi_label: bool) -> dict[str, Any]:
    """What the configuration of a classifier says of its classes."""
    settings: dict[str, Any] = {"num_labels": len(labels) or 1, "problem_type": _problem(labels, multi_label)}
    if labels and named:
        settings |= {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    return settings


def _load(
    labels: tuple[str, ...] | None,
    name: str,
    dtype: str,
    quantize: Quantize,
    device: torch.device | None,
    tokenizer: PreTrainedTokenizerBase | None,
    **settings: Any,
) -> Loaded:
    device = device or best_device()
    folder, options = locate(name)
    tokenizer = load_tokenizer(name) if tokenizer is None else tokenizer
    is_gguf = "gguf_file" in options
    resolved = resolve_dtype("float32" if dtype == "base" else dtype, device)
    # In transformers' words "auto" is the configuration's dtype, or else the weights' own.
    wanted = "auto" if dtype == "base" and not is_gguf else resolved
    kept: list[str] = []
    if quantize != "none":
        with FakeTensorMode():
            kept = heads(skeleton(name, labels=labels, dtype="float32", quantize=quantize))
    options |= loading_options(quantize, kept, resolved, device, is_gguf=is_gguf)
    with quietly(), reading(name, folder):
        model, info = _auto(labels).from_pretrained(
            folder, dtype=wanted, output_loading_info=True, **options, **settings
        )
        if is_gguf and quantize != "none":
            quantise_layers(model, quantize)
    keep_as_stored(model)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    new = tuple(sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}))
    if getattr(model, "hf_quantizer", None) is None:  # else it is there already, and may not be moved
        model.to(device)
    return Loaded(model.eval(), tokenizer, new)


def _auto(labels: tuple[str, ...] | None) -> Any:
    """transformers' class that makes a language model, or with labels a classifier."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    return AutoModelForCausalLM if labels is None else AutoModelForSequenceClassification


def _method(config: Any) -> str:
    """By which method the files of a model are quantised; empty where they are not."""
    found = getattr(config, "quantization_config", None) or {}
    method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
    return "" if method is None else str(getattr(method, "value", method))


def _stored_bytes(folder: str, options: dict[str, Any]) -> int:
    """The size of the model's weights on the disk; 0 where it is at the hub."""
    pattern = options.get("gguf_file", "*.safetensors")
    return sum(path.stat().st_size for path in Path(folder).glob(pattern)) if Path(folder).is_dir() else 0


def _cpu_flags() -> set[str]:
    with contextlib.suppress(OSError):
        return set(Path("/proc/cpuinfo").read_text(encoding="ascii", errors="ignore").split())
    return set()
