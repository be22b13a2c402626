"""From a data file to a checked adapter: check, train, compare, write.

Everything that can be wrong with the data or the settings is found before a weight is loaded, and nothing is written
before that. What the output folder holds is listed in docs/design.md.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..formats import save
from ..formats.files import replacing
from . import page, report
from .config import TrainConfig
from .evaluate import compare
from .loss import check_causal
from .memory import keep_few_kernels
from .models import LABELS, Loaded, load_causal_lm, load_classifier
from .prepare import Prepared, attach_as, labels_of, prepare, start_block, uses_autocast, weights_dtype
from .settings import to_yaml

if TYPE_CHECKING:
    from .trainers import Progress


def train(config: TrainConfig) -> Path:
    """Train an adapter as `config` says and return the output folder.

    Prints the start block, progress, and at the end the base model and the adapter side by side on held-out rows.
    Raises what `prepare` raises; FileExistsError for an output folder in use; FloatingPointError when the loss is no
    number. Runs under torchrun and `accelerate launch`, where the first process alone prints and writes.
    """
    out = Path(config.output_dir)
    resume = _checkpoint_to_resume(config, out)
    _refuse_used_folder(config, out, resume)
    quiet_libraries()
    keep_few_kernels()
    prepared = prepare(config)
    _say(start_block(prepared))
    if config.dry_run:
        return out

    torch.manual_seed(config.seed)
    loaded = _load(prepared)
    if prepared.data.task == "causal-lm":
        check_causal(loaded.model)
    attach_as(config, loaded.model, new_head=prepared.data.task != "causal-lm")
    if _is_main():
        _write_settings(prepared, loaded, out)
    progress = _fit(prepared, loaded, out, resume)
    if not _is_main():
        return out
    save(loaded.model, out)
    split, examples = prepared.data.heldout
    result = None
    if examples:
        result = compare(
            loaded,
            prepared.data,
            split,
            examples[: config.eval_samples],
            prepared.style,
            max_length=config.max_seq_length,
            max_new_tokens=config.max_new_tokens,
        )
    _write_reports(prepared, loaded, out, progress, result)
    _say(_end_block(prepared, out, progress, result))
    return out


def _refuse_used_folder(config: TrainConfig, out: Path, resume: str | None) -> None:
    if out.is_file():
        raise FileExistsError(f"--output-dir {out} is a file.")
    if out.is_dir() and any(out.iterdir()) and not (config.overwrite or resume or config.dry_run):
        raise FileExistsError(f"--output-dir {out} is not empty. Add --resume auto to go on with it, or --overwrite.")


def _checkpoint_to_resume(config: TrainConfig, out: Path) -> str | None:
    if config.resume is None:
        return None
    if config.resume != "auto":
        if not Path(config.resume).is_dir():
            raise FileNotFoundError(f"--resume {config.resume}: no such checkpoint.")
        return config.resume
    checkpoints = sorted(out.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    if not checkpoints:
        raise FileNotFoundError(f"--resume auto: {out} holds no checkpoint to go on from.")
    return str(checkpoints[-1])


def _load(prepared: Prepared) -> Loaded:
    labels, dtype = labels_of(prepared.data), weights_dtype(prepared.config, prepared.data)
    if labels is None:
        return load_causal_lm(prepared.config.model, dtype=dtype, tokenizer=prepared.tokenizer)
    return load_classifier(prepared.config.model, labels=labels, dtype=dtype, tokenizer=prepared.tokenizer)


def _fit(prepared: Prepared, loaded: Loaded, out: Path, resume: str | None) -> Progress:
    """Train, and return what was logged on the way."""
    from datasets import Dataset
    from transformers import DataCollatorWithPadding, PrinterCallback, ProgressCallback, TrainingArguments
    from trl import SFTConfig

    from .trainers import CausalTrainer, ClassifierTrainer, Progress

    config, causal = prepared.config, prepared.data.task == "causal-lm"
    dtype = weights_dtype(config, prepared.data)
    evaluated = bool(prepared.valid)
    by_steps = config.eval_steps is not None
    settings: dict[str, Any] = dict(
        output_dir=str(out),
        num_train_epochs=config.epochs,
        max_steps=config.max_steps or -1,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        lr_scheduler_type=config.scheduler,
        warmup_steps=config.warmup_ratio,
        bf16=uses_autocast(config, prepared.data),
        use_cpu=loaded.device.type == "cpu",
        fp16=dtype == "float16" and loaded.device.type == "cuda",
        seed=config.seed,
        data_seed=config.seed,
        # Batches of like length would save the padding, a tenth of the work on short rows, but rows of like length
        # are often of one kind: the demo's exact match fell from 83 % to 76 % (one run each, seed 0).
        train_sampling_strategy="random",
        eval_strategy="no" if not evaluated else "steps" if by_steps else "epoch",
        eval_steps=config.eval_steps,
        save_strategy="steps" if config.save_steps else "epoch",
        save_steps=config.save_steps or 500,
        save_total_limit=2,
        logging_steps=config.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        report_to=config.report_to or "none",
        disable_tqdm=True,
        dataloader_pin_memory=loaded.device.type == "cuda",
        remove_unused_columns=causal,
    )
    settings |= checkpointing(config.gradient_checkpointing)  # TRL sets it where it is not given
    train_set = Dataset.from_list(prepared.train)
    valid_set = Dataset.from_list(prepared.valid) if evaluated else None
    progress = Progress(out)
    common: dict[str, Any] = dict(
        model=loaded.model,
        train_dataset=train_set,
        eval_dataset=valid_set,
        processing_class=loaded.tokenizer,
        callbacks=[progress],
    )
    if causal:
        arguments = SFTConfig(**settings, max_length=None, dataset_kwargs={"skip_prepare_dataset": True})
        trainer: Any = CausalTrainer(args=arguments, **common)
    else:
        trainer = ClassifierTrainer(
            args=TrainingArguments(**settings), data_collator=DataCollatorWithPadding(loaded.tokenizer), **common
        )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.train(resume_from_checkpoint=resume)
    loaded.model.eval()
    return progress


def checkpointing(wanted: bool) -> dict[str, bool]:
    """The argument of `TrainingArguments` for gradient checkpointing, which transformers renamed."""
    from transformers import TrainingArguments

    names = {field.name for field in dataclasses.fields(TrainingArguments)}
    return {"activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing": wanted}


def _write_settings(prepared: Prepared, loaded: Loaded, out: Path) -> None:
    """What is needed to run or resume this again, written before training starts."""
    out.mkdir(parents=True, exist_ok=True)
    with replacing(out / "config.yaml") as path:
        path.write_text(to_yaml(prepared.config), encoding="utf-8")
    labels = labels_of(prepared.data)
    if labels is not None:
        with replacing(out / LABELS) as path:
            path.write_text(json.dumps(labels, ensure_ascii=False) + "\n", encoding="utf-8")
    loaded.tokenizer.save_pretrained(out)


def _write_reports(
    prepared: Prepared,
    loaded: Loaded,
    out: Path,
    progress: Progress,
    result: report.Comparison | None,
) -> None:
    config = prepared.config
    card = report.model_card(
        base_model=config.model,
        data=config.data,
        settings=dataclasses.asdict(config),
        parameters=str(prepared.attached).splitlines()[-1],
        result=result,
        seconds=progress.seconds,
    )
    html = page.render(
        title=out.name,
        summary=start_block(prepared),
        history=progress.history,
        result=result,
        changes=page.weight_changes(loaded.model),
    )
    for name, text in (("README.md", card), ("report.html", html)):
        with replacing(out / name) as path:
            path.write_text(text, encoding="utf-8")


def _end_block(prepared: Prepared, out: Path, progress: Progress, result: report.Comparison | None) -> str:
    planned = prepared.plan.peak_bytes
    peak = f"peak memory {report.size(progress.peak_bytes)}"
    peak += " (not planned)" if planned is None else f" (planned {report.size(planned)})"
    if progress.loading_bytes > progress.peak_bytes:
        peak += f"; {report.size(progress.loading_bytes)} while the model was loaded"
    lines = [report.heading("done"), f"trained in {report.duration(progress.seconds)}; {peak}"]
    if result is not None and result.rows:
        lines.append(report.comparison(result))
    files = ", ".join(sorted(path.name for path in out.iterdir() if path.is_file() and not path.name.startswith(".")))
    lines += [report.heading("written"), f"{out}/: {files}"]
    prompt = result.samples[0].prompt if result is not None and result.samples else None
    lines.append(report.next_commands(out, prompt if prepared.data.task == "causal-lm" else None))
    return "\n".join(lines)


def _is_main() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def _say(text: str) -> None:
    if _is_main():
        print(text, flush=True)


def quiet_libraries() -> None:
    """Their notices of routine matters; warnings of their own that concern a user are repeated in our words."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    for name in ("trl", "accelerate", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
