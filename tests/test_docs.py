"""The pages and the notebooks: their links work, their line numbers are right, their code runs."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

import lorakit
from lorakit.cli.main import VERBS

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
NOTEBOOKS = sorted((ROOT / "docs/notebooks").glob("*.ipynb"))
PAGES = [*sorted(ROOT.glob("*.md")), *DOCS, *NOTEBOOKS]


def name_of(path: Path) -> str:
    return path.name


def blocks_of(page: Path) -> list[tuple[int, str]]:
    """Each ```python block with the number of its first line."""
    text = page.read_text(encoding="utf-8")
    return [
        (text.count("\n", 0, block.start(1)), block[1])
        for block in re.finditer(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    ]


def load(name: str) -> ModuleType:
    """A program in docs/."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_and_images_point_at_what_exists(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    missing = [
        target
        for target in targets
        if not re.match(r"[a-z]+:|#", target) and not (page.parent / target.partition("#")[0]).exists()
    ]
    assert missing == []


def test_the_table_of_bases_is_what_happens() -> None:
    """`python docs/bases.py` writes it."""
    assert load("bases").main(["--check"]) == 0


def test_line_numbers_of_links_into_the_code_are_right(capsys: pytest.CaptureFixture[str]) -> None:
    """`python docs/links.py` corrects stale numbers."""
    status = load("links").main(["--check"])
    assert (capsys.readouterr().out, status) == ("", 0)


def test_links_py_finds_definitions_rewrites_numbers_and_refuses_unknown_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    links = load("links")
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("no link\n")
    (tmp_path / "code.py").write_text(
        "LIMIT = 3\n\n\n@decorated\ndef first(): ...\n\n\nclass Kind:\n    size: int = 1\n\n    def call(self): ...\n"
    )
    page = tmp_path / "docs" / "page.md"
    right = "[`LIMIT`](../code.py#L1) [`first`](../code.py#L5)\n[`Kind`](../code.py#L8)\n" + (
        "[`Kind.size`](../code.py#L9) [`Kind.call`](../code.py#L11)\n"
    )
    page.write_text(re.sub(r"#L\d+", "#L7", right))

    assert links.main(["--check"], tmp_path) == 1
    assert "page.md:3: `Kind.call`: ../code.py#L7 is now #L11" in capsys.readouterr().out
    assert "#L11" not in page.read_text()
    assert links.main([], tmp_path) == 0
    assert page.read_text() == right
    assert links.main(["--check"], tmp_path) == 0

    for wrong, reason in (("[`call`](../code.py#L1)", "defines no such name"), ("[`x`](no.py#L1)", "there is no file")):
        page.write_text(wrong)
        capsys.readouterr()
        assert links.main([], tmp_path) == links.main(["--check"], tmp_path) == 1
        assert reason in capsys.readouterr().out
        assert page.read_text() == wrong


@pytest.mark.parametrize("page", [page for page in DOCS if blocks_of(page)], ids=name_of)
def test_python_blocks_run(page: Path, tmp_path: Path) -> None:
    """They run in a separate process, because compatibility.md replaces loralib by lorakit.

    test_package.py runs those of the README, each separately.
    """
    program = ""
    for line, block in blocks_of(page):
        # Blank lines in front, so that an error names the line of the page.
        program += "\n" * (line - program.count("\n")) + block
    (tmp_path / page.name).write_text(program, encoding="utf-8")
    done = subprocess.run([sys.executable, "-W", "error", page.name], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_the_notebooks_run_and_print_what_they_show() -> None:
    """They run in a separate process. `python docs/notebooks.py` corrects what they print."""
    assert len(NOTEBOOKS) == 2
    done = subprocess.run(
        [sys.executable, "-W", "error", "docs/notebooks.py", "--check"], capture_output=True, text=True, cwd=ROOT
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_notebooks_py_says_which_cell_prints_something_else_and_puts_it_right(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    notebooks, page = load("notebooks"), tmp_path / "page.ipynb"
    cells = [
        {"cell_type": "markdown", "id": "one", "source": ["text"]},
        {"cell_type": "code", "id": "two", "source": ["x = 3"], "outputs": []},
        {"cell_type": "code", "id": "three", "source": ["print(x)\n", "print(x + 1)"], "outputs": []},
    ]
    page.write_text(json.dumps({"cells": cells}))

    assert notebooks.main(["--check"], tmp_path) == 1
    assert capsys.readouterr().out.startswith("page.ipynb: three prints\n3\n4\n")
    assert notebooks.main([], tmp_path) == notebooks.main(["--check"], tmp_path) == 0
    outputs = [cell.get("outputs") for cell in json.loads(page.read_text())["cells"]]
    assert outputs == [None, [], [{"name": "stdout", "output_type": "stream", "text": ["3\n", "4\n"]}]]

    page.write_text(json.dumps({"cells": [{"cell_type": "code", "id": "one", "source": ["1 / 0"], "outputs": []}]}))
    with pytest.raises(ZeroDivisionError, match="division by zero"):
        notebooks.main(["--check"], tmp_path)


def test_the_site_has_every_public_name() -> None:
    named = re.findall(r"^::: lorakit\.(\w+)$", (ROOT / "docs/api.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert sorted(named) == lorakit.__all__


def test_links_of_the_repository_become_links_of_the_site() -> None:
    website = load("website")
    page = (
        "[a](lora.md#the-scale) [b](../README.md) ![c](figures/scale.png)\n"
        "[`f`](../docs/links.py#L12)\n"
        "[d](../examples/toolcalls) [e](https://arxiv.org/abs/2106.09685) [f](#here)\n"
        "[g](notebooks/adapt_a_model.ipynb)\n"
        "```text\n[h](../README.md)\n```\n[i](../CONTRIBUTING.md)\n"
    )
    assert website.relinked(page, "docs/design.md") == (
        "[a](lora.md#the-scale) [b](index.md) ![c](figures/scale.png)\n"
        "[`f`](source/docs/links.py.md#__codelineno-0-12)\n"
        "[d](source/examples/toolcalls/index.md) [e](https://arxiv.org/abs/2106.09685) [f](#here)\n"
        "[g](notebooks/adapt_a_model.md)\n"
        "```text\n[h](../README.md)\n```\n[i](CONTRIBUTING.md)\n"
    )
    notebook = website.relinked("[a](../lora.md) [b](../../src/lorakit/core/attach.py)", "docs/notebooks/x.ipynb")
    assert notebook == "[a](../lora.md) [b](../source/src/lorakit/core/attach.py.md)"
    assert website.relinked("[a](docs/lora.md)", "README.md") == "[a](lora.md)"


def test_the_site_has_a_page_for_each_file_that_a_page_links_to() -> None:
    website = load("website")
    shown = website.sources({"docs/design.md": "[a](../examples) ![b](figures/scale.png) [c](lora.md)"})
    assert {"source/examples/index.md", "source/examples/toolcalls/index.md"} < set(shown)
    assert "- [README.md](README.md.md)" in shown["source/examples/toolcalls/index.md"]
    config = (ROOT / "examples/toolcalls/train.yaml").read_text(encoding="utf-8")
    assert f'``````yaml linenums="1"\n{config}``````\n' in shown["source/examples/toolcalls/train.yaml.md"]
    assert not any(at.startswith(("figures", "lora")) for at in shown)


def test_the_site_has_the_help_of_each_command() -> None:
    page = load("website").commands()
    assert re.findall(r"^## lorakit (\w+)$", page, flags=re.MULTILINE) == list(VERBS)
    assert page.count("usage: lorakit") == 1 + len(VERBS)


def test_explained_arguments_become_lists_on_the_site(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "griffe", SimpleNamespace(Extension=object, Object=object))
    docstring = "Do it.\n\n    y = W x\n\nrank, alpha: r and\n    alpha.\nA: names\n\nNote: raises\nnothing."
    assert load("docstrings").as_markdown(docstring) == (
        "Do it.\n\n    y = W x\n\n- `rank, alpha`: r and\n    alpha.\n- `A`: names\n\nNote: raises\nnothing."
    )


def test_the_tables_of_the_pages_are_those_of_the_results() -> None:
    """`python benchmarks/tables.py` writes them."""
    import tables

    shown = {}
    for path, content in tables.PAGES.items():
        page = path.read_text(encoding="utf-8")
        assert tables.filled(page, content) == page
        shown[path.name] = set(re.findall(r"<!-- ([\w-]+) -->\n", page)) - {"end"}
    assert shown["performance.md"] == {path.stem for path in (ROOT / "benchmarks/results").glob("*.json")}
    assert shown["results.md"] == {path.parent.name for path in tables.EXPERIMENTS.glob("*/compare.md")}
    assert not any(tables.stale(tables.EXPERIMENTS / name) for name in shown["results.md"])


def test_each_problem_has_tests_and_the_page_names_their_files() -> None:
    """`pytest -k problem_22` runs the tests of number 22. No number is missing, and no file is named without a test."""
    shown: dict[int, set[str]] = {number: set() for number in range(1, 51)}
    for path in sorted((ROOT / "tests").rglob("*.py")):
        text, name = path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix()
        for numbers in re.findall(r"def test_problem_(\w+)", text):
            found = re.match(r"\d\d(_and_\d\d)*(?=_)", numbers)
            assert found, f"{name}: test_problem_{numbers} has no number of two digits"
            for number in found[0].split("_and_"):
                shown[int(number)].add(name)  # KeyError: no such problem
    rows = re.findall(r"(?m)^\| (\d+) \| .* \| ([^|]*) \|$", (ROOT / "docs/problems.md").read_text(encoding="utf-8"))
    assert [int(number) for number, _ in rows] == list(range(1, 51))
    for number, cell in rows:
        assert set(re.findall(r"`(tests/[\w/.]+)`", cell)) == shown[int(number)], number
        assert cell.startswith("not solved: ") != bool(shown[int(number)]), number
    for path in (*sorted((ROOT / "src").rglob("*.py")), *sorted((ROOT / "tests").rglob("*.py"))):
        for number in re.findall(r"\bproblem (\d+)", path.read_text(encoding="utf-8")):
            assert 1 <= int(number) <= 50, path
