"""Convert examples to token ids and labels: which tokens the model learns to write, and which it only reads.

In a conversation, only the tokens of the assistant's turns bear loss, including the end token; `turns.py` finds them in
the text. What a template prints after the end token bears no loss.

Without a chat template (or with chat=False) prompt and completion are joined unchanged, followed by the end token.
Generation starts from `prompt_ids`, which are exactly the tokens before the first one that bears loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..core.errors import LoraError
from .bars import progress
from .chat import Messages, Tools, opening, prints_date, refuse_unprinted_tools, unprinted
from .conversations import BadRow
from .data import Example
from .rows import DataError
from .spool import Spool
from .turns import rendered

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label of a token that bears no loss
_TOGETHER = 256  # rows that are given to the tokenizer at once


@dataclass(frozen=True)
class Tokens:
    """One row: token ids, and for each of them the label: the same id, or IGNORED."""

    input_ids: list[int]
    labels: list[int]
    changed: int = 0  # assistant turns that the chat template changes later on: they bear no loss
    adapter: str | None = None  # the one of several adapters that learns the row


@dataclass(frozen=True)
class Encoded:
    """Rows ready for training, how many were left out or cut for their length, and notes for the user."""

    rows: Sequence[Tokens]
    dropped: int = 0
    truncated: int = 0
    notes: tuple[str, ...] = ()


def encode(
    example: Example, tokenizer: PreTrainedTokenizerBase, *, system: str | None, chat: bool, chosen: bool = False
) -> Tokens:
    """The tokens of one example. chat: use the chat template; system: message for conversations that have none.

    chosen: the user chose the turns to learn, so one that the template changes is an error, not a note.
    Raises BadRow, a ValueError, if the chat template refuses the example or would lose a part of its meaning.
    """
    return _encoded([_printed(example, tokenizer, system=system, chat=chat, chosen=chosen)], tokenizer)[0]


def encode_all(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    too_long: str,
    system: str | None,
    chat: bool,
    chosen: bool = False,
) -> Encoded:
    """Encode every example. Rows over `max_length` are left out ("drop") or cut at the end ("truncate"), and counted.

    A row that a cut leaves without a label is left out too. chosen: as for `encode`. Raises DataError listing rows
    without a label, and those that the chat template refuses.
    """
    rows: Spool[Tokens] = Spool()
    ends = _end_tokens(tokenizer)
    dropped = truncated = changed = 0
    problems: list[str] = []
    for example, row in _many(examples, tokenizer, problems, system=system, chat=chat, chosen=chosen):
        if set(row.labels) <= {IGNORED, *ends}:
            why = "no token of this row bears loss; does the chat template print the answer?"
            if row.changed:
                why = "the chat template changes every turn that is to be learnt once others follow"
            problems.append(f"{example.where}: {why}")
            continue
        changed += row.changed
        if len(row.input_ids) > max_length:
            row = replace(row, input_ids=row.input_ids[:max_length], labels=row.labels[:max_length])
            if too_long == "drop" or all(label == IGNORED for label in row.labels):
                dropped += 1
                continue
            truncated += 1
        rows.append(row)
    if problems:
        raise DataError(problems)
    notes = _template_notes(examples, tokenizer, system=system, chat=chat)
    if changed:
        notes.append(f"{changed} earlier assistant turns are read, not learnt: the chat template changes them later on")
    return Encoded(rows.settled(), dropped, truncated, tuple(notes))


def encode_text(example: Example, tokenizer: PreTrainedTokenizerBase, max_length: int) -> dict[str, list[int]]:
    """A classifier's input, cut at `max_length` tokens."""
    encoded: dict[str, list[int]] = tokenizer(
        example.text, example.text_pair, truncation=True, max_length=max_length
    ).data
    return encoded


def prompt_ids(
    asked: str | Messages | Example,
    tokenizer: PreTrainedTokenizerBase,
    *,
    system: str | None,
    chat: bool,
    tools: Tools = (),
) -> list[int]:
    """The tokens from which an answer is generated. For an example: those before its last assistant turn.

    tools: what the assistant may call. An example has its own.
    """
    if isinstance(asked, Example):
        if asked.messages is not None:
            row = encode(asked, tokenizer, system=system, chat=chat)
            return row.input_ids[: _last_learnt(row)]
        asked = asked.prompt or ""
    if isinstance(asked, str):
        if not chat:
            return _tokenised(tokenizer, asked, special=True)
        asked = [{"role": "user", "content": asked}]
    messages = _with_system(asked, system)
    text = opening(messages, tokenizer, tools)
    refuse_unprinted_tools(messages, tokenizer, tools, text)
    return _tokenised(tokenizer, text, special=False)


def reference(example: Example, tokenizer: PreTrainedTokenizerBase) -> str:
    """The expected answer: the completion, or the last assistant turn that is learnt, its tool calls as text."""
    if example.messages is None:
        return example.completion or ""
    learnt = {i for i, message in enumerate(example.messages) if message["role"] == "assistant"} - example.unlearnt
    message = example.messages[max(learnt)]
    if "tool_calls" not in message:
        return str(message["content"])
    row = encode(example, tokenizer, system=None, chat=True)
    learnt_ids = [label for label in row.labels[_last_learnt(row) :] if label != IGNORED]
    return str(tokenizer.decode(learnt_ids, skip_special_tokens=True))


def preview(row: Tokens, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    """The row as text, in runs of tokens that bear loss (True) or do not."""
    pieces: list[tuple[list[int], bool]] = []
    for token, label in zip(row.input_ids, row.labels, strict=True):
        bears_loss = label != IGNORED
        if not pieces or pieces[-1][1] != bears_loss:
            pieces.append(([], bears_loss))
        pieces[-1][0].append(token)
    return [(str(tokenizer.decode(ids)), bears_loss) for ids, bears_loss in pieces]


# --- conversations -------------------------------------------------------------------------------------------------


def _conversation(
    example: Example, system: str | None, chat: bool, tokenizer: PreTrainedTokenizerBase
) -> list[dict[str, Any]] | None:
    """The example as messages, or None for a pair that is joined without a template."""
    if example.messages is not None:
        if tokenizer.chat_template is None:
            raise LoraError(
                "the data holds conversations, but this model's tokenizer has no chat template. Use an instruct "
                "model, or data with prompt and completion."
            )
        return _with_system(example.messages, system)
    if not chat:
        return None
    turns = (("user", example.prompt), ("assistant", example.completion))
    pair = [{"role": role, "content": content or ""} for role, content in turns]
    return _with_system(pair, system)


def _with_system(messages: Messages, system: str | None) -> list[dict[str, Any]]:
    if system is None or (messages and messages[0]["role"] == "system"):
        return list(messages)
    return [{"role": "system", "content": system}, *messages]


def _template_notes(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, *, system: str | None, chat: bool
) -> list[str]:
    """Notes for the user on how the chat template prints these rows."""
    notes: list[str] = []
    lost: set[str] = set()
    seen: set[str] = set()
    for number, example in enumerate(examples):
        messages = _conversation(example, system, chat, tokenizer) if example.text is None else None
        if messages is None:
            continue
        if number == 0 and prints_date(messages, tokenizer, example.tools):
            notes.append(
                "the chat template prints the date: rows hold that of today, and later the model reads another"
            )
        keys = {key for message in messages for key in message}
        if not keys <= seen:
            seen |= keys
            lost |= unprinted(messages, tokenizer, example.tools)
    if lost:
        notes.append(f"the chat template prints nothing of {', '.join(sorted(lost))}")
    return notes


def _last_learnt(row: Tokens) -> int:
    """Where the last run of tokens that bear loss begins."""
    end = max(index for index, label in enumerate(row.labels) if label != IGNORED)
    return max((index for index in range(end) if row.labels[index] == IGNORED), default=-1) + 1


# --- tokens --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Text:
    """A row as text. spans: characters that bear loss; None: all of it. special: add BOS, which a chat template prints
    itself.
    """

    text: str
    spans: tuple[tuple[int, int], ...] | None
    special: bool
    changed: int = 0


def _printed(
    example: Example, tokenizer: PreTrainedTokenizerBase, *, system: str | None, chat: bool, chosen: bool
) -> _Text:
    if example.text is not None:
        return _Text(example.text, None, special=True)
    messages = _conversation(example, system, chat, tokenizer)
    if messages is None:
        prompt, whole = example.prompt or "", (example.prompt or "") + (example.completion or "")
        return _Text(whole, ((len(prompt), len(whole)),), special=True)
    # A system message put before the others shifts their indices.
    moved = len(messages) - len(example.messages or messages)
    unlearnt = frozenset(index + moved for index in example.unlearnt)
    conversation = rendered(messages, tokenizer, tools=example.tools, unlearnt=unlearnt)
    if chosen and conversation.changed:
        raise BadRow(
            f"message {conversation.changed[0] - moved + 1} is to be learnt, and the chat template changes its words "
            "once others follow; leave the later turns out of the row, or do not mark it"
        )
    return _Text(conversation.text, conversation.spans, special=False, changed=len(conversation.changed))


def _many(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, problems: list[str], **style: Any
) -> Iterator[tuple[Example, Tokens]]:
    """The tokens of each example that the template takes; what is wrong with the others goes to `problems`.

    Texts are given to the tokenizer by the hundred, which it converts in parallel.
    """
    part: list[tuple[Example, _Text]] = []

    def converted() -> Iterator[tuple[Example, Tokens]]:
        for (example, _), row in zip(part, _encoded([text for _, text in part], tokenizer), strict=True):
            yield example, replace(row, adapter=example.adapter)
        part.clear()

    for example in progress(examples, "checking rows"):
        try:
            part.append((example, _printed(example, tokenizer, **style)))
        except BadRow as bad:
            problems.append(f"{example.where}: {bad}")
        if len(part) == _TOGETHER:
            yield from converted()
    yield from converted()


def _encoded(texts: Sequence[_Text], tokenizer: PreTrainedTokenizerBase) -> list[Tokens]:
    found: dict[int, Tokens] = {}
    ends = _Ends(tokenizer)
    for special in (False, True):
        places = [place for place, text in enumerate(texts) if text.special == special]
        tokens = _tokenised_all(tokenizer, [texts[place].text for place in places], special=special)
        for place, (ids, offsets) in zip(places, tokens, strict=True):
            text = texts[place]
            labels = list(ids) if text.spans is None else _labels(ids, _in_tokens(offsets, text.spans))
            found[place] = ends.ended(ids, labels, text.changed)
    return [found[place] for place in range(len(texts))]


def _tokenised(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool) -> list[int]:
    ((ids, _),) = _tokenised_all(tokenizer, [text], special=special)
    return ids


def _tokenised_all(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, special: bool
) -> Iterator[tuple[list[int], list[tuple[int, int]]]]:
    """The token ids of each text, and the characters of each token. special: add BOS."""
    if not tokenizer.is_fast:
        raise LoraError("this tokenizer cannot say where its tokens stand in the text; a fast tokenizer is needed.")
    if not texts:
        return
    encoded: Any = tokenizer(list(texts), add_special_tokens=special, return_offsets_mapping=True)
    for ids, offsets in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        if special and ids and ids[-1] == tokenizer.eos_token_id and offsets[-1][0] == offsets[-1][1]:
            ids, offsets = ids[:-1], offsets[:-1]  # the caller adds the end token, once
        if special and ids[:2] == [tokenizer.bos_token_id] * 2:
            ids, offsets = ids[1:], offsets[1:]  # the text itself begins with a BOS token
        yield ids, offsets


def _in_tokens(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Spans of characters as spans of tokens."""
    found = []
    for start, end in spans:
        inside = [i for i, (first, last) in enumerate(offsets) if last > start and first < end and last > first]
        found.append((inside[0], inside[-1] + 1) if inside else (0, 0))
    return found


def _labels(ids: list[int], spans: list[tuple[int, int]]) -> list[int]:
    labels = [IGNORED] * len(ids)
    for start, end in spans:
        labels[start:end] = ids[start:end]
    return labels


class _Ends:
    """Ends rows of one tokenizer: each with exactly one end, its own or else an added end token."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer, self._ends = tokenizer, _end_tokens(tokenizer)
        self._blank: dict[int, bool] = {}

    def ended(self, ids: list[int], labels: list[int], changed: int) -> Tokens:
        if self._closes(labels):
            return Tokens(ids, self._without_tail(ids, labels), changed)
        end = _end_token(self._tokenizer)
        return Tokens([*ids, end], [*labels, end], changed)

    def _is_blank(self, token: int) -> bool:
        if token not in self._blank:
            self._blank[token] = not str(self._tokenizer.decode([token])).strip()
        return self._blank[token]

    def _closes(self, labels: list[int]) -> bool:
        """Whether the last learnt turn ends with an end token, perhaps followed by white space."""
        last = next((label for label in reversed(labels) if label != IGNORED and not self._is_blank(label)), None)
        return last in self._ends if last is not None else False

    def _without_tail(self, ids: list[int], labels: list[int]) -> list[int]:
        """Labels without what the template prints after each turn's end token (a line break, in ChatML)."""
        trimmed = list(labels)
        for index in range(len(ids) - 1, -1, -1):
            if trimmed[index] == IGNORED or (index + 1 < len(ids) and labels[index + 1] != IGNORED):
                continue
            tail = index
            while tail >= 0 and trimmed[tail] != IGNORED and ids[tail] not in self._ends:
                if not self._is_blank(ids[tail]):
                    break
                trimmed[tail] = IGNORED
                tail -= 1
        return trimmed


def _end_tokens(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens that end a turn: the tokenizer's end token, and the special tokens that chat templates use for it."""
    names = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "</s>", "<|return|>")
    added = tokenizer.get_added_vocab()
    return {tokenizer.eos_token_id, *(added[name] for name in names if name in added)} - {None}


def _end_token(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.eos_token_id is None:
        raise LoraError("this tokenizer has no end token, so a model could never learn to stop.")
    return int(tokenizer.eos_token_id)
