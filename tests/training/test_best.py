"""Runs that are judged by held-out rows: they end when nothing gets better, keep the best adapter, and resume."""

import dataclasses
import json
import math
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from adapters import write_rows
from lorakit.training.best import Best
from lorakit.training.checkpoints import BEST, checkpoints, fault_of
from lorakit.training.config import Judged, TrainConfig
from lorakit.training.interrupt import Interrupted, SaveAndStop
from lorakit.training.loop import train
from lorakit.training.trainers import CausalTrainer

pytestmark = pytest.mark.usefixtures("few_objects")


@pytest.fixture(autouse=True)
def _unplanned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counting the memory takes longer than these training runs."""

    def not_counted(*_: object) -> None:
        raise NotImplementedError("not counted")

    monkeypatch.setattr("lorakit.training.plan.step_storages", not_counted)


@pytest.fixture
def config(tiny_lm: Path, tmp_path: Path) -> TrainConfig:
    """Eight steps, an evaluation after each, a checkpoint after every second one."""
    (tmp_path / "data").mkdir()
    rows = [{"prompt": f"turn {i % 4}", "completion": "on" if i % 2 else "off"} for i in range(16)]
    write_rows(tmp_path / "data" / "train.jsonl", rows)
    write_rows(tmp_path / "data" / "valid.jsonl", rows[:4])
    usual: dict[str, Any] = dict(batch_size=8, epochs=4.0, save_steps=2, eval_steps=1, eval_samples=4, logging_steps=1)
    usual |= dict(dtype="float32", learning_rate=5e-3, rank=4, targets=("q_proj", "v_proj"), dropout=0.1)
    return TrainConfig(str(tiny_lm), str(tmp_path / "data"), str(tmp_path / "out"), **usual)


def adapter(config: TrainConfig) -> bytes:
    return (Path(config.output_dir) / "adapter_model.safetensors").read_bytes()


def logged(config: TrainConfig, key: str) -> list[tuple[int, float]]:
    lines = map(json.loads, (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line[key]) for line in lines if key in line]


def judge_by(monkeypatch: pytest.MonkeyPatch, losses: Sequence[float]) -> None:
    """The held-out loss after each step."""
    evaluation_loop = CausalTrainer.evaluation_loop

    def judged(self: Any, *args: Any, **named: Any) -> Any:
        found = evaluation_loop(self, *args, **named)
        found.metrics["eval_loss"] = losses[self.state.global_step - 1]
        return found

    monkeypatch.setattr(CausalTrainer, "evaluation_loop", judged)


# --- when a run ends ---


@pytest.mark.parametrize(
    ("metric", "values", "patience", "over"),
    [
        ("loss", [3.0, 2.0, 2.1], 1, True),
        ("loss", [3.0, 2.0, 2.1], 2, False),
        ("loss", [3.0, 2.0, 2.0], 1, True),  # equal is not better
        ("loss", [3.0, 2.0, 1.9], 1, False),
        ("loss", [math.nan, math.nan], 1, True),
        ("loss", [math.nan, 5.0], 1, False),
        ("loss", [], 1, False),
        ("loss", [3.0, 4.0, 5.0], None, False),
        ("exact-match", [10.0, 5.0], 1, True),
        ("exact-match", [10.0, 15.0], 1, False),
        ("ter", [10.0, 15.0], 1, True),  # errors
    ],
)
def test_a_run_is_over_after_so_many_evaluations_without_a_better_one(
    metric: str, values: list[float], patience: int | None, over: bool
) -> None:
    held: list[int] = []
    best = Best(metric, patience, lambda: held.append(1))
    key = "eval_" + metric.replace("-", "_")
    history = [line for i, value in enumerate(values) for line in ({"step": i, "loss": 9.0}, {"step": i, key: value})]
    assert best.is_over(history) is over
    control = SimpleNamespace(should_training_stop=False, should_save=False)
    best.on_evaluate(None, SimpleNamespace(log_history=history, is_world_process_zero=False), control)
    assert control.should_training_stop is control.should_save is over


def test_patience_ends_a_run_and_its_last_step_is_saved(config: TrainConfig, monkeypatch, capsys) -> None:
    judge_by(monkeypatch, [5, 4, 4.5, 4.2, 4.1, 3, 3, 3])
    train(dataclasses.replace(config, patience=3))
    assert "no better loss in 3 evaluations: training ends (--patience)" in capsys.readouterr().out
    assert logged(config, "eval_loss") == [(1, 5), (2, 4), (3, 4.5), (4, 4.2), (5, 4.1)]
    assert [path.name for path in checkpoints(Path(config.output_dir))] == ["checkpoint-4", "checkpoint-5"]
    assert adapter(config) == (Path(config.output_dir) / "checkpoint-5" / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("strategy", ["epoch", "steps"])
def test_an_evaluation_and_a_checkpoint_of_the_same_step(strategy: str, config: TrainConfig, monkeypatch) -> None:
    judge_by(monkeypatch, [1, 2, 3, 4, 5, 6, 7, 8])
    by_steps = strategy == "steps"
    train(
        dataclasses.replace(config, patience=1, eval_steps=2 if by_steps else None, save_steps=2 if by_steps else None)
    )
    assert [step for step, _ in logged(config, "eval_loss")] == [2, 4]
    assert [path.name for path in checkpoints(Path(config.output_dir))] == ["checkpoint-2", "checkpoint-4"]


# --- which adapter it ends with ---


def test_the_best_adapter_is_that_of_its_step(config: TrainConfig, monkeypatch, tmp_path: Path, capsys) -> None:
    """A run that saves after each step has the same adapter in the checkpoint of that step."""
    judge_by(monkeypatch, [5, 4, 2, 3, 2, 6, 7, 8])
    train(dataclasses.replace(config, keep="best"))
    assert (
        "best held-out loss: 2 at step 3, of 8 evaluations; the run ends with the adapter of" in capsys.readouterr().out
    )
    short = dataclasses.replace(config, output_dir=str(tmp_path / "short"), save_steps=1)
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        with pytest.raises(Interrupted):
            train(short)
    expected = load_file(tmp_path / "short" / "checkpoint-3" / "adapter_model.safetensors")
    found = load_file(Path(config.output_dir) / "adapter_model.safetensors")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    last = load_file(Path(config.output_dir) / "checkpoint-8" / "adapter_model.safetensors")
    assert not any(torch.equal(found[name], last[name]) for name in found)


def stop_at(patch: pytest.MonkeyPatch, step: int) -> None:
    """Ctrl-C in this step."""
    on_step_begin = SaveAndStop.on_step_begin

    def begin(self: Any, args: Any, state: Any, control: Any, **named: Any) -> Any:
        if state.global_step + 1 == step:
            signal.raise_signal(signal.SIGINT)
        return on_step_begin(self, args, state, control, **named)

    patch.setattr(SaveAndStop, "on_step_begin", begin)


@pytest.mark.parametrize("step", [2, 3, 5, 6])
def test_a_judged_run_resumes_bit_for_bit(step: int, config: TrainConfig, monkeypatch, tmp_path: Path, capsys) -> None:
    """Interrupted before and after its best evaluation, and when it has only to end."""
    config = dataclasses.replace(config, keep="best", patience=3, metric="exact-match")
    judge_by_score(monkeypatch, [0, 10, 30, 20, 30, 25, 99, 99])
    straight = dataclasses.replace(config, output_dir=str(tmp_path / "straight"))
    train(straight)
    assert [value for _, value in logged(straight, "eval_exact_match")] == [0, 10, 30, 20, 30, 25]
    with monkeypatch.context() as patch:
        stop_at(patch, step)
        with pytest.raises(Interrupted):
            train(config)
    found = checkpoints(Path(config.output_dir))[-1]
    assert (found / BEST).is_file() and fault_of(found) is None
    capsys.readouterr()
    train(dataclasses.replace(config, resume="auto"))
    assert "best held-out exact-match: 30 at step 3, of 6 evaluations" in capsys.readouterr().out
    assert adapter(config) == adapter(straight)
    assert logged(config, "eval_exact_match") == logged(straight, "eval_exact_match")


def judge_by_score(monkeypatch: pytest.MonkeyPatch, scores: Sequence[float]) -> None:
    evaluation_loop = CausalTrainer.evaluation_loop

    def judged(self: Any, *args: Any, **named: Any) -> Any:
        found = evaluation_loop(self, *args, **named)
        found.metrics["eval_exact_match"] = scores[self.state.global_step - 1]
        return found

    monkeypatch.setattr(CausalTrainer, "evaluation_loop", judged)


def test_how_a_run_is_judged_may_not_change_when_it_resumes(config: TrainConfig, monkeypatch) -> None:
    config = dataclasses.replace(config, keep="best")
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        with pytest.raises(Interrupted):
            train(config)
    for change, said in (
        ({"keep": "last", "patience": 2}, r"--patience: none then, 2 now\n  --keep: best then, last now"),
        ({"metric": "bleu"}, "--metric: loss then, bleu now"),
        ({"eval_steps": 2}, "--eval-steps: 1 then, 2 now"),
    ):
        changed: dict[str, Any] = {**change}
        with pytest.raises(ValueError, match=said):
            train(dataclasses.replace(config, resume="auto", **changed))


# --- the score ---


@pytest.mark.parametrize("metric", ["exact-match", "bleu", "rouge-l"])
def test_answers_are_scored_as_a_generation_of_each_row_alone(metric: Judged, config: TrainConfig, capsys) -> None:
    """The last evaluation is of the adapter that was written. And judging does not change what is trained."""
    from lorakit.training.generation import answers
    from lorakit.training.models import load_with_adapter
    from lorakit.training.scores import METRICS

    plain = dataclasses.replace(config, output_dir=config.output_dir + "-plain")
    train(plain)
    judged = dataclasses.replace(config, metric=metric, max_new_tokens=6)
    train(judged)
    assert adapter(judged) == adapter(plain)
    loaded = load_with_adapter(judged.output_dir, None, dtype="float32")
    found: list[str] = []
    for i in range(4):
        prompt = f"<|im_start|>user\nturn {i}<|im_end|>\n<|im_start|>assistant\n"
        ids = loaded.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        found += answers(loaded, [ids], max_new_tokens=6)
    expected = METRICS[metric].score(found, [("on",) if i % 2 else ("off",) for i in range(4)])
    scores = logged(judged, "eval_" + metric.replace("-", "_"))
    assert [step for step, _ in scores] == list(range(1, 9))
    assert scores[-1][1] == pytest.approx(expected, abs=1e-4)
    assert f"held-out loss {logged(judged, 'eval_loss')[-1][1]:.4f}, {metric} {expected:.4g}" in capsys.readouterr().out


def test_classes_are_scored_by_what_is_predicted(config: TrainConfig, tiny_encoder: Path, tmp_path: Path) -> None:
    rows = [
        {"text": f"the light is {'on' if i % 2 else 'off'}", "label": "good" if i % 2 else "bad"} for i in range(16)
    ]
    write_rows(tmp_path / "data" / "train.jsonl", rows)
    write_rows(tmp_path / "data" / "valid.jsonl", [*rows[:3], {"text": "the light is on", "label": "bad"}])
    changed: dict[str, Any] = dict(model=str(tiny_encoder), targets=("query",), learning_rate=0.02, metric="accuracy")
    config = dataclasses.replace(config, keep="best", epochs=8.0, **changed)
    train(config)
    assert max(value for _, value in logged(config, "eval_accuracy")) == 75.0  # one label contradicts the others


# --- what cannot be judged ---


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"metric": "accuracy"}, "accuracy is for classes; this task is causal-lm"),
        ({"metric": "bleu", "eval_samples": 0}, "--metric bleu: --eval-samples 0 leaves no row to answer"),
        ({"patience": 1, "data": "train"}, "--patience: .* has no held-out rows; add a valid file, or --holdout"),
        ({"keep": "best", "data": "train"}, "--keep best: .* has no held-out rows"),
        ({"metric": "bleu", "data": "texts"}, "bleu is for texts; this task is causal-lm without prompts"),
    ],
)
def test_what_cannot_be_judged_is_told_before_anything_is_made(
    changed: dict[str, Any], said: str, config: TrainConfig, tmp_path: Path
) -> None:
    if changed.get("data") == "train":
        changed = {**changed, "data": str(tmp_path / "data" / "train.jsonl"), "holdout": 0.0}
    if changed.get("data") == "texts":
        changed = {**changed, "data": str(write_rows(tmp_path / "t.jsonl", [{"text": f"turn {i}"} for i in range(9)]))}
    with pytest.raises(ValueError, match=said):
        train(dataclasses.replace(config, **changed))
    assert not Path(config.output_dir).exists()


def test_a_score_whose_library_is_missing_is_told_before_anything_is_made(config: TrainConfig, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    with pytest.raises(ImportError, match="sacrebleu"):
        train(dataclasses.replace(config, metric="bleu"))
    assert not Path(config.output_dir).exists()
