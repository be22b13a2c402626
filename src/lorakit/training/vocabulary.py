"""Tokens that a run adds: in its tokenizer, as rows of the model's tables, and as what is trained there.

The adapter's file holds the trained rows, and its folder the tokenizer. So a base stays as it was, and its tables grow
when it is loaded for such an adapter. Each new row is then the mean of the old ones (Hewitt 2021, "Initializing New
Word Embeddings"), around which transformers' resize_token_embeddings draws them. Here nothing is drawn, so a run that
is resumed and a folder that is loaded begin with the same bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..core.adapter import Adapter
from ..core.errors import LoraError
from ..core.names import named_modules

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def add_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> tuple[int, ...]:
    """Add the tokens that the tokenizer has not got, each as it is written. Returns the numbers of all of them.

    They are no special tokens in the tokenizer's sense: answers show them. Raises LoraError for a token without text,
    one that is given twice, and one of which the tokenizer makes another.
    """
    from transformers import AddedToken

    if twice := [token for token in tokens if not token.strip() or tokens.count(token) > 1]:
        raise LoraError(f"--new-tokens: {twice[0]!r} is no token of its own: each one has a text, and is given once.")
    known = tokenizer.get_vocab()
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in tokens if token not in known])
    numbers = tokenizer.get_vocab()
    if lost := [token for token in tokens if token not in numbers]:
        raise LoraError(f"--new-tokens: this tokenizer cannot hold {lost[0]!r}.")
    return tuple(numbers[token] for token in tokens)


def trained_tables(model: Any, tokens: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """What `trainable_tokens` is for these tokens: in the input embedding and, where the model speaks, in its head."""
    tables = model.get_input_embeddings(), model.get_output_embeddings()
    return {name: tuple(tokens) for name, module in named_modules(model) if tokens and any(module is t for t in tables)}


def trained_tokens(adapter: Adapter) -> list[int]:
    """The tokens whose rows an adapter has in some table."""
    return sorted({token for rows in adapter.token_rows.values() for token in rows.tokens})


def rows_needed(adapters: Iterable[Adapter]) -> int:
    """How many rows a table must have for the trained rows of these adapters."""
    return max((token + 1 for adapter in adapters for token in trained_tokens(adapter)), default=0)


@torch.no_grad()
def grow(model: Any, rows: int) -> None:
    """Give the tables of tokens at least so many rows. New ones are the mean of those that there are."""
    table = model.get_input_embeddings().weight if rows else None
    if table is None or len(table) >= rows:
        return
    before = len(table)
    with torch.random.fork_rng([table.device] if table.is_cuda else []):  # transformers draws rows
        model.resize_token_embeddings(rows, mean_resizing=False)
    head = model.get_output_embeddings()
    grown: list[Tensor | None] = [model.get_input_embeddings().weight]
    if head is not None:
        grown += [head.weight, getattr(head, "bias", None)]
    for tensor in grown:
        if tensor is not None and len(tensor) == rows:
            tensor[before:] = tensor[:before].mean(0, dtype=torch.float32).to(tensor.dtype)
