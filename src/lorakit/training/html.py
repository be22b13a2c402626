"""The pages' templates: jinja2 files in `lorakit/templates`, which all extend `base.html.j2`.

What is put into a template is escaped, but for the plots of `svg.py`. A name that a template asks for and is not given
is an error.
"""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from . import colours, svg

_TEMPLATES = Environment(
    loader=PackageLoader("lorakit"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def render(template: str, **values: Any) -> str:
    """A page as HTML: one file that needs no other, light or dark as its reader's screen is."""
    return _TEMPLATES.get_template(template).render(style=f"{colours.rules()}\n{svg.RULES}", **values)
