"""A base model whose weights are quantised while it is loaded: `--quantize nf4 | int8 | gguf`.

    nf4    4 bits: 16 levels of a normal distribution, a scale for each block of 64 weights (QLoRA, Dettmers et al.
           2023, section 3); bitsandbytes. The scales stay in float32: quantising them too saves 8 % of the memory and
           doubles the time that bitsandbytes takes for each product on a CPU.
    int8   8 bits, a scale for each row (LLM.int8, Dettmers et al. 2022); bitsandbytes
    gguf   the blocks of a .gguf file as they are; transformers, with its kernels

Linear layers are quantised. Embeddings, norms and what lies beside the base model (the head of a language model or of a
classifier) stay. A folder is quantised by transformers, one weight after the other; a .gguf file is dequantised by it,
so its layers are quantised afterwards. A model that is quantised in its files is taken as it is.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..core.errors import LoraError
from .config import Quantize

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CLASSES = {"nf4": "Linear4bit", "int8": "Linear8bitLt", "gguf": "GgufLinear"}
_BYTES = {"nf4": 0.5 + 4 / 64, "int8": 1.0}  # for each weight, scales included


def refuse_unusable(quantize: Quantize, name: str, *, is_gguf: bool, quantised: str) -> None:
    """Raise LoraError for what cannot be quantised so, or lacks its library.

    is_gguf: whether the model is a .gguf file. quantised: the method by which its files are quantised already.
    """
    if quantize == "none":
        return
    if quantised:
        raise LoraError(f"--quantize {quantize}: {name} is quantised already ({quantised}). Leave --quantize out.")
    if quantize == "gguf" and not is_gguf:
        raise LoraError(f"--quantize gguf: {name} is not a .gguf file. Take --quantize nf4.")
    library = "kernels" if quantize == "gguf" else "bitsandbytes"
    if importlib.util.find_spec(library) is None:
        install = "pip install kernels" if quantize == "gguf" else "pip install 'lorakit[quantize]'"
        raise LoraError(
            f"--quantize {quantize} needs the package {library}: {install}   (--quantize none takes plain weights)"
        )


def loading_options(
    quantize: Quantize, kept: list[str], dtype: torch.dtype, device: torch.device, *, is_gguf: bool
) -> dict[str, Any]:
    """What `from_pretrained` needs. kept: the names of the modules that are not quantised."""
    if is_gguf:
        from transformers import GgufConfig

        return {"quantization_config": GgufConfig(dequantize=quantize != "gguf")}
    if quantize == "none":
        return {}
    from transformers import BitsAndBytesConfig

    how: dict[str, Any] = {"load_in_8bit": True}
    if quantize == "nf4":
        how = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
    return {
        "quantization_config": BitsAndBytesConfig(llm_int8_skip_modules=kept, **how),
        "device_map": {"": device},
    }


def heads(model: Any) -> list[str]:
    """The modules beside the base model: the head of a language model or of a classifier."""
    prefix = getattr(model, "base_model_prefix", "")
    return [name for name, child in model.named_children() if name != prefix and any(True for _ in child.parameters())]


def quantise_layers(model: PreTrainedModel, quantize: Quantize) -> None:
    """Quantise the linear layers of a plain model, one after the other; a file's packed layers are there already."""
    if quantize == "gguf":
        if not any(type(module).__name__ == "GgufLinear" for module in model.modules()):
            raise LoraError(
                "--quantize gguf: transformers could not keep this file's blocks here (it wants a kernel for them, "
                "which it gets from the hub). Take --quantize nf4."
            )
        return
    for name, layer in _quantisable(model):
        model.set_submodule(name, _quantised(layer, quantize))


def keep_as_stored(model: nn.Module) -> None:
    """Let bitsandbytes store its 4-bit weights as they are.

    In the first forward pass in `eval()` it packs them for inference, on CPUs with bfloat16 products; they have other
    numbers then, and pass on no gradient.
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            vars(module)["support_avx512bf16_for_cpu"] = False


def stand_in(model: Any, quantize: Quantize, stored: int = 0) -> None:
    """Give a model of fake tensors layers that take the memory of quantised ones, and make what those make in a step.

    stored: the bytes of all its weights in its files, where these are quantised. 0: not known.
    """
    layers = _quantisable(model)
    each = _BYTES.get(quantize, 1.0)
    if stored:
        inside = sum(layer.weight.numel() for _, layer in layers)
        others = sum(parameter.nbytes for parameter in model.parameters()) - sum(own.weight.nbytes for _, own in layers)
        each = max(stored - others, 0) / inside
    kind = type(_CLASSES.get(quantize, "QuantizedLinear"), (_StandIn,), {})  # the name that a table shows
    for name, layer in layers:
        model.set_submodule(name, kind(layer, each))


def weight_bytes(model: Any) -> tuple[int, int]:
    """The bytes of a model's parameters with quantised layers as `stand_in` makes them, and with plain ones."""
    packed = sum(parameter.nbytes for parameter in model.parameters())
    layers = [module for module in model.modules() if isinstance(module, _StandIn)]
    plain = sum(layer.in_features * layer.out_features * layer.compute_dtype.itemsize for layer in layers)
    return packed, packed - sum(layer.weight.nbytes for layer in layers) + plain


def _quantisable(model: Any) -> list[tuple[str, nn.Linear]]:
    kept = tuple(f"{name}." for name in heads(model))
    return [
        (name, module)
        for name, module in model.named_modules()
        if type(module) is nn.Linear and not f"{name}.".startswith(kept)
    ]


def _quantised(layer: nn.Linear, quantize: Quantize) -> nn.Module:
    bnb: Any = importlib.import_module("bitsandbytes")
    sizes = {"input_features": layer.in_features, "output_features": layer.out_features}
    sizes["bias"] = layer.bias is not None
    new: Any
    if quantize == "nf4":
        how: dict[str, Any] = {"quant_type": "nf4", "compress_statistics": False}
        new = bnb.nn.Linear4bit(**sizes, **how, compute_dtype=layer.weight.dtype, device="meta")
        new.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, module=new, **how)
    else:
        new = bnb.nn.Linear8bitLt(**sizes, has_fp16_weights=False, device="meta")
        new.weight = bnb.nn.Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
    new.bias = layer.bias
    new.train(layer.training)
    return new.to(layer.weight.device)  # type: ignore[no-any-return]


class _StandIn(nn.Linear):
    def __init__(self, layer: nn.Linear, bytes_each: float) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        size = round(bytes_each * layer.weight.numel())
        packed = torch.empty(size, dtype=torch.uint8, device=layer.weight.device)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = layer.bias
        self.compute_dtype = layer.weight.dtype

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _WithMadeWeight.apply(x, self.out_features)
        return y if self.bias is None else y + self.bias


class _WithMadeWeight(torch.autograd.Function):
    """x (…, in) by a weight (out, in) that is made for the product and again for its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, outputs: int) -> Tensor:
        ctx.inputs = x.shape[-1]
        return x @ x.new_empty(x.shape[-1], outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (g,) = grads
        return (g @ g.new_empty(g.shape[-1], ctx.inputs) if ctx.needs_input_grad[0] else None), None
