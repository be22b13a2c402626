"""argparse with one-line errors, suggestions for misspelt words, and no abbreviations."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from ..core.words import suggestion
from ..training.settings import UsageError
from ..training.terminal import columns


class Exit(Exception):
    """Raised in place of SystemExit when argparse ends the program."""

    def __init__(self, code: int) -> None:
        self.code = code


class Parser(argparse.ArgumentParser):
    """The parser of one command. elsewhere(flag): the other commands that have this flag."""

    def __init__(self, elsewhere: Callable[[str], Sequence[str]] = lambda flag: (), **settings: Any) -> None:
        width = min(100, columns(80))

        def formatter(prog: str) -> argparse.HelpFormatter:
            return argparse.HelpFormatter(prog, max_help_position=32, width=width)

        super().__init__(allow_abbrev=False, formatter_class=formatter, **settings)
        self._elsewhere = elsewhere

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = tidy(sys.argv[1:] if args is None else args)
        unknown = [] if {"-h", "--help"} & set(words) else self._unknown_flags(words)
        if unknown:
            # Checked first, because argparse would report that a misspelt required flag is missing.
            self.error(" ".join(map(self._not_known, unknown)))
        parsed, left = self.parse_known_args(words, namespace)
        if left:
            self.error(self._left_over(words, left))
        return parsed

    def error(self, message: str) -> NoReturn:
        # "argument --rank/--lora-r: …" names each spelling of the flag; the first one is enough.
        message = re.sub(r"^argument (-[^/: ]+)[^: ]*:", r"\1:", message)
        message = message.replace("ignored explicit argument", "takes no value, found")
        end = "" if message.endswith((".", "?")) else "."
        raise UsageError(f"{message}{end} ({self.prog} --help)")

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        if message:
            print(message, file=sys.stderr)
        raise Exit(status)

    def has(self, flag: str) -> bool:
        return flag in self._option_string_actions

    def _unknown_flags(self, words: Sequence[str]) -> list[str]:
        words = words[: words.index("--")] if "--" in words else words
        flags = (word.partition("=")[0] for word in words if word.startswith("-") and not _is_number(word))
        return [flag for flag in flags if not self.has(flag) and not self.has(flag[:2]) and flag != "-"]

    def _not_known(self, flag: str) -> str:
        others = self._elsewhere(flag)
        if others:
            return f"unknown argument {flag!r}. It is one of lorakit {', '.join(others)}."
        return f"unknown argument {flag!r}.{suggestion(flag, self._option_string_actions)}"

    def _left_over(self, words: Sequence[str], left: Sequence[str]) -> str:
        """The message for words that belong to no flag. Most often they are meant for the flag before them."""
        for flag, values in _runs(words):
            action = self._option_string_actions.get(flag)
            if action is None or not values or left[0] not in values:
                continue
            if action.nargs == 0:
                return f"{flag} takes no value, found {values[0]!r}"
            if action.metavar == "NAMES":
                return f"unexpected {left[0]!r}. Separate names with commas: {flag} {','.join(values)}"
            return f'unexpected {left[0]!r}. A value of several words stands in quotes: {flag} "{" ".join(values)}"'
        # Web pages and word processors turn two hyphens into one dash.
        meant = re.sub("^[–—]", "--", left[0])
        return f"unexpected {left[0]!r}." + (f" Did you mean {meant!r}?" if self.has(meant) else "")


def tidy(words: Sequence[str]) -> list[str]:
    """The words in the spelling that argparse takes.

    `--max_steps 3` becomes `--max-steps 3`, because both spellings are in use. `--lr -1e3` becomes `--lr=-1e3`, because
    argparse would take -1e3 for a flag.
    """
    found: list[str] = []
    for word in words:
        flag, equals, value = word.partition("=")
        if word.startswith("--"):
            word = flag.replace("_", "-") + equals + value
        if _is_number(word) and word.startswith("-") and found and re.fullmatch(r"--?[a-z][a-z-]*", found[-1]):
            found[-1] += f"={word}"
        else:
            found.append(word)
    return found


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _runs(words: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Each flag with the words that follow it, up to the next one."""
    found: list[tuple[str, list[str]]] = []
    for word in words:
        if word.startswith("-") and len(word) > 1:
            flag, equals, value = word.partition("=")
            found.append((flag, [value] if equals else []))
        elif found:
            found[-1][1].append(word)
    return found
