"""What the other methods put into a model: bottleneck adapters, and trained vectors in extra positions.

Adapter (Houlsby et al. 2019, figure 2), on what a sublayer gives, before it is added to the residual stream:

    h ← h + up(f(down(h)))       down: d → r, up: r → d, both with biases; f: GELU, or ReLU as Pfeiffer et al.

after a block's last norm (Pfeiffer et al. 2021; AdapterHub's configuration "pfeiffer"), s = x + h the sum it is given:

    LN(s)  becomes  LN(s + up(f(down(LN(s)))))

`up` starts at zero, so that the model's output is at first what it was, to the bit; Houlsby et al. draw it near zero.
`down` is drawn as theirs: a normal of deviation 0.01, cut at two deviations. An adapter comes before the sublayer's
dropout, where theirs comes after it: what follows a projection is not told by structure. In `eval()` it is the same.

Prefix (Hu et al. 2021, section 5.1: prefix-embedding and prefix-layer tuning): l positions are added to the sequence,
and what stands there is trained, either what the embedding gives for them, (l, d), or what each block is given,
L · (l, d). `Span` adds the positions on the way into the base model and cuts them out on the way out, so ids, labels,
logits and heads keep their shapes. They stand before the text in a causal model, and after the first token, from which
the class is read, in an encoder. A key-value cache holds them from its first step on.

All of these are forward hooks, where LoRA (core/attach.py) changes a layer's class: nothing of the layer is replaced
and its weight is not read, so one hook serves linear layers of any make, norms, attentions and whole blocks; and
torch's encoder layer, which reads its layers' weights in its fast path, leaves that path where it sees a hook. A hook
is a bound method of what was inserted, so that it copies and pickles with the model.
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
    """h ↦ up(f(down(h))), (…, d) → (…, d): zero at first. like: the parameter whose dtype and device it goes by."""

    def __init__(self, width: int, bottleneck: int, activation: nn.Module, like: Tensor) -> None:
        super().__init__()
        dtype = factor_dtype(like)
        self.down = nn.Linear(width, bottleneck, device=like.device, dtype=dtype)
        self.activation = activation
        self.up = nn.Linear(bottleneck, width, device=like.device, dtype=dtype)
        # A normal distribution of deviation 0.01, cut at two of them, drawn by the inverse of its integral. torch's own
        # looks at what it has drawn, which a model without data (for counting parameters) does not have.
        with torch.no_grad():
            inside = math.erf(math.sqrt(2))
            self.down.weight.uniform_(-inside, inside).erfinv_().mul_(0.01 * math.sqrt(2))
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, h: Tensor) -> Tensor:
        y: Tensor = self.up(self.activation(self.down(h.to(self.down.weight.dtype))))
        return y.to(h.dtype)

    def add(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Forward hook: h + up(f(down(h))) for what `module` gives, or for the first of what it gives."""
        if isinstance(output, tuple):
            return (output[0] + self(output[0]), *output[1:])
        return output + self(output)

    def add_before_norm(self, module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        """Forward hook of a norm: LN(s + up(f(down(LN(s)))))."""
        y: Tensor = module.forward(args[0] + self(output))
        return y


class Span:
    """l positions in the sequence of a base model, from `start` on. No module: it holds no tensor."""

    def __init__(self, start: int, length: int, placeholder: int) -> None:
        self.start, self.length = start, length
        self.placeholder = placeholder  # a token that is no padding; what it stands for is replaced
        # Whether the running forward pass has the positions: not when a cache holds them. It is so whenever no pass
        # runs, so that a block computed again for the backward pass does what it did.
        self.present = True
        self.total = 0

    def insert(self, tensor: Tensor, between: Tensor) -> Tensor:
        """`between` (…, l, …) put into `tensor` at `start`, along the dimension of the sequence, 1."""
        return torch.cat((tensor[:, : self.start], between, tensor[:, self.start :]), 1)

    def open(self, base: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Forward pre-hook of the base model: the positions enter ids, types, mask and positions."""
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
        """Forward hook of the base model: the positions leave every (batch, length, d) that it gives.

        It runs after an error too, where there is no output, so that the next pass finds `present` as it should be.
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
    """The l vectors (l, d) that stand in a span, where what a module gives or is given runs through a hook."""

    def __init__(self, vectors: Tensor, span: Span) -> None:
        super().__init__()
        self.vectors = nn.Parameter(vectors.detach().clone().to(factor_dtype(vectors)))
        self.span = span

    def forward(self, h: Tensor) -> Tensor:
        """`h` (batch, length, d) with the vectors in the span's positions; as it is where the span is in the cache."""
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
    """Inside, the list that it gives gains what each of these modules is given, (batch, length, d), call by call."""
    seen: list[Tensor] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])

    handles = [module.register_forward_pre_hook(note, with_kwargs=True) for module in modules]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
