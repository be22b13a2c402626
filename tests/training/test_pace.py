"""The estimated time of the rest of a run, compared with a clock that the test moves."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import Tensor

from lorakit.training import loop, pace, progress
from lorakit.training.config import TrainConfig
from lorakit.training.pace import Pace, padded_tokens
from lorakit.training.progress import _heldout_losses
from lorakit.training.trainers import CausalTrainer

pytestmark = pytest.mark.usefixtures("few_objects")


def steps(found: Pace, clock: list[float], *each: tuple[float, float, int]) -> None:
    """Of each step: seconds of the forward pass, seconds of the rest, tokens."""
    for forward, rest, tokens in each:
        found.step_begins()
        with found.forward(tokens):
            clock[0] += forward
        clock[0] += rest
        found.step_ends()


def test_the_rest_is_in_proportion_to_its_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(pace, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    found = Pace(step_tokens=50, heldout_tokens=400)
    steps(found, clock, (9, 9, 10), (9, 9, 10), (1, 2, 100), (1, 3, 100))
    assert found.rest(10, 0) is None  # two that are not timed, and two of three
    steps(found, clock, (2, 3, 200))
    # 12 s of steps and 4 s of forward passes over 400 tokens; 10 steps of 50 and 2 held-out losses of 400 tokens
    assert found.rest(10, 0) == pytest.approx(12 / 400 * 500)
    assert found.rest(10, 2) == pytest.approx(12 / 400 * 500 + 4 / 400 * 800)


def test_short_steps_are_timed_for_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(pace, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    found = Pace(step_tokens=1, heldout_tokens=0)
    for _ in range(13):
        steps(found, clock, (0.125, 0.125, 1))
        assert found.rest(1, 0) is None
    steps(found, clock, (0.125, 0.125, 1))  # the twelfth that is timed: 3 s
    assert found.rest(4, 0) == pytest.approx(1.0)


def test_padding_counts() -> None:
    lengths = [3, 5, 2, 2, 7]
    assert padded_tokens(lengths, 2, shuffled=False) == 5 + 5 + 2 + 2 + 7
    assert padded_tokens([], 2, shuffled=False) == 0
    # The mean of the larger of two numbers from 1 to n, drawn at random, is 2/3 n.
    assert padded_tokens(range(1, 4001), 2, shuffled=True) == pytest.approx(4000 * 2 / 3 * 4000, rel=0.02)


@pytest.mark.parametrize(
    ("strategy", "step", "expected"),
    # 25 steps, 10 for each epoch
    [
        ("no", 5, 0),
        ("epoch", 5, 3),
        ("epoch", 10, 3),
        ("epoch", 11, 2),
        ("steps", 5, 5),
        ("steps", 4, 6),
        ("steps", 9, 4),
    ],
)
def test_held_out_losses_to_come(strategy: str, step: int, expected: int) -> None:
    args = SimpleNamespace(eval_strategy=strategy, eval_steps=4)
    state = SimpleNamespace(max_steps=25, global_step=step, num_train_epochs=3, epoch=step / 10)
    # every 4 steps: at 4, 8, …, 24
    assert _heldout_losses(args, state) == expected


def test_a_run_says_how_long_it_will_take(
    tiny_lm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows of 20 to 200 tokens; a token takes 3 ms forward, in training and in held-out losses, and 6 ms backward."""
    clock = [100.0]

    def forward(self: Any, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        clock[0] += inputs["input_ids"].numel() * 3e-3
        loss = plain(self, model, inputs, num_items_in_batch)
        if loss.requires_grad:
            loss.register_hook(lambda _: backward(inputs["input_ids"].numel()))
        return loss

    def backward(tokens: int) -> None:
        clock[0] += tokens * 6e-3

    def not_counted(*_: object) -> None:
        raise NotImplementedError("not counted")

    plain = CausalTrainer.loss_of
    monkeypatch.setattr(CausalTrainer, "loss_of", forward)
    monkeypatch.setattr("lorakit.training.plan.step_storages", not_counted)
    for module in (pace, progress):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(progress, "_TOLD", 0.0)
    data = tmp_path / "d.jsonl"
    lines = [{"prompt": "x" * (7 * i % 180 + 1), "completion": f"on {i}"} for i in range(48)]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings: dict[str, Any] = dict(
        batch_size=4, epochs=2.0, logging_steps=1, eval_steps=6, eval_samples=0, holdout=0.2
    )
    config = TrainConfig(str(tiny_lm), str(data), str(tmp_path / "out"), **settings, dtype="float32", rank=2)
    loop.train(config)
    printed = capsys.readouterr().out
    told = re.findall(r"about (\d+) s for the remaining (\d+) steps and their held-out losses\n", printed)
    assert len(told) == 1, printed
    seconds, remaining = map(int, told[0])
    logged = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    at = {line["step"]: line["seconds"] for line in logged}  # the last line of a step
    last = max(at)
    taken = at[last] - at[last - remaining]
    assert seconds == pytest.approx(taken, rel=0.15)  # how long the rows to come are is known only on average
