"""Where the update went: how far each adapted weight moved, and which layers and kinds of module moved most.

of one weight       ‖W' − W‖ / ‖W‖   with W' = g ⊙ (W + s·ΔW), in the Frobenius norm
of several weights  √(Σ ‖W' − W‖²) / √(Σ ‖W‖²), which is the same for one large matrix that holds them all
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..core.attach import adapted_layers
from ..core.token_rows import token_tables

_NUMBERED = re.compile(r"(?:^|.*?\.)(\d+)(?:\.|$)")  # a name up to its first number, which is the layer's


@dataclass(frozen=True)
class Change:
    """How far one weight, or a group of them, has moved.

    name: of the module, or of the group. moved: ‖W' − W‖. weight: ‖W‖. count: how many weights it is made of.
    """

    name: str
    moved: float
    weight: float
    count: int = 1

    @property
    def ratio(self) -> float:
        return self.moved / max(self.weight, 1e-30)


@torch.no_grad()
def weight_changes(model: nn.Module) -> list[Change]:
    """The change of each adapted layer's weight, in the model's order, and then of tables with trained rows."""
    changes = []
    for name, layer in adapted_layers(model).items():
        weight = layer.base_matrix()
        moved = (layer.adapted_matrix() - weight).double().norm()
        changes.append(Change(name, float(moved), float(weight.double().norm())))
    for name, table in token_tables(model).items():
        weight = table.own_weight.double()
        tokens, values = table.tokens_and_values(weight)
        changes.append(Change(name, float((values - weight[tokens]).norm()), float(weight.norm())))
    return changes


def together(name: str, changes: Iterable[Change]) -> Change:
    """The change of several weights as one."""
    changes = list(changes)
    return Change(
        name,
        math.hypot(*(change.moved for change in changes)),
        math.hypot(*(change.weight for change in changes)),
        sum(change.count for change in changes),
    )


def by_kind(changes: Sequence[Change]) -> list[Change]:
    """A group for each kind of module ("self_attn.q_proj"), the most changed first.

    The kind is what follows the layer's number in the name; a name without a number is a kind of its own.
    """
    groups: dict[str, list[Change]] = {}
    for change in changes:
        number = _NUMBERED.match(change.name)
        kind = change.name[number.end() :] if number else ""
        groups.setdefault(kind or change.name, []).append(change)
    return sorted((together(name, own) for name, own in groups.items()), key=lambda group: -group.ratio)


def by_layer(changes: Sequence[Change]) -> dict[str, list[Change]]:
    """The layers of each stack ("model.layers"), a group for each, in the order of their numbers.

    The name of a group is the layer's number. A weight that lies in no numbered layer is left out.
    """
    stacks: dict[str, dict[int, list[Change]]] = {}
    for change in changes:
        if number := _NUMBERED.match(change.name):
            stack = change.name[: number.start(1)].rstrip(".")
            stacks.setdefault(stack, {}).setdefault(int(number[1]), []).append(change)
    return {
        stack: [together(str(layer), layers[layer]) for layer in sorted(layers)] for stack, layers in stacks.items()
    }
