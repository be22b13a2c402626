"""transformers' Trainer and TRL's SFTTrainer, changed for adapters.

What is changed: a checkpoint holds the adapter instead of the model and appears whole or not at all; the loss of a
causal model on a CPU computes logits only where a label is; the held-out loss is the mean over all labels; the first
step of a warm-up trains; and a loss that is NaN or infinite stops the run at its step and says why. Batching, the
optimizer, schedules, devices and resuming are unchanged.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTTrainer

from ..core.state import take_trained_state, trained_state
from ..formats.files import naming, read_safetensors, remove, replacing
from ..formats.folder import OutputFolder
from .base_trainer import BaseTrainer
from .checkpoints import BEST, RUN, checkpoints, step_of
from .divergence import When, refuse_broken_factors, refuse_diverged, too_high, why_no_number
from .loss import causal_loss, frozen_head, plain_head
from .pace import Pace
from .processes import is_main, of_main
from .state_files import write_state
from .trainer_mixin import TrainerMixin

_KEPT = 2  # checkpoints
_RECENT = 4  # last batches, on which divergence is checked


def warmed_up(schedule: Callable[[int], float], warmup: int, step: int) -> float:
    """The factor of the learning rate at a step, counted from 0. The warm-up rises from 1/warmup to 1, not from 0."""
    return (step + 1) / warmup if step < warmup else schedule(step)


class _AdapterTrainer(TrainerMixin, BaseTrainer):
    """Checkpoints as any trainer has them with the mixin, and each of them is whole or absent."""

    def __init__(
        self, *args: Any, folder: OutputFolder, record: dict[str, Any], pace: Pace | None = None, **kwargs: Any
    ) -> None:
        """folder: where checkpoints go. record: the run's record, kept in each. pace: times the forward passes."""
        super().__init__(*args, **kwargs)
        self._folder, self._record, self.pace = folder, record, pace
        self._saving: Path | None = None  # while a checkpoint is made
        self._held_out = [0.0, 0.0]  # the sum of the losses, and of how many labels or rows, or of their weights
        self._best: dict[str, Tensor] | None = None  # the state after the best evaluation
        # A score of held-out rows and what it is logged as.
        self.score: tuple[str, Callable[[], float]] | None = None
        self.keeps_checkpoints = True
        self._recent: deque[dict[str, Any]] = deque(maxlen=_RECENT)
        # Where the one row of a batch comes from, for messages.
        self.name_of: Callable[[dict[str, Any]], str] = lambda row: str(row["labels"].tolist())

    # --- checkpoints -----------------------------------------------------------------------------------------------

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._saving or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint under another name, wait until it is on the disk, and rename it: it is whole or absent.

        Raises Diverged in place of a checkpoint that would take the place of a good one. Does nothing for a run that is
        not resumed.
        """
        if not self.keeps_checkpoints:
            return
        self.refuse_diverged("on the way")
        name = f"checkpoint-{self.state.global_step}"
        writes = bool(self.args.should_save)
        with contextlib.ExitStack() as stack:
            saving = self._folder.hidden / "saving"
            if writes:
                stack.enter_context(self._folder.writing("saving"))
            self.accelerator.wait_for_everyone()  # until the folder is there
            self._saving = saving
            try:
                with naming(self._folder.path / name):
                    super()._save_checkpoint(model, trial)
                if writes:
                    (saving / name / RUN).write_text(json.dumps(self._record) + "\n", encoding="utf-8")
            finally:
                self._saving = None
            self.accelerator.wait_for_everyone()  # until all have written their part
        if writes:
            self._keep_newest(self.state.global_step)
        self.accelerator.wait_for_everyone()

    def _keep_newest(self, step: int) -> None:
        """Remove older checkpoints, and later ones, which are left if this run resumed from an earlier step."""
        found = checkpoints(self._folder.path)
        older = [path for path in found if step_of(path) <= step]
        for path in set(found) - set(older[-_KEPT:]):
            gone = self._folder.hidden / "gone"  # renamed first, so that no part of it keeps its name
            remove(gone)
            path.rename(gone)
            remove(gone)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if not self.args.should_save:
            return
        model = self.accelerator.unwrap_model(self.model)
        refuse_broken_factors(model, self.args.learning_rate, self.state.global_step)
        write_state(model, Path(output_dir or self.args.output_dir))  # tokenizer and settings lie in the run's folder
        if self._best is not None:
            with replacing(Path(output_dir or self.args.output_dir) / BEST) as path:
                safetensors.torch.save_file(self._best, path)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        best = Path(resume_from_checkpoint) / BEST
        self._best = read_safetensors(best) if best.is_file() else None

    def hold_best(self) -> None:
        """Remember the adapter as it is now."""
        state = trained_state(self.accelerator.unwrap_model(self.model))
        self._best = {name: tensor.to("cpu", copy=True) for name, tensor in state.items()}

    def take_best(self) -> None:
        """Put the adapter that was remembered last, if any, in the place of the present one."""
        if self._best is not None:
            take_trained_state(self.accelerator.unwrap_model(self.model), self._best, "the best adapter so far")

    def take(self, checkpoint: Path) -> None:
        """Load the adapter of a checkpoint when nothing remains to be trained."""
        self._load_from_checkpoint(str(checkpoint))

    # --- the schedule ----------------------------------------------------------------------------------------------

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        made = super().create_scheduler(num_training_steps, optimizer)
        warmup = self.args.get_warmup_steps(num_training_steps)
        if warmup:
            made.lr_lambdas = [partial(warmed_up, schedule, warmup) for schedule in made.lr_lambdas]
            for group, factor, base in zip(made.optimizer.param_groups, made.lr_lambdas, made.base_lrs, strict=True):
                group["lr"] = base * factor(0)
            made._last_lr = [group["lr"] for group in made.optimizer.param_groups]
        return made

    # --- the loss --------------------------------------------------------------------------------------------------

    def count(self, inputs: dict[str, Any]) -> float:
        """The number of losses in the mean of a batch, or the sum of their weights."""
        raise NotImplementedError

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if self.model.training:
            self._recent.append(dict(inputs))
        with self.timed(inputs):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def timed(self, inputs: Mapping[str, Any]) -> contextlib.AbstractContextManager[None]:
        return self.pace.forward(inputs["input_ids"].numel()) if self.pace else contextlib.nullcontext()

    def no_number(self, inputs: dict[str, Any], loss: Tensor) -> Exception:
        plain = self.accelerator.unwrap_model(self.model)
        return why_no_number(
            plain,
            inputs,
            float(loss.detach().mean()),
            partial(self.loss_of, plain),
            self.name_of,
            self.state.global_step + 1,
            self._get_learning_rate(),
        )

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """Trainer's clipping. A gradient that is NaN or infinite ends the run: clipping would spread it to all.

        In float16 such gradients are usual, and the loss scaler skips the step.
        """
        norm = super()._clip_grad_norm(model)
        if norm is not None and self.accelerator.scaler is None and not torch.isfinite(torch.as_tensor(norm)).all():
            raise too_high(
                f"the gradient is NaN or infinite at step {self.state.global_step + 1}", self._get_learning_rate()
            )
        return norm

    def refuse_diverged(self, when: When = "at the end") -> None:
        """Raise Diverged if the adapter makes the loss on the rows of the last steps worse than the base model's."""
        model = self.accelerator.unwrap_model(self.model)
        refuse_diverged(
            model,
            list(self._recent),
            partial(self.loss_of, model),
            self.name_of,
            self.args.learning_rate,
            self.state.global_step,
            when=when,
        )

    # --- the held-out loss -----------------------------------------------------------------------------------------

    def evaluation_loop(self, dataloader: Any, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Trainer's loop, with a loss that does not depend on how rows fall into batches: the mean over all labels."""
        self._held_out = [0.0, 0.0]
        found: EvalLoopOutput = super().evaluation_loop(
            dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs
        )
        total = torch.tensor(self._held_out, dtype=torch.float64 if self.args.device.type == "cpu" else torch.float32)
        total = self.accelerator.reduce(total.to(self.args.device), "sum")
        assert found.metrics is not None
        found.metrics[f"{metric_key_prefix}_loss"] = float(total[0] / total[1]) if total[1] else 0.0
        if self.score is not None:
            name, score = self.score
            # One answer for all processes, which must agree on when to stop.
            found.metrics[name] = of_main(score() if is_main() else math.nan)
        return found

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Any, None, None]:
        inputs = self._prepare_inputs(inputs)
        rows = self._own_rows(len(inputs["labels"]))
        counted = {key: value[: max(rows, 1)] for key, value in inputs.items()}
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.loss_of(model, counted).detach().mean()
        count = self.count(counted) if rows else 0
        self._held_out[0] += float(loss) * count if count else 0.0
        self._held_out[1] += count
        return loss, None, None

    def _own_rows(self, rows: int) -> int:
        """How many rows of a batch are not repeats: with several processes, repeats fill up the last batches."""
        state = self.accelerator.gradient_state
        if self.args.world_size == 1 or not state.end_of_dataloader or state.remainder < 1:
            return rows
        return int(min(max(state.remainder - rows * self.args.process_index, 0), rows))


class ClassifierTrainer(_AdapterTrainer):
    """Sequence classification and regression.

    transformers' models divide by the rows of all accumulated batches only where rows have one class and no weight, so
    the loss is computed here.
    """

    def __init__(self, *args: Any, class_weights: Sequence[float] | None = None, **kwargs: Any) -> None:
        """class_weights: how much each class counts; None: all alike."""
        super().__init__(*args, **kwargs)
        self._weights = None if class_weights is None else torch.tensor(class_weights, device=self.args.device)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[dict[str, Any]], Any]:
        """Trainer's batches of one step, and what their losses are divided by: the sum of the weights of the rows."""
        batches, items = super().get_batch_samples(*args, **kwargs)
        if items is not None and self._weights is not None:
            items = self._weights.new_tensor(sum(map(self.count, batches)))
            if self.args.average_tokens_across_devices:
                items = self.accelerator.gather(items).sum()
        return batches, items

    def loss_of(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Cross-entropy of classes, the squared error of numbers: the mean, weighted by the classes' weights. Of
        multi-label rows, the binary cross-entropy: the mean over rows and classes.
        """
        labels = inputs["labels"]
        logits = model(**{name: value for name, value in inputs.items() if name != "labels"}).logits.float()
        if labels.dim() == 2:
            loss = F.binary_cross_entropy_with_logits(logits, labels, reduction="sum")
        elif labels.is_floating_point():
            loss = F.mse_loss(logits[:, 0], labels, reduction="sum")
        else:
            loss = F.cross_entropy(logits, labels, self._weights, reduction="sum")
        loss = loss / (self.count(inputs) if num_items_in_batch is None else num_items_in_batch)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        return loss

    def count(self, inputs: dict[str, Any]) -> float:
        labels = inputs["labels"]
        return labels.numel() if self._weights is None else float(self._weights[labels.to(self._weights.device)].sum())


class CausalTrainer(_AdapterTrainer, SFTTrainer):
    """Causal language models, on rows that carry their labels."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._on_cpu = self.args.device.type == "cpu"
        self._head = frozen_head(self.model) if self._on_cpu else None
        # TRL's fused head multiplies by the head's weight itself and would ignore an adapter on it.
        self._fused = not self._on_cpu and plain_head(self.model) is not None

    def loss_of(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """The mean over the labels of −log p, as TRL computes it.

        On a GPU TRL's fused head computes it. On a CPU, or with an adapter on the head, `loss.py` does.
        """
        if self._fused:
            fused: Tensor = SFTTrainer.compute_loss(self, model, inputs, num_items_in_batch=num_items_in_batch)
            return fused
        count = self.count(inputs) if num_items_in_batch is None else num_items_in_batch
        loss = causal_loss(model, inputs, self._head) / torch.as_tensor(count).clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        return loss

    def count(self, inputs: dict[str, Any]) -> int:
        return int((inputs["labels"][:, 1:] != -100).sum())

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Nothing: the output folder gets lorakit's own card at the end."""
