"""A model's safetensors files, tensor by tensor: what is read and written is what safetensors' own library has."""

import json
import os
import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lorakit.core.errors import LoraError
from lorakit.formats import shards
from lorakit.formats.shards import Planned, ShardWriter, read_header, same_bytes, shards_of

TENSORS = {
    "a": torch.arange(12, dtype=torch.float32).view(3, 4),
    "b": torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16),
    "c": torch.tensor(7),
    "d": torch.arange(6, dtype=torch.float64).view(2, 3),
    "e": torch.arange(3, dtype=torch.uint8),
    "f": torch.zeros(0, 4, dtype=torch.float16),
}


def written(folder: Path, tensors: dict[str, torch.Tensor] = TENSORS) -> Path:
    path = folder / "model.safetensors"
    save_file(tensors, path, {"format": "pt"})
    return path


def rewritten(path: Path, target: Path) -> None:
    """`path` once more, each second tensor carried over and the others read and written."""
    metadata, entries = read_header(path)
    planned = ShardWriter.in_order({name: Planned(own.dtype, own.shape) for name, own in entries.items()})
    with ShardWriter(target, planned, metadata) as writer:
        for number, name in enumerate(planned):
            entry = entries[name]
            if number % 2 or entry.torch_dtype is None:
                writer.carry(name, entry)
            else:
                writer.write(name, entry.read())


def test_tensors_and_rows_are_read_as_safetensors_reads_them(tmp_path: Path) -> None:
    path = written(tmp_path)
    metadata, entries = read_header(path)
    expected = load_file(path)
    assert metadata == {"format": "pt"} and entries.keys() == expected.keys()
    for name, entry in entries.items():
        if entry.torch_dtype is not None:
            assert entry.read().dtype == expected[name].dtype
            assert torch.equal(entry.read(), expected[name])
    assert entries["e"].torch_dtype is None
    assert torch.equal(entries["a"].read_rows(1, 2), expected["a"][1:3])
    assert torch.equal(entries["b"].read_rows(4, 1), expected["b"][4:])


@pytest.mark.parametrize("in_kernel", [True, False])
def test_a_file_is_written_byte_for_byte_as_safetensors_writes_it(
    in_kernel: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not in_kernel:
        monkeypatch.delattr(os, "copy_file_range", raising=False)
        monkeypatch.setattr(shards, "_CHUNK", 7)
    path, target = written(tmp_path), tmp_path / "again.safetensors"
    rewritten(path, target)
    assert target.read_bytes() == path.read_bytes()


def test_tensors_of_another_dtype_begin_where_their_type_allows(tmp_path: Path) -> None:
    """Numbers of 8 bytes first: three bfloat16 before an int64 would put it at 6 bytes."""
    path, target = written(tmp_path), tmp_path / "again.safetensors"
    metadata, entries = read_header(path)
    planned = {"b": Planned("BF16", (5, 3)), "a": Planned("BF16", (3, 4)), "c": Planned("I64", ())}
    planned = ShardWriter.in_order(planned)
    assert list(planned) == ["c", "b", "a"]
    with ShardWriter(target, planned, metadata) as writer:
        for name in planned:
            writer.write(name, entries[name].read().to(shards.DTYPES[planned[name].dtype]))
    with safe_open(target, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert all(torch.equal(file.get_tensor(name), TENSORS[name].to(file.get_tensor(name).dtype)) for name in "abc")


def test_the_same_bytes_are_told_from_others_at_either_end(tmp_path: Path) -> None:
    one, two = (tmp_path / name for name in ("one", "two"))
    one.mkdir()
    two.mkdir()
    first = read_header(written(one))[1]["a"]
    for place in ((0, 0), (2, 3)):
        other = TENSORS["a"].clone()
        other[place] += 1
        second = read_header(written(two, TENSORS | {"a": other}))[1]["a"]
        assert same_bytes(first, first) and not same_bytes(first, second)


def folder_of_two(folder: Path) -> Path:
    save_file({"a": TENSORS["a"]}, folder / "model-00001-of-00002.safetensors")
    save_file({"b": TENSORS["b"]}, folder / "model-00002-of-00002.safetensors")
    homes = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 78}, "weight_map": homes})
    )
    return folder


def test_several_files_are_one_model(tmp_path: Path) -> None:
    found = shards_of(folder_of_two(tmp_path))
    assert found.files == ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    assert found.index == {"metadata": {"total_size": 78}}
    assert [found.inside(file) for file in found.files] == [["a"], ["b"]]
    assert torch.equal(found.tensors["b"].read(), TENSORS["b"])


def cut(folder: Path) -> None:
    path = folder / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def longer(folder: Path) -> None:
    path = folder / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes() + b"\0")


def no_header(folder: Path) -> None:
    (folder / "model-00002-of-00002.safetensors").write_bytes(struct.pack("<Q", 4) + b"abcd")


def overlap(folder: Path) -> None:
    header = json.dumps({"b": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}).encode()
    path = folder / "model-00002-of-00002.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))


def twice(folder: Path) -> None:
    save_file({"a": TENSORS["a"]}, folder / "model-00002-of-00002.safetensors")


def index_of(folder: Path, **homes: str) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": homes}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "model-00002-of-00002.safetensors").unlink(), r"names model-00002-of-00002.*not there\.$"),
        (lambda f: [p.unlink() for p in f.glob("*.safetensors")], r"not there \(2 of 2 files are missing\)"),
        (lambda f: [p.unlink() for p in f.iterdir()], r"holds neither model\.safetensors nor model\.safetensors\.in"),
        (cut, r"00002-of-00002\.safetensors: not a complete safetensors file: \d+ bytes, its header tells of \d+"),
        (longer, r"not a complete safetensors file: \d+ bytes, its header tells of \d+"),
        (lambda f: (f / "model-00002-of-00002.safetensors").write_bytes(b"123"), "not a complete safetensors file"),
        (no_header, r"00002-of-00002\.safetensors: not a safetensors file"),
        (overlap, "b has a shape or a place that cannot be"),
        (twice, r"a is in model-00001.*and in model-00002"),
        (lambda f: index_of(f, z="model-00001-of-00002.safetensors"), "z is not in model-00001"),
        (lambda f: index_of(f, a="../model.safetensors"), "weight_map does not say which tensor is in which file"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_the_files_is_said(spoil, message: str, tmp_path: Path) -> None:
    spoil(folder_of_two(tmp_path))
    with pytest.raises((LoraError, FileNotFoundError), match=message):
        shards_of(tmp_path)
