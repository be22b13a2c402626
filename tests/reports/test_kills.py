"""A training run that is killed at any change of its files leaves nothing incomplete and resumes bit for bit."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="os.fork")
@pytest.mark.parametrize(("which", "moments"), [("fresh", 20), ("over", 10)])
def test_kill_9_while_files_are_written(which: str, moments: int, tiny_lm: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_lm, tmp_path / "lm")
    for name, answer in (("old", "on"), ("new", "off")):
        rows = [{"prompt": f"turn {i}", "completion": f"{answer} {i % 3}"} for i in range(8)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, str(Path(__file__).with_name("kills.py")), str(tmp_path), which, str(moments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith(f"{moments} of ")
