"""Which checkpoints are whole. Broken ones are made by hand, as an interruption or a full disk leaves them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

from lorakit.training.checkpoints import BEST, checkpoints, fault_of, newest_whole, record_in, step_of


def whole(folder: Path, step: int) -> Path:
    """The files that transformers writes, and the state of an adapter."""
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    safetensors.torch.save_file({"lora_A": torch.randn(4, 300)}, path / "adapter_state.safetensors")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({"state": torch.randn(1000)}, path / name)
    return path


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def zeroed(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)


NAMES = ("trainer_state.json", "adapter_state.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth")
CASES = [(name, break_) for name in NAMES for break_ in (Path.unlink, cut, emptied, zeroed)]
CASES += [(name, flipped) for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth")]


@pytest.mark.parametrize(("name", "break_"), CASES, ids=lambda value: getattr(value, "__name__", value))
def test_a_broken_checkpoint_is_passed_over_and_named(
    name: str, break_: Callable[[Path], object], tmp_path: Path
) -> None:
    whole(tmp_path, 4)
    break_(whole(tmp_path, 8) / name)
    found, passed = newest_whole(tmp_path)
    assert found == tmp_path / "checkpoint-4"
    assert len(passed) == 1 and passed[0].startswith(f"checkpoint-8 is not whole and is passed over: {name} is ")


def test_the_newest_is_told_by_its_number(tmp_path: Path) -> None:
    for step in (9, 10, 100):
        whole(tmp_path, step)
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-200").write_text("a file")
    assert [step_of(path) for path in checkpoints(tmp_path)] == [9, 10, 100]
    assert newest_whole(tmp_path) == (tmp_path / "checkpoint-100", [])
    assert step_of("checkpoint-best") == step_of("out") == -1


def test_a_checkpoint_under_a_wrong_name(tmp_path: Path) -> None:
    whole(tmp_path, 4).rename(tmp_path / "checkpoint-8")
    assert fault_of(tmp_path / "checkpoint-8") == "trainer_state.json is of step 4"
    (tmp_path / "checkpoint-8").rename(tmp_path / "kept")
    assert fault_of(tmp_path / "kept") is None


def test_none_and_none_whole(tmp_path: Path) -> None:
    assert newest_whole(tmp_path / "nothing") == (None, [])
    for step in (1, 2):
        (whole(tmp_path, step) / "optimizer.pt").unlink()
    found, passed = newest_whole(tmp_path)
    assert found is None and [line.split()[0] for line in passed] == ["checkpoint-2", "checkpoint-1"]


def test_the_states_of_several_processes(tmp_path: Path) -> None:
    path = whole(tmp_path, 4)
    (path / "rng_state.pth").rename(path / "rng_state_0.pth")
    (path / "rng_state_1.pth").write_bytes((path / "rng_state_0.pth").read_bytes())
    assert fault_of(path) is None
    cut(path / "rng_state_1.pth")
    assert fault_of(path) == "rng_state_1.pth is cut off"


def test_the_state_of_the_best_evaluation(tmp_path: Path) -> None:
    path = whole(tmp_path, 4)
    (path / BEST).write_bytes((path / "adapter_state.safetensors").read_bytes())
    assert fault_of(path) is None
    cut(path / BEST)
    assert fault_of(path) == f"{BEST} is cut off"


def test_the_record_of_the_run(tmp_path: Path) -> None:
    path = whole(tmp_path, 4)
    assert record_in(path) is None
    (path / "run.json").write_text('{"settings": {"rank": 4}}')
    assert record_in(path) == {"settings": {"rank": 4}}
