"""The colours of pages and plots. Each has a name, a value for a light screen and one for a dark screen.

A page and a plot name a colour as a CSS variable, `var(--blue)`. The reader's screen decides which value it has.
"""

from __future__ import annotations

COLOURS = {  # name: (light, dark). No two light values are equal: `svg.py` finds a plot's colours by them
    "ink": ("#1b1f24", "#e6e8eb"),
    "soft": ("#5f6872", "#9aa4ae"),
    "line": ("#d8dde3", "#3a4149"),
    "page": ("#ffffff", "#16191d"),
    "panel": ("#f5f7f9", "#1e2328"),  # behind what stands apart
    "added": ("#d3f2dc", "#17452a"),  # behind what the expected text has and the answer lacks
    "removed": ("#fddcdc", "#5b2026"),  # behind what the answer has and the expected text lacks
    "blue": ("#2563eb", "#6ea8fe"),
    "orange": ("#b45309", "#f0a94a"),
    "green": ("#15803d", "#4ade80"),
    "violet": ("#7c3aed", "#b794f6"),
    "red": ("#dc2626", "#f87171"),
    "cyan": ("#0e7490", "#22d3ee"),
    "pink": ("#be185d", "#f472b6"),
    "slate": ("#64748b", "#94a3b8"),
}
LIGHT = {name: light for name, (light, _) in COLOURS.items()}


def rules() -> str:
    """CSS that gives each variable its value."""
    light, dark = ("; ".join(f"--{name}: {values[side]}" for name, values in COLOURS.items()) for side in (0, 1))
    return f":root {{ {light} }}\n@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}"
