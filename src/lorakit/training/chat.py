"""A conversation in the tokenizer's own chat template: its text, and the characters that each learnt turn adds.

The conversation is rendered once. What an assistant turn adds is found by rendering the conversation up to it, with the
prompt for an answer, and the conversation that ends with it. Templates have habits, and nothing here knows any by name:

- Some always print the prompt for an answer, after the last turn too; that is no part of the turn.
- Some change earlier turns (they strip their thoughts). Such a turn is read, not learnt.
- Some take a tool call's arguments as an object, some as text; content that is empty, or null.
- Some print nothing of tools, tool calls, thoughts or a role. A row that loses what it means is refused.

What a template prints is found by putting words of our own in the place of a row's.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .conversations import BadRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = Sequence[dict[str, Any]]
Tools = Sequence[dict[str, Any]]

# What a model answers or thinks, so that a template that prints nothing of it would teach something else.
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
_WORD = "lorakit"  # begins words that stand in the place of a row's own


@dataclass(frozen=True)
class Rendered:
    """A conversation as text, where its learnt turns stand in it, and how many could not be found."""

    text: str
    spans: tuple[tuple[int, int], ...]
    changed: int = 0  # assistant turns that the template prints otherwise once others follow: read, not learnt


def render(
    messages: Messages, tokenizer: PreTrainedTokenizerBase, *, answer: bool, tools: Tools = (), **options: Any
) -> str:
    """The text of a conversation. answer: with the prompt for an answer. options: of apply_chat_template.

    Raises BadRow with what the template says against it.
    """
    if not messages:
        return ""
    try:
        return str(
            tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=answer, tools=list(tools) or None, **options
            )
        )
    except Exception as error:  # a template may raise anything
        reason = (str(error).splitlines() or [""])[0]
        raise BadRow(f"the chat template refuses it: {reason or type(error).__name__}") from error


def rendered(
    messages: Messages, tokenizer: PreTrainedTokenizerBase, *, tools: Tools = (), unlearnt: frozenset[int] = frozenset()
) -> Rendered:
    """The conversation, and the spans of its assistant turns but those of the indices in `unlearnt`.

    Raises BadRow where the template refuses it, or prints nothing of something that changes what the row means.
    """
    messages = as_template_takes_them(messages, tokenizer, tools)
    always = _always(tokenizer)
    full = render(messages, tokenizer, answer=False, tools=tools).removesuffix(always.tail)
    _refuse_loss(messages, tokenizer, tools, full)
    spans, changed = [], 0
    for index, message in enumerate(messages):
        if message["role"] != "assistant" or index in unlearnt:
            continue
        start = opening(messages[:index], tokenizer, tools)
        end = render(messages[: index + 1], tokenizer, answer=False, tools=tools).removesuffix(always.tail)
        if full.startswith(end):
            spans.append((_begin(start, end, message["content"]), len(end)))
        else:
            changed += 1
    return Rendered(full, tuple(spans), changed)


def opening(messages: Messages, tokenizer: PreTrainedTokenizerBase, tools: Tools = ()) -> str:
    """The text that an answer follows."""
    return render(messages, tokenizer, answer=True, tools=tools) + (_always(tokenizer).gap if messages else "")


def unprinted(messages: Messages, tokenizer: PreTrainedTokenizerBase, tools: Tools) -> set[str]:
    """Keys of messages of which the template prints nothing, those apart that `rendered` refuses."""
    messages = as_template_takes_them(messages, tokenizer, tools)
    full = render(messages, tokenizer, answer=False, tools=tools)
    keys = {key for message in messages for key in message} - {"role", "content", "tool_calls"}
    return {key for key in keys if _without(key, messages, tokenizer, tools) == full}


def prints_date(messages: Messages, tokenizer: PreTrainedTokenizerBase, tools: Tools) -> bool:
    """Whether the text depends on the day: the template asks for the date."""
    own = tokenizer.get_chat_template(tools=list(tools) or None)
    another_day = "{% macro strftime_now(format) %}" + _WORD + "{% endmacro %}"
    today, later = (
        render(messages, tokenizer, answer=False, tools=tools, chat_template=template)
        for template in (own, another_day + own)
    )
    return today != later


def as_template_takes_them(
    messages: Messages, tokenizer: PreTrainedTokenizerBase, tools: Tools
) -> list[dict[str, Any]]:
    """The messages with their tool calls in the form that the template prints. Raises BadRow where there is none."""
    if not any("tool_calls" in message for message in messages):
        return list(messages)
    refused = None
    for content in ("", None):
        for as_text in (False, True):
            try:
                probe = render(_recast(messages, content, as_text, _stand_in), tokenizer, answer=False, tools=tools)
            except BadRow as bad:
                refused = refused or bad
                continue
            count = sum(len(message.get("tool_calls", ())) for message in messages)
            words = [f"{_WORD}{part}{number}_" for number in range(count) for part in ("name", "key", "value")]
            # A quotation mark of Python, or one that is escaped: the other form is meant.
            if all(word in probe for word in words) and f"'{_WORD}key" not in probe and f'\\"{_WORD}key' not in probe:
                return _recast(messages, content, as_text, lambda call, number: call)
    raise refused or BadRow("the chat template does not print tool_calls; use a model whose template knows tools")


# --- what a template does ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Always:
    """What a template prints after the last turn though no answer is asked for, and between that and an answer."""

    tail: str = ""
    gap: str = ""


def _always(tokenizer: PreTrainedTokenizerBase) -> _Always:
    return _always_of(tokenizer, str(tokenizer.chat_template))


@functools.lru_cache(maxsize=4)
def _always_of(tokenizer: PreTrainedTokenizerBase, template: str) -> _Always:
    one, two = f"{_WORD}one", f"{_WORD}two"
    asked = [{"role": "user", "content": one}]
    answered = [*asked, {"role": "assistant", "content": two}]
    try:
        plain, prompt = (render(asked, tokenizer, answer=answer) for answer in (False, True))
        whole = render(answered, tokenizer, answer=False)
        followed = render([*answered, *asked], tokenizer, answer=False)
    except BadRow:
        return _Always()
    after, before_next = whole.rpartition(two)[2], followed.rpartition(two)[2]
    tail = after[_common_prefix(after, before_next) :]
    if plain != prompt or not tail.strip() or not prompt.endswith(tail):
        return _Always()
    # The prompt for an answer and the next turn begin alike; the turn before them ends with its end token.
    ends = [end for end in tokenizer.get_added_vocab() if end in after and after.index(end) < len(after) - len(tail)]
    first = min(ends, key=after.index, default="")
    tail = after[after.index(first) + len(first) :] if first else tail
    gap = whole.partition(two)[0].removeprefix(prompt) if whole.startswith(prompt) else ""
    return _Always(tail, "" if gap.strip() else gap)


def _begin(start: str, end: str, content: str) -> int:
    """Where the answer begins in `end`, the text up to its last character."""
    if end.startswith(start):
        return len(start)
    # The prompt for an answer is printed otherwise than the answer's own beginning (it opens <think>, say).
    begin = _common_prefix(start, end)
    found = end.rfind(content.strip()) if content.strip() else -1
    return min(begin, found) if found >= 0 else begin


def _refuse_loss(messages: Messages, tokenizer: PreTrainedTokenizerBase, tools: Tools, full: str) -> None:
    """Raise BadRow where something that changes what a row means is not printed."""
    if tools and render(messages, tokenizer, answer=False).removesuffix(_always(tokenizer).tail) == full:
        raise BadRow("the chat template does not print tools; use a model whose template knows tools")
    for key in _THOUGHTS:
        # A template that knows the key leaves earlier thoughts out on purpose.
        if key in str(tokenizer.chat_template) or not any(key in message for message in messages):
            continue
        if _without(key, messages, tokenizer, tools).removesuffix(_always(tokenizer).tail) == full:
            raise BadRow(f"the chat template does not print {key}; put it into content, or leave it out")
    for index, message in enumerate(messages):
        text = (message["content"] or "").strip()
        if message["role"] == "assistant" or not text or text in full:
            continue
        other = [*messages[:index], {**message, "content": _WORD}, *messages[index + 1 :]]
        if _WORD not in render(other, tokenizer, answer=False, tools=tools):
            raise BadRow(f"the chat template does not print the turn of the role {message['role']!r}")


def _without(key: str, messages: Messages, tokenizer: PreTrainedTokenizerBase, tools: Tools) -> str:
    rest = [{name: value for name, value in message.items() if name != key} for message in messages]
    return render(rest, tokenizer, answer=False, tools=tools)


def _recast(
    messages: Messages, content: str | None, as_text: bool, change: Callable[[dict[str, Any], int], dict[str, Any]]
) -> list[dict[str, Any]]:
    """The messages with empty content beside tool calls as `content`, and each call changed, by its number.

    as_text: the calls' arguments as JSON text.
    """
    number, recast = 0, []
    for message in messages:
        if "tool_calls" in message:
            calls = []
            for call in message["tool_calls"]:
                function = change(call["function"], number)
                number += 1
                if as_text and not isinstance(function["arguments"], str):
                    function = {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}
                calls.append({**call, "function": function})
            message = {**message, "content": message["content"] or content, "tool_calls": calls}
        recast.append(message)
    return recast


def _stand_in(function: dict[str, Any], number: int) -> dict[str, Any]:
    name, key, value = (f"{_WORD}{part}{number}_" for part in ("name", "key", "value"))
    return {**function, "name": name, "arguments": {key: value}}


def _common_prefix(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
