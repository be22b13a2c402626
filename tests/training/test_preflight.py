"""Checks before a run: nothing is loaded and no folder is made for a run that must fail."""

import dataclasses
import json
import sys
import types
from pathlib import Path

import pytest
import torch

from lorakit.cli.main import main
from lorakit.core.errors import LoraError
from lorakit.training import memory, preflight
from lorakit.training.memory import memory_of
from lorakit.training.preflight import check_file, check_output, check_reporters, check_result
from lorakit.training.report import Evaluation


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"turn {i}", "completion": "on"}) + "\n" for i in range(8)))
    return path


@pytest.fixture
def nothing_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    from lorakit.training import loop

    def load(*args: object, **settings: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(loop, "load_causal_lm", load)


@pytest.mark.usefixtures("nothing_loads")
def test_a_plan_over_the_machines_memory_is_refused(tiny_lm: Path, data: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    words = ["--model", str(tiny_lm), "--data", str(data), "--rank", "200000000"]  # terabytes
    for command in (["train", "--output-dir", str(out)], ["train", "--output-dir", str(out), "--dry-run"], ["check"]):
        assert main([*command, *words]) == 1
        printed, err = capsys.readouterr()
        assert "of memory at the peak of training" in printed  # the plan is still shown
        assert err.startswith("error: the plan needs about ") and err.count("\n") == 1
        assert "--rank below 200000000" in err and "--ignore-memory begins all the same" in err
        assert main([*command, *words, "--ignore-memory", "--dry-run"]) == 0
        assert capsys.readouterr().err == ""
    assert not out.exists()


@pytest.mark.usefixtures("nothing_loads")
def test_processes_share_a_machines_memory(tiny_lm: Path, data: Path, monkeypatch, capsys) -> None:
    words = ["check", "--model", str(tiny_lm), "--data", str(data)]
    monkeypatch.setattr(preflight, "memory_of", lambda device: 10 * memory.resident_memory())
    assert main(words) == 0
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert main(words) == 1
    assert "of memory, and this machine has" in capsys.readouterr().err
    monkeypatch.setattr(preflight, "memory_of", lambda device: 0)  # a system that does not say
    assert main(words) == 0


def test_memory_of_the_machine_is_that_of_its_tightest_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    real = memory_of(cpu)
    assert real == 0 or real > memory.resident_memory()
    files = {
        "/proc/meminfo": ["MemTotal:  1000 kB", "MemFree:  10 kB", "SwapTotal:  500 kB"],
        "/proc/self/cgroup": ["0::/user/session"],
    }
    monkeypatch.setattr(memory, "_lines", lambda path: files.get(path, []))
    assert memory_of(cpu) == 1500 * 1024
    files["/sys/fs/cgroup/user/session/memory.max"] = ["max"]
    files["/sys/fs/cgroup/user/memory.max"] = ["700000"]
    assert memory_of(cpu) == 700_000  # an ancestor's
    files["/sys/fs/cgroup/memory.max"] = ["600000"]
    assert memory_of(cpu) == 600_000  # a container's own
    files["/proc/self/cgroup"] = ["5:cpu,cpuacct:/a", "4:memory:/a/b"]
    files["/sys/fs/cgroup/memory/a/memory.limit_in_bytes"] = ["500000"]
    assert memory_of(cpu) == 500_000  # version 1
    files["/sys/fs/cgroup/memory/a/b/memory.limit_in_bytes"] = ["9223372036854771712"]  # none
    assert memory_of(cpu) == 500_000


@pytest.mark.usefixtures("nothing_loads")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--report-to", "wandb"], "--report-to wandb: wandb is not installed. Install it (pip install wandb)"),
        (["--report-to", "azure_ml"], "azure_ml is not installed. Install it (pip install azureml-core)"),
        (["--report-to", "wadnb"], "--report-to wadnb: expected one of "),
        (["--report-to", "none,tensorbord"], "Did you mean 'tensorboard'?"),
        (["--lr", "inf"], "--learning-rate: expected a finite number, found 'inf'"),
        (["--lr", "nan"], "--learning-rate: expected a number, found 'nan'"),
        (["--lr", "-1"], "--learning-rate: expected more than 0, found '-1'"),
        (["--resume", "nowhere"], "--resume nowhere: no such checkpoint"),
        (["--output-dir", "{data}"], "--output-dir {data} is a file"),
        (["--output-dir", "{data}/in/it"], "{data} is a file, not a folder"),
    ],
)
def test_what_is_known_before_training_makes_no_folder(
    words: list[str], message: str, tiny_lm: Path, data: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    from transformers.integrations import integration_utils

    monkeypatch.setattr(integration_utils, "is_wandb_available", lambda: False)
    out = tmp_path / "out"
    before = sorted(tmp_path.iterdir())
    words = [word.format(data=data) for word in words]
    where = [] if "--output-dir" in words else ["--output-dir", str(out)]
    assert main(["train", "--model", str(tiny_lm), "--data", str(data), *where, *words]) in (1, 2)
    err = capsys.readouterr().err
    assert message.format(data=data) in err and err.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


class _WandbError(Exception):
    """As wandb.Error."""


@pytest.mark.usefixtures("nothing_loads")
@pytest.mark.parametrize("name", ["wandb", "all"])
def test_a_tracker_that_cannot_begin_is_refused_before_a_model_is_loaded(
    name: str, tiny_lm: Path, data: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    """W&B itself raises when training begins. wandb 0.24 has these words, without a key and without a terminal."""
    from transformers.integrations import integration_utils

    def login() -> None:
        raise _WandbError("No API key configured. Use `wandb login` to log in.")

    wandb = types.SimpleNamespace(login=login, Error=_WandbError)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr(integration_utils, "is_wandb_available", lambda: True)
    words = ["train", "--model", str(tiny_lm), "--data", str(data), "--output-dir", str(tmp_path / "out")]
    assert main([*words, "--report-to", name]) == 1
    expected = "error: --report-to wandb: No API key configured. Use `wandb login` to log in. WANDB_MODE=offline "
    assert capsys.readouterr().err.startswith(expected)
    assert not (tmp_path / "out").exists()
    wandb.login = lambda: False  # offline
    assert main([*words, "--report-to", name, "--dry-run"]) == 0


def test_a_tracker_that_is_installed_and_not_set_up_is_not_said_to_be_missing(tmp_path: Path, monkeypatch) -> None:
    """transformers counts Comet as available only with its key."""
    (tmp_path / "comet_ml.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(LoraError, match="--report-to comet_ml: comet_ml is installed and not set up"):
        check_reporters(["comet_ml"])


@pytest.mark.parametrize("words", [["--also-train", "lm_head"], ["--bias", "lora_only"], ["classes"]], ids=str)
def test_problem_23_no_weight_is_trained_in_float16(
    words: list[str], tiny_lm: Path, tiny_encoder: Path, data: Path, tmp_path: Path, capsys
) -> None:
    """A loss scaler would refuse its gradients after the model was loaded. bfloat16 and float32 are named."""
    model, what = tiny_lm, words[0]
    if words == ["classes"]:
        data.write_text("".join(json.dumps({"text": f"on {i}", "label": "ab"[i % 2]}) + "\n" for i in range(8)))
        model, words, what = tiny_encoder, [], "a new head"
    out = tmp_path / "out"
    given = ["train", "--model", str(model), "--data", str(data), "--output-dir", str(out), "--dtype", "float16"]
    assert main([*given, *words]) == 1
    assert f"error: --dtype float16 with {what}: " in capsys.readouterr().err
    assert not out.exists()


def test_where_nothing_can_be_written_is_told_with_its_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    check_output(tmp_path / "new" / "folder")
    check_file(tmp_path / "new.json", "--json")
    with pytest.raises(FileExistsError, match=r"^--output-dir .*file is a file\.$"):
        check_output(tmp_path / "file")
    with pytest.raises(NotADirectoryError, match=r"^--output-dir .*file is a file, not a folder\.$"):
        check_output(tmp_path / "file" / "a" / "b")
    with pytest.raises(FileNotFoundError, match=r"^--json .*a\.json: there is no folder .*none\.$"):
        check_file(tmp_path / "none" / "a.json", "--json")
    with pytest.raises(IsADirectoryError, match=r"^--json .* is a folder; name a file in it\.$"):
        check_file(tmp_path, "--json")
    (tmp_path / "link").symlink_to("gone")
    for path in (tmp_path / "link", tmp_path / "link" / "inside"):
        with pytest.raises(FileNotFoundError, match=r"^--output-dir .*: the link .*link leads to gone, which is not"):
            check_output(path)
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(PermissionError, match=r"^--output-dir .*new: .* may not be written to\.$"):
        check_output(tmp_path / "new")


def test_commands_check_where_they_write_before_they_load(tmp_path: Path, data: Path, capsys) -> None:
    (tmp_path / "file").touch()
    inside = str(tmp_path / "file" / "x")
    for words in (
        ["merge", "--model", "m", "--output-dir", inside],
        ["analyze", "m", "--output-dir", inside],
        ["compare", "--model", "m", "--data", str(data), "--output-dir", inside],
        ["eval", "--model", "m", "--data", str(data), "--json", inside],
    ):
        assert main(words) == 1
        err = capsys.readouterr().err
        assert f"{words[-2]} {inside}: " in err and "'m'" not in err, words


@pytest.mark.parametrize(
    "content",
    [b"", b"precious", b"[]", b"{}", b'{"peft_type": "LORA", "r": 4}', b'{"text": "a"}\n', b"\xff\x00", None],
    ids=repr,
)
def test_eval_replaces_nothing_but_an_earlier_result(content: bytes | None, tmp_path: Path, data: Path, capsys) -> None:
    """`eval --json` replaces only its own earlier result, never an adapter's configuration, the data or other files."""
    target = data if content is None else tmp_path / "target.json"
    if content is not None:
        target.write_bytes(content)
    before = target.read_bytes()
    assert main(["eval", "--model", "m", "--data", str(data), "--json", str(target)]) == 1
    assert f"--json {target} " in capsys.readouterr().err
    assert target.read_bytes() == before


def test_an_earlier_result_may_be_replaced(tmp_path: Path) -> None:
    result = Evaluation(1, "test", {"exact match": (0.0, 1.0)}, ())
    path = tmp_path / "scores.json"
    path.write_text(json.dumps(dataclasses.asdict(result)))
    check_result(path, "--json")
