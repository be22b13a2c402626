"""Convert examples to token ids and labels: which tokens the model learns to write, and which it only reads.

In a conversation, only the tokens of the assistant's turns bear loss, including the end token; `turns.py` finds them in
the text. What a template prints after the end token bears no loss.

Without a chat template (or with chat=False) prompt and completion are joined unchanged, followed by the end token.
Generation starts from `prompt_ids`, which are exactly the tokens before the first one that bears loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..core.errors import LoraError
from .chat import Messages, Tools, opening, prints_date, refuse_unprinted_tools, unprinted
from .conversations import BadRow
from .data import Example
from .rows import DataError
from .turns import rendered

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label of a token that bears no loss


@dataclass(frozen=True)
class Tokens:
    """One row: token ids, and for each of them the label: the same id, or IGNORED."""

    input_ids: list[int]
    labels: list[int]
    changed: int = 0  # assistant turns that the chat template changes later on: they bear no loss


@dataclass(frozen=True)
class Encoded:
    """Rows ready for training, how many were left out or cut for their length, and notes for the user."""

    rows: list[Tokens]
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
    if example.text is not None:
        ids, _ = _tokenised(tokenizer, example.text, [], special=True)
        return _ended(ids, list(ids), tokenizer)
    messages = _conversation(example, system, chat, tokenizer)
    if messages is None:
        prompt, completion = example.prompt or "", example.completion or ""
        ids, spans = _tokenised(tokenizer, prompt + completion, [(len(prompt), len(prompt + completion))], special=True)
        return _ended(ids, _labels(ids, spans), tokenizer)
    # A system message put before the others shifts their indices.
    moved = len(messages) - len(example.messages or messages)
    unlearnt = frozenset(index + moved for index in example.unlearnt)
    conversation = rendered(messages, tokenizer, tools=example.tools, unlearnt=unlearnt)
    if chosen and conversation.changed:
        raise BadRow(
            f"message {conversation.changed[0] - moved + 1} is to be learnt, and the chat template changes its words "
            "once others follow; leave the later turns out of the row, or do not mark it"
        )
    ids, parts = _tokenised(tokenizer, conversation.text, list(conversation.spans), special=False)
    return _ended(ids, _labels(ids, parts), tokenizer, len(conversation.changed))


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
    rows: list[Tokens] = []
    ends = _end_tokens(tokenizer)
    dropped = truncated = changed = 0
    problems: list[str] = []
    for example in examples:
        try:
            row = encode(example, tokenizer, system=system, chat=chat, chosen=chosen)
        except BadRow as bad:
            problems.append(f"{example.where}: {bad}")
            continue
        if set(row.labels) <= {IGNORED, *ends}:
            why = "no token of this row bears loss; does the chat template print the answer?"
            if row.changed:
                why = "the chat template changes every turn that is to be learnt once others follow"
            problems.append(f"{example.where}: {why}")
            continue
        changed += row.changed
        if len(row.input_ids) > max_length:
            row = Tokens(row.input_ids[:max_length], row.labels[:max_length])
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
    return Encoded(rows, dropped, truncated, tuple(notes))


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
            ids, _ = _tokenised(tokenizer, asked, [], special=True)
            return ids
        asked = [{"role": "user", "content": asked}]
    messages = _with_system(asked, system)
    text = opening(messages, tokenizer, tools)
    refuse_unprinted_tools(messages, tokenizer, tools, text)
    ids, _ = _tokenised(tokenizer, text, [], special=False)
    return ids


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


def _tokenised(
    tokenizer: PreTrainedTokenizerBase, text: str, spans: list[tuple[int, int]], *, special: bool
) -> tuple[list[int], list[tuple[int, int]]]:
    """The token ids of `text`, and `spans` of characters as spans of tokens.

    special: add BOS. A chat template prints its own.
    """
    if not tokenizer.is_fast:
        raise LoraError("this tokenizer cannot say where its tokens stand in the text; a fast tokenizer is needed.")
    encoded: Any = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
    ids: list[int] = list(encoded["input_ids"])
    offsets: list[tuple[int, int]] = list(encoded["offset_mapping"])
    if special and ids and ids[-1] == tokenizer.eos_token_id and offsets[-1][0] == offsets[-1][1]:
        ids, offsets = ids[:-1], offsets[:-1]  # the caller adds the end token, once
    if special and ids[:2] == [tokenizer.bos_token_id] * 2:
        ids, offsets = ids[1:], offsets[1:]  # the text itself begins with a BOS token
    found = []
    for start, end in spans:
        inside = [i for i, (first, last) in enumerate(offsets) if last > start and first < end and last > first]
        found.append((inside[0], inside[-1] + 1) if inside else (0, 0))
    return ids, found


def _labels(ids: list[int], spans: list[tuple[int, int]]) -> list[int]:
    labels = [IGNORED] * len(ids)
    for start, end in spans:
        labels[start:end] = ids[start:end]
    return labels


def _ended(ids: list[int], labels: list[int], tokenizer: PreTrainedTokenizerBase, changed: int = 0) -> Tokens:
    """The row with exactly one end: its own, or else an added end token."""
    if _closes(ids, labels, tokenizer):
        return Tokens(ids, _without_tail(ids, labels, tokenizer), changed)
    end = _end_token(tokenizer)
    return Tokens([*ids, end], [*labels, end], changed)


def _closes(ids: list[int], labels: list[int], tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the last learnt turn ends with an end token, perhaps followed by white space."""
    learnt = [token for token, label in zip(ids, labels, strict=True) if label != IGNORED]
    while learnt and not str(tokenizer.decode([learnt[-1]])).strip():
        learnt.pop()
    return bool(learnt) and learnt[-1] in _end_tokens(tokenizer)


def _without_tail(ids: list[int], labels: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Labels without what the template prints after each turn's end token (a line break, in ChatML)."""
    ends = _end_tokens(tokenizer)
    trimmed = list(labels)
    index = len(ids)
    while index > 0:
        index -= 1
        if trimmed[index] == IGNORED or (index + 1 < len(ids) and labels[index + 1] != IGNORED):
            continue
        tail = index
        while tail >= 0 and trimmed[tail] != IGNORED and ids[tail] not in ends:
            if str(tokenizer.decode([ids[tail]])).strip():
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
