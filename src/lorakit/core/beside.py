"""Layers that compute their output in a way of their own: the update is added beside whatever they compute.

    y = base(x) + s · up(down(drop(x)))

`Linear` and its sisters own the product with the weight, and are fast. Here `base` is the forward pass of the class
that the layer has: a subclass with a forward of its own (Falcon's, a static padding), a weight that is computed
(weight_norm, parametrisations) or quantised (`quantised.py`). The adapted class is joined from both. Its output is the
base's as long as the update is zero, whatever the base does.

Before anything is changed, `trial` tells whether the output is linear in x, as the equation supposes. `merge_refusal`
tells whether the weight is used as it is, so that W + s·ΔW in its place does the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .adapted import AdaptedLayer
from .errors import LoraError
from .layers import Conv1d, Conv2d, Conv3d, ConvLoRA, Linear, linear_size
from .layouts import Layout
from .matrix import precise
from .quantised import dequantised_weight, is_known, is_quantised, working_like

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
_QUANTISED = 0.1  # where the layer may round its input to 8 bits
_SIZES = (1e-2, 1.0, 1e2)  # a clamp or a rounding shows at one of them


class AddsBeside(AdaptedLayer):
    """The base class put before a kind's: the forward pass, and when it can be merged."""

    takes_weight = False
    # bitsandbytes packs a 4-bit weight for inference in the first forward pass in `eval()`, on CPUs with bfloat16
    # products. Such a weight has other numbers and passes on no gradient, so an adapted layer tells it of no such CPU.
    support_avx512bf16_for_cpu = property(lambda self: False)

    @classmethod
    def refusal_of(cls, module: nn.Module) -> str | None:
        if getattr(getattr(module._parameters.get("weight"), "quant_state", None), "packing_format_for_cpu", False):
            return (
                "bitsandbytes packed its weight for inference in a forward pass in eval(): it passes on no gradient. "
                "Load the model again, and adapt it before its first forward pass"
            )
        return None if is_known(module) else trial(module)

    @classmethod
    def shapes_on(cls, module: Any, rank: int, layout: Layout) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return cls.factor_shapes(module, rank)  # a computed weight is not looked at

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = self.plain_output(x, *args, **kwargs)
        if not self.active:
            return self.guard(y)
        if torch.is_grad_enabled() and x.requires_grad and not y.requires_grad:
            raise LoraError(
                f"{type(self).__name__} passes no gradient on to its input, so the adapted layers before it would "
                "learn nothing from it. Train on a base that has a backward pass."
            )
        self.mark()
        dropout = self.acting_dropout
        return y + self._update(x if dropout is None else dropout(x)).to(y.dtype)

    def _update(self, x: Tensor) -> Tensor:
        """s · up(down(x))"""
        raise NotImplementedError

    def _computed_weight(self) -> Tensor:
        if type(self).weight is AdaptedLayer.weight:
            return super()._computed_weight()
        return self.weight  # the property of the class behind

    @property
    def like(self) -> Tensor:
        return working_like(self)

    def adopted(self, plain: type[nn.Module], layout: Layout) -> None:
        super().adopted(plain, layout)
        if is_quantised(self):
            self.read_as_sum = False  # nobody can compute with the bytes

    def size(self) -> tuple[int, int]:
        A, B = self._factor_matrices()
        return B.shape[0], A.shape[1]

    def base_matrix(self) -> Tensor:
        if not is_quantised(self):
            return super().base_matrix()
        return precise(dequantised_weight(self.plain_output, self.size()[1], self.like))

    def fits(self) -> bool:
        return True  # a computed weight has no shape of its own

    def merge(self) -> None:
        reason = None if self.merged or self.disabled_by else self.merge_refusal()
        if reason:
            raise LoraError(f"this layer cannot be merged: {reason}.")
        super().merge()

    def merge_refusal(self) -> str | None:
        kind = type(self).__name__
        weight = self._parameters.get("weight")
        if is_quantised(self):
            return f"{kind} stores its weight quantised. lorakit.dequantize(model) makes plain layers of such"
        if weight is None:
            return f"{kind} computes its weight from other parameters, so there is nothing to add the update to"
        if type(weight) not in (Tensor, nn.Parameter) or weight.is_meta:
            return None
        first, second = torch.randn_like(weight), torch.randn_like(weight)
        try:
            with self._tried() as x:
                outputs = []
                for own in (first, second, first + second, torch.zeros_like(weight)):
                    self._parameters["weight"] = nn.Parameter(own, requires_grad=False)
                    outputs.append(self.plain_output(x))
                wanted = self._plain(x, first)
        except Exception as error:  # another program's class may raise anything
            return f"{kind} could not be tried: {type(error).__name__}: {error}"
        one, other, both, none = outputs
        tolerance = _TOLERANCE.get(one.dtype, 1e-3)
        if not (_same(both - one, other - none, tolerance) and (wanted is None or _same(one, wanted, tolerance))):
            return f"{kind} does not use its weight as it is, so W + s·ΔW in its place would do something else"
        return None

    def _plain(self, x: Tensor, weight: Tensor) -> Tensor | None:
        """What torch's own layer gives with this weight, or None where only the class itself knows."""
        return None

    @contextmanager
    def _tried(self) -> Iterator[Tensor]:
        """An input to try the base with. Afterwards the base is as before."""
        with tried(self) as x:
            yield x


class Beside(AddsBeside, Linear):  # type: ignore[misc]  # which passes on what else the base takes
    """`Linear` beside any module that takes x (…, in) to (…, out) and is linear in x, however it stores its weight.

    The module says its size by `in_features` and `out_features`, or by a weight (out, in).
    """

    @classmethod
    def shapes_on(cls, module: Any, rank: int, layout: Layout) -> tuple[tuple[int, ...], tuple[int, ...]]:
        outputs, inputs = linear_size(module)  # a computed weight is not looked at
        return (rank, inputs), (outputs, rank)

    def _update(self, x: Tensor) -> Tensor:
        A, B = self.factors()
        return F.linear(F.linear(x, A.to(x.dtype)) * self.scaling, B.to(x.dtype))

    def _plain(self, x: Tensor, weight: Tensor) -> Tensor | None:
        return F.linear(x, weight, self.bias)


class _BesideConv(AddsBeside, ConvLoRA):
    """ConvLoRA beside any class that convolves: the update goes the base's own way, by its padding and strides."""

    def _update(self, x: Tensor) -> Tensor:
        update = (self.scaling * self._dense()).view(module_kernel(self)).to(x.dtype)
        return convolved(self, self.plain_class, x, update)


class BesideConv1d(_BesideConv, Conv1d):  # type: ignore[misc]
    pass


class BesideConv2d(_BesideConv, Conv2d):  # type: ignore[misc]
    pass


class BesideConv3d(_BesideConv, Conv3d):  # type: ignore[misc]
    pass


def convolved(module: Any, cls: Any, x: Tensor, weight: Tensor) -> Tensor:
    """The convolution of x by `module`, seen as one of class `cls`, with another weight and no bias."""
    result: Tensor
    if cls.forward in _CONV_FORWARDS:
        result = module._conv_forward(x, weight, None)
        return result
    other = cls.__new__(cls)
    other.__dict__ |= {**module.__dict__, "_parameters": {**module._parameters, "weight": weight, "bias": None}}
    result = cls.forward(other, x)
    return result


def trial(module: nn.Module) -> str | None:
    """Why the equation does not hold for a layer of another class, or None. It is tried on a few random inputs."""
    kind = f"{type(module).__module__}.{type(module).__name__}"
    like = working_like(module)
    if like.is_meta or _has_no_numbers(module):
        return None
    tolerance = _QUANTISED if is_quantised(module) else _TOLERANCE.get(like.dtype, 1e-3)
    try:
        with tried(module) as x:
            forward = type(module).forward if isinstance(module, nn.Module) else None
            for size in _SIZES:
                a, b = size * x, size * torch.randn_like(x)
                ab, one, other, none = (_called(module, forward, own) for own in (a + b, a, b, 0 * x))
                if x.dim() == 2 and ab.shape != (len(x), linear_size(module)[0]):
                    return f"{kind} is a subclass with an output of shape {tuple(ab.shape)} for {tuple(x.shape)}"
                if not _same(ab - one, other - none, tolerance):
                    return f"{kind} is a subclass that may read its weight in a way of its own: it is not linear in x"
            if isinstance(module, nn.modules.conv._ConvNd):
                kernel = torch.randn(module_kernel(module)).to(x)
                weighed = [convolved(module, type(module), x, factor * kernel) for factor in (1, 3)]
                if weighed[0].shape != one.shape or not _same(3 * weighed[0], weighed[1], tolerance):
                    return f"{kind} is a subclass that may read its weight in a way of its own: it is not linear in it"
    except Exception as error:  # whatever a class of another's raises
        return f"{kind} is a subclass that could not be tried: {type(error).__name__}: {error}"
    return None


def _has_no_numbers(module: nn.Module) -> bool:
    """Whether it is made of tensors that cannot be looked into: fake ones, and those of other classes."""
    return any(type(tensor) not in (Tensor, nn.Parameter) for tensor in module.parameters())


def module_kernel(module: Any) -> tuple[int, ...]:
    """The shape of a convolution's weight."""
    return (module.out_channels, module.in_channels // module.groups, *module.kernel_size)


def _called(module: Any, forward: Any, x: Tensor) -> Tensor:
    """The module's output, with torch's own pre-hooks (weight_norm) and no other hooks."""
    for hook in module._forward_pre_hooks.values():
        if type(hook).__module__.startswith("torch.nn.utils"):
            hook(module, (x,))
    y: Tensor = forward(module, x)
    return y


@contextmanager
def tried(module: nn.Module) -> Iterator[Tensor]:
    """An input for the module, which is in `eval()` meanwhile. Afterwards its attributes, its buffers and torch's
    generator are as before.
    """
    inner = [(own, dict(own.__dict__), dict(own._parameters), dict(own._buffers)) for own in module.modules()]
    values = [(buffer, buffer.clone()) for buffer in module.buffers()]
    like = working_like(module)
    devices = [like.device] if like.is_cuda else []
    with torch.no_grad(), torch.random.fork_rng(devices), torch.autocast(like.device.type, enabled=False):
        torch.manual_seed(0)
        for own, *_ in inner:
            own.__dict__["training"] = False
        shape = _image(module) if hasattr(module, "kernel_size") else [2, linear_size(module)[1]]
        try:
            yield torch.randn(shape, dtype=like.dtype, device=like.device)
        finally:
            for own, attributes, parameters, buffers in inner:
                own.__dict__.clear()
                own.__dict__.update(attributes)
                for registry, before in ((own._parameters, parameters), (own._buffers, buffers)):
                    registry.clear()
                    registry.update(before)  # type: ignore[arg-type]
            for buffer, value in values:
                buffer.copy_(value)


def _image(module: Any) -> list[int]:
    sizes = [(k - 1) * d + 1 + 8 for k, d in zip(module.kernel_size, module.dilation, strict=True)]
    return [1, module.in_channels, *sizes]


def _same(a: Tensor, b: Tensor, tolerance: float) -> bool:
    scale = torch.maximum(a.abs().max(), b.abs().max())
    return bool(((a - b).abs().max() <= tolerance * scale) & scale.isfinite())


_CONV_FORWARDS = (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)
