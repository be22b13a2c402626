"""The program `lorakit`. Each verb is one file, which is imported when it is needed.

Exit codes: 0 done; 1 failed (one message; --debug adds the traceback); 2 error in the command line or in a
configuration file; 130 interrupted; 143 ended by a scheduler.
"""

from __future__ import annotations

import importlib
import sys
import textwrap
from collections.abc import Sequence
from importlib import metadata
from types import ModuleType

from ..core.words import suggestion
from ..training.settings import UsageError
from . import requirements
from .console import lasting_output
from .failures import report
from .parser import Exit, Parser

VERBS = (
    *("train", "generate", "chat", "eval", "merge", "export", "push"),
    *("info", "runs", "compare", "analyze", "check", "init"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    verb = words[0] if words and words[0] in VERBS else ""
    with lasting_output():
        try:
            code = _run(words)
            sys.stdout.flush()  # fails here if the output cannot be written
            return code
        except Exit as exit:
            return exit.code
        except (Exception, KeyboardInterrupt) as error:
            return report(error, verb, debug=debug)


def _run(words: list[str]) -> int:
    if words[:1] == ["help"]:
        words = [*words[1:2], "--help"]
    if not words or words[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if words[0] in ("-V", "--version"):
        print(f"lorakit {metadata.version('lorakit')}")
        return 0
    verb = words[0]
    if verb.startswith("-"):
        named = next((word for word in words if word in VERBS), "COMMAND")
        raise UsageError(f"{verb}: a command comes first: lorakit {named} {verb} …")
    if verb not in VERBS:
        raise UsageError(f"unknown command {verb!r}.{suggestion(verb, VERBS)} (lorakit --help lists them)")
    module = _module(verb)
    args = _parser(verb).parse_args(words[1:])
    if extra := getattr(module, "EXTRA", "train"):
        requirements.check_packages(extra)
    return module.run(args) or 0


def _module(verb: str) -> ModuleType:
    return importlib.import_module(f".{verb}", __package__)


def _parser(verb: str) -> Parser:
    module = _module(verb)
    many = {
        "train": "[options]",
        "check": "[options]",
        "compare": "[FILE] [options]",
    }  # too many options for the usage line
    usage = f"lorakit {verb} {many[verb]}" if verb in many else None

    def elsewhere(flag: str) -> list[str]:
        return [other for other in VERBS if other != verb and _parser(other).has(flag)]

    parser = Parser(
        elsewhere, prog=f"lorakit {verb}", usage=usage, description=module.HELP[0].upper() + module.HELP[1:] + "."
    )
    parser.add_argument("--debug", action="store_true", help="show where an error came from")
    module.add_arguments(parser)
    return parser


def _overview() -> str:
    lines = [
        "usage: lorakit COMMAND [options]",
        "",
        "LoRA adapters: train, try, check, merge, compare.",
        "",
        "commands:",
    ]
    for verb in VERBS:
        lines.append(textwrap.fill(f"  {verb:<10}{_module(verb).HELP}", 80, subsequent_indent=12 * " "))
    lines += [
        "",
        "options:",
        "  --help, --version, --debug",
        "",
        "lorakit COMMAND --help says more.",
        "A first run: lorakit init, then lorakit train --config lora.yaml",
    ]
    return "\n".join(lines)
