"""The page of a comparison: it parses, it has every part, and users' names are escaped."""

from dataclasses import replace
from html.parser import HTMLParser

import pytest

from comparisons import COMPARISON, ROWS, SST
from lorakit.study.comparison.page import render
from lorakit.study.comparison.results import Comparison

VOID = ("meta", "br")


class Page(HTMLParser):
    """Collects the cells of the tables and the words; fails if tags do not balance."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.count: dict[str, int] = {}
        self.tables: list[list[list[str]]] = []
        self.bold: list[str] = []
        self.words: list[str] = []
        self._best = False
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self._best = "best" in (dict(attrs).get("class") or "").split()

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data
            if self._best:
                self.bold.append(data)


@pytest.fixture(scope="module")
def page() -> Page:
    return Page(render(COMPARISON))


def test_it_has_a_table_of_all_tasks_and_three_parts_for_each(page: Page) -> None:
    """The plot of each task is there twice: for a wide and for a narrow screen."""
    assert page.count["svg"] == 4 and page.count["details"] == 2 and page.count["h2"] == 3
    every, sst, searched, e2e, _ = page.tables
    assert every[0] == ["method", "sst<&>2, accuracy", "e2e, ter ↓"]
    assert every[-1] == ["mine<&> size=3", "–", "–"]
    assert sst[1] == ["full", "124,000,000", "90.2 ± 0.4", "1.5e-5", "7 min", "1.83 GB", "496.0 MB", "×1.00"]
    assert sst[-1] == ["LoRA <r=8> (published)", "–", "95.1", "–", "–", "–", "–", "–"]
    assert e2e[3] == ["lora rank=2", "200,000", "40.1 ± 0.2", "67.7 ± 0.3", *e2e[3][4:8], "×1.04 (1.02 to 1.07)"]
    assert searched == [
        ["method", "1.5e-5", "1e-4", "2e-4"],
        ["full", "90.00", "", ""],
        ["bitfit", "", "50.00", "75.00"],
        ["head", "", "diverged", "71.00"],
        ["lora rank=2", "", "50.00", "75.00"],
        ["lora rank=8", "", "50.00", "75.00"],
        ["mine<&> size=3", "", "50.00", "75.00"],
    ]


def test_the_best_score_and_the_chosen_rate_are_bold(page: Page) -> None:
    assert page.bold == [
        *("40.1 ± 0.2", "91.0 ± 0.3"),  # of all tasks, line by line
        *("91.0 ± 0.3", "90.00", "75.00", "71.00", "75.00", "75.00", "75.00"),
        *("40.1 ± 0.2", *["75.00"] * 4),
    ]


def test_facts_and_notes_stand_around_the_tables_and_nothing_is_taken_for_a_tag(page: Page) -> None:
    for words in (
        "6 methods on 2 tasks",
        "Model: roberta<&>base; seeds 1, 2, 3, 4, 5.",
        "Machine: device: CPU, 2 cores; torch: 2.9.1.",
        "classification; data: data/sst|2; rows: 6,700 train, 872 valid, 1,821 test.",
        "The new head has 1,538 parameters, which every method trains besides.",
        "bitfit: 2 of 5 seeds diverged.",
        "prefix-layer length=512 does not apply: the model has <512> positions.",
        "the search of the learning rate: loss on the validation rows",
    ):
        assert words in page.words, words
    assert not set(page.count) & {"512", "&", "r"}


def test_the_page_needs_nothing_from_elsewhere() -> None:
    source = render(COMPARISON)
    assert "http" not in source and "<script" not in source and "prefers-color-scheme: dark" in source


def test_one_task_an_unfinished_comparison_and_an_empty_one() -> None:
    one = render(replace(COMPARISON, tasks=(SST,), finished=False))
    assert "Unfinished: some runs are still to be made." in one and "All tasks" not in one and "on 1 task</h1>" in one
    assert "nfinished" not in render(COMPARISON)
    untried = replace(COMPARISON, rows=tuple(replace(row, tried={}) for row in ROWS))
    assert "<details" not in render(untried)
    empty = Page(render(Comparison("m", (SST,), (), (), (1,), 1, {})))
    assert "No method has a score to draw." in empty.words
