"""Where the assistant's turns stand in the text of a conversation, without any mark of the template's.

    render(messages[: i], with the prompt for an answer)     …<|im_start|>assistant\n
    render(messages[: i + 1])                                …<|im_start|>assistant\nyes<|im_end|>\n
                                                                                    └── turn i ──┘

The conversation is rendered twice, up to a turn and to its end, and the turn is the difference. If the whole text does
not begin with the second one, the template prints the turn otherwise once others follow it:

- The text around its words differs (an empty thought or another end token is left out, the system message moves to the
  last question). The turn is found by putting other words in the place of its own, and is learnt as it is printed.
- Its own words differ (its thoughts are removed). The model would learn words that it should not write there, so the
  turn is read, not learnt.

A template in which these turns would hold other turns' words is refused.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..core.errors import LoraError
from .chat import (
    THOUGHTS,
    WORD,
    Messages,
    Tools,
    always_printed,
    as_template_takes_them,
    common_prefix,
    conversation_text,
    opening,
    refuse_loss,
)
from .conversations import BadRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]  # characters [start, end)
_OTHER = f"\ue000{WORD}\ue000"  # begins and ends with a character for private use, as no row does


@dataclass(frozen=True)
class Rendered:
    """A conversation as text, and the places of its learnt turns in it."""

    text: str
    spans: tuple[Span, ...]  # of each learnt turn
    changed: tuple[int, ...] = ()  # indices of turns whose words the template changes: read, not learnt


def rendered(
    messages: Messages, tokenizer: PreTrainedTokenizerBase, *, tools: Tools = (), unlearnt: frozenset[int] = frozenset()
) -> Rendered:
    """The conversation as text, and the spans of its assistant turns, except the turns whose index is in `unlearnt`.

    Raises BadRow if the template refuses the conversation, or does not print something that changes its meaning, and
    LoraError for a template in which no turn can be told from the others.
    """
    messages = as_template_takes_them(messages, tokenizer, tools)
    _refuse_mixing(tokenizer, str(tokenizer.chat_template))
    text = _Text(messages, tokenizer, tools)
    refuse_loss(messages, tokenizer, tools, text.full)
    found = {i: text.span(i) for i, own in enumerate(messages) if own["role"] == "assistant" and i not in unlearnt}
    spans = tuple(span for span in found.values() if span is not None)
    return Rendered(text.full, spans, tuple(index for index, span in found.items() if span is None))


class _Text:
    """A conversation and its text."""

    def __init__(self, messages: Messages, tokenizer: PreTrainedTokenizerBase, tools: Tools) -> None:
        self.messages, self.tokenizer, self.tools = messages, tokenizer, tools
        self.full = self.of(messages)

    def of(self, messages: Messages) -> str:
        text = conversation_text(messages, self.tokenizer, answer=False, tools=self.tools)
        return text.removesuffix(always_printed(self.tokenizer).tail)

    def span(self, index: int) -> Span | None:
        """Where the turn stands in the text; None if the template changes its words."""
        start = opening(self.messages[:index], self.tokenizer, self.tools)
        end = self.full if index == len(self.messages) - 1 else self.of(self.messages[: index + 1])
        begin = _begin(start, end, self.messages[index]["content"])
        return (begin, len(end)) if self.full.startswith(end) else self._moved(index, end, begin)

    def _moved(self, index: int, last: str, begin: int) -> Span | None:
        """The same where others follow the turn and change what stands around its words.

        last: the text up to the turn, printed as the last one, which begins at `begin`.
        """
        alone = self._words(index, self.messages[: index + 1], last)
        among = self._words(index, self.messages, self.full)
        if alone is None or among is None or last[slice(*alone)] != self.full[slice(*among)]:
            return None
        before = self.of(self.messages[:index])
        header = last[common_prefix(before, last) : begin]  # of the turn: its role
        around, there = last[begin : alone[0]], self.full[: among[0]]
        at = there.rfind(header) + len(header) if header else len(there) - common_prefix(around[::-1], there[::-1])
        # What stands between the header and the words is the template's own, and never more than alone.
        if (header and header not in there) or len(there) - at > len(around):
            return None
        close, follows = last[alone[1] :], self.full[among[1] :]
        same = common_prefix(close, follows)
        if same < len(close):  # no end token is cut in two
            ends = [follows.find(token) + len(token) for token in self.tokenizer.get_added_vocab() if token in follows]
            same = max((end for end in ends if end <= same), default=0)
        span = (at, among[1] + same)
        return span if all(words in self.full[slice(*span)] for words in _own(self.messages[index])) else None

    def _words(self, index: int, messages: Messages, text: str) -> Span | None:
        """Where the words of a turn stand in the text of `messages`: what differs if the turn says something else."""
        other = self.of([*messages[:index], _reworded(messages[index]), *messages[index + 1 :]])
        if other == text:
            return None
        first = common_prefix(text, other)
        return first, len(text) - common_prefix(text[first:][::-1], other[first:][::-1])


def _begin(start: str, end: str, content: str | None) -> int:
    """Where the answer begins in `end`, the text that ends with the answer. start: the text before the answer."""
    if end.startswith(start):
        return len(start)
    # The prompt for an answer differs from what is printed before an answer (it opens <think>, for example).
    begin = common_prefix(start, end)
    words = (content or "").strip()
    found = end.rfind(words) if words else -1
    return min(begin, found) if found >= 0 else begin


def _reworded(message: dict[str, Any]) -> dict[str, Any]:
    """The message with other words: as its content or, where that is empty, as the names of the tools that it calls."""
    if (message["content"] or "").strip():
        return {**message, "content": _OTHER}
    calls = [{**call, "function": {**call["function"], "name": _OTHER}} for call in message["tool_calls"]]
    return {**message, "tool_calls": calls}


def _own(message: dict[str, Any]) -> list[str]:
    """What a turn says, piece by piece."""
    names = [call["function"]["name"] for call in message.get("tool_calls", ())]
    return [str(words).strip() for words in (*(message.get(key, "") for key in THOUGHTS), *names)]


@functools.lru_cache(maxsize=4)
def _refuse_mixing(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    """Raise LoraError if the turns that are found in a conversation hold words of others."""
    words = [f"{WORD}{number}." for number in range(4)]
    talk = [{"role": ("user", "assistant")[i % 2], "content": word} for i, word in enumerate(words)]
    try:
        text = _Text(talk, tokenizer, ())
        found = {index: text.span(index) for index in (1, 3)}
    except BadRow:
        return  # the rows will tell
    for index, span in found.items():
        said = "" if span is None else text.full[slice(*span)]
        if any(word in said for place, word in enumerate(words) if place != index):
            raise LoraError(
                "this model's chat template does not let the assistant's turns be found: where one is printed, others' "
                "words stand too, and the model would learn these. Use another template, or rows of prompt and "
                "completion with --plain."
            )
