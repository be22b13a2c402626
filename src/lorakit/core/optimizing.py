"""What an optimizer takes: the adapter's parameters, with one learning rate or with a larger one for B (LoRA+)."""

from __future__ import annotations

from typing import Any

from torch import nn

from .errors import LoraError
from .layers import Embedding
from .names import named_parameters
from .trainable import lora_names


def parameters(model: nn.Module) -> list[nn.Parameter]:
    """Every parameter of `model` that is trained: the factors, and biases and modules that are trained beside them.

    Raises LoraError where there is none.
    """
    found = [parameter for _, parameter in named_parameters(model) if parameter.requires_grad]
    if not found:
        raise LoraError(f"{type(model).__name__} has nothing to train: call lorakit.attach or lorakit.load first.")
    return found


def parameter_groups(
    model: nn.Module, lr: float, *, ratio: float = 16.0, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Groups for an optimizer: every B with the learning rate ratio · lr, all else with lr (LoRA+).

        torch.optim.AdamW(lorakit.parameter_groups(model, 2e-4))

    Hayou et al. 2024, section 4: B starts at zero and A does not, so one rate for both is too large for A or too small
    for B, the more so the wider the model. In an embedding it is A that starts at zero, so its B gets lr.
    weight_decay: that of both groups. A group without parameters is left out.
    """
    factors = lora_names(model)
    embedded = {id(module.lora_B) for module in model.modules() if isinstance(module, Embedding) and module.has_update}
    groups: dict[bool, list[nn.Parameter]] = {False: [], True: []}
    for name, parameter in named_parameters(model):
        if parameter.requires_grad:
            is_B = name in factors and name.endswith(".lora_B") and id(parameter) not in embedded
            groups[is_B].append(parameter)
    rates = {False: lr, True: ratio * lr}
    return [{"params": own, "lr": rates[is_B], "weight_decay": weight_decay} for is_B, own in groups.items() if own]
