"""Which parameters are the adapter's, which are biases: loralib's two helpers, by structure instead of by substring.

loralib asks whether a name contains "lora_" or "bias", so a module called `lora_head` or `unbiased_gate` becomes
trainable and a buffer called `attn_bias` is saved (problem 18). Here the last part of the name decides. What is inside
a `lora_*` child of a LoRA layer is the adapter's too.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, get_args

from torch import Tensor, nn

from .errors import LoraError
from .lora_layer import LoRALayer
from .names import named_modules, named_parameters, unwrapped, unwrapped_name

Bias = Literal["none", "lora_only", "all"]
BIASES: tuple[str, ...] = get_args(Bias)


def lora_names(model: nn.Module) -> set[str]:
    """Full names of the adapter's parameters and buffers: `lora_A`, `lora_B`, `lora_magnitude`, …"""
    names = {
        unwrapped_name(name)
        for name, _ in _named_tensors(unwrapped(model))
        if name.rpartition(".")[2].startswith("lora_")
    }
    for prefix, module in named_modules(model):
        for child, inner in module.named_children():
            if isinstance(module, LoRALayer) and child.startswith("lora_"):
                names |= {_join(prefix, unwrapped_name(f"{child}.{name}")) for name, _ in _named_tensors(inner)}
    return names & _state(model).keys()


def bias_names(model: nn.Module, bias: Bias) -> set[str]:
    """Full names of the bias parameters that `bias` selects: none, those of LoRA layers, or all."""
    if bias not in BIASES:
        raise LoraError(f"bias={bias!r}: expected one of {', '.join(map(repr, BIASES))}.")
    if bias == "none":
        return set()
    if bias == "all":
        return {name for name, _ in named_parameters(model) if _is_bias(name.rpartition(".")[2])}
    layers = (module for module in model.modules() if isinstance(module, LoRALayer))
    # By identity, because the bias beside an adapted parameter belongs to the owner.
    own = {id(beside) for layer in layers if isinstance(beside := getattr(layer, "bias", None), nn.Parameter)}
    return {name for name, parameter in named_parameters(model) if id(parameter) in own}


def mark_only_lora_as_trainable(model: nn.Module, bias: Bias = "none") -> None:
    """Train the adapter and the biases that `bias` selects ("none", "lora_only", "all"), and freeze all else."""
    trainable = lora_names(model) | bias_names(model, bias)
    for name, parameter in named_parameters(model):
        parameter.requires_grad = name in trainable


def lora_state_dict(model: nn.Module, bias: Bias = "none") -> dict[str, Tensor]:
    """The adapter's part of `model.state_dict()`, with the biases that `bias` selects, whether merged or not.

    The names are those of the plain model, also if it is wrapped (`torch.compile`, checkpointing).
    """
    wanted = lora_names(model) | bias_names(model, bias)
    return {name: tensor for name, tensor in _state(model).items() if name in wanted}


def _is_bias(name: str) -> bool:
    # in_proj_bias of attention, bias_ih_l0 of recurrent layers
    return name == "bias" or name.startswith("bias_") or name.endswith("_bias")


def tensors_by_name(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers that a state dict holds, by each of their names."""
    model = unwrapped(model)
    persistent = {unwrapped_name(name) for name in model.state_dict(keep_vars=True)}
    return {own: tensor for name, tensor in _named_tensors(model) if (own := unwrapped_name(name)) in persistent}


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {unwrapped_name(name): tensor for name, tensor in unwrapped(model).state_dict().items()}


def _named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
