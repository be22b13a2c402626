"""PEFT's own tests of LoRA, with lorakit's view in the place of PEFT's model.

    python benchmarks/peft_tests.py FOLDER [ARGUMENTS OF PYTEST]

FOLDER holds a copy of PEFT's `tests`, which are in its source distribution (`pip download --no-binary :all: --no-deps
peft`). The tests of `test_custom_models.py` whose configuration is a `LoraConfig`, or that name none, are run with
`peft.get_peft_model` and `PeftModel.from_pretrained` replaced by lorakit's. At the end it prints how many passed, and
the failures by their error. `--peft` as the first argument after FOLDER runs PEFT itself, to compare.
"""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import peft
import pytest
from peft import LoraConfig, PeftModel

import lorakit
from lorakit.view.model import PeftView

FILES = ("test_custom_models.py", "testing_common.py", "testing_utils.py")


class Plugin:
    """Chooses the tests of LoRA, and counts how they end."""

    def __init__(self) -> None:
        self.ends: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        own = [item for item in items if _configuration(item) in (None, LoraConfig)]
        config.hook.pytest_deselected(items=[item for item in items if _configuration(item) not in (None, LoraConfig)])
        items[:] = own

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.ends[report.outcome] += 1
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            line = crash.message.splitlines()[0] if crash and crash.message else "?"
            self.errors[re.sub(r"[\d.]+", "N", line)[:110]] += 1


def _configuration(item: pytest.Item) -> Any:
    return item.callspec.params.get("config_cls") if hasattr(item, "callspec") else None


def replace_peft() -> None:
    """From now on, PEFT's two ways to a model with LoRA lead to lorakit's view."""
    theirs, read = peft.get_peft_model, PeftModel.from_pretrained.__func__

    def get_peft_model(model: Any, config: Any, *more: Any, **settings: Any) -> Any:
        make = lorakit.get_peft_model if isinstance(config, LoraConfig) else theirs
        return make(model, config, *more, **settings)

    def from_pretrained(cls: Any, model: Any, path: Any, *more: Any, **settings: Any) -> Any:
        config = settings.get("config") or peft.PeftConfig.from_pretrained(path)
        if isinstance(config, LoraConfig):
            return PeftView.from_pretrained(model, path, *more, **settings)
        return read(cls, model, path, *more, **settings)

    peft.get_peft_model = get_peft_model
    PeftModel.from_pretrained = classmethod(from_pretrained)


def main(arguments: list[str]) -> int:
    folder, *more = arguments
    if more[:1] == ["--peft"]:
        more = more[1:]
    else:
        replace_peft()
    plugin = Plugin()
    with tempfile.TemporaryDirectory() as place:
        tests = Path(place, "tests")  # a package, as the files import each other
        tests.mkdir()
        (tests / "__init__.py").touch()
        for name in FILES:
            shutil.copy(Path(folder, name), tests)
        options = ["-q", "-p", "no:cacheprovider", "--tb=no", "--no-header", "-r", "", "--rootdir", place, *more]
        status = pytest.main([*options, str(tests / FILES[0])], plugins=[plugin])
    print(", ".join(f"{count} {end}" for end, count in sorted(plugin.ends.items())))
    for error, count in plugin.errors.most_common():
        print(f"{count:5}  {error}")
    return int(status)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
