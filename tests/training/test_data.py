"""Reading data files: the shapes, the splits, and everything that can be wrong with a row."""

import json
from pathlib import Path

import pytest

from lorakit.training.data import Example, read_data
from lorakit.training.rows import DataError

PAIR = {"prompt": "a", "completion": "b"}


def write(path: Path, *rows: object) -> str:
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return str(path)


@pytest.mark.parametrize(
    ("row", "shape", "expected"),
    [
        (PAIR, "prompt+completion", Example("d.jsonl:1", prompt="a", completion="b")),
        (
            {"instruction": "Add", "input": "1+1", "output": "2"},
            "instruction+output",
            Example("d.jsonl:1", prompt="Add\n\n1+1", completion="2"),
        ),
        (
            {"instruction": "Add", "input": "", "output": "2"},
            "instruction+output",
            Example("d.jsonl:1", prompt="Add", completion="2"),
        ),
        ({"text": "hello"}, "text", Example("d.jsonl:1", text="hello")),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
            "messages",
            Example("d.jsonl:1", messages=({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})),
        ),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
            "conversations",
            Example("d.jsonl:1", messages=({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})),
        ),
        (
            {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]},
            "prompt+completion",
            Example("d.jsonl:1", messages=({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})),
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "a"}]},
                    {"role": "assistant", "content": "b"},
                ]
            },
            "messages",
            Example("d.jsonl:1", messages=({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})),
        ),
    ],
    ids=["pair", "alpaca", "alpaca-no-input", "text", "messages", "sharegpt", "pair-of-messages", "parts"],
)
def test_shapes(row: dict, shape: str, expected: Example, tmp_path: Path) -> None:
    data = read_data(write(tmp_path / "d.jsonl", row), holdout=0)
    assert (data.shape, data.task, data.train) == (shape, "causal-lm", [expected])


def test_formats_hold_the_same_rows(tmp_path: Path) -> None:
    rows = [{"prompt": 'say "hi",\nplease', "completion": "hi"}, {"prompt": "ü", "completion": "ö"}]
    write(tmp_path / "a.jsonl", *rows)
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.csv").write_text('prompt,completion\n"say ""hi"",\nplease",hi\nü,ö\n', encoding="utf-8-sig")
    (tmp_path / "a.tsv").write_text('prompt\tcompletion\n"say ""hi"",\nplease"\thi\nü\tö\n', encoding="utf-8")
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    seen = {}
    for kind in ("jsonl", "json", "csv", "tsv", "parquet"):
        examples = read_data(str(tmp_path / f"a.{kind}"), holdout=0).train
        assert [(e.prompt, e.completion) for e in examples] == [(r["prompt"], r["completion"]) for r in rows]
        seen[kind] = [e.where for e in examples]
    assert seen == {
        "jsonl": ["a.jsonl:1", "a.jsonl:2"],
        "json": ["a.json[0]", "a.json[1]"],
        "csv": ["a.csv:2", "a.csv:4"],  # the first row spans two lines
        "tsv": ["a.tsv:2", "a.tsv:4"],
        "parquet": ["a.parquet row 1", "a.parquet row 2"],
    }
    (tmp_path / "a.txt").write_bytes(b"one\r\n\r\ntwo\n")
    assert [e.text for e in read_data(str(tmp_path / "a.txt"), holdout=0).train] == ["one", "two"]


def test_bom_crlf_and_blank_lines_are_tolerated(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(
        b"\xef\xbb\xbf" + json.dumps(PAIR).encode() + b"\r\n\r\n" + json.dumps(PAIR).encode()
    )
    assert [e.where for e in read_data(str(tmp_path / "a.jsonl"), holdout=0).train] == ["a.jsonl:1", "a.jsonl:3"]


def test_folders_and_splits(tmp_path: Path) -> None:
    for name, count in (("train", 3), ("dev", 2), ("test", 1)):
        write(tmp_path / f"{name}.jsonl", *[PAIR] * count)
    data = read_data(str(tmp_path))
    assert (len(data.train), len(data.valid), len(data.test)) == (3, 2, 1)
    assert data.heldout == ("test", data.test)
    (tmp_path / "test.jsonl").unlink()
    assert read_data(str(tmp_path)).heldout[0] == "valid"
    write(tmp_path / "valid.jsonl", PAIR)
    with pytest.raises(ValueError, match=r"holds both valid.jsonl and dev.jsonl"):
        read_data(str(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no train, valid or test file"):
        read_data(str(tmp_path / "empty"))


def test_holdout_is_a_seeded_share_and_says_so(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", *[{"prompt": f"p{i}", "completion": "c"} for i in range(40)])
    data, again, other = read_data(path, seed=1), read_data(path, seed=1), read_data(path, seed=2)
    assert (len(data.train), len(data.valid)) == (38, 2)
    assert data.valid == again.valid != other.valid
    assert not set(e.where for e in data.valid) & set(e.where for e in data.train)
    assert data.notes == ["2 of 40 rows held out for evaluation, chosen by the seed (--holdout 0.05)"]
    assert read_data(path, holdout=0).valid == []
    many = write(tmp_path / "many.jsonl", *[PAIR] * 5000)
    assert len(read_data(many).valid) == 100


BAD = [
    ('{"prompt": "a" "completion": "b"}', "d.jsonl:2: not JSON: Expecting ',' delimiter at column 16"),
    ("[1]", "d.jsonl:2: expected an object {…}, found a list"),
    ({"prompt": "a", "completion": ""}, "d.jsonl:2: completion is empty"),
    ({"prompt": "a", "completion": "  "}, "d.jsonl:2: completion is empty"),
    ({"prompt": None, "completion": "b"}, "d.jsonl:2: prompt is null"),
    ({"prompt": 3, "completion": "b"}, "d.jsonl:2: prompt is a number, expected text"),
    (
        {"question": "a", "answer": "b"},
        "d.jsonl:2: found keys ['question', 'answer'], expected one of: messages | conversations | prompt+completion | "
        "instruction+output | text+label | text. Map them: --prompt-field question --completion-field answer",
    ),
    ({"text": "x"}, "d.jsonl:2: a row of the shape text, but d.jsonl:1 has the shape prompt+completion; use one."),
]


@pytest.mark.parametrize(("row", "message"), BAD)
def test_bad_rows_are_named_by_file_and_line(row: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        read_data(write(tmp_path / "d.jsonl", PAIR, row, PAIR))
    assert str(error.value) == message


def test_bad_rows_are_listed_by_file_and_line_whatever_is_wrong_with_them(tmp_path: Path) -> None:
    empty = {"prompt": "", "completion": "b"}
    write(tmp_path / "train.jsonl", empty, "[1]", PAIR, *[empty, "{"] * 4)
    write(tmp_path / "test.jsonl", empty, "{")
    with pytest.raises(DataError) as error:
        read_data(str(tmp_path))
    assert str(error.value).splitlines() == [
        "12 bad rows; nothing was loaded:",
        "test.jsonl:1: prompt is empty",
        "    also train.jsonl:1, train.jsonl:4, train.jsonl:6, train.jsonl:8, train.jsonl:10",
        "test.jsonl:2: not JSON: Expecting property name enclosed in double quotes at column 2",
        "    also train.jsonl:5, train.jsonl:7, train.jsonl:9, train.jsonl:11",
        "train.jsonl:2: expected an object {…}, found a list",
    ]


def test_all_bad_rows_are_listed_at_once(tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        read_data(write(tmp_path / "d.jsonl", PAIR, *[row for row, _ in BAD]))
    lines = str(error.value).splitlines()
    assert lines[0] == f"{len(BAD)} bad rows; nothing was loaded:"
    assert lines[3:5] == ["d.jsonl:4: completion is empty", "    also d.jsonl:5"]
    assert [line.split(":")[1] for line in lines[1:] if line[0] != " "] == ["2", "3", "4", "6", "7", "8", "9"]
    with pytest.raises(DataError) as error:
        read_data(write(tmp_path / "d.jsonl", *['{"a"'] * 133))
    lines = str(error.value).splitlines()
    assert len(lines) == 3 and lines[0] == "133 bad rows; nothing was loaded:"
    assert lines[2].startswith("    also d.jsonl:2, d.jsonl:3") and lines[2].endswith("d.jsonl:11 and 122 more rows")


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages is empty"),
        (None, "messages is null"),
        ([{"role": "user", "content": "a"}], "no assistant turn, so there is nothing to learn"),
        (
            [{"role": "assistant", "content": "a"}, {"role": "user", "content": "a"}],
            "the last turn is not the assistant's; nothing would be learnt from it",
        ),
        ([{"role": "wizard", "content": "a"}], "message 1: unknown role 'wizard'"),
        ([{"role": "assistant", "content": None}], "message 1: content is null"),
        ([{"role": "assistant", "content": " "}], "message 1: the assistant's content is empty"),
        ([{"role": "user"}], "message 1: expected the keys 'role' and 'content'"),
        ([{"role": "user", "content": [{"type": "image"}]}], "message 1: holds image; only text is supported"),
    ],
)
def test_bad_conversations(messages: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        read_data(write(tmp_path / "d.jsonl", {"messages": messages}))
    assert str(error.value).startswith(f"d.jsonl:1: {message}")


def test_fields_map_other_keys(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", {"question": "a", "answer": "b"})
    data = read_data(path, fields={"prompt": "question", "completion": "answer"}, holdout=0)
    assert (data.train[0].prompt, data.train[0].completion) == ("a", "b")
    with pytest.raises(DataError, match=r"no key 'questin' \(--prompt-field questin\).*Did you mean 'question'"):
        read_data(path, fields={"prompt": "questin"})


def test_classification_labels(tmp_path: Path) -> None:
    rows = [{"text": "a", "label": label} for label in (10, 2, 2)]
    data = read_data(write(tmp_path / "d.jsonl", *rows), holdout=0)
    assert (data.task, data.labels, [e.label for e in data.train]) == ("classification", ("2", "10"), ["10", "2", "2"])
    words = [{"sentence1": "a", "sentence2": "b", "label": label} for label in ("yes", "no")]
    data = read_data(write(tmp_path / "d.jsonl", *words), holdout=0)
    assert (data.labels, data.train[0].text, data.train[0].text_pair) == (("no", "yes"), "a", "b")
    numbers = [{"text": "a", "label": label} for label in (1, 2.5)]
    data = read_data(write(tmp_path / "d.jsonl", *numbers), holdout=0)
    assert (data.task, data.labels, [e.label for e in data.train]) == ("regression", (), [1.0, 2.5])
    (tmp_path / "d.csv").write_text("text,label\na,0\nb,1\n")
    assert read_data(str(tmp_path / "d.csv"), holdout=0).labels == ("0", "1")


def test_bad_labels(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"d.jsonl:2: label is null"):
        read_data(write(tmp_path / "d.jsonl", {"text": "a", "label": 1}, {"text": "a", "label": None}))
    with pytest.raises(DataError, match="all rows of the training split have the label '1'"):
        read_data(write(tmp_path / "d.jsonl", {"text": "a", "label": 1}))
    write(tmp_path / "train.jsonl", {"text": "a", "label": "x"}, {"text": "a", "label": "y"})
    write(tmp_path / "test.jsonl", {"text": "a", "label": "z"})
    with pytest.raises(DataError, match=r"test.jsonl:1: the label 'z' does not occur in train"):
        read_data(str(tmp_path))


def test_files_that_are_not_there_or_not_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "train.jsonl", PAIR)
    with pytest.raises(FileNotFoundError, match=r"trian.jsonl: no such file or folder. Did you mean .*train.jsonl"):
        read_data(str(tmp_path / "trian.jsonl"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere.jsonl: no such file"):
        read_data("nowhere.jsonl")  # never taken for a hub id
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match=r"empty.jsonl: the file holds no rows"):
        read_data("empty.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(json.dumps(PAIR).encode() + b'\n{"prompt": "\xe9"}')
    with pytest.raises(DataError, match=r"latin.jsonl:2: not UTF-8 \(byte 4\d\)"):
        read_data("latin.jsonl")
    (tmp_path / "a.xlsx").write_text("")
    with pytest.raises(ValueError, match=r"a.xlsx: unknown kind of file; expected .jsonl"):
        read_data("a.xlsx")
    (tmp_path / "bad.csv").write_text("prompt,completion\na,b,c\n")
    with pytest.raises(DataError, match=r"bad.csv:2: 3 cells, but the header has 2"):
        read_data("bad.csv")


def test_an_existing_path_wins_over_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    write(tmp_path / "owner" / "name" / "train.jsonl", PAIR, PAIR)
    assert len(read_data("owner/name").train) == 1
