"""The data set that ships with lorakit is as described: sizes, types, test splits that share nothing with train."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from lorakit.training.folders import passed_over, split_files

FOLDER = Path(__file__).parents[2] / "examples" / "toolcalls"
# A split is FOLDER/name.jsonl, with the number of its rows for each tool.
SPLITS = {"train": 40, "valid": 4, "test": 8, "fresh/test": 8}
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
    for split, each in SPLITS.items():
        counts = Counter(tool for _, tool, _ in calls(split))
        assert len(counts) == 12
        assert set(counts.values()) == {each}
    assert len({prompt.lower() for split in SPLITS for prompt, _, _ in calls(split)}) == 720


def test_training_on_the_folder_does_not_read_the_fresh_split() -> None:
    found = split_files(FOLDER)
    assert found == {split: [FOLDER / f"{split}.jsonl"] for split in ("train", "valid", "test")}
    assert passed_over(found) == ["tools.json"]  # what is passed over is named in a note
    assert split_files(FOLDER / "fresh")["test"] == [FOLDER / "fresh" / "test.jsonl"]


@pytest.mark.parametrize("split", SPLITS)
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


@pytest.mark.parametrize(
    ("split", "others", "alike"), [("test", ("train", "valid"), 2), ("fresh/test", ("train", "valid", "test"), 0)]
)
def test_a_test_split_shares_no_open_value_and_no_frame_with_others(
    split: str, others: tuple[str, ...], alike: int
) -> None:
    seen, unseen = [call for other in others for call in calls(other)], calls(split)

    def open_values(rows: list[Call]) -> set[str]:
        return {v.lower() for _, tool, a in rows for name in a if (tool, name) in OPEN for v in values(a[name])}

    assert open_values(seen) & open_values(unseen) == set()

    def quantities(rows: list[Call]) -> set[tuple[str, object]]:
        number = {"set_timer": "minutes", "set_alarm": "time", "convert_units": "value"}
        return {(tool, a[number[tool]]) for _, tool, a in rows if tool in number}

    assert quantities(seen) & quantities(unseen) == set()
    rooms = {json.dumps(a) for _, tool, a in seen if tool == "set_temperature"}
    assert rooms.isdisjoint(json.dumps(a) for _, tool, a in unseen if tool == "set_temperature")
    frames = Counter(map(frame, unseen))
    assert max(frames.values()) == 1
    assert not set(frames) & set(map(frame, seen))

    def runs(words: tuple[str, ...]) -> set[tuple[str, ...]]:
        grams = {words[i : i + 4] for i in range(len(words) - 3)}
        return {gram for gram in grams if "_" not in gram}

    known = set().union(*(runs(frame(call)) for call in seen))
    assert sum(bool(runs(frame(call)) & known) for call in unseen) == alike


def test_training_phrasings_are_varied() -> None:
    frames: dict[str, set[tuple[str, ...]]] = {}
    for call in calls("train"):
        frames.setdefault(call[1], set()).add(frame(call))
    assert min(map(len, frames.values())) >= 30
