"""Several short rows behind one another in one long row, so that no padding is computed; none sees another.

    input_ids      a0 a1 a2 b0 b1 c0 c1 c2
    position_ids   0  1  2  0  1  0  1  2       begin anew: transformers then masks what is before
    labels         -  a1 a2 -  b1 -  c1 c2      a row's first token is predicted from nothing

So the loss of each row is what it is alone. TRL fills the packs (best fit, the longest rows first), and transformers
makes the mask from position_ids, if no attention_mask is given. Models that make their own mask, or carry a state from
token to token, would read across rows: `check_packing` tries it on the model itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..core.errors import LoraError
from .spool import Spool, as_dataset, viewed

_IGNORED = -100


def packed(rows: Sequence[dict[str, Any]], length: int) -> Sequence[dict[str, Any]]:
    """The rows in packs of at most `length` tokens, with the length of each row as seq_lengths. No row is longer."""
    from datasets.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled
    from trl import pack_dataset

    whole = viewed(rows, lambda row: {"input_ids": row["input_ids"], "labels": [_IGNORED, *row["labels"][1:]]})
    shown = is_progress_bar_enabled()
    disable_progress_bar()
    try:
        with as_dataset(whole) as dataset:
            packs = pack_dataset(dataset, length, strategy="bfd")
            return Spool(packs).settled()
    finally:
        if shown:
            enable_progress_bar()


def unpacked(pack: dict[str, Any]) -> list[list[int]]:
    """The token ids of each row in a pack that `PackCollator` made, of which there is one: (1, tokens)."""
    ids, positions = pack["input_ids"][0].tolist(), pack["position_ids"][0].tolist()
    starts = [index for index, position in enumerate(positions) if position == 0]
    return [ids[start:stop] for start, stop in zip(starts, [*starts[1:], len(ids)], strict=True)]


class PackCollator:
    """A batch of packs, or of rows that are not packed: input_ids, labels and position_ids, (packs, tokens) each.

    Padding has the position 0 at every token, so it is a row of its own, and no attention_mask is needed.
    """

    def __init__(self, pad_token_id: int) -> None:
        self._pad = pad_token_id

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        lengths = [example.get("seq_lengths") or [len(example["input_ids"])] for example in examples]
        positions = [torch.cat([torch.arange(length) for length in own]) for own in lengths]
        columns = {
            "input_ids": ([torch.tensor(own["input_ids"]) for own in examples], self._pad),
            "labels": ([torch.tensor(own["labels"]) for own in examples], _IGNORED),
            "position_ids": (positions, 0),
        }
        return {
            name: pad_sequence(values, batch_first=True, padding_value=padding)
            for name, (values, padding) in columns.items()
        }


def check_packing(model: Any) -> None:
    """Raise LoraError if the logits of a row depend on the row before it in its pack, or on where it stands there."""
    name = type(model).__name__
    parameters = inspect.signature(model.forward).parameters
    if "position_ids" not in parameters and not any(own.kind is own.VAR_KEYWORD for own in parameters.values()):
        raise LoraError(f"--packing: {name} takes no position_ids, so the rows of a pack would run into one another.")
    table: Any = model.get_input_embeddings()
    size, device = table.weight.shape[0], table.weight.device
    ids = (torch.arange(24, device=device) * 7 + size // 3) % size
    first, second = ids[:13], ids[13:]
    other = (first + size // 2) % size
    both = torch.cat([torch.arange(13), torch.arange(11)]).to(device)[None]

    def logits(tokens: Tensor, positions: Tensor) -> Tensor:
        with torch.no_grad():
            found: Tensor = model(input_ids=tokens[None], position_ids=positions, use_cache=False).logits
        return found[0, -len(second) :].float()  # (tokens of the second row, vocabulary)

    one, two = (logits(torch.cat([own, second]), both) for own in (first, other))
    alone = logits(second, both[:, len(first) :])
    # The same in one row, where the second part does see the first: what a leak would change.
    through = torch.arange(24, device=device)[None]
    read_one, read_two = (logits(torch.cat([own, second]), through) for own in (first, other))

    def far(a: Tensor, b: Tensor) -> float:
        return float((a - b).abs().max())

    # Another number of tokens rounds otherwise, in half precision by more.
    rounding = (1e-5 if table.weight.dtype in (torch.float32, torch.float64) else 0.02) * float(alone.abs().max())
    if far(one, two) > 0.05 * far(read_one, read_two) or far(one, alone) > max(0.1 * far(read_one, alone), rounding):
        raise LoraError(
            f"--packing: in {name} a row sees the rows before it in its pack, because the model makes its own mask or "
            "carries a state from token to token. Train without --packing."
        )
