"""What lorakit changes in transformers' trainers, without the command line: the schedule, the held-out loss, runs that
fail, and checkpoints that are whole or absent."""

import math
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor, nn
from transformers import DataCollatorWithPadding, TrainerCallback, TrainingArguments, get_scheduler
from trl import SFTConfig

import lorakit
import models
from conftest import tiny_tokenizer
from lorakit.formats.folder import OutputFolder
from lorakit.training import state_files
from lorakit.training.checkpoints import checkpoints
from lorakit.training.divergence import Diverged, When, refuse_diverged, relative_change
from lorakit.training.gradient_checkpointing import checkpointing
from lorakit.training.start import TRAINING
from lorakit.training.trainers import CausalTrainer, ClassifierTrainer, warmed_up
from storages import Outputs

pytestmark = pytest.mark.usefixtures("few_objects")
LENGTHS = (5, 9, 3, 12, 7, 4, 11)  # different lengths, so that a mean of means is a different number


def causal_rows() -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length in LENGTHS:
        ids = torch.randint(4, 60, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [-100, -100, *ids[2:]]})
    return rows


def class_rows() -> list[dict[str, Any]]:
    return [{"input_ids": row["input_ids"], "labels": i % 3} for i, row in enumerate(causal_rows())]


def trainer_of(
    kind: str,
    folder: Path,
    valid: bool = False,
    targets: str = "q_proj",
    class_weights: tuple[float, ...] | None = None,
    **settings: Any,
) -> Any:
    usual: dict[str, Any] = dict(
        output_dir=str(folder),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        logging_strategy="no",
        per_device_train_batch_size=4,
        max_steps=3,
        learning_rate=0.01,
        bf16=False,
        dataloader_pin_memory=False,
        **checkpointing(False),
    )
    usual.update(settings)
    rows = causal_rows() if kind == "causal" else class_rows()
    model = models.llama() if kind == "causal" else models.bert()
    whole = [] if kind == "causal" else ["classifier"]
    lorakit.attach(model, targets if kind == "causal" else "query", rank=2, alpha=4, also_train=whole)
    common: dict[str, Any] = dict(
        model=model,
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows) if valid else None,
        processing_class=tiny_tokenizer(),
        folder=OutputFolder(folder, TRAINING),
        record={"settings": {}},
    )
    common["folder"].begin({})
    if kind == "causal":
        arguments = SFTConfig(**usual, max_length=None, dataset_kwargs={"skip_prepare_dataset": True})
        return CausalTrainer(args=arguments, **common)
    arguments = TrainingArguments(**usual, remove_unused_columns=False)
    collator = DataCollatorWithPadding(tiny_tokenizer())
    return ClassifierTrainer(args=arguments, data_collator=collator, class_weights=class_weights, **common)


# --- the schedule ---


@pytest.mark.parametrize("steps", [1, 2, 10, 100])
@pytest.mark.parametrize("scheduler", ["linear", "cosine", "constant_with_warmup"])
@pytest.mark.parametrize("share", [0.0, 0.03, 0.5])
def test_the_first_step_of_a_warm_up_trains(steps: int, scheduler: str, share: float, tmp_path: Path) -> None:
    """Each step of the warm-up has its equal share of the rise; after it, transformers' own schedule."""
    trainer = trainer_of("causal", tmp_path, max_steps=steps, lr_scheduler_type=scheduler, warmup_steps=share)
    optimizer = trainer.create_optimizer()
    schedule = trainer.create_scheduler(steps, optimizer)
    rates = []
    for _ in range(steps):
        assert schedule.get_last_lr()[0] == optimizer.param_groups[0]["lr"]
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    warmup = math.ceil(steps * share)
    plain = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=0.01)
    theirs = get_scheduler(scheduler, plain, num_warmup_steps=warmup, num_training_steps=steps)
    expected = []
    for step in range(steps):
        rate = plain.param_groups[0]["lr"]
        expected.append(0.01 * (step + 1) / warmup if step < warmup else rate)
        plain.step()
        theirs.step()
    assert rates == pytest.approx(expected)
    assert rates[0] > 0 and max(rates) == pytest.approx(0.01)


def test_warmed_up() -> None:
    assert [warmed_up(lambda step: -1.0, 4, step) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, -1.0]


@pytest.mark.parametrize("kind", ["causal", "classes"])
def test_one_step_trains(kind: str, tmp_path: Path) -> None:
    trainer = trainer_of(kind, tmp_path, max_steps=1, warmup_steps=0.03)
    trainer.train()
    changed = [p for name, p in trainer.model.named_parameters() if name.endswith("lora_B")]
    assert changed and all(p.abs().max() > 1e-3 for p in changed)


# --- the training loss ---


@pytest.mark.parametrize(("batch", "accumulated"), [(1, 7), (7, 1)])
@pytest.mark.parametrize("targets", ["q_proj", "lm_head"])
def test_problem_43_no_row_sees_another_one(targets: str, batch: int, accumulated: int, tmp_path: Path) -> None:
    """Rows are not packed: the gradient of a step is that of the rows, each read alone, as a mean over all labels."""
    trainer = trainer_of(
        "causal", tmp_path, targets=targets, per_device_train_batch_size=batch, max_steps=1,
        gradient_accumulation_steps=accumulated, max_grad_norm=0.0,
    )  # fmt: skip
    models.train_a_little(trainer.model)
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    losses = []
    for row in causal_rows():
        logits = trainer.model(torch.tensor([row["input_ids"]])).logits[0]
        losses.append(F.cross_entropy(logits[:-1], torch.tensor(row["labels"][1:]), reduction="none")[1:])
    expected = torch.autograd.grad(torch.cat(losses).mean(), trained)
    found: list[Tensor] = []

    class Gradients(TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            found.extend(parameter.grad.clone() for parameter in trained if parameter.grad is not None)

    trainer.add_callback(Gradients())
    trainer.train()
    torch.testing.assert_close(found, list(expected), rtol=1e-4, atol=1e-7)


# --- the held-out loss ---


@pytest.mark.parametrize("targets", ["q_proj", "lm_head"])
def test_problem_49_one_batch_of_logits_at_a_time(targets: str, tmp_path: Path) -> None:
    """Nothing that the model returns for a batch is in memory when it reads the next one."""
    trainer = trainer_of("causal", tmp_path, valid=True, targets=targets, per_device_eval_batch_size=1)
    with Outputs(trainer.model) as outputs:
        trainer.evaluate()
    assert outputs.alive == [0] * len(LENGTHS)


@pytest.mark.parametrize("batch", [1, 2, 3, 7])
@pytest.mark.parametrize("kind", ["causal", "classes"])
def test_the_held_out_loss_is_the_mean_over_labels(kind: str, batch: int, tmp_path: Path) -> None:
    trainer = trainer_of(kind, tmp_path, valid=True, per_device_eval_batch_size=batch)
    model, losses = trainer.model, []
    with torch.no_grad():
        model.eval()
        for row in causal_rows() if kind == "causal" else class_rows():
            logits = model(torch.tensor([row["input_ids"]])).logits.double()[0]
            if kind == "causal":
                losses.append(F.cross_entropy(logits[:-1], torch.tensor(row["labels"][1:]), reduction="none")[1:])
            else:
                losses.append(F.cross_entropy(logits[None], torch.tensor([row["labels"]]), reduction="none"))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(torch.cat(losses).mean()), rel=1e-5)


# --- classes and numbers ---

WEIGHTS = (0.2, 3.0, 1.5)


def expected_loss(model: nn.Module, labels: Tensor, weights: tuple[float, ...] | None) -> Tensor:
    """torch's own loss of all rows at once, each read alone."""
    logits = torch.cat([model(torch.tensor([row["input_ids"]])).logits for row in class_rows()])
    if labels.dim() == 2:
        return F.binary_cross_entropy_with_logits(logits, labels)
    if labels.is_floating_point():
        return F.mse_loss(logits[:, 0], labels)
    return F.cross_entropy(logits, labels, None if weights is None else torch.tensor(weights))


def labels_of(kind: str) -> list[Any]:
    if kind == "sets":  # none, one, two and all three classes
        return [[float(i >> k & 1) for k in range(3)] for i in range(len(LENGTHS))]
    return [0.3 * i - 1 if kind == "numbers" else row["labels"] for i, row in enumerate(class_rows())]


@pytest.mark.parametrize(("batch", "accumulated"), [(7, 1), (1, 7), (3, 3)])
@pytest.mark.parametrize(
    ("kind", "weights"), [("classes", None), ("classes", WEIGHTS), ("sets", None), ("numbers", None)]
)
def test_the_gradient_of_a_step_is_that_of_torchs_own_loss_of_its_rows(
    kind: str, weights: tuple[float, ...] | None, batch: int, accumulated: int, tmp_path: Path
) -> None:
    found: dict[str, Tensor] = {}

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            found.update({n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None})

    usual: dict[str, Any] = dict(
        per_device_train_batch_size=batch, gradient_accumulation_steps=accumulated, max_steps=1
    )
    trainer = trainer_of("classes", tmp_path, class_weights=weights, max_grad_norm=0.0, **usual)
    labels = labels_of(kind)
    trainer.train_dataset = Dataset.from_list(
        [{**row, "labels": label} for row, label in zip(class_rows(), labels, strict=True)]
    )
    for module in trainer.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    wanted = torch.autograd.grad(expected_loss(trainer.model, torch.tensor(labels), weights), list(trained.values()))
    trainer.add_callback(Keep())
    trainer.train()
    torch.testing.assert_close([found[name] for name in trained], list(wanted), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("batch", [1, 3, 7])
@pytest.mark.parametrize("scale", [1.0, 0.01])  # only the ratios of weights matter
def test_the_held_out_loss_of_weighted_classes_is_torchs_of_all_rows(batch: int, scale: float, tmp_path: Path) -> None:
    weights = tuple(scale * weight for weight in WEIGHTS)
    trainer = trainer_of("classes", tmp_path, valid=True, class_weights=weights, per_device_eval_batch_size=batch)
    with torch.no_grad():
        wanted = expected_loss(trainer.model.eval(), torch.tensor(labels_of("classes")), WEIGHTS)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(wanted), rel=1e-5)


# --- runs that fail ---


def spoilt(kind: str, tmp_path: Path, **settings: Any) -> Any:
    trainer = trainer_of(kind, tmp_path, **settings)
    trainer.name_of = lambda row: f"<{row['input_ids'][0, :3].tolist()}>"
    return trainer


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_base_weight_that_is_no_number_is_named(value: float, tmp_path: Path) -> None:
    trainer = spoilt("causal", tmp_path)
    with torch.no_grad():
        trainer.model.model.layers[1].mlp.up_proj.weight[0, 0] = value
    said = r"the loss is nan at step 1: the base model has weights that are NaN or infinite, whatever the learning rate"
    with pytest.raises(Diverged, match=rf"{said}: model.layers.1.mlp.up_proj.weight\."):
        trainer.train()


@pytest.mark.parametrize("wrong", [2, 6])
def test_a_row_that_makes_the_loss_no_number_is_named(wrong: int, tmp_path: Path) -> None:
    """Only the model's output for one row is spoilt; the weights and the other rows are right."""
    trainer = spoilt("causal", tmp_path, per_device_train_batch_size=len(LENGTHS))
    first = causal_rows()[wrong]["input_ids"][:3]

    def spoil(module: nn.Module, args: Any, hidden: Tensor) -> Tensor:
        bad = (args[0][:, :3] == torch.tensor(first)).all(1)
        return torch.where(bad[:, None, None], torch.nan, hidden)

    trainer.model.model.embed_tokens.register_forward_hook(spoil)
    with pytest.raises(Diverged, match="with the adapter switched off too. These rows make it so: <") as caught:
        trainer.train()
    assert str(caught.value).count("<") == 1 and f"<{first}>" in str(caught.value)
    assert "at step 1" in str(caught.value) and "learning rate" not in str(caught.value)


def test_a_rate_that_is_too_high_is_named(tmp_path: Path) -> None:
    trainer = spoilt("causal", tmp_path, learning_rate=1e30, max_steps=10)
    with pytest.raises(Diverged, match=r"step [23].*The learning rate is probably too high \(now .*e\+(29|30)\)"):
        trainer.train()


def test_a_gradient_that_is_no_number_stops_before_it_is_taken(tmp_path: Path) -> None:
    trainer = spoilt("causal", tmp_path)
    factor = trainer.model.model.layers[0].self_attn.q_proj.lora_B
    factor.register_hook(lambda gradient: gradient * torch.inf)
    with pytest.raises(Diverged, match="the gradient is NaN or infinite at step 1"):
        trainer.train()
    assert not factor.any()


@pytest.mark.parametrize(("kind", "rate"), [("causal", 1e6), ("causal", 300.0), ("classes", 1e6)])
def test_a_run_that_made_its_model_worse_has_diverged(kind: str, rate: float, tmp_path: Path) -> None:
    trainer = spoilt(kind, tmp_path, learning_rate=rate, max_steps=4)
    said = r"(the run has diverged after 4 steps: |at step [1-4]).*The learning rate is probably too high"
    with pytest.raises(Diverged, match=said):
        trainer.train()
        trainer.refuse_diverged()


@pytest.mark.parametrize("kind", ["causal", "classes"])
def test_a_run_that_diverges_stops_before_it_replaces_a_good_checkpoint(kind: str, tmp_path: Path) -> None:
    """From the third step on the factors are far off; a finite loss, so only a comparison with the base tells."""
    trainer = spoilt(kind, tmp_path, targets="lm_head", max_steps=9, save_strategy="steps", save_steps=1)

    class Jump(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 3:
                with torch.no_grad():
                    for name, parameter in trainer.model.named_parameters():
                        if "lora_B" in name or "classifier" in name:
                            parameter.normal_(std=300.0)

    trainer.add_callback(Jump())
    said = r"has diverged after 3 steps: on the rows of its last steps the loss is \S+ with the adapter and [1-5]\."
    rows = causal_rows() if kind == "causal" else class_rows()
    with pytest.raises(Diverged, match=said) as caught:
        trainer.train()
    named = re.findall(r"<(\[[^>]*\])>", str(caught.value).partition("The last step's rows: ")[2])
    assert 1 <= len(named) <= 4 and set(named) <= {str(row["input_ids"][:3]) for row in rows}
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-1", "checkpoint-2"]
    assert sorted(path.name for path in (tmp_path / ".lorakit").iterdir()) == ["train.json"]


@pytest.mark.parametrize(
    ("base", "adapted", "on_the_way", "at_the_end"),
    [
        (2.0, 1.9, True, True),
        (2.0, 2.14, True, True),
        (2.0, 2.16, True, False),
        (2.0, 4.9, True, False),
        (2.0, 5.1, False, False),
        (2.0, math.nan, False, False),
        (0.0, 0.04, True, True),
    ],
)
def test_how_much_worse_than_the_base_a_run_may_be(
    base: float, adapted: float, on_the_way: bool, at_the_end: bool
) -> None:
    model = models.llama()
    lorakit.attach(model, "q_proj", rank=2)

    def loss_of(batch: dict[str, Any]) -> Tensor:
        layer = model.model.layers[0].self_attn.q_proj
        return torch.tensor(base if layer.disabled_by else adapted)

    batch = {"labels": torch.zeros(1, 3)}
    asked: tuple[tuple[When, bool], ...] = (("on the way", on_the_way), ("at the end", at_the_end))
    for when, allowed in asked:
        call = partial(refuse_diverged, model, [batch], loss_of, lambda row: "d:7", 0.1, 5, when=when)
        if allowed:
            assert call() == pytest.approx((base, adapted))
        else:
            with pytest.raises(Diverged, match=r"after 5 steps.*The last step's rows: d:7\."):
                call()


@pytest.mark.parametrize("kind", ["causal", "classes"])
@pytest.mark.parametrize("rate", [1e-6, 1e-3, 2e-2])
def test_a_run_that_learns_has_not(kind: str, rate: float, tmp_path: Path) -> None:
    trainer = spoilt(kind, tmp_path, learning_rate=rate, max_steps=6, save_strategy="steps", save_steps=1)
    trainer.train()
    trainer.refuse_diverged()


def test_the_relative_change_of_all_weights() -> None:
    model = models.llama()
    lorakit.attach(model, ["q_proj", "up_proj"], rank=2, alpha=4)
    models.train_a_little(model)
    change = weights = 0.0
    for name, module in model.named_modules():
        if name.endswith(("q_proj", "up_proj")):
            delta = 2.0 * module.lora_B.detach().double() @ module.lora_A.detach().double()
            change, weights = (
                change + float(delta.square().sum()),
                weights + float(module.weight.double().square().sum()),
            )
    assert relative_change(model) == pytest.approx(math.sqrt(change / weights), rel=1e-4)


# --- checkpoints ---


@pytest.mark.parametrize("fails", ["torch.save", "save", "sync"])
def test_a_checkpoint_that_cannot_be_written_leaves_nothing(fails: str, tmp_path: Path, monkeypatch) -> None:
    """The one before it stays whole, and the message names the one that failed, or its folder."""
    trainer = trainer_of("causal", tmp_path, save_strategy="steps", save_steps=1)
    calls: list[Any] = []

    def full(original: Any) -> Any:
        def call(*args: Any, **named: Any) -> Any:
            calls.append(args)
            if len(calls) > 4:
                raise OSError(28, "No space left on device")
            return original(*args, **named)

        return call

    if fails == "torch.save":
        monkeypatch.setattr(torch, "save", full(torch.save))
    elif fails == "save":
        calls.extend(["", "", ""])
        monkeypatch.setattr(state_files, "save", full(lorakit.save))
    else:
        calls.extend(["", "", ""])
        monkeypatch.setattr("lorakit.formats.folder.sync", full(lambda path: None))
        monkeypatch.setattr(OutputFolder, "_write", lambda *_: None)
    with pytest.raises(OSError, match=rf"{tmp_path}.* could not be written: No space left on device"):
        trainer.train()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("checkpoint")] == ["checkpoint-1"]
    assert sorted(path.name for path in (tmp_path / ".lorakit").iterdir()) == ["train.json"]


def test_the_newest_two_are_kept_and_later_ones_of_another_try_go(tmp_path: Path) -> None:
    trainer = trainer_of("causal", tmp_path, save_strategy="steps", save_steps=1, max_steps=4)
    for step in (2, 9):
        (tmp_path / f"checkpoint-{step}").mkdir()
    trainer.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]
    assert checkpoints(tmp_path)[-1].joinpath("run.json").read_text() == '{"settings": {}}\n'
