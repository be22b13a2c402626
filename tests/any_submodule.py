"""For mypy: in tests, attributes of a module that its class does not declare have the type Any.

torch declares `nn.Module.__getattr__` as Tensor | Module, because it may be either. So `model.encoder.layer.weight`
is an error at every dot. Tests are full of such names: a test made the model and knows its attributes. Without this,
each would need a cast. lorakit itself is checked without it.
"""

from collections.abc import Callable
from pathlib import Path

from mypy.plugin import AttributeContext, Plugin
from mypy.types import AnyType, Type, TypeOfAny

GETATTR = "torch.nn.modules.module.Module."


class AnySubmodule(Plugin):
    def get_attribute_hook(self, fullname: str) -> Callable[[AttributeContext], Type] | None:
        return _any_in_tests if fullname.startswith(GETATTR) else None


def _any_in_tests(context: AttributeContext) -> Type:
    declared = context.default_attr_type
    is_union = str(declared) == "torch._tensor.Tensor | torch.nn.modules.module.Module"
    in_tests = "tests" in Path(context.api.path).parts
    return AnyType(TypeOfAny.special_form) if in_tests and is_union else declared


def plugin(version: str) -> type[Plugin]:
    return AnySubmodule
