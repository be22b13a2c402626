"""What the other methods insert into a model: bottleneck adapters, and trained vectors in extra positions.

An adapter (Houlsby et al. 2019, figure 2) changes the output of a sublayer before it is added to the residual stream:

    h ← h + up(f(down(h)))       down: d → r, up: r → d, both with biases; f: GELU, or ReLU for Pfeiffer et al.

After a block's last norm (Pfeiffer et al. 2021; AdapterHub's configuration "pfeiffer"), with its input s = x + h:

    LN(s)  becomes  LN(s + up(f(down(LN(s)))))

`up` starts at zero, so the model's output is at first unchanged, bit for bit; Houlsby et al. start it near zero. `down`
starts as theirs: a normal distribution with standard deviation 0.01, cut at two deviations. An adapter comes before the
sublayer's dropout, because the structure of a model does not show what follows a projection; theirs comes after it. In
eval mode there is no difference.

A prefix (Hu et al. 2021, section 5.1: prefix-embedding and prefix-layer tuning) adds l positions to the sequence and
trains what stands there: either the embedding's output for them, (l, d), or each block's input, L · (l, d). `Span` adds
the positions on the way into the base model and removes them on the way out, so ids, labels, logits and heads keep
their shapes. The positions come before the text in a causal model. In an encoder they come after the first token, from
which the class is read. A key-value cache holds them from its first step on.

All of these are forward hooks, whereas LoRA (core/attach.py) changes a layer's class. A hook replaces nothing of the
layer and does not read its weight, so one hook works for any linear layer, norm, attention or whole block. torch's
encoder layer reads its layers' weights in its fast path, but does not take that path if there is a hook. A hook is a
bound method of the inserted module, so that it is copied and pickled with the model.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...core.attach import factor_dtype
from ...core.errors import LoraError


class Bottleneck(nn.Module):
    """h ↦ up(f(down(h))), (…, d) → (…, d); zero at first. like: a parameter that gives the device and the dtype."""

    def __init__(self, width: int, bottleneck: int, activation: nn.Module, like: Tensor) -> None:
        super().__init__()
        dtype = factor_dtype(like)
        self.down = nn.Linear(width, bottleneck, device=like.device, dtype=dtype)
        self.activation = activation
        self.up = nn.Linear(bottleneck, width, device=like.device, dtype=dtype)
        # A normal distribution with standard deviation 0.01, cut at two deviations, drawn by its inverse distribution
        # function. torch's own reads the drawn values, which fake tensors (used to count parameters) do not have.
        with torch.no_grad():
            inside = math.erf(math.sqrt(2))
            self.down.weight.uniform_(-inside, inside).erfinv_().mul_(0.01 * math.sqrt(2))
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, h: Tensor) -> Tensor:
        y: Tensor = self.up(self.activation(self.down(h.to(self.down.weight.dtype))))
        return y.to(h.dtype)

    def add(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Forward hook: h + up(f(down(h))) for the output of `module`, or for the first item of a tuple."""
        if isinstance(output, tuple):
            return (output[0] + self(output[0]), *output[1:])
        return output + self(output)

    def add_before_norm(self, module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        """Forward hook of a norm: LN(s + up(f(down(LN(s)))))."""
        y: Tensor = module.forward(args[0] + self(output))
        return y


class Span:
    """l positions in the sequence of a base model, from `start` on. It holds no tensor, so it is not a module."""

    def __init__(self, start: int, length: int, placeholder: int) -> None:
        self.start, self.length = start, length
        self.placeholder = placeholder  # a token that is not padding; its embedding or states are replaced
        # Whether the running forward pass has the positions. It has not if a cache holds them. Outside of a pass this
        # is True, so that a block that is recomputed for the backward pass does the same as before.
        self.present = True
        self.total = 0

    def insert(self, tensor: Tensor, between: Tensor) -> Tensor:
        """`tensor` with `between` (…, l, …) inserted at `start`, along dimension 1, the sequence."""
        return torch.cat((tensor[:, : self.start], between, tensor[:, self.start :]), 1)

    def open(self, base: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Forward pre-hook of the base model: insert the positions into ids, types, mask and position ids."""
        kwargs = dict(zip(inspect.signature(base.forward).parameters, args, strict=False)) | kwargs
        ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
        if ids is None or kwargs.get("inputs_embeds") is not None:
            raise LoraError("a prefix is put among tokens: call the model with input_ids, not with inputs_embeds.")
        if mask is not None and mask.dim() != 2:
            raise LoraError(f"a prefix needs an attention_mask (batch, length), not one of shape {tuple(mask.shape)}.")
        types = kwargs.get("token_type_ids")
        if types is not None and self.start == 0:
            raise LoraError(f"{type(base).__name__} embeds token_type_ids as words: leave them out with a prefix.")
        cache = kwargs.get("past_key_values")
        self.present = cache is None or cache.get_seq_length() == 0
        if mask is not None:
            kwargs["attention_mask"] = self.insert(mask, mask.new_ones(len(mask), self.length))
        positions = kwargs.get("position_ids")
        if positions is not None:
            kwargs["position_ids"] = self._positions(positions)
        if self.present:
            kwargs["input_ids"] = self.insert(ids, ids.new_full((len(ids), self.length), self.placeholder))
            if types is not None:
                kwargs["token_type_ids"] = self.insert(types, types[:, :1].expand(-1, self.length))
            self.total = kwargs["input_ids"].shape[1]
        return (), kwargs

    def close(self, base: nn.Module, args: Any, output: Any) -> Any:
        """Forward hook of the base model: remove the positions from every output of shape (batch, length, d).

        It also runs after an error, without an output, so that `present` is right for the next pass.
        """
        present, self.present = self.present, True
        return self._cut(output) if present else output

    def _positions(self, positions: Tensor) -> Tensor:
        if not self.present:
            return positions + self.length
        first = positions[:, self.start - 1 : self.start] + 1 if self.start else positions.new_zeros(len(positions), 1)
        added = first + torch.arange(self.length, device=positions.device)
        return torch.cat((positions[:, : self.start], added, positions[:, self.start :] + self.length), 1)

    def _cut(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            if value.dim() != 3 or value.shape[1] != self.total:
                return value
            return torch.cat((value[:, : self.start], value[:, self.start + self.length :]), 1)
        if isinstance(value, dict):  # transformers' ModelOutput, whose fields are its items
            for key in value:
                value[key] = self._cut(value[key])
            return value
        return tuple(map(self._cut, value)) if isinstance(value, tuple) else value


class Vectors(nn.Module):
    """The trained vectors (l, d) of a span. A hook puts them into the output or the input of a module."""

    def __init__(self, vectors: Tensor, span: Span) -> None:
        super().__init__()
        self.vectors = nn.Parameter(vectors.detach().clone().to(factor_dtype(vectors)))
        self.span = span

    def forward(self, h: Tensor) -> Tensor:
        """`h` (batch, length, d) with the vectors in the span's positions; unchanged if a cache holds the span."""
        if not self.span.present:
            return h
        start, end = self.span.start, self.span.start + self.span.length
        return torch.cat((h[:, :start], self.vectors.to(h.dtype).expand(len(h), -1, -1), h[:, end:]), 1)

    def in_output(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        """Forward hook of an embedding."""
        y: Tensor = self(output)
        return y

    def in_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Forward pre-hook of a block."""
        if args:
            return (self(args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": self(kwargs["hidden_states"])}


@contextlib.contextmanager
def given_to(modules: list[nn.Module]) -> Iterator[list[Tensor]]:
    """Within the block, the yielded list collects the input (batch, length, d) of each call of these modules."""
    seen: list[Tensor] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])

    handles = [module.register_forward_pre_hook(note, with_kwargs=True) for module in modules]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
