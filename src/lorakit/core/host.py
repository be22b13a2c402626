"""`Host`: what a format can ask the model for which it reads a file.

A file leaves out what its writer knew from the model: which matrices a module owns, how a stack of experts is laid out,
the base weight that PiSSA's factors were taken from. A format asks for these by name; it sees no layer.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

from torch import Tensor, nn

from .adapted import AdaptedLayer
from .kinds import layer_class
from .layers import Linear, is_transposed, plain_matrix
from .layouts import Layout, Stack
from .names import named_modules, named_parameters, unwrapped
from .parameters import AdaptedParameter, parameter_factor_shapes, parameter_layout
from .quantised import is_quantised
from .targets import matrices


class Host:
    """The names, shapes and base weights of `model`, looked up when they are asked for."""

    def __init__(self, model: nn.Module) -> None:
        self.model = unwrapped(model)

    @functools.cached_property
    def modules(self) -> Mapping[str, nn.Module]:
        """Every module by its plain name."""
        return dict(named_modules(self.model, remove_duplicate=False))

    @functools.cached_property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """Every parameter by its plain name, a shared one under each of its names."""
        return dict(named_parameters(self.model, remove_duplicate=False))

    @functools.cached_property
    def matrices(self) -> Mapping[str, tuple[str, ...]]:
        """The matrices that each module owns and that belong to no layer, in the module's order."""
        return {name: own for name, module in self.modules.items() if (own := matrices(module))}

    @functools.cached_property
    def layouts(self) -> Mapping[str, Layout]:
        """The layout of the factors of each adapted layer, and of each plain layer of a kind that loralib has."""
        found: dict[str, Layout] = {}
        for name, module in named_modules(self.model):
            if isinstance(module, AdaptedParameter):
                continue  # loralib adapts no parameters
            if isinstance(module, AdaptedLayer) and module.has_update:
                found[name] = module.layout
            elif name and (kind := layer_class(module)) is not None and kind.plain_layout.of_loralib:
                found[name] = kind.plain_layout
        return found

    def stack(self, name: str) -> tuple[Stack, tuple[int, int, int]] | None:
        """The layout of the stack of matrices of this name, and its (experts, out, in) as x meets them.

        None where the model has no such stack.
        """
        owner, _, local = name.rpartition(".")
        if local not in self.matrices.get(owner, ()):
            return None
        weight = self.modules[owner]._parameters[local]
        if weight is None or weight.dim() != 3:
            return None
        layout = parameter_layout(self.modules[owner], weight)
        assert isinstance(layout, Stack)
        (experts, _, inputs), (_, outputs, _) = parameter_factor_shapes(self.modules[owner], weight, 1)
        return layout, (experts, outputs, inputs)

    def stored_transposed(self, name: str) -> bool:
        """Whether the layer of this name is stored as (in, out)."""
        module = self.modules[name]
        return is_transposed(type(module)) or bool(getattr(module, "fan_in_fan_out", False))

    def weight(self, name: str) -> Tensor | None:
        """The base weight (out, in) of the linear layer of this name, unmerged. None where there is no such layer, or a
        quantised one.
        """
        module = self.modules.get(name)
        if module is None or is_quantised(module):
            return None
        if isinstance(module, AdaptedLayer):
            return module.matrix(module.base_weight) if isinstance(module, Linear) else None
        if not issubclass(layer_class(module) or nn.Module, Linear):
            return None
        return plain_matrix(module)
