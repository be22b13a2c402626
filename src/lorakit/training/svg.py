"""matplotlib's figures as SVG inside a page: small, with text as text, in the page's colours.

A figure is drawn with the light values of `colours.py`; in the SVG each becomes its CSS variable, so that one drawing
serves light and dark screens. The same data give the same bytes.

    @styled()
    def plot(...) -> Markup:
        figure = new_figure(480, 240)
        ...
        return svg(figure, "what is drawn")

No figure is registered with pyplot. The process's backend and settings are not changed: those of `styled` hold only
inside the function.
"""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from collections.abc import Iterator, Sequence
from xml.etree import ElementTree

import matplotlib.style
from markupsafe import Markup
from matplotlib.figure import Figure

from .colours import LIGHT, rules

# The CSS that a page with plots needs beside the colours. An outline separates labels from the lines behind them.
RULES = """
.plot { display: block; width: 100%; height: auto }
.plot .label text { stroke: var(--page); stroke-width: 3px; paint-order: stroke }
"""
_STYLE = {
    "svg.fonttype": "none",  # text, not the outlines of letters
    "svg.hashsalt": "lorakit",  # the same names in every process
    "figure.dpi": 72,  # a point is a pixel
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.edgecolor": LIGHT["soft"],
    "axes.labelcolor": LIGHT["soft"],
    "axes.axisbelow": True,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 12,
    "axes.labelsize": 12,
    "grid.color": LIGHT["line"],
    "legend.frameon": False,
    "legend.labelcolor": LIGHT["soft"],
    "text.color": LIGHT["ink"],
    "xtick.color": LIGHT["soft"],
    "ytick.color": LIGHT["soft"],
    "ytick.major.size": 0,
}
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))
_VARIABLES = {light: f"var(--{name})" for name, light in LIGHT.items()}
_TICK = re.compile(r"([xy]tick)_\d+")  # matplotlib's names of a tick's group


@contextlib.contextmanager
def styled() -> Iterator[None]:
    """Within the block, matplotlib has only the pages' settings; the user's matplotlibrc is ignored."""
    with matplotlib.style.context(_STYLE, after_reset=True):
        yield


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of `width` × `height` pixels."""
    return Figure(figsize=(width / 72, height / 72))


def svg(figure: Figure, label: str, kind: str = "plot", titles: Sequence[str] = ()) -> Markup:
    """The figure as an element of a page.

    label: what is drawn, for readers who do not see it. kind: the element's class. An artist whose gid is ".mark" gets
    the class "mark", a tick "xtick" or "ytick". titles: shown when the marks are pointed at, in their order.
    """
    buffer = io.StringIO()
    with warnings.catch_warnings():
        # If matplotlib's font lacks a letter, the reader's font has it.
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from")
        figure.savefig(buffer, format="svg", metadata=_NO_METADATA)
    root = ElementTree.fromstring(_printable(buffer.getvalue()))
    _tidy(root)
    for mark, title in zip((one for one in root.iter() if one.get("class") == "mark"), titles, strict=bool(titles)):
        mark.insert(0, ElementTree.Element("title"))
        mark[0].text = _printable(title)
    _, _, width, height = root.attrib["viewBox"].split()
    root.attrib.clear()
    root.attrib |= {"class": kind, "viewBox": f"0 0 {width} {height}", "width": width, "height": height}
    root.attrib |= {"role": "img", "aria-label": _printable(label), "stroke-linejoin": "round"}
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def standalone(drawing: str) -> str:
    """The drawing as a separate SVG file, with its light and dark colours."""
    root = ElementTree.fromstring(drawing)
    root.set("xmlns", "http://www.w3.org/2000/svg")
    style = ElementTree.Element("style")
    style.text = f"{rules()}{RULES}"
    root[:0] = [style, ElementTree.Element("rect", width="100%", height="100%", fill="var(--page)")]
    return ElementTree.tostring(root, encoding="unicode") + "\n"


def _printable(text: str) -> str:
    """The text with U+FFFD in place of each character that XML does not allow."""
    return re.sub("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", text)


def _tidy(root: ElementTree.Element) -> None:
    """Remove what a page does not need, and put in the page's colours and fonts."""
    referred = set(re.findall(r'(?:url\(#|href="#)([^")]+)', ElementTree.tostring(root, encoding="unicode")))
    for parent in list(root.iter()):
        for child in list(parent):
            # matplotlib's style would apply to the whole page. The transparent background need not be drawn.
            if child.tag.endswith(("}metadata", "}style")) or child.get("style") == "fill: none":
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        if element.tag not in ("text", "tspan"):
            element.text = None
        element.tail = None
        element.attrib = {name.rpartition("}")[2]: _short(value) for name, value in element.attrib.items()}
        if element.get("transform", "").startswith("rotate(-0 "):
            del element.attrib["transform"]
        name = element.get("id", "")
        if name not in referred:
            element.attrib.pop("id", None)
            tick = _TICK.fullmatch(name)
            if tick or name.startswith("."):
                element.set("class", tick[1] if tick else name[1:])


def _short(value: str) -> str:
    """An attribute without extra white space and digits, with colours as variables and with the page's font."""
    value = " ".join(value.split())
    if value.startswith("data:"):
        return value.replace(" ", "")
    value = re.sub(r"\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}".rstrip("0").rstrip("."), value)
    value = re.sub(r"(?:'[^']*', )+sans-serif", "system-ui, sans-serif", value)
    return re.sub(r"#[0-9a-f]{6}\b", lambda colour: _VARIABLES.get(colour[0], colour[0]), value)
