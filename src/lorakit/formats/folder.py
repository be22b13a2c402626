"""Output folders: a command removes and replaces what it wrote itself, and nothing else.

In each folder that a command writes, `.lorakit/COMMAND.json` notes the names of its own files. If anything else is
there (a user's file, a base model, an adapter, another command's output), the folder is refused, and the message names
it.

    OUT/.lorakit/train.json     the note: the names, how far the command came, what it was asked to do
    OUT/.lorakit/lock           held while a command writes; it ends with its process
    OUT/.lorakit/part/          files being written; each is complete before it appears under its name in OUT
    OUT/.lorakit/new/           a folder like OUT, where a new run grows beside the old one until it is whole

The new folder takes the old one's place in a fixed order, so that the next command can complete it after an
interruption at any point, and the old adapter never lies beside the new settings. First the new note says "finished".
Then all old files are removed. Then all new ones are moved in, and the one that makes the folder usable
(`OutputKind.keystone`) is the last.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..core.errors import LoraError
from .files import naming, remove, replacing, sync
from .lock import locked, refuse_locked

HIDDEN = ".lorakit"
_LITTER = {".DS_Store", "Thumbs.db", "desktop.ini", "lost+found"}  # what operating systems put into any folder
_SHOWN = 5  # names in a message

State = Literal["unfinished", "finished", "failed"]


@dataclass(frozen=True)
class OutputKind:
    """The folders of one command.

    keystone: the file that makes the folder a result. names: a pattern of names that belong to this command in its own
    folder even if they are not noted. released: whether lorakit 0.1.0, which left no note, wrote the folder with this
    command. released_names: a pattern of the other names that it wrote there.
    """

    command: str
    keystone: str = ""
    names: str = ""
    released: Callable[[Path], bool] = lambda path: False
    released_names: str = ""


@dataclass(frozen=True)
class Note:
    """What a command notes about its own folder.

    state "finished": the folder is complete. "failed": the command ended with nothing worth keeping. record: what it
    was asked to do.
    """

    files: frozenset[str] = frozenset()
    state: State = "unfinished"
    record: dict[str, Any] = field(default_factory=dict)


class OutputFolder:
    """A folder that a command writes into; it need not exist yet."""

    def __init__(self, path: str | Path, kind: OutputKind) -> None:
        self.path, self.kind = Path(path), kind
        self.hidden = self.path / HIDDEN
        self._note_path = self.hidden / f"{kind.command}.json"

    def __str__(self) -> str:
        return str(self.path)

    # --- what is there ---------------------------------------------------------------------------------------------

    @property
    def note(self) -> Note | None:
        """The note, or None if this command has written nothing. Raises LoraError for a note that cannot be read."""
        try:
            said = json.loads(self._note_path.read_text(encoding="utf-8"))
            return Note(frozenset(said["files"]), said["state"], said["record"])
        except FileNotFoundError:
            if self.path.is_dir() and self.kind.released(self.path):
                return Note(frozenset(name for name in self._names() if re.fullmatch(self.kind.released_names, name)))
            return None
        except NotADirectoryError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise LoraError(f"{self._note_path} is not a note of lorakit ({error}). Choose another folder.") from None

    @property
    def own(self) -> list[str]:
        """The names in the folder that this command wrote."""
        note = self.note
        if note is None:
            return []
        return sorted(name for name in self._names() if name in note.files or re.fullmatch(self.kind.names, name))

    @property
    def others(self) -> list[str]:
        """The names in the folder that this command did not write."""
        return sorted(set(self._names()) - set(self.own))

    @property
    def new(self) -> OutputFolder:
        """The folder in which a new run grows beside the old one. It exists until it takes the old one's place."""
        return OutputFolder(self.hidden / "new", self.kind)

    def refuse_unusable(self, inputs: Collection[str | Path] = ()) -> None:
        """Raise FileExistsError if a process is writing here, or if the command reads from here.

        inputs: paths that the command reads; a folder that holds one of them is never an output folder.
        """
        here = self.path.resolve()
        for given in map(Path, inputs):
            if given.exists() and given.resolve().is_relative_to(here) and given.resolve().is_dir():
                raise FileExistsError(
                    f"--output-dir {self} holds {given}, which this command reads. Choose another --output-dir."
                )
        refuse_locked(self.hidden / "lock")

    def refuse_others(self) -> None:
        """Raise FileExistsError naming what the command did not write."""
        if found := self.others:
            shown = ", ".join(found[:_SHOWN]) + (f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else "")
            by = self._other_commands()
            wrote = f" (lorakit {' and '.join(by)} has written here)" if by else ""
            raise FileExistsError(
                f"--output-dir {self} is not empty: it holds {shown}, which lorakit {self.kind.command} did not "
                f"write{wrote}. Nothing was changed. Choose another --output-dir, or move that away."
            )

    def refuse_taken(self, names: Collection[str]) -> None:
        """Raise FileExistsError if one of `names` is there already and this command did not write it."""
        if taken := sorted(set(names) & set(self.others)):
            raise FileExistsError(
                f"{self.path / taken[0]} was not written by lorakit {self.kind.command} and is not replaced. "
                "Choose another --output-dir, or move it away."
            )

    # --- writing ---------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Make the folder and hold its lock. First, what an interrupted command left half done is put in order.

        At the end, a new folder in which nothing was written is removed. Raises FileExistsError if it is in use.
        """
        made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        self.hidden.mkdir(parents=True, exist_ok=True)
        try:
            with locked(self.hidden / "lock"):
                self._recover()
                yield
        finally:
            for folder in (self.hidden, *made):
                with contextlib.suppress(OSError):  # it is not empty
                    folder.rmdir()

    def recover(self) -> None:
        """Put in order what an interruption left, if anything."""
        if self.new.path.is_dir() and self.new.note is not None and self.new.note.state == "finished":
            with self.held():
                pass

    def begin(self, record: dict[str, Any]) -> None:
        """Note what the command is asked to do. The names that it wrote before remain its own."""
        self.hidden.mkdir(parents=True, exist_ok=True)
        note = self.note
        self._write(Note(note.files if note else frozenset(), "unfinished", record))

    def add(self, *names: str) -> None:
        """Note names before they appear."""
        self.refuse_taken(names)
        note = self.note or Note()
        if not note.files.issuperset(names):
            self._write(dataclasses.replace(note, files=note.files | set(names)))

    def end(self, state: State) -> None:
        """Note how the command ended, and which of its names are there."""
        self._write(dataclasses.replace(self.note or Note(), state=state, files=frozenset(self.own)))

    @contextlib.contextmanager
    def writing(self, name: str = "part") -> Iterator[Path]:
        """A folder to write into. Its files move to their places if the block succeeds, and are removed if it fails.

        Files are replaced one by one. If the keystone is among them, all their old versions are removed first.
        """
        part = self.hidden / name
        remove(part)
        part.mkdir(parents=True)
        try:
            with naming(self.path):
                yield part
                sync(part)
                self._move_in(part)
        finally:
            shutil.rmtree(part, ignore_errors=True)

    def clear(self) -> None:
        """Remove all that the command wrote."""
        for name in sorted(self.own, key=lambda name: name != self.kind.keystone):
            remove(self.path / name)
        self._note_path.unlink(missing_ok=True)

    def drop_new(self) -> None:
        """Remove the new folder, unless it is whole and about to take the old one's place."""
        note = self.new.note
        if note is None or note.state != "finished":
            remove(self.new.path)

    def put_new_in_place(self) -> None:
        """Mark the new folder as whole and let it take the old one's place."""
        self.new.end("finished")
        self._recover()

    def _recover(self) -> None:
        for name in ("part", "saving", "gone"):
            shutil.rmtree(self.hidden / name, ignore_errors=True)
        for half in self.hidden.glob(".*.tmp"):  # of a note that was being written; we hold the lock
            half.unlink(missing_ok=True)
        new, note = self.new, self.new.note if self.new.path.is_dir() else None
        if note is None:
            shutil.rmtree(new.path, ignore_errors=True)  # what is left after its files were moved
        if note is None or note.state != "finished":
            return
        for name in sorted(self.own, key=lambda name: name != self.kind.keystone):
            # A name of the new note that is no longer in the new folder was moved before, so it is not an old file.
            if name not in note.files or (new.path / name).exists():
                remove(self.path / name)
        old = self.note or Note()
        self._write(dataclasses.replace(old, files=old.files | note.files, state="unfinished"))
        for name in sorted(new.own, key=lambda name: name == self.kind.keystone):
            os.replace(new.path / name, self.path / name)
        self._write(note)
        shutil.rmtree(new.path)

    def _move_in(self, part: Path) -> None:
        names = sorted((entry.name for entry in part.iterdir()), key=lambda name: (name == self.kind.keystone, name))
        self.add(*names)
        if self.kind.keystone in names:
            for name in reversed(names):
                remove(self.path / name)
        for name in names:
            target = self.path / name
            if target.is_dir():
                os.replace(target, part / f"{name}.old")
            os.replace(part / name, target)

    def _write(self, note: Note) -> None:
        said = {"files": sorted(note.files), "state": note.state, "record": note.record}
        with replacing(self._note_path) as path:
            path.write_text(json.dumps(said, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
            sync(path)

    def _names(self) -> list[str]:
        if not self.path.is_dir():
            return []
        return [entry.name for entry in self.path.iterdir() if entry.name not in {HIDDEN, *_LITTER}]

    def _other_commands(self) -> list[str]:
        found = self.hidden.glob("*.json") if self.hidden.is_dir() else ()
        return sorted(path.stem for path in found if path != self._note_path)
