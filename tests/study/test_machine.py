"""The origin in a table: the commit of the source, and whether the source differs from it."""

import subprocess
from pathlib import Path

import pytest
import torch

from lorakit.study import machine as module
from lorakit.study.machine import commit, machine, release


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with a source and a result, which lorakit treats as its own."""
    for name in ("src/code.py", "results/runs.jsonl"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("one\n")
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", "--all")
    git(tmp_path, "-c", "user.name=n", "-c", "user.email=e", "commit", "--quiet", "--message=all")
    monkeypatch.setattr(module, "_ROOT", tmp_path)
    return tmp_path


def git(folder: Path, *words: str) -> str:
    return subprocess.run(["git", "-C", str(folder), *words], check=True, capture_output=True, text=True).stdout.strip()


def test_the_commit_of_an_unchanged_source_is_said_while_its_results_are_written(repository: Path) -> None:
    (repository / "results" / "runs.jsonl").write_text("two\n")
    (repository / "results" / "new.json").write_text("new\n")
    assert commit() == git(repository, "log", "-1", "--format=%h")
    assert release().endswith(f" at {commit()}")


@pytest.mark.parametrize("file", ["src/code.py", "src/new.py"])
def test_a_changed_source_is_said(repository: Path, file: str) -> None:
    (repository / file).write_text("two\n")
    assert commit() == git(repository, "log", "-1", "--format=%h") + " with changes"


def test_outside_a_repository_there_is_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ROOT", tmp_path)
    assert commit() is None
    assert " at " not in release()


def test_without_git_there_is_no_commit(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert commit() is None


def test_the_machine_is_told_by_its_processor_and_threads() -> None:
    found = machine()
    assert found["processor"].strip() and found["threads"] == str(torch.get_num_threads())
    assert found["torch"] == torch.__version__
