"""Docstrings as Markdown, for the site: an extension of griffe, named in mkdocs.yml.

The source explains arguments in paragraphs of their own, each beginning with its name and a colon. On a page these are
items of a list. What is indented otherwise is code already.
"""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

ARGUMENT = r"\*{0,2}(?:[a-z]\w*|[A-Z])\b"  # a word with a capital begins a sentence, a capital alone is a matrix
ITEM = re.compile(rf"^({ARGUMENT}(?:, {ARGUMENT})*): ")


def as_markdown(docstring: str) -> str:
    paragraphs = docstring.split("\n\n")
    return "\n\n".join(_items(text) if ITEM.match(text) else text for text in paragraphs)


def _items(paragraph: str) -> str:
    lines = []
    for line in paragraph.splitlines():
        lines.append(ITEM.sub(r"- `\1`: ", line) if ITEM.match(line) else f"    {line.strip()}")
    return "\n".join(lines)


class Items(Extension):
    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
