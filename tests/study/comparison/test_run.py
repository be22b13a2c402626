"""A whole comparison on tiny models: which runs are made, their results, and that they are independent."""

import dataclasses
import itertools
import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit.study.comparison import one_run as module
from lorakit.study.comparison import table
from lorakit.study.comparison.config import CompareConfig
from lorakit.study.comparison.fit import fit
from lorakit.study.comparison.plan import plan_block, plans_of
from lorakit.study.comparison.results import Comparison, Ledger, Run
from lorakit.study.comparison.run import compare
from lorakit.study.comparison.tasks import Answers, Sequences
from lorakit.study.comparison.time_left import TimeLeft
from lorakit.study.machine import machine, release
from lorakit.study.methods.baselines import Applied

pytestmark = pytest.mark.usefixtures("few_objects")
HIDDEN, LAYERS, INNER = 32, 2, 64  # of the tiny models
TIMES = ("seconds", "other_seconds", "peak_bytes", "latency", "base_latency")


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    """40 rows to train on, 12 to choose on, 20 to report. The label is the row's word; every fifth label is wrong."""
    folder = tmp_path / "classes"
    folder.mkdir()
    rows = []
    for i in range(72):
        word = ("on", "off")[i % 2]
        rows.append({"text": f"turn the light {word} {i // 2}", "label": word if i % 5 else "on"})
    for name, some in (("train", rows[:40]), ("valid", rows[40:52]), ("test", rows[52:])):
        text = "".join(json.dumps(row) + "\n" for row in some)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    rows = [{"prompt": f"light {i}", "completion": "turn on" if i % 2 else "turn off"} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


class Made:
    """Records every call of `fit` and the model's state. Interrupts call number `stop`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, int, float]] = []
        self.begun: list[dict[str, torch.Tensor]] = []
        self.stop: int | None = None
        monkeypatch.setattr(module, "fit", self)

    def __call__(
        self, applied: Applied, task: Any, training: Any, *, seed: int, learning_rate: float, step: Any
    ) -> Any:
        self.calls.append((applied.method.name, seed, learning_rate))
        self.begun.append({name: p.detach().clone() for name, p in applied.model.named_parameters()})
        if len(self.calls) == self.stop:
            raise KeyboardInterrupt
        return fit(applied, task, training, seed=seed, learning_rate=learning_rate, step=step)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Made:
    return Made(monkeypatch)


def comparison(model: Path, data: Path, out: Path, so_far: bool = False, **settings: Any) -> Comparison:
    usual = dict(epochs=1.0, batch_size=8, dtype="float32", seeds=2, trials=2, max_new_tokens=4)
    config = CompareConfig(model=str(model), output_dir=str(out), data=str(data), **{**usual, **settings})
    return compare(config.model, plans_of(config), out, seeds=config.seeds, trials=config.trials, so_far=so_far)


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "runs.jsonl").read_text(encoding="utf-8").splitlines()]


def without_times(found: Comparison) -> Comparison:
    rows = [dataclasses.replace(row, seconds=0.0, peak_bytes=0, latency=0.0, latency_ends=None) for row in found.rows]
    return dataclasses.replace(found, rows=tuple(rows))


def timeless(run: Run | dict[str, Any]) -> dict[str, Any]:
    values = dataclasses.asdict(run) if isinstance(run, Run) else run
    return {name: value for name, value in values.items() if name not in TIMES}


def test_every_row_is_what_its_runs_say(tiny_encoder: Path, classes: Path, tmp_path: Path, made: Made) -> None:
    methods = ("full", "lora rank=2", "adapter-h bottleneck=3 norms=false", "pissa rank=2", "prefix-layer length=4")
    found = comparison(tiny_encoder, classes, tmp_path / "out", methods=methods, seeds=3, trials=3)
    # A search's best run has two lines: one as it was found, and one with its test scores.
    last = {run["key"]: run for run in lines(tmp_path / "out")}
    assert len(made.calls) == len(last) == len(methods) * 5
    assert len(lines(tmp_path / "out")) == len(methods) * 6
    assert [row.method for row in found.rows] == [*methods]
    bias, matrices = 2, LAYERS * 2
    counts = {
        "lora rank=2": matrices * 2 * (HIDDEN + HIDDEN),
        "adapter-h bottleneck=3 norms=false": LAYERS * 2 * (2 * HIDDEN * 3 + 3 + HIDDEN),
        "prefix-layer length=4": LAYERS * HIDDEN * 4,
        "pissa rank=2": matrices * 2 * (HIDDEN + HIDDEN),
    }
    for row in found.rows:
        runs = [run for run in last.values() if run["method"] == row.method]
        search = [run for run in runs if run["seed"] == 0]
        assert len(search) == 3
        best = min(search, key=lambda run: (run["valid"]["loss"], run["learning_rate"]))
        assert row.learning_rate == best["learning_rate"]
        assert row.tried == {run["learning_rate"]: run["valid"]["loss"] for run in search}
        final = sorted((run for run in runs if run["learning_rate"] == row.learning_rate), key=lambda run: run["seed"])
        assert [run["seed"] for run in final] == [0, 1, 2]
        assert all(run["test"] == {} for run in search if run is not best)
        for metric in ("accuracy", "matthews"):
            values = [run["test"][metric] for run in final]
            assert row.scores[metric].values == tuple(values)
            assert row.scores[metric].mean == pytest.approx(sum(values) / 3)
        assert row.seconds == min(run["seconds"] for run in final)
        assert row.peak_bytes == max(run["peak_bytes"] for run in final) > 2**20
        turns = [zip(run["latency"], run["base_latency"], strict=True) for run in final]
        assert row.latency == statistics.median([one / other for own in turns for one, other in own])
        assert row.latency_ends is not None and 0 < row.latency_ends[0] <= row.latency <= row.latency_ends[1]
        assert (row.seeds, row.diverged) == (3, 0)
        # 40 rows, 8 for each step
        assert {run["steps"] for run in runs} == {5}
        assert row.head == HIDDEN * 2 + bias
        if row.method == "full":
            model = plans_of(CompareConfig(model=str(tiny_encoder), output_dir="", data=str(classes)))[0].task.model(0)
            counts["full"] = sum(p.numel() for name, p in model.named_parameters() if "classifier" not in name)
        assert row.parameters == counts[row.method]
        # float32; PiSSA also keeps the directions that it took out
        assert row.file_bytes == 4 * (row.parameters + row.head + (row.parameters if "pissa" in row.method else 0))
    (task,) = found.tasks
    assert (task.rows, task.metrics, task.chosen_by) == (
        {"train": 40, "valid": 12, "test": 20}, ("accuracy", "matthews"), "loss",
    )  # fmt: skip
    assert task.training == {
        "epochs": 1.0, "batch_size": 8, "gradient_accumulation_steps": 1, "scheduler": "linear", "warmup_ratio": 0.06,
        "steps": 5,
    }  # fmt: skip
    assert (found.seeds, found.trials, found.left_out, found.finished) == ((0, 1, 2), 3, (), True)


def test_seeds_differ_and_methods_share_them(
    tiny_encoder: Path, classes: Path, tmp_path: Path, made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[list[str]] = []
    collate = Sequences.collate

    def recorded(self: Sequences, rows: list[Any]) -> dict[str, Any]:
        order.append([self.tokenizer.decode(row["input_ids"]) for row in rows])
        return collate(self, rows)

    monkeypatch.setattr(Sequences, "collate", recorded)
    methods = ("full", "bitfit", "lora", "prefix-embedding length=2", "pissa")
    comparison(tiny_encoder, classes, tmp_path / "out", methods=methods, learning_rate=1e-3)
    assert [seed for _, seed, _ in made.calls] == [0, 1] * len(methods)
    orders = [order[start : start + 5] for start in range(0, len(order), 5)]
    assert len(orders) == len(made.calls)
    for seed in (0, 1):
        assert all(one == orders[seed] for one in orders[seed::2])
        heads = [begun["classifier.weight"] for begun in made.begun[seed::2]]
        assert all(torch.equal(head, heads[0]) for head in heads)
    assert orders[0] != orders[1]
    assert sorted(itertools.chain(*orders[0])) == sorted(itertools.chain(*orders[1]))
    assert not torch.equal(made.begun[0]["classifier.weight"], made.begun[1]["classifier.weight"])


def test_what_a_method_draws_is_told_by_the_seed(tiny_lm: Path, questions: Path, tmp_path: Path, made: Made) -> None:
    """If one model serves all runs, loading it draws no random numbers."""
    settings: dict[str, Any] = dict(methods=("lora", "prefix-layer length=2"), learning_rate=1e-3, max_steps=1)
    comparison(tiny_lm, questions, tmp_path / "first", **settings)
    torch.rand(3)
    comparison(tiny_lm, questions, tmp_path / "again", **settings)
    first, again = made.begun[:4], made.begun[4:]
    for one, other in zip(first, again, strict=True):
        assert all(torch.equal(other[name], value) for name, value in one.items())
    for zero, one in (first[:2], first[2:]):
        changed = {name for name in one if not torch.equal(one[name], zero[name])}
        assert changed == {name for name in one if "lora_A" in name or "lorakit_prefix" in name}


def test_nothing_is_made_twice(tiny_encoder: Path, classes: Path, tmp_path: Path, made: Made) -> None:
    settings: dict[str, Any] = dict(methods=("lora rank=1", "bitfit"))
    first = comparison(tiny_encoder, classes, tmp_path, **settings)
    assert len(made.calls) == 6
    text = (tmp_path / "runs.jsonl").read_bytes()
    assert comparison(tiny_encoder, classes, tmp_path, **settings) == first
    assert len(made.calls) == 6
    assert (tmp_path / "runs.jsonl").read_bytes() == text
    # With more seeds and one more method, only the new runs are made.
    made.calls.clear()
    more = comparison(tiny_encoder, classes, tmp_path, methods=("lora rank=1", "bitfit", "head"), seeds=3)
    rates = [row.learning_rate for row in more.rows]
    assert made.calls[:2] == [("lora", 2, rates[0]), ("bitfit", 2, rates[1])]
    assert [call[:2] for call in made.calls[2:]] == [("head", 0), ("head", 0), ("head", 1), ("head", 2)]
    assert [row.scores["accuracy"].values[:2] for row in more.rows[:2]] == [
        row.scores["accuracy"].values for row in first.rows
    ]
    # Other training settings need other runs.
    made.calls.clear()
    comparison(tiny_encoder, classes, tmp_path, methods=("bitfit",), seeds=1, trials=1, weight_decay=0.1)
    assert len(made.calls) == 1


@pytest.mark.parametrize("stop", [1, 2, 3, 5])
def test_an_interrupted_comparison_goes_on(
    tiny_encoder: Path, classes: Path, tmp_path: Path, made: Made, stop: int
) -> None:
    settings: dict[str, Any] = dict(methods=("lora rank=1", "bitfit"))
    whole = comparison(tiny_encoder, classes, tmp_path / "whole", **settings)
    assert len(made.calls) == 6
    made.calls.clear()
    made.stop, half = stop, '{"key": "half of a li'
    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        comparison(tiny_encoder, classes, tmp_path / "cut", **settings)
    made.stop = None
    with (tmp_path / "cut" / "runs.jsonl").open("a") as file:
        file.write(half)
    found = comparison(tiny_encoder, classes, tmp_path / "cut", **settings)
    assert without_times(found) == without_times(whole)
    # Only the interrupted run is made again, and the search's best run if its weights were lost with the process.
    assert len(made.calls) in (7, 8)
    ours, theirs = (
        {run["key"]: timeless(run) for run in map(json.loads, text.splitlines()) if run is not None}
        for text in (
            (tmp_path / "whole" / "runs.jsonl").read_text(),
            (tmp_path / "cut" / "runs.jsonl").read_text().replace(half, "null"),
        )
    )
    assert ours == theirs and len(ours) == 6


def test_what_is_finished_so_far_is_shown_without_making_more(
    tiny_encoder: Path, classes: Path, tmp_path: Path, made: Made
) -> None:
    settings: dict[str, Any] = dict(methods=("lora rank=1", "bitfit"), seeds=3)
    made.stop = 4  # two rates and the second seed of the first method are there, its third seed is not
    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        comparison(tiny_encoder, classes, tmp_path, **settings)
    found = comparison(tiny_encoder, classes, tmp_path, so_far=True, **settings)
    assert len(made.calls) == 4
    (row,) = found.rows
    tested = [run for run in lines(tmp_path) if run["test"]]
    assert (row.method, row.seeds, found.finished) == ("lora rank=1", 2, False)
    assert row.scores["accuracy"].values == tuple(run["test"]["accuracy"] for run in tested)
    assert table.tables_text(found).startswith("Unfinished")
    made.stop = None
    whole = comparison(tiny_encoder, classes, tmp_path, **settings)
    assert whole.finished and len(made.calls) == 4 + 1 + 4
    assert comparison(tiny_encoder, classes, tmp_path, so_far=True, **settings) == whole
    # The tables name the machine that made the runs, not the one that shows them.
    assert whole.machine == {**machine(), "lorakit": release()}
    elsewhere = {"processor": "another"}
    (tmp_path / "machine.json").write_text(json.dumps(elsewhere))
    assert comparison(tiny_encoder, classes, tmp_path, **settings).machine == elsewhere


@pytest.mark.parametrize("method", ["full", "pissa rank=2", "prefix-embedding length=2", "adapter-p bottleneck=2"])
def test_the_best_run_of_the_search_is_the_run_of_its_seed(
    tiny_encoder: Path, classes: Path, tmp_path: Path, made: Made, method: str
) -> None:
    settings: dict[str, Any] = dict(methods=(method,), seeds=1)
    found = comparison(tiny_encoder, classes, tmp_path / "searched", trials=3, **settings)
    assert len(made.calls) == 3 and len({rate for *_, rate in made.calls}) == 3
    (row,) = found.rows
    made.calls.clear()
    comparison(tiny_encoder, classes, tmp_path / "fresh", learning_rate=row.learning_rate, **settings)
    (fresh,) = lines(tmp_path / "fresh")
    searched = {run["learning_rate"]: run for run in lines(tmp_path / "searched")}[row.learning_rate]
    assert timeless(searched) == timeless(fresh)
    assert len(made.calls) == 1


@pytest.mark.parametrize("trials", [2, 3])
def test_of_two_equal_rates_the_lower_is_not_trained_again(
    tiny_encoder: Path, classes: Path, tmp_path: Path, made: Made, monkeypatch: pytest.MonkeyPatch, trials: int
) -> None:
    validate = Sequences.validate
    monkeypatch.setattr(Sequences, "validate", lambda self, applied: {**validate(self, applied), "loss": 0.5})
    found = comparison(tiny_encoder, classes, tmp_path, methods=("bitfit",), seeds=1, trials=trials)
    assert [rate for *_, rate in made.calls] == [1e-3, 3e-3, 3e-4][:trials]
    assert found.rows[0].learning_rate == (1e-3 if trials == 2 else 3e-4)


def test_a_method_that_does_not_apply_is_left_out_with_its_reason(
    tiny_encoder: Path, classes: Path, tmp_path: Path, made: Made
) -> None:
    methods = ("top-layers k=9", "lora targets=*.q_prj", "head")
    settings: dict[str, Any] = dict(methods=methods, seeds=1, trials=1)
    found = comparison(tiny_encoder, classes, tmp_path, **settings)
    assert [row.method for row in found.rows] == ["head"]
    assert [name for name, *_ in made.calls] == ["head"]
    (task, first, why), (_, second, _) = found.left_out
    assert (task, first, why) == ("classes", "top-layers k=9", "k=9: BertForSequenceClassification has 2 blocks.")
    assert second == "lora rank=8 targets=*.q_prj"

    def block_of(config: CompareConfig) -> str:
        plans = plans_of(config)
        left = TimeLeft(plans, config.seeds, config.trials, Ledger(tmp_path / "nothing.jsonl"))
        return plan_block(config, plans, left)

    config = CompareConfig(
        model=str(tiny_encoder), output_dir="", data=str(classes), seeds=4, trials=3,
        methods=(*methods, {"method": "bitfit", "learning_rate": 1e-3}),
    )  # fmt: skip
    block = block_of(config)
    assert "left out: k=9: BertForSequenceClassification has 2 blocks." in block
    assert "                0 parameters and 66 of the head" in block
    assert (
        "at most 10: 4 seeds, at most 3 learning rates for a method on a task" in block
    )  # (4 + 2) + 4: two are left out
    given = dataclasses.replace(config, learning_rate=1e-3)
    assert "at most 8: 4 seeds, learning rates given" in block_of(given)  # 2 · 4


@pytest.mark.parametrize("kind", ["learnt", "computed"])
def test_a_method_whose_rows_do_not_fit_into_the_model_is_left_out(
    tiny_encoder: Path, tiny_lm: Path, tmp_path: Path, kind: str
) -> None:
    """The tiny encoder has 64 learnt positions; the language model has rotary positions and no end."""
    data = tmp_path / "long.jsonl"
    texts = ["on " * 90, *(f"light {i}" for i in range(30))]  # a word with its space is a token or more
    rows = [{"text": text, "label": "ab"[i % 2]} for i, text in enumerate(texts)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    methods = ("head", "prefix-layer length=4", "prefix-embedding length=5")
    settings: dict[str, Any] = dict(methods=methods, seeds=1, trials=1)
    if kind == "computed":
        assert not comparison(tiny_lm, data, tmp_path / "out", **settings, max_seq_length=100).left_out
        return
    found = comparison(tiny_encoder, data, tmp_path / "out", **settings, max_seq_length=60)
    assert [row.method for row in found.rows] == ["head", "prefix-layer length=4"]
    assert found.left_out == (
        ("long", "prefix-embedding length=5", "the longest row of long has 60 tokens, and the prefix 5, but the model "
         "has 64 positions; lower max_seq_length to 59."),
    )  # fmt: skip
    # Rows end with the model's positions, even if the settings allow longer rows.
    cut = comparison(tiny_encoder, data, tmp_path / "cut", **settings, max_seq_length=65)
    assert [row.method for row in cut.rows] == ["head"]
    message = (
        "no method can be applied. long: prefix-layer length=4: the longest row of long has 64 tokens, and the prefix "
        "4, but the model has 64 positions; lower max_seq_length to 60."
    )
    with pytest.raises(ValueError, match=message):
        comparison(tiny_encoder, data, tmp_path / "none", **{**settings, "methods": methods[1:]}, max_seq_length=65)


def test_a_run_that_diverges_has_no_scores_and_the_next_method_does_not_see_it(
    tiny_lm: Path, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss_of = Answers.loss

    def loss(self: Answers, model: Any, label_smoothing: float = 0.0) -> Any:
        """Gives NaN for the third batch if LoRA is trained."""
        usual, numbers = loss_of(self, model, label_smoothing), itertools.count(1)
        if not any("lora_A" in name for name, _ in model.named_parameters()):
            return usual
        return lambda batch: usual(batch) * (float("nan") if next(numbers) == 3 else 1.0)

    monkeypatch.setattr(Answers, "loss", loss)
    calm = {"method": "full", "learning_rate": 1e-3}
    wild = {"method": "lora rank=2", "learning_rate": 1e-3}
    both = comparison(tiny_lm, questions, tmp_path / "both", methods=(wild, calm))
    alone = comparison(tiny_lm, questions, tmp_path / "alone", methods=(calm,))
    assert without_times(both).rows[1:] == without_times(alone).rows
    row = both.rows[0]
    assert (row.diverged, row.seeds, row.scores) == (2, 2, {})
    assert all(run["diverged"] and not run["test"] and not run["valid"] for run in lines(tmp_path / "both")[:2])
    assert all(
        min(run["latency"]) > 0 and run["steps"] == (2 if run["diverged"] else 4) for run in lines(tmp_path / "both")
    )


def test_a_run_whose_last_step_breaks_the_weights_has_diverged(
    tiny_encoder: Path, classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The training loss does not show the effect of the last step; the validation loss does."""

    def fitted(applied: Applied, *args: Any, **settings: Any) -> Any:
        done = fit(applied, *args, **settings)
        with torch.no_grad():
            applied.parameters()[-1].fill_(float("nan"))  # the head's
        return done

    monkeypatch.setattr(module, "fit", fitted)
    found = comparison(tiny_encoder, classes, tmp_path, methods=("lora rank=1",), seeds=2, trials=1)
    assert (found.rows[0].diverged, found.rows[0].scores) == (2, {})
    assert all(run["diverged"] and not run["valid"] and not run["test"] for run in lines(tmp_path))


def test_the_search_goes_down_from_a_rate_that_diverges(
    tiny_encoder: Path, classes: Path, tmp_path: Path, made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    def begin(method: object) -> float:
        return 1e30

    monkeypatch.setattr("lorakit.study.comparison.search.start", begin)
    found = comparison(tiny_encoder, classes, tmp_path, methods=("lora rank=1",), seeds=2, trials=2)
    (row,) = found.rows
    assert row.tried == {1e30: None, 3e29: None}
    assert (row.learning_rate, row.diverged, row.scores) == (3e29, 2, {})
    assert [call[1:] for call in made.calls] == [(0, 1e30), (0, 3e29), (1, 3e29)]


def test_the_one_model_of_answers_comes_through_every_method_unchanged(
    tiny_lm: Path, questions: Path, tmp_path: Path
) -> None:
    methods = (
        "full", "bitfit", "top-layers k=1", "adapter-h bottleneck=2", "adapter-p bottleneck=2",
        "prefix-embedding length=2", "prefix-layer length=2", "lora", "rslora", "dora rank=2", "pissa rank=2",
        {"method": "lora rank=2", "gradient_checkpointing": True},
    )  # fmt: skip
    config = CompareConfig(
        model=str(tiny_lm), output_dir="", data=str(questions), methods=methods, learning_rate=3e-3, seeds=1,
        max_steps=2, batch_size=8, dtype="float32", max_new_tokens=3,
    )  # fmt: skip
    plans = plans_of(config)
    model = plans[0].task.model(0)

    def state() -> tuple[Any, ...]:
        return (
            {name: value.clone() for name, value in model.state_dict().items()},
            {name: value.requires_grad for name, value in model.named_parameters()},
            [(name, type(part), part.training, getattr(part, "gradient_checkpointing", None),
              len(part._forward_hooks) + len(part._forward_pre_hooks)) for name, part in model.named_modules()],
        )  # fmt: skip

    weights, *rest = state()
    found = compare(config.model, plans, tmp_path, seeds=1, trials=1)
    assert [reason for *_, reason in found.left_out] == [
        "LlamaForCausalLM has no biases, so BitFit has nothing to train; take another method (Llama and its kin were "
        "trained without biases)."
    ]
    assert len(found.rows) == len(methods) - 1
    after, *rest_after = state()
    assert rest_after == rest
    assert after.keys() == weights.keys()
    assert all(torch.equal(after[name], value) for name, value in weights.items())
    for run in lines(tmp_path):
        assert run["steps"] == 2 and run["valid"]["perplexity"] > 1 and {*run["test"]} > {"exact-match", "bleu"}


def test_two_tasks_each_with_methods_and_published_numbers_of_its_own(
    tiny_encoder: Path, classes: Path, tmp_path: Path
) -> None:
    config = CompareConfig(
        model=str(tiny_encoder), output_dir="", data=str(classes), seeds=1, trials=1, batch_size=8, dtype="float32",
        tasks={
            "short": {"epochs": 1.0, "train_rows": 9, "methods": ("head", "bitfit"), "published": {"paper": 90.0}},
            "long": {"epochs": 2.0, "metrics": ("f1",), "methods": ({"method": "head", "batch_size": 4}, "bitfit")},
        },
    )  # fmt: skip
    found = compare(config.model, plans_of(config), tmp_path, seeds=1, trials=1)
    short, long = found.tasks
    assert (short.training["steps"], short.rows["train"]) == (2, 9)
    assert "steps" not in long.training and "batch_size" not in long.training  # not shared by both methods
    assert (short.published, long.published) == ({"paper": {"accuracy": 90.0}}, {})
    assert [(row.task, row.method, [*row.scores]) for row in found.rows] == [
        ("short", "head", ["accuracy", "matthews"]), ("short", "bitfit", ["accuracy", "matthews"]),
        ("long", "head", ["f1"]), ("long", "bitfit", ["f1"]),
    ]  # fmt: skip
    assert [run["steps"] for run in lines(tmp_path)][::2] == [2, 2, 20, 10]
