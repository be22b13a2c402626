"""The plot: its points match its ticks, and its labels do not overlap."""

import math
import random
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from xml.etree import ElementTree

import pytest

from comparisons import COMPARISON, E2E, ROWS, SST, row
from lorakit.study.comparison.plots import Point, families, points_of, scatter
from lorakit.study.comparison.results import Interval
from lorakit.training.svg import standalone

Rectangle = tuple[float, float, float, float]  # left, top, right, bottom
UNITS = {"k": 1e3, "M": 1e6, "B": 1e9}


def drawn(points: Sequence[Point], metric: str = "accuracy") -> ElementTree.Element:
    return ElementTree.fromstring(scatter(points, metric, list(dict.fromkeys(point.family for point in points))))


def having(svg: ElementTree.Element, kind: str) -> list[ElementTree.Element]:
    return [element for element in svg.iter() if element.get("class") == kind]


def ticks(svg: ElementTree.Element, axis: str) -> dict[float, float]:
    """The text of each tick → its position. A tick of the x axis is a small mark, one of the y axis a grid line."""
    found = {}
    for tick in having(svg, f"{axis}tick"):
        text = "".join(text.text or "" for text in tick.iter("text"))
        if text:
            number = float(text.rstrip("kMB")) * UNITS.get(text[-1], 1)
            place = next(tick.iter("use")).attrib["x"] if axis == "x" else path(next(tick.iter("path")))[0][1]
            found[number] = float(place)
    return found


def path(element: ElementTree.Element) -> list[tuple[float, float]]:
    """The points of a line."""
    return [(float(x), float(y)) for x, y in re.findall(r"[ML] (\S+) (\S+)", element.attrib["d"])]


def marks(svg: ElementTree.Element) -> list[tuple[float, float]]:
    uses = [next(mark.iter("use")) for mark in having(svg, "mark")]
    return [(float(use.attrib["x"]), float(use.attrib["y"])) for use in uses]


def looks(svg: ElementTree.Element) -> list[tuple[str, str, str]]:
    """The shape, the fill and the edge of each mark."""
    shapes = {shape.attrib["id"]: shape.attrib["d"] for shape in svg.iter("path") if "id" in shape.attrib}
    found = []
    for mark in having(svg, "mark"):
        use = next(mark.iter("use"))
        style = dict(part.split(": ") for part in use.attrib["style"].split("; "))
        found.append((shapes[use.attrib["href"][1:]], style["fill"], style["stroke"]))
    return found


def labels(svg: ElementTree.Element) -> list[ElementTree.Element]:
    return [next(label.iter("text")) for label in having(svg, "label")]


def line_through(ticks: dict[float, float]) -> tuple[float, float]:
    """Slope and offset of position = slope · number + offset, from the first and the last tick; the others fit too."""
    (first, begin), *_, (last, end) = sorted(ticks.items())
    slope = (end - begin) / (last - first)
    for number, position in ticks.items():
        assert position == pytest.approx(begin + slope * (number - first), abs=0.2)
    return slope, begin - slope * first


def label_boxes(svg: ElementTree.Element) -> list[Rectangle]:
    """The area of each label at 12 px: a letter is 6.2 px wide on average, 9 px above the line and 3 px below."""
    boxes = []
    for label in labels(svg):
        width = 6.2 * len(label.text or "")
        anchor = re.search(r"text-anchor: (\w+)", label.attrib["style"])
        shift = {"start": 0.0, "middle": width / 2, "end": width}[anchor[1] if anchor else "start"]
        left = float(label.attrib["x"]) - shift
        line = float(label.attrib["y"])
        boxes.append((left, line - 9, left + width, line + 3))
    return boxes


def overlapping(a: Rectangle, b: Rectangle) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


@pytest.fixture(params=[SST, E2E], ids=["with zero", "lower is better"])
def task(request: pytest.FixtureRequest):
    return request.param


def test_points_lie_where_the_ticks_say(task) -> None:
    points = points_of(COMPARISON, task)
    svg = drawn(points)
    across, up = ticks(svg, "x"), ticks(svg, "y")
    zero = across.pop(0.0, None)
    assert len(across) >= 2 and 4 <= len(up) <= 10
    slope, offset = line_through({math.log10(count): x for count, x in across.items()})
    rise, base = line_through(up)
    rows = [one for one in ROWS if one.task == task.name and one.scores]
    wanted = []
    for one in sorted(rows, key=lambda one: one.parameters):
        x = slope * math.log10(one.parameters) + offset if one.parameters else zero
        # A tick's text stands in the middle of its line.
        wanted.append((x, rise * one.scores[task.metrics[0]].mean + base))
    assert rise < 0 < slope
    found: list[Any] = marks(svg)
    assert found == [(pytest.approx(x, abs=0.3), pytest.approx(y, abs=0.3)) for x, y in wanted]
    if zero is not None:
        assert zero < min(across.values()) and zero < min(x for x, _ in marks(svg)[1:])
    intervals = [[y for _, y in path(next(bar.iter("path")))] for bar in having(svg, "interval")]
    halves = [one.scores[task.metrics[0]] for one in sorted(rows, key=lambda one: one.parameters)]
    for (low, high), interval in zip(intervals, halves, strict=True):
        assert float(high) == pytest.approx(rise * (interval.mean + (interval.half or 0)) + base, abs=0.3)
        assert float(low) == pytest.approx(rise * (interval.mean - (interval.half or 0)) + base, abs=0.3)


def test_a_method_without_parameters_stands_at_zero_left_of_the_break() -> None:
    assert 0.0 in ticks(drawn(points_of(COMPARISON, SST)), "x")
    assert 0.0 not in ticks(drawn(points_of(COMPARISON, E2E)), "x")
    alone = [point for point in points_of(COMPARISON, SST) if not point.parameters]
    svg = drawn(alone)
    assert list(ticks(svg, "x")) == [0.0] and marks(svg)[0][0] == ticks(svg, "x")[0.0]


@pytest.mark.parametrize(
    ("counts", "shown"),
    [
        ((40_000, 40_000), ["10k", "100k"]),
        ((1000, 1000), ["1k"]),
        ((150, 3_000_000), ["1k", "10k", "100k", "1M"]),
        ((1_500_000_000, 20_000), ["100k", "1M", "10M", "100M", "1B"]),
        ((1, 12), ["1", "10"]),
    ],
)
def test_ticks_are_powers_of_ten(counts: tuple[int, int], shown: list[str]) -> None:
    points = [Point("a", "a", "", count, 1.0, None, "a") for count in counts]
    svg = drawn(points)
    assert set(shown) <= {text.text for tick in having(svg, "xtick") for text in tick.iter("text")}
    assert all(62 <= x <= 744 for x, _ in marks(svg))


def test_methods_that_differ_in_their_size_alone_are_joined_and_labelled_once_in_full() -> None:
    rows = tuple(
        row("e2e", name, count, {"ter": (value, 0.1)})
        for name, count, value in (
            ("lora rank=8", 80, 41.0),
            ("lora rank=2", 20, 42.0),
            ("lora rank=4", 40, 40.0),
            ("dora rank=4", 45, 40.5),
            ("dora rank=9", 90, 40.5),
            ("adapter-h bottleneck=8", 50, 44.0),
        )
    )
    comparison = replace(COMPARISON, rows=rows)
    points = points_of(comparison, E2E)
    svg = drawn(points)
    assert [label.text for label in labels(svg)] == [
        *("lora rank=2", "rank=4", "dora rank=4", "adapter-h bottleneck=8", "rank=8"),
        "rank=9",
    ]
    places = marks(svg)
    lines = [next(line.iter("path")) for line in having(svg, "line")]
    assert [path(line) for line in lines] == [[places[0], places[1], places[4]], [places[2], places[5]]]
    assert ["stroke-dasharray" in line.attrib["style"] for line in lines] == [False, True]
    assert len({shape for shape, _, _ in looks(svg)}) == 2
    assert [fill == edge for _, fill, edge in looks(svg)] == [True, True, False, True, True, False]
    assert {fill for _, fill, edge in looks(svg) if fill != edge} == {"var(--page)"}
    assert families(comparison) == ["lora", "adapter-h"]


def test_a_family_has_the_same_colour_and_marker_in_every_task() -> None:
    found: list[dict[str, tuple[str, str, str]]] = []
    for task in (SST, E2E):
        svg = ElementTree.fromstring(scatter(points_of(COMPARISON, task), "m", families(COMPARISON)))
        names = [(mark[0].text or "").partition(":")[0] for mark in having(svg, "mark")]
        found.append(dict(zip(names, looks(svg), strict=True)))
    assert set(found[0]) == {"head", "lora rank=2", "bitfit", "lora rank=8", "full"}
    assert all(found[1][name] == found[0][name] for name in found[1])
    assert len(set(found[0].values())) == 4  # both LoRAs are one family


@pytest.mark.parametrize("seed", range(8))
def test_labels_of_a_dozen_points_do_not_lie_on_each_other(seed: int) -> None:
    chance = random.Random(seed)
    points = [
        Point(
            label=chance.choice(("full", "lora rank=8", "adapter-h bottleneck=64", "prefix-embedding length=32")),
            family=f"f{index % 5}",
            others="",
            parameters=round(10 ** chance.uniform(4.5, 6)),
            value=(value := chance.gauss(90, 1)),
            ends=(value - (half := chance.uniform(0.1, 0.8)), value + half),
            title="",
        )
        for index in range(12)
    ]
    svg = drawn(points)
    boxes = label_boxes(svg)
    assert len(boxes) == 12
    for index, box in enumerate(boxes):
        assert not any(overlapping(box, other) for other in boxes[:index])
        assert not any(overlapping(box, (x - 4, y - 4, x + 4, y + 4)) for x, y in marks(svg))
        assert min(box) >= 0 and box[2] <= 760 and box[3] <= 392


def test_labels_at_the_same_point_do_not_lie_on_each_other() -> None:
    boxes = label_boxes(drawn([Point(f"method({i})", f"f{i}", "", 1000, 1.0, None, "") for i in range(6)]))
    assert not any(overlapping(a, b) for index, a in enumerate(boxes) for b in boxes[:index])


def test_words_are_escaped_and_a_long_label_is_cut() -> None:
    name = "mine<&>(size=3 " + "x" * 60
    rows = (row("e2e", name, 10, {"ter": (1.0, None)}),)
    points = points_of(replace(COMPARISON, rows=rows), E2E)
    svg = drawn(points, "a <&> metric")
    assert [label.text for label in labels(svg)] == [name[:39] + "…"]
    assert svg.attrib["aria-label"] == "a <&> metric against trainable parameters"
    assert [title.text for title in svg.iter("title")] == [f"{name}: 1.000, 10 parameters"]
    assert not having(svg, "interval")


def test_what_is_no_number_is_not_drawn() -> None:
    broken = replace(ROWS[6], scores={"ter": Interval(math.inf, None, (math.inf,))})
    assert points_of(replace(COMPARISON, rows=(broken,)), E2E) == []


def test_the_direction_is_said_where_lower_is_better() -> None:
    points = points_of(COMPARISON, E2E)
    texts = [{text.text for text in drawn(points, metric).iter("text")} for metric in ("ter", "bleu")]
    assert "ter (lower is better)" in texts[0] and "bleu" in texts[1]


def test_a_file_of_its_own_has_its_size_and_its_colours() -> None:
    svg = ElementTree.fromstring(standalone(scatter(points_of(COMPARISON, SST), "accuracy", families(COMPARISON))))
    assert svg.tag == "{http://www.w3.org/2000/svg}svg"
    assert svg.attrib["viewBox"] == f"0 0 {svg.attrib['width']} {svg.attrib['height']}"
    style, background = svg[0], svg[1]
    assert style.tag.endswith("style") and background.attrib["fill"] == "var(--page)"
    used = set(re.findall(r"var\((--[a-z0-9]+)\)", ElementTree.tostring(svg, encoding="unicode")))
    assert {"--soft", "--line", "--page", "--blue"} <= used
    for name in used:
        # Once for a light page, once for a dark one.
        assert len(re.findall(rf"{name}: #[0-9a-f]+", style.text or "")) == 2, name
