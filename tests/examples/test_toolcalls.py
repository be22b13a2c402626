"""The data set that ships with lorakit is as described: sizes, types, a test split that shares nothing with train."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "examples" / "toolcalls"
TYPES: dict[str, Any] = {"string": str, "integer": int, "number": (int, float), "boolean": bool, "array": list}
# Arguments that are copied from the request and can be any text.
OPEN = {
    *(("set_timer", "label"), ("send_message", "to"), ("send_message", "text"), ("create_event", "title")),
    *(("play_music", "artist"), ("get_weather", "city"), ("add_to_list", "items")),
    *(("get_directions", "destination"), ("translate", "text")),
}
DAYS = r"today|tomorrow|monday|tuesday|wednesday|thursday|friday|saturday|sunday"

Call = tuple[str, str, dict]


def calls(split: str) -> list[Call]:
    rows = []
    for line in (FOLDER / f"{split}.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        call = json.loads(row["completion"])
        rows.append((row["prompt"], call["name"], call["arguments"]))
    return rows


def values(argument: object) -> list[str]:
    return [str(value) for value in (argument if isinstance(argument, list) else [argument])]


def frame(call: Call) -> tuple[str, ...]:
    """The words of a request with its values, days and numbers left blank."""
    text, _, arguments = call
    for value in sorted((v for a in arguments.values() for v in values(a)), key=len, reverse=True):
        text = re.sub(re.escape(value), "_", text, flags=re.IGNORECASE)
    text = re.sub(rf"\b({DAYS})('s)?\b", "_", text, flags=re.IGNORECASE)
    text = re.sub(r"\d[\d:.]*( ?[ap]m)?", "_", text)
    return tuple(re.findall(r"[a-z'_-]+", text.lower()))


def test_sizes_and_balance() -> None:
    for split, each in (("train", 40), ("valid", 4), ("test", 8)):
        assert set(Counter(tool for _, tool, _ in calls(split)).values()) == {each}
    assert len({prompt.lower() for split in ("train", "valid", "test") for prompt, _, _ in calls(split)}) == 624


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_every_call_fits_its_tool(split: str) -> None:
    tools = {tool["name"]: tool["parameters"]["properties"] for tool in json.loads((FOLDER / "tools.json").read_text())}
    assert len(tools) == 12
    for prompt, tool, arguments in calls(split):
        assert list(arguments) == list(tools[tool]), prompt
        for name, value in arguments.items():
            schema = tools[tool][name]
            assert isinstance(value, TYPES[schema["type"]]), prompt
            assert isinstance(value, bool) == (schema["type"] == "boolean"), prompt
            assert value in schema.get("enum", [value]), prompt
            assert re.fullmatch(schema.get("pattern", ".*"), str(value)), prompt
            if (tool, name) in OPEN:
                assert all(item in prompt for item in values(value)), prompt


def test_the_test_split_shares_no_open_value_and_no_frame_with_training() -> None:
    seen, unseen = calls("train") + calls("valid"), calls("test")

    def open_values(rows: list[Call]) -> set[str]:
        return {v.lower() for _, tool, a in rows for name in a if (tool, name) in OPEN for v in values(a[name])}

    assert open_values(seen) & open_values(unseen) == set()
    assert {json.dumps(a) for _, t, a in seen if t == "convert_units"}.isdisjoint(json.dumps(a) for _, _, a in unseen)
    assert {json.dumps(a) for _, t, a in seen if t == "set_alarm"}.isdisjoint(json.dumps(a) for _, _, a in unseen)
    frames = Counter(map(frame, unseen))
    assert max(frames.values()) == 1
    assert not set(frames) & set(map(frame, seen))

    def runs(words: tuple[str, ...]) -> set[tuple[str, ...]]:
        grams = {words[i : i + 4] for i in range(len(words) - 3)}
        return {gram for gram in grams if "_" not in gram}

    known = set().union(*(runs(frame(call)) for call in seen))
    assert sum(bool(runs(frame(call)) & known) for call in unseen) <= 3


def test_training_phrasings_are_varied() -> None:
    frames: dict[str, set[tuple[str, ...]]] = {}
    for call in calls("train"):
        frames.setdefault(call[1], set()).add(frame(call))
    assert min(map(len, frames.values())) >= 30
