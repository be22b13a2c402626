"""Output folders from the command line: no verb removes or replaces files that it did not write."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import lorakit
import models
from lorakit.cli.main import main

pytestmark = pytest.mark.usefixtures("few_objects", "runs_in_this_process")


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


class Ran:
    def __init__(self, capsys: pytest.CaptureFixture[str], *words: object) -> None:
        capsys.readouterr()
        self.code = main([str(word) for word in words])
        self.out, self.err = capsys.readouterr()
        assert "Traceback" not in self.err and "(--debug" not in self.err, self.err


@pytest.fixture
def runs(tiny_lm: Path, tmp_path: Path) -> Path:
    """A folder with a base model, an adapter, a file of the user's, and the rows of a comparison."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "runs"
    shutil.copytree(tiny_lm, folder / "base")
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    lorakit.attach(model, "q_proj", rank=2)
    models.train_a_little(model)
    lorakit.save(model, folder / "adapter")
    (folder / "mine").mkdir()
    (folder / "mine" / "README.md").write_text("mine")
    (folder / "rows").mkdir()
    for name, word in (("a", "on"), ("b", "off")):
        rows = [{"text": f"turn {word} {i}", "label": "xy"[i % 2]} for i in range(20)]
        (folder / "rows" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def merge(runs: Path, out: Path, *more: object) -> list[object]:
    words = ["merge", "--model", runs / "base", "--adapter", runs / "adapter", "--dtype", "float32"]
    return [*words, "--output-dir", out, *more]


@pytest.mark.parametrize("place", ["base", "adapter", "mine", "", "rows"])
@pytest.mark.parametrize("verb", ["merge", "merge --overwrite", "train --overwrite", "train --resume auto", "compare"])
def test_a_folder_of_something_else_is_left_as_it_is(
    place: str, verb: str, runs: Path, tiny_encoder: Path, capsys
) -> None:
    before, out = tree(runs), runs / place
    words: list[object] = merge(runs, out, *verb.split()[1:])
    if verb.startswith("train"):
        words = ["train", "--model", runs / "base", "--data", runs / "rows" / "a.jsonl", "-o", out, *verb.split()[1:]]
    if verb == "compare":
        words = [
            "compare",
            "--model",
            tiny_encoder,
            "--data",
            runs / "rows" / "a.jsonl",
            "-o",
            out,
            "--methods",
            "bitfit",
        ]
    ran = Ran(capsys, *words)
    assert ran.code == 1
    assert "did not write" in ran.err or "which this command reads" in ran.err
    assert tree(runs) == before
    assert not list(runs.rglob(".lorakit"))


def test_merge_replaces_its_own_and_keeps_the_old_one_where_it_fails(runs: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "merged"
    assert Ran(capsys, *merge(runs, out)).code == 0
    first = tree(out)
    ran = Ran(capsys, *merge(runs, out))
    assert ran.code == 1 and "it holds a merged model. Choose another, or add --overwrite to replace that." in ran.err
    ran = Ran(capsys, *merge(runs, out, "--overwrite", "--dtype", "bfloat16", "--tolerance", "1e-9"))
    assert ran.code == 1 and "differs from base + adapter" in ran.err
    assert tree(out) == first
    (out / "extra.bin").write_text("mine")
    ran = Ran(capsys, *merge(runs, out, "--overwrite"))
    assert ran.code == 1 and "holds extra.bin, which lorakit merge did not write" in ran.err
    (out / "extra.bin").unlink()
    assert Ran(capsys, *merge(runs, out, "--overwrite")).code == 0
    assert tree(out).keys() == first.keys()


def test_a_merged_model_that_is_merged_into_is_no_place_for_the_result(runs: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "merged"
    assert Ran(capsys, *merge(runs, out)).code == 0
    before = tree(out)
    words = ["merge", "--model", out, "--adapter", runs / "adapter", "--output-dir", out, "--overwrite"]
    ran = Ran(capsys, *words)
    assert ran.code == 1 and f"holds {out}, which this command reads" in ran.err
    assert tree(out) == before


def test_analyze_adds_its_files_and_replaces_no_other_ones(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, out = tree(runs), runs / "adapter"
    words: list[Any] = ["analyze", out, "--model", runs / "base", "--output-dir", out]
    for _ in range(2):
        assert Ran(capsys, *words).code == 0
    assert before.items() <= tree(runs).items() and (out / "analysis.html").is_file()
    (runs / "mine" / "analysis.json").write_text("mine")
    ran = Ran(capsys, *words[:-1], runs / "mine")
    assert ran.code == 1 and "analysis.json was not written by lorakit analyze and is not replaced" in ran.err
    assert (runs / "mine" / "analysis.json").read_text() == "mine"


def test_one_folder_is_for_one_comparison(runs: Path, tiny_encoder: Path, tmp_path: Path, capsys) -> None:
    out, other = tmp_path / "out", shutil.copytree(tiny_encoder, tmp_path / "other")
    few = ["--seeds", 1, "--trials", 1, "--max-steps", 1, "--batch-size", 4, "--dtype", "float32"]

    def compare(model: Path, name: str, methods: str = "bitfit", *more: object) -> Ran:
        data = runs / "rows" / f"{name}.jsonl"
        return Ran(capsys, "compare", "--model", model, "--data", data, "-o", out, "--methods", methods, *few, *more)

    assert compare(tiny_encoder, "a").code == 0
    before = tree(out)
    for more in ([], ["--so-far"], ["--dry-run"]):
        ran = compare(other, "a", "bitfit", *more)
        assert ran.code == 1 and f"the model: {tiny_encoder} then, {other} now" in ran.err
        ran = compare(tiny_encoder, "b", "bitfit", *more)
        assert ran.code == 1 and "holds another comparison:" in ran.err and "the task a (" in ran.err
    shutil.copy(runs / "rows" / "a.jsonl", runs / "rows" / "kept.jsonl")
    shutil.copy(runs / "rows" / "b.jsonl", runs / "rows" / "a.jsonl")
    ran = compare(tiny_encoder, "a")
    assert ran.code == 1 and "the rows of the task a: " in ran.err and "not the same ones" in ran.err
    shutil.copy(runs / "rows" / "kept.jsonl", runs / "rows" / "a.jsonl")
    assert tree(out) == before
    assert compare(tiny_encoder, "a", "bitfit,lora rank=2").code == 0
    shutil.rmtree(out / ".lorakit")  # as 0.1.0 left it
    ran = compare(other, "a")
    assert ran.code == 1 and "holds another comparison:" in ran.err
    assert compare(tiny_encoder, "a").code == 0
