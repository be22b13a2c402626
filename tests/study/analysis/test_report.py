"""The tables, the JSON and the page of `lorakit analyze`, and which base weights it takes."""

import base64
import dataclasses
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

import lorakit
import models
from lorakit.core.numbers import short_number
from lorakit.study.analysis import page, plots
from lorakit.study.analysis.measures import analyze, similarities
from lorakit.study.analysis.report import Study, as_json, grouped, meaning, tables_text
from lorakit.study.analysis.run import local_base, study_of
from models import train_a_little


@pytest.fixture(scope="module")
def study() -> Study:
    adapters: list[lorakit.Adapter] = []
    modules: tuple[Any, ...] = ()
    for rank in (4, 3):
        model = models.llama()
        lorakit.attach(model, ["q_proj", "down_proj"], rank=rank, alpha=2 * rank)
        torch.manual_seed(rank)
        train_a_little(model)
        with torch.no_grad():
            model.get_parameter("model.layers.1.mlp.down_proj.lora_B").mul_(10)
        adapters.append(lorakit.extract(model))
        modules = modules or tuple(analyze(adapters[0], model))
    return Study("ours", "the base", modules, "theirs", tuple(similarities(*adapters)), ("a note <&>",))


def test_the_table_groups_layers_and_puts_the_most_changed_first(study: Study) -> None:
    printed = tables_text(study)
    assert max(map(len, printed.splitlines())) <= 100
    tables = printed.split("most changed, each by itself:\n")
    assert re.search(
        r"^model.layers.\*.…  +rank +eff. +90% +‖ΔW‖ +/‖W‖ +amplified +in top r +intruders$", tables[0], re.M
    )
    assert tables[0].index("mlp.down_proj") < tables[0].index("self_attn.q_proj")
    assert re.search(r"^self_attn.q_proj +×2 +4 ", tables[0], re.M)
    assert tables[1].splitlines()[1].startswith("1.mlp.down_proj")
    assert "note: a note <&>" in printed
    assert "φ with theirs" in printed and re.search(r"^mlp.down_proj +×2 +4, 3 ", printed, re.M)
    every = tables_text(study, every=True)
    assert "each by itself" not in every
    assert every.splitlines()[3].startswith("1.mlp.down_proj")
    # A mean over the layers, each of which is in the table of all.
    both = [module for module in study.modules if "q_proj" in module.name]
    bases = [module.base for module in both if module.base is not None]
    cells = next(line.split() for line in printed.splitlines() if line.startswith("self_attn.q_proj"))
    assert float(cells[5]) == pytest.approx(sum(module.norm for module in both) / 2, rel=5e-3)
    assert float(cells[6].rstrip("%")) == pytest.approx(50 * sum(base.change or 0 for base in bases), rel=5e-3)
    assert float(cells[7]) == pytest.approx(sum(base.amplification or 0 for base in bases) / 2, rel=5e-3)
    shares: list[Any] = [[float(cell.rstrip("%")) for cell in cells[8:10]], [base.energy_within[4] for base in bases]]
    assert shares[0] == pytest.approx([50 * sum(side) for side in zip(*shares[1], strict=True)], abs=0.06)
    assert cells[10] == f"{sum(base.intruders for base in bases)}/20" and bases[0].intruders > 0


def test_sentences_say_what_the_numbers_mean_for_this_adapter(study: Study) -> None:
    bases = [module.base for module in study.modules if module.base is not None]
    changes = [100 * (base.change or 0) for base in bases]
    down = [own for own, module in zip(changes, study.modules, strict=True) if "down_proj" in module.name]
    moved, directions, new, alike = meaning(study)
    assert [float(one) for one in re.findall(r"([\d.]+)%", moved)] == pytest.approx(
        [sum(changes) / 4, sum(down) / 2], rel=5e-3
    )
    assert "model.layers.*.mlp.down_proj most" in moved
    held = [
        int((np.cumsum(np.square(m.singular_values)) / np.sum(np.square(m.singular_values)) < 0.9).sum()) + 1
        for m in study.modules
    ]
    assert directions.startswith(f"90 % of ΔW lies in {sum(held) / 4:.1f} of its 4.0 directions: it uses its rank")
    assert new.startswith(f"{sum(base.intruders for base in bases)} of the 40 strongest directions")
    phi = sum(one.left[-1][-1] for one in study.similarities) / 4
    assert f"φ = {short_number(phi)}" in alike and alike.startswith("The output directions of theirs")
    printed, shown = tables_text(study), page.render(study)
    for line in (moved, directions, new, alike):
        assert line in " ".join(printed.split()) and f"<p>{line}</p>" in shown


def test_a_rank_that_is_larger_than_the_update_needs_is_told(study: Study) -> None:
    modules = tuple(
        dataclasses.replace(one, singular_values=(10.0, 1.0, 0.1, 0.1), directions_90=1) for one in study.modules
    )
    without = Study("ours", None, tuple(dataclasses.replace(one, base=None) for one in modules))
    assert meaning(without) == ["90 % of ΔW lies in 1.0 of its 4.0 directions: a rank near 1 would hold most of it."]
    empty = tuple(dataclasses.replace(one, singular_values=(), directions_90=0, base=None) for one in modules)
    assert meaning(Study("ours", None, empty)) == []


def test_without_base_weights_the_columns_that_need_them_are_gone(study: Study) -> None:
    modules = tuple(dataclasses.replace(module, base=None) for module in study.modules)
    printed = tables_text(Study("ours", None, modules))
    assert "amplified" not in printed and "intruders" not in printed and "99%" in printed
    assert "Amplification" not in page.render(Study("ours", None, modules))


def test_the_json_holds_everything_to_six_digits(study: Study) -> None:
    data = json.loads(as_json(study))
    assert set(data) == {"adapter", "base", "modules", "other", "similarities", "notes"}
    for module, plain in zip(study.modules, data["modules"], strict=True):
        assert module.base is not None
        assert (plain["name"], plain["shape"], plain["rank"]) == (module.name, list(module.shape), module.rank)
        assert plain["singular_values"] == pytest.approx(list(module.singular_values), rel=1e-5)
        assert plain["base"]["intruders"] == module.base.intruders
        assert plain["base"]["energy_within"]["1"] == pytest.approx(list(module.base.energy_within[1]), rel=1e-5)
    for similarity, plain in zip(study.similarities, data["similarities"], strict=True):
        assert len(plain["A"]) == 4 and len(plain["A"][0]) == 3
        assert plain["left"][-1][-1] == pytest.approx(similarity.left[-1][-1], rel=1e-5)
        outputs, inputs = similarity.shape
        assert plain["chance"] == pytest.approx({"right": 4 / inputs, "left": 4 / outputs}, rel=1e-5)
    base = study.modules[0].base
    assert base is not None
    unknown = dataclasses.replace(study.modules[0], base=dataclasses.replace(base, change=None))
    assert json.loads(as_json(Study("a", "b", (unknown,))))["modules"][0]["base"]["change"] is None


def test_groups_keep_shapes_and_ranks_apart_and_experts_together(study: Study) -> None:
    first, *_ = study.modules
    named = [
        dataclasses.replace(first, name=name, rank=rank)
        for name, rank in (("m.0.e.w[0]", 4), ("m.0.e.w[1]", 4), ("m.1.e.w[0]", 4), ("m.0.q", 4), ("m.1.q", 8))
    ]
    assert {name: len(own) for name, own in grouped(named).items()} == {"m.*.e.w[*]": 3, "m.0.q": 1, "m.1.q": 1}
    mixed = [dataclasses.replace(first, name=f"m.{i}.q", rank=4 + i // 2) for i in range(4)]
    sizes = {name: len(own) for name, own in grouped(mixed).items()}
    outputs, inputs = first.shape
    assert sizes == {f"m.*.q ({outputs} × {inputs}, rank {rank})": 2 for rank in (4, 5)}


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "–"), (0.0, "0"), (0.12, "0.120"), (12.34, "12.3"), (123.4, "123"), (1234.5, "1.23e+03"), (2e-5, "2e-05")],
)
def test_numbers_have_three_digits(value: float | None, shown: str) -> None:
    assert short_number(value) == shown


class Balanced(HTMLParser):
    """Fails if a tag is closed without being opened, or opened without being closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.count: dict[str, int] = {}
        self.words = ""

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


def test_the_page_parses_and_draws_every_matrix(study: Study) -> None:
    drawn = page.render(study)
    parser = Balanced()
    parser.feed(drawn)
    parser.close()
    assert parser.open == []
    assert "http" not in drawn and "a note &lt;&amp;&gt;" in drawn and "prefers-color-scheme: dark" in drawn
    # 4 spectra; the scale; three heat maps for each of 2 groups and of 4 matrices.
    assert parser.count["svg"] == 4 + 1 + 3 * 2 + 3 * 4
    for words in ("Amplification", "Singular values of ΔW", "The same directions as theirs?", "mean of 2"):
        assert words in parser.words


def test_only_the_most_changed_of_many_matrices_are_drawn_and_the_page_says_so(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "_DRAWN", 3)
    drawn = page.render(study)
    assert "The 3 most changed of 4" in drawn and "The 3 most alike of 4" in drawn
    assert drawn.count("<svg") == 3 + 1 + 3 * 2 + 3 * 3


def test_layers_are_drawn_in_the_order_of_their_numbers(study: Study) -> None:
    """A file holds matrices in the order of their names, so layer 10 comes after layer 1."""
    like = next(module for module in study.modules if "q_proj" in module.name)
    modules = tuple(dataclasses.replace(like, name=f"layers.{layer}.q_proj") for layer in (0, 1, 10, 2))
    drawn = re.findall(r"\[(\d+)\]: ", page.render(dataclasses.replace(study, modules=modules, similarities=())))
    assert drawn == ["0", "1", "2", "10"]


def test_a_heat_map_has_each_number_in_its_place() -> None:
    phi = [[1.0, 0.5, 0.5], [0.0, 0.26, 1.0]]
    svg = ElementTree.fromstring(plots.heat_map(phi, "φ"))
    image = next(svg.iter("image"))
    encoded = image.attrib["href"].removeprefix("data:image/png;base64,")
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))))
    assert pixels.shape == (2, 3, 4)
    # The opacity of a cell, in 255 steps; the first row is at the top.
    assert pixels[:, :, 3] / 255 == pytest.approx(np.array(phi), abs=0.5 / 255)
    assert {tuple(colour) for row in pixels for colour in row[:, :3].tolist()} == {(0x3B, 0x82, 0xF6)}
    # Ten pixels a cell, 24 to the left of them and below.
    assert image.attrib["transform"] == "matrix(10 0 0 10 24 0)"
    assert svg.attrib["viewBox"] == "0 0 54 44"
    places = {(text.text, text.attrib["x"]) for text in svg.iter("text")}
    assert places == {("1", "20"), ("2", "20"), ("1", "24"), ("3", "54")}
    assert "ΔW = 0" in plots.heat_map([], "φ")


def test_bars_are_as_high_as_their_share() -> None:
    svg = ElementTree.fromstring(plots.bars([4.0, 1.0], "σ", ceiling=4.0, width=100, height=80))
    bars = next(group for group in svg.iter("g") if group.get("class") == "bars")
    corners = re.findall(r"[ML] (\S+) (\S+)", next(bars.iter("path")).attrib["d"])
    assert [(float(x), float(y)) for x, y in corners][:6] == [(0, 80), (0, 0), (50, 0), (50, 60), (100, 60), (100, 80)]


def test_the_base_is_taken_from_this_machine_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network was asked"))
    assert local_base(None) is None and local_base("") is None
    assert local_base(str(tmp_path)) == str(tmp_path)
    assert local_base(str(tmp_path / "gone")) is None
    assert local_base("some/model") is None
    cached = tmp_path / "models--some--model"
    snapshot = cached / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    (snapshot / "config.json").write_text("{}")
    assert local_base("some/model") is None  # no weights
    (snapshot / "model.safetensors").touch()
    assert local_base("some/model") == str(snapshot)


def test_what_the_tables_do_not_show_is_noted(tiny_lm: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_lm)
    lorakit.attach(model, "q_proj", rank=2, dora=True, also_train=["lm_head"])
    train_a_little(model)
    lorakit.save(model, tmp_path / "dora")
    found = study_of(str(tmp_path / "dora"))
    assert found.base == str(tiny_lm) and all(module.dora for module in found.modules)
    gains, whole = found.notes
    assert gains.startswith("DoRA: ΔW is s·B A; the gain")
    assert whole == "trained whole, with no low rank to analyze: lm_head.weight."
