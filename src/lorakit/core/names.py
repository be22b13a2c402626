"""Names as the plain model has them, whatever wraps it or its parts.

torch's wrappers add a part to the name of everything they hold:

    torch.compile                            _orig_mod
    checkpoint_wrapper                       _checkpoint_wrapped_module
    FullyShardedDataParallel                 _fsdp_wrapped_module
    DistributedDataParallel, DataParallel    module
    peft_view                                base_model.model

An adapter belongs to the model and not to the way it is run, so lorakit's names leave these parts out. The wrappers
look up attributes in what they hold, so `model.get_submodule` also finds a module by its plain name.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
VIEWED = "_lorakit_viewed"  # an attribute of a view of a model: the model
_PARALLEL = (nn.parallel.DistributedDataParallel, nn.DataParallel)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside the wrappers around all of it."""
    while True:
        child = "module" if isinstance(model, _PARALLEL) else next((w for w in WRAPPERS if w in model._modules), None)
        inner = model._modules.get(child) if child else model.__dict__.get(VIEWED)
        if inner is None:
            return model
        model = inner


def unwrapped_name(name: str) -> str:
    """`name` without the parts that wrappers add."""
    if not any(wrapper in name for wrapper in WRAPPERS):
        return name
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def named_modules(model: nn.Module, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Module]]:
    """The modules by plain name. A wrapper comes before the module inside it, which has the same name."""
    for name, module in unwrapped(model).named_modules(remove_duplicate=remove_duplicate):
        yield unwrapped_name(name), module


def named_parameters(model: nn.Module, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters by plain name."""
    for name, parameter in unwrapped(model).named_parameters(remove_duplicate=remove_duplicate):
        yield unwrapped_name(name), parameter
