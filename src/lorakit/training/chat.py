"""A conversation in the tokenizer's own chat template, in the form in which that template takes it.

Templates differ. This file knows no template by name:

- Some take a message's content as text, others only as a list of parts.
- Some take a tool call's arguments as an object, others as text. Some take empty content beside it, others null.
- Some take tools only as {"type": "function", "function": {…}}.
- Some always print the prompt for an answer, even after the last turn.
- Some do not print tools, tool calls, thoughts or a role. A row that would lose its meaning is refused.

To find out what a template prints, this file puts its own words in place of the row's words. `turns.py` finds the
assistant's turns in the text.
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

# Keys that hold thoughts. A template that does not print them would teach the model something else.
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
WORD = "lorakit"  # the beginning of the words that take the place of a row's words


def conversation_text(
    messages: Messages, tokenizer: PreTrainedTokenizerBase, *, answer: bool, tools: Tools = (), **options: Any
) -> str:
    """The text of a conversation. answer: add the prompt for an answer. options: arguments of apply_chat_template.

    Raises BadRow with the template's error.
    """
    if not messages:
        return ""
    takes = _taken_by(tokenizer, str(tokenizer.chat_template))
    if takes.parts:
        messages = [_in_parts(message) for message in messages]
    if takes.wrapped:
        tools = [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]
    return _applied(messages, tokenizer, answer=answer, tools=tools, **options)


def opening(messages: Messages, tokenizer: PreTrainedTokenizerBase, tools: Tools = ()) -> str:
    """The text that an answer follows."""
    return conversation_text(messages, tokenizer, answer=True, tools=tools) + (
        always_printed(tokenizer).gap if messages else ""
    )


def unprinted(messages: Messages, tokenizer: PreTrainedTokenizerBase, tools: Tools) -> set[str]:
    """Keys of messages that the template does not print. `rendered` already refuses those that change the meaning."""
    messages = as_template_takes_them(messages, tokenizer, tools)
    full = conversation_text(messages, tokenizer, answer=False, tools=tools)
    keys = {key for message in messages for key in message} - {"role", "content", "tool_calls"}
    return {key for key in keys if _without(key, messages, tokenizer, tools) == full}


def prints_date(messages: Messages, tokenizer: PreTrainedTokenizerBase, tools: Tools) -> bool:
    """Whether the text depends on the day, because the template prints the date."""
    own = tokenizer.get_chat_template(tools=list(tools) or None)
    another_day = "{% macro strftime_now(format) %}" + WORD + "{% endmacro %}"
    today, later = (
        conversation_text(messages, tokenizer, answer=False, tools=tools, chat_template=template)
        for template in (own, another_day + own)
    )
    return today != later


def as_template_takes_them(
    messages: Messages, tokenizer: PreTrainedTokenizerBase, tools: Tools
) -> list[dict[str, Any]]:
    """The messages with their tool calls in the form that the template prints. Raises BadRow if it prints no form."""
    if not any("tool_calls" in message for message in messages):
        return list(messages)
    refused, printed = None, False
    for content in ("", None):
        for as_text in (False, True):
            try:
                probe = conversation_text(
                    _recast(messages, content, as_text, _stand_in), tokenizer, answer=False, tools=tools
                )
            except BadRow as bad:
                refused = refused or bad
                continue
            printed = True
            count = sum(len(message.get("tool_calls", ())) for message in messages)
            words = [f"{WORD}{part}{number}_" for number in range(count) for part in ("name", "key", "value")]
            # A Python quotation mark, or an escaped one, shows that the template takes the other form.
            if all(word in probe for word in words) and f"'{WORD}key" not in probe and f'\\"{WORD}key' not in probe:
                return _recast(messages, content, as_text, lambda call, number: call)
    if refused is not None and not printed:  # in no form
        raise refused
    raise BadRow("the chat template does not print tool_calls; use a model whose template knows tools")


# --- what a template takes -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Taken:
    """The forms of a conversation that a template needs. transformers gives thoughts every name that templates use."""

    parts: bool = False  # content as a list of parts: text is not printed
    wrapped: bool = False  # tools as {"type": "function", "function": {…}}: plain functions are not printed
    thoughts: bool = False  # it prints thoughts somewhere


@functools.lru_cache(maxsize=4)
def _taken_by(tokenizer: PreTrainedTokenizerBase, template: str) -> _Taken:
    asked, answered = {"role": "user", "content": f"{WORD}one"}, {"role": "assistant", "content": f"{WORD}two"}

    def prints(word: str, messages: Messages, tools: Tools = ()) -> bool:
        try:
            return word in _applied(messages, tokenizer, answer=False, tools=tools)
        except BadRow:
            return False

    talk: Messages = [asked, answered]
    parts = not prints(f"{WORD}one", talk) and prints(f"{WORD}one", [_in_parts(message) for message in talk])
    if parts:
        asked, answered = _in_parts(asked), _in_parts(answered)
    plain = {"name": f"{WORD}tool", "description": WORD, "parameters": {"type": "object", "properties": {}}}
    in_function = [{"type": "function", "function": plain}]
    wrapped = not prints(f"{WORD}tool", [asked], [plain]) and prints(f"{WORD}tool", [asked], in_function)
    call = {"type": "function", "function": {"name": WORD, "arguments": {}}}
    thought = {"reasoning_content": f"{WORD}thought"}
    thoughts = any(
        prints(f"{WORD}thought", [asked, {**answered, **thought, **calls}]) for calls in ({}, {"tool_calls": [call]})
    )
    return _Taken(parts, wrapped, thoughts)


def _applied(
    messages: Messages, tokenizer: PreTrainedTokenizerBase, *, answer: bool, tools: Tools, **options: Any
) -> str:
    try:
        return str(
            tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=answer, tools=list(tools) or None, **options
            )
        )
    except Exception as error:  # a template may raise anything
        reason = (str(error).splitlines() or [""])[0]
        raise BadRow(f"the chat template refuses it: {reason or type(error).__name__}") from error


def _in_parts(message: dict[str, Any]) -> dict[str, Any]:
    content = message["content"]
    return message if content is None else {**message, "content": [{"type": "text", "text": content}]}


# --- what a template does ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Always:
    """What a template prints around an answer, if it prints the prompt for an answer even when none is asked for."""

    tail: str = ""  # after the last turn: the prompt for an answer
    gap: str = ""  # white space between that prompt and the answer


def always_printed(tokenizer: PreTrainedTokenizerBase) -> _Always:
    return _always_of(tokenizer, str(tokenizer.chat_template))


@functools.lru_cache(maxsize=4)
def _always_of(tokenizer: PreTrainedTokenizerBase, template: str) -> _Always:
    one, two = f"{WORD}one", f"{WORD}two"
    asked = [{"role": "user", "content": one}]
    answered = [*asked, {"role": "assistant", "content": two}]
    try:
        plain, prompt = (conversation_text(asked, tokenizer, answer=answer) for answer in (False, True))
        whole = conversation_text(answered, tokenizer, answer=False)
        followed = conversation_text([*answered, *asked], tokenizer, answer=False)
    except BadRow:
        return _Always()
    after, before_next = whole.rpartition(two)[2], followed.rpartition(two)[2]
    tail = after[common_prefix(after, before_next) :]
    if plain != prompt or not tail.strip() or not prompt.endswith(tail):
        return _Always()
    # The prompt for an answer and the next turn begin with the same text. The turn before them ends with its end token.
    ends = [end for end in tokenizer.get_added_vocab() if end in after and after.index(end) < len(after) - len(tail)]
    first = min(ends, key=after.index, default="")
    tail = after[after.index(first) + len(first) :] if first else tail
    gap = whole.partition(two)[0].removeprefix(prompt) if whole.startswith(prompt) else ""
    return _Always(tail, "" if gap.strip() else gap)


def refuse_loss(messages: Messages, tokenizer: PreTrainedTokenizerBase, tools: Tools, full: str) -> None:
    """Raise BadRow if the template does not print something that changes the meaning of the row."""
    refuse_unprinted_tools(messages, tokenizer, tools, full)
    # A template that prints thoughts leaves earlier ones out on purpose.
    if not _taken_by(tokenizer, str(tokenizer.chat_template)).thoughts:
        for key in (key for key in THOUGHTS if any(key in message for message in messages)):
            if _without(key, messages, tokenizer, tools).removesuffix(always_printed(tokenizer).tail) == full:
                raise BadRow(f"the chat template does not print {key}; put it into content, or leave it out")
    for index, message in enumerate(messages):
        text = (message["content"] or "").strip()
        if message["role"] == "assistant" or not text or text in full:
            continue
        other = [*messages[:index], {**message, "content": WORD}, *messages[index + 1 :]]
        if WORD not in conversation_text(other, tokenizer, answer=False, tools=tools):
            raise BadRow(f"the chat template does not print the turn of the role {message['role']!r}")


def refuse_unprinted_tools(messages: Messages, tokenizer: PreTrainedTokenizerBase, tools: Tools, text: str) -> None:
    """Raise BadRow if the template does not print tools. text: the conversation with them."""
    tail = always_printed(tokenizer).tail
    bare = (conversation_text(messages, tokenizer, answer=answer) for answer in (False, True)) if tools else ()
    if any(own.removesuffix(tail) == text.removesuffix(tail) for own in bare):
        raise BadRow("the chat template does not print tools; use a model whose template knows tools")


def _without(key: str, messages: Messages, tokenizer: PreTrainedTokenizerBase, tools: Tools) -> str:
    rest = [{name: value for name, value in message.items() if name != key} for message in messages]
    return conversation_text(rest, tokenizer, answer=False, tools=tools)


def _recast(
    messages: Messages, content: str | None, as_text: bool, change: Callable[[dict[str, Any], int], dict[str, Any]]
) -> list[dict[str, Any]]:
    """The messages with changed tool calls: `change(function, number)` replaces the function of each call.

    content: replaces empty content beside tool calls. as_text: write the calls' arguments as JSON text.
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
    name, key, value = (f"{WORD}{part}{number}_" for part in ("name", "key", "value"))
    return {**function, "name": name, "arguments": {key: value}}


def common_prefix(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
