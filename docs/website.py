"""What mkdocs builds the site from, beside the pages in docs/ (a hook of mkdocs.yml; `scripts/docs` builds).

The README is the first page. Notebooks become pages, and so does the help of each command, as the program prints it. A
link to a file of the repository leads to a page that shows it, so the same links work here and in the repository.
"""

from __future__ import annotations

import json
import os
import posixpath
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"\]\((?![a-z]+:|#)([^)\s#]+)(#[^)\s]*)?\)")
FENCED = re.compile(r"(^```.*?^```)", flags=re.DOTALL | re.MULTILINE)
SHOWN = {".py": "python", ".md": "markdown", ".yaml": "yaml", ".toml": "toml", ".txt": "text", "": "bash"}
IMAGES = (".png", ".svg")
AT_ROOT = {"README.md": "index.md", "CHANGELOG.md": "CHANGELOG.md", "CONTRIBUTING.md": "CONTRIBUTING.md"}


def address(path: str) -> str:
    """The site's file for a file or a folder of the repository; both relative to their roots."""
    if path in AT_ROOT:
        return AT_ROOT[path]
    if (ROOT / path).is_dir():
        return f"source/{path}/index.md"
    suffix = posixpath.splitext(path)[1]
    if path.startswith("docs/") and suffix != ".py":
        return path.removeprefix("docs/").replace(".ipynb", ".md")
    return f"source/{path}" if suffix in IMAGES else f"source/{path}.md"


def linked(text: str, origin: str) -> set[str]:
    """The files and folders of the repository that the page `origin` links to."""
    folder = posixpath.dirname(origin)
    prose = FENCED.sub("", text)
    return {posixpath.normpath(posixpath.join(folder, link[1])) for link in LINK.finditer(prose)}


def relinked(text: str, origin: str) -> str:
    """The page `origin` of the repository with its links as the site has them."""
    folder, here = posixpath.dirname(origin), posixpath.dirname(address(origin))

    def moved(link: re.Match[str]) -> str:
        target = address(posixpath.normpath(posixpath.join(folder, link[1])))
        anchor = re.sub(r"^#L(\d+)$", r"#__codelineno-0-\1", link[2] or "")
        return f"]({posixpath.relpath(target, here or '.')}{anchor})"

    return "".join(part if part.startswith("```") else LINK.sub(moved, part) for part in FENCED.split(text))


def from_notebook(path: Path) -> str:
    """A notebook as Markdown: its text, its code, and what it printed where that is kept."""
    parts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
        for output in cell.get("outputs", ()):
            parts.append(f"```text\n{''.join(output['text'])}```")
    return "\n\n".join(parts) + "\n"


def own_pages() -> dict[str, str]:
    """The pages whose text is in the repository, by their path there."""
    pages = {name: (ROOT / name).read_text(encoding="utf-8") for name in AT_ROOT}
    for path in sorted((ROOT / "docs").rglob("*.md")):
        pages[path.relative_to(ROOT).as_posix()] = path.read_text(encoding="utf-8")
    for path in sorted((ROOT / "docs").rglob("*.ipynb")):
        pages[path.relative_to(ROOT).as_posix()] = from_notebook(path)
    return pages


def commands() -> str:
    """The help of each command."""
    environment = os.environ | {"COLUMNS": "100", "NO_COLOR": "1"}

    def said(*words: str) -> str:
        command = [sys.executable, "-m", "lorakit", *words, "--help"]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout

    overview = said()
    verbs = re.findall(r"^  (\w+) ", overview.partition("commands:")[2], flags=re.MULTILINE)
    parts = ["# The commands", f"```text\n{overview}```"]
    for verb in verbs:
        parts += [f"## lorakit {verb}", f"```text\n{said(verb)}```"]
    return "\n\n".join(parts) + "\n"


def sources(pages: dict[str, str]) -> dict[str, str]:
    """A page for each file that a page links to, and for each folder with what is in it."""
    shown: dict[str, str] = {}
    waiting = sorted(set().union(*(linked(text, origin) for origin, text in pages.items())))
    while waiting:
        path = waiting.pop()
        at = address(path)
        if at in shown or not at.startswith("source/") or path.endswith(IMAGES):
            continue
        head = f"---\nsearch:\n  exclude: true\n---\n\n# {path}\n\n"
        if (ROOT / path).is_dir():
            lines = []
            for entry in sorted((ROOT / path).iterdir()):
                name = entry.relative_to(ROOT).as_posix()
                if entry.name.startswith((".", "__pycache__")):
                    continue
                if entry.is_dir() or entry.suffix in SHOWN:
                    waiting.append(name)
                    lines.append(f"- [{entry.name}]({posixpath.relpath(address(name), posixpath.dirname(at))})")
                else:
                    lines.append(f"- {entry.name}")
            shown[at] = head + "\n".join(lines) + "\n"
        else:
            language = SHOWN[posixpath.splitext(path)[1]]
            text = (ROOT / path).read_text(encoding="utf-8")
            shown[at] = f'{head}``````{language} linenums="1"\n{text}``````\n'
    return shown


def on_files(files: Files, config: MkDocsConfig) -> Files:
    from mkdocs.structure.files import File

    pages = own_pages()
    made = {address(origin): text for origin, text in pages.items() if origin in AT_ROOT or origin.endswith(".ipynb")}
    made |= {"commands.md": commands()} | sources(pages)
    for at, text in made.items():
        if known := files.get_file_from_path(at):
            files.remove(known)
        files.append(File.generated(config, at, content=text))
    for path in sorted(set().union(*(linked(text, origin) for origin, text in pages.items()))):
        if path.endswith(IMAGES) and not path.startswith("docs/"):
            files.append(File.generated(config, address(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    at = page.file.src_uri
    origins = {address(origin): origin for origin in own_pages()}
    return relinked(markdown, origins[at]) if at in origins else markdown


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """mkdocs learns the anchors of the lines of code, to check links to them."""
    page.present_anchor_ids = {*(page.present_anchor_ids or ()), *re.findall(r'id="(__codelineno-[\d-]+)"', html)}
    return html
