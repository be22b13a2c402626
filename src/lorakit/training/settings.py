"""Settings declared once, as the fields of a frozen dataclass.

From the fields come the command line's flags, the keys of a YAML file, a commented file to start from, the help text
and the config.yaml of an output folder. Flags beat the YAML file, and the file beats the defaults.

Nothing heavy is imported here: `lorakit --help` reads this file.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

if TYPE_CHECKING:
    import yaml

Config = TypeVar("Config")


class UsageError(ValueError):
    """A command line or a configuration file that cannot be understood: exit code 2."""


@dataclass(frozen=True)
class Yaml:
    """A value in a file that was not constructed yet, with the line where it stands: for settings with a `parse`."""

    path: Path
    node: yaml.Node

    @property
    def place(self) -> str:
        return f"{self.path}:{self.node.start_mark.line + 1}"


Parse = Callable[[str | Yaml, str, list[str]], Any]  # value, what to call it, problems found → the setting's value


def setting(
    default: Any = MISSING,
    *,
    help: str,
    group: str,
    example: str = "",
    aliases: tuple[str, ...] = (),
    factory: Callable[[], Any] | None = None,
    parse: Parse | None = None,
    file_only: bool = False,
    **limits: Any,
) -> Any:
    """A field. Limits: above, at_least, below. aliases: other flags people type from habit.

    factory: makes the default. parse: reads a value that has parts of its own, from a flag or a file. file_only: the
    setting has no flag.
    """
    metadata = {
        "help": help,
        "group": group,
        "example": example,
        "aliases": aliases,
        "limits": limits,
        "parse": parse,
        "file_only": file_only,
    }
    if factory is not None:
        return field(default_factory=factory, metadata=metadata)
    if isinstance(default, tuple):
        return field(default_factory=lambda: default, metadata=metadata)
    return field(metadata=metadata) if default is MISSING else field(default=default, metadata=metadata)


def add_arguments(config: type, parser: argparse.ArgumentParser) -> None:
    """A flag for each setting of the dataclass, in groups, and -c/--config."""
    parser.add_argument("-c", "--config", metavar="FILE", help="YAML file with settings; flags beat it")
    groups: dict[str, Any] = {}
    for name, own in _settings(config).items():
        if own.meta["file_only"]:
            continue
        flags = [f"--{_kebab(name)}", *(f"--{a}" if len(a) > 1 else f"-{a}" for a in own.meta["aliases"])]
        options: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS, "help": own.help_with_default()}
        if own.type is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["metavar"] = own.metavar()
        title = own.meta["group"]
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        groups[title].add_argument(*flags, **options)


def from_args(config: type[Config], args: argparse.Namespace) -> Config:
    """The settings of a parsed command line, its YAML file included. Raises UsageError listing what is wrong."""
    settings = _settings(config)
    given = {name: value for name, value in vars(args).items() if name in settings}
    values: dict[str, Any] = {}
    problems: list[str] = []
    if args.config:
        path = Path(args.config)
        root = _composed(path)
        if root is not None:
            values = read_mapping(config, Yaml(path, root), problems, overridden=given)
    for name, value in given.items():
        values[name] = settings[name].convert(value, f"--{_kebab(name)}", problems)
    if problems:
        raise UsageError("\n".join(problems))
    missing = [name for name, own in settings.items() if own.is_required and name not in values]
    if missing:
        example = " ".join(f"--{_kebab(name)} {settings[name].meta['example']}" for name in missing)
        raise UsageError(f"missing: {example}   (or give them in a YAML file: --config FILE)")
    return config(**values)


def to_yaml(config: Any) -> str:
    """Every setting as YAML, in the order of the fields: what config.yaml holds."""
    import yaml

    def lists(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: lists(own) for name, own in value.items()}
        return [lists(own) for own in value] if isinstance(value, list | tuple) else value

    return str(yaml.safe_dump(lists(dataclasses.asdict(config)), sort_keys=False, allow_unicode=True))


def commented_yaml(config: type, verb: str) -> str:
    """A file to start from: the required settings with examples, the others commented out with their defaults."""
    lines = [f"# Settings of lorakit {verb}. Run it: lorakit {verb} --config THIS_FILE", ""]
    group = ""
    for name, own in sorted(_settings(config).items(), key=lambda item: not item[1].is_required):
        title = "required" if own.is_required else own.meta["group"]
        if title != group:
            lines += [f"# --- {title} ---"] if not group else ["", f"# --- {title} ---"]
            group = title
        lines.append(f"# {own.meta['help']}" + (f" ({' | '.join(own.choices)})" if own.choices else ""))
        if own.is_required:
            lines.append(f"{name}: {own.meta['example']}")
        else:
            lines.append(f"# {name}: {_yaml_value(own.default)}")
    return "\n".join(lines) + "\n"


def suggestion(word: str, known: typing.Iterable[str]) -> str:
    """Did you mean …?, or nothing."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean {near[0]!r}?" if near else ""


# --- one setting ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Setting:
    """A field of a dataclass of settings."""

    name: str
    type: Any
    field: dataclasses.Field[Any]

    @property
    def meta(self) -> Mapping[str, Any]:
        return self.field.metadata

    @property
    def choices(self) -> tuple[str, ...]:
        return typing.get_args(self.type) if typing.get_origin(self.type) is Literal else ()

    @property
    def is_required(self) -> bool:
        return self.field.default is MISSING and self.field.default_factory is MISSING

    @property
    def default(self) -> Any:
        if self.field.default_factory is not MISSING:
            return self.field.default_factory()
        return self.field.default

    def convert(self, value: Any, where: str, problems: list[str]) -> Any:
        """`value` as the type of the field; what is wrong with it is added to `problems`, with `where` it stands."""
        if self.meta["parse"] is not None:
            return self.meta["parse"](value, where, problems)
        try:
            converted = as_type(value, self.type)
        except ValueError:
            hint = suggestion(str(value), self.choices) if self.choices else ""
            problems.append(f"{where}: expected {describe(self.type)}, found {value!r}.{hint}")
            return None
        problem = _outside(converted, self.meta["limits"])
        if problem:
            problems.append(f"{where}: expected {problem}, found {value!r}.")
        return converted

    def metavar(self) -> str:
        if self.choices:
            return "|".join(self.choices)
        if self.meta["parse"] is not None:
            return "LIST"
        names = {"a whole number": "N", "a number": "X", "names separated by commas": "NAMES"}
        return names.get(describe(self.type), "TEXT")

    def help_with_default(self) -> str:
        text = str(self.meta["help"]).replace("%", "%%")
        if self.is_required or self.default in (None, False, ()):
            return text
        default = self.default
        shown = ",".join(default) if isinstance(default, tuple) else default
        return f"{text} (default: {f'{shown:g}' if isinstance(shown, float) else shown})"


def _settings(config: type[Any]) -> dict[str, _Setting]:
    types = typing.get_type_hints(config)
    return {own.name: _Setting(own.name, types[own.name], own) for own in dataclasses.fields(config)}


def as_type(value: Any, wanted: Any) -> Any:
    origin, options = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        return as_type(value, next(option for option in options if option is not type(None)))
    if origin is Literal:
        if value not in options:
            raise ValueError
        return value
    if origin is tuple:
        parts = value.split(",") if isinstance(value, str) else value
        if not isinstance(parts, list | tuple) or not all(isinstance(part, str) for part in parts):
            raise ValueError
        return tuple(part.strip() for part in parts if part.strip())
    if wanted is bool:
        if not isinstance(value, bool):
            raise ValueError
        return value
    if isinstance(value, bool) or value is None or isinstance(value, list | dict):
        raise ValueError
    if wanted is str:
        return str(value)
    number = float(value)  # PyYAML reads 2e-4 as text
    if wanted is int:
        if not number.is_integer():
            raise ValueError
        return int(number)
    if number != number:
        raise ValueError
    return number


def _outside(value: Any, limits: Mapping[str, float]) -> str | None:
    if value is None:
        return None
    if "above" in limits and not value > limits["above"]:
        return f"more than {limits['above']:g}"
    if "at_least" in limits and not value >= limits["at_least"]:
        return f"at least {limits['at_least']:g}"
    if "below" in limits and not value < limits["below"]:
        return f"less than {limits['below']:g}"
    return None


def describe(wanted: Any) -> str:
    origin, options = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in (types.UnionType, typing.Union):
        return describe(next(option for option in options if option is not type(None)))
    if origin is Literal:
        return "one of " + ", ".join(options)
    if origin is tuple:
        return "names separated by commas"
    return {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[wanted]


# --- YAML ----------------------------------------------------------------------------------------------------------


def read_mapping(
    config: type,
    source: Yaml,
    problems: list[str],
    *,
    overridden: Collection[str] = (),
    groups: Collection[str] | None = None,
) -> dict[str, Any]:
    """The settings in a mapping of a file; everything wrong with it, with its line, goes into `problems`.

    overridden: settings that something else decides. groups: those whose settings may stand here; None: all.
    """
    import yaml

    settings = {name: own for name, own in _settings(config).items() if groups is None or own.meta["group"] in groups}
    values: dict[str, Any] = {}
    if not isinstance(source.node, yaml.MappingNode):
        problems.append(f"{source.place}: expected lines of the form `key: value`.")
        return values
    lines: dict[str, int] = {}
    for key_node, value_node in source.node.value:
        name = str(key_node.value).replace("-", "_")
        line = key_node.start_mark.line + 1
        if name not in settings:
            problems.append(f"{source.path}:{line}: {_unknown(key_node.value, name, value_node, config, settings)}")
        elif name in lines:
            problems.append(f"{source.path}:{line}: {name!r} stands here and in line {lines[name]}.")
        else:
            lines[name] = line
            own = settings[name]
            where = f"{source.path}:{line}: {name}"
            value = Yaml(source.path, value_node) if own.meta["parse"] is not None else plain(value_node)
            if name not in overridden:
                values[name] = own.convert(value, where, problems)
    return values


def plain(node: yaml.Node) -> Any:
    """The value of a node: numbers, texts, lists and mappings."""
    import yaml

    return yaml.SafeLoader("").construct_object(node, deep=True)


def _unknown(key: str, name: str, value: yaml.Node, config: type, settings: Mapping[str, _Setting]) -> str:
    import yaml

    if name in _settings(config):
        return f"{key!r} cannot be set here, but at the top of the file."
    hint = suggestion(name, settings)
    if isinstance(value, yaml.MappingNode):
        # Only a setting without a flag has parts of its own.
        hint = suggestion(name, [own for own in settings if settings[own].meta["file_only"]])
        hint = hint or " The file is flat, without sections."
    return f"unknown key {key!r}.{hint}"


def _composed(path: Path) -> yaml.Node | None:
    import yaml

    if not path.is_file():
        near = suggestion(path.name, (entry.name for entry in path.parent.iterdir()) if path.parent.is_dir() else ())
        raise UsageError(f"--config {path}: no such file.{near}")
    try:
        root: yaml.Node | None = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UsageError(f"{path}:{line}: not YAML: {error.problem}.") from None
    if root is not None and not isinstance(root, yaml.MappingNode):
        raise UsageError(f"{path}:1: expected lines of the form `key: value`.")
    return root


def _yaml_value(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return "[" + ", ".join(value) + "]"
    if isinstance(value, str) and not value.replace("-", "").replace("_", "").isalnum():
        return json.dumps(value, ensure_ascii=False)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _kebab(name: str) -> str:
    return name.replace("_", "-")
