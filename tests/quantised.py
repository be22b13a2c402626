"""Small models with quantised layers: bitsandbytes' and torchao's own, and doubles of those that want a GPU.

A double has the class's name, the names and dtypes of what it stores, and a forward pass with the numbers written out:
what lorakit goes by. It does not import the library, and neither does lorakit.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IN, HIDDEN, OUT = 64, 128, 64
GROUP = 32


def library(name: str) -> Any:
    return importlib.import_module(name)


def plain(bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(IN, HIDDEN, bias=bias), nn.Tanh(), nn.Linear(HIDDEN, OUT, bias=bias))


def _replaced(model: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear:
            model.set_submodule(name, make(module))
    return model


def four_bits(kind: str, twice: bool = False) -> Callable[[nn.Linear], nn.Module]:
    def make(layer: nn.Linear) -> nn.Module:
        bnb = library("bitsandbytes")
        settings: dict[str, Any] = dict(quant_type=kind, compress_statistics=twice)
        new = bnb.nn.Linear4bit(
            layer.in_features,
            layer.out_features,
            bias=layer.bias is not None,
            compute_dtype=torch.float32,
            **settings,
        )
        new.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, module=new, **settings)
        new.bias = layer.bias
        return new.to("cpu")

    return make


def four_bits_weight(layer: Any) -> Tensor:
    weight: Tensor = library("bitsandbytes").functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return weight


def eight_bits(layer: nn.Linear) -> nn.Module:
    bnb = library("bitsandbytes")
    new = bnb.nn.Linear8bitLt(
        layer.in_features, layer.out_features, bias=layer.bias is not None, has_fp16_weights=False
    )
    new.weight = bnb.nn.Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
    new.bias = layer.bias
    return new.to("cpu")


def eight_bits_weight(layer: Any) -> Tensor:
    codes = layer.weight.CB if layer.weight.CB is not None else layer.state.CB
    sizes = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
    return codes * sizes[:, None] / 127


def torchao(config: str) -> Callable[[nn.Linear], nn.Module]:
    def make(layer: nn.Linear) -> nn.Module:
        quantization = library("torchao.quantization")
        quantization.quantize_(layer, getattr(quantization, config)())
        return layer

    return make


def gguf_blocks(layer: nn.Linear) -> nn.Module:
    """transformers' layer for a .gguf file's blocks, with the gguf package's numbers: its kernels are at the hub."""
    gguf, numbers = library("gguf"), library("gguf.quants")
    utils = library("transformers.integrations.gguf.utils")
    kind = gguf.GGMLQuantizationType.Q8_0

    def numbers_of(blocks: Tensor, *_: Any) -> Tensor:
        return torch.from_numpy(numbers.dequantize(blocks.numpy(), kind))

    utils.dequantize_blocks = lambda blocks, kind, rows, columns, dtype: numbers_of(blocks).to(dtype)
    utils.mul_mat_vec = lambda blocks, x, *_: x.float() @ numbers_of(blocks).T
    new = utils.GgufLinear(layer.in_features, layer.out_features, int(kind), bias=layer.bias is not None)
    new.weight.data = torch.from_numpy(numbers.quantize(layer.weight.detach().numpy(), kind))
    new.bias, new.numbers = layer.bias, numbers_of
    return new


class _Grouped:
    """Codes of four bits with a scale and a zero for each group of a row, as GPTQ, AWQ, HQQ and GGUF's Q4 have them."""

    def __init__(self, weight: Tensor) -> None:
        groups = weight.detach().unflatten(1, (-1, GROUP))
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        self.scale = (high - low) / 15
        self.zero = -low / self.scale
        self.codes = (groups / self.scale + self.zero).round().to(torch.uint8)

    def numbers(self) -> Tensor:
        return ((self.codes.float() - self.zero) * self.scale).flatten(1)


def double(path: str, *, linear: bool = False, store: str = "qweight", sizes: str = "in_features out_features") -> Any:
    """A class of this name for a layer. linear: a subclass of nn.Linear."""
    module, _, name = path.rpartition(".")

    def init(self: Any, layer: nn.Linear) -> None:
        nn.Module.__init__(self)
        for size, value in zip(sizes.split(), (layer.in_features, layer.out_features), strict=True):
            setattr(self, size, value)
        self.grouped = _Grouped(layer.weight)
        packed = self.grouped.codes.flatten(1)
        packed = packed[:, ::2] | packed[:, 1::2] << 4
        if store == "weight":
            self.weight = nn.Parameter(packed, requires_grad=False)
        else:
            self.register_buffer(store, packed)
        self.register_buffer("scales", self.grouped.scale)
        self.register_buffer("qzeros", self.grouped.zero)
        self.bias = layer.bias

    def forward(self: Any, x: Tensor) -> Tensor:
        return F.linear(x, self.grouped.numbers().to(x.dtype), self.bias)

    members = {"__init__": init, "forward": forward, "__module__": module, "__qualname__": name}
    return type(name, (nn.Linear if linear else nn.Module,), members)


class Float8(nn.Linear):
    """transformers' FP8Linear: a weight in eight bits, a scale for each block, and an input that is rounded too."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=layer.bias is not None)
        self.weight_scale_inv = nn.Parameter(layer.weight.detach().abs().amax() / 448, requires_grad=False)
        stored = (layer.weight.detach() / self.weight_scale_inv).to(torch.float8_e4m3fn)
        self.weight = nn.Parameter(stored, requires_grad=False)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        size = x.detach().abs().amax(-1, keepdim=True).clamp_min(1e-12) / 448
        rounded = (x / size).to(torch.float8_e4m3fn).to(x.dtype) * size
        x = x + (rounded - x).detach()
        return F.linear(x, self.weight.to(x.dtype) * self.weight_scale_inv, self.bias)


Float8.__module__, Float8.__qualname__ = "transformers.integrations.finegrained_fp8", "FP8Linear"


@dataclass(frozen=True)
class Base:
    """make: a quantised layer of a plain one. weight: its numbers as its library tells them. digits: how far its output
    is from x Wᵀ, as a power of ten.
    """

    name: str
    make: Callable[[nn.Linear], nn.Module]
    weight: Callable[[Any], Tensor]
    digits: int = -5
    real: bool = True

    def model(self) -> Any:
        return _replaced(plain(), self.make)


def _double(name: str, path: str, **settings: Any) -> Base:
    return Base(name, double(path, **settings), lambda layer: layer.grouped.numbers(), real=False)


BASES = [
    Base("bitsandbytes nf4", four_bits("nf4"), four_bits_weight),
    Base("bitsandbytes nf4, double quantisation", four_bits("nf4", twice=True), four_bits_weight),
    Base("bitsandbytes fp4", four_bits("fp4"), four_bits_weight),
    Base("bitsandbytes int8", eight_bits, eight_bits_weight, digits=-1),
    Base("torchao int8", torchao("Int8WeightOnlyConfig"), lambda layer: layer.weight.dequantize()),
    Base("torchao float8", torchao("Float8WeightOnlyConfig"), lambda layer: layer.weight.dequantize()),
    Base("GGUF blocks (transformers' layer)", gguf_blocks, lambda layer: layer.numbers(layer.weight), real=False),
    _double("GPTQ", "gptqmodel.nn_modules.qlinear.BaseQuantLinear"),
    _double("GPTQ (AutoGPTQ)", "auto_gptq.nn_modules.qlinear.qlinear_cuda.QuantLinear", sizes="infeatures outfeatures"),
    _double("AWQ", "awq.modules.linear.gemm.WQLinear_GEMM"),
    _double("HQQ", "hqq.core.quantize.HQQLinear", store="W_q"),
    _double("compressed-tensors", "compressed_tensors.linear.compressed_linear.CompressedLinear", linear=True),
    Base(
        "FP8",
        Float8,
        lambda layer: layer.weight.float() * layer.weight_scale_inv,
        digits=-1,
        real=False,
    ),
]
