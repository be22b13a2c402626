"""Small files of text: what is wrong with one is said with its name and line."""

from pathlib import Path

import pytest

from lorakit.core.reading import json_of, text_of
from lorakit.core.words import first_line, shown, suggestion


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", r"f\.json:1: not JSON: the file is empty"),
        (b'{"a": 1,\n "b": }', r"f\.json:2: not JSON: Expecting value at column 7"),
        (b'{"a": "\xe4"}', r"f\.json:1: not UTF-8 \(byte 7\); save the file as UTF-8"),
        (b'\xef\xbb\xbf{\n"a": "\xe4"}', r"f\.json:2: not UTF-8 \(byte 11\)"),
        ('{"a": 1}'.encode("utf-16"), r"f\.json:1: the file is UTF-16; save it as UTF-8"),
        ('{"a": 1}'.encode("utf-32"), r"f\.json:1: the file is UTF-32; save it as UTF-8"),
        (b"[1]", r"f\.json: expected an object \{…\}, found a list"),
        (b"null", r"f\.json: expected an object \{…\}, found null"),
        (b"true", r"f\.json: expected an object \{…\}, found true or false"),
        (b'{"a": 1, "a": 2}', r"f\.json: 'a' stands in it twice"),
        (b"[" * 100_000, r"f\.json: not JSON that can be read"),
        (b'{"a": ' + b"1" * 5000 + b"}", r"f\.json: not JSON that can be read"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", r"f\.json is a git-lfs pointer"),
        (b"\x00\x01\x02\xff", r"f\.json:1: not UTF-8"),
    ],
)
def test_what_is_no_object_is_named(data: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "f.json"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message):
        json_of(path, dict)


def test_a_mark_at_the_beginning_is_no_part_of_the_text(tmp_path: Path) -> None:
    path = tmp_path / "f.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": [1]}')
    assert json_of(path, dict) == {"a": [1]}


def test_what_is_no_file_is_named_with_what_lies_beside_it(tmp_path: Path) -> None:
    (tmp_path / "lora.yaml").touch()
    with pytest.raises(FileNotFoundError, match=r"lroa\.yaml: no such file or folder\. Did you mean 'lora\.yaml'\?"):
        text_of(tmp_path / "lroa.yaml")
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError, match=r"folder is a folder, not a file\.$"):
        text_of(tmp_path / "folder")
    with pytest.raises(FileNotFoundError, match=r"no such file or folder \(.* holds no 'floder'\)\. .*'folder'\?"):
        text_of(tmp_path / "floder" / "sub" / "x.json")
    with pytest.raises(NotADirectoryError, match=r"x\.json: not a directory\."):
        text_of(tmp_path / "lora.yaml" / "x.json")


def test_a_suggestion_is_another_word() -> None:
    assert suggestion("trian", ["train", "check"]) == " Did you mean 'train'?"
    assert suggestion("TRAIN", ["train", "check"]) == " Did you mean 'train'?"
    assert suggestion("train", ["train"]) == ""  # the word itself is no help
    assert suggestion("train", ["train", "trains"]) == " Did you mean 'trains'?"
    assert suggestion("xyz", ["train"]) == ""
    assert shown("a\nb") == r"'a\nb'"
    assert len(shown("a" * 10_000)) < 100


@pytest.mark.parametrize(
    ("message", "line"),
    [("", ""), ("\n \n", ""), ("\n  one \ntwo", "one"), ("a" * 300, "a" * 300), ("a" * 301 + "\nb", "a" * 300 + "…")],
)
def test_the_first_line_of_an_error(message: str, line: str) -> None:
    assert first_line(RuntimeError(message)) == line
