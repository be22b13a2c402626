"""A program that trains in child processes and kills them with SIGKILL while they change files.

    python kills.py FOLDER FRESH_OR_OVER MOST

The libraries are imported once; each training run is a fork. The first one counts the changes of the file system that a
run makes in its output folder (renames, removals, new folders, files opened to write). Others end before one of them,
at most MOST in all, spread over them. After each, the folder is checked, and the run is resumed. What it ends with is
compared bit for bit with the run that nothing interrupted: the adapter, and in the last checkpoint the optimizer, the
schedule, the random numbers (which also decide the order of rows and dropout) and what was logged.
"""

import importlib
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from lorakit.cli.main import main
from lorakit.training import plan

CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree", "open")
OPTIONS = ("--epochs", "2", "--save-steps", "1", "--batch-size", "4", "--eval-samples", "0", "--holdout", "0.25")
MORE = ("--dtype", "float32", "--lr", "0.005", "--dropout", "0.1", "--targets", "q_proj,v_proj")
PLAIN = (*OPTIONS, *MORE, "--logging-steps", "1", "--eval-steps", "1")
KEPT = ("adapter_config.json", "adapter_model.safetensors", "config.yaml")


def run(work: Path, data: str, *more: str, kill_at: int = 0) -> tuple[int, int]:
    """Train in a fork. Returns its exit code (−9 if it was killed) and the number of changes it made."""
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        with os.fdopen(reading) as pipe:
            said = pipe.read()
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), int(said or 0)
    count = 0
    out = str(work / "out")

    def hook(event: str, args: tuple[object, ...]) -> None:
        nonlocal count
        if event not in CHANGES or (event == "open" and not (isinstance(args[2], int) and args[2] & os.O_WRONLY)):
            return
        if not str(args[0]).startswith(out):
            return
        count += 1
        if count == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    log = os.open(work / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    code = main(["train", "--model", str(work / "lm"), "--data", str(work / data), "--output-dir", out, *PLAIN, *more])
    os.write(writing, str(count).encode())
    os._exit(code)


def look(out: Path, old: dict[str, bytes], new: dict[str, bytes]) -> None:
    """Check that no checkpoint is incomplete, and that an adapter lies beside its own settings.

    The adapter is there once its adapter_config.json is, which is put in place last and taken away first.
    """
    for checkpoint in out.rglob("checkpoint-*"):
        if checkpoint.parent.name in ("saving", "gone"):
            continue
        assert json.loads((checkpoint / "trainer_state.json").read_text())["global_step"] > 0
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
            torch.load(checkpoint / name, weights_only=False)
    if (out / "adapter_config.json").exists():
        found = {name: (out / name).read_bytes() for name in new if (out / name).exists()}
        assert found in (old, new), f"an adapter of one run and settings of another: {sorted(found)}"


def end_of(out: Path) -> dict[str, Any]:
    """What a run ended with, apart from how long it took."""
    last = max(out.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    found: dict[str, Any] = {name: (out / name).read_bytes() for name in KEPT}
    found["tensors"] = load_file(last / "adapter_state.safetensors")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        found[name] = torch.load(last / name, weights_only=False)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    found["metrics"] = [{name: value for name, value in line.items() if not timed(name)} for line in lines]
    state = json.loads((last / "trainer_state.json").read_text())
    found["steps"] = {name: state[name] for name in ("global_step", "epoch", "max_steps")}
    return found


def timed(name: str) -> bool:
    return name == "seconds" or name.endswith(("_runtime", "_per_second"))


def differences(a: Any, b: Any, where: str = "") -> list[str]:
    """Where two results are not the same, bit for bit."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [line for key in a for line in differences(a[key], b[key], f"{where}/{key}")]
    if isinstance(a, list | tuple) and type(a) is type(b) and len(a) == len(b):
        return [line for i, pair in enumerate(zip(a, b, strict=True)) for line in differences(*pair, f"{where}/{i}")]
    if isinstance(a, torch.Tensor):
        return [] if torch.equal(a, b) else [where]
    if isinstance(a, np.ndarray):
        return [] if np.array_equal(a, b) else [where]
    return [] if type(a) is type(b) and a == b else [f"{where}: {a!r:.200} and {b!r:.200}"]


def main_of_kills(work: Path, which: str, most: int) -> None:
    out, first = work / "out", work / "first"
    more = ["--overwrite"] if which == "over" else []

    def begin() -> None:
        shutil.rmtree(out, ignore_errors=True)
        if which == "over":
            shutil.copytree(first, out)

    old: dict[str, bytes] = {}
    if which == "over":
        assert run(work, "old.jsonl")[0] == 0
        old = {name: (out / name).read_bytes() for name in KEPT}
        shutil.move(out, first)
    begin()
    code, changes = run(work, "new.jsonl", *more)
    assert code == 0 and changes > 30, (code, changes)
    straight, expected = {name: (out / name).read_bytes() for name in KEPT}, end_of(out)
    assert any("eval_loss" in line for line in expected["metrics"]) and len(expected["optimizer.pt"]["state"]) == 8
    moments = sorted({1 + round(i * (changes - 1) / (most - 1)) for i in range(most)})
    for moment in moments:
        begin()
        code, _ = run(work, "new.jsonl", *more, kill_at=moment)
        assert code == -9, (moment, code)
        look(out, old, straight)
        resume = ["--resume", "auto"]
        if (
            which == "over"
            and not list((out / ".lorakit").glob("new/checkpoint-*"))
            and ((out / "config.yaml").exists() and (out / "config.yaml").read_bytes() == old["config.yaml"])
        ):
            resume = more  # it had not begun or had saved nothing, so the old run is unchanged
        code, _ = run(work, "new.jsonl", *resume)
        assert code == 0, (moment, resume, (work / "log").read_text()[-600:])
        assert differences(end_of(out), expected) == [], moment
        assert os.listdir(out / ".lorakit") == ["train.json"], (moment, os.listdir(out / ".lorakit"))
    print(f"{len(moments)} of {changes}")


def unplanned(*_: object) -> None:
    """Replaces the count of the memory, which takes longer than the training."""
    raise NotImplementedError("not counted")


if __name__ == "__main__":
    for name in ("datasets", "lorakit.training.trainers", "lorakit.training.loop"):
        importlib.import_module(name)  # once, and not in each fork
    vars(plan)["step_storages"] = unplanned
    main_of_kills(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
