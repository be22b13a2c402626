"""The pages' templates: jinja2 files in `lorakit/templates`, which all extend `base.html.j2`.

Values are escaped, except for the plots of `svg.py`. A name that a template uses and that has no value is an error.
"""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from ..core.numbers import percent
from . import colours, svg

_TEMPLATES = Environment(
    loader=PackageLoader("lorakit"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_TEMPLATES.filters["percent"] = percent


def fill_template(template: str, **values: Any) -> str:
    """A page as one self-contained HTML file, light or dark like its reader's screen."""
    return _TEMPLATES.get_template(template).render(style=f"{colours.rules()}\n{svg.RULES}", **values)
