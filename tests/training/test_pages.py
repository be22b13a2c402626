"""All three pages: inserted values stay text, the pages need no other file, and they are reproducible."""

import math
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import pytest

import comparisons
from lorakit.core.table import Table
from lorakit.study.comparison import page as comparison_page
from lorakit.study.comparison.plots import Point, scatter
from lorakit.training import page as run_page
from lorakit.training.svg import standalone
from pages import PAGES, run

EVIL = "<script>x</script>{{ 7*7 }}{% if %}&lt;'"  # short enough for a label


class Read(HTMLParser):
    """The words, the tags, and the external files that a page needs."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.words = ""
        self.attributes: list[str] = []
        self.loads: list[str] = []
        self._inside = ""
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self._inside = tag
        self.attributes += [value or "" for _, value in attrs]
        if tag != "a":
            self.loads += [
                value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "xlink:href")
            ]

    def handle_data(self, data: str) -> None:
        if self._inside not in ("script", "style"):
            self.words += data

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""


@pytest.mark.parametrize("name", PAGES)
def test_what_is_put_into_a_page_stays_text(name: str) -> None:
    page = Read(PAGES[name](EVIL))
    plain = Read(PAGES[name]("word"))
    assert page.tags == plain.tags
    # A page's own script is the same whatever is put into the page.
    scripts = [re.findall(r"<script.*?</script>", PAGES[name](word), re.DOTALL) for word in (EVIL, "word")]
    assert scripts[0] == scripts[1] and len(scripts[0]) == (name == "run")
    # The name occurs in the page's text and attributes as often as a plain one, and completely.
    assert page.words.count(EVIL) == plain.words.count("word") > 3
    assert sum(EVIL in value for value in page.attributes) == sum("word" in value for value in plain.attributes)


@pytest.mark.parametrize("name", PAGES)
def test_a_page_needs_no_other_file(name: str) -> None:
    source = PAGES[name]("word")
    page = Read(source)
    assert all(one.startswith(("#", "data:image/png;base64,")) for one in page.loads)
    assert page.loads and not page.tags & {"link", "iframe", "img", "object", "embed"}
    assert not re.search(r"@import|url\((?!#)|https?:", source)
    # Every piece of a drawing that another piece refers to is there.
    used = {one[1:] for one in page.loads if one.startswith("#")} | set(re.findall(r"url\(#([^)]+)\)", source))
    assert used and used <= set(re.findall(r'id="([^"]+)"', source))
    # matplotlib's own style sheet would change the whole page.
    assert source.count("<style") == 1


@pytest.mark.parametrize("name", PAGES)
def test_every_colour_that_a_page_uses_has_a_value_for_light_and_dark_screens(name: str) -> None:
    source = PAGES[name]("word")
    used = set(re.findall(r"var\((--[\w-]+)\)", source))
    assert {"--ink", "--page", "--line", "--soft", "--blue"} <= used
    light, dark = source.split("@media (prefers-color-scheme: dark)", 1)
    for colour in used:
        assert re.search(rf"{colour}: #[0-9a-f]{{6}}\b", light) and re.search(rf"{colour}: #[0-9a-f]{{6}}\b", dark)
    drawn = "".join(re.findall(r"<svg.*?</svg>", source, re.DOTALL))
    assert not re.search(r"(fill|stroke): #", drawn)


def test_a_page_is_the_same_in_every_process_whatever_matplotlibrc_says(tmp_path: Path) -> None:
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); from comparisons import COMPARISON;"
        "from lorakit.study.comparison.page import render; import matplotlib; before = matplotlib.rcParams.copy();"
        "sys.stdout.buffer.write(render(COMPARISON).encode()); assert matplotlib.rcParams.copy() == before;"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    settings = ["", "axes.facecolor: red\nfont.size: 30\nsvg.fonttype: path\naxes.spines.top: True\n"]
    pages = []
    for index, text in enumerate(settings):
        (tmp_path / f"{index}.rc").write_text(text)
        done = subprocess.run(
            [sys.executable, "-c", script, str(Path(__file__).parents[1])],
            env={**os.environ, "MATPLOTLIBRC": str(tmp_path / f"{index}.rc"), "PYTHONHASHSEED": str(index)},
            capture_output=True,
            check=True,
        )
        pages.append(done.stdout)
    assert pages[0] == pages[1]
    assert pages[0].decode() == comparison_page.render(comparisons.COMPARISON)


@pytest.mark.parametrize("word", ["准确率", "نص", "a\x00b\x1b[31m", "$x_1$", "\\frac", "😀", "#ffffff", "%"])
def test_any_name_can_be_drawn(word: str) -> None:
    shown = re.sub("[\x00\x1b]", "\ufffd", word)
    for name in ("comparison", "analysis"):
        words = Read(PAGES[name](word)).words
        assert sum(words.count(one) for one in {word, shown}) > 3
    points = [Point(word, word, "", 10, 1.0, None, word)]
    drawing = ElementTree.fromstring(standalone(scatter(points, word, [word])))
    texts = [element.text for element in drawing.iter() if element.tag.endswith(("}text", "}title"))]
    assert texts.count(shown) == 3  # the metric, the label, the title under the pointer


def test_the_loss_is_drawn_where_its_axes_say() -> None:
    history = [{"step": step, "loss": 4.0 * 0.7**step} for step in range(1, 21)]
    history += [{"step": 20, "eval_loss": 3.0}, {"step": 7, "loss": float("nan")}, {"step": 3}]
    drawn = run_page.curves(history)
    assert "Loss over steps" in drawn and ">step</text>" in drawn
    assert "training: 0.00319 at the end</text>" in drawn and "held-out: 3.00 at the end</text>" in drawn
    path = re.search(r'<g class="training">\s*<path d="([^"]*)"', drawn)
    assert path is not None
    points = [(float(x), float(y)) for x, y in re.findall(r"[ML] (\S+) (\S+)", path[1])]
    ticks = {}
    for axis, body in re.findall(r'<g class="([xy])tick">(.*?)</text></g></g>', drawn):
        place = re.search(r'<use [^>]*x="([\d.]+)"', body) if axis == "x" else re.search(r'd="M \S+ (\S+)', body)
        assert place is not None
        ticks[axis, float(body.rsplit(">", 1)[1])] = float(place[1])
    left, right = ticks["x", 0.0], ticks["x", 20.0]
    one, decade = ticks["y", 1.0], ticks["y", 0.1] - ticks["y", 1.0]  # a factor of ten has the same height everywhere
    assert ticks["y", 0.01] - ticks["y", 0.1] == pytest.approx(decade, abs=0.1)
    for step in (1, 20):
        across = left + (right - left) * step / 20
        assert points[step - 1] == pytest.approx((across, one - decade * math.log10(4.0 * 0.7**step)), abs=0.1)


def test_each_adapter_has_its_own_curves() -> None:
    names = ["fr", "a-long-name-of-a-style", "_c", *"defg"]
    history = [
        {"step": step, **{f"loss {name}": (1.0 + place) / step for place, name in enumerate(names)}}
        for step in range(1, 11)
    ]
    history += [{"step": 10, "loss": 7.0, "eval_loss fr": 0.25, "eval_loss d": 0.5}]
    drawn = run_page.curves(history, names)
    assert re.findall(r">([^<>]+)</text>", drawn)[-6:] == ["fr", "a-long-name-o…", "_c", *"def"]  # six have colours
    assert len(re.findall(r'<g class="training ', drawn)) == 6 and len(re.findall(r'<g class="held-out ', drawn)) == 2
    for colour, name in (("blue", "fr"), ("violet", "d")):
        for kind in ("training", "held-out"):
            line = re.search(rf'<g class="{kind} {name}">.*?</g>', drawn, re.DOTALL)
            assert line is not None and f"stroke: var(--{colour})" in line[0]
    assert run_page.curves([{"step": 1, "loss": 1.0}, {"step": 2, "loss": 1.0}], ["fr"]) == ""


@pytest.mark.parametrize(("low", "high"), [(2.1, 2.6), (0.5, 3.0), (0.01, 3.0), (1e-6, 3.0)])
def test_the_axis_of_the_loss_has_a_few_numbers(low: float, high: float) -> None:
    drawn = run_page.curves([{"step": 1, "loss": high}, {"step": 2, "loss": low}])
    numbers = [float(one) for one in re.findall(r'<g class="ytick">.*?>([^<>]+)</text></g></g>', drawn)]
    assert 2 <= len([one for one in numbers if low / 1.15 <= one <= high * 1.15]) <= 9


def test_a_loss_that_never_moves_and_a_run_of_one_step_are_no_error() -> None:
    assert run_page.curves([{"step": 1, "loss": 1.0}]) == ""
    assert "svg" in run_page.curves([{"step": step, "loss": 0.0} for step in (1, 2)])
    assert "svg" in run_page.curves([{"step": step, "loss": 2.0 - step} for step in (1, 2)])
    nothing = run_page.render(
        title="", facts={}, command="", settings=Table((), ()), summary="", history=[], result=None, changes=[]
    )
    assert "Too few steps for a curve." in nothing and "<script" not in nothing


def test_the_backend_stays_what_it_was() -> None:
    before = matplotlib.rcParams._get("backend")
    run("word")
    assert matplotlib.rcParams._get("backend") == before
