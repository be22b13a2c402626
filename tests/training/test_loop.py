"""The life of a run without the command line: how it begins, is interrupted, resumed, replaced, and how it ends."""

import dataclasses
import json
import os
import shlex
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lorakit.cli.main import main
from lorakit.formats.folder import OutputFolder
from lorakit.training import fitting, loop
from lorakit.training.checkpoints import checkpoints
from lorakit.training.config import TrainConfig
from lorakit.training.divergence import Diverged
from lorakit.training.interrupt import Interrupted
from lorakit.training.loop import train
from lorakit.training.prepare import prepare
from lorakit.training.progress import Progress
from lorakit.training.settings import UsageError
from lorakit.training.trainers import CausalTrainer

pytestmark = pytest.mark.usefixtures("few_objects")


@pytest.fixture(autouse=True)
def _unplanned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counting the memory takes longer than these training runs."""

    def not_counted(*_: object) -> None:
        raise NotImplementedError("not counted")

    monkeypatch.setattr("lorakit.training.plan.step_storages", not_counted)


def rows(path: Path, answer: str = "on", count: int = 16) -> str:
    lines = [{"prompt": f"turn {i % 6}", "completion": f"{answer} {i % 3}"} for i in range(count)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


@pytest.fixture
def config(tiny_lm: Path, tmp_path: Path) -> TrainConfig:
    """Four steps, a checkpoint after each."""
    usual: dict[str, Any] = dict(batch_size=8, epochs=2.0, save_steps=1, eval_samples=0, holdout=0.0, logging_steps=1)
    usual |= dict(dtype="float32", learning_rate=5e-3, rank=4, targets=("q_proj", "v_proj"), dropout=0.1)
    return TrainConfig(str(tiny_lm), rows(tmp_path / "d.jsonl"), str(tmp_path / "out"), **usual)


def adapter(config: TrainConfig) -> bytes:
    return (Path(config.output_dir) / "adapter_model.safetensors").read_bytes()


def steps(folder: str | Path) -> list[str]:
    return [path.name for path in checkpoints(Path(folder))]


def tree(folder: str | Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def settings(folder: str | Path) -> dict[str, Any]:
    return yaml.safe_load((Path(folder) / "config.yaml").read_text())


def interrupt_at(monkeypatch: pytest.MonkeyPatch, step: int, error: BaseException | int) -> None:
    """Send a signal, or raise an error, in this step of training."""
    training_step = CausalTrainer.training_step

    def step_of(self: Any, *args: Any, **named: Any) -> Any:
        if self.state.global_step + 1 == step:
            if isinstance(error, int):
                os.kill(os.getpid(), error)
            else:
                raise error
        return training_step(self, *args, **named)

    monkeypatch.setattr(CausalTrainer, "training_step", step_of)


# --- beginning and resuming ---


def test_resume_auto_starts_anew_goes_on_and_ends(config: TrainConfig, capsys: pytest.CaptureFixture[str]) -> None:
    """One command for the first start and every later one."""
    again = dataclasses.replace(config, resume="auto")
    train(again)
    assert "holds no checkpoint; the run starts from the beginning" in capsys.readouterr().out
    first = tree(config.output_dir)
    train(again)
    assert "finished after 4 steps: nothing remains to be done" in capsys.readouterr().out
    assert tree(config.output_dir) == first


def test_a_finished_run_without_checkpoints_is_not_begun_anew(config: TrainConfig) -> None:
    """A longer run has no checkpoint to continue from; the adapter stays."""
    train(config)
    for path in Path(config.output_dir).glob("checkpoint-*"):
        shutil.rmtree(path)
    first = tree(config.output_dir)
    longer = dataclasses.replace(config, resume="auto", epochs=2 * config.epochs)
    with pytest.raises(FileNotFoundError, match=r"holds a finished run, and no whole checkpoint .*--overwrite"):
        train(longer)
    assert tree(config.output_dir) == first
    train(dataclasses.replace(config, resume="auto"))  # nothing remains to be done
    assert tree(config.output_dir) == first


@pytest.mark.parametrize("lost", ["adapter", "adapter and last checkpoint", "a file of the last checkpoint"])
def test_a_resumed_run_is_the_uninterrupted_one(lost: str, config: TrainConfig, capsys) -> None:
    train(config)
    expected, out = adapter(config), Path(config.output_dir)
    (out / "adapter_model.safetensors").unlink()
    if lost == "adapter and last checkpoint":
        shutil.rmtree(out / "checkpoint-4")
    if lost == "a file of the last checkpoint":
        (out / "checkpoint-4" / "optimizer.pt").unlink()
    capsys.readouterr()
    train(dataclasses.replace(config, resume="auto"))
    printed = capsys.readouterr().out
    assert adapter(config) == expected and steps(out) == ["checkpoint-3", "checkpoint-4"]
    assert f"goes on from {out / ('checkpoint-4' if lost == 'adapter' else 'checkpoint-3')}" in printed
    assert ("checkpoint-4 is not whole and is passed over: optimizer.pt is missing" in printed) == ("a file" in lost)


CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"rank": 8, "alpha": 8.0}, "--rank: 4 then, 8 now"),
    ({"alpha": 4.0}, "--alpha: 32 then, 4 now"),
    ({"dropout": 0.0}, "--dropout: 0.1 then, 0 now"),
    ({"rslora": True}, "--rslora: False then, True now"),
    ({"dora": True}, "--dora: False then, True now"),
    ({"init": "pissa"}, "--init: kaiming then, pissa now"),
    ({"targets": ("q_proj",)}, "--targets: q_proj,v_proj then, q_proj now"),
    ({"scheduler": "cosine"}, "--scheduler: linear then, cosine now"),
    ({"warmup_ratio": 0.5}, "--warmup-ratio: 0.03 then, 0.5 now"),
    ({"learning_rate": 1e-3}, "--learning-rate: 0.005 then, 0.001 now"),
    ({"weight_decay": 0.1}, "--weight-decay: 0 then, 0.1 now"),
    ({"batch_size": 4}, "--batch-size: 8 then, 4 now"),
    ({"gradient_accumulation_steps": 2}, "--gradient-accumulation-steps: 1 then, 2 now"),
    ({"seed": 5}, "--seed: 0 then, 5 now"),
    ({"plain": True}, "--plain: False then, True now"),
    ({"system": "Be brief."}, "--system: none then, Be brief. now"),
    ({"dtype": "bfloat16"}, "--dtype: float32 then, bfloat16 now"),
    ({"max_seq_length": 20, "too_long": "truncate"}, "--max-seq-length: 1024 then, 20 now"),
    ({"bias": "all"}, "--bias: none then, all now"),
    ({"data": "other"}, "the training rows: 16 rows then, 16 now, and not the same ones"),
    ({"data": "fewer"}, "the training rows: 16 rows then, 12 now, and not the same ones"),
    ({"model": "other weights"}, "its configuration or its weights are not what they were"),
    ({"model": "other tokenizer"}, "the tokenizer or its chat template"),
]


@pytest.fixture(scope="module")
def ran(tiny_lm: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """An interrupted run."""
    folder = tmp_path_factory.mktemp("ran")
    usual: dict[str, Any] = dict(batch_size=8, epochs=2.0, save_steps=1, eval_samples=0, holdout=0.0)
    usual |= dict(dtype="float32", learning_rate=5e-3, rank=4, targets=("q_proj", "v_proj"), dropout=0.1)
    found = TrainConfig(str(tiny_lm), rows(folder / "d.jsonl"), str(folder / "out"), **usual)
    train(found)
    (folder / "out" / "adapter_model.safetensors").unlink()
    shutil.rmtree(folder / "out" / "checkpoint-4")
    return found


@pytest.mark.parametrize("resume", ["auto", "path"])
@pytest.mark.parametrize(("change", "said"), CHANGES, ids=lambda value: str(value)[:40])
def test_other_settings_are_refused_with_the_difference(
    change: dict[str, Any], said: str, resume: str, ran: TrainConfig, tiny_lm: Path, tmp_path: Path
) -> None:
    if resume == "path" and len(change) + ("rank" in change) > 1:
        pytest.skip("the same check")
    change = dict(change)
    if "data" in change:
        change["data"] = (
            rows(tmp_path / "e.jsonl", "off") if change["data"] == "other" else rows(tmp_path / "e.jsonl", count=12)
        )
    if "model" in change:
        model = shutil.copytree(tiny_lm, tmp_path / "lm")
        if change["model"] == "other weights":
            from safetensors.torch import load_file, save_file

            weights = {name: tensor + 1e-3 for name, tensor in load_file(model / "model.safetensors").items()}
            save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
        else:
            template = (model / "chat_template.jinja").read_text()
            (model / "chat_template.jinja").write_text(template.replace("<|im_start|>", "<s>"))
        change["model"] = str(model)
    before = tree(ran.output_dir)
    given = "auto" if resume == "auto" else str(Path(ran.output_dir) / "checkpoint-3")
    with pytest.raises(ValueError, match="belongs to a run of other settings") as caught:
        train(dataclasses.replace(ran, resume=given, **change))
    assert said in str(caught.value) and "Nothing was changed" in str(caught.value)
    assert tree(ran.output_dir) == before


def test_what_decides_nothing_may_change_and_files_may_move(config: TrainConfig, tmp_path: Path) -> None:
    train(config)
    expected, out = adapter(config), Path(config.output_dir)
    (out / "adapter_model.safetensors").unlink()
    shutil.rmtree(out / "checkpoint-4")
    moved: dict[str, Any] = {
        "model": str(shutil.copytree(config.model, tmp_path / "lm")),
        "data": str(shutil.copy(config.data, tmp_path / "e.jsonl")),
    }
    shutil.move(out, tmp_path / "moved")
    free: dict[str, Any] = dict(save_steps=2, logging_steps=2, eval_samples=1, alpha=32.0, gradient_checkpointing=True)
    again = dataclasses.replace(config, resume="auto", output_dir=str(tmp_path / "moved"), **moved, **free)
    train(again)
    assert adapter(again) == expected
    assert settings(again.output_dir)["save_steps"] == 2


def test_a_longer_and_a_shorter_run_are_said(config: TrainConfig, capsys: pytest.CaptureFixture[str]) -> None:
    train(config)
    train(dataclasses.replace(config, resume="auto", epochs=3.0))
    said = "the run was begun for 4 steps and is now one of 6; from here the linear schedule is that of 6 steps."
    assert said in capsys.readouterr().out
    assert steps(config.output_dir) == ["checkpoint-5", "checkpoint-6"] and settings(config.output_dir)["epochs"] == 3
    expected = adapter(config)
    train(dataclasses.replace(config, resume="auto", max_steps=5))
    assert "one of 5: the checkpoint is of step 6, so nothing more is trained." in capsys.readouterr().out
    assert adapter(config) == expected


@pytest.mark.parametrize("given", ["nothing", "a file", "an adapter", "the run", "broken"])
def test_what_is_no_checkpoint_is_refused(given: str, config: TrainConfig, ran: TrainConfig, tmp_path: Path) -> None:
    path = {"the run": Path(ran.output_dir), "a file": Path(ran.data)}.get(given, tmp_path / "given")
    if given in ("an adapter", "broken"):
        shutil.copytree(Path(ran.output_dir) / "checkpoint-3", path)
        (path / ("adapter_state.safetensors" if given == "an adapter" else "scheduler.pt")).unlink()
    with pytest.raises(FileNotFoundError, match=r"no such checkpoint|is no whole checkpoint of lorakit: .* is missing"):
        train(dataclasses.replace(config, resume=str(path)))
    assert not Path(config.output_dir).exists()


def test_a_checkpoint_begins_a_run_in_another_folder(config: TrainConfig, tmp_path: Path) -> None:
    train(config)
    other = dataclasses.replace(config, output_dir=str(tmp_path / "other"))
    given = str(Path(config.output_dir) / "checkpoint-3")
    train(dataclasses.replace(other, resume=given))
    assert adapter(other) == adapter(config) and steps(other.output_dir) == ["checkpoint-4"]
    with pytest.raises(FileExistsError, match="holds a run already, and .*checkpoint-3 is a checkpoint of another one"):
        train(dataclasses.replace(other, resume=given))


def test_resume_and_overwrite_contradict_each_other(config: TrainConfig) -> None:
    train(config)
    for given in ("auto", str(Path(config.output_dir) / "checkpoint-4")):
        with pytest.raises(UsageError, match="--resume goes on with a run and --overwrite starts a new"):
            train(dataclasses.replace(config, resume=given, overwrite=True))


# --- interruptions ---


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("step", [1, 2, 3, 4])
def test_a_signal_saves_the_step_and_names_the_way_on(
    number: signal.Signals, code: int, step: int, config: TrainConfig, tmp_path: Path, monkeypatch
) -> None:
    """Between saves too, and with dropout and a held-out loss in between: the resumed run is the same bit for bit."""
    if number == signal.SIGTERM and step != 3:
        pytest.skip("the same way")
    handler = signal.getsignal(number)
    config = dataclasses.replace(config, save_steps=100, holdout=0.2)
    train(dataclasses.replace(config, output_dir=str(tmp_path / "straight")))
    with monkeypatch.context() as patch:
        interrupt_at(patch, step, number)
        with pytest.raises(Interrupted, match=rf"interrupted; .*checkpoint-{step} is saved\.") as caught:
            train(config)
    assert caught.value.code == code
    command = str(caught.value).splitlines()[-1]
    assert command == f"  lorakit train --config {config.output_dir}/config.yaml --resume auto"
    assert signal.getsignal(number) == handler
    assert steps(config.output_dir) == [f"checkpoint-{step}"]
    assert main(shlex.split(command)[1:]) == 0
    assert adapter(config) == (tmp_path / "straight" / "adapter_model.safetensors").read_bytes()


def test_the_way_on_is_told_in_words_where_the_folder_holds_other_settings(config: TrainConfig, monkeypatch) -> None:
    """A finished run that is made longer keeps its settings until the longer one is complete."""
    train(config)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 6, signal.SIGINT)
        said = r"checkpoint-6 is saved\. The same command goes on from it with --resume auto"
        with pytest.raises(Interrupted, match=said):
            train(dataclasses.replace(config, resume="auto", epochs=4.0))


def test_a_second_interrupt_ends_at_once_and_leaves_nothing_half(config: TrainConfig, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        interrupt_at(patch, 1, KeyboardInterrupt())
        with pytest.raises(Interrupted, match="interrupted before the first checkpoint: the same command starts over"):
            train(config)
    assert not Path(config.output_dir).exists()
    train(config)


# --- failures ---


def test_a_run_that_fails_before_its_first_step_leaves_nothing(config: TrainConfig, monkeypatch) -> None:
    for trouble in (MemoryError("out of memory"), ValueError("something")):
        with monkeypatch.context() as patch:
            interrupt_at(patch, 1, trouble)
            with pytest.raises(type(trouble), match=str(trouble)):
                train(config)
        assert not Path(config.output_dir).exists()


@pytest.mark.parametrize("rate", [1e6, 1e30])
def test_a_run_that_came_to_nothing_makes_way_for_the_corrected_one(rate: float, config: TrainConfig, capsys) -> None:
    with pytest.raises(Diverged, match="The learning rate is probably too high"):
        train(dataclasses.replace(config, learning_rate=rate, save_steps=100))
    out = Path(config.output_dir)
    assert "── done" not in capsys.readouterr().out
    assert not any((out / name).exists() for name in ("adapter_model.safetensors", "README.md", "report.html"))
    train(config)
    assert settings(out)["learning_rate"] == 5e-3


def test_a_run_that_diverged_behind_a_checkpoint_says_what_is_kept(config: TrainConfig, monkeypatch) -> None:
    loss_of, calls = CausalTrainer.loss_of, []

    def spoilt(self: Any, *args: Any, **rest: Any) -> Any:
        calls.append(self.state.global_step)
        spoils = self.state.global_step >= 2 and self.model.training
        return loss_of(self, *args, **rest) * (torch.nan if spoils else 1.0)

    monkeypatch.setattr(CausalTrainer, "loss_of", spoilt)
    with pytest.raises(Diverged, match=r"is nan at step 3.*out keeps its checkpoints; --overwrite replaces it by"):
        train(dataclasses.replace(config, save_steps=1))
    assert 2 in calls and (Path(config.output_dir) / "checkpoint-2").is_dir()
    monkeypatch.undo()
    train(dataclasses.replace(config, overwrite=True))
    assert settings(Path(config.output_dir))["overwrite"] is False


def test_a_row_that_makes_the_loss_no_number_is_named_with_its_line(config: TrainConfig, monkeypatch) -> None:
    loss_of = CausalTrainer.loss_of
    from lorakit.training.models import load_tokenizer

    wanted = load_tokenizer(config.model)("turn 4").input_ids

    def spoilt(self: Any, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Any:
        loss = loss_of(self, model, inputs, num_items_in_batch)
        found = [str(wanted)[1:-1] in str(row) for row in inputs["input_ids"].tolist()]
        return loss * (torch.nan if any(found) else 1.0)

    monkeypatch.setattr(CausalTrainer, "loss_of", spoilt)
    with pytest.raises(Diverged, match=r"These rows make it so: d.jsonl:(5|11)[.,]"):
        train(dataclasses.replace(config, batch_size=16))


@pytest.mark.parametrize("model", ["tiny_lm", "tiny_encoder"])
def test_a_row_that_was_cut_to_the_models_positions_is_named_too(
    model: str, config: TrainConfig, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(model)
    labelled = model == "tiny_encoder"
    long = [{"text": f"turn {i} " * 900, **({"label": str(i % 2)} if labelled else {})} for i in range(3)]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in long))
    changed: dict[str, Any] = {"model": str(folder), "data": str(tmp_path / "long.jsonl"), "max_seq_length": 10_000}
    prepared = prepare(dataclasses.replace(config, **changed, targets=("all-linear",), too_long="truncate"))
    assert {len(row["input_ids"]) for row in prepared.train} == {prepared.limit} != {10_000}
    for number, row in enumerate(prepared.train):
        found = fitting._where(prepared, {"input_ids": torch.tensor([row["input_ids"]])})
        assert found == f"long.jsonl:{number + 1}"


# --- TensorBoard ---


def events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The scalars by tag, each with its step, of all event files in a folder, read by TensorBoard."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: dict[str, list[tuple[int, float]]] = {}
    for path in sorted(folder.rglob("events.out.tfevents.*")):
        reader = EventAccumulator(str(path)).Reload()
        for tag in reader.Tags()["scalars"]:
            found.setdefault(tag, []).extend((event.step, event.value) for event in reader.Scalars(tag))
    return found


def test_tensorboard_shows_the_numbers_of_metrics_jsonl(config: TrainConfig, tmp_path: Path, monkeypatch) -> None:
    """A resumed run adds its event file. OUT/runs belongs to the run: --overwrite replaces it, and a run that failed at
    its first step leaves none.
    """
    config = dataclasses.replace(config, report_to=("tensorboard",), holdout=0.25, eval_steps=1)
    out = Path(config.output_dir)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 1, RuntimeError("at the first step"))
        with pytest.raises(RuntimeError, match="at the first step"):
            train(config)
    assert not out.exists()
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2, signal.SIGINT)
        with pytest.raises(Interrupted, match="checkpoint-2 is saved"):
            train(config)
    before = list((out / "runs").rglob("events.*"))
    train(dataclasses.replace(config, resume="auto"))
    assert set(before) < set((out / "runs").rglob("events.*"))
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    found = events(out)
    for key, tag in (("loss", "train/loss"), ("eval_loss", "eval/loss"), ("learning_rate", "train/learning_rate")):
        expected = [(line["step"], line[key]) for line in lines if key in line]
        assert [step for step, _ in expected] == [1, 2, 3, 4]
        assert [step for step, _ in found[tag]] == [1, 2, 3, 4]
        # metrics.jsonl has six digits, an event has float32
        assert [value for _, value in found[tag]] == pytest.approx([value for _, value in expected], rel=1e-5)
    train(dataclasses.replace(config, overwrite=True, report_to=None))
    assert not (out / "runs").exists()


# --- one folder, several runs ---


def test_overwrite_keeps_the_old_run_until_the_new_one_is_whole(
    config: TrainConfig, tmp_path: Path, monkeypatch
) -> None:
    train(config)
    out, kept = Path(config.output_dir), ("adapter_model.safetensors", "config.yaml", "README.md")
    old = {name: (out / name).read_bytes() for name in kept}
    new = dataclasses.replace(config, data=rows(tmp_path / "e.jsonl", "off", 8), system="Be brief.", epochs=3.0)
    (out / "labels.json").write_text('["stale"]')
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2, signal.SIGINT)
        with pytest.raises(Interrupted, match=r"new/checkpoint-2 is saved"):
            train(dataclasses.replace(new, overwrite=True))
    assert {name: (out / name).read_bytes() for name in kept} == old
    assert steps(out) == ["checkpoint-3", "checkpoint-4"]
    with pytest.raises(FileExistsError, match="A new run beside it was interrupted: --resume auto goes on with that"):
        train(config)
    with pytest.raises(ValueError, match="belongs to a run of other settings"):
        train(dataclasses.replace(config, resume="auto"))
    train(dataclasses.replace(new, resume="auto"))
    straight = dataclasses.replace(new, output_dir=str(tmp_path / "straight"))
    train(straight)
    assert adapter(new) == adapter(straight)
    assert steps(out) == ["checkpoint-2", "checkpoint-3"] and not (out / "labels.json").exists()
    assert settings(out)["system"] == "Be brief." and settings(out)["overwrite"] is False
    assert os.listdir(out / ".lorakit") == ["train.json"]


@pytest.mark.parametrize("what", ["notes.txt", "base", "another command's"])
@pytest.mark.parametrize("options", [{}, {"overwrite": True}, {"resume": "auto"}], ids=str)
def test_what_train_did_not_write_is_never_touched(
    what: str, options: dict[str, Any], config: TrainConfig, tiny_lm: Path
) -> None:
    out = Path(config.output_dir)
    if what == "base":
        shutil.copytree(tiny_lm, out)
    else:
        out.mkdir()
        (out / ("notes.txt" if what == "notes.txt" else "compare.json")).write_text("mine")
    before = tree(out)
    with pytest.raises(FileExistsError, match="which lorakit train did not write|which this command reads"):
        train(dataclasses.replace(config, model=str(out) if what == "base" else config.model, **options))
    assert tree(out) == before


def test_a_user_s_file_in_a_run_s_folder(config: TrainConfig) -> None:
    """The file does not disturb the run, and it prevents that the folder is replaced."""
    train(config)
    out = Path(config.output_dir)
    (out / "notes.txt").write_text("mine")
    (out / "adapter_model.safetensors").unlink()
    train(dataclasses.replace(config, resume="auto"))
    with pytest.raises(FileExistsError, match="holds notes.txt, which lorakit train did not write"):
        train(dataclasses.replace(config, overwrite=True))
    assert (out / "notes.txt").read_text() == "mine" and (out / "adapter_model.safetensors").exists()


def test_a_second_process_is_refused(config: TrainConfig, tmp_path: Path) -> None:
    from lorakit.training.start import TRAINING

    with OutputFolder(config.output_dir, TRAINING).held():
        for options in ({}, {"overwrite": True}, {"resume": "auto"}):
            with pytest.raises(FileExistsError, match=rf"is in use: process {os.getpid()} of lorakit"):
                train(dataclasses.replace(config, **options))


def test_a_folder_that_changed_meanwhile(config: TrainConfig, monkeypatch) -> None:
    """Two runs begin in an empty folder; the other one has finished when this one has loaded its model."""
    base_fingerprint = vars(loop)["base_fingerprint"]

    def late(loaded: Any) -> str:
        monkeypatch.setattr(loop, "base_fingerprint", base_fingerprint)
        train(config)
        return base_fingerprint(loaded)

    monkeypatch.setattr(loop, "base_fingerprint", late)
    with pytest.raises(FileExistsError, match="was changed by another process meanwhile|is not empty"):
        train(config)
    assert (Path(config.output_dir) / "README.md").exists()


# --- folders of lorakit 0.1.0 ---


def as_released(out: Path) -> None:
    """What 0.1.0 left: the same files, without notes and records."""
    for name in ("style.json", "results.json"):
        (out / name).unlink(missing_ok=True)
    shutil.rmtree(out / ".lorakit")
    for path in out.glob("checkpoint-*/run.json"):
        path.unlink()


def test_a_released_run_is_known_by_its_files(config: TrainConfig, capsys: pytest.CaptureFixture[str]) -> None:
    train(config)
    expected, out = adapter(config), Path(config.output_dir)
    as_released(out)
    with pytest.raises(FileExistsError, match="holds a finished run"):
        train(config)
    (out / "adapter_model.safetensors").unlink()
    shutil.rmtree(out / "checkpoint-4")
    with pytest.raises(ValueError, match="--rank: 4 then, 8 now"):
        train(dataclasses.replace(config, resume="auto", rank=8))
    train(dataclasses.replace(config, resume="auto"))
    assert adapter(config) == expected
    as_released(out)
    train(dataclasses.replace(config, overwrite=True, epochs=1.0))
    assert steps(out) == ["checkpoint-1", "checkpoint-2"]


# --- progress ---


def test_lines_that_an_interruption_cut_off_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 3, "loss": 1.0}\n{"step": 2, "lo')
    progress = Progress(tmp_path)
    progress.take(2)
    assert progress.history == [{"step": 1, "loss": 2.0}]
