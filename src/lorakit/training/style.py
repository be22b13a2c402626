"""How a prompt is formatted for a model: as in training, which a file in the adapter's folder records."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.errors import LoraError
from ..core.reading import json_of
from ..formats.files import replacing
from .adapter_folder import beside
from .config import Quantize, TrainConfig
from .settings import recorded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .data import Example

FILE = "style.json"  # beside an adapter, and in a merged model's folder


@dataclass(frozen=True)
class Style:
    """chat: use the tokenizer's chat template. system: the system message for conversations that have none."""

    chat: bool
    system: str | None = None

    @classmethod
    def of_rows(
        cls, rows: Iterable[Example], tokenizer: PreTrainedTokenizerBase, *, plain: bool, system: str | None
    ) -> Style:
        """The style in which rows are trained. Plain text never uses the template; conversations always do."""
        talks = texts = False
        for row in rows:
            talks |= row.messages is not None
            texts |= row.text is not None
            if talks:
                break
        plain = (plain or texts) and not talks
        return cls(tokenizer.chat_template is not None and not plain, system)

    @classmethod
    def recorded(
        cls,
        folder: str | Path,
        tokenizer: PreTrainedTokenizerBase,
        *,
        system: str | None = None,
        plain: bool | None = None,
    ) -> Style:
        """The style that the folder of an adapter or a model records. Without a record: the tokenizer's template.

        system, plain: what the user asks for instead.
        """
        found = _of_folder(folder) or cls(True)
        if plain is not None:
            found = replace(found, chat=not plain)
        if system is not None:
            found = replace(found, system=system)
        return replace(found, chat=found.chat and tokenizer.chat_template is not None)

    def write(self, folder: Path) -> None:
        with replacing(folder / FILE) as path:
            path.write_text(json.dumps(asdict(self), ensure_ascii=False) + "\n", encoding="utf-8")


def longest_text(folder: str | Path) -> int:
    """The number of tokens at which a classifier's texts were cut in training."""
    path = beside(folder, "config.yaml")
    found = {} if path is None else recorded(TrainConfig, path, ["max_seq_length"])
    return int(found.get("max_seq_length", TrainConfig.max_seq_length))


def trained_on(folder: str | Path) -> Quantize:
    """How the weights were quantised that an adapter was trained on."""
    path = beside(folder, "config.yaml")
    found: Quantize = ({} if path is None else recorded(TrainConfig, path, ["quantize"])).get("quantize", "none")
    return found


def _of_folder(folder: str | Path) -> Style | None:
    path = beside(folder, FILE)
    if path is not None:
        values = json_of(path, dict)
        chat, system = values.get("chat", True), values.get("system")
        if not isinstance(chat, bool) or not isinstance(system, str | None):
            raise LoraError(f"{path}: expected chat to be true or false and system to be text or null.")
        return Style(chat, system)
    path = beside(folder, "config.yaml")  # of a run that recorded only its settings
    if path is None:
        return None
    values = recorded(TrainConfig, path, ["plain", "system"])
    return Style(not values.get("plain", False), values.get("system"))
