"""Examples to token ids and labels: which tokens the model learns to write, and which it only reads.

A conversation is rendered once by the tokenizer's own chat template, and the part that each assistant turn adds is
found by rendering the conversation up to it: with the prompt for an answer, and with the answer. The tokens of those
parts bear loss, the end token included, and no others. What a template prints after the end token bears none.

Without a chat template (or with chat=False) prompt and completion are joined as they stand, then the end token.
Generation starts from `prompt_ids`, which are exactly the tokens before the first one that bears loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .data import Example
from .rows import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label of a token that bears no loss

Messages = Sequence[dict[str, str]]


@dataclass(frozen=True)
class Tokens:
    """One row: token ids, and for each of them itself or IGNORED."""

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class Encoded:
    """Rows ready for training, and how many were left out or cut for their length."""

    rows: list[Tokens]
    dropped: int = 0
    truncated: int = 0


def encode(example: Example, tokenizer: PreTrainedTokenizerBase, *, system: str | None, chat: bool) -> Tokens:
    """The tokens of one example. chat: use the chat template; system: message for conversations that have none."""
    if example.text is not None:
        ids = _plain_ids(tokenizer, example.text)
        ids += [] if ids[-1] == tokenizer.eos_token_id else [_end_token(tokenizer)]
        return Tokens(ids, list(ids))
    messages = _conversation(example, system, chat, tokenizer)
    if messages is None:
        prompt, completion = example.prompt or "", example.completion or ""
        ids, spans = _tokenised(tokenizer, prompt + completion, [(len(prompt), len(prompt + completion))], special=True)
        labels = _labels(ids, spans)
        end = _end_token(tokenizer)
        return Tokens([*ids, end], [*labels, end])
    return _encode_chat(messages, tokenizer)


def encode_all(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    too_long: str,
    system: str | None,
    chat: bool,
) -> Encoded:
    """Every example encoded. Rows over `max_length` are left out ("drop") or cut at the end ("truncate"), and counted.

    A row that a cut leaves without a label is left out too. Raises DataError listing rows without a label.
    """
    rows: list[Tokens] = []
    ends = _end_tokens(tokenizer)
    dropped = truncated = 0
    problems: list[str] = []
    for example in examples:
        row = encode(example, tokenizer, system=system, chat=chat)
        if set(row.labels) <= {IGNORED, *ends}:
            problems.append(
                f"{example.where}: no token of this row bears loss; does the chat template print the answer?"
            )
            continue
        if len(row.input_ids) > max_length:
            row = Tokens(row.input_ids[:max_length], row.labels[:max_length])
            if too_long == "drop" or all(label == IGNORED for label in row.labels):
                dropped += 1
                continue
            truncated += 1
        rows.append(row)
    if problems:
        raise DataError(problems)
    return Encoded(rows, dropped, truncated)


def encode_text(example: Example, tokenizer: PreTrainedTokenizerBase, max_length: int) -> dict[str, list[int]]:
    """A classifier's input, cut at `max_length` tokens."""
    encoded: dict[str, list[int]] = tokenizer(
        example.text, example.text_pair, truncation=True, max_length=max_length
    ).data
    return encoded


def prompt_ids(
    asked: str | Messages | Example, tokenizer: PreTrainedTokenizerBase, *, system: str | None, chat: bool
) -> list[int]:
    """The tokens an answer is generated from. Of an example: those before its last assistant turn."""
    if isinstance(asked, Example):
        turns = asked.messages
        asked = turns[: _last_assistant(turns)] if turns is not None else asked.prompt or ""
    if isinstance(asked, str):
        if not chat:
            ids = _plain_ids(tokenizer, asked)
            return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids
        asked = [{"role": "user", "content": asked}]
    text = _render(_with_system(asked, system), tokenizer, answer=True)
    ids, _ = _tokenised(tokenizer, text, [], special=False)
    return ids


def reference(example: Example) -> str:
    """The expected answer: the completion, or the last assistant turn."""
    if example.messages is not None:
        return example.messages[_last_assistant(example.messages)]["content"]
    return example.completion or ""


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
) -> list[dict[str, str]] | None:
    """The example as messages, or None for a pair that is to be joined as it stands."""
    if example.messages is not None:
        if tokenizer.chat_template is None:
            raise ValueError(
                "the data holds conversations, but this model's tokenizer has no chat template. Use an instruct "
                "model, or data with prompt and completion."
            )
        return _with_system(example.messages, system)
    if not chat:
        return None
    turns = (("user", example.prompt), ("assistant", example.completion))
    pair = [{"role": role, "content": content or ""} for role, content in turns]
    return _with_system(pair, system)


def _with_system(messages: Messages, system: str | None) -> list[dict[str, str]]:
    if system is None or (messages and messages[0]["role"] == "system"):
        return list(messages)
    return [{"role": "system", "content": system}, *messages]


def _encode_chat(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> Tokens:
    full = _render(messages, tokenizer, answer=False)
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        start = _render(messages[:index], tokenizer, answer=True)
        end = _render(messages[: index + 1], tokenizer, answer=False)
        if full.startswith(start) and full.startswith(end) and end.startswith(start):
            spans.append((len(start), len(end)))
        elif index == len(messages) - 1:
            # The template prints the prompt for an answer otherwise than the answer's own beginning.
            spans.append((_common_prefix(start, full), len(full)))
        # Otherwise the template changes earlier turns (it strips their thinking, say): they are read, not learnt.
    ids, parts = _tokenised(tokenizer, full, spans, special=False)
    labels = _labels(ids, parts)
    if not _closes(ids, labels, tokenizer):
        end_token = _end_token(tokenizer)
        return Tokens([*ids, end_token], [*labels, end_token])
    return Tokens(ids, _without_tail(ids, labels, tokenizer))


def _render(messages: Messages, tokenizer: PreTrainedTokenizerBase, *, answer: bool) -> str:
    if not messages:
        return ""
    rendered = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=answer)
    return str(rendered)


def _last_assistant(messages: Messages) -> int:
    return max(index for index, message in enumerate(messages) if message["role"] == "assistant")


def _common_prefix(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


# --- tokens --------------------------------------------------------------------------------------------------------


def _tokenised(
    tokenizer: PreTrainedTokenizerBase, text: str, spans: list[tuple[int, int]], *, special: bool
) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids of `text`, and spans of characters as spans of tokens. special: add BOS; a template has its own."""
    if not tokenizer.is_fast:
        raise ValueError("this tokenizer cannot say where its tokens stand in the text; a fast tokenizer is needed.")
    encoded: Any = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
    ids: list[int] = list(encoded["input_ids"])
    offsets: list[tuple[int, int]] = list(encoded["offset_mapping"])
    if special and ids and ids[-1] == tokenizer.eos_token_id and offsets[-1][0] == offsets[-1][1]:
        ids, offsets = ids[:-1], offsets[:-1]  # the caller adds the end token, once
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
        raise ValueError("this tokenizer has no end token, so a model could never learn to stop.")
    return int(tokenizer.eos_token_id)


def _plain_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text)["input_ids"])
