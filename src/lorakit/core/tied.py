"""One weight under several names: tables that are held and never called, and the copy that a tied module trains.

T5 keeps its table as `shared` and calls `encoder.embed_tokens` and `decoder.embed_tokens`, which hold the same weight:
an update of `shared` would do nothing (`held_tables`).

A head that is tied to the embedding and trained whole first gets its own copy of the weight (`untie`), as with PEFT's
`modules_to_save`. Otherwise training one would change the other, and a file that holds the head alone would not
say so.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from .tables import may_call


def held_tables(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Embeddings that only hold a weight for others, each with the names of the others, which the model calls."""
    by_weight: dict[int, dict[str, nn.Module]] = {}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if name and isinstance(module, nn.Embedding) and weight is not None:
            by_weight.setdefault(id(weight), {})[name] = module
    held = {}
    for tables in by_weight.values():
        for name in tables:
            parent, _, local = name.rpartition(".")
            prefix = f"{parent}." if parent else ""
            inside = [other for other in tables if other.startswith(prefix) and "." in other.removeprefix(prefix)]
            if inside and not may_call(model.get_submodule(parent), local):
                held[name] = tuple(inside)
    return held


def held_refusal(others: tuple[str, ...]) -> str:
    """Why an embedding that only holds the table of these others can be neither adapted nor trained."""
    called = " and ".join(map(repr, others))
    return f"it only holds the embedding table that the model calls as {called}; name those instead"


def untie(model: nn.Module, name: str) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """Give the module of this name its own copy of each parameter that modules outside it also hold.

    Yields (module, the parameter's name in it, the tied parameter).
    """
    whole = model.get_submodule(name)
    inside = {id(module) for module in whole.modules()}
    outside = {
        id(parameter)
        for module in model.modules()
        if id(module) not in inside
        for parameter in module._parameters.values()
        if parameter is not None
    }
    for module in whole.modules():
        for local, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in outside:
                copy = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
                yield module, local, parameter
                module._parameters[local] = copy
