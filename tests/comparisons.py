"""A comparison made by hand: two tasks, six methods, and everything that a table has to show."""

from lorakit.study.comparison.results import Comparison, Interval, MethodRow, TaskFacts

SST = TaskFacts(
    name="sst<&>2",
    source="data/sst|2",
    kind="classification",
    rows={"train": 6700, "valid": 872, "test": 1821},
    metrics=("accuracy",),
    chosen_by="accuracy",
    training={"steps": 600, "batch_size": 16, "weight_decay": 0.01},
    published={"LoRA <r=8>": {"accuracy": 95.1}, "of another metric": {"f1": 94.2}},
)
E2E = TaskFacts(
    name="e2e",
    source="e2e.jsonl",
    kind="causal-lm",
    rows={"train": 42000, "test": 4693},
    metrics=("ter", "bleu"),
    chosen_by="loss",
    training={},
)


def row(
    task: str,
    method: str,
    parameters: int,
    scores: dict[str, tuple[float, float | None]],
    *,
    head: int = 0,
    rate: float = 2e-4,
    tried: dict[float, float | None] | None = None,
    diverged: int = 0,
    latency: float = 1.0,
    latency_ends: tuple[float, float] | None = None,
) -> MethodRow:
    intervals = {metric: Interval(mean, half, (mean,)) for metric, (mean, half) in scores.items()}
    return MethodRow(
        task=task,
        method=method,
        parameters=parameters,
        head=head,
        learning_rate=rate,
        tried={1e-4: 50.0, 2e-4: 75.0} if tried is None else tried,
        scores=intervals,
        seeds=5,
        diverged=diverged,
        seconds=400.0,
        peak_bytes=1_830_000_000,
        alone=True,
        file_bytes=4 * parameters,
        latency=latency,
        latency_ends=latency_ends,
    )


ROWS = (
    row("sst<&>2", "full", 124_000_000, {"accuracy": (90.21, 0.42)}, head=1538, rate=1.5e-5, tried={1.5e-5: 90.0}),
    row("sst<&>2", "bitfit", 102_912, {"accuracy": (88.64, 0.61)}, head=1538, diverged=2),
    row("sst<&>2", "head", 0, {"accuracy": (71.3, 0.21)}, head=1538, tried={1e-4: None, 2e-4: 71.0}),
    row("sst<&>2", "lora rank=2", 73_728, {"accuracy": (89.9, 0.51)}, head=1538),
    row("sst<&>2", "lora rank=8", 294_912, {"accuracy": (91.04, 0.33)}, head=1538),
    row("sst<&>2", "mine<&> size=3", 7_000, {}, head=1538, diverged=5),
    row("e2e", "full", 354_920_000, {"ter": (41.26, 0.31), "bleu": (66.52, 0.44)}),
    row("e2e", "bitfit", 301_056, {"ter": (45.0, 0.9), "bleu": (60.12, 1.25)}),
    row(
        "e2e",
        "lora rank=2",
        200_000,
        {"ter": (40.08, 0.24), "bleu": (67.74, 0.28)},
        latency=1.043,
        latency_ends=(1.021, 1.066),
    ),
    row("e2e", "lora rank=8", 800_000, {"ter": (40.98, 0.24), "bleu": (68.04, 0.28)}),
)
COMPARISON = Comparison(
    model="roberta<&>base",
    tasks=(SST, E2E),
    rows=ROWS,
    left_out=(("sst<&>2", "prefix-layer length=512", "the model has <512> positions"),),
    seeds=(1, 2, 3, 4, 5),
    trials=3,
    machine={"device": "CPU, 2 cores", "torch": "2.9.1"},
)
