"""`lorakit push`: an adapter's folder as a repository at the hub, without what only this machine understands.

Uploaded are the adapter, what its users need beside it (tokenizer, chat template, classes, style) and the model card.
The rest stays here: settings, logs, the page of the run and checkpoints name paths of this machine, and files that
lorakit does not know may be anything.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import LoraError
from ..core.reading import json_of, text_of
from ..core.words import first_line
from ..formats import peft
from .adapter_folder import adapter_config, check_adapter
from .card import front_matter, hub_card, is_hub_id
from .start import TOKENIZER_FILES

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_CARD = "README.md"
_UPLOADED = rf"adapter_config\.json|adapter_model\.safetensors|labels\.json|style\.json|README\.md|{TOKENIZER_FILES}"


@dataclass(frozen=True)
class Pushed:
    """What was uploaded, and what was not."""

    address: str
    files: tuple[str, ...]
    kept: tuple[str, ...]


def push(folder: str, to: str, *, base: str | None = None, private: bool = False) -> Pushed:
    """Upload the adapter in `folder` to the repository `to`, which is made if it does not exist.

    base: the hub id of the base model, if the folder names a path. Raises LoraError for a name that is no hub id, for a
    base model that only this machine has, without a token, and with what the hub answers.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError

    check_adapter(folder)
    for flag, name in (("--to", to), ("--base-model", base)):
        if name is not None and not is_hub_id(name):
            raise LoraError(f"{flag}: expected a name at the hub such as user/name, found {name!r}.")
    named = str(adapter_config(folder).get("base_model_name_or_path") or "")
    if base is None and not is_hub_id(named):
        where = f"{named}, a path of this machine" if named else "not named in the folder"
        raise LoraError(
            f"{folder}: its base model is {where}, which nobody else can load. Give its name at the hub: "
            f"lorakit push {folder} --to {to} --base-model USER/MODEL"
        )
    token = get_token()
    if token is None:
        raise LoraError(
            "no token for the hub on this machine. Make one that may write at https://huggingface.co/settings/tokens, "
            "then: hf auth login   (or set HF_TOKEN)"
        )
    names = sorted(entry.name for entry in Path(folder).iterdir() if entry.is_file())
    chosen = [name for name in names if re.fullmatch(_UPLOADED, name)]
    with tempfile.TemporaryDirectory() as made:
        for name in chosen:
            shutil.copy(Path(folder) / name, made)
        _make_public(Path(made), named, base or named, to)
        files = sorted({*chosen, _CARD})
        try:
            address = _upload(HfApi(token=token), Path(made), to, private)
        except HfHubHTTPError as error:
            raise LoraError(f"{to}: the hub answers: {first_line(error)}") from None
        except Exception as error:  # each HTTP library has its own error for a missing network
            raise LoraError(f"{to}: the hub is not reached ({first_line(error) or type(error).__name__}).") from None
    return Pushed(address, tuple(files), tuple(name for name in names if name not in files))


def _upload(api: HfApi, folder: Path, to: str, private: bool) -> str:
    address = str(api.create_repo(to, private=private, exist_ok=True))
    api.upload_folder(repo_id=to, folder_path=folder, commit_message="Upload a LoRA adapter with lorakit")
    return address


def _make_public(folder: Path, named: str, base: str, to: str) -> None:
    """Name the base model as the hub does, in the adapter's configuration and in the model card."""
    config: dict[str, Any] = json_of(folder / peft.CONFIG, dict)
    config["base_model_name_or_path"] = base
    (folder / peft.CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    card = folder / _CARD
    text = text_of(card) if card.is_file() else f"{front_matter(base)}\n# LoRA adapter for {base}\n"
    card.write_text(hub_card(text, base, to), encoding="utf-8")
