"""Write an adapter's folder for a server: the portable form, with the tokenizer that training used."""

from __future__ import annotations

import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

from ..core.adapter import Adapter
from ..formats import peft
from ..formats.folder import OutputFolder, OutputKind
from ..formats.portable import VLLM_RANKS, Target, portable
from .adapter_folder import check_adapter
from .preflight import check_output

EXPORTING = OutputKind("export", keystone=peft.CONFIG)
_TOKENIZER = r"tokenizer.*|chat_template\.jinja|special_tokens_map\.json"


@dataclass(frozen=True)
class Exported:
    """The rank and the scale of all modules, and how many of the modules had others."""

    rank: int
    scale: float
    updates: int
    changed: int
    base_model: str | None


def export(adapter: str, target: Target, output_dir: str, *, overwrite: bool = False) -> Exported:
    """Write the adapter of a folder as `target` reads it.

    Raises LoraError for what it cannot read, before anything is written; FileExistsError for a folder in use.
    """
    folder, out = Path(adapter), OutputFolder(output_dir, EXPORTING)
    check_output(out.path)
    check_adapter(adapter)
    out.refuse_unusable([adapter])
    out.recover()
    out.refuse_others()
    if out.own and not overwrite:
        raise FileExistsError(
            f"--output-dir {out} is not empty: it holds an export. Choose another, or add --overwrite to replace it."
        )
    before = Adapter.load(folder)
    after = portable(before, target)
    with out.held():
        out.refuse_others()
        out.drop_new()  # what an interrupted export left
        try:
            out.new.begin({"adapter": adapter, "target": target})
            with out.new.writing() as part:
                after.save(part)
                for path in sorted(folder.iterdir()):
                    if path.is_file() and re.fullmatch(_TOKENIZER, path.name):
                        shutil.copyfile(path, part / path.name)
            out.put_new_in_place()
        finally:
            out.drop_new()
    one = next(iter(after.updates.values()))
    changed = sum(
        (update.rank, update.alpha, update.rslora) != (one.rank, one.alpha, one.rslora)
        for update in before.updates.values()
    )
    return Exported(one.rank, one.scale, len(after.updates), changed, before.base_model)


def next_command(exported: Exported, target: Target, output_dir: str) -> str:
    """How the target is told to read the folder."""
    base, folder = shlex.quote(exported.base_model or "BASE"), shlex.quote(output_dir)
    named = shlex.quote(f"adapter={output_dir}")
    if target == "vllm":
        limit = next(rank for rank in VLLM_RANKS if rank >= exported.rank)
        return f"vllm serve {base} --enable-lora --max-lora-rank {limit} --lora-modules {named}"
    if target == "sglang":
        return f"python -m sglang.launch_server --model-path {base} --enable-lora --lora-paths {named}"
    return f"python convert_lora_to_gguf.py {folder} --base {base}    # of llama.cpp"
