"""The loss of a causal language model on a CPU, where the work of the frozen model's head and attention can be cut.

On a GPU, TRL's fused head does this; on a CPU that head is slower than plain logits.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

# Forward and backward together, torch's fused attention in bfloat16 takes 2.5 times as long as plain products on rows
# of 67 tokens, 1.5 times at 128, 0.8 times at 256 (4 rows, 9 heads of 64, 2 threads). In float32 it is never slower.
_SHORT_ROW = 128


def cpu_causal_loss(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """The sum over the labels of −log p, a float32 scalar; `model` may be wrapped (DistributedDataParallel).

    inputs: input_ids and labels (rows, tokens), labels −100 where there is nothing to learn, and what else the model
    takes. Logits are computed only at the columns that hold a label in some row.
    """
    labels = inputs["labels"][:, 1:]
    learned = labels != -100
    columns = learned.any(0).nonzero().squeeze(1)
    rest = {name: value for name, value in inputs.items() if name != "labels"}
    with _attention(model, tokens=inputs["input_ids"].shape[1]):
        logits = model(**rest, use_cache=False, logits_to_keep=columns).logits
    return F.cross_entropy(logits[learned[:, columns]].float(), labels[learned], reduction="sum")


def _attention(model: nn.Module, tokens: int) -> AbstractContextManager[Any]:
    """The context in which attention over rows of so many tokens takes its faster form."""
    autocast = torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if autocast else next(model.parameters()).dtype
    if tokens > _SHORT_ROW or dtype != torch.bfloat16:
        return nullcontext()
    # Under gradient checkpointing the forward pass is done again outside this context, and has to come out the same.
    if any(getattr(part, "gradient_checkpointing", False) for part in model.modules()):
        return nullcontext()
    return sdpa_kernel(SDPBackend.MATH)
