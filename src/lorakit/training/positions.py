"""The longest row that a model can read, and a check for tokens that its vocabulary does not have."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import nn

from ..core.errors import LoraError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LIMITS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "n_ctx", "seq_length")
_TABLE = re.compile(r"(^|[._])(wpe|pos|positions?|positional)(_[a-z]+)?$")  # names such as embed_positions
_NOT_OF_TOKENS = re.compile("rel|vision|visual|image|patch|audio|mel")
_UNBOUND = 1_000_000  # a tokenizer without a limit gives a number far above


def positions(model: Any, tokenizer: PreTrainedTokenizerBase | None = None) -> int | None:
    """The longest row, in tokens, that a model can read; None if nothing in the model limits it.

    A table of learnt positions is a limit, minus the rows that RoBERTa and its relatives keep for padding. For rotary
    positions the configuration gives the limit and the factor that stretches it. ALiBi, relative positions and sliding
    windows set no limit. If the model names no limit, the tokenizer's limit counts. Weights are not read.
    """
    config = model.config.get_text_config()
    named = [limit for name in _LIMITS if isinstance(limit := getattr(config, name, None), int) and limit > 0]
    if tables := _position_tables(model):
        return min(_rows(table, named) for table in tables)
    if _is_relative(model, config):
        return None
    if named:
        return max(named[0], _stretched(config))
    limit = getattr(tokenizer, "model_max_length", None)
    return int(limit) if isinstance(limit, int | float) and 0 < limit < _UNBOUND else None


def longest_row(wanted: int, model: Any, tokenizer: PreTrainedTokenizerBase) -> int:
    """`wanted` tokens, or the model's positions if those are fewer."""
    limit = positions(model, tokenizer)
    return wanted if limit is None else min(wanted, limit)


def check_vocabulary(rows: Iterable[dict[str, Any]], model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ValueError if the rows, or the padding, have tokens that the model's embedding has no row for."""
    table: Any = model.get_input_embeddings()
    size = getattr(table, "num_embeddings", None)
    if not isinstance(size, int):
        return
    if tokenizer.pad_token_id is None:
        raise LoraError(
            "this model's tokenizer names neither a padding nor an end token, so rows cannot share a batch. Set "
            '"pad_token" in its tokenizer_config.json.'
        )
    used = {tokenizer.pad_token_id}
    for row in rows:
        used.update(row["input_ids"])
    if beyond := sorted(token for token in used if token >= size):
        listed = ", ".join(f"{tokenizer.convert_ids_to_tokens(token)!r} ({token})" for token in beyond[:5])
        more = f" and {len(beyond) - 5} more" if len(beyond) > 5 else ""
        raise LoraError(
            f"the tokenizer has {len(tokenizer):,} tokens, the model's embedding {size:,} rows, and the "
            f"data holds tokens beyond them: {listed}{more}. Use the tokenizer that belongs to this model."
        )


def _position_tables(model: nn.Module) -> list[nn.Embedding]:
    """The tables of positions that a model adds to its tokens. Tables for images or distances do not count."""
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and _TABLE.search(name) and not _NOT_OF_TOKENS.search(name)
    ]


def _rows(table: nn.Embedding, named: list[int]) -> int:
    if type(table) is nn.Embedding and table.padding_idx is not None:
        return table.num_embeddings - table.padding_idx - 1  # the first position is the row after padding
    # A subclass may reserve its first rows (OPT, BART), so the table is longer than the limit.
    return min([table.num_embeddings, *named[:1]])


def _is_relative(model: nn.Module, config: Any) -> bool:
    """Whether positions enter only as distances between tokens, or not at all, so that there is no last position."""
    if getattr(config, "alibi", False) or getattr(getattr(config, "attn_config", None), "alibi", False):
        return True
    names = vars(config)
    if getattr(config, "position_embedding_type", "absolute") in ("alibi", "relative_key", "none"):
        return True
    relative = any(name.startswith("relative_attention") for name in names) or config.model_type in ("bloom", "xlnet")
    return relative and not any("rotary" in name for name, _ in model.named_modules())


def _stretched(config: Any) -> int:
    """The number of positions that scaled rotary embeddings reach; 0 without scaling."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    original, factor = rope.get("original_max_position_embeddings"), rope.get("factor")
    return int(original * factor) if original and factor else 0
