"""The form of an adapter that every server reads alike, and what each of them cannot read at all.

PEFT computes s of each module from `rank_pattern`, `alpha_pattern` and `use_rslora`. Others know only a part of these:

    vLLM        s = α/r or α/√r of the whole adapter (vllm/lora/peft_helper.py)
    SGLang      s = α/r of the whole adapter (python/sglang/srt/lora/lora.py)
    llama.cpp   s = α of the whole adapter by the rank of each pair (convert_lora_to_gguf.py)

With one rank r and one α for all modules, and s = α/r, all four are the same number. `portable` makes that of any
adapter of matrices, exactly: smaller ranks are filled up with zeros, and what remains of a scale goes into B.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Literal

import torch

from ..core.adapter import Adapter, Update
from ..core.errors import LoraError
from ..core.layouts import Layout, Lookup, Matrix

Target = Literal["vllm", "sglang", "llama.cpp"]
_NAMES: dict[Target, str] = {"vllm": "vLLM", "sglang": "SGLang", "llama.cpp": "llama.cpp's converter"}
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what its --max-lora-rank may be


def portable(adapter: Adapter, target: Target) -> Adapter:
    """The same ΔW with one rank, one alpha and the scale α/r in every module.

    Raises LoraError that lists all that `target` cannot read, and says what to do in place of it.
    """
    updates = {name: update.simplest() for name, update in adapter.updates.items()}
    if problems := _problems(dataclasses.replace(adapter, updates=updates), target):
        listed = "\n".join(f"  {problem}" for problem in problems)
        raise LoraError(f"{_NAMES[target]} cannot read this adapter:\n{listed}")
    rank = max(update.rank for update in updates.values())
    scale = Counter(update.scale for update in updates.values()).most_common(1)[0][0]
    same = {name: _filled(update, rank, scale) for name, update in updates.items()}
    return dataclasses.replace(adapter, updates=same, dropout=0.0)


def _filled(update: Update, rank: int, scale: float) -> Update:
    """The same ΔW with this rank and this scale. A (r, in) and B (out, r); an embedding's are alike."""
    A, B = update.A, update.B
    if update.scale != scale:
        B = B * (update.scale / scale)
    if missing := rank - update.rank:
        A = torch.cat([A, A.new_zeros(missing, A.shape[1])])
        B = torch.cat([B, B.new_zeros(B.shape[0], missing)], 1)
    return dataclasses.replace(update, A=A, B=B, rank=rank, alpha=scale * rank, rslora=False)


def _problems(adapter: Adapter, target: Target) -> list[str]:
    """What the target cannot read, a line each."""

    def named(holds: Callable[[Update], bool]) -> str:
        names = [name for name, update in adapter.updates.items() if holds(update)]
        return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

    readable: tuple[type[Layout], ...] = (Matrix,) if target == "sglang" else (Matrix, Lookup)
    merge = "merge it into the base: lorakit merge"
    problems = []
    if names := named(lambda update: update.magnitude is not None):
        problems.append(f"DoRA ({names}): {merge}")
    if names := named(lambda update: update.kind == "experts"):
        problems.append(
            f"stacked matrices of experts ({names}): write them one by one, lorakit.save(model, folder, "
            'experts="per-expert"), and export that folder'
        )
    if names := named(lambda update: not isinstance(update.layout, readable) and update.kind != "experts"):
        problems.append(f"updates of other layers than {_NAMES[target]} adapts ({names}): {merge}")
    if adapter.trained:
        names = ", ".join(sorted(adapter.trained)[:3]) + (" …" if len(adapter.trained) > 3 else "")
        problems.append(f"tensors that were trained whole ({names}): {merge}")
    if adapter.token_rows:
        problems.append(f"rows of token tables that were trained ({', '.join(adapter.token_rows)}): {merge}")
    rank = max((update.rank for update in adapter.updates.values()), default=0)
    if target == "vllm" and rank > VLLM_RANKS[-1]:
        problems.append(f"rank {rank}, and its largest is {VLLM_RANKS[-1]}: {merge}")
    if not adapter.updates:
        problems.append("it has no update of a matrix")
    return problems
