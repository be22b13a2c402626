"""Convert a list of turns, as common programs write them, to messages for a chat template, and find the learnt ones.

A turn is {"role", "content"} or ShareGPT's {"from", "value"}. Tool calls, thoughts and whatever else a turn holds stay
in the message. The chat template should print them; `chat.py` checks whether it does.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from .rows import kind

TrainOn = Literal["all", "last", "field"]

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant",
          "system": "system", "tool": "tool", "observation": "tool", "function_call": "assistant",
          "developer": "developer"}  # fmt: skip
# Keys that mark a turn as learnt, and keys that mark it as not learnt.
_LEARNT = ("weight", "train", "training", "trainable", "train_on_turn", "learn", "loss", "loss_mask", "loss_weight",
           "step_loss_mask")  # fmt: skip
_NOT_LEARNT = ("mask", "masked", "ignore_loss")
_MARKS = re.compile("weight|train|loss|mask|learn")


class BadRow(ValueError):
    """What is wrong with one row."""


@dataclass(frozen=True)
class Conversation:
    """Messages as a chat template takes them, and the indices of the assistant turns that are read, not learnt."""

    messages: tuple[dict[str, Any], ...]
    unlearnt: frozenset[int] = frozenset()


def conversation(value: Any, *, read_only: int = 0, train_on: TrainOn = "all") -> Conversation:
    """The conversation in a list of turns, or in such a list as JSON text. Raises BadRow.

    read_only: how many of the first turns are only a prompt, so that nothing of them is learnt. train_on: which
    assistant turns are learnt: all, the last, or those that a field marks; one that is marked by 0 is never learnt.
    """
    turns = parsed_json(value)
    if turns is None:
        raise BadRow("messages is null")
    if not isinstance(turns, list) or not turns:
        raise BadRow("messages is empty" if turns == [] else f"messages is {kind(turns)}, expected a list")
    messages, unlearnt, unmarked = [], set(range(read_only)), set()
    for number, turn in enumerate(turns, 1):
        try:
            message, learnt = _turn(turn)
        except BadRow as bad:
            raise BadRow(f"message {number}: {bad}") from None
        messages.append(message)
        if learnt is None:
            unmarked.add(number - 1)
        elif not learnt:
            unlearnt.add(number - 1)
    answers = {index for index, message in enumerate(messages) if message["role"] == "assistant"}
    if not answers:
        raise BadRow("no assistant turn, so there is nothing to learn")
    if messages[-1]["role"] != "assistant":
        raise BadRow("the last turn is not the assistant's; nothing would be learnt from it")
    if answers <= unlearnt:
        raise BadRow("every assistant turn is marked as not to be learnt, so there is nothing to learn")
    if train_on == "last":
        if max(answers) in unlearnt:
            raise BadRow("the last turn is marked as not to be learnt, and --train-on last learns no other")
        unlearnt |= answers - {max(answers)}
    if train_on == "field":
        unlearnt |= unmarked
        if answers <= unlearnt:
            raise BadRow('no assistant turn is marked, as by "weight": 1; --train-on field learns only such turns')
    return Conversation(tuple(messages), frozenset(unlearnt & answers))


def tools_of(value: Any) -> tuple[dict[str, Any], ...]:
    """The tools that a row offers, from a list of objects or such a list as JSON text. Empty without such a key."""
    tools = parsed_json(value, "tools")
    if is_empty(tools):
        return ()
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadRow(f"tools is {kind(tools)}, expected a list of objects")
    return tuple(tools)


def is_missing(value: Any) -> bool:
    """Whether a value is missing: null, or NaN as pandas writes it."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def is_empty(value: Any) -> bool:
    """Whether an optional value says nothing: it is missing, or an empty text, list or object."""
    return is_missing(value) or value in ("", [], {})


def parsed_json(value: Any, name: str = "") -> Any:
    """Parse a list or an object that is given as JSON text, as in the cells of a table. Other values are unchanged.

    name: what BadRow calls text that is not JSON; without a name such text is returned unchanged.
    """
    if not isinstance(value, str) or value.strip()[:1] not in ("[", "{"):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        if name:
            raise BadRow(f"{name} is text that is not JSON") from None
        return value


def _turn(turn: Any) -> tuple[dict[str, Any], bool | None]:
    """The message, and whether its marks say that it is learnt; None without a mark."""
    role_key, content_key = ("role", "content")
    if isinstance(turn, dict) and "role" not in turn and "from" in turn:
        role_key, content_key = ("from", "value")
    if not isinstance(turn, dict) or role_key not in turn:
        raise BadRow("expected the keys 'role' and 'content' (or 'from' and 'value')")
    role = _ROLES.get(str(turn[role_key]).lower())
    if role is None:
        raise BadRow(f"unknown role {turn[role_key]!r}; expected {', '.join(_ROLES)}")
    rest = {key: own for key, own in turn.items() if key not in (role_key, content_key) and not is_missing(own)}
    learnt = _learnt(rest, role)
    if rest.pop("function_call", None):
        raise BadRow("function_call is the old way to call a tool; write tool_calls")
    content = turn.get(content_key)
    if isinstance(content, list) and (thoughts := [part for part in content if _is_thought(part)]):
        content = [part for part in content if not _is_thought(part)]
        if "reasoning_content" in rest:
            raise BadRow("reasoning_content stands beside thoughts in content; leave one out")
        rest["reasoning_content"] = "\n".join(str(part.get("thinking", part.get("text", ""))) for part in thoughts)
    if str(turn[role_key]).lower() == "function_call" and isinstance(called := parsed_json(content), dict | list):
        rest["tool_calls"], content = (called if isinstance(called, list) else [called]), None
    calls = _calls(rest.pop("tool_calls", None))
    if calls and role != "assistant":
        raise BadRow(f"the role {role} cannot make tool_calls")
    if content_key not in turn and not calls:
        raise BadRow(f"expected the keys {role_key!r} and {content_key!r}")
    text = "" if calls and is_missing(content) else _content(content)
    if role == "assistant" and not text.strip() and not calls:
        raise BadRow("the assistant's content is empty, and it makes no tool_calls")
    message = {"role": role, "content": text, **rest}
    return (message | {"tool_calls": calls} if calls else message), learnt


def _learnt(rest: dict[str, Any], role: str) -> bool | None:
    """Take the marks of a turn out of its keys, and say whether it is to be learnt; None without a mark."""
    learnt: bool | None = None
    for key in [key for key in rest if _MARKS.search(key.lower())]:
        value = rest.pop(key)
        name = key.lower()
        if name not in (*_LEARNT, *_NOT_LEARNT) or value not in (0, 1):
            known = ", ".join((*_LEARNT, *_NOT_LEARNT))
            raise BadRow(f"{key} is {value!r}; a turn is marked by 0, 1, true or false of {known}")
        wanted = bool(value) != (name in _NOT_LEARNT)
        if wanted and role != "assistant" and name in _LEARNT:
            raise BadRow(f"{key} asks to learn a turn of the {role}; only the assistant's turns are learnt")
        learnt = wanted and learnt is not False
    return learnt


def _content(value: Any) -> str:
    if isinstance(value, list):
        value = "".join(_part(part, number) for number, part in enumerate(value, 1))
    if is_missing(value):
        raise BadRow("content is null")
    if not isinstance(value, str):
        raise BadRow(f"content is {kind(value)}, expected text")
    return value


def _is_thought(part: Any) -> bool:
    """Whether a part of content holds thoughts, as {"type": "thinking", "thinking": "…"} does."""
    return isinstance(part, dict) and part.get("type") in ("thinking", "reasoning")


def _part(part: Any, number: int) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise BadRow(f"part {number} of content is {kind(part)}, expected text")
    if (found := part.get("type", "text")) != "text":
        raise BadRow(f"holds {found}; only text is supported")
    if not isinstance(part.get("text"), str):
        raise BadRow(f"the text of part {number} of content is {kind(part.get('text'))}")
    return str(part["text"])


def _calls(value: Any) -> list[dict[str, Any]]:
    """Tool calls as chat templates take them: {"type", "function": {"name", "arguments"}}, with parsed arguments."""
    calls = parsed_json(value, "tool_calls")
    if is_empty(calls):
        return []
    if not isinstance(calls, list):
        raise BadRow(f"tool_calls is {kind(calls)}, expected a list")
    return [_call(call, number) for number, call in enumerate(calls, 1)]


def _call(call: Any, number: int) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise BadRow(f"tool_calls {number}: expected {{'function': {{'name', 'arguments'}}}}")
    arguments = parsed_json(function.get("arguments"), f"tool_calls {number}: arguments")
    around = {} if function is call else {key: own for key, own in call.items() if not is_missing(own)}
    return {"type": "function", **around, "function": {**function, "arguments": {} if arguments is None else arguments}}
