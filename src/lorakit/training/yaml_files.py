"""Read YAML files so that every error has its file and line: nodes first, values once their type is known."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import LoraError
from ..core.reading import text_of

if TYPE_CHECKING:
    import yaml


@dataclass(frozen=True)
class Yaml:
    """A YAML node of a file, not yet converted to a value; for settings with a `parse`."""

    path: Path
    node: yaml.Node

    @property
    def place(self) -> str:
        return f"{self.path}:{line_of(self.node)}"


def root_of(path: Path) -> yaml.MappingNode | None:
    """The mapping that a file holds; None if it is empty. Raises OSError, or ValueError with the line."""
    import yaml

    text = text_of(path)
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        tab = " Indent with spaces, not with tabs." if "'\\t'" in str(error.problem) else ""
        raise LoraError(f"{path}:{line}: not YAML: {error.problem or error.context}.{tab}") from None
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        raise LoraError(f"{path}:{line}: not YAML: a character that it forbids, U+{error.character:04X}.") from None
    except RecursionError:
        raise LoraError(f"{path}: not YAML that can be read: too many brackets in one another.") from None
    if root is not None and not isinstance(root, yaml.MappingNode):
        raise LoraError(f"{path}:{line_of(root)}: expected lines of the form `key: value`.")
    return root


def value_of(node: yaml.Node, where: str, problems: list[str]) -> Any:
    """The value of a node: a number, text, list or mapping. If it cannot be read: None, and a problem with `where`."""
    import yaml

    try:
        return yaml.SafeLoader("").construct_object(node, deep=True)
    except (
        yaml.YAMLError,
        ValueError,
        TypeError,
        AttributeError,
        LookupError,
        ArithmeticError,
        RecursionError,
    ) as error:
        reason = getattr(error, "problem", None) or error
        problems.append(f"{where}: a value that cannot be read ({reason}).")
        return None


def line_of(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1
