"""Convert a row to an example. The keys of the row decide its shape.

Shapes, in this order (messages_field and the like map other keys to these):

    messages                            chat: a list of {"role", "content"}, with "tools" and "system" beside it
    conversations                       the same under ShareGPT's name, usually {"from", "value"}
    prompt + completion                 two texts, or either a list of messages
    instruction [+ input] + output      Alpaca
    text [+ text_pair] + label          classification; a label with a fraction makes it regression, a list multi-label
    sentence1 + sentence2 + label       the same under GLUE's names
    text                                plain text
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..core.words import suggestion
from .conversations import BadRow, Conversation, TrainOn, conversation, is_empty, is_missing, parsed_json, tools_of
from .rows import Row, kind

SHAPES = "messages | conversations | prompt+completion | instruction+output | text+label | text"
# Keys that change the meaning of a row and are not supported, with what to do instead.
_REFUSED = {
    "history": "put the earlier turns into messages",
    "functions": "it is the old name of tools",
    "function_call": "write tool_calls",
    "documents": "put them into the prompt",
    "chat_template_kwargs": "rows of one kind belong into one file",
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), "only text is supported"),
}
_WEIGHTS = ("weight", "loss_weight", "sample_weight", "train", "loss_mask")
# Other names of the roles, for hints.
_ASKS = ("question", "query", "request", "input", "source", "instruction", "problem", "prompt", "user")
_ANSWERS = ("answer", "response", "output", "target", "reply", "completion", "chosen", "solution", "assistant")
_TEXTS = ("text", "sentence", "content", "review", "body", "comment", "tweet", "document", "utterance", "query")
_LABELS = ("label", "labels", "class", "category", "intent", "sentiment", "emotion", "score", "rating", "stars")
_PAIRS = (("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"), ("text1", "text2"))

Label = str | float | tuple[str, ...]  # a class, a number, or all classes of a multi-label row


@dataclass(frozen=True)
class Example:
    """One row in one of three forms: messages; prompt and completion; text, perhaps with a label."""

    where: str  # "train.jsonl:3"
    messages: tuple[dict[str, Any], ...] | None = None
    prompt: str | None = None
    completion: str | None = None
    others: tuple[str, ...] = ()  # other right completions
    text: str | None = None
    text_pair: str | None = None
    label: Label | None = None
    tools: tuple[dict[str, Any], ...] = ()  # the tools that the assistant may call
    unlearnt: frozenset[int] = frozenset()  # indices of assistant turns that are read, not learnt
    adapter: str | None = None  # the one of several adapters that learns or answers this row


def parse(row: Row, fields: Mapping[str, str], train_on: TrainOn = "all") -> tuple[str, Example, set[str]]:
    """The shape of a row, its example, and the row's keys that hold something but were not read. Raises BadRow.

    fields: the file's keys for roles, as `read_data` takes them. train_on: which turns of a conversation are learnt;
    of a prompt with its completion it is the completion.
    """
    values = _renamed(row.values, fields)
    keys = values.keys()
    if "messages" in keys or "conversations" in keys:
        shape = "messages" if "messages" in keys else "conversations"
        example, used = _chat(row, values, conversation(values[shape], train_on=train_on)), {shape, "tools", "system"}
    elif "prompt" in keys and ({"completion", "references"} & keys):
        shape, used = "prompt+completion", {"prompt", "completion", "references", "tools", "system"}
        example = _pair(row, values, values["prompt"], values.get("completion"))
    elif {"instruction", "output"} <= keys:
        shape, used = "instruction+output", {"instruction", "input", "output", "tools", "system"}
        more = None if is_empty(values.get("input")) else _text(values, "input", empty=True)
        prompt = _text(values, "instruction") + (f"\n\n{more}" if more and more.strip() else "")
        example = _pair(row, values, prompt, _text(values, "output"))
    elif "label" in keys and ("text" in keys or {"sentence1", "sentence2"} <= keys):
        first, second = ("text", "text_pair") if "text" in keys else ("sentence1", "sentence2")
        shape, used = "text+label", {first, second, "label"}
        pair = _text(values, second) if second in keys else None
        example = Example(row.where, text=_text(values, first), text_pair=pair, label=_label(values["label"]))
    elif "text" in keys:
        shape, used = "text", {"text"}
        example = Example(row.where, text=_text(values, "text"))
    else:
        raise BadRow(_unknown_keys(row))
    unread = {key for key in keys - used if not is_empty(values[key])}
    _refuse(values, unread)
    return shape, example, unread


def _renamed(values: dict[str, Any], fields: Mapping[str, str]) -> dict[str, Any]:
    renamed = dict(values)
    for role, key in fields.items():
        keys = [part.strip() for part in key.split(",")] if role == "text" else [key]
        for name, key in zip(("text", "text_pair") if role == "text" else (role,), keys, strict=False):
            if key not in values:
                hint = suggestion(key, values)
                raise BadRow(f"no key {key!r} (--{role}-field {fields[role]}); found {sorted(values)}.{hint}")
            renamed.pop(key, None)
            renamed[name] = values[key]
    return renamed


def _refuse(values: Mapping[str, Any], unread: set[str]) -> None:
    for key in sorted(unread):
        if key.lower() in _REFUSED:
            raise BadRow(f"{key} cannot be used: {_REFUSED[key.lower()]}; or leave the key out")
        if key.lower() in _WEIGHTS and values[key] != 1:
            raise BadRow(f"{key} is {values[key]!r}; rows are learnt alike, so leave out those that are not meant")


# --- the shapes ----------------------------------------------------------------------------------------------------


def _text(values: Mapping[str, Any], key: str, *, empty: bool = False) -> str:
    value = values[key]
    if is_missing(value):
        raise BadRow(f"{key} is null")
    if not isinstance(value, str):
        raise BadRow(f"{key} is {kind(value)}, expected text")
    if not (empty or value.strip()):
        raise BadRow(f"{key} is empty")
    return value


def _chat(row: Row, values: Mapping[str, Any], said: Conversation, others: tuple[str, ...] = ()) -> Example:
    """A conversation, with the row's own system message and tools."""
    messages, unlearnt = said.messages, said.unlearnt
    system = values.get("system")
    if not is_empty(system):
        system = _text(values, "system")
        if messages[0]["role"] == "system":
            raise BadRow("system stands beside messages that begin with a system message; leave one out")
        messages = ({"role": "system", "content": system}, *messages)
        unlearnt = frozenset(index + 1 for index in unlearnt)
    return Example(row.where, messages=messages, tools=tools_of(values.get("tools")), unlearnt=unlearnt, others=others)


def _pair(row: Row, values: Mapping[str, Any], prompt: Any, completion: Any) -> Example:
    """Two texts stay a pair. If one is a list of messages, or the row has tools or a system message, they become a
    conversation, in which the prompt is read, not learnt.
    """
    if _holds_messages(completion):
        asked = prompt
        if not _holds_messages(prompt):
            asked = [{"role": "user", "content": _text({"prompt": prompt}, "prompt")}]
        return _chat(row, values, conversation([*asked, *completion], read_only=len(asked)))
    references = values.get("references")
    references = [] if is_missing(references) else references
    if not isinstance(references, list):
        raise BadRow(f"references is {kind(references)}, expected a list of texts")
    right = {"completion": completion} if "completion" in values or completion is not None else {}
    right |= {f"reference {number}": text for number, text in enumerate(references, 1)}
    texts = list(dict.fromkeys(_text(right, key) for key in right))
    if not texts:
        raise BadRow("references is empty")
    others = tuple(texts[1:])
    if not _holds_messages(prompt):
        if isinstance(prompt, list):
            prompt = _linear(prompt)
        prompt = _text({"prompt": prompt}, "prompt")
        if is_empty(values.get("tools")) and is_empty(values.get("system")):
            return Example(row.where, prompt=prompt, completion=texts[0], others=others)
        prompt = [{"role": "user", "content": prompt}]
    turns = [*prompt, {"role": "assistant", "content": texts[0]}]
    return _chat(row, values, conversation(turns, read_only=len(prompt)), others)


def _holds_messages(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(turn, dict) for turn in value)


def _linear(parts: Sequence[Any]) -> str:
    """Records as one line, in the form of the LoRA paper's GPT-2 experiments: "subject : relation : object | …"."""
    if any(isinstance(part, dict) for part in parts):
        raise BadRow("prompt is a list that mixes objects with other things; expected messages or records")
    texts = [part.replace(" | ", " : ") if isinstance(part, str) else " : ".join(map(str, part)) for part in parts]
    return " | ".join(" ".join(text.split()) for text in texts)


def _label(value: Any) -> Label:
    """A class as text, or a float as a number. An int becomes text, because the task is not known yet. A list of
    classes becomes a tuple of texts.
    """
    if isinstance(value, list):
        classes = tuple(str(_label(own)) for own in value if not isinstance(own, list | float))
        if len(classes) != len(value):
            raise BadRow(f"label is {value!r}, expected a list of classes")
        if len(set(classes)) != len(classes):
            raise BadRow(f"label is {value!r}, which names a class twice")
        return classes
    if is_missing(value):
        raise BadRow("label is null")
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        if not math.isfinite(value):
            raise BadRow(f"label is {value}")
        return float(value) if isinstance(value, float) else str(value)
    if not isinstance(value, str):
        raise BadRow(f"label is {kind(value)}, expected a class, a list of classes or a number")
    if not value.strip():
        raise BadRow("label is empty")
    return value.strip()


# --- rows of no known shape ----------------------------------------------------------------------------------------


def _unknown_keys(row: Row) -> str:
    keys = list(row.values)
    message = f"found keys {keys}, expected one of: {SHAPES}."
    if flags := _mapping(row.values):
        message += f" Map them: {flags}"
    if row.where.partition(":")[0].lower().endswith((".csv", ".tsv")):
        message += " (The first line of the file names its columns.)"
    return message


def _mapping(values: Mapping[str, Any]) -> str:
    """The flags that would map a row's keys to a shape, or ""."""
    keys = list(values)

    def named(names: Sequence[str], besides: str | None = None) -> str | None:
        wanted = [key for name in names for key in keys if key.strip().lower() == name and key != besides]
        return next(iter(wanted), None)

    if chat := next((key for key in keys if _are_turns(parsed_json(values[key]))), None):
        return f"--messages-field {_quoted(chat)}"
    pair = next((pair for pair in _PAIRS if all(named([name]) for name in pair)), None)
    label = named(_LABELS)
    text = ",".join(str(named([name])) for name in pair) if pair else named(_TEXTS, label)
    asks = named(_ASKS)
    answers = named(_ANSWERS, asks)
    roles = {"prompt": asks, "completion": answers} if asks and answers else {"text": text, "label": label}
    if all(roles.values()):
        return " ".join(f"--{role}-field {_quoted(str(key))}" for role, key in roles.items() if key != role)
    if len(keys) == 2 and all(isinstance(value, str) for value in values.values()):
        one, two = map(_quoted, keys)
        return (
            f"--prompt-field {one} --completion-field {two} (to answer), or --text-field {one} --label-field {two} (to "
            "classify)"
        )
    return ""


def _are_turns(value: Any) -> bool:
    return _holds_messages(value) and all(turn.keys() & {"role", "from"} for turn in value)


def _quoted(key: str) -> str:
    return key if key.replace("_", "").replace(",", "").replace("-", "").isalnum() else f'"{key}"'
