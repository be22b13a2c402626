"""A batch in which each row has its own adapter, or none.

    y[i] = base(x)[i] + s_k · up_k(down_k(x[i]))        k: the adapter of row i

The base's product is made once for all rows. The thin products are batched: the factors of the rows' adapters are
stacked, padded with zeros to one rank, and multiplied in one operation for the whole batch (as in Punica, Chen et al.
2023, and S-LoRA, Sheng et al. 2023). Neighbouring rows with the same adapter are one group:

    rows            fr fr de de de de      →  groups of 2: fr, de, de
    x (6, 128, 576)                        →  (3, 256, 576), a view
    A (3, 16, 576), B (3, 1536, 16)           a factor for each group; zeros where a row has no adapter
    y (3, 256, 1536) += (x Aᵀ) (s·B)ᵀ      →  (6, 128, 1536)

A row of the batch may become several rows (beams, num_return_sequences) or several positions (x of (6·128, 576)): these
are next to each other, and so belong to the same group.

With gradients the stacks are made from the adapters' own parameters, so each row's gradient goes to its adapter alone.
A linear layer keeps x and S for the backward pass, and makes the stacks again there.
Without, they are made once, and again after a step of an optimizer.

Not here: adapters with DoRA (whose gain would differ by row), parameters that are read instead of called, experts'
layers, and tensors trained whole. `rows_refusal` names them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.adapted import AdaptedLayer
from ..core.autograd import is_transformed, without_autocast
from ..core.dropout import QuickDropout, draw_mask, mask_seed
from ..core.errors import LoraError
from ..core.layers import ConvLoRA, Embedding
from ..core.layouts import Kernel
from ..core.parameters import AdaptedParameter
from ..core.switchable import Switchable


class Writes:
    """How often an optimizer wrote. A fused one leaves no note on the tensors (torch 2.13)."""

    count = 0


@dataclass(frozen=True)
class Groups:
    """Which adapter each group of neighbouring rows has. rows: how many rows the batch has."""

    names: tuple[str | None, ...]
    rows: int

    @classmethod
    def of(cls, names: Sequence[str | None]) -> Groups:
        """The largest groups of equal size, so that no group has two adapters."""
        size = math.gcd(*(len(list(run)) for _, run in groupby(names)))
        return cls(tuple(names[::size]), len(names))


class Stacks:
    """The factors of a batch: A (k, r, …) and s·B (k, out, r) of k adapters, and which of them each group has.

    index: (groups,), or None if group i has adapter i. down, up: A and s·B of each group.
    """

    def __init__(self, A: Tensor, B: Tensor, index: Tensor | None) -> None:
        self.A, self.B, self.index = A, B, index
        self.groups = len(A if index is None else index)
        self._down: Tensor | None = A if index is None else None
        self._up: Tensor | None = B if index is None else None

    @property
    def down(self) -> Tensor:
        if self._down is None:
            self._down = self.A[self.index]
        return self._down

    @property
    def up(self) -> Tensor:
        if self._up is None:
            self._up = self.B[self.index]
        return self._up

    def looked_up(self, tokens: Tensor) -> Tensor:
        """The columns of each group's A: tokens (groups, m) → (groups, m, r)."""
        places = torch.arange(len(self.A), device=tokens.device) if self.index is None else self.index
        return self.A.mT[places[:, None], tokens]


class Part:
    """What the rows' adapters add in one layer.

    layers: the layer of each adapter that has one here. index: which of them each group has, −1 for none. rows: the
    rows of the batch. seeds: of each adapter's dropout. name: the layer's.
    """

    def __init__(
        self,
        name: str,
        layers: Sequence[AdaptedLayer],
        index: Sequence[int],
        rows: int,
        seeds: Sequence[int],
        writes: Writes,
    ) -> None:
        self.name, self.layers, self.index, self.rows, self.seeds = name, list(layers), list(index), rows, list(seeds)
        self.writes = writes
        self._made: tuple[Any, Stacks] | None = None

    def stacks(self, like: Tensor) -> Stacks:
        """The factors in the dtype and on the device of `like`: with gradients, or else made again only if written."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self.stacked(like)
        versions = [0 if own.is_inference() else own._version for own in self.factors()]
        now = like.device, like.dtype, self.writes.count, versions
        if self._made is None or self._made[0] != now:
            self._made = now, self.stacked(like)
        return self._made[1]

    def factors(self) -> list[Tensor]:
        """The parameters A and B of each adapter."""
        return [factor for layer in self.layers for factor in (layer.lora_A, layer.lora_B)]

    def stacked(self, like: Tensor) -> Stacks:
        """`stacks`, made now."""
        pairs = [thin_pair(layer) for layer in self.layers]
        rank = max(len(A) for A, _ in pairs)
        down = [to_rank(A, 0, rank) for A, _ in pairs]
        up = [to_rank(B, 1, rank) for _, B in pairs]
        scales = [layer.scaling for layer in self.layers]
        if -1 in self.index:
            down, up, scales = [*down, torch.zeros_like(down[0])], [*up, torch.zeros_like(up[0])], [*scales, 0.0]
        places = [place % len(down) for place in self.index]
        same = places == list(range(len(down)))
        index = None if same else torch.tensor(places, device=like.device)
        A, B = torch.stack(down), torch.stack(up)
        B = B * torch.tensor(scales, dtype=B.dtype, device=B.device).view(-1, *(1,) * (B.dim() - 1))
        return Stacks(A.to(like.dtype), B.to(like.dtype), index)

    def check(self, x: Tensor) -> None:
        """Raise LoraError if the rows of x are not those of the batch."""
        if x.dim() == 0 or x.shape[0] % self.rows:
            raise LoraError(
                f"bank.rows names {self.rows} rows, and {self.name!r} was given {tuple(x.shape)}. Give one name for "
                "each row of the batch, and leave layers that do not see whole rows out of the adapters' targets."
            )

    def dropped(self, x: Tensor) -> Tensor:
        """x (groups, m, …) after each adapter's dropout, in training.

        The mask follows from torch's generator and the adapter's seed, and not from the other adapters of the batch. On
        a CPU, with the seed 0, a linear layer's is the one that the adapter would draw alone.
        """
        rates = [_rate(layer) for layer in self.layers]
        if not any(rates):
            return x
        if torch.compiler.is_compiling():
            by_group = torch.tensor([[*rates, 0.0][place] for place in self.index], dtype=x.dtype, device=x.device)
            by_group = by_group.view(-1, *(1,) * (x.dim() - 1))
            return x * (torch.rand_like(x) >= by_group) / (1 - by_group)
        drawn = mask_seed()
        keep = torch.ones_like(x)
        for place, (rate, salt) in enumerate(zip(rates, self.seeds, strict=True)):
            mine = [group for group, own in enumerate(self.index) if own == place]
            if rate and mine:
                ones = torch.ones_like(x[mine])
                keep[mine] = self._mask(ones, self.layers[place], (salt << 31) + drawn) / (1 - rate)
        return x * keep

    @staticmethod
    def _mask(ones: Tensor, layer: AdaptedLayer, seed: int) -> Tensor:
        """Zeros where the layer's dropout drops, in place of the ones (groups, m, …, in)."""
        dropout: Any = layer.lora_dropout
        if ones.device.type == "cpu" and type(dropout) is QuickDropout:
            rows = ones.view(-1, ones.shape[-1])
            kept: Tensor = draw_mask(rows, dropout, len(layer.lora_A), seed).masked(rows)
            return kept.view(ones.shape)
        generator = torch.Generator(ones.device).manual_seed(seed)
        return (torch.rand(ones.shape, generator=generator, device=ones.device) >= float(dropout.p)).to(ones.dtype)


class RowsLayer(Switchable):
    """The base class put before a layer's own: it computes what its class does, and adds to each row its update.

    lora_part: what is added; None if no row of the batch has an adapter here. lora_slots: for a compiled model, the
    factors in tensors whose shapes never change, see `Bank`.
    """

    plain_class: Any
    lora_part: Part | None = None
    lora_slots: tuple[Tensor, Tensor, Tensor] | None = None
    # As an adapted layer notes it (`core/lora_layer.py`), for `refuse_silent`.
    was_called: bool = False
    was_read: bool = False
    was_reached: bool = False
    was_recorded: bool = True
    has_gradient: bool = False

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y: Tensor = self.plain_class.forward(self, x, *args, **kwargs)
        if self.disabled_by:
            return y
        if self.lora_slots is not None and torch.compiler.is_compiling() and not torch.is_grad_enabled():
            A, B, index = self.lora_slots
            return self.added(Stacks(A.to(y.dtype), B.to(y.dtype), index), None, x, y)
        part = self.lora_part
        if part is None:
            return y
        part.check(x)
        if not torch.compiler.is_compiling():
            object.__setattr__(self, "was_called", True)  # past nn.Module's slow one
        return self.with_part(part, x, y)

    def with_part(self, part: Part, x: Tensor, y: Tensor) -> Tensor:
        """y and the update of each row, by the rows' adapters."""
        return self.added(part.stacks(y), part, x, y)

    @property
    def has_update(self) -> bool:
        return self.lora_part is not None or self.lora_slots is not None

    def added(self, stacks: Stacks, part: Part | None, x: Tensor, y: Tensor) -> Tensor:
        """y and the update of each row. part: whose dropout acts; None for none."""
        raise NotImplementedError

    def dropped(self, part: Part | None, x: Tensor) -> Tensor:
        return part.dropped(x) if part is not None and self.training else x


class AddedRows(torch.autograd.Function):
    """Y + S (s·B)ᵀ with S = X Aᵀ in each group: Y (groups, m, out), X (groups, m, in), A and B of the group's adapter.

    dS = dY s·B        dX = dS A        dA = dSᵀ X        d(s·B) = dYᵀ S        for the stacks; then for the factors

    Kept: X and S. The stacks, which are as large as the adapters, are made again in the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, Y: Tensor, X: Tensor, part: Part, *factors: Tensor) -> Tensor:
        stacks = part.stacked(Y)
        S = X @ stacks.down.mT
        ctx.part = part
        ctx.save_for_backward(X, S, *factors)
        return torch.baddbmm(Y, S, stacks.up.mT)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dY: Tensor) -> Any:
        X, S, *factors = ctx.saved_tensors
        needs_Y, needs_X, _, *needs = ctx.needs_input_grad
        with without_autocast(dY):
            with torch.enable_grad():
                stacks = ctx.part.stacked(dY)
                A, B = stacks.down, stacks.up
            dS = dY @ B.detach()
            dX = dS @ A.detach() if needs_X else None
            wanted = [factor for factor, needed in zip(factors, needs, strict=True) if needed]
            found = iter(torch.autograd.grad((A, B), wanted, (dS.mT @ X, dY.mT @ S)) if wanted else ())
        return dY if needs_Y else None, dX, None, *(next(found) if needed else None for needed in needs)


class RowsLinear(RowsLayer):
    """Any layer that takes (…, in) to (…, out)."""

    def with_part(self, part: Part, x: Tensor, y: Tensor) -> Tensor:
        if not torch.is_grad_enabled() or is_transformed():
            return super().with_part(part, x, y)
        groups = len(part.index)
        X = self.dropped(part, x.reshape(groups, -1, x.shape[-1]).to(y.dtype))
        rows: Tensor = AddedRows.apply(y.reshape(groups, -1, y.shape[-1]), X, part, *part.factors())
        return rows.view(y.shape)

    def added(self, stacks: Stacks, part: Part | None, x: Tensor, y: Tensor) -> Tensor:
        X = x.reshape(stacks.groups, -1, x.shape[-1]).to(y.dtype)
        S = self.dropped(part, X) @ stacks.down.mT
        Y = y.reshape(stacks.groups, -1, y.shape[-1])
        if not torch.is_grad_enabled() and self.plain_class.forward is nn.Linear.forward:
            return Y.baddbmm_(S, stacks.up.mT).view(y.shape)  # nobody else holds what F.linear gave
        return torch.baddbmm(Y, S, stacks.up.mT).view(y.shape)


class RowsEmbedding(RowsLayer):
    """Tokens (…) look up columns of their row's A; see `core/embedding.py`."""

    padding_idx: int | None

    def added(self, stacks: Stacks, part: Part | None, x: Tensor, y: Tensor) -> Tensor:
        tokens = x.reshape(stacks.groups, -1)
        S = stacks.looked_up(tokens)
        if self.padding_idx is not None:  # its column gets no gradient
            S = torch.where((tokens == self.padding_idx)[..., None], S.detach(), S)
        S = S * self.dropped(part, S.new_ones(*tokens.shape, 1))  # the update of a token is dropped as a whole
        Y = y.reshape(stacks.groups, -1, y.shape[-1])
        return torch.baddbmm(Y, S, stacks.up.mT).view(y.shape)


class RowsConv(RowsLayer):
    """A convolution whose kernels differ by row, as one convolution with a group of channels for each."""

    def added(self, stacks: Stacks, part: Part | None, x: Tensor, y: Tensor) -> Tensor:
        module: Any = self
        A, B, groups = stacks.down, stacks.up, stacks.groups
        if x.dim() != len(module.stride) + 2:
            raise LoraError(f"a convolution was given {tuple(x.shape)}, which has no rows for bank.rows.")
        rows = self.dropped(part, x.reshape(groups, -1, *x.shape[1:]).to(y.dtype))  # (groups, m, in, …)
        sides = module._reversed_padding_repeated_twice  # torch's, for F.pad: the last dimension first
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        rows = F.pad(rows.flatten(0, 1), sides, mode=mode).unflatten(0, (groups, -1))
        rows = rows.transpose(0, 1).flatten(1, 2)  # (m, groups·in, …)
        unmoved = (0,) * len(module.stride)
        arguments = module.stride, unmoved, module.dilation, False, unmoved, groups
        S = torch.convolution(rows, A.flatten(0, 1), None, *arguments)  # (m, groups·r, …)
        S = S.unflatten(1, (groups, -1)).transpose(0, 1).flatten(3)  # (groups, m, r, positions)
        update: Tensor = B.flatten(2)[:, None] @ S
        return y + update.reshape(y.shape)


def rows_class(layer: AdaptedLayer) -> type[RowsLayer]:
    """The class by which a batch of rows computes what this layer computes for one adapter."""
    return RowsEmbedding if isinstance(layer, Embedding) else RowsConv if isinstance(layer, ConvLoRA) else RowsLinear


def rows_refusal(name: str, layer: AdaptedLayer, model: nn.Module) -> str | None:
    """Why this layer cannot have another adapter in each row, or None where it can."""
    if isinstance(layer, AdaptedParameter):
        return "is a parameter that the model reads, which gives all rows the same update"
    if "lora_magnitude" in layer._parameters:
        return "has DoRA's magnitude, which scales the whole output"
    if layer.read_whole:
        return "is a table that the model also computes with as a whole, which gives all rows the same update"
    if isinstance(layer, Embedding) and layer.scale_grad_by_freq:
        return "divides gradients by the frequency of tokens, which is not known by row"
    parts = name.split(".")
    if any(part == "experts" and after.isdigit() for part, after in pairwise(parts)):
        return "is an expert, which sees chosen tokens instead of rows"
    for depth in range(len(parts)):
        parent = model.get_submodule(".".join(parts[:depth]))
        if any(isinstance(own, nn.MultiheadAttention) and not own.batch_first for own in parent.children()):
            return "is beside an attention with batch_first=False, where the first dimension is not the batch"
    return None


def thin_pair(layer: AdaptedLayer) -> tuple[Tensor, Tensor]:
    """A (r, …) and B (out, r, …) of a layer, differentiable in its parameters. The update is s times both."""
    A, B = layer.factors()
    layout = layer.layout
    if isinstance(layout, Kernel) and layout.groups > 1:
        # Each group of channels has its own copy of A and its own rows of B, so B has a block for each group.
        _, A, _ = layout.pair(A, B)
        B = torch.block_diag(*B.flatten(1).chunk(layout.groups)).view(len(B), -1, *B.shape[2:])
    return A, B


def _rate(layer: AdaptedLayer) -> float:
    """The probability of dropout."""
    dropout = layer.lora_dropout
    return float(dropout.p) if isinstance(dropout, nn.Dropout) else 0.0


def to_rank(factor: Tensor, dim: int, rank: int) -> Tensor:
    """The factor with zeros up to this rank along `dim`."""
    missing = rank - factor.shape[dim]
    if not missing:
        return factor
    shape = list(factor.shape)
    shape[dim] = missing
    return torch.cat((factor, factor.new_zeros(shape)), dim)
