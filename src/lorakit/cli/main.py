"""The program `lorakit`: one verb a file, each imported when it is asked for.

Exit codes: 0 done, 1 it failed (one message, no traceback; --debug shows it), 2 the command line or a configuration
file was not understood, 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any, NoReturn

from ..core.words import suggestion
from ..training.settings import UsageError

VERBS = ("train", "generate", "chat", "eval", "merge", "info", "compare", "analyze", "check", "init")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    try:
        return _run(words)
    except _Exit as exit:
        return exit.code
    except UsageError as error:
        verb = words[0] if words and words[0] in VERBS else ""
        print(f"lorakit {verb}".rstrip() + f": {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output has gone (| head): not a failure. Python would complain again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if debug:
            traceback.print_exc()
        else:
            print(f"error: {_message(error)}", file=sys.stderr)
        return 1


def _run(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if words[0] in ("-V", "--version"):
        print(f"lorakit {version('lorakit')}")
        return 0
    verb = words[0]
    if verb not in VERBS:
        raise UsageError(f"unknown command {verb!r}.{suggestion(verb, VERBS)} (lorakit --help lists them)")
    module = importlib.import_module(f".{verb}", __package__)
    many = {"train": "[options]", "check": "[options]", "compare": "[FILE] [options]"}  # too many to list twice
    usage = f"lorakit {verb} {many[verb]}" if verb in many else None
    parser = _Parser(prog=f"lorakit {verb}", usage=usage, description=module.HELP[0].upper() + module.HELP[1:] + ".")
    parser.add_argument("--debug", action="store_true", help="show where an error came from")
    module.add_arguments(parser)
    return module.run(parser.parse_args(_kebab_flags(words[1:]))) or 0


def _overview() -> str:
    lines = [
        "usage: lorakit COMMAND [options]",
        "",
        "LoRA adapters: train, try, check, merge, compare.",
        "",
        "commands:",
    ]
    for verb in VERBS:
        lines.append(f"  {verb:<10}{importlib.import_module(f'.{verb}', __package__).HELP}")
    lines += [
        "",
        "options:",
        "  --help, --version, --debug",
        "",
        "lorakit COMMAND --help says more. A first run: lorakit init, then lorakit train --config lora.yaml",
    ]
    return "\n".join(lines)


class _Exit(Exception):
    """The end that argparse asks for, as a value instead of a SystemExit."""

    def __init__(self, code: int) -> None:
        self.code = code


class _Parser(argparse.ArgumentParser):
    """argparse with errors of one line, suggestions for misspelt flags, and no guessing of abbreviations."""

    def __init__(self, **settings: Any) -> None:
        def formatter(prog: str) -> argparse.HelpFormatter:
            return argparse.HelpFormatter(prog, max_help_position=32, width=100)

        super().__init__(allow_abbrev=False, formatter_class=formatter, **settings)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            word = unknown[0].partition("=")[0]
            self.error(f"unknown argument {word!r}.{suggestion(word, self._option_string_actions)}")
        return parsed

    def error(self, message: str) -> NoReturn:
        end = "" if message.endswith((".", "?")) else "."
        raise UsageError(f"{message}{end} ({self.prog} --help)")

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        if message:
            print(message, file=sys.stderr)
        raise _Exit(status)


def _kebab_flags(words: list[str]) -> list[str]:
    """--max_steps=3 as --max-steps=3: both spellings are in use."""
    tidy = []
    for word in words:
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            word = flag.replace("_", "-") + equals + value
        tidy.append(word)
    return tidy


def _message(error: Exception) -> str:
    if isinstance(error, ImportError) and not str(error.name or "").startswith("lorakit"):
        if str(error.name).partition(".")[0] in ("sacrebleu", "rouge_score", "sklearn", "scipy"):
            return f'{error}. Scores need more packages: pip install "lorakit[study]"'
        return f'{error}. Training needs more packages: pip install "lorakit[train]"'
    if isinstance(error, FileNotFoundError) and error.filename is not None:
        return f"{error.filename}: no such file or folder."
    if isinstance(error, ValueError | OSError | FloatingPointError) and str(error):
        return str(error)
    return f"{type(error).__name__}: {error} (--debug shows where)"
