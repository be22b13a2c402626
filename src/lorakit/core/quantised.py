"""Layers that store their weight quantised: which they are, in which dtype they compute, and their weight as numbers.

A quantised layer keeps W in 4 or 8 bits, or as blocks of bytes, and gives x Wᵀ + b for a W that it does not store.
So the update goes beside it (`beside.py`), and whoever needs W asks the layer: because its output is linear in x, row i
of base(I) − base(0) is column i of W. That holds for every library, without importing it.

The classes are known by name. They are not tried before they are adapted: a trial can change how they store W
(bitsandbytes repacks a 4-bit weight in the first forward pass in `eval()`, on some CPUs), and a layer that rounds its
input to 8 bits is linear to two digits only.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

_KNOWN = frozenset(
    {
        "bitsandbytes.nn.modules.Linear4bit",
        "bitsandbytes.nn.modules.Linear8bitLt",
        "transformers.integrations.gguf.utils.GgufLinear",
        "transformers.integrations.finegrained_fp8.FP8Linear",
        "transformers.integrations.fbgemm_fp8.FbgemmFp8Linear",
        "transformers.integrations.compressed_tensors.CompressedTensorsFP8Linear",
        "transformers.integrations.nvfp4.NVFP4Linear",
        "transformers.integrations.higgs.HiggsLinear",
        "transformers.integrations.eetq.EetqLinear",
        "transformers.integrations.bitnet.BitLinear",
        "transformers.integrations.bitnet.AutoBitLinear",
        "compressed_tensors.linear.compressed_linear.CompressedLinear",
        "gptqmodel.nn_modules.qlinear.BaseQuantLinear",
        "auto_gptq.nn_modules.qlinear.qlinear_cuda.QuantLinear",
        "awq.modules.linear.gemm.WQLinear_GEMM",
        "awq.modules.linear.gemv.WQLinear_GEMV",
        "hqq.core.quantize.HQQLinear",
        "aqlm.inference.QuantizedLinear",
        "vptq.layers.vqlinear.VQuantLinear",
        "spqr_quant.inference.ModuleForward.QuantizedLinear",
    }
)
_ROWS = 1024  # of the identity that go through a layer at once


def is_known(module: nn.Module) -> bool:
    """Whether the module is of a class that stores a quantised weight and is linear in x, or of a subclass of one."""
    kind: Any = type(module)
    return _is_known(kind)


@functools.cache
def _is_known(kind: Any) -> bool:
    # Asked of every module of a model, several times.
    return any(f"{cls.__module__}.{cls.__qualname__}" in _KNOWN for cls in kind.__mro__)


def has_weight_of_a_class(module: nn.Module) -> bool:
    """Whether the weight is a tensor of a class of its own, as torchao's are. A DTensor is not meant: it is a plain
    weight in parts.
    """
    weight = module._parameters.get("weight")
    # By its module's name: torch.distributed takes as long to import as all of lorakit.
    return not type(weight).__module__.startswith("torch.distributed") and is_traceable_wrapper_subclass(weight)


def is_quantised(module: nn.Module) -> bool:
    """Whether the layer's W is not a stored tensor of floating-point numbers."""
    weight = module._parameters.get("weight")
    return is_known(module) or has_weight_of_a_class(module) or (weight is not None and not _is_number(weight))


def working_like(module: nn.Module) -> Tensor:
    """An empty tensor of the dtype that the layer computes in, on its device."""
    tensors = [*module.parameters(), *module.buffers()]
    device = tensors[0].device if tensors else torch.device("cpu")
    weight = module._parameters.get("weight")
    # A bias, a scale or a norm tells the dtype where the weight does not: the largest of them is the best witness.
    others = sorted((tensor for tensor in tensors if tensor is not weight), key=Tensor.numel, reverse=True)
    told = [tensor.dtype for tensor in (weight, *others) if tensor is not None and _is_number(tensor)]
    dtypes = [getattr(module, "compute_dtype", None), *told, torch.get_default_dtype()]
    dtype = next(dtype for dtype in dtypes if isinstance(dtype, torch.dtype))
    return torch.empty(0, dtype=dtype, device=device)


@torch.no_grad()
def dequantised_weight(forward: Any, inputs: int, like: Tensor) -> Tensor:
    """W (out, in) of a layer that gives x Wᵀ + b: its outputs for the unit vectors, less that for zero.

    forward: from x (…, in) to (…, out). like: a tensor of the dtype and on the device that x is to have.
    """
    zero = forward(like.new_zeros(1, inputs))
    weight: Tensor = zero.new_empty(zero.shape[-1], inputs)
    for start in range(0, inputs, _ROWS):
        x = like.new_zeros(min(_ROWS, inputs - start), inputs)
        x[:, start:].fill_diagonal_(1)
        weight[:, start : start + len(x)] = (forward(x) - zero).mT
    return weight


def _is_number(tensor: Any) -> bool:
    """Whether it holds numbers that a product can be made of: floating point of 16 bits or more."""
    return isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.element_size() >= 2
