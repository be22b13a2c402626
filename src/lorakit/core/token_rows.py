"""Rows of a token table, trained by themselves: those of new tokens, while the rest of the table stays frozen.

    y = V[place of t]  if token t is one of the trained ones, else W[t]          the table, looked up in
    y = x Wᵀ + b,  with y[…, tokens] = x Vᵀ + b[tokens]                          the head

    W (vocabulary, dim)     the table; it is neither copied nor written to
    tokens (k,)             the trained ones, in rising order
    V (k, dim)              their rows, which take the place of W's

So V is all that is trained, kept by the optimizer and saved. These are the values of PEFT's `trainable_token_indices`:
a file holds the rows themselves, and not their difference from the base's. They are right whatever the base has there,
for example rows that were drawn at random when the vocabulary was resized.

If other modules hold the same weight (a tied lm_head), they compute with the same V, and its gradient is the sum.

Not here: rows of a table that is adapted by A and B too, quantised or sharded tables, heads of other classes than
nn.Linear. `rows_refusal_of` says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .adapter import TokenRows
from .autograd import is_transformed
from .errors import LoraError
from .hooked import forward_refusal
from .joined import joined
from .lora_layer import copied
from .mergeable import Mergeable, StoredWeight, unmerged
from .names import named_modules
from .quantised import is_quantised
from .sharded import is_sharded, sharded_refusal
from .targets import closest, matching
from .undo import change_class

Wanted = Sequence[int] | Mapping[str, Sequence[int]]


class UsesRows(StoredWeight):
    """The base class put before that of a module that computes with trained rows: its own, or a tied table's."""

    read_as_sum = True

    @property
    def rows(self) -> TrainedRows:
        """The table that holds the trained rows."""
        raise NotImplementedError

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        rows = self.rows
        if not rows.active:
            return rows.guard(self.plain_output(x, *args, **kwargs))
        rows.refit()
        y = self.plain_output(x, *args, **kwargs)
        tokens, values = rows.tokens_and_values(self.own_weight)
        if isinstance(self, nn.Embedding):
            return self._looked_up(x, y, tokens, values)
        bias: Tensor | None = getattr(self, "bias", None)
        own = F.linear(x, values, None if bias is None else bias[tokens]).to(y.dtype)
        # Nobody else holds what F.linear gave, and logits are large.
        return y.index_copy(-1, tokens, own) if is_transformed() else y.index_copy_(-1, tokens, own)

    def read(self) -> Tensor:
        return self.rows.adapted_weight()

    def _looked_up(self, x: Tensor, y: Tensor, tokens: Tensor, values: Tensor) -> Tensor:
        """y (…, dim), the rows of the tokens x (…), with those of `values` (k, dim) where x is one of `tokens` (k,)."""
        places = torch.searchsorted(tokens, x).clamp_(max=len(tokens) - 1)
        own = rows_looked_up(self, self.plain_class, values, places)
        padding: Any = self.padding_idx
        if padding is not None:  # torch gives the padding row no gradient from look-ups
            own = torch.where((x == padding)[..., None], own.detach(), own)
        return torch.where((tokens[places] == x)[..., None], own, y)


class TrainedRows(UsesRows, Mergeable):
    """A table with rows of its own: `lora_rows` V (k, dim), for the tokens `lora_tokens` (k,)."""

    lora_rows: nn.Parameter
    lora_tokens: Tensor
    ties: tuple[nn.Module, ...] = ()  # other modules that hold the same weight
    _length: int = 0  # of the table, when the rows were seen to lie in it

    @property
    def rows(self) -> TrainedRows:
        return self

    @property
    def has_update(self) -> bool:
        return self._parameters.get("lora_rows") is not None

    @property
    def witness(self) -> nn.Parameter:
        return self.lora_rows

    @property
    def holders(self) -> tuple[nn.Module, ...]:
        """All modules that compute with the rows."""
        return self, *self.ties

    @property
    def tokens(self) -> tuple[int, ...]:
        """The trained tokens."""
        return tuple(self.lora_tokens.tolist())

    def take_rows(self, rows: TokenRows, dtype: torch.dtype) -> None:
        """Hold these rows, as a parameter of this dtype."""
        device = self.own_weight.device
        with unmerged(self):
            self.register_buffer("lora_tokens", torch.tensor(rows.tokens, device=device))
            self.lora_rows = nn.Parameter(rows.values.to(device, dtype, copy=True))
            self._length = len(self.own_weight)

    def to_rows(self) -> TokenRows:
        """A copy of the rows, on the CPU, in the dtype that they are trained in."""
        return TokenRows(self.tokens, copied(self.lora_rows))

    def tokens_and_values(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens (k,) and their rows (k, dim), on the device and in the dtype of `like`."""
        if is_sharded(self.lora_rows):
            raise LoraError("trained rows of a token table cannot be sharded: leave this module out of fully_shard.")
        return self.lora_tokens.to(like.device), self.lora_rows.to(like.device, like.dtype)

    def adapted_weight(self) -> Tensor:
        weight = self.own_weight
        return weight.index_copy(0, *self.tokens_and_values(weight))

    def refit(self) -> None:
        """Look whether the rows still lie in a table that was resized. transformers' `resize_token_embeddings` freezes
        the whole module like its weight, so the rows become trainable again. Raises LoraError for rows that are gone.
        """
        length = len(self.own_weight)
        if length == self._length:
            return
        self.lora_rows.requires_grad_()
        if not self.lora_tokens.is_meta and (last := int(self.lora_tokens[-1])) >= length:
            raise LoraError(f"row {last} of the token table is trained, and {resizing(last + 1, length)}")
        object.__setattr__(self, "_length", length)

    @torch.no_grad()
    def _without_update(self) -> tuple[Tensor, Mapping[str, Tensor]]:
        """A trained row that was written is the trained row from now on. The base keeps its own row there."""
        written, base = self.own_weight, self._base_weight
        assert base is not None
        self.refit()
        tokens, values = self.tokens_and_values(written)
        kept = written.detach().clone()
        kept[tokens] = base[tokens].to(kept)
        same = (written[tokens] == values).all(1, keepdim=True)
        return kept, {"lora_rows": torch.where(same, self.lora_rows, written[tokens].to(self.lora_rows))}

    def _put_weight(self, weight: Tensor) -> None:
        for module in self.holders:
            module.weight = weight

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {len(self.lora_rows)} rows trained"


class TiedRows(UsesRows):
    """A module that holds the same weight as a table with trained rows: it computes with those."""

    _rows: TrainedRows

    @property
    def rows(self) -> TrainedRows:
        return self._rows

    @property
    def has_update(self) -> bool:
        return self.rows.has_update

    @property
    def active(self) -> bool:
        return self.rows.active

    @property
    def base_weight(self) -> Tensor:
        return self.rows.base_weight

    def disable(self) -> None:
        self.rows.disable()

    def enable(self) -> None:
        self.rows.enable()

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.rows.merged:
            destination[f"{prefix}weight"] = self.base_weight if keep_vars else self.base_weight.detach()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        with unmerged(self.rows):
            super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        with unmerged(self.rows):
            return super()._apply(*args, **kwargs)


def rows_looked_up(module: Any, cls: Any, rows: Tensor, places: Tensor) -> Tensor:
    """The rows (k, dim) at these places (…), as an embedding of class `cls` gives them out: Gemma's multiplies them."""
    if cls.forward is nn.Embedding.forward:
        return F.embedding(places, rows)
    other = cls.__new__(cls)
    other.__dict__ |= {**module.__dict__, "_parameters": {**module._parameters, "weight": rows}, "padding_idx": None}
    found: Tensor = cls.forward(other, places)
    return found


def token_tables(model: nn.Module) -> dict[str, TrainedRows]:
    """The tables with trained rows, by name."""
    return {name: own for name, own in named_modules(model) if isinstance(own, TrainedRows) and own.has_update}


def tied_modules(model: nn.Module, name: str) -> dict[str, nn.Module]:
    """The modules that hold the weight of the module of this name, with this one, by name. Raises LoraError for one
    that holds it as anything else than the weight of an embedding or a linear layer.
    """
    weight = model.get_submodule(name)._parameters.get("weight")
    found: dict[str, nn.Module] = {}
    for own, module in named_modules(model):
        for local, parameter in module._parameters.items():
            if weight is not None and parameter is weight:
                if local != "weight" or not isinstance(module, nn.Embedding | nn.Linear):
                    raise LoraError(
                        f"{local} of {own or type(model).__name__} is the same tensor as {name}.weight, and not the "
                        "weight of an embedding or linear layer: trained rows would not reach it."
                    )
                found[own] = module
    return found


def chosen_rows(model: nn.Module, wanted: Wanted) -> dict[str, tuple[int, ...]]:
    """The table and tokens that `trainable_tokens` means: a list for the input embedding, or tokens by module name.

    Raises LoraError for names that match nothing, for tied modules with different tokens, and for tokens that are no
    rows of the table.
    """
    names = [name for name, _ in named_modules(model) if name]
    by_pattern = dict(wanted) if isinstance(wanted, Mapping) else {_input_table(model): wanted} if wanted else {}
    found: dict[str, tuple[int, ...]] = {}
    for pattern, tokens in by_pattern.items():
        hits = matching(pattern, names)
        if not hits:
            raise LoraError(f"trainable_tokens={pattern!r} matches no module. {closest(pattern, names)}".rstrip())
        found |= dict.fromkeys(hits, tuple(tokens))
    tables: dict[str, tuple[int, ...]] = {}
    for name, tokens in found.items():
        if reason := rows_refusal_of(model.get_submodule(name)):
            raise LoraError(f"the rows of {name!r} cannot be trained: {reason}.")
        first = first_name(model, name)
        if first != name and found.get(first) != tokens:
            raise LoraError(
                f"{name!r} is tied to {first!r}: they have one table. Name {first!r}, whose trained rows are those of "
                "both."
            )
        tables[first] = checked_tokens(first, tokens, len(model.get_submodule(first).get_parameter("weight")))
    return tables


def first_name(model: nn.Module, name: str) -> str:
    """The one of several tied modules that holds their trained rows: the input embedding, as in PEFT's files."""
    ties = tied_modules(model, name)
    get_input = getattr(model, "get_input_embeddings", None)
    own = get_input() if callable(get_input) else None
    embeddings = [other for other, module in ties.items() if isinstance(module, nn.Embedding)]
    return next((other for other in embeddings if ties[other] is own), next(iter(embeddings), name))


def checked_tokens(name: str, tokens: Sequence[int], length: int) -> tuple[int, ...]:
    """The tokens in rising order. Raises LoraError for those that are given twice, or are no rows of the table."""
    wrong = [token for token in tokens if isinstance(token, bool) or not isinstance(token, int)]
    if wrong or not tokens:
        raise LoraError(f"trainable_tokens of {name!r}: {wrong[0]!r} is no token's number." if wrong else _NONE)
    twice = sorted({token for token in tokens if tokens.count(token) > 1})
    if twice:
        raise LoraError(f"trainable_tokens of {name!r} names {', '.join(map(str, twice[:5]))} more than once.")
    if min(tokens) < 0:
        raise LoraError(f"trainable_tokens of {name!r}: {min(tokens)} is no row, the first one is 0.")
    if max(tokens) >= length:
        raise LoraError(f"row {max(tokens)} of {name!r} is to be trained, and {resizing(max(tokens) + 1, length)}")
    return tuple(sorted(tokens))


_NONE = "trainable_tokens names a table and no tokens: leave it out, or give their numbers."


def resizing(wanted: int, length: int) -> str:
    """The end of an error about a table with too few rows."""
    return (
        f"the model's table has {length} rows. If tokens were added, resize it first: "
        f"model.resize_token_embeddings({wanted})."
    )


def rows_refusal_of(module: Any) -> str | None:
    """Why rows of this module cannot be trained by themselves, or None where they can."""
    kind = f"{type(module).__module__}.{type(module).__name__}"
    if isinstance(module, StoredWeight):
        return "it is adapted already. Leave it out of the targets, or call lorakit.detach(model) first"
    if not isinstance(module, nn.Embedding | nn.Linear):
        return f"{kind} is no embedding or linear layer"
    if is_quantised(module):
        return f"{kind} stores them quantised. Leave this module out when the model is quantised"
    if "weight" not in module._parameters:
        return f"{kind} computes its weight from other parameters"
    if isinstance(module, nn.Linear):
        own = "" if type(module) is nn.Linear else f"{kind} is a subclass of nn.Linear that may use them in its own way"
        return own or forward_refusal(module) or sharded_refusal(module)
    if module.max_norm is not None:
        return f"max_norm={module.max_norm} renormalises the frozen weight in place at each lookup"
    if module.scale_grad_by_freq:
        return "scale_grad_by_freq divides the gradient of a row by how often its token occurs"
    return forward_refusal(module) or sharded_refusal(module) or _trial(module)


@torch.no_grad()
def _trial(module: Any) -> str | None:
    """Why the class of an embedding does not give its rows out one by one, as far as a trial with a few tells."""
    cls, weight = type(module), module._parameters["weight"]
    if cls.forward is nn.Embedding.forward or weight.is_meta:
        return None
    tokens = torch.arange(min(len(weight), 4), device=weight.device)
    try:
        alone = [rows_looked_up(module, cls, weight[:4], tokens[None, None, own]) for own in range(len(tokens))]
        same = torch.equal(cls.forward(module, tokens[None]), torch.cat(alone, 1))
    except Exception as error:  # whatever a class of another's raises
        return f"{cls.__name__} could not be tried: {type(error).__name__}: {error}"
    return None if same else f"{cls.__name__} does not give out a row for each token"


def adopt_rows(model: nn.Module, name: str, rows: TokenRows, dtype: torch.dtype) -> TrainedRows:
    """Let the table of this name, which nothing refuses, and the modules tied to it compute with these rows."""
    ties = tied_modules(model, name)
    table: Any = ties.pop(name)
    change_class(table, joined(TrainedRows, type(table), type(table).__name__))
    table.take_rows(rows, dtype)
    table.ties = tuple(ties.values())
    for module in ties.values():
        change_class(module, joined(TiedRows, type(module), type(module).__name__))
        module.__dict__["_rows"] = table  # not as an attribute of nn.Module, which would make the table a child
    own: TrainedRows = table
    return own


def _input_table(model: nn.Module) -> str:
    """The name of the model's table of input tokens."""
    get_input = getattr(model, "get_input_embeddings", None)
    own = get_input() if callable(get_input) else None
    tables = {name: module for name, module in named_modules(model) if isinstance(module, nn.Embedding)}
    named: Iterable[str] = [name for name, module in tables.items() if module is own] or tables
    if len(list(named)) != 1:
        raise LoraError(
            f"trainable_tokens is a list, and {type(model).__name__} does not say which of its {len(tables)} "
            'embeddings is meant. Name it: trainable_tokens={"embed_tokens": [...]}.'
        )
    return next(iter(named))
