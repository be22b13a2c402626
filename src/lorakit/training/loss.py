"""The loss of a causal language model on a CPU, with less work for a frozen head and for attention.

For a label t, the hidden state h before it, and the head's logits z = W h:

    −log p = log Σ exp z − z_t          d(−log p)/dh = (softmax(z) − onehot(t)) W

Each token has thousands of logits, but only −log p and one gradient are needed. If the head is frozen (W itself gets no
gradient), both are computed together for `_CHUNK` labels at a time, and only the logits of one chunk are held: a step
on 4 rows of 256 tokens with the vocabulary of SmolLM2 (49,152) holds 50 MB instead of 600. If the head is adapted or
trained, or the model post-processes its logits (softcapping, scaling), full logits are computed.

On a GPU, TRL's fused head does this; on a CPU that head takes three times as long as plain logits. torch 2.13 has
`linear_cross_entropy`. With the same chunks it takes 0.95 to 0.99 of this code's time in float32. In bfloat16 it takes
1.24 of that time for one loss per label, or 0.8 for their sum, which it rounds to bfloat16 (6,912 for 6,913.4). This
code stays, because its losses are float32 and torch is supported from 2.6 on.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..core.errors import LoraError

# How many labels' logits are held at once. Fewer labels make thin, slow products: with a vocabulary of 49,152 and a
# width of 576, 64 labels are a tenth slower and 32 take nearly twice as long; 256 are no faster.
_CHUNK = 128

# Forward and backward together, torch's fused attention in bfloat16 takes 2.5 times as long as plain products on rows
# of 67 tokens, 1.5 times at 128, 0.8 times at 256 (4 rows, 9 heads of 64, 2 threads). In float32 it is never slower.
_SHORT_ROW = 128


@dataclass(frozen=True)
class Labelled:
    """Where a batch has labels: label i follows the token in row rows[i] and column columns[at[i]]."""

    columns: Tensor  # the columns with a label in some row
    rows: Tensor
    at: Tensor
    labels: Tensor


def labelled(labels: Tensor) -> Labelled:
    """Find the labels of a batch. labels: (rows, tokens), −100 where there is nothing to learn."""
    following = labels[:, 1:]
    columns = (following != -100).any(0).nonzero().squeeze(1)
    rows, at = (following[:, columns] != -100).nonzero(as_tuple=True)
    return Labelled(columns, rows, at, following[rows, columns[at]])


def causal_loss(
    model: nn.Module, inputs: Mapping[str, Any], head: nn.Linear | None, label_smoothing: float = 0.0
) -> Tensor:
    """The sum over the labels of −log p, a float32 scalar; `model` may be wrapped (DistributedDataParallel).

    inputs: input_ids and labels (rows, tokens), labels −100 where there is nothing to learn, and what else the model
    takes. head: `frozen_head` of the model; None computes full logits. label_smoothing: that of torch's cross_entropy,
    which needs head=None.
    """
    rest = {name: value for name, value in inputs.items() if name != "labels"}
    return label_losses(labelled(inputs["labels"]), model, rest, head, label_smoothing).sum()


def label_losses(
    where: Labelled,
    model: nn.Module,
    inputs: Mapping[str, Any],
    head: nn.Linear | None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """−log p of each label (labels,), float32 at least; the other arguments are those of `causal_loss`.

    No shape depends on a tensor's values once the labels are found, so fake tensors work too.
    """
    # Logits are computed only at the columns that hold a label in some row.
    wanted = _known(model, {"use_cache": False, "logits_to_keep": where.columns})
    tokens = inputs["input_ids"].shape[1]
    with _attention(model, tokens):
        if head is None:
            logits = model(**inputs, **wanted).logits
            at_labels = _at(where, logits, tokens).float()
            return F.cross_entropy(at_labels, where.labels, reduction="none", label_smoothing=label_smoothing)
        # The loss is computed in the head's place, inside the model's forward pass, so that a wrapper which looks at
        # what the forward pass returns (DistributedDataParallel) finds the graph that leads to the parameters.
        with _replaced(head, lambda hidden: _FrozenHead.apply(_at(where, hidden, tokens), head.weight, where.labels)):
            losses: Tensor = model(**inputs, **wanted).logits
    return losses


def _known(model: nn.Module, wanted: dict[str, Any]) -> dict[str, Any]:
    """The arguments that a model's forward pass takes, by name or as one of **kwargs."""
    parameters = inspect.signature(getattr(model, "module", model).forward).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return wanted
    return {name: value for name, value in wanted.items() if name in parameters}


def _at(where: Labelled, states: Tensor, tokens: int) -> Tensor:
    """states (rows, columns, …) at the labels. A model that does not know logits_to_keep gives all columns.

    Fewer columns have a label than there are tokens, so the shape tells which columns these are.
    """
    if states.shape[1] == len(where.columns):
        return states[where.rows, where.at]
    if states.shape[1] != tokens:
        raise LoraError(
            f"the model gives {states.shape[1]} columns of logits for rows of {tokens} tokens, of which "
            f"{len(where.columns)} were asked for; its loss cannot be told."
        )
    return states[where.rows, where.columns[where.at]]


def check_causal(model: Any) -> None:
    """Raise ValueError for a model whose logits at the first tokens depend on the last token.

    Such a model sees the tokens that it should predict: its loss falls to zero, and it learns nothing. An example is an
    encoder that is loaded as a language model.
    """
    table: Any = model.get_input_embeddings()
    size, device = table.weight.shape[0], table.weight.device
    ids = (torch.arange(6, device=device) * 7 + size // 3)[None] % size
    other = ids.clone()
    other[0, -1] = (other[0, -1] + size // 2) % size
    with torch.no_grad():
        one, two = (model(input_ids=row, attention_mask=torch.ones_like(row)).logits[0].float() for row in (ids, other))
    difference = (one - two).abs().amax(-1)  # (tokens)
    # Rounding may differ a little if the experts of a model get other numbers of tokens.
    exact = table.weight.dtype == torch.float32
    rounding = 1e-5 * one.abs().max() if exact else 0.05 * difference[-1]
    if difference[:-1].max() > rounding:
        raise LoraError(
            f"{type(model).__name__} is not causal as it is configured: what it says of the first tokens depends on a "
            'later one, so it would learn to copy. An encoder such as BERT needs "is_decoder": true in its config.json.'
        )


def frozen_head(model: nn.Module) -> nn.Linear | None:
    """The head of a causal model if it is a plain frozen layer and its output is what the model returns, or None.

    The model is run on one token to see that it returns that output unchanged (it neither caps nor scales it).
    """
    head = plain_head(model)
    if head is None or getattr(head, "bias", None) is not None or head.weight.requires_grad or "forward" in vars(head):
        return None
    seen: list[Tensor] = []
    handle = head.register_forward_hook(lambda module, args, output: seen.append(output))
    token = torch.zeros(1, 1, dtype=torch.long, device=head.weight.device)
    try:
        with torch.no_grad():
            returned = model(input_ids=token, **_known(model, {"use_cache": False})).logits
    finally:
        handle.remove()
    return head if len(seen) == 1 and seen[0] is returned else None


def plain_head(model: Any) -> nn.Linear | None:
    """The head of a causal model if it computes W h + b and nothing else: no adapter, no other class."""
    head = model.get_output_embeddings()
    return head if type(head) is nn.Linear else None


class _FrozenHead(torch.autograd.Function):
    """−log p of each label. hidden (labels, width), weight (vocabulary, width), labels → (labels), float32 at least."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        precision = torch.promote_types(hidden.dtype, torch.float32)
        losses = hidden.new_empty(len(labels), dtype=precision)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        if torch.is_autocast_enabled(hidden.device.type):
            weight = weight.to(torch.get_autocast_dtype(hidden.device.type))  # once, not for each chunk
        # All chunks share these buffers: allocating and freeing blocks of this size would fragment the heap.
        size = (min(_CHUNK, len(labels)), len(weight))
        logits, logps = weight.new_empty(size), weight.new_empty(size, dtype=precision)
        exact = logits if weight.dtype == precision else torch.empty_like(logps)
        for start in range(0, len(labels), _CHUNK):
            part = slice(start, start + _CHUNK)
            label = labels[part, None]
            z, logp, of_z = (buffer[: len(label)] for buffer in (logits, logps, exact))  # (chunk, vocabulary)
            torch.mm(hidden[part].to(weight.dtype), weight.T, out=z)
            torch.log_softmax(z if exact is logits else of_z.copy_(z), 1, out=logp)
            losses[part] = -logp.gather(1, label).squeeze(1)
            if gradient is not None:
                p = logp.exp_()
                p.scatter_add_(1, label, p.new_full(label.shape, -1.0))
                gradient[part] = z.copy_(p) @ weight
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Any:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[:, None].to(gradient.dtype), None, None


@contextmanager
def _replaced(module: nn.Module, forward: Any) -> Iterator[None]:
    """Within the block, `module` has another forward method."""
    module.forward = forward
    try:
        yield
    finally:
        del module.forward


def _attention(model: nn.Module, tokens: int) -> AbstractContextManager[Any]:
    """The context in which attention over rows of `tokens` tokens is faster."""
    weight = next(model.parameters())
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else weight.dtype
    if weight.device.type != "cpu" or tokens > _SHORT_ROW or dtype != torch.bfloat16:
        return nullcontext()
    # Under gradient checkpointing the forward pass is done again outside this context, and has to come out the same.
    if any(getattr(part, "gradient_checkpointing", False) for part in model.modules()):
        return nullcontext()
    return sdpa_kernel(SDPBackend.MATH)
