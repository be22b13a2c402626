"""Several runs in one pass over the data: each adapter of a `Bank` learns what it would learn alone.

A run has its own settings, its own rows and their order. Step s of the pass is step s of every run that is not over:
the batches of all runs lie in one batch, so the base's products are shared, and small batches fill a GPU. The loss of a
run is the mean over its own labels, clipping looks at its own gradients, and its learning rate follows its own
schedule. A run that diverges stops, and the others go on.

    step 1    fr: rows 7, 2    de: rows 0, 5    →  a batch of 4 rows, `bank.rows(["fr", "fr", "de", "de"])`
    step 2    fr: rows 1, 4    de: row 3        →  a batch of 3 rows
    step 3    fr: row 0        de is over       →  a batch of 1 row

Where a few hundred tokens fill the machine (`most_tokens`), the runs of a step are divided into several batches, whose
gradients are added up.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ..bank.bank import Bank
from .base_trainer import BaseTrainer
from .loss import frozen_head, label_losses, labelled
from .own_run import OwnRun, Rows, most_tokens

Batch = list[tuple[int, dict[str, Any]]]  # rows, each with the place of its run


class _Steps(Dataset[list[Batch]]):
    """The batches of each step of an epoch of the longest run. epoch: which one; Trainer sets it by the loader."""

    def __init__(self, runs: Sequence[OwnRun], most: int) -> None:
        self.runs, self.most, self.epoch = runs, most, 0
        self.in_epoch = max(run.length[0] for run in runs)

    def __len__(self) -> int:
        return self.in_epoch

    def __getitem__(self, index: int) -> list[Batch]:
        step = self.epoch * self.in_epoch + index
        parts = [(place, batch) for place, run in enumerate(self.runs) for batch in run.batches(step)]
        return list(_filled(parts, self.most))


class _HeldOut(Dataset[list[Batch]]):
    """The batches of the held-out rows: item i is batch i of every run."""

    def __init__(self, runs: Sequence[OwnRun], most: int) -> None:
        self.runs, self.most = runs, most

    def __len__(self) -> int:
        return max(-(-len(run.valid) // run.schedule.batch_size) for run in self.runs)

    def __getitem__(self, index: int) -> list[Batch]:
        parts = []
        for place, run in enumerate(self.runs):
            size = run.schedule.batch_size
            if own := run.valid[size * index : size * (index + 1)]:
                parts.append((place, own))
        return list(_filled(parts, self.most))


def _filled(parts: Sequence[tuple[int, Rows]], most: int) -> Iterator[Batch]:
    """The batches of several runs, joined while they have at most so many tokens with padding."""
    batch: Batch = []
    for place, rows in parts:
        longer = [*batch, *((place, row) for row in rows)]
        if batch and len(longer) * max(len(row["input_ids"]) for _, row in longer) > most:
            yield batch
            longer = [(place, row) for row in rows]
        batch = longer
    if batch:
        yield batch


class _Loader(DataLoader[Any]):
    """Tells the steps which epoch it is."""

    def set_epoch(self, epoch: int) -> None:
        if isinstance(self.dataset, _Steps):
            self.dataset.epoch = epoch


class OnePass(BaseTrainer):
    """A Trainer of causal language models for all adapters of a bank at once, inside `bank.rows`."""

    def __init__(
        self, *args: Any, bank: Bank, runs: Mapping[str, OwnRun], label_smoothing: float = 0.0, **kwargs: Any
    ) -> None:
        """runs: of each adapter. The arguments' accumulation is 1: a run's own is in its schedule."""
        super().__init__(*args, **kwargs)
        self._bank, self._runs, self._names = bank, list(runs.values()), list(runs)
        self._parameters = [bank.parameters(name) for name in runs]
        self._frozen_head = None if label_smoothing else frozen_head(self.model)
        self._smoothing = label_smoothing
        self._most = most_tokens(self.args.device)
        self._collate: Any = self.data_collator
        self.diverged: dict[str, int] = {}  # the step of each
        self._seen = self._zeros()  # the sums of the losses since the last line of a log,
        self._seen_steps = self._zeros()  # which are of so many steps

    def _zeros(self) -> Tensor:
        return torch.zeros(len(self._names), dtype=torch.float64)

    # --- batches -----------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> Any:
        return _Loader(_Steps(self._runs, self._most), batch_size=1, collate_fn=self._collated)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        return _Loader(_HeldOut(self._runs, self._most), batch_size=1, collate_fn=self._collated)

    def _collated(self, steps: list[list[Batch]]) -> dict[str, Any]:
        """The tensors of each batch of a step, and the place of each row's run."""
        (batches,) = steps
        return {
            "batches": [
                {**self._collate([row for _, row in batch]), "runs": torch.tensor([place for place, _ in batch])}
                for batch in batches
            ]
        }

    def floating_point_ops(self, inputs: Any) -> int:
        """Nothing: Trainer's estimate is that of one model."""
        return 0

    # --- training ----------------------------------------------------------------------------------------------------

    def create_optimizer(self, model: Any = None) -> Any:
        kind, arguments = self.get_optimizer_cls_and_kwargs(self.args)
        groups = [
            {"params": own, "lr": run.learning_rate, "weight_decay": run.schedule.weight_decay}
            for own, run in zip(self._parameters, self._runs, strict=True)
        ]
        made = self.optimizer = kind(groups, **arguments)
        # Trainer clears the gradients of the model's own parameters, among which these are not.
        made.register_step_post_hook(lambda optimizer, *_: optimizer.zero_grad())
        return made

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """A schedule for each run, over its own steps."""
        factors = []
        for place, run in enumerate(self._runs):
            self.lr_scheduler = None
            made = super().create_scheduler(run.length[1], optimizer)
            factors.append(made.lr_lambdas[place])
        made.lr_lambdas = factors
        for group, factor, base in zip(made.optimizer.param_groups, factors, made.base_lrs, strict=True):
            group["lr"] = base * factor(0)
        made._last_lr = [group["lr"] for group in made.optimizer.param_groups]
        return made

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """The gradients of one step of every run, each that of its own mean loss."""
        model.train()
        batches = self._prepare_inputs(inputs)["batches"]
        labels = torch.stack([self._labels_of(batch) for batch in batches]).sum(0)
        seen, state, begun = self._zeros(), torch.get_rng_state(), set[int]()
        for batch in batches:
            places = batch["runs"].tolist()
            if begun.isdisjoint(places):  # runs of which this is the first batch draw the masks that they draw alone
                torch.set_rng_state(state)
            begun.update(places)
            self._bank.assign([self._names[place] for place in places])
            with self.timed(batch), self.compute_loss_context_manager():
                own = self._losses(model, batch) / labels.to(self.args.device).clamp(min=1)
            going = torch.tensor([name not in self.diverged for name in self._names], device=own.device)
            found = own.detach().to("cpu", torch.float64)
            seen += found
            for place in (~found.isfinite()).nonzero().flatten().tolist():
                self.diverged.setdefault(self._names[place], self.state.global_step + 1)
            self.accelerator.backward(torch.where(going & own.isfinite(), own, torch.zeros_like(own)).sum())
        self._seen += seen
        self._seen_steps += labels > 0
        return seen.sum()

    def _losses(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """The sum of the losses of each run."""
        rest = {name: value for name, value in batch.items() if name not in ("labels", "runs")}
        where = labelled(batch["labels"])
        losses = label_losses(where, model, rest, self._frozen_head, self._smoothing)
        return losses.new_zeros(len(self._names)).index_add(0, batch["runs"][where.rows], losses)

    def _labels_of(self, batch: Mapping[str, Any]) -> Tensor:
        """How many labels each run has in a batch."""
        count = (batch["labels"][:, 1:] != -100).sum(1).to("cpu", torch.float64)
        return self._zeros().index_add(0, batch["runs"].cpu(), count)

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        """Clip each adapter's gradients by their own norm. One whose gradients are not finite stops here."""
        largest = torch.zeros(())
        for name, parameters in zip(self._names, self._parameters, strict=True):
            if name in self.diverged:
                norm = torch.tensor(math.nan)
            else:
                norm = nn.utils.clip_grad_norm_(parameters, self.args.max_grad_norm)
            if not norm.isfinite():
                self.diverged.setdefault(name, self.state.global_step + 1)
                for parameter in parameters:
                    parameter.grad = None
            else:
                largest = torch.maximum(largest, norm.detach().cpu())
        if len(self.diverged) == len(self._names):
            self.control.should_training_stop = True
        return largest
