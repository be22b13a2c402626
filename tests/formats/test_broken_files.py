"""Files with random content: each is read, or refused with an error that names it. Nothing else may happen."""

import io
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lorakit
from folders import CONFIG, TENSORS, factors, folder, small

VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 4, 8, 10**30, 0.5, -2.5, 1e308, float("nan"), float("inf"), "", "4", "0", "all"),
    *("(", "\ud800", "\x00", [], [None], ["0"], [[]], {}, {"0": 4}, {"(": 4}, {"0": {}}, {"": None}, [1] * 50),
)


def bytes_changed(data: bytes, rng: random.Random) -> bytes:
    """Data with a few bytes changed, removed, inserted or repeated, or with its end cut off."""
    content = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 5, 20))):
        at = rng.randrange(len(content) + 1) if content else 0
        what = rng.randrange(5)
        if what == 0 and at < len(content):
            content[at] = rng.randrange(256)
        elif what == 1:
            del content[at : at + rng.randrange(1, 9)]
        elif what == 2:
            content[at:at] = rng.randbytes(rng.randrange(1, 9))
        elif what == 3:
            content[at:at] = content[at : at + 16]
        else:
            del content[at:]
    return bytes(content)


def values_changed(config: dict, rng: random.Random) -> bytes:
    changed = dict(config)
    for _ in range(rng.choice((1, 1, 2, 4))):
        key = rng.choice([*config, "init_lora_weights", "target_parameters", "use_qalora", "a_new_field", "task_type"])
        if rng.random() < 0.2:
            changed.pop(key, None)
        else:
            changed[key] = rng.choice(VALUES)
    return json.dumps(changed, ensure_ascii=rng.random() < 0.9).encode("utf-8", "surrogatepass")


def tries(path: Path, contents: Iterator[bytes], load, named: str) -> dict[str, int]:
    """Load each of the contents and count the outcomes. A refused file does not change the model."""
    counts = {"read": 0, "refused": 0}
    model = small()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for content in contents:
        path.write_bytes(content)
        try:
            load(model)
        except (ValueError, FileNotFoundError) as error:
            counts["refused"] += 1
            assert named in str(error), (str(error), content[:200])
            assert model.state_dict().keys() == before.keys()
        else:
            counts["read"] += 1
            lorakit.detach(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    return counts


def test_configurations_with_values_of_every_kind(tmp_path: Path) -> None:
    rng = random.Random(0)
    config = json.loads((folder(tmp_path) / CONFIG).read_text())
    contents = (values_changed(config, rng) for _ in range(1500))
    counts = tries(tmp_path / CONFIG, contents, lambda m: lorakit.load(m, tmp_path), str(tmp_path))
    assert min(counts.values()) > 100, counts


def test_configurations_with_bytes_of_every_kind(tmp_path: Path) -> None:
    rng = random.Random(1)
    data = (folder(tmp_path) / CONFIG).read_bytes()
    contents = (bytes_changed(data, rng) for _ in range(800))
    counts = tries(tmp_path / CONFIG, contents, lambda m: lorakit.load(m, tmp_path), str(tmp_path))
    assert min(counts.values()) > 2, counts


@pytest.mark.parametrize("name", [TENSORS, "adapter_model.bin"])
def test_tensors_with_bytes_of_every_kind(name: str, tmp_path: Path) -> None:
    rng = random.Random(2)
    data = (folder(tmp_path) / TENSORS).read_bytes()
    if name != TENSORS:
        (tmp_path / TENSORS).unlink()
        data = pickled(factors())
    contents = (bytes_changed(data, rng) for _ in range(500))
    counts = tries(tmp_path / name, contents, lambda m: lorakit.load(m, tmp_path), str(tmp_path))
    assert min(counts.values()) > 2, counts


@pytest.mark.parametrize("zipped", [True, False])
def test_files_of_loralib_with_bytes_of_every_kind(zipped: bool, tmp_path: Path) -> None:
    rng = random.Random(3)
    data = pickled({"0.lora_A": torch.ones(2, 8), "0.lora_B": torch.ones(8, 2), "0.bias": torch.ones(8)}, zipped)
    path = tmp_path / "a.pt"
    contents = (bytes_changed(data, rng) for _ in range(500))
    counts = tries(path, contents, lambda m: lorakit.load(m, path, alpha=2), "a.pt")
    assert min(counts.values()) > 2, counts


def pickled(value: object, zipped: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


ODD = {
    "a number": torch.tensor(1.0),
    "a vector": torch.ones(4),
    "five dimensions": torch.ones(1, 1, 1, 1, 1),
    "integers": torch.ones(4, 8, dtype=torch.int8),
    "truth values": torch.ones(4, 8, dtype=torch.bool),
    "complex": torch.ones(4, 8, dtype=torch.complex64),
    "nothing": torch.ones(0, 8),
    "NaN": torch.full((4, 8), float("nan")),
    "infinite": torch.full((4, 8), float("-inf"), dtype=torch.bfloat16),
    "NaN of 8 bits": torch.full((4, 8), float("nan")).to(torch.float8_e4m3fn),
    "sparse": torch.ones(4, 8).to_sparse(),
    "on no device": torch.ones(4, 8, device="meta"),
}


@pytest.mark.parametrize("what", ODD)
@pytest.mark.parametrize("end", ["lora_A.weight", "lora_B.weight"])
def test_a_tensor_that_cannot_have_been_learnt_is_named(what: str, end: str, tmp_path: Path) -> None:
    """In both files of PEFT's that hold tensors, and in loralib's."""
    tensors = factors() | {f"base_model.model.0.{end}": ODD[what]}
    if what not in ("sparse", "on no device"):
        with pytest.raises(ValueError, match=r"adapter_model.safetensors: .*\b0\b"):
            lorakit.load(small(), folder(tmp_path / "peft", tensors))
    old = folder(tmp_path / "old")
    (old / TENSORS).unlink()
    torch.save(tensors, old / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"adapter_model.bin: .*\b0\b"):
        lorakit.load(small(), old)
    names = {key.removeprefix("base_model.model.").removesuffix(".weight"): value for key, value in tensors.items()}
    torch.save(names, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a.pt: .*\b0\b"):
        lorakit.load(small(), tmp_path / "a.pt", alpha=1)


@pytest.mark.parametrize("what", [what for what in ODD if what not in ("a number", "a vector", "five dimensions")])
@pytest.mark.parametrize("name", ["adapter", "adapter.pt"])
def test_what_cannot_have_been_learnt_is_not_saved(what: str, name: str, tmp_path: Path) -> None:
    model = small()
    lorakit.attach(model, "0", rank=4, also_train=["2"])
    # torch refuses another type in an assignment, so the tensor is put in directly.
    model[0]._parameters["lora_A"] = nn.Parameter(ODD[what], requires_grad=False)
    with pytest.raises(ValueError, match=rf"{name} is not saved: .*0.lora_A"):
        lorakit.save(model, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [CONFIG, TENSORS, "adapter_model.bin", "a.pt"])
@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"])
def test_empty_files_and_pointers_of_git_lfs_are_called_so(name: str, content: bytes, tmp_path: Path) -> None:
    path = folder(tmp_path)
    if name == "adapter_model.bin":
        (path / TENSORS).unlink()
    (path / name).write_bytes(content)
    source = path / name if name == "a.pt" else path
    with pytest.raises(
        ValueError, match=rf"{name}( is empty|:1: not JSON: the file is empty| is a git-lfs pointer .*git lfs pull)"
    ):
        lorakit.load(small(), source, alpha=1)


@pytest.mark.parametrize("name", [CONFIG, TENSORS])
def test_a_file_of_the_folder_stands_for_the_folder(name: str, tmp_path: Path) -> None:
    lorakit.load(small(), folder(tmp_path) / name)


def test_the_older_file_of_tensors_is_read_by_its_folder_and_by_its_name(tmp_path: Path) -> None:
    wanted, x = small(), torch.randn(3, 8)
    lorakit.load(wanted, folder(tmp_path))
    (tmp_path / TENSORS).unlink()
    torch.save(factors(), tmp_path / "adapter_model.bin")
    for path in (tmp_path, tmp_path / "adapter_model.bin"):
        model = small()
        lorakit.load(model, path)
        assert torch.equal(model(x), wanted(x))
