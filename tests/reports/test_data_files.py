"""Real-world data files: some are read as intended, others are refused with the line."""

import bz2
import gzip
import json
import lzma
from pathlib import Path

import pytest

from lorakit.training.data import read_data
from lorakit.training.rows import DataError

PAIRS = [("a", "b"), ("c d", "e\nf"), ("ü", "ö")]
ROWS = [{"prompt": prompt, "completion": completion} for prompt, completion in PAIRS]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def pairs(path: Path) -> list[tuple[str | None, str | None]]:
    return [(e.prompt, e.completion) for e in read_data(str(path), holdout=0).train]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("d.ndjson", LINES),
        ("UP.JSONL", LINES),
        ("lines.json", LINES),
        ("list.jsonl", json.dumps(ROWS)),
        ("pretty.jsonl", json.dumps(ROWS, indent=1)),
        ("pretty_objects.jsonl", "".join(json.dumps(row, indent=2) + "\n" for row in ROWS)),
        ("under.json", json.dumps({"version": 1, "data": ROWS})),
        ("rows.json", json.dumps({"rows": ROWS})),
        ("train.json", json.dumps({"train": ROWS}, indent=1)),
        ("macintosh.jsonl", LINES.replace("\n", "\r")),
    ],
)
def test_json_is_read_by_its_layout_and_not_by_its_name(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(text.encode())
    assert pairs(tmp_path / name) == PAIRS


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)])
def test_packed_files(suffix: str, pack, tmp_path: Path) -> None:
    path = tmp_path / f"Train.jsonl{suffix}"
    path.write_bytes(pack(LINES.encode()))
    assert pairs(path) == pairs(tmp_path) == PAIRS
    path.write_bytes(pack(LINES.encode())[:-12])
    with pytest.raises(DataError, match=rf"Train.jsonl{suffix}: not a whole {suffix} file"):
        read_data(str(path))


def test_splits_are_found_under_the_names_in_use(tmp_path: Path) -> None:
    for name in ("Train.jsonl", "validation.json", "TEST.ndjson"):
        (tmp_path / name).write_text(LINES)
    data = read_data(str(tmp_path))
    assert [len(rows) for rows in (data.train, data.valid, data.test)] == [3, 3, 3]
    hub = tmp_path / "clone"
    (hub / "data").mkdir(parents=True)
    for number, row in enumerate(ROWS):
        (hub / "data" / f"train-{number:05}-of-00003.jsonl").write_text(json.dumps(row))
    (hub / "data" / "tests.jsonl").write_text(LINES)
    assert pairs(hub) == PAIRS
    assert f"files of {hub} that are no split and are not read: tests.jsonl" in read_data(str(hub)).notes
    (hub / "data" / "train-00001-of-00003.jsonl").unlink()
    with pytest.raises(ValueError, match="holds 2 of the 3 files train-…-of-….jsonl"):
        read_data(str(hub))
    lone = tmp_path / "lone"
    lone.mkdir()
    (lone / "rows.jsonl").write_text(LINES)
    with pytest.raises(FileNotFoundError, match=r"holds no train, valid or test file.* name the file, --data .*rows"):
        read_data(str(lone))


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x85"])
@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".txt", ".jsonl"])
def test_only_line_breaks_end_lines(mark: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"d{suffix}"
    wanted = [f"one{mark}two", "three"]
    body = [json.dumps({"text": text}, ensure_ascii=mark < " ") for text in wanted] if suffix == ".jsonl" else wanted
    header = ["text"] if suffix in (".csv", ".tsv") else []
    path.write_text("\n".join([*header, *body]) + "\n", encoding="utf-8", newline="")
    assert [example.text for example in read_data(str(path), holdout=0).train] == wanted


def test_a_csv_cell_has_no_longest_length(tmp_path: Path) -> None:
    import csv

    limit = csv.field_size_limit()
    (tmp_path / "d.csv").write_text(f"prompt,completion\na,{'x' * 300_000}\n")
    assert [len(answer or "") for _, answer in pairs(tmp_path / "d.csv")] == [300_000]
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        ('p,c\n1,a\n2,"b\n3,c\n4,d\n', 3, "a quotation mark"),
        ('p,c\n1,a\n2,"b\n3,c\n4,d', 3, "a quotation mark"),
        ('p,c\r\n1,a\r\n2,"b\r\n3,c\r\n', 3, "a quotation mark"),
        ('p,c\n"1\n2",a\n3,"b\n', 4, "a quotation mark"),
        ('p,c\n1,"a"\n2,"', 3, "a quotation mark"),
        ('p,c\n1,"a" b\n2,c\n', 2, "a quotation mark"),
        ('p,c\n1,"say "hi" now"\n2,c\n', 2, "a quotation mark"),
        ('p,c\n1,"a\n2,"b"\n3,c\n', 2, "a quotation mark"),
        ('"p,c\n1,a\n', 1, "a quotation mark"),
        (
            'p,c\n"1,a\n2,b"\n3,c\n',
            2,
            "1 cells, in the lines 2 to 3 (is a quotation mark missing?), but the header has 2",
        ),
    ],
)
@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_a_quotation_mark_out_of_place_is_refused_at_its_line(
    text: str, line: int, what: str, suffix: str, tmp_path: Path
) -> None:
    path = tmp_path / f"d{suffix}"
    path.write_bytes((text if suffix == ".csv" else text.replace(",", "\t")).encode())
    with pytest.raises(DataError) as error:
        read_data(str(path))
    assert any(problem.startswith(f"d{suffix}:{line}: {what}") for problem in error.value.problems)


def test_marks_that_are_in_place(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text('prompt,completion\n5" nail,"say ""hi"""\n"a\nb","x,y"\n')
    assert pairs(tmp_path / "d.csv") == [('5" nail', 'say "hi"'), ("a\nb", "x,y")]
    (tmp_path / "e.csv").write_text('prompt,completion\n1,"a\n2,b\n3,c"\n4,d\n')
    assert "(e.csv:2): is a quotation mark missing there?" in read_data(str(tmp_path / "e.csv"), holdout=0).notes[0]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("d.csv", "prompt,completion,prompt\na,b,c\n", "d.csv:1: the column 'prompt' stands in the header twice"),
        ("d.tsv", "a\tb\tb\n1\t2\t3\n", "d.tsv:1: the column 'b' stands in the header twice"),
        ("d.jsonl", '{"prompt": "a", "completion": "b", "prompt": "c"}', "the key 'prompt' stands twice in one object"),
        ("d.csv", "prompt;completion\na;b\n", "d.csv:1: the header is one cell, .* separated by ';': save the file"),
        ("d.csv", "prompt\tcompletion\na\tb\n", "d.csv:1: the header is one cell, .* call the file .tsv"),
        ("d.parquet", "text,label\n", "d.parquet: cannot be read as Parquet"),
        ("d.jsonl", '{"a": ' + "[" * 100_000 + "\n", "d.jsonl:1: not JSON"),
        ("d.jsonl", '{"prompt": 1' + "0" * 5000 + "}\n", "d.jsonl:1: not JSON"),
        ("d.json", json.dumps(ROWS, indent=1)[:-30], r"d.json:\d+: not JSON"),
    ],
)
def test_files_that_are_refused(name: str, text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message) as error:
        read_data(str(tmp_path / name))
    assert len(error.value.problems) == 1


@pytest.mark.parametrize("half", ["\\ud83d", "\\uDE00", "\\ud83d\\ud83d", "x\\udfff"])
@pytest.mark.parametrize("key", ["prompt", "completion", "tools"])
def test_half_a_character_names_its_row(half: str, key: str, tmp_path: Path) -> None:
    row = json.dumps({"prompt": "a", "completion": "b", key: "HALF"}).replace("HALF", half)
    (tmp_path / "d.jsonl").write_text(f"{LINES}{row}\n")
    with pytest.raises(DataError, match=r"^d.jsonl:4: the text .* holds half a character"):
        read_data(str(tmp_path / "d.jsonl"))
    (tmp_path / "d.jsonl").write_text(json.dumps({"prompt": "😀", "completion": "👨‍👩‍👧"}))
    assert pairs(tmp_path / "d.jsonl") == [("😀", "👨‍👩‍👧")]


def test_parquet_as_json_would_hold_it(tmp_path: Path) -> None:
    import decimal

    import pyarrow as pa
    import pyarrow.parquet as pq

    call = {"function": {"name": "f", "arguments": {"city": "Rome", "on": None}}}
    said = [
        {"role": "user", "content": "a", "tool_calls": None},
        {"role": "assistant", "content": None, "tool_calls": [call]},
    ]
    pq.write_table(pa.Table.from_pylist([{"messages": said}]), tmp_path / "d.parquet")
    messages = read_data(str(tmp_path / "d.parquet"), holdout=0).train[0].messages
    assert messages is not None
    assert messages[0] == {"role": "user", "content": "a"}
    assert messages[1]["tool_calls"][0]["function"]["arguments"] == {"city": "Rome"}
    pairs_of_keys = [[("role", "user"), ("content", "a")], [("role", "assistant"), ("content", "b")]]
    maps = pa.array([pairs_of_keys], pa.list_(pa.map_(pa.string(), pa.string())))
    pq.write_table(pa.table({"messages": maps}), tmp_path / "m.parquet")
    assert read_data(str(tmp_path / "m.parquet"), holdout=0).train[0].messages is not None
    labels = [decimal.Decimal("1.5"), decimal.Decimal("2.0")]
    pq.write_table(pa.table({"text": ["a", "b"], "label": labels}), tmp_path / "l.parquet")
    data = read_data(str(tmp_path / "l.parquet"), holdout=0)
    assert (data.task, [example.label for example in data.train]) == ("regression", [1.5, 2.0])
