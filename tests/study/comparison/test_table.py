"""A comparison as tables, compared with cells written by hand."""

import json
import math
import re
from dataclasses import replace

import pytest

from comparisons import COMPARISON, E2E, ROWS, SST, row
from lorakit.core.numbers import learning_rate
from lorakit.study.comparison.results import Comparison, Interval
from lorakit.study.comparison.table import as_json, latency, markdown, score, summary, tables_text, task_table

SST_CELLS = [
    ["method", "trainable", "accuracy", "rate", "train time", "peak memory", "file", "latency"],
    ["full", "124,000,000", "90.2 ± 0.4", "1.5e-5", "7 min", "1.83 GB", "496.0 MB", "×1.00"],
    ["bitfit", "102,912", "88.6 ± 0.6", "2e-4", "7 min", "1.83 GB", "412 kB", "×1.00"],
    ["head", "0", "71.3 ± 0.2", "2e-4", "7 min", "1.83 GB", "0 kB", "×1.00"],
    ["lora rank=2", "73,728", "89.9 ± 0.5", "2e-4", "7 min", "1.83 GB", "295 kB", "×1.00"],
    ["lora rank=8", "294,912", "*91.0 ± 0.3", "2e-4", "7 min", "1.83 GB", "1.2 MB", "×1.00"],
    ["mine<&> size=3", "7,000", "–", "2e-4", "7 min", "1.83 GB", "28 kB", "×1.00"],
    ["LoRA <r=8> (published)", "–", "95.1", "–", "–", "–", "–", "–"],
]
E2E_CELLS = [
    ["method", "trainable", "ter ↓", "bleu", "rate", "train time", "peak memory", "file", "latency"],
    ["full", "354,920,000", "41.3 ± 0.3", "66.5 ± 0.4", "2e-4", "7 min", "1.83 GB", "1.42 GB", "×1.00"],
    ["bitfit", "301,056", "45.0 ± 0.9", "60.1 ± 1.2", "2e-4", "7 min", "1.83 GB", "1.2 MB", "×1.00"],
    [
        "lora rank=2",
        "200,000",
        "*40.1 ± 0.2",
        "67.7 ± 0.3",
        "2e-4",
        "7 min",
        "1.83 GB",
        "800 kB",
        "×1.04 (1.02 to 1.07)",
    ],
    ["lora rank=8", "800,000", "41.0 ± 0.2", "68.0 ± 0.3", "2e-4", "7 min", "1.83 GB", "3.2 MB", "×1.00"],
]


def cells_below(printed: str, heading: str) -> list[list[str]]:
    """The cells of the first table below a heading of the text; two or more spaces separate them."""
    lines = printed[printed.index(f"── {heading} ") :].splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("method"))
    end = lines.index("", start)
    return [re.split(r"\s{2,}", line) for line in lines[start:end]]


def test_the_text_has_each_number_in_its_cell() -> None:
    printed = tables_text(COMPARISON)
    assert cells_below(printed, "sst<&>2") == SST_CELLS
    assert cells_below(printed, "e2e") == E2E_CELLS
    assert max(map(len, printed.splitlines())) <= 120
    # Columns of numbers are right-aligned.
    lines = [line for line in printed[printed.index("── e2e") :].splitlines() if "1.83 GB" in line]
    assert len(lines) == 4 and len({line.index("1.83 GB") for line in lines}) == len({len(line) for line in lines}) == 1


def test_all_tasks_share_a_table_without_a_mean_where_their_metrics_differ_in_direction() -> None:
    assert cells_below(tables_text(COMPARISON), "all tasks") == [
        ["method", "sst<&>2, accuracy", "e2e, ter ↓"],
        ["full", "90.2 ± 0.4", "41.3 ± 0.3"],
        ["bitfit", "88.6 ± 0.6", "45.0 ± 0.9"],
        ["head", "71.3 ± 0.2", "–"],
        ["lora rank=2", "89.9 ± 0.5", "*40.1 ± 0.2"],
        ["lora rank=8", "*91.0 ± 0.3", "41.0 ± 0.2"],
        ["mine<&> size=3", "–", "–"],
    ]


def test_the_mean_over_tasks_is_that_of_methods_which_have_all() -> None:
    tasks = (SST, replace(E2E, metrics=("bleu", "ter")))
    content = summary(replace(COMPARISON, tasks=tasks))
    assert content.head == ("method", "sst<&>2, accuracy", "e2e, bleu", "mean")
    # (90.21 + 66.52) / 2, (88.64 + 60.12) / 2, (89.90 + 67.74) / 2, (91.04 + 68.04) / 2
    assert [row[-1] for row in content.rows] == ["78.4", "74.4", "–", "78.8", "79.5", "–"]
    assert content.marked == {(4, 1), (4, 2), (4, 3)}


def test_one_task_has_no_table_of_all() -> None:
    one = replace(COMPARISON, tasks=(SST,))
    assert "all tasks" not in tables_text(one) and "All tasks" not in markdown(one)


def test_what_stands_around_the_table() -> None:
    lines = tables_text(COMPARISON).splitlines()
    assert lines[:2] == ["Model: roberta<&>base; seeds 1, 2, 3, 4, 5.", "Machine: device: CPU, 2 cores; torch: 2.9.1."]
    start = next(index for index, line in enumerate(lines) if line.startswith("── sst"))
    assert lines[start + 1 : start + 3] == [
        "classification; data: data/sst|2; rows: 6,700 train, 872 valid, 1,821 test.",
        "Training: steps 600, batch size 16, weight decay 0.01.",
    ]
    printed = " ".join(tables_text(COMPARISON).split())
    for sentence in (
        "* is the best accuracy. ± is the 95 % interval of the mean over 5 seeds (Student's t). The learning rate is "
        "the best of at most 3 by accuracy on the validation rows.",
        "The new head has 1,538 parameters, which every method trains besides.",
        "bitfit: 2 of 5 seeds diverged.",
        "mine<&> size=3: 5 of 5 seeds diverged.",
        "prefix-layer length=512 does not apply: the model has <512> positions.",
        "Published numbers are their authors', not measured here.",
        "* is the best ter.",
        "The learning rate is the best of at most 3 by loss",
    ):
        assert printed.count(sentence) == 1, sentence
    assert printed.index("bitfit: 2 of 5") < printed.index("── e2e")


def test_an_unfinished_comparison_says_so_first_and_counts_the_seeds_it_has() -> None:
    rows = (replace(ROWS[0], seeds=2), *ROWS[1:])
    unfinished = replace(COMPARISON, finished=False, rows=rows)
    assert tables_text(unfinished).splitlines()[0] == "Unfinished: some runs are still to be made."
    assert markdown(unfinished).splitlines()[0] == "**Unfinished: some runs are still to be made.**"
    assert "full: 2 of 5 seeds so far." in tables_text(unfinished)
    assert "nfinished" not in tables_text(COMPARISON) and "so far" not in tables_text(COMPARISON)


def test_a_rate_that_was_given_is_not_called_the_best_of_several() -> None:
    given = tuple(replace(one, tried={}) for one in ROWS)
    assert tables_text(replace(COMPARISON, rows=given)).count("The learning rate is given.") == 2
    assert "best of at most" not in tables_text(replace(COMPARISON, rows=given))
    mixed = (replace(ROWS[0], tried={}), *ROWS[1:-1], replace(ROWS[-1], tried={}))
    printed = " ".join(tables_text(replace(COMPARISON, rows=mixed)).split())
    assert "at most 3 by accuracy on the validation rows; that of full is given." in printed
    assert "at most 3 by loss on the validation rows; that of lora rank=8 is given." in printed


def test_a_single_seed_and_the_usual_rate_are_called_that() -> None:
    rows = tuple(
        replace(one, seeds=1, diverged=0, scores={m: Interval(i.mean, None, i.values) for m, i in one.scores.items()})
        for one in ROWS
    )
    printed = tables_text(replace(COMPARISON, rows=rows, seeds=(7,), trials=1))
    assert (
        "±" not in printed
        and "From a single seed there is no interval. The learning rate is the usual one of" in printed
    )
    assert cells_below(printed, "e2e")[1][2:4] == ["41.3", "66.5"]
    assert "seed 7." in printed


def test_a_wide_table_goes_on_below_and_a_long_name_in_the_next_line() -> None:
    metrics = ("bleu", "nist", "meteor", "rouge-l", "cider", "ter")
    name = "lora rank=8 alpha=16 targets=all-linear dora=true rslora=true"
    scores: dict[str, tuple[float, float | None]] = {
        metric: (10.0 + index, 1.5) for index, metric in enumerate(metrics)
    }
    task = replace(E2E, metrics=metrics)
    printed = tables_text(
        replace(COMPARISON, tasks=(task,), rows=(row("e2e", name, 1000, scores), row("e2e", "b", 5, scores)))
    )
    assert max(map(len, printed.splitlines())) <= 120
    heads = [re.split(r"\s{2,}", line) for line in printed.splitlines() if line.startswith("method")]
    assert len(heads) == 2
    assert heads[0][1:] + heads[1][1:] == [
        *("trainable", "bleu", "nist", "meteor", "rouge-l", "cider", "ter ↓", "rate", "train time", "peak memory"),
        *("file", "latency"),
    ]
    lines = [line[:40].rstrip() for line in printed.splitlines()]
    firsts = [index for index, line in enumerate(lines) if line.startswith("lora rank=8 alpha")]
    assert len(firsts) == 2
    for first in firsts:
        assert lines[first] == "lora rank=8 alpha=16 targets=all-linear"
        assert lines[first + 1] == "  dora=true rslora=true"


def test_the_markdown_has_the_same_cells_escaped_and_the_best_in_bold() -> None:
    blocks = markdown(COMPARISON).split("\n\n")
    tables = [block.splitlines() for block in blocks if block.startswith("| method")]
    assert len(tables) == 3
    for lines, expected in zip(tables[1:], (SST_CELLS, E2E_CELLS), strict=True):
        assert lines[1] == "| --- |" + " ---: |" * (len(expected[0]) - 1)
        found = [[cell.strip() for cell in line.strip("|").split("|")] for line in (lines[0], *lines[2:])]
        for cells, wanted in zip(found, expected, strict=True):
            escaped = [cell.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;") for cell in wanted]
            assert cells == [re.sub(r"^\*(.*)", r"**\1**", cell) for cell in escaped]
    assert "## sst&lt;&amp;&gt;2" in blocks
    assert any(r"data: data/sst\|2;" in block for block in blocks)
    assert "- bitfit: 2 of 5 seeds diverged." in markdown(COMPARISON).splitlines()
    starred = replace(ROWS[0], method="lora rank=1 targets=*.q|k")
    assert r"| lora rank=1 targets=\*.q\|k |" in markdown(replace(COMPARISON, rows=(starred,)))


def test_an_interval_that_the_scores_bounds_cut_has_two_ends() -> None:
    cut = Interval(97.0, 4.5, (95.0, 97.0, 99.0), (0.0, 100.0))
    assert score(cut, 1) == "97.0 (92.5 to 100.0)"
    told = "In brackets are its ends where it would pass the score's own."
    shown = replace(COMPARISON, tasks=(SST,), rows=(replace(ROWS[0], scores={"accuracy": cut}),))
    assert told in " ".join(tables_text(shown).split()) and told not in " ".join(tables_text(COMPARISON).split())
    assert score(replace(cut, half=1.0), 1) == "97.0 ± 1.0" and score(replace(cut, half=None), 1) == "97.0"


@pytest.mark.parametrize(
    ("ratio", "ends", "shown"),
    [
        (1.043, (1.021, 1.066), "×1.04 (1.02 to 1.07)"),
        (1.013, (0.98, 1.05), "×1 (0.98 to 1.05)"),
        (0.994, (0.98, 1.05), "×1 (0.98 to 1.05)"),  # no other than the one before
        (1.013, (1.004, 1.05), "×1 (1.00 to 1.05)"),  # what is shown as 1.00 holds 1
        (1.013, (1.006, 1.05), "×1.01 (1.01 to 1.05)"),
        (0.5, (0.4, 0.9949), "×0.50 (0.40 to 0.99)"),
        (1.5, None, "×1.50"),
        (math.nan, None, "–"),
    ],
)
def test_a_latency_whose_interval_holds_1_is_1(ratio: float, ends: tuple[float, float] | None, shown: str) -> None:
    assert latency(row("e2e", "m", 1, {}, latency=ratio, latency_ends=ends)) == shown


def test_what_the_latency_is_is_told_below_the_table() -> None:
    printed = " ".join(tables_text(COMPARISON).split())
    assert printed.count("the median of turns in which both run, and in brackets its 95 % interval") == 1
    first, second = printed.split("── e2e")
    assert "the model's own. The new head" in first and "no difference was found" in second


def test_nothing_is_best_where_all_are_equal() -> None:
    rows = tuple(replace(one, scores={"accuracy": Interval(0.0, None, (0.0,))}) for one in ROWS[:3])
    assert "*" not in "".join(tables_text(replace(COMPARISON, tasks=(SST,), rows=rows)).split("* is the best")[0])
    one_better = (*rows, replace(ROWS[3], scores={"accuracy": Interval(1.0, None, (1.0,))}))
    assert "*1.0" in tables_text(replace(COMPARISON, tasks=(SST,), rows=one_better))
    alone = replace(COMPARISON, tasks=(SST,), rows=one_better[-1:])
    assert "*1.0" in tables_text(alone)


@pytest.mark.parametrize(
    ("seeds", "said"),
    [((0,), "From a single seed there is no interval."), ((0, 1), "From two seeds there is no interval."),
     ((0, 1, 2), "± is the 95 % interval of the mean over 3 seeds (Student's t).")],
)  # fmt: skip
def test_where_intervals_come_from_is_said(seeds: tuple[int, ...], said: str) -> None:
    assert said in tables_text(replace(COMPARISON, seeds=seeds))


def test_the_json_holds_everything_to_six_digits() -> None:
    odd = replace(
        ROWS[0], latency=math.inf, seconds=123.456789, scores={"accuracy": Interval(math.nan, None, (math.nan,))}
    )
    rows = (odd, replace(ROWS[1], learning_rate=0.1 + 0.2, tried={0.1 + 0.2: 0.123456789, 1e-4: None}))
    plain = json.loads(as_json(replace(COMPARISON, rows=rows)), parse_constant=lambda name: pytest.fail(name))
    assert set(plain) == {"model", "tasks", "rows", "left_out", "seeds", "trials", "machine", "finished"}
    first, second = plain["rows"]
    assert first["latency"] is None and first["seconds"] == 123.457
    assert first["scores"] == {"accuracy": {"mean": None, "half": None, "values": [None], "bounds": [None, None]}}
    assert second["learning_rate"] == 0.3 and second["tried"] == {"0.3": 0.123457, "0.0001": None}
    assert second["scores"]["accuracy"] == {"mean": 88.64, "half": 0.61, "values": [88.64], "bounds": [None, None]}
    assert (second["parameters"], second["head"], second["diverged"], second["seeds"]) == (102_912, 1538, 2, 5)
    assert plain["left_out"] == [
        {"task": "sst<&>2", "method": "prefix-layer length=512", "reason": "the model has <512> positions"}
    ]
    assert plain["tasks"][0]["published"]["of another metric"] == {"f1": 94.2}
    assert plain["tasks"][1]["metrics"] == ["ter", "bleu"] and plain["seeds"] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("scores", "shown"),
    [
        ([(66.52, 0.44), (60.0, None)], ["66.5 ± 0.4", "60.0"]),
        ([(66.52, 0.04), (60.0, 1.0)], ["66.52 ± 0.04", "60.00 ± 1.00"]),
        ([(66.52, 0.0)], ["66.5 ± 0.0"]),
        ([(8.456, 0.1)], ["8.46 ± 0.10"]),
        ([(-0.5, 0.0123)], ["-0.500 ± 0.012"]),
        ([(0.5, 0.0004)], ["0.5000 ± 0.0004"]),
        ([(math.nan, None), (55.55, 3.0)], ["–", "55.5 ± 3.0"]),
    ],
)
def test_a_column_has_as_many_decimals_as_fit(scores: list[tuple[float, float | None]], shown: list[str]) -> None:
    rows = tuple(row("e2e", f"m{index}", 1, {"own": pair}) for index, pair in enumerate(scores))
    content = task_table(replace(COMPARISON, rows=rows), replace(E2E, metrics=("own",)))
    assert [cells[2] for cells in content.rows] == shown


def test_equal_means_are_both_the_best_and_a_metric_of_the_users_own_is_better_when_higher() -> None:
    rows = tuple(row("e2e", f"m{value}", 1, {"own": (value, None)}) for value in (1.0, 3.0, 2.0))
    task = replace(E2E, metrics=("own",))
    assert task_table(replace(COMPARISON, rows=(*rows, rows[1])), task).marked == {(1, 2), (3, 2)}


def test_nothing_finished_yet_is_a_table_all_the_same() -> None:
    empty = Comparison("m", (SST,), (), (), (1, 2), 3, {}, finished=False)
    assert cells_below(tables_text(empty), "sst<&>2") == [SST_CELLS[0], SST_CELLS[-1]]
    assert "Machine" not in tables_text(empty)


def test_rates_and_scores_alone() -> None:
    assert [learning_rate(value) for value in (2e-4, 1.5e-5, 1e-3, 0.1 + 0.2, 1.0)] == [
        "2e-4",
        "1.5e-5",
        "1e-3",
        "3e-1",
        "1e0",
    ]
    assert score(None, 2) == "–"
