"""transformers' Trainer and TRL's SFTTrainer, made to keep the adapter alone and to say what they do in our words.

What is changed: a checkpoint holds the adapter instead of the model, the loss of a causal model on a CPU computes
logits only where a label is, a loss that is no number stops the run, and progress is one bar and a line a step in
metrics.jsonl. Batching, the optimizer, schedules, devices and resuming are theirs.
"""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback
from trl import SFTTrainer

from ..core.attach import trained_whole
from ..core.trainable import lora_names
from ..formats import save
from ..formats.files import replacing
from .loss import causal_loss, frozen_head, plain_head
from .memory import forget_peak, peak_memory
from .watch import FirstStep

STATE = "adapter_state.safetensors"  # in a checkpoint: the adapter's tensors as the model names them


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor that training changes, or needs to go on, by its name in the model."""
    wanted = lora_names(model) | set(trained_whole(model)[0])
    return {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name in wanted}


class _AdapterTrainer(Trainer):
    """Checkpoints of the adapter: PEFT's two files, and the exact state to resume from."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_callback(FirstStep())

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        model = self.accelerator.unwrap_model(self.model)
        save(model, folder)
        with replacing(folder / STATE) as path:
            safetensors.torch.save_file(trained_state(model), path)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        path = Path(resume_from_checkpoint) / STATE
        if not path.is_file():
            raise FileNotFoundError(f"{resume_from_checkpoint} is no checkpoint of lorakit: it has no {STATE}.")
        model = self.accelerator.unwrap_model(self.model if model is None else model)
        state = safetensors.torch.load_file(path)
        expected = trained_state(model)
        differing = sorted(state.keys() ^ expected.keys()) or [
            name for name in state if state[name].shape != expected[name].shape
        ]
        if differing:
            raise ValueError(f"{path} belongs to an adapter of other settings; {differing[0]} differs.")
        model.load_state_dict(state, strict=False)


class ClassifierTrainer(_AdapterTrainer):
    """Sequence classification and regression."""


class CausalTrainer(_AdapterTrainer, SFTTrainer):
    """Causal language models, on rows that carry their labels."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._on_cpu = self.args.device.type == "cpu"
        self._head = frozen_head(self.model) if self._on_cpu else None
        # TRL's fused head multiplies by the head's weight itself and would never ask an adapter on it.
        self._fused = not self._on_cpu and plain_head(self.model) is not None

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mean over the labels of −log p, as TRL computes it.

        On a GPU by TRL's fused head, on a CPU and with an adapter on the head by `loss.py`.
        """
        if self._fused or return_outputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        count = (inputs["labels"][:, 1:] != -100).sum() if num_items_in_batch is None else num_items_in_batch
        loss = causal_loss(model, inputs, self._head) / torch.as_tensor(count).clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        return loss

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Nothing: the output folder gets lorakit's own card at the end."""


class Progress(TrainerCallback):
    """One bar while training, a line a logged step in metrics.jsonl, and an end to a run whose loss is no number."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "metrics.jsonl"
        self.history: list[dict[str, float]] = []
        self.seconds = 0.0
        self.loading_bytes = 0  # the peak before training began
        self.peak_bytes = 0  # and of training alone, where the system can tell them apart
        self._bar: tqdm[Any] | None = None
        self._began = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.loading_bytes = peak_memory(args.device)
        forget_peak(args.device)
        self._began = time.perf_counter()
        if not state.is_world_process_zero:
            return
        self.history = _read_lines(self.path, up_to=state.global_step)
        self.path.write_text("".join(json.dumps(line) + "\n" for line in self.history), encoding="utf-8")
        self._bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc="training",
            unit="step",
            dynamic_ncols=True,
            disable=not sys.stderr.isatty(),
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if not logs or not state.is_world_process_zero or "train_runtime" in logs:
            return
        line = {"step": state.global_step, **{key: _rounded(value) for key, value in logs.items() if _is_number(value)}}
        line["seconds"] = round(time.perf_counter() - self._began, 2)
        self.history.append(line)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        loss = logs.get("loss", logs.get("eval_loss"))
        if loss is not None and not math.isfinite(loss):
            raise FloatingPointError(
                f"the loss is {loss} at step {state.global_step}. The learning rate is probably too high "
                f"(now {args.learning_rate:g}); checkpoints before this step are kept in {self.path.parent}."
            )
        self._show(line, state.max_steps)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seconds = time.perf_counter() - self._began
        self.peak_bytes = peak_memory(args.device)
        if self._bar is not None:
            self._bar.close()

    def _show(self, line: dict[str, float], steps: int) -> None:
        if self._bar is None:
            return
        if not self._bar.disable:
            self._bar.set_postfix(_newest_losses(self.history), refresh=True)
        elif "loss" in line:
            print(f"step {line['step']}/{steps}  loss {line['loss']:.4f}  {line['seconds']:.0f} s", flush=True)
        elif "eval_loss" in line:
            print(f"step {line['step']}/{steps}  held-out loss {line['eval_loss']:.4f}", flush=True)


def _newest_losses(history: list[dict[str, float]]) -> dict[str, float]:
    """The newest training loss and the newest held-out loss."""
    newest: dict[str, float] = {}
    for line in history:
        newest |= {key: line[key] for key in ("loss", "eval_loss") if key in line}
    return newest


def _read_lines(path: Path, up_to: int) -> list[dict[str, float]]:
    """The lines of an interrupted run that a resumed one continues."""
    if not up_to or not path.is_file():
        return []
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line["step"] <= up_to]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")
