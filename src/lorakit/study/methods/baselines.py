"""The methods that the LoRA paper compares with LoRA (Hu et al. 2021, section 5.1), all with the same interface.

    applied = Houlsby(bottleneck=8).apply(model)     # in place; the model trains and generates as before
    …                                                # an optimizer over applied.parameters()
    applied.save("houlsby.safetensors")              # what was trained, and the settings
    applied.remove()                                 # the model as it was, bit for bit

With L blocks of width d, each method trains this many parameters, not counting a new head:

    Full              all
    BitFit            every bias                                   Ben Zaken et al. 2021
    TopLayers         the last k blocks (the paper's FT^Top2)
    HeadOnly          none: only the head
    Houlsby           2L · (2dr + r + d), + 2d for each LayerNorm  after attention and MLP: AdapterH (2019)
    Pfeiffer          L · (2dr + r + d)                            after the MLP's norm: AdapterP (2021)
    PrefixEmbedding   d · l                                        trained embeddings in l extra positions
    PrefixLayer       L · d · l                                    trained inputs of every block there
    LoRA              2 · L̂ · d · r for L̂ matrices d × d           lorakit.attach; with rsLoRA, DoRA, PiSSA

Every method also trains a new classifier head. As in the paper, it is counted separately: `parameter_count` is without
it. The blocks of a model are found by structure (`structure.py`), and inserted modules run in hooks (`inserted.py`).
The model's own state-dict keys stay; those of `lorakit_adapter` and `lorakit_prefix` modules are added. A new adapter
leaves the output unchanged, bit for bit. A prefix changes it at once, because attention sees the new positions.

Two things are left out. The paper's infix tokens (its l_i, here 0) stand at the end of the prompt, and a model's
forward pass does not know where that is. PEFT's prefix tuning, which passes keys and values in the cache (2 · L · d · l
parameters), is not used, because DeBERTa-v2 and MPNet have no cache, and gradient checkpointing turns it off.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ...core.attach import adapted_layers, attach, detach
from ...core.errors import LoraError
from ...core.evaluating import evaluating
from ...core.settings import LoRASettings
from ...core.switching import unmerge
from ...core.trainable import bias_names, lora_names
from ...formats.files import replacing
from .inserted import Bottleneck, Span, Vectors, given_to
from .structure import (
    attention_of,
    base_model_of,
    blocks_of,
    ends_of,
    head_of,
    norm_after_mlp,
    norms_of,
    query_and_value,
)

Head = str | Iterable[str] | None
_A_SIZE = {"limits": {"at_least": 1}}  # metadata of a field: the values that a person may write


@dataclass(frozen=True)
class Method:
    """A method. Its fields are its settings, the size first. A subclass supplies `_install`."""

    name: ClassVar[str]

    @property
    def settings(self) -> dict[str, Any]:
        """The settings as JSON values."""
        settings: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return settings

    def __str__(self) -> str:
        """The method in a table: its name, its size and the settings that are not the default."""
        shown = [
            f"{own.name}={getattr(self, own.name)}"
            for index, own in enumerate(dataclasses.fields(self))
            if index == 0 or getattr(self, own.name) != own.default
        ]
        return f"{self.name}({', '.join(shown)})"

    def apply(self, model: nn.Module, head: Head = None) -> Applied:
        """Make `model` train what this method trains, in place.

        head: the modules that are a new head, named like targets; None finds that of a transformers classifier. Values,
        modes and existing keys are not changed. Raises ValueError, before anything is changed, if the model lacks what
        the method needs or already has a method applied.
        """
        if "_lorakit_method" in model.__dict__ or adapted_layers(model):
            before = model.__dict__.get("_lorakit_method", "lorakit.attach's adapter")
            raise LoraError(f"{type(model).__name__} has {before} already: take it back first.")
        modules = head_of(model, head)
        requires_grad = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        # By identity: a weight that the head shares with the base (a tied language head) has only the base's name.
        inside = {id(p) for name in modules for p in model.get_submodule(name).parameters()}
        head_names = tuple(name for name, parameter in model.named_parameters() if id(parameter) in inside)
        buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
        inserted = _Inserted()
        trained = self._install(model, modules, inserted)
        names = tuple(name for name, _ in model.named_parameters() if name in trained and name not in head_names)
        packed = [name for name in (*names, *head_names) if not model.get_parameter(name).is_floating_point()]
        if packed:
            inserted.remove()
            raise LoraError(f"{self} trains {packed[0]}, which is quantised and takes no gradient.")
        values = {
            name: model.get_parameter(name).detach().clone() for name in (*names, *head_names) if name in requires_grad
        }
        for name, parameter in model.named_parameters():
            parameter.requires_grad = name in names or name in head_names
        model.__dict__["_lorakit_method"] = str(self)
        return Applied(model, self, names, head_names, inserted, requires_grad, values, buffers)

    def _install(self, model: nn.Module, head: list[str], inserted: _Inserted) -> set[str]:
        """Insert what the method needs. Returns the names of the parameters to train, with or without the head's."""
        raise NotImplementedError


@dataclass
class _Inserted:
    """The modules and hooks that were inserted into a model, so that they can be removed."""

    modules: list[tuple[nn.Module, str]] = field(default_factory=list)  # parent, name
    handles: list[RemovableHandle] = field(default_factory=list)

    def add(self, parent: nn.Module, name: str, child: nn.Module) -> None:
        parent.add_module(name, child.train(parent.training))
        self.modules.append((parent, name))

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        for parent, name in self.modules:
            del parent._modules[name]


@dataclass
class Applied:
    """A method applied to a model. `copy.deepcopy` of it also copies the model, with the method applied."""

    model: nn.Module
    method: Method
    trained: tuple[str, ...]  # names of the parameters that the method trains
    head: tuple[str, ...]  # names of a new head's parameters
    _inserted: _Inserted = field(repr=False)
    _requires_grad: dict[str, bool] = field(repr=False)  # of every parameter, before
    _values: dict[str, Tensor] = field(repr=False)  # of the model's own trained parameters, before
    _buffers: dict[str, Tensor] = field(repr=False)  # all buffers, before: training changes those of a BatchNorm

    @property
    def parameter_count(self) -> int:
        """The number of trained parameters without the head, as the papers count."""
        return sum(self.model.get_parameter(name).numel() for name in self.trained)

    @property
    def head_count(self) -> int:
        return sum(self.model.get_parameter(name).numel() for name in self.head)

    def __str__(self) -> str:
        head = f" and {self.head_count:,} of the head" if self.head else ""
        return f"{self.method}: {self.parameter_count:,} parameters{head}"

    def parameters(self) -> list[nn.Parameter]:
        """The trained parameters for an optimizer, the head's last."""
        return [self.model.get_parameter(name) for name in (*self.trained, *self.head)]

    def state_dict(self) -> dict[str, Tensor]:
        """What was trained, by name, with the buffers that are new (PiSSA's A₀ and B₀) or changed (BatchNorm's)."""
        tensors = {name: self.model.get_parameter(name).detach() for name in (*self.trained, *self.head)}
        kept = self.model.state_dict().keys()
        for name, buffer in self.model.named_buffers():
            if name in kept and not (name in self._buffers and torch.equal(buffer, self._buffers[name])):
                tensors[name] = buffer
        return tensors

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy in the trained values of another model. Raises ValueError unless names and shapes are the same."""
        buffers = dict(self.model.named_buffers())
        own = {name: self.model.get_parameter(name) for name in (*self.trained, *self.head)}
        places = {**own, **{name: buffers[name] for name in tensors if name in buffers}}
        missing, unexpected = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - places.keys())
        if missing or unexpected:
            raise LoraError(
                f"these are not the tensors of {self.method} on {type(self.model).__name__}: "
                f"missing {missing[:5] or 'none'}, unexpected {unexpected[:5] or 'none'}."
            )
        for name, place in places.items():
            if place.shape != tensors[name].shape:
                raise LoraError(f"{name} has the shape {tuple(tensors[name].shape)}, expected {tuple(place.shape)}.")
        with torch.no_grad():
            for name, place in places.items():
                place.copy_(tensors[name])

    def save(self, path: str | Path) -> None:
        """Write `state_dict()` as a safetensors file, with the method's name and settings in its metadata."""
        tensors = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        metadata = {"format": "pt", "method": self.method.name, "settings": json.dumps(self.method.settings)}
        with replacing(Path(path)) as temporary:
            safetensors.torch.save_file(tensors, temporary, metadata=metadata)

    def load(self, path: str | Path) -> None:
        """Read what `save` wrote. Raises ValueError if another method, or one with other settings, wrote it."""
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        written = metadata.get("method"), json.loads(metadata.get("settings", "null"))
        if written != (self.method.name, self.method.settings):
            raise LoraError(f"{path} was written by {written[0]} with {written[1]}, but this is {self.method}.")
        self.load_state_dict(tensors)

    def remove(self) -> None:
        """Restore the model that the method was applied to: modules, hooks, keys, values, requires_grad."""
        if "_lorakit_method" not in self.model.__dict__:
            raise LoraError(f"{self.method} has been taken back already.")
        self._inserted.remove()
        if layers := adapted_layers(self.model):
            if any(layer.merged for layer in layers.values()):
                unmerge(self.model)
            detach(self.model)
        with torch.no_grad():
            for name, value in self._values.items():
                parameter = self.model.get_parameter(name)
                parameter.copy_(value)
                parameter.grad = None
            for name, value in self._buffers.items():
                self.model.get_buffer(name).copy_(value)
        for name, flag in self._requires_grad.items():
            self.model.get_parameter(name).requires_grad = flag
        del self.model.__dict__["_lorakit_method"]


@dataclass(frozen=True)
class Full(Method):
    """Every parameter. A copy of the whole model is kept, so that `remove` can restore it."""

    name = "full"

    def _install(self, model: nn.Module, head: list[str], inserted: _Inserted) -> set[str]:
        return {name for name, _ in model.named_parameters()}


@dataclass(frozen=True)
class BitFit(Method):
    """Every bias, including those of norms (Ben Zaken et al. 2021)."""

    name = "bitfit"

    def _install(self, model: nn.Module, head: list[str], inserted: _Inserted) -> set[str]:
        names = bias_names(model, "all")
        if not {name for name in names if not _is_in(name, head)}:
            raise LoraError(
                f"{type(model).__name__} has no biases{' outside its head' if names else ''}, so BitFit has nothing "
                f"to train; take another method (Llama and its kin were trained without biases)."
            )
        return names


@dataclass(frozen=True)
class TopLayers(Method):
    """The last k transformer blocks, in full: the paper's FT^Top2."""

    name = "top-layers"
    k: int = field(default=2, metadata=_A_SIZE)

    def _install(self, model: nn.Module, head: list[str], inserted: _Inserted) -> set[str]:
        blocks = blocks_of(model)
        if not 1 <= self.k <= len(blocks):
            raise LoraError(f"k={self.k}: {type(model).__name__} has {len(blocks)} blocks.")
        last = {id(parameter) for block in blocks[-self.k :] for parameter in block.module.parameters()}
        return {name for name, parameter in model.named_parameters() if id(parameter) in last}


@dataclass(frozen=True)
class HeadOnly(Method):
    """The new head, and nothing else."""

    name = "head"

    def _install(self, model: nn.Module, head: list[str], inserted: _Inserted) -> set[str]:
        if not head:
            raise LoraError(f"{type(model).__name__} has no new head: name its modules with head=.")
        return set()


@dataclass(frozen=True)
class Houlsby(Method):
    """A bottleneck after the attention and one after the MLP of each block (AdapterH; Houlsby et al. 2019, figure 2).

    norms: also train the blocks' norms, as that paper does. The activation is GELU, as in the authors' program.
    """

    name = "adapter-h"
    bottleneck: int = field(default=8, metadata=_A_SIZE)
    norms: bool = True

    def _install(self, model: nn.Module, head: list[str], inserted: _Inserted) -> set[str]:
        _check_size("bottleneck", self.bottleneck)
        blocks = blocks_of(model)
        trained = {id(p) for block in blocks for norm in norms_of(block).values() for p in norm.parameters()}
        before = {name for name, parameter in model.named_parameters() if self.norms and id(parameter) in trained}
        for block, ends in [(block, ends_of(block)) for block in blocks]:
            for site in ends:
                adapter = Bottleneck(block.width, self.bottleneck, nn.GELU(), like=_weight(ends[1]))
                inserted.add(site, ADAPTER, adapter)
                inserted.handles.append(site.register_forward_hook(adapter.add))
        return before | _names_in(model, ADAPTER)


@dataclass(frozen=True)
class Pfeiffer(Method):
    """A bottleneck only at the end of each block (AdapterP; Pfeiffer et al. 2021), with ReLU.

    In a post-norm block (BERT, RoBERTa, DeBERTa, MPNet) it lies between the norm after the MLP and a second use of the
    same norm. Other blocks have no such norm, so it follows the block: y + up(f(down(y))).
    """

    name = "adapter-p"
    bottleneck: int = field(default=16, metadata=_A_SIZE)

    def _install(self, model: nn.Module, head: list[str], inserted: _Inserted) -> set[str]:
        _check_size("bottleneck", self.bottleneck)
        for block, (_, end) in [(block, ends_of(block)) for block in blocks_of(model)]:
            adapter = Bottleneck(block.width, self.bottleneck, nn.ReLU(), like=_weight(end))
            norm = norm_after_mlp(block)
            site, hook = (block.module, adapter.add) if norm is None else (norm, adapter.add_before_norm)
            inserted.add(site, ADAPTER, adapter)
            inserted.handles.append(site.register_forward_hook(hook))
        return _names_in(model, ADAPTER)


@dataclass(frozen=True)
class PrefixEmbedding(Method):
    """l extra positions with trained embeddings (Hu et al. 2021, section 5.1), initialised from random tokens.

    The extra positions count: a model with n positions takes texts of n − l tokens. Needs a transformers model.
    """

    name = "prefix-embedding"
    length: int = field(default=32, metadata=_A_SIZE)

    def _install(self, model: nn.Module, head: list[str], inserted: _Inserted) -> set[str]:
        span, embedding = _open_span(model, self.length)
        words = torch.randint(embedding.num_embeddings, (self.length,))
        vectors = Vectors(embedding.weight[words.to(embedding.weight.device)], span)
        _hook_span(model, span, inserted)
        inserted.add(embedding, PREFIX, vectors)
        inserted.handles.append(embedding.register_forward_hook(vectors.in_output))
        return _names_in(model, PREFIX)


@dataclass(frozen=True)
class PrefixLayer(Method):
    """l extra positions where every block's input is trained (Hu et al. 2021, section 5.1).

    They are initialised with the blocks' inputs for random tokens, because the method learns better from activations of
    real words (Li and Liang 2021, section 7.4). A causal model therefore begins as if these tokens came first.
    """

    name = "prefix-layer"
    length: int = field(default=32, metadata=_A_SIZE)

    def _install(self, model: nn.Module, head: list[str], inserted: _Inserted) -> set[str]:
        span, embedding = _open_span(model, self.length)
        blocks = [block.module for block in blocks_of(model)]
        words = torch.randint(embedding.num_embeddings, (1, self.length))
        with given_to(blocks) as seen, torch.no_grad(), evaluating(model):
            base_model_of(model)(input_ids=words.to(embedding.weight.device))
        _hook_span(model, span, inserted)
        for block, states in zip(blocks, seen, strict=True):
            vectors = Vectors(states[0], span)
            inserted.add(block, PREFIX, vectors)
            inserted.handles.append(block.register_forward_pre_hook(vectors.in_input, with_kwargs=True))
        return _names_in(model, PREFIX)


@dataclass(frozen=True)
class LoRA(Method):
    """lorakit.attach with these settings. targets: "query-value" means q and v of each block, as in the paper.

    If one layer gives q, k and v, as in GPT-2, q and v are two of its three parts. dora and pissa need separate layers.
    """

    name = "lora"
    rank: int = field(default=8, metadata=_A_SIZE)
    alpha: float = field(default=32.0, metadata={"limits": {"above": 0}})
    targets: str | tuple[str, ...] = "query-value"
    dropout: float = field(default=0.0, metadata={"limits": {"at_least": 0, "below": 1}})
    rslora: bool = False
    dora: bool = False
    init: Literal["kaiming", "gaussian", "pissa", "olora"] = "kaiming"

    def settings_on(self, model: nn.Module) -> LoRASettings:
        """What `attach` is told on this model."""
        settings = LoRASettings.of(self)
        if self.targets == "query-value":
            found = [query_and_value(block) for block in blocks_of(model)]
            settings = replace(
                settings,
                targets=[name for names, _ in found for name in names],
                rank_pattern={name: (self.rank, 0, self.rank) for names, fused in found if fused for name in names},
            )
        return settings

    def _install(self, model: nn.Module, head: list[str], inserted: _Inserted) -> set[str]:
        attach(model, replace(self.settings_on(model), also_train=head))
        return lora_names(model)


# The names for a command line. With their default sizes, the methods that have a size per block train about 0.3M
# parameters of RoBERTa-base, as LoRA does with r = 8: the paper's smallest budget (table 2).
METHODS: dict[str, Callable[..., Method]] = {
    "full": Full,
    "bitfit": BitFit,
    "top-layers": TopLayers,
    "head": HeadOnly,
    "adapter-h": Houlsby,
    "adapter-p": Pfeiffer,
    "prefix-embedding": PrefixEmbedding,
    "prefix-layer": PrefixLayer,
    "lora": LoRA,
    "rslora": functools.partial(LoRA, rslora=True),
    "dora": functools.partial(LoRA, dora=True),
    "pissa": functools.partial(LoRA, init="pissa"),
}

ADAPTER, PREFIX = "lorakit_adapter", "lorakit_prefix"


def _open_span(model: nn.Module, length: int) -> tuple[Span, nn.Embedding]:
    """A span of `length` positions for a transformers model, and the model's token embedding. Changes nothing."""
    _check_size("length", length)
    blocks = blocks_of(model)
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    if not isinstance(embedding, nn.Embedding):
        raise LoraError(f"{type(model).__name__} has no embedding of tokens, which a prefix needs.")
    causal = any(getattr(module, "is_causal", False) for module in attention_of(blocks[0]).modules())
    padding = {embedding.padding_idx, getattr(getattr(model, "config", None), "pad_token_id", None)}
    placeholder = next(token for token in range(embedding.num_embeddings) if token not in padding)
    return Span(0 if causal else 1, length, placeholder), embedding


def _hook_span(model: nn.Module, span: Span, inserted: _Inserted) -> None:
    base = base_model_of(model)
    inserted.handles.append(base.register_forward_pre_hook(span.open, with_kwargs=True))
    inserted.handles.append(base.register_forward_hook(span.close, always_call=True))


def _names_in(model: nn.Module, inserted: str) -> set[str]:
    """The parameters of the inserted modules of this name."""
    return {name for name, _ in model.named_parameters() if inserted in name.split(".")}


def _weight(module: nn.Module) -> Tensor:
    return module.get_parameter("weight")


def _is_in(name: str, modules: Iterable[str]) -> bool:
    return any(name.startswith(f"{module}.") for module in modules)


def _check_size(what: str, value: int) -> None:
    if value < 1:
        raise LoraError(f"{what}={value}: at least 1 is expected.")
