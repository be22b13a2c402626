"""The pages in docs/ and the README: their links lead somewhere, their line numbers are right, their code runs."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", *DOCS]


def name_of(path: Path) -> str:
    return path.name


def blocks_of(page: Path) -> list[tuple[int, str]]:
    """Each ```python block with the number of its first line."""
    text = page.read_text(encoding="utf-8")
    return [
        (text.count("\n", 0, block.start(1)), block[1])
        for block in re.finditer(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    ]


def load_links() -> ModuleType:
    spec = importlib.util.spec_from_file_location("links", ROOT / "docs" / "links.py")
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


def test_line_numbers_of_links_into_the_code_are_right(capsys: pytest.CaptureFixture[str]) -> None:
    """Stale ones are put right by `python docs/links.py`."""
    status = load_links().main(["--check"])
    assert (capsys.readouterr().out, status) == ("", 0)


def test_links_py_finds_definitions_rewrites_numbers_and_refuses_unknown_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    links = load_links()
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
    """In a process of their own: compatibility.md puts lorakit in the place of loralib.

    Those of the README are run by test_package.py, each on its own.
    """
    program = ""
    for line, block in blocks_of(page):
        # Blank lines in front, so that an error names the line of the page.
        program += "\n" * (line - program.count("\n")) + block
    (tmp_path / page.name).write_text(program, encoding="utf-8")
    done = subprocess.run([sys.executable, "-W", "error", page.name], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


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
