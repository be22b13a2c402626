"""Names that are not on this machine: whether the hub has a model or a data set of that name.

The hub is asked once, with a time limit of a few seconds. The libraries that download would ask for each file in turn,
and again for each file that fails.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.reading import missing
from ..core.words import first_line, nearest, suggestion

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_HUB = "https://huggingface.co/"
_SECONDS = 10  # to wait for the hub's answer


@dataclass(frozen=True)
class HubKind:
    """A kind of thing that a name may stand for, on this machine or at the hub."""

    word: str  # its name in errors
    place: str  # what holds one on this machine, for errors
    address: str  # the part of its hub address between the host and the id
    is_one: Callable[[Path], bool]  # whether an existing path is one
    is_file: Callable[[Path], bool]  # whether a name can only be a file's
    is_cached: Callable[[str], bool]  # whether this machine has an earlier copy of an id
    ask: Callable[[HfApi, str, float], object]  # asks the hub for an id, with a time limit in seconds


def id_at_hub(name: str, kind: HubKind) -> str:
    """The hub's id for `name`. The caller knows that nothing exists at the path `name`.

    Raises FileNotFoundError if `name` cannot be an id (with a suggestion of what was meant), if the hub does not have
    it, and if the hub does not answer.
    """
    if name.startswith(_HUB):  # an address from a browser always means the hub
        name = "/".join(name.removeprefix(_HUB + kind.address).split("/")[:2])
        _ask(name, kind, "")
        return name
    path = Path(name)
    if _is_path(name, path, kind):
        raise FileNotFoundError(f"no {kind.word} at {missing(path)}")
    if not kind.is_cached(name):
        if near := _near(path, kind):
            raise FileNotFoundError(
                f"no {kind.word} at {name}.{near} For the hub's {kind.word} of that name: {_HUB}{kind.address}{name}"
            )
        _ask(name, kind, suggestion(path.name, [entry.name for entry in _entries(path.parent)]))
    return name


def _is_path(name: str, path: Path, kind: HubKind) -> bool:
    """Whether a name that does not exist here cannot be a hub id, or is clearly not meant as one."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # not in any __all__

    if path.is_absolute() or name.startswith((".", "~")) or name.endswith("/") or "\\" in name:
        return True
    if kind.is_file(path) or (len(path.parts) > 1 and Path(path.parts[0]).is_dir()):
        return True
    try:
        validate_repo_id(name)
    except HFValidationError:
        return True
    return False


def _near(path: Path, kind: HubKind) -> str:
    """The hint "Did you mean …?" if something here has a similar name; otherwise empty."""
    parents = [path.parent]
    if not path.parent.is_dir():
        parents = [own for own in _entries(Path()) if own.is_dir() and nearest(path.parent.name, [own.name])]
    found = [str(entry) for parent in parents for entry in _entries(parent) if kind.is_one(entry)]
    return suggestion(str(path), found, cutoff=0.8)


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _ask(name: str, kind: HubKind, hint: str) -> None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    nothing = f"no {kind.place} {name!r} here"
    try:
        kind.ask(HfApi(), name, _SECONDS)
    except GatedRepoError:
        raise FileNotFoundError(
            f"{name}: the hub asks for a login and for consent to its terms: {_HUB}{kind.address}{name}"
        ) from None
    except RepositoryNotFoundError:
        raise FileNotFoundError(f"{nothing}, and the hub has no such {kind.word}.{hint}") from None
    except HfHubHTTPError as error:
        raise FileNotFoundError(f"{nothing}, and the hub answers: {first_line(error)}{hint}") from None
    except Exception as error:  # each HTTP library has its own error for a missing network
        why = first_line(error) or type(error).__name__
        raise FileNotFoundError(f"{nothing}, and the hub is not reached ({why}).{hint}") from None
