"""`--fit`: which settings are chosen for a size of memory, and what is said of it."""

import dataclasses
import json
import shutil
import sys
from collections.abc import Mapping
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml

from lorakit.cli.main import main
from lorakit.core.errors import LoraError
from lorakit.core.numbers import size_in
from lorakit.training import memory
from lorakit.training.config import TrainConfig
from lorakit.training.fit import fitted
from lorakit.training.memory import free_memory_of
from lorakit.training.plan import Plan
from lorakit.training.prepare import prepare
from lorakit.training.settings import UsageError
from lorakit.training.start_block import start_block

# GB that a made-up run needs: for its weights, plain and in nf4, and for each row, kept and made again
WEIGHTS = {"none": 10.0, "nf4": 4.0}
A_ROW = {False: 4.0, True: 1.0}


def gigabytes(config: TrainConfig) -> float:
    return WEIGHTS[config.quantize] + A_ROW[config.gradient_checkpointing] * config.batch_size


def config_of(**settings: Any) -> TrainConfig:
    return TrainConfig(model="m", data="d", output_dir="o", **settings)


def choose(
    fit: str,
    *,
    given: frozenset[str] = frozenset(),
    can_checkpoint: bool = True,
    can_quantise: bool = True,
    begun: Mapping[str, Any] | None = None,
    unplanned: str = "",
    **settings: Any,
) -> tuple[TrainConfig, tuple[str, ...]]:
    """What is chosen for the made-up run, and the lines about it."""

    def plan_with(own: TrainConfig) -> Plan:
        return Plan(1, 1, 1, None if unplanned else round(gigabytes(own) * 1e9), unplanned)

    config = config_of(fit=fit, **settings)
    object.__setattr__(config, "given", given)  # as `from_args` does
    allowed = {"can_checkpoint": can_checkpoint, "can_quantise": can_quantise}
    own, plan, lines = fitted(config, plan_with, given=config, begun=begun, **allowed)
    assert plan == plan_with(own)
    return own, lines


@pytest.fixture
def _bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package of this name is installed."""
    package = ModuleType("bitsandbytes")
    package.__spec__ = ModuleSpec("bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes", package)


@pytest.mark.parametrize(
    ("text", "count"),
    [("24GB", 24 * 10**9), ("24GiB", 24 * 2**30), ("512MB", 512 * 10**6), ("1.5 gib", 3 * 2**29), ("2TB", 2 * 10**12)],
)
def test_sizes(text: str, count: int) -> None:
    assert size_in(text) == count


@pytest.mark.parametrize("text", ["24", "24G", "GB", "-1GB", "24 GB of it", "1e3MB", "inf GB", "0GB", ""])
def test_a_wrong_size_is_a_usage_error(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match="--fit: .* is no size"):
        config_of(fit=text)
    assert main(["check", "--model", "m", "--data", "d", f"--fit={text}"]) == 2
    assert "--fit: " in capsys.readouterr().err


@pytest.mark.usefixtures("_bitsandbytes")
@pytest.mark.parametrize(
    ("fit", "rows", "times", "checkpointed", "quantize"),
    [  # the first in order that is small enough; 10 + 4 n, 10 + n and 4 + n GB for n rows
        ("42GB", 8, 1, False, "none"),
        ("41.9GB", 4, 2, False, "none"),
        ("26GB", 4, 2, False, "none"),
        ("18GB", 2, 4, False, "none"),
        ("14GB", 1, 8, False, "none"),
        ("13GB", 2, 4, True, "none"),  # with 8 rows 18, with 4 rows 14
        ("11GB", 1, 8, True, "none"),
        ("10GB", 4, 2, True, "nf4"),  # with 8 rows 12
        ("5GB", 1, 8, True, "nf4"),
    ],
)
def test_choices_in_their_order(fit: str, rows: int, times: int, checkpointed: bool, quantize: str) -> None:
    own, _ = choose(fit)
    assert (own.batch_size, own.gradient_accumulation_steps) == (rows, times)
    assert (own.gradient_checkpointing, own.quantize) == (checkpointed, quantize)
    assert own.fit is None  # so that config.yaml says what was chosen
    same: dict[str, Any] = {
        "batch_size": 8,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": False,
        "quantize": "none",
    }
    assert dataclasses.replace(own, **same) == config_of()


@pytest.mark.usefixtures("_bitsandbytes")
def test_a_line_for_each_step() -> None:
    assert choose("42GB")[1] == ("fitted into 42.00 GB:", "8 rows at once: 42.00 GB; nothing is changed")
    assert choose("26GB")[1] == ("fitted into 26.00 GB:", "8 rows at once need 42.00 GB; 4 rows, twice: 26.00 GB")
    remade, packed = " with gradient checkpointing", " with gradient checkpointing and nf4"
    assert choose("10GB")[1] == (
        "fitted into 10.00 GB:",
        "8 rows at once need 42.00 GB; 4 rows, twice: 26.00 GB",
        "4 rows, twice, need 26.00 GB; 2 rows, 4 times: 18.00 GB",
        "2 rows, 4 times, need 18.00 GB; 1 row, 8 times: 14.00 GB",
        f"1 row, 8 times, needs 14.00 GB; 8 rows at once{remade}: 18.00 GB",
        f"8 rows at once{remade} need 18.00 GB; 4 rows, twice,{remade}: 14.00 GB",
        f"4 rows, twice,{remade}, need 14.00 GB; 2 rows, 4 times,{remade}: 12.00 GB",
        f"2 rows, 4 times,{remade}, need 12.00 GB; 1 row, 8 times,{remade}: 11.00 GB",
        f"1 row, 8 times,{remade}, needs 11.00 GB; 8 rows at once{packed}: 12.00 GB",
        f"8 rows at once{packed} need 12.00 GB; 4 rows, twice,{packed}: 8.00 GB",
    )


@pytest.mark.usefixtures("_bitsandbytes")
@pytest.mark.parametrize(
    ("settings", "fit", "rows", "checkpointed", "quantize"),
    [
        ({"given": frozenset({"batch_size"})}, "18GB", 8, True, "none"),
        ({"given": frozenset({"gradient_accumulation_steps"})}, "18GB", 8, True, "none"),
        ({"given": frozenset({"gradient_checkpointing"})}, "8GB", 1, False, "nf4"),
        ({"batch_size": 16}, "26GB", 16, True, "none"),  # in Python: another value than the default
        ({"gradient_checkpointing": True}, "14GB", 4, True, "none"),
        ({"can_checkpoint": False}, "8GB", 1, False, "nf4"),
    ],
)
def test_what_is_given_stays(settings: dict[str, Any], fit: str, rows: int, checkpointed: bool, quantize: str) -> None:
    own, _ = choose(fit, **settings)
    assert (own.batch_size, own.gradient_checkpointing, own.quantize) == (rows, checkpointed, quantize)


@pytest.mark.usefixtures("_bitsandbytes")
def test_where_nothing_fits_the_smallest_plan_is_named() -> None:
    smallest = (
        "The smallest, 1 row, 8 times, with gradient checkpointing and nf4, needs about 5.00 GB. Less is needed with"
    )
    with pytest.raises(LoraError, match=f"--fit 4GB: no plan is within 4.00 GB. {smallest}") as error:
        choose("4GB")
    assert str(error.value).endswith("with --max-seq-length below 1024, --rank below 16 or a smaller model.")
    stays = r"needs about 12.00 GB. --batch-size was given and not changed. Less is needed with --batch-size below 8, "
    with pytest.raises(LoraError, match=stays):
        choose("4GB", given=frozenset({"batch_size"}))
    for without in ({"can_quantise": False}, {"given": frozenset({"quantize"})}):
        with pytest.raises(LoraError, match="with gradient checkpointing, needs about 11.00 GB") as error:
            choose("4GB", **without)
        assert "nf4" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "fit", "batch", "times", "said"),
    [  # 10 + 4 n GB for n rows, and 10 + n with gradient checkpointing; n divides the rows of a step
        ({"batch_size": 12, "can_checkpoint": False}, "30GB", 4, 3, "4 rows, 3 times: 26.00 GB"),
        ({"batch_size": 12, "can_checkpoint": False}, "34GB", 6, 2, "6 rows, twice: 34.00 GB"),
        ({"batch_size": 7, "can_checkpoint": False}, "30GB", 1, 7, "1 row, 7 times: 14.00 GB"),
        (
            {"batch_size": 9, "gradient_accumulation_steps": 2, "can_checkpoint": False},
            "40GB",
            6,
            3,
            "6 rows, 3 times: 34.00 GB",
        ),
        ({"gradient_accumulation_steps": 5}, "16GB", 1, 40, "1 row, 40 times: 14.00 GB"),
        ({"batch_size": 64}, "12GB", 2, 32, "2 rows, 32 times, with gradient checkpointing: 12.00 GB"),
    ],
)
def test_a_batch_that_was_given_stays_and_the_largest_that_fits_is_named(
    settings: dict[str, Any], fit: str, batch: int, times: int, said: str
) -> None:
    with pytest.raises(LoraError, match="given and not changed") as error:
        choose(fit, can_quantise=False, **settings)
    flags = f"--batch-size {batch} --gradient-accumulation-steps {times}"
    assert f" It fits with {flags}, and a step has the same rows ({said}). " in str(error.value)
    named = settings | {"batch_size": batch, "gradient_accumulation_steps": times}
    own, _ = choose(fit, can_quantise=False, given=frozenset({"batch_size"}), **named)
    assert (own.batch_size, own.gradient_accumulation_steps) == (batch, times)


def test_nf4_without_its_package_is_named_and_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(LoraError, match=r"needs about 11.00 GB. Less is needed with nf4 \(pip install"):
        choose("10GB")


def test_memory_that_cannot_be_planned_is_refused() -> None:
    with pytest.raises(LoraError, match=r"--fit: the memory .* planned \(RuntimeError: no\). Leave --fit out"):
        choose("4GB", unplanned="RuntimeError: no")


def test_a_run_that_goes_on_keeps_what_was_chosen() -> None:
    begun = dataclasses.asdict(choose("26GB")[0])
    own, lines = choose("42GB", begun=begun)
    assert (own.batch_size, own.gradient_accumulation_steps, own.fit) == (4, 2, None)
    assert lines == ("--fit: as the run was begun, 4 rows, twice: 26.00 GB",)
    own, lines = choose("12GB", begun=begun)
    assert own.batch_size == 4
    assert lines == ("--fit: as the run was begun, 4 rows, twice: 26.00 GB, more than the 12.00 GB of now",)


def test_auto_is_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["MemTotal:  50000000 kB", "MemAvailable:  20000000 kB", "SwapTotal:  0 kB"]
    monkeypatch.setattr(memory, "_lines", lambda path: lines if path == "/proc/meminfo" else [])
    monkeypatch.setattr(memory, "resident_memory", lambda: 5_530_000_000)
    assert free_memory_of(torch.device("cpu")) == 20_480_000_000 + 5_530_000_000
    monkeypatch.setattr("lorakit.training.fit.best_device", lambda: torch.device("cpu"))
    monkeypatch.setattr("lorakit.training.preflight.best_device", lambda: torch.device("cpu"))
    assert choose("auto")[0].batch_size == 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # two processes share 26 GB
    own, _ = choose("auto")
    assert (own.batch_size, own.gradient_checkpointing) == (2, True)
    monkeypatch.setattr("lorakit.training.fit.free_memory_of", lambda device: 0)
    with pytest.raises(LoraError, match="--fit auto: this system does not say"):
        choose("auto")


# --- on a real model -----------------------------------------------------------------------------------------------


@pytest.fixture
def _same_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process holds the same before each plan."""
    monkeypatch.setattr("lorakit.training.plan.resident_memory", lambda: 0)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "d.jsonl"
    rows = ({"prompt": "turn " * 8 * (i % 5) + str(i), "completion": "on"} for i in range(24))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def peak(model: Path, data: Path, **settings: Any) -> int:
    """The planned peak of a run of its own."""
    settings = {"dtype": "float32", **settings}
    found = prepare(TrainConfig(model=str(model), data=str(data), output_dir="unused", **settings)).plan.peak_bytes
    assert found is not None
    return found


@pytest.mark.usefixtures("_bitsandbytes", "_same_process")
@pytest.mark.parametrize("sweep", [None, "rank=2,4"])
def test_the_plans_are_those_of_runs_with_these_settings(
    sweep: str | None, tiny_lm: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are made one after the other on one model, and the data is read once."""
    planned: list[int] = []

    def spy(plan: Plan) -> int:
        assert plan.peak_bytes is not None
        planned.append(plan.peak_bytes)
        return plan.peak_bytes

    monkeypatch.setattr("lorakit.training.fit._needed", spy)
    with pytest.raises(LoraError, match="no plan is within"):
        peak(tiny_lm, data, fit="1kB", sweep=sweep)
    alone = [
        peak(tiny_lm, data, batch_size=rows, gradient_accumulation_steps=8 // rows, sweep=sweep, **more)
        for more in ({}, {"gradient_checkpointing": True}, {"gradient_checkpointing": True, "quantize": "nf4"})
        for rows in (8, 4, 2, 1)
    ]
    assert planned == alone


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """How the base is quantised in each plan that is made."""
    found: list[str] = []

    def note(config: TrainConfig, *_: Any) -> Plan:
        found.append(config.quantize)
        return Plan(1, 1, 1, 10**9)

    monkeypatch.setattr("lorakit.training.prepare._plan", note)
    return found


@pytest.mark.usefixtures("_bitsandbytes")
@pytest.mark.parametrize("settings", [{}, {"also_train": ("lm_head",)}, {"bias": "lora_only"}], ids=str)
def test_weights_that_are_trained_are_not_quantised(
    settings: dict[str, Any], tiny_lm: Path, data: Path, tried: list[str]
) -> None:
    with pytest.raises(LoraError, match="no plan is within"):
        peak(tiny_lm, data, fit="1kB", **settings)
    assert tried == ["none"] * 8 + ([] if settings else ["nf4"] * 4)


@pytest.mark.usefixtures("_bitsandbytes")
def test_a_quantised_base_is_not_quantised_again(tiny_lm: Path, data: Path, tmp_path: Path, tried: list[str]) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_lm, base)
    settings = json.loads((base / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (base / "config.json").write_text(json.dumps(settings))
    with pytest.raises(LoraError, match="no plan is within"):
        peak(base, data, fit="1kB")
    assert tried == ["none"] * 8


@pytest.mark.usefixtures("_same_process", "few_objects")
def test_a_fitted_run_is_repeated_and_resumed(
    tiny_lm: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    halved = peak(tiny_lm, data, batch_size=4, gradient_accumulation_steps=2) // 1000 + 1
    command = ["train", "--model", str(tiny_lm), "--data", str(data), "-o", str(out), "--dtype", "float32"]
    command += ["--save-steps", "1", "--eval-samples", "0", "--fit"]
    assert main([*command, f"{halved}kB", "--max-steps", "2"]) == 0
    printed = capsys.readouterr().out
    assert "8 rows at once need " in printed and "; 4 rows, twice: " in printed
    assert "2 steps of 8 rows" in printed
    settings = yaml.safe_load((out / "config.yaml").read_text())
    assert (settings["fit"], settings["batch_size"], settings["gradient_accumulation_steps"]) == (None, 4, 2)
    # with less memory than then, and with more
    for steps, size in ((3, "1MB"), (4, "100GB")):
        assert main([*command, size, "--max-steps", str(steps), "--resume", "auto"]) == 0, capsys.readouterr().err
        printed = capsys.readouterr().out
        assert "--fit: as the run was begun, 4 rows, twice: " in printed
        assert yaml.safe_load((out / "config.yaml").read_text()) == settings | {"max_steps": steps}
    again = TrainConfig(**{**settings, "targets": tuple(settings["targets"]), "output_dir": str(tmp_path / "again")})
    assert "4 rows, twice" not in start_block(prepare(again))
    assert peak(tiny_lm, data, batch_size=4, gradient_accumulation_steps=2) == prepare(again).plan.peak_bytes
