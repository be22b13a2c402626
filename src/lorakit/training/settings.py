"""Settings declared once, as the fields of a frozen dataclass.

From the fields come the command line's flags, the keys of a YAML file, a commented file to start from, the help text
and the config.yaml of an output folder. Flags beat the YAML file, and the file beats the defaults.

Nothing heavy is imported here: `lorakit --help` reads this file.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import typing
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from ..core.errors import LoraError
from ..core.paths import expanded
from ..core.table import Table
from ..core.words import suggestion
from .values import converted, describe, value_text
from .yaml_files import Yaml, line_of, root_of, value_of

if TYPE_CHECKING:
    import yaml

Config = TypeVar("Config")


class UsageError(LoraError):
    """A command line or a configuration file that cannot be understood: exit code 2."""


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
    path: bool = False,
    many: bool = False,
    **limits: Any,
) -> Any:
    """A field. Limits of a number: above, at_least, below, at_most. aliases: other names that people type from habit.

    The limits apply to flags, files and Python, and no number may be infinite or nan. factory: makes the default.
    parse: reads a value with several parts from a flag or a file. file_only: the setting has no flag.
    path: ~ in it is the home folder. many: the flag may be given several times, and a file may hold a list or a mapping
    to numbers; all become one text, "a,b=0.3".
    """
    metadata = {
        "help": help,
        "group": group,
        "example": example,
        "aliases": aliases,
        "limits": limits,
        "parse": parse,
        "file_only": file_only,
        "path": path,
        "many": many,
    }
    if factory is not None:
        return field(default_factory=factory, metadata=metadata)
    if isinstance(default, tuple):
        return field(default_factory=lambda: default, metadata=metadata)
    return field(metadata=metadata) if default is MISSING else field(default=default, metadata=metadata)


def add_setting_flags(config: type, parser: argparse.ArgumentParser) -> None:
    """A flag for each setting of the dataclass, in groups, and -c/--config."""
    parser.add_argument("-c", "--config", metavar="FILE", type=expanded, help="YAML file with settings; flags beat it")
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
            options["action"] = "append" if own.meta["many"] else "store"
        title = own.meta["group"]
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        groups[title].add_argument(*flags, **options)


def number_type(kind: type[int] | type[float], **limits: float) -> Callable[[str], int | float]:
    """argparse's `type` for a flag that is not a setting: a number within limits, with the errors of a setting."""

    def read(text: str) -> int | float:
        problems: list[str] = []
        value: int | float = converted(text, kind, limits, "", problems)
        if problems:
            raise argparse.ArgumentTypeError(problems[0].removeprefix(": "))
        return value

    return read


def check_settings(config: Any) -> None:
    """Convert each field of a dataclass of settings to its type. Raises UsageError listing what is wrong.

    The dataclass calls it in `__post_init__`, so Python gets the same checks as flags and files.
    """
    problems: list[str] = []
    for name, own in _settings(type(config)).items():
        if own.meta["parse"] is None:
            value = converted(getattr(config, name), own.type, own.meta["limits"], name, problems)
            if own.meta["path"] and value is not None:
                value = ",".join(map(expanded, value.split(","))) if own.meta["many"] else expanded(value)
            object.__setattr__(config, name, value)
    if problems:
        raise UsageError("\n".join(problems))


def from_args(config: type[Config], args: argparse.Namespace) -> Config:
    """The settings of a parsed command line, its YAML file included. Raises UsageError listing what is wrong."""
    settings = _settings(config)
    given = {name: value for name, value in vars(args).items() if name in settings}
    values: dict[str, Any] = {}
    problems: list[str] = []
    if args.config is not None:
        path = Path(args.config)
        try:
            root = root_of(path)
        except (OSError, ValueError) as error:
            raise UsageError(f"--config {error}" if isinstance(error, OSError) else str(error)) from None
        if root is not None:
            values = read_mapping(config, Yaml(path, root), problems, overridden=given)
    for name, value in given.items():
        values[name] = settings[name].convert(value, f"--{_kebab(name)}", problems)
    missing = [name for name, own in settings.items() if own.is_required and name not in values]
    if missing:
        example = " ".join(f"--{_kebab(name)} {settings[name].meta['example']}" for name in missing)
        problems.append(f"missing: {example}   (or give them in a YAML file: --config FILE)")
    if problems:
        raise UsageError("\n".join(problems))
    made = config(**values)
    if hasattr(config, "given"):
        object.__setattr__(made, "given", frozenset(values))
    return made


def to_yaml(config: Any) -> str:
    """Every setting as YAML, in the order of the fields: what config.yaml holds."""
    import yaml

    def lists(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: lists(own) for name, own in value.items()}
        return [lists(own) for own in value] if isinstance(value, list | tuple) else value

    return str(yaml.safe_dump(lists(dataclasses.asdict(config)), sort_keys=False, allow_unicode=True))


def to_command(config: Any, verb: str) -> str:
    """The command line that gives these settings, quoted for a shell. Settings at their defaults are left out."""
    words = ["lorakit", verb]
    for name, own in _settings(type(config)).items():
        value = getattr(config, name)
        if not own.is_required and value == own.default:
            continue
        flag = f"--{_kebab(name)}"
        if own.type is bool:
            words.append(flag if value else f"--no-{_kebab(name)}")
            continue
        text = ",".join(value) if isinstance(value, tuple) else str(value)
        if isinstance(value, float):
            text = text.removesuffix(".0")
        words += [f"{flag}={text}"] if text.startswith("-") else [flag, text]
    return shlex.join(words)


def settings_table(config: Any) -> Table:
    """Every setting and its value, those that differ from their defaults marked."""
    rows, marked = [], set()
    for row, (name, own) in enumerate(_settings(type(config)).items()):
        value = getattr(config, name)
        rows.append((name, value_text(value)))
        if own.is_required or value != own.default:
            marked.add((row, 1))
    return Table(("setting", "value"), tuple(rows), left=frozenset({0, 1}), marked=frozenset(marked))


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

    @property
    def limits(self) -> Mapping[str, Any]:
        # A required setting, or a list whose default is not empty, may not be empty.
        full = self.is_required or (isinstance(self.default, tuple) and bool(self.default))
        return {**self.meta["limits"], **({"not_empty": True} if full else {})}

    @property
    def names(self) -> tuple[str, ...]:
        """What a file may call it: the field's name and the flag's longer aliases."""
        return self.name, *(alias.replace("-", "_") for alias in self.meta["aliases"] if len(alias) > 1)

    def convert(self, value: Any, where: str, problems: list[str]) -> Any:
        """`value` as the type of the field; what is wrong with it is added to `problems`, with `where` it stands."""
        if self.meta["parse"] is not None:
            return self.meta["parse"](value, where, problems)
        if self.meta["many"] and isinstance(value, list | dict):
            value = _joined(value)
        return converted(value, self.type, self.limits, where, problems)

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


def _joined(value: Any) -> str:
    """A list, or a mapping to numbers, as one text: "a,b=0.3"."""
    if isinstance(value, dict):
        return ",".join(f"{name}={number}" for name, number in value.items())
    return ",".join(map(_joined, value)) if isinstance(value, list) else str(value)


def _settings(config: type[Any]) -> dict[str, _Setting]:
    types = typing.get_type_hints(config)
    return {own.name: _Setting(own.name, types[own.name], own) for own in dataclasses.fields(config)}


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
    by_name = {alias: own for own in settings.values() for alias in own.names}
    values: dict[str, Any] = {}
    if not isinstance(source.node, yaml.MappingNode):
        problems.append(f"{source.place}: expected lines of the form `key: value`.")
        return values
    lines: dict[str, tuple[int, str]] = {}
    for key_node, value_node in source.node.value:
        place = f"{source.path}:{line_of(key_node)}"
        if not isinstance(key_node, yaml.ScalarNode):
            problems.append(f"{place}: expected the name of a setting before the colon.")
            continue
        key = str(key_node.value)
        own = by_name.get(key.replace("-", "_"))
        if own is None:
            problems.append(f"{place}: {_unknown(key, value_node, config, settings)}")
        elif own.name in lines:
            line, first = lines[own.name]
            same = "" if first == key else f", which is {first!r},"
            problems.append(f"{place}: {key!r}{same} stands here and in line {line}.")
        else:
            lines[own.name] = line_of(key_node), key
            if own.name not in overridden:
                values[own.name] = _value(own, source.path, value_node, f"{place}: {key}", problems)
    return values


def _value(own: _Setting, path: Path, node: yaml.Node, where: str, problems: list[str]) -> Any:
    if own.meta["parse"] is not None:
        return own.convert(Yaml(path, node), where, problems)
    before = len(problems)
    value = value_of(node, where, problems)
    return own.convert(value, where, problems) if len(problems) == before else None


def recorded(config: type, path: Path, names: Collection[str]) -> dict[str, Any]:
    """The settings among `names` that a file holds. Its other keys are ignored.

    Raises OSError for a file that cannot be read, and ValueError with the line for a wrong value.
    """
    root = root_of(path)
    problems: list[str] = []
    found: dict[str, Any] = {}
    for key_node, value_node in root.value if root is not None else ():
        if (name := key_node.value) in names:
            own = _settings(config)[name]
            found[name] = _value(own, path, value_node, f"{path}:{line_of(key_node)}: {name}", problems)
    if problems:
        raise LoraError("\n".join(problems))
    return found


def _unknown(key: str, value: yaml.Node, config: type, settings: Mapping[str, _Setting]) -> str:
    import yaml

    name = key.replace("-", "_")
    if any(name in own.names for own in _settings(config).values()):
        return f"{key!r} cannot be set here, but at the top of the file."
    hint = suggestion(name, [alias for own in settings.values() for alias in own.names])
    if isinstance(value, yaml.MappingNode):
        # Only a setting without a flag can hold a mapping.
        hint = suggestion(name, [own for own in settings if settings[own].meta["file_only"]])
        hint = hint or " The file is flat, without sections."
    return f"unknown key {key!r}.{hint}"


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
