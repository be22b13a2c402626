"""Making a model with quantised layers a plain one, so that an adapter can be merged into it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .attach import adapted_layers, detach
from .errors import LoraError
from .exchange import extract, insert
from .layers import linear_size
from .names import named_modules, unwrapped
from .quantised import dequantised_weight, is_known, is_quantised, working_like

# transformers' notes on a model that is quantised, and on how the model's files became its parameters.
_CONVERSIONS = "_weight_conversions"
_NOTES = ("hf_quantizer", "quantization_method", "is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit")


@torch.no_grad()
def dequantize(model: nn.Module, *, dtype: torch.dtype | None = None) -> list[str]:
    """Replace each quantised linear layer of `model` by an `nn.Linear` with the numbers that it computes with.

    dtype: of the new weights; by default that of the model's other weights. An adapter stays in its place, and can be
    merged afterwards: lorakit.dequantize(model); lorakit.merge(model). One layer at a time is held in both forms.

    Returns the names of the layers. Raises LoraError where none is quantised, and for a merged model.
    """
    model = unwrapped(model)
    names = [name for name, module in named_modules(model) if name and _is_quantised_linear(module)]
    if not names:
        raise LoraError(f"{type(model).__name__} has no quantised linear layer.")
    if any(layer.merged for layer in adapted_layers(model).values()):
        raise LoraError("the model is merged. Call lorakit.unmerge first.")
    adapter = extract(model) if adapted_layers(model) else None
    detach(model)
    dtype = dtype or _dtype_beside(model, names)
    for name in names:
        model.set_submodule(name, _plain(model.get_submodule(name), dtype))
    _forget_quantisation(model)
    if adapter is not None:
        insert(model, adapter)
    return names


def _forget_quantisation(model: Any) -> None:
    """Take back what transformers notes on a model that is quantised, so that it saves the model as a plain one."""
    for noted in _NOTES:
        model.__dict__.pop(noted, None)
    if hasattr(getattr(model, "config", None), "quantization_config"):
        del model.config.quantization_config
    if conversions := model.__dict__.get(_CONVERSIONS):
        model.__dict__[_CONVERSIONS] = [own for own in conversions if _can_be_reversed(own)]


def _can_be_reversed(conversion: Any) -> bool:
    """Whether transformers can undo this change of the files' tensors, to save the model. It cannot pack a weight."""
    try:
        conversion.reverse_transform()
    except NotImplementedError:
        return False
    return True


def _is_quantised_linear(module: nn.Module) -> bool:
    """Whether it is linear, also where it is adapted, and stores no plain weight."""
    return (isinstance(module, nn.Linear) or is_known(module)) and is_quantised(module)


def _dtype_beside(model: nn.Module, names: list[str]) -> torch.dtype | None:
    """The dtype of the largest weight outside of these layers: embeddings, norms, heads. None where there is none."""
    inside = {id(parameter) for name in names for parameter in model.get_submodule(name).parameters()}
    others = [p for p in model.parameters() if id(p) not in inside and p.is_floating_point()]
    return max(others, key=Tensor.numel).dtype if others else None


def _plain(module: nn.Module, dtype: torch.dtype | None) -> nn.Linear:
    training = module.training
    module.train()  # in `eval()` bitsandbytes may store the weight in another way first
    outputs, inputs = linear_size(module)
    like = working_like(module)
    weight = dequantised_weight(module, inputs, like)
    bias: Tensor | None = getattr(module, "bias", None)
    plain = nn.Linear(inputs, outputs, bias=bias is not None, device="meta").train(training)
    dtype = dtype or (like if bias is None else bias).dtype
    plain.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    if bias is not None:
        plain.bias = nn.Parameter(bias.detach().to(like.device, dtype), requires_grad=False)
    return plain
