"""Output folders: what a command did not write stays, and an exchange of folders is complete after any interruption."""

import contextlib
import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lorakit.formats.files import naming, replacing
from lorakit.formats.folder import HIDDEN, OutputFolder, OutputKind

CAKE = OutputKind("bake", keystone="key", names=r"crumbs")


def filled(path: Path, **files: str) -> OutputFolder:
    folder = OutputFolder(path, CAKE)
    with folder.held():
        folder.begin({})
        with folder.writing() as part:
            for name, text in files.items():
                (part / name).write_text(text)
        folder.end("finished")
    return folder


def seen(path: Path) -> dict[str, str]:
    return {entry.name: entry.read_text() for entry in path.iterdir() if entry.is_file()}


def test_files_of_its_own_and_others(tmp_path: Path) -> None:
    folder = filled(tmp_path / "out", key="k", cake="c")
    assert folder.own == ["cake", "key"] and folder.others == []
    folder.refuse_others()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    (tmp_path / "out" / ".DS_Store").write_text("the system's")
    (tmp_path / "out" / "crumbs").write_text("the command's by its name")
    assert folder.own == ["cake", "crumbs", "key"] and folder.others == ["notes.txt"]
    with pytest.raises(FileExistsError, match="holds notes.txt, which lorakit bake did not write. Nothing was changed"):
        folder.refuse_others()
    with pytest.raises(FileExistsError, match="notes.txt was not written by lorakit bake and is not replaced"):
        folder.add("notes.txt")
    folder.clear()
    assert seen(tmp_path / "out") == {"notes.txt": "mine", ".DS_Store": "the system's"}


def test_another_command_sees_what_is_not_its_own(tmp_path: Path) -> None:
    filled(tmp_path / "out", cake="c")
    other = OutputFolder(tmp_path / "out", OutputKind("fry"))
    assert other.note is None and other.own == []
    with pytest.raises(
        FileExistsError, match=r"holds cake, which lorakit fry did not write \(lorakit bake has written"
    ):
        other.refuse_others()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"files": 3}', '{"files": [], "state": "finished"}'])
def test_a_note_that_cannot_be_read_is_said(text: str, tmp_path: Path) -> None:
    folder = filled(tmp_path / "out", cake="c")
    (tmp_path / "out" / HIDDEN / "bake.json").write_text(text)
    with pytest.raises(ValueError, match="bake.json is not a note of lorakit"):
        folder.refuse_others()
    assert seen(tmp_path / "out") == {"cake": "c"}


@pytest.mark.parametrize("holds", ["the folder", "a folder in it"])
def test_a_folder_that_is_read_is_no_output_folder(holds: str, tmp_path: Path) -> None:
    folder = filled(tmp_path / "out", cake="c")
    given = tmp_path / "out" if holds == "the folder" else tmp_path / "out" / "base"
    given.mkdir(exist_ok=True)
    with pytest.raises(FileExistsError, match="which this command reads"):
        folder.refuse_unusable([given])
    (tmp_path / "link").symlink_to(given)
    with pytest.raises(FileExistsError, match="which this command reads"):
        folder.refuse_unusable([tmp_path / "link"])
    folder.refuse_unusable([tmp_path, "some/hub-id"])  # a folder inside an input folder is allowed


def test_nothing_is_left_where_nothing_was_written(tmp_path: Path) -> None:
    folder = OutputFolder(tmp_path / "a" / "b", CAKE)
    with folder.held():
        assert folder.path.is_dir()
    with pytest.raises(ValueError, match="burnt"), folder.held(), folder.writing() as part:
        (part / "cake").write_text("half")
        raise ValueError("burnt")
    assert [*tmp_path.iterdir()] == []


def test_a_command_that_fails_leaves_the_files_as_they_were(tmp_path: Path) -> None:
    folder = filled(tmp_path / "out", key="k", cake="c")
    with pytest.raises(ValueError, match="burnt"), folder.held(), folder.writing() as part:
        (part / "cake").write_text("half")
        raise ValueError("burnt")
    assert seen(tmp_path / "out") == {"key": "k", "cake": "c"}
    assert [entry.name for entry in (tmp_path / "out" / HIDDEN).iterdir()] == ["bake.json"]


def test_a_folder_is_locked_while_it_is_written(tmp_path: Path) -> None:
    one, other = (OutputFolder(tmp_path / "out", kind) for kind in (CAKE, OutputKind("fry")))
    with one.held():
        for attempt in (other.refuse_unusable, other.held().__enter__):
            with pytest.raises(
                FileExistsError, match=rf"out is in use: process {os.getpid()} of lorakit writes into it"
            ):
                attempt()
    other.refuse_unusable()
    with other.held():
        pass


HOLDING = """
import sys, time
from lorakit.formats.folder import OutputKind, OutputFolder
with OutputFolder(sys.argv[1], OutputKind("bake", keystone="key", names=r"crumbs")).held():
    print("held", flush=True)
    time.sleep(100)
"""


def test_a_lock_dies_with_its_process(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDING, str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    folder = OutputFolder(tmp_path / "out", CAKE)
    with pytest.raises(FileExistsError, match=f"process {process.pid} of lorakit"):
        folder.refuse_unusable()
    process.kill()
    process.communicate()
    folder.refuse_unusable()
    with folder.held():
        pass
    assert not (tmp_path / "out").exists() or not (tmp_path / "out" / HIDDEN / "lock").exists()


class Killed(BaseException):
    """Simulates the end of a process: nothing changes its files after it."""


_CHANGES: list[str] = []  # changes of the file system while it is watched
_LAST = [0]  # the number of the change that does not happen; 0: not watching


def _watch(event: str, args: tuple[object, ...]) -> None:
    if _LAST[0] and event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"):
        _CHANGES.append(f"{event} {args[0]}")
        if len(_CHANGES) >= _LAST[0]:
            raise Killed


@pytest.fixture(scope="module")
def watched() -> None:
    sys.addaudithook(_watch)  # it cannot be removed again


@contextlib.contextmanager
def killed_at(moment: int) -> Iterator[None]:
    """Ends the block before file-system change number `moment`; later changes do not happen."""
    _CHANGES.clear()
    _LAST[0] = moment
    try:
        with contextlib.suppress(Killed):
            yield
    finally:
        _LAST[0] = 0


def test_a_new_folder_takes_the_old_ones_place_whole_however_often_it_is_interrupted(
    tmp_path: Path, watched: None
) -> None:
    """Interrupted at each change of the exchange, and again during its repair."""
    old, new = {"key": "k1", "cake": "c1", "candles": "n1"}, {"key": "k2", "cake": "c2", "icing": "i2"}
    for moment in range(1, 100):
        path = tmp_path / f"{moment}"
        folder = filled(path, **old)
        with folder.held():
            folder.new.begin({"cake": 2})
            with folder.new.writing() as part:
                for name, text in new.items():
                    (part / name).write_text(text)
            whole = False
            with killed_at(moment):
                folder.put_new_in_place()
                whole = True
        found = seen(path)
        assert "key" not in found or found in (old, new)  # all of one, or all of the other
        if whole:
            break
        if folder.new.note is not None and folder.new.note.state == "unfinished":
            assert found == old
            continue
        for again in (3, 5):
            with killed_at(again):
                folder.recover()
            found = seen(path)
            assert "key" not in found or found in (old, new)
        with folder.held():
            assert seen(path) == new
        assert folder.note is not None and folder.note.record == {"cake": 2} and folder.note.state == "finished"
        assert sorted(os.listdir(path / HIDDEN)) == ["bake.json"]
    assert moment > 8


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("unexpected pos 54464 vs 54352"),
        RuntimeError("[enforce fail at inline_container.cc:671] . PytorchStreamWriter failed writing file data/0"),
        Exception("No space left on device (os error 28)"),
    ],
    ids=str,
)
def test_a_write_that_fails_names_the_file(error: Exception, tmp_path: Path) -> None:
    said = rf"{tmp_path / 'f'} could not be written: .*MB are free there"
    with pytest.raises(OSError, match=said), replacing(tmp_path / "f") as path:
        path.write_text("half")
        raise error
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("error", [ValueError("a"), RuntimeError("b"), FileNotFoundError(2, "c", "name")], ids=str)
def test_other_errors_stay_what_they_are(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(type(error)) as caught, naming(tmp_path):
        raise error
    assert caught.value is error


@pytest.mark.skipif(sys.platform == "win32", reason="no limit on the size of files")
def test_a_full_disk(tmp_path: Path) -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    folder = filled(tmp_path / "out", key="k")
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(OSError, match="out could not be written: File too large"), folder.writing() as part:
            (part / "cake").write_bytes(bytes(100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert seen(tmp_path / "out") == {"key": "k"}
    assert json.loads((tmp_path / "out" / HIDDEN / "bake.json").read_text())["files"] == ["key"]
