"""A layer of each kind with factors that are not zero, its input, and its output by torch's own layer in float64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lorakit
from lorakit.core import dropout
from reference import equation

F64 = torch.float64
SCALE = 2.0  # α/r

# name → a layer of torch's or transformers', the shape of its input, attach's settings
KINDS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], dict]] = {
    "linear": (lambda: nn.Linear(6, 5), (3, 4, 6), {}),
    "linear, many rows": (lambda: nn.Linear(6, 5), (7, 4, 6), {}),
    "Conv1D": (lambda: Conv1D(5, 6), (3, 4, 6), {}),
    "fused, q and v": (lambda: nn.Linear(6, 9), (3, 4, 6), {"rank_pattern": {"0": [2, 0, 1]}}),
    "DoRA": (lambda: nn.Linear(6, 5), (3, 4, 6), {"dora": True}),
    "embedding": (lambda: nn.Embedding(7, 5), (3, 4), {}),
    "padded embedding": (lambda: nn.Embedding(7, 5, padding_idx=2, scale_grad_by_freq=True), (3, 4), {}),
    "conv1d": (lambda: nn.Conv1d(3, 4, 3, padding=1), (2, 3, 8), {}),
    "conv2d": (lambda: nn.Conv2d(3, 4, (3, 2), stride=2, padding=(1, 0)), (2, 3, 6, 5), {}),
    "conv2d, many positions": (lambda: nn.Conv2d(3, 4, 3, padding="same", dilation=2), (3, 3, 8, 8), {}),
    "circular conv2d": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), (2, 3, 4, 4), {}),
    "grouped conv2d": (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 5, 5), {}),
    "conv3d": (lambda: nn.Conv3d(2, 4, 2), (2, 2, 3, 3, 3), {}),
}
every_kind = pytest.mark.parametrize("kind", KINDS)
LINEAR_AND_CONV = [kind for kind in KINDS if "embedding" not in kind]


def adapted(kind: str, dtype: torch.dtype = F64, **settings) -> nn.Sequential:
    torch.manual_seed(0)
    make, _, own = KINDS[kind]
    model = nn.Sequential(make()).to(dtype)
    lorakit.attach(model, "0", rank=2, alpha=2 * SCALE, dtype=dtype, **own, **settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape))
    return model


def given(kind: str, dtype: torch.dtype = F64) -> Tensor:
    torch.manual_seed(1)
    shape = KINDS[kind][1]
    if "embedding" in kind:
        return torch.randint(0, 7, shape)
    return torch.randn(shape, dtype=dtype, requires_grad=True)


def expected(kind: str, model: nn.Sequential, x: Tensor) -> Tensor:
    """Torch's layer with the weight written out; a function of the factors and of x."""
    make, _, own = KINDS[kind]
    layer, plain = model[0], make().double()
    W, A, B = layer.weight.detach(), layer.lora_A, layer.lora_B
    if kind == "Conv1D":
        weight = equation.linear_weight(W.T, A, B, SCALE).T
    elif "rank_pattern" in own:
        weight = equation.merged_linear_weight(W, A, B, SCALE, list(layer.blocks))
    elif "embedding" in kind:
        weight = equation.embedding_weight(W, A, B, SCALE)
    elif "conv" in kind:
        weight = equation.conv_weight(W, A, B, SCALE)
    else:
        weight = equation.linear_weight(W, A, B, SCALE, getattr(layer, "lora_magnitude", None))
    tensors = {"weight": weight}
    if getattr(layer, "bias", None) is not None:
        tensors["bias"] = layer.bias.detach()
    return torch.func.functional_call(plain, tensors, (x,))


def factors(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def inputs_of(model: nn.Module, x: Tensor) -> list[Tensor]:
    return [*factors(model), *([x] if x.requires_grad else [])]


def drawn_mask(p: float, shape: tuple[int, ...], dtype: torch.dtype = F64) -> Tensor:
    """A mask of zeros and ones as an attached layer draws it."""
    ones = torch.ones(shape, dtype=dtype)
    return dropout.draw_mask(ones, dropout.QuickDropout(p), 2).masked(ones.flatten(0, -2)).view(shape)
