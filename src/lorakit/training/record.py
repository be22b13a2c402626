"""The record of a run: the settings, data and base model that decide its result.

The note of the output folder and each checkpoint hold the record. A run is resumed only with the settings, data and
model that it began with; otherwise the result would belong to neither run. Settings that only say what is printed and
kept may change, and so may the length of the run.
"""

from __future__ import annotations

import array
import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..core.errors import LoraError
from .config import TrainConfig
from .models import Loaded, best_device, resolve_dtype
from .plan import processes
from .prepare import Prepared, uses_autocast, weights_dtype
from .values import value_text

FREE = {  # settings that do not change what is computed, or of which a message tells
    *("output_dir", "resume", "overwrite", "dry_run", "ignore_memory"),
    *("eval_steps", "save_steps", "logging_steps", "eval_samples", "max_new_tokens", "report_to", "general_data"),
    *("epochs", "max_steps"),  # `longer_or_shorter` tells the user what this changes
    "gradient_checkpointing",  # the same numbers in less memory
    *("model", "data"),  # compared by content, so that they may be moved
}
# These decide when a run ends, and with which adapter, once held-out rows are judged.
_JUDGING = {"eval_steps", "eval_samples", "max_new_tokens"}
_PROBED = 64  # numbers of each weight that go into its fingerprint
_VOLATILE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "pad_token_id")


def run_record(prepared: Prepared) -> dict[str, Any]:
    """The record of a run, without its base model's weights."""
    config, data = prepared.config, prepared.data
    settings = dataclasses.asdict(config)
    settings["auto"] = None if config.auto is None else "a search"  # its budget may change
    settings["dtype"] = str(resolve_dtype(weights_dtype(config, data), best_device())).removeprefix("torch.")
    rows = ({**dataclasses.asdict(example), "where": None} for example in data.train)
    return {
        # As JSON returns it: tuples become lists.
        "settings": json.loads(json.dumps(settings)),
        "autocast": uses_autocast(config, data),
        "processes": processes(),
        "steps": prepared.plan.steps,
        "rows": len(prepared.train),
        "data": _digest(json.dumps(row, sort_keys=True, default=str).encode() for row in rows),
        "tokens": _digest(map(_encoded, prepared.train)),
    }


def base_fingerprint(loaded: Loaded) -> str:
    """A fingerprint of a base model that is not adapted yet: its configuration, names, shapes and some of its weights.

    The values of a randomly initialised head are left out, because the seed decides them.
    """
    config = {name: value for name, value in loaded.model.config.to_dict().items() if name not in _VOLATILE}
    parts = [json.dumps(config, sort_keys=True, default=str).encode()]
    for name, parameter in loaded.model.named_parameters():
        flat = parameter.detach().flatten()
        some = flat[:: max(1, flat.numel() // _PROBED)][:_PROBED].to("cpu", torch.float32)
        values = b"" if name in loaded.new_parameters else some.numpy().tobytes()
        parts.append(f"{name} {tuple(parameter.shape)}".encode() + values)
    return _digest(parts)


def record_of_released(settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """The record of a run of lorakit 0.1.0, which wrote only a config.yaml; None without settings."""
    if not settings:
        return None
    found = dict(settings)
    if found.get("alpha") is None and "rank" in found:
        found["alpha"] = 2.0 * found["rank"]
    return {"settings": found}


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The differences that forbid a run with the record `now` to continue one with the record `then`, a line each."""
    old, new = then["settings"], now["settings"]
    defaults = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    by_content = "data" in then
    judges = (new["metric"], new["patience"], new["keep"]) != ("loss", None, "last")
    free = FREE - _JUDGING if judges else FREE
    lines = []
    for name, value in new.items():
        if name in free and (by_content or name not in ("model", "data")):
            continue
        before = old.get(name, defaults.get(name))
        if name == "dtype" and before == "auto":  # 0.1.0 did not note which one was meant
            continue
        if _plain(before) != _plain(value):
            lines.append(f"--{name.replace('_', '-')}: {value_text(before)} then, {value_text(value)} now")
    for name, said in (("processes", "processes"), ("autocast", "products in bfloat16")):
        if name in then and then[name] != now[name]:
            lines.append(f"{said}: {then[name]} then, {now[name]} now")
    if by_content and then["data"] != now["data"]:
        lines.append(f"the training rows: {then['rows']} rows then, {now['rows']} now, and not the same ones")
    elif by_content and then["tokens"] != now["tokens"] and not lines:
        lines.append("the tokenizer or its chat template: the same rows are other tokens now")
    if "base" in then and "base" in now and then["base"] != now["base"]:
        lines.append(f"the base model {new['model']}: its configuration or its weights are not what they were")
    return lines


def refuse_differences(then: Mapping[str, Any], now: Mapping[str, Any], checkpoint: str | Path) -> None:
    """Raise ValueError listing what differs."""
    if lines := differences(then, now):
        listed = "\n".join(f"  {line}" for line in lines)
        raise LoraError(
            f"--resume: {checkpoint} belongs to a run of other settings:\n{listed}\nNothing was changed. Resume it as "
            f"it was begun, or start over: --overwrite in place of --resume, or another --output-dir."
        )


def longer_or_shorter(then: Mapping[str, Any], now: Mapping[str, Any], step: int) -> list[str]:
    """Lines to print if a run continues to another length than it began with."""
    before, after = then.get("steps"), now["steps"]
    if before is None or before == after:
        return []
    said = f"the run was begun for {before} steps and is now one of {after}"
    if step >= after:
        return [f"{said}: the checkpoint is of step {step}, so nothing more is trained."]
    scheduler = now["settings"]["scheduler"]
    follows = "" if scheduler == "constant" else f"; from here the {scheduler} schedule is that of {after} steps"
    return [f"{said}{follows}."]


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:32]


def _encoded(row: Mapping[str, Any]) -> bytes:
    """The token ids and labels of one encoded row, as bytes."""
    labels = row["labels"]
    tokens = isinstance(labels, list) and not isinstance(
        labels[0], float
    )  # else a class, a number or a multi-label row
    learnt = array.array("q", labels).tobytes() if tokens else repr(labels).encode()
    return array.array("q", row["input_ids"]).tobytes() + b"|" + learnt


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
