"""`lorakit train --auto`: which settings are tried, that the budget is kept, and that the best one is a plain run."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

import lorakit
from lorakit.core.errors import LoraError
from lorakit.training import auto, auto_settings, pace, preflight, progress
from lorakit.training.auto import Runs, Seconds, best_within
from lorakit.training.auto_settings import AutoSearch, Budget, Candidate, auto_search
from lorakit.training.config import TrainConfig
from lorakit.training.divergence import Diverged
from lorakit.training.interrupt import Interrupted
from lorakit.training.loop import train
from lorakit.training.one_pass_trainer import OnePassTrainer
from lorakit.training.prepare import prepare
from lorakit.training.settings import UsageError
from lorakit.training.tried import Trial

pytestmark = pytest.mark.usefixtures("few_objects")

BOTH = "learning_rate", "rank"
Loss = Callable[[int, float], float]


def search(axes: tuple[str, ...] = BOTH, rank: int = 16, rate: float = 3e-4) -> AutoSearch:
    return AutoSearch(Budget("many"), Candidate(rank, rate), axes)


class Scored:
    """Takes the place of training. loss: of a rank and a learning rate; infinite: it diverges."""

    def __init__(self, loss: Loss, seconds: Callable[[int, float], None] = lambda count, share: None) -> None:
        self.loss, self.seconds = loss, seconds
        self.passes: list[tuple[float, list[tuple[int, float]]]] = []

    def __call__(self, candidates: Sequence[Candidate], share: float) -> dict[Candidate, Trial]:
        self.passes.append((share, [(one.rank, one.learning_rate) for one in candidates]))
        self.seconds(len(candidates), share)
        return {one: Trial(str(one), 9, 0.0, self.loss(*one)) for one in candidates}

    @property
    def candidates(self) -> list[tuple[int, float]]:
        return [one for _, each in self.passes for one in each]


def valley(rank: int, rate: float) -> Loss:
    """The farther from this rank and rate, in steps of the ladders, the worse. A step of the rate is √10 at most."""

    def loss(r: int, lr: float) -> float:
        return abs(math.log(r / rank, 4)) + abs(2 * math.log10(lr / rate))

    return loss


# --- which settings are tried -----------------------------------------------------------------------------------------


def test_the_rate_comes_first_then_the_rank_then_the_rate_again() -> None:
    scored = Scored(valley(64, 1e-3))
    assert best_within(search(), Runs(99), scored) == ((64, 1e-3), "no neighbour of the best setting is better")
    assert scored.passes == [
        (1.0, [(16, 3e-4), (16, 1e-3), (16, 1e-4)]),  # 1e-3 is the best,
        (1.0, [(16, 3e-3)]),  # and 3e-3 worse
        (1.0, [(64, 1e-3), (4, 1e-3)]),  # 64 is better,
        (1.0, [(256, 1e-3)]),  # and 256 worse
        (1.0, [(64, 3e-3), (64, 3e-4)]),  # the rate's neighbours again
    ]


def test_the_best_rate_may_be_another_one_at_another_rank() -> None:
    scored = Scored(lambda rank, rate: valley(256, 3e-3 * 4 / rank**0.5)(rank, rate))
    assert best_within(search(), Runs(99), scored)[0] == (256, 1e-3)
    # At rank 16 the best rate is 3e-3, at 64 1.5e-3, at 256 0.75e-3.
    assert scored.passes[:3] == [
        (1.0, [(16, 3e-4), (16, 1e-3), (16, 1e-4)]),
        (1.0, [(16, 3e-3)]),
        (1.0, [(16, 1e-2)]),
    ]
    assert (256, 3e-4) in scored.candidates and (1024, 1e-3) not in scored.candidates


@pytest.mark.parametrize(
    ("axes", "expected"),
    [
        (("learning_rate",), [[(16, 3e-4), (16, 1e-3), (16, 1e-4)], [(16, 3e-3)]]),
        (("rank",), [[(16, 3e-4), (64, 3e-4), (4, 3e-4)], [(256, 3e-4)]]),
    ],
)
def test_what_is_given_is_not_searched(axes: tuple[str, ...], expected: list[list[tuple[int, float]]]) -> None:
    scored = Scored(valley(64, 1e-3))
    best_within(search(axes), Runs(99), scored)
    assert [each for _, each in scored.passes] == expected


@pytest.mark.parametrize("seed", range(40))
def test_the_end_is_a_setting_that_no_neighbour_beats(seed: int) -> None:
    draw = random.Random(seed)
    scores = {
        (4**power, float(f"{digit}e{exponent}")): draw.choice([math.inf, 1.0, 2.0, 3.0, draw.random()])
        for power, digit, exponent in itertools.product(range(5), (1, 3), range(-12, 4))
    }
    scored = Scored(lambda rank, rate: scores[rank, rate] if rate < 1e3 else math.inf)
    runs = draw.randint(2, 30)
    try:
        best, ended = best_within(search(), Runs(runs), scored)
    except Diverged:
        assert all(scores[one] == math.inf for one in scored.candidates)
        return
    assert len(set(scored.candidates)) == len(scored.candidates) <= runs
    assert scores[best] == min(scores[one] for one in scored.candidates) < math.inf
    if ended.startswith("no neighbour"):
        rates = sorted({rate for _, rate in scores})
        place = rates.index(best.learning_rate)
        around = {(best.rank, rates[place + by]) for by in (1, -1)}
        around |= {(rank, best.learning_rate) for rank in (best.rank * 4, best.rank // 4) if 1 <= rank <= 256}
        assert around <= set(scored.candidates)
    else:
        assert len(scored.candidates) == runs


def test_divergence_is_worse_than_any_loss() -> None:
    scored = Scored(lambda rank, rate: 9.0 - rate if rate < 2e-5 else math.inf)
    assert best_within(search(("learning_rate",)), Runs(99), scored)[0] == (16, 1e-5)
    assert [rate for _, rate in scored.candidates] == [3e-4, 1e-3, 1e-4, 3e-5, 1e-5, 3e-6]
    scored = Scored(lambda rank, rate: math.inf)
    with pytest.raises(Diverged, match=r"all 7 runs diverged, with learning rates from 1e-06 to 0\.001"):
        best_within(search(("learning_rate",)), Runs(99), scored)


def test_rates_end_where_training_does_nothing_and_ranks_at_1() -> None:
    """Training makes held-out rows worse here, the less of it the less."""
    scored = Scored(lambda rank, rate: rank * rate)
    assert best_within(search(), Runs(99), scored)[0] == (1, 1e-6)


@pytest.mark.parametrize(
    ("at_once", "expected"),
    [
        (1, [[(16, 3e-4)], [(16, 1e-3)], [(16, 3e-3)], [(64, 1e-3)], [(256, 1e-3)], [(64, 3e-3)], [(64, 3e-4)]]),
        (2, [[(16, 3e-4), (16, 1e-3)], [(16, 3e-3)], [(64, 1e-3), (4, 1e-3)], [(256, 1e-3)], [(64, 3e-3), (64, 3e-4)]]),
    ],
)
def test_where_memory_is_short_a_pass_has_fewer_candidates(
    at_once: int, expected: list[list[tuple[int, float]]]
) -> None:
    scored = Scored(valley(64, 1e-3))
    assert best_within(dataclasses.replace(search(), at_once=at_once), Runs(99), scored)[0] == (64, 1e-3)
    assert [each for _, each in scored.passes] == expected


# --- the budget -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("runs", range(2, 11))
def test_a_budget_of_runs_is_spent_and_never_exceeded(runs: int) -> None:
    scored = Scored(valley(64, 1e-3))  # nine of them settle it, see above
    _, ended = best_within(search(), purse := Runs(runs), scored)
    assert len(scored.candidates) == min(runs, 9)
    assert purse.spent() == f"{min(runs, 9)} of {runs} runs"
    assert ended == ("no neighbour of the best setting is better" if runs >= 9 else "the budget holds no further run")


class Clock:
    """A clock that stands still unless it is moved."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *modules: Any) -> None:
        self.now = 1000.0
        for module in modules:
            monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: self.now))

    def pass_(self, seconds: float) -> None:
        self.now += seconds


@pytest.mark.parametrize(
    ("seconds", "share", "candidates", "spent"),
    [
        # A run takes 100 s. The first passes are 5 candidates, so 500 s hold them as whole runs.
        (2000, 1.0, 9, 900),
        (899, 1.0, 8, 800),
        (500, 1.0, 5, 500),
        # Else 100 s are set aside for the last run, and the candidates share the rest: 5 · 50 s, 5 · 25 s, 5 · 12.5 s.
        (499, 0.5, 7, 450),
        (350, 0.5, 5, 350),
        (349, 0.25, 9, 325),
        (225, 0.25, 5, 225),
        (224, 0.125, 9, 212.5),
        (130, 0.125, 2, 125),
        # One alone would be compared with nothing, so the run is made as it begins.
        (124, 0.125, 0, 100),
        (100, 0.125, 0, 100),
    ],
)
def test_a_time_is_kept_and_the_last_run_is_set_aside(
    seconds: float, share: float, candidates: int, spent: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch, auto)
    purse = Seconds(seconds)
    scored = Scored(valley(64, 1e-3), lambda count, share: clock.pass_(100 * count * share))
    purse.plan(100, 5)
    best, ended = best_within(search(), purse, scored)
    *tried, last = scored.passes if share < 1 else [*scored.passes, (1.0, [])]
    assert {own for own, _ in tried} <= {share} and sum(len(each) for _, each in tried) == candidates
    assert last == ((1.0, [(best.rank, best.learning_rate)]) if share < 1 else (1.0, []))
    assert clock.now - 1000 == spent <= seconds
    if not candidates:
        assert (best.rank, best.learning_rate) == (16, 3e-4)
        assert ended == "the budget holds nothing but the run itself"


@pytest.mark.parametrize(
    ("budget", "expected"),
    # 100 s for three, 200 s for one. Two are then expected to take 400 s, and take 100 s.
    [(700, [3, 1, 2, 1, 2]), (699, [3, 1, 1])],
)
def test_what_a_pass_took_is_what_the_next_is_expected_to_take(
    budget: float, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch, auto)
    purse = Seconds(budget)
    scored = Scored(valley(64, 1e-3), lambda count, share: clock.pass_(200 if count == 1 else 100))
    purse.plan(100, 5)
    best_within(search(), purse, scored)
    assert [len(each) for _, each in scored.passes] == expected


def test_a_time_that_holds_no_run_says_how_much_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, auto)
    purse = Seconds(600)
    clock.pass_(60)
    match = r"one run takes about 10 min here, and 9 min of 10 min are left\. A search needs about 50 min, or 16 min if"
    with pytest.raises(LoraError, match=match):
        purse.plan(600, 5)
    purse.plan(600, 5, share=0.25, made=True)  # an interrupted search had come to its last run
    assert purse.share == 0.25


@pytest.mark.parametrize("done", range(6))
@pytest.mark.parametrize("share", [1.0, 0.25])
def test_an_interrupted_search_goes_on_as_if_nothing_had_happened(
    share: float, done: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch, auto)

    def scored() -> Scored:
        return Scored(valley(64, 1e-3), lambda count, share: clock.pass_(100 * count * share))

    def purse(taken: float, before: float | None = None) -> Seconds:
        made = Seconds(2000 if share == 1 else 349, taken)
        made.plan(100, 5, before)
        return made

    best, ended = best_within(search(), purse(0), whole := scored())
    before = {}
    for own, candidates in whole.passes[:done]:
        for rank, rate in candidates:
            before[Candidate(rank, rate), own] = Trial("", 9, 0.0, whole.loss(rank, rate))
    taken = sum(100 * own for _, own in before)
    assert best_within(search(), purse(taken, share if done else None), rest := scored(), before) == (best, ended)
    assert rest.passes == whole.passes[done:]


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "runs", "seconds"),
    [
        *(("12 runs", 12, None), ("2runs", 2, None), ("90s", None, 90), ("30m", None, 1800), ("45 min", None, 2700)),
        *(("2h", None, 7200), ("1.5 h", None, 5400)),
    ],
)
def test_a_budget_is_a_time_or_a_number_of_runs(text: str, runs: int | None, seconds: float | None) -> None:
    assert Budget.of(text) == Budget(text, runs, seconds)


@pytest.mark.parametrize(
    ("further", "message"),
    [
        ({"auto": "30"}, "--auto: '30' is no time such as 90s, 30m or 2h; a number of runs, such as '12 runs'"),
        ({"auto": "0m"}, "--auto: '0m' is no time above 0"),
        ({"auto": "-5m"}, "--auto: '-5m' is no time such as"),
        ({"auto": "1 run"}, "--auto '1 run': a search needs at least 2 runs"),
        ({"sweep": "rank=4,8"}, "--auto chooses what to try, and --sweep says it: give one of them"),
        ({"rank": 4, "learning_rate": 1e-3}, "searches the learning rate and the rank, and both are given"),
        ({"from_adapter": "a"}, "--auto begins with new adapters: leave --from out"),
        ({"keep": "best"}, "--auto keeps the adapter with the lowest last loss"),
    ],
)
def test_what_cannot_be_searched_is_said_before_anything_is_read(further: dict[str, Any], message: str) -> None:
    config = TrainConfig("m", "no such file", "o", **{"auto": "30m", **further})
    with pytest.raises(UsageError, match=message):
        train(config)


def test_what_is_given_is_kept_and_the_start_follows_the_method() -> None:
    config = TrainConfig("m", "d", "o", auto="30m")
    assert auto_search(dataclasses.replace(config, auto=None)) is None

    def of(**settings: Any) -> tuple[tuple[int, float], tuple[str, ...]]:
        made = auto_search(dataclasses.replace(config, **settings))
        assert made is not None
        return (made.start.rank, made.start.learning_rate), made.axes

    assert of() == ((16, 3e-4), BOTH)
    assert of(rank=8) == ((8, 3e-4), ("learning_rate",))
    assert of(learning_rate=5e-4) == ((16, 5e-4), ("rank",))
    assert of(rslora=True) == of(init="pissa") == ((16, 1e-4), BOTH)
    made = auto_search(config)
    assert made is not None and made.name(Candidate(64, 3e-3)) == "learning_rate=0.003 rank=64"
    chosen = made.settings(config, Candidate(64, 3e-3))
    assert (chosen.rank, chosen.learning_rate, chosen.alpha, chosen.auto) == (64, 3e-3, 32.0, None)


# --- whole runs -------------------------------------------------------------------------------------------------------


@pytest.fixture
def config(tiny_lm: Path, tmp_path: Path) -> TrainConfig:
    path = tmp_path / "d.jsonl"
    lines = [{"prompt": f"turn {i % 6}" * (1 + i % 2), "completion": f"on {i % 3}"} for i in range(22)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    usual: dict[str, Any] = dict(
        batch_size=5, epochs=2.0, eval_samples=2, holdout=0.2, logging_steps=1, max_new_tokens=2
    )
    usual |= dict(dtype="float32", targets=("q_proj", "down_proj"))
    return TrainConfig(str(tiny_lm), str(path), str(tmp_path / "out"), **usual)


def factors(folder: Path) -> dict[str, torch.Tensor]:
    updates = lorakit.Adapter.load(folder).updates
    return {f"{name} {side}": getattr(own, side) for name, own in updates.items() for side in "AB"}


def lines_in(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_start_that_is_too_low_is_improved_and_the_best_is_a_plain_run(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The search is interrupted in its third pass, and goes on with what it had tried."""
    monkeypatch.setattr(auto_settings, "_START", 1e-2)
    out, again = Path(config.output_dir), Path(config.output_dir).with_name("again")
    searching = dataclasses.replace(config, auto="5 runs")
    passes: list[list[str]] = []
    begun = OnePassTrainer.train

    def counted(self: Any) -> Any:
        passes.append(list(self._names))
        if len(passes) == 3:
            raise KeyboardInterrupt
        return begun(self)

    monkeypatch.setattr(OnePassTrainer, "train", counted)
    with pytest.raises(Interrupted, match="auto holds what was tried. The same command goes on with it with --resume"):
        train(searching)
    with pytest.raises(FileExistsError, match="it holds an interrupted run. Add --resume auto to go on with it"):
        train(searching)
    with pytest.raises(LoraError, match="--auto: a search then, none now"):
        train(dataclasses.replace(config, resume="auto"))
    train(dataclasses.replace(searching, resume="auto"))
    assert passes[3] == passes[2] and sum(map(len, passes)) == 5 + len(passes[2])
    assert not (out / "auto").exists()
    said = capsys.readouterr().out
    told = json.loads((out / "auto.json").read_text())
    losses = {row["name"]: row["heldout"] for row in told["rows"]}
    assert len(losses) == 5 and told["budget"] == "5 runs" and told["spent"] == "5 of 5 runs"
    assert told["best"] in [*passes[0], *passes[1]]  # so the adapter was kept over the interruption
    assert losses[told["best"]] == min(losses.values()) < losses["learning_rate=0.01 rank=16"] - 0.05
    kept = yaml.safe_load((out / "config.yaml").read_text())
    assert kept["auto"] is None and told["best"] == f"learning_rate={kept['learning_rate']:g} rank={kept['rank']}"
    # The same as a run that knows the settings from the beginning, by the trainer of one adapter.
    train(TrainConfig(**{**kept, "output_dir": str(again)}))
    for name, value in factors(again).items():
        torch.testing.assert_close(factors(out)[name], value, rtol=0, atol=2e-4)
    for mine, alone in zip(lines_in(out), lines_in(again), strict=True):
        for key in ("step", "epoch", "loss", "eval_loss"):
            assert mine.get(key) == pytest.approx(alone.get(key), abs=1e-4), key
    results, plain = (json.loads((folder / "results.json").read_text()) for folder in (out, again))
    assert results["trained_parameters"] == plain["trained_parameters"]
    assert results["losses"] == pytest.approx(plain["losses"], abs=1e-4)
    # The table is printed and stands on the page and on the card, and all say that the scores are optimistic.
    texts = said, (out / "report.html").read_text(), (out / "README.md").read_text()
    assert all(name in text for name in losses for text in texts)
    assert all("the settings were chosen by the loss on these rows" in text for text in texts)
    how = f"The held-out loss chose {told['best']}. The search used 5 of 5 runs and ended because {told['ended']}."
    assert told["ended"] == "the budget holds no further run" and all(how in text for text in texts)
    assert "--auto" not in results["command"]


def moved(monkeypatch: pytest.MonkeyPatch, clock: Clock, per_token: float) -> list[tuple[int, int]]:
    """Let the clock move with the tokens of each forward pass. Returns the steps of each pass, and its adapters."""
    plain, passes = OnePassTrainer._losses, []
    begun = OnePassTrainer.train

    def losses(self: Any, model: Any, batch: Any) -> Any:
        clock.pass_(per_token * batch["input_ids"].numel())
        return plain(self, model, batch)

    def noted(self: Any) -> Any:
        done = begun(self)
        passes.append((self.state.global_step, len(self._names)))
        return done

    monkeypatch.setattr(OnePassTrainer, "_losses", losses)
    monkeypatch.setattr(OnePassTrainer, "train", noted)
    return passes


def test_a_budget_of_time_is_kept_by_whole_passes(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run takes about 5 s here, and timing it 4 s: 15 s hold one run, and three of a quarter of its steps or more."""
    clock = Clock(monkeypatch, auto, pace, progress)
    passes = moved(monkeypatch, clock, 5e-3)
    train(dataclasses.replace(config, auto="15s", rank=4, eval_samples=0))
    said = capsys.readouterr().out
    run = float(re.findall(r"about (\d+) s for each run of 8 steps", said)[0])
    timed, *tried, last = passes
    assert timed[1] == 1 and last == (8, 1)
    assert tried[0] == (2, 3) and {steps for steps, _ in tried} == {2}
    assert clock.now - 1000 <= 15 + run / 4  # the estimate's error
    rows = json.loads((Path(config.output_dir) / "auto.json").read_text())["rows"]
    assert [row["steps"] for row in rows] == [8] + [2] * sum(count for _, count in tried)
    assert re.search(r"The search used 1\d s of 15 s and ended because the budget holds no further run\.", said)


def test_a_time_too_short_for_a_run_leaves_nothing(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = moved(monkeypatch, Clock(monkeypatch, auto, pace, progress), 5e-3)
    with pytest.raises(LoraError, match=r"one run takes about \d+ min here, and \d+ s of 20 s are left"):
        train(dataclasses.replace(config, auto="20s", epochs=500.0))
    assert len(passes) == 1 and passes[0][0] < 50 and not Path(config.output_dir).exists()


def test_as_many_are_trained_at_once_as_the_memory_holds(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorakit.training.plan.resident_memory", lambda: 0)

    def planned(memory: int) -> tuple[int, int]:
        monkeypatch.setattr(preflight, "memory_of", lambda device: memory)
        prepared = prepare(dataclasses.replace(config, auto="30m"))
        assert prepared.search is not None and prepared.plan.peak_bytes is not None
        return prepared.search.at_once, prepared.plan.peak_bytes

    assert planned(0)[0] == 3  # it is not known
    at_once, three = planned(2**40)
    assert at_once == 3
    fewer, two = planned(three - 1)
    assert fewer == 2 and two < three
    assert planned(two - 1)[0] == planned(1)[0] == 1


def test_held_out_rows_are_needed(config: TrainConfig) -> None:
    with pytest.raises(LoraError, match="--auto compares held-out losses, and .* has no held-out rows; add a"):
        train(dataclasses.replace(config, auto="2 runs", holdout=0.0))


def test_a_dry_run_says_what_would_be_searched(config: TrainConfig, capsys: pytest.CaptureFixture[str]) -> None:
    train(dataclasses.replace(config, auto="30m", dry_run=True))
    said = capsys.readouterr().out
    assert "\n── search ──" in said
    assert "learning rate and rank: begins with learning_rate=0.0003 rank=16" in said
    assert "budget 30m" in said and not Path(config.output_dir).exists()
