"""The meaning of rows: marks, optional columns, keys that are not read, labels, and repeated rows."""

import json
from collections import Counter
from pathlib import Path

import pytest

from lorakit.training.data import Data, read_data
from lorakit.training.rows import DataError

USER, GOOD = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "good"}


def write(folder: Path, *rows: object) -> str:
    path = folder / "d.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def one(folder: Path, row: object, **options: object) -> Data:
    return read_data(write(folder, row), holdout=0, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "mark",
    [
        *({"weight": value} for value in (0, 0.0, False)),
        *({key: False} for key in ("train", "training", "trainable", "learn", "loss", "train_on_turn")),
        *({key: 0} for key in ("loss_mask", "loss_weight", "step_loss_mask")),
        *({key: True} for key in ("mask", "masked")),
        {"ignore_loss": 1},
    ],
)
@pytest.mark.parametrize("key", ["messages", "conversations"])
def test_a_turn_marked_as_not_to_be_learnt(mark: dict, key: str, tmp_path: Path) -> None:
    bad = {"role": "assistant", "content": "bad", **mark}
    example = one(tmp_path, {key: [USER, bad, USER, GOOD]}).train[0]
    assert example.unlearnt == {1}
    assert example.messages is not None and example.messages[1] == {"role": "assistant", "content": "bad"}
    with pytest.raises(DataError, match=r"d.jsonl:1: every assistant turn is marked as not to be learnt"):
        one(tmp_path, {key: [USER, bad]})


@pytest.mark.parametrize("mark", [{"weight": 1}, {"train": True}, {"loss": None}, {"mask": 0}, {"weight": 1.0}])
def test_a_turn_marked_as_to_be_learnt(mark: dict, tmp_path: Path) -> None:
    assert one(tmp_path, {"messages": [USER, {**GOOD, **mark}]}).train[0].unlearnt == frozenset()


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        ({**GOOD, "weight": 0.5}, "message 2: weight is 0.5; a turn is marked by 0, 1"),
        ({**GOOD, "weight": "0"}, "message 2: weight is '0'"),
        ({**GOOD, "train_detail": [{"begin_offset": 0}]}, "message 2: train_detail is"),
        ({**GOOD, "loss_mask": [0, 1]}, r"message 2: loss_mask is \[0, 1\]"),
        ({**GOOD, "function_call": {"name": "f"}}, "message 2: function_call is the old way"),
        ({**GOOD, "tool_calls": [{"function": {}}]}, "message 2: tool_calls 1: expected"),
        (
            {**GOOD, "tool_calls": [{"function": {"name": "f", "arguments": "{x"}}]},
            "arguments is text that is not JSON",
        ),
        ({"role": "assistant"}, "message 2: expected the keys 'role' and 'content'"),
        ({"role": "assistant", "content": None, "tool_calls": []}, "message 2: content is null"),
        ({"role": "assistant", "content": [{"type": "text", "text": None}]}, "the text of part 1 of content is null"),
        ({"role": "assistant", "content": [{"type": "text"}]}, "the text of part 1 of content is null"),
        ({"role": "assistant", "content": [{"type": ["text"], "text": "x"}]}, r"holds \['text'\]; only text"),
        ({"role": "assistant", "content": [5]}, "part 1 of content is a number, expected text"),
        ("hello", "message 2: expected the keys 'role' and 'content'"),
    ],
)
def test_turns_that_are_refused(turn: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"^d.jsonl:1: .*{message}"):
        one(tmp_path, {"messages": [USER, turn]})


def test_turns_in_the_words_of_other_programs(tmp_path: Path) -> None:
    capitals = [
        {"role": "User", "content": "a"},
        {"role": "ASSISTANT", "content": ["b", {"type": "text", "text": "c"}]},
    ]
    assert one(tmp_path, {"messages": capitals}).train[0].messages == (
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "bc"},
    )
    factory = [
        {"from": "human", "value": "a"},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
        {"from": "observation", "value": "1"},
        {"from": "gpt", "value": "b"},
    ]
    messages = one(tmp_path, {"conversations": factory}).train[0].messages
    assert messages is not None and [turn["role"] for turn in messages] == ["user", "assistant", "tool", "assistant"]
    assert messages[1]["tool_calls"] == [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]


@pytest.mark.parametrize("arguments", [{"city": "Rome"}, '{"city": "Rome"}'])
@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}, {"content": "wait"}])
@pytest.mark.parametrize("as_text", [False, True])
def test_tool_calls_in_every_form(arguments: object, content: dict, as_text: bool, tmp_path: Path) -> None:
    calls: object = [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": arguments}}]
    tools: object = [{"type": "function", "function": {"name": "f"}}]
    if as_text:
        calls, tools = json.dumps(calls), json.dumps(tools)
    turns = [USER, {"role": "assistant", **content, "tool_calls": calls}]
    example = one(tmp_path, {"messages": turns, "tools": tools}).train[0]
    assert example.tools == ({"type": "function", "function": {"name": "f"}},)
    assert example.messages is not None
    assert example.messages[1]["content"] == (content.get("content") or "")
    assert example.messages[1]["tool_calls"] == [
        {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"city": "Rome"}}}
    ]


def test_what_a_prompt_holds_is_not_learnt(tmp_path: Path) -> None:
    prompt = [USER, {"role": "assistant", "content": "said"}, USER]
    for completion in ("good", [GOOD]):
        example = one(tmp_path, {"prompt": prompt, "completion": completion}).train[0]
        assert example.messages == (*prompt, GOOD) and example.unlearnt == {1}
    assert one(tmp_path, {"prompt": "hi", "completion": [GOOD]}).train[0].messages == (USER, GOOD)
    with_system = one(tmp_path, {"system": "S", "instruction": "hi", "output": "good"}).train[0]
    assert with_system.messages == ({"role": "system", "content": "S"}, USER, GOOD)


@pytest.mark.parametrize("nothing", ["NaN", "null", '""', '" "'])
def test_an_optional_column_without_a_value(nothing: str, tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(f'{{"instruction": "a", "input": {nothing}, "output": "b", "tools": {nothing.replace(" ", "")}}}')
    assert read_data(str(path), holdout=0).train[0].prompt == "a"


@pytest.mark.parametrize("value", [["x"], {"k": 1}, 0, True, 2.5])
@pytest.mark.parametrize("key", ["input", "system", "tools", "references"])
def test_an_optional_column_of_another_kind(value: object, key: str, tmp_path: Path) -> None:
    row = {"instruction": "a", "output": "b", "input": "c"}
    if key == "references":
        row = {"prompt": "a", "completion": "b"}
        value = value if value != ["x"] else [1]
    if key == "tools" and value == {"k": 1}:
        value = [1]
    with pytest.raises(DataError, match=f"^d.jsonl:1: .*{key.rstrip('s')}"):
        one(tmp_path, row | {key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [("weight", 0), ("loss_mask", 0), ("history", [["a", "b"]]), ("functions", [{"name": "f"}]), ("images", ["a.png"]),
     ("documents", ["x"]), ("chat_template_kwargs", {"enable_thinking": False})],
)  # fmt: skip
def test_keys_that_change_what_a_row_means_are_refused(key: str, value: object, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"^d.jsonl:1: {key} "):
        one(tmp_path, {"prompt": "a", "completion": "b", key: value})
    assert one(tmp_path, {"prompt": "a", "completion": "b", key: None}).notes == []


def test_keys_that_are_not_read_are_said(tmp_path: Path) -> None:
    assert one(tmp_path, {"prompt": "a", "completion": "b", "id": 1, "category": "x", "empty": None}).notes == [
        "keys that are not read: category, id"
    ]


@pytest.mark.parametrize(
    ("row", "flags"),
    [
        ({"sentence": "a", "label": 1}, "--text-field sentence"),
        ({"review": "a", "stars": 1}, "--text-field review --label-field stars"),
        ({"premise": "a", "hypothesis": "b", "label": 1}, "--text-field premise,hypothesis"),
        ({"query": "a", "intent": "b"}, "--text-field query --label-field intent"),
        ({"question": "a", "context": "c", "answer": "b"}, "--prompt-field question --completion-field answer"),
        ({"Prompt": "a", "Completion": "b"}, "--prompt-field Prompt --completion-field Completion"),
        ({"prompt": "a", "response": "b"}, "--completion-field response"),
        ({"dialog": [USER, GOOD]}, "--messages-field dialog"),
        ({"my question": "a", "answer": "b"}, '--prompt-field "my question" --completion-field answer'),
    ],
)
def test_the_hint_is_one_that_works(row: dict, flags: str, tmp_path: Path) -> None:
    import shlex

    with pytest.raises(DataError) as error:
        one(tmp_path, row)
    hint = str(error.value).rpartition("Map them: ")[2].partition(" (to answer)")[0]
    assert hint == flags
    words = shlex.split(hint)
    fields = {flag[2:].removesuffix("-field"): key for flag, key in zip(words[::2], words[1::2], strict=True)}
    other = {**row, "label": 2} if "label" in row else {**row, **({"stars": 2} if "stars" in row else {})}
    other |= {"intent": "c"} if "intent" in row else {}
    assert len(read_data(write(tmp_path, row, other), fields=fields, holdout=0).train) == 2


def labelled(folder: Path, labels: list, **options: object) -> Data:
    rows = [{"text": f"t{index}", "label": label} for index, label in enumerate(labels)]
    return read_data(write(folder, *rows), holdout=0, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("labels", "task", "expected"),
    [
        ([1, 2, 3], "regression", [1.0, 2.0, 3.0]),
        (["1", "2.5", "-3e0"], "regression", [1.0, 2.5, -3.0]),
        ([0.5, 1, "2"], "auto", [0.5, 1.0, 2.0]),
        ([1.0, 2.0, 10], "auto", ["1", "2", "10"]),
        (["10", "9", "1"], "auto", ["10", "9", "1"]),
        ([0.5, 1.5], "classification", ["0.5", "1.5"]),
        ([True, False], "auto", ["true", "false"]),
        (["b ", " a"], "auto", ["b", "a"]),
        ([1, "a"], "auto", ["1", "a"]),
    ],
)
def test_labels_as_the_task_takes_them(labels: list, task: str, expected: list, tmp_path: Path) -> None:
    data = labelled(tmp_path, labels, task=task)
    assert [example.label for example in data.train] == expected
    assert (data.task == "regression") == isinstance(expected[0], float) == (not data.labels)
    if data.labels and labels == ["10", "9", "1"]:
        assert data.labels == ("1", "9", "10")


@pytest.mark.parametrize(
    ("labels", "task", "message"),
    [
        ([1, 2, "three"], "regression", r"d.jsonl:3: the label 'three' is not a number \(--task regression\)"),
        ([True, False], "regression", r"d.jsonl:1: the label 'true' is not a number"),
        ([0.5, 1.5, "nan"], "auto", r"d.jsonl:3: the label 'nan' is not a number \(d.jsonl:1 has 0.5; for classes"),
        ([2, 2, 2], "regression", "all rows of the training split have the label 2.0"),
        (["a", "a"], "auto", "all rows of the training split have the label 'a'"),
        ([1, 2, [0, 1]], "auto", "d.jsonl:3: the label is a list, and most rows have a class or a number"),
        ([1, {"a": 1}], "auto", "d.jsonl:2: label is an object, expected a class, a list of classes or a number"),
        ([1, float("nan")], "auto", "d.jsonl:2: label is null"),
        ([1, float("inf")], "auto", "d.jsonl:2: label is inf"),
    ],
)
def test_labels_that_are_refused(labels: list, task: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        labelled(tmp_path, labels, task=task)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("share", [0.05, 0.3, 0.6])
def test_rows_that_ask_the_same_stay_together(seed: int, share: float, tmp_path: Path) -> None:
    rows = [{"prompt": f"p{index % 12}", "completion": f"c{index % 5}"} for index in range(60)]
    rows += [{"prompt": f"alone {index}", "completion": "c"} for index in range(20)]
    data = read_data(write(tmp_path, *rows), holdout=share, seed=seed)
    assert not {example.prompt for example in data.train} & {example.prompt for example in data.valid}
    assert len(data.valid) == round(share * 80) or share == 0.6
    assert len(data.train) + len(data.valid) == 80 and 0 < len(data.valid) <= round(share * 80)


def test_rows_that_cannot_stay_together_are_said(tmp_path: Path) -> None:
    data = read_data(write(tmp_path, *[{"prompt": "p", "completion": f"c{index}"} for index in range(20)]), holdout=0.2)
    assert len(data.valid) == 4
    assert "4 of the 4 valid rows ask the same as training rows (duplicates)" in data.notes[-1]
    (tmp_path / "train.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 3)
    (tmp_path / "test.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "c", "completion": "b"}\n')
    (tmp_path / "d.jsonl").unlink()
    assert "1 of the 2 test rows ask the same as training rows" in read_data(str(tmp_path)).notes[-1]


@pytest.mark.parametrize("seed", range(6))
def test_no_class_loses_its_last_row_to_the_holdout(seed: int, tmp_path: Path) -> None:
    labels = ["a", "b"] * 20 + [f"rare{index}" for index in range(6)] + ["twice", "twice"]
    rows = [{"text": f"t{index}", "label": label} for index, label in enumerate(labels)]
    data = read_data(write(tmp_path, *rows), holdout=0.4, seed=seed)
    assert {example.label for example in data.train} == set(labels) == set(data.labels)
    assert len(data.valid) == round(0.4 * len(rows))
    assert Counter(e.label for e in (*data.train, *data.valid)) == Counter(labels)


@pytest.mark.parametrize("holdout", [0.1, 0.5])
def test_numbers_to_predict_are_no_classes_to_the_holdout(holdout: float, tmp_path: Path) -> None:
    rows = [{"text": f"t{index}", "label": index + 0.5} for index in range(20)]
    data = read_data(write(tmp_path, *rows), holdout=holdout)
    assert (data.task, len(data.valid)) == ("regression", 20 * holdout)
    assert len(data.notes) == 1


TALK = [USER, {**GOOD, "content": "one"}, USER, {**GOOD, "content": "two"}, USER, {**GOOD, "content": "three"}]


@pytest.mark.parametrize(
    ("train_on", "marks", "unlearnt"),
    [
        ("all", {}, set()),
        ("all", {1: 0}, {1}),
        ("all", {1: 1}, set()),
        ("last", {}, {1, 3}),
        ("last", {1: 1}, {1, 3}),
        ("field", {3: 1}, {1, 5}),
        ("field", {1: 1, 5: 0}, {3, 5}),
        ("field", {1: 1, 3: 1, 5: 1}, set()),
    ],
)
@pytest.mark.parametrize("key", ["weight", "train", "mask"])
def test_the_turns_that_are_learnt(train_on: str, marks: dict, unlearnt: set, key: str, tmp_path: Path) -> None:
    turns = [{**turn, key: (marks[i] != (key == "mask"))} if i in marks else turn for i, turn in enumerate(TALK)]
    assert one(tmp_path, {"messages": turns}, train_on=train_on).train[0].unlearnt == unlearnt
    with_system = one(tmp_path, {"messages": turns, "system": "Be kind."}, train_on=train_on).train[0]
    assert with_system.unlearnt == {index + 1 for index in unlearnt}
    pair = one(tmp_path, {"prompt": [USER], "completion": [GOOD]}, train_on=train_on).train[0]
    assert pair.unlearnt == frozenset()


@pytest.mark.parametrize(
    ("train_on", "turns", "message"),
    [
        ("field", TALK, 'no assistant turn is marked, as by "weight": 1'),
        ("field", [*TALK[:1], {**GOOD, "weight": 0}, *TALK[2:]], "no assistant turn is marked"),
        ("last", [*TALK[:5], {**GOOD, "weight": 0}], "the last turn is marked as not to be learnt"),
    ],
)
def test_conversations_without_a_turn_to_learn(train_on: str, turns: list, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"d.jsonl:1: {message}"):
        one(tmp_path, {"messages": turns}, train_on=train_on)
