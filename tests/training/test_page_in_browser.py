"""report.html and the other pages, opened in a browser: all parts are there, they work, and nothing is cut off."""

import math
from pathlib import Path
from typing import Any

import pytest

import comparisons
from browser import in_browser
from lorakit.core.table import Table
from lorakit.study.comparison import page as comparison_page
from lorakit.training import page as run_page
from lorakit.training.changes import Change
from lorakit.training.report import Evaluation, Sample
from lorakit.training.tried import Trial, Tried
from pages import PAGES

TRIED = Tried.of(
    "learning_rate=0.0003 rank=64",
    [
        Trial(f"learning_rate={rate:g} rank={rank}", 1500, 0.2 + rate, 0.3 + rate)
        for rate, rank in ((1e-3, 16), (3e-4, 64), (3e-4, 16))
    ]
    + [Trial("learning_rate=0.003 rank=16", 1500, math.inf, math.inf, "diverged at step 1204")],
)
ROWS = 12
WRONG = (3, 5, 8)
COMMAND = "lorakit train --model models/a-model-with-a-long-name --data data/requests --output-dir runs/lights --rank 8"


def report() -> str:
    samples = tuple(
        Sample(
            f"turn the light on in room {i}",
            "I am a language model.",
            f'{{"room": {i}, "on": {"false" if i in WRONG else "true"}, "a_long_word_{"x" * 90}": 1}}',
            f'{{"room": {i}, "on": true, "a_long_word_{"x" * 90}": 1}}',
        )
        for i in range(ROWS)
    )
    right = tuple(i not in WRONG for i in range(ROWS))
    score, ends = (0.0, 0.75), ((0.0, 0.24), (0.47, 0.91))
    names = [f"model.layers.{i}.{kind}" for i in range(24) for kind in ("self_attn.q_proj", "mlp.down_proj")]
    return run_page.render(
        title="lights",
        facts={
            "model": "models/a-model-with-a-long-name",
            "data": "data/requests: 480 train, 96 test rows",
            "time of training": "46 s on CPU, 2 threads of 2",
            "peak memory": "1.55 GB (planned 1.66 GB)",
            "finished": "2026-01-31 12:00+00:00",
            "lorakit": "0.3.0",
        },
        command=COMMAND,
        settings=Table(("setting", "value"), (("rank", "8"),), left=frozenset({0, 1})),
        summary="── data ──\n" + "a long line " * 30,
        history=[{"step": s, "loss": 3.0 / s} for s in range(1, 200)] + [{"step": 199, "eval_loss": 0.25}],
        result=Evaluation(ROWS, "test", {"exact match": score}, samples, right, ("a note",), {"exact match": ends}),
        changes=[Change(name, 0.01 * (1 + i % 7), 1.0) for i, name in enumerate(names)],
        tried=TRIED,
    )


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [420, 1280])
def test_the_page_of_a_run_has_all_its_parts(width: int, dark: bool, tmp_path: Path) -> None:
    found: dict[str, Any] = in_browser(
        report(),
        """
        const seen = (element) => element.getBoundingClientRect().width > 0;
        return {
          wide: page.documentElement.scrollWidth,
          text: page.body.innerText,
          plots: [...page.querySelectorAll("svg.plot")].filter(seen).map((one) => one.getAttribute("aria-label")),
          bars: page.querySelectorAll(".kinds .bar").length,
          layers: page.querySelectorAll(".layer").length,
          first: [...page.querySelectorAll(".answer")].map((one) => one.dataset.is),
          removed: [...page.querySelectorAll("mark.removed")].map((one) => one.textContent),
          added: [...page.querySelectorAll("mark.added")].map((one) => one.textContent),
          red: view.getComputedStyle(page.querySelector(".wrong")).color,
          paper: view.getComputedStyle(page.body).backgroundColor,
          stacked: page.querySelector(".answer dd").getBoundingClientRect().top
            > page.querySelector(".answer dt").getBoundingClientRect().top + 8,
        };
        """,
        tmp_path,
        width=width,
        dark=dark,
    )
    assert found["wide"] <= width
    for text in (
        *("0.0% → 75.0%", "95 % interval 47.0% to 91.0%; base 0.0% to 24.0%", "a note"),
        *(
            "models/a-model-with-a-long-name",
            "480 train, 96 test rows",
            "46 s on CPU",
            "1.55 GB",
            "2026-01-31",
            "0.3.0",
        ),
        *("Settings tried", "The held-out loss chose learning_rate=0.0003 rank=64.", "diverged at step 1204"),
        *("training: 0.0151 at the end", "held-out: 0.250 at the end", "self_attn.q_proj", "mlp.down_proj"),
    ):
        assert text in found["text"]
    assert " ".join(found["text"].split()).count(COMMAND) == 1
    assert found["plots"] == ["Loss over steps", "‖ΔW‖ / ‖W‖ of each layer"]
    assert (found["bars"], found["layers"]) == (2, 24)
    assert found["first"] == ["wrong"] * len(WRONG) + ["right"] * (ROWS - len(WRONG))
    assert found["removed"] == ["false"] * len(WRONG) and found["added"] == ["true"] * len(WRONG)
    assert found["red"] == ("rgb(248, 113, 113)" if dark else "rgb(220, 38, 38)")
    assert found["paper"] == ("rgb(22, 25, 29)" if dark else "rgb(255, 255, 255)")
    assert found["stacked"] == (width == 420)


def test_the_answers_can_be_filtered_and_searched(tmp_path: Path) -> None:
    found = in_browser(
        report(),
        """
        const shown = () => [...page.querySelectorAll(".answer")].filter((one) => one.offsetHeight).length;
        const counts = [shown()];
        const search = page.querySelector("[type=search]");
        const put = (words) => { search.value = words; search.dispatchEvent(new Event("input", { bubbles: true })); };
        for (const which of ["wrong", "right", ""]) {
          page.querySelector(`[name=which][value="${which}"]`).click();
          counts.push(shown());
        }
        for (const words of ["ROOM 5", "room 1", "no such words", "", "language model"]) {
          put(words);
          counts.push(shown());
        }
        put("room 5");
        page.querySelector('[value="right"]').click();
        counts.push(shown());
        return { counts, told: page.querySelector(".count").textContent };
        """,
        tmp_path,
    )
    # "room 1", "room 10" and "room 11" begin alike. Every answer of the base model speaks of a language model.
    assert found["counts"] == [12, 3, 9, 12, 1, 3, 0, 12, 12, 0]
    assert found["told"] == "0 of 12 shown"


def test_a_message_on_the_console_fails(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="nothere is not defined"):
        in_browser("<!doctype html><title>t</title><script>nothere()</script>", "return 1;", tmp_path)


COMPARED = comparison_page.render(comparisons.COMPARISON)


@pytest.mark.parametrize("width", [420, 1280])
@pytest.mark.parametrize("page", [COMPARED, PAGES["analysis"]("model.layers.self_attn")], ids=["compare", "analysis"])
def test_the_tables_and_plots_of_the_other_pages_are_seen_whole(page: str, width: int, tmp_path: Path) -> None:
    found: dict[str, Any] = in_browser(
        page,
        """
        const all = (which) => [...page.querySelectorAll(which)];
        for (const one of all("details")) one.open = true;
        return {
          wide: page.documentElement.scrollWidth,
          cut: all(".scroll").filter((one) => one.scrollWidth > one.clientWidth).length,
          tables: all("table").length,
          cells: all("td").filter((one) => one.textContent && !one.offsetHeight).length,
          text: Math.min(...all("svg text").filter((one) => one.getBoundingClientRect().height)
            .map((one) => 12 * one.getScreenCTM().a)),
        };
        """,
        tmp_path,
        width=width,
    )
    assert found["wide"] <= width and found["tables"] >= 3
    assert (found["cut"], found["cells"]) == (0, 0)
    assert found["text"] >= 10  # pixels
