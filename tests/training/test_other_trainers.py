"""Trainers of other libraries on models that lorakit adapted: what they write, and that a run goes on exactly.

Each run is stopped after some steps and continued on a new model by a new trainer. Its tensors then have to be those of
a run that nothing stopped, bit for bit.
"""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate
import pytest
import torch
from datasets import Dataset
from safetensors import safe_open
from torch import Tensor, nn
from transformers import (
    DataCollatorWithPadding,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

import lorakit
import models
from conftest import tiny_tokenizer
from elsewhere import ELSEWHERE
from in_peft import load_in_peft
from lorakit.training.gradient_checkpointing import checkpointing

pytestmark = pytest.mark.usefixtures("few_objects")
ADAPTER = {"adapter_config.json", "adapter_model.safetensors", "adapter_state.safetensors"}


class Classifying(lorakit.TrainerMixin, Trainer):
    pass


class Translating(lorakit.TrainerMixin, Seq2SeqTrainer):
    pass


class Finetuning(lorakit.TrainerMixin, SFTTrainer):
    pass


class StopAt(TrainerCallback):
    """An interruption: the run ends after a step, with a checkpoint."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step == self.step


def rows(columns: str) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for index in range(12):
        ids = torch.randint(4, 60, (int(torch.randint(3, 9, (1,), generator=generator)),), generator=generator).tolist()
        made.append({"input_ids": ids, "labels": index % 3 if columns == "class" else ids})
    return made


def t5() -> nn.Module:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0, pad_token_id=0
    )
    return T5ForConditionalGeneration(config).eval()


def trainer_of(kind: str, folder: Path, more: list[TrainerCallback] | None = None, **settings: Any) -> Any:
    """A trainer of six steps with a checkpoint after each, on a tiny model with dropout: random states count."""
    usual: dict[str, Any] = dict(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
        save_steps=1,
        logging_steps=1,
        per_device_train_batch_size=2,
        max_steps=6,
        learning_rate=0.01,
        dataloader_pin_memory=False,
        **checkpointing(False),
    )
    usual.update(settings)
    common: dict[str, Any] = dict(callbacks=more or [], processing_class=tiny_tokenizer())
    if kind == "classes":
        model = models.bert()
        lorakit.attach(model, "query", rank=2, dropout=0.1, also_train=["classifier"])
        common |= dict(data_collator=DataCollatorWithPadding(tiny_tokenizer()))
        made = Dataset.from_list(rows("class"))
        return Classifying(model, TrainingArguments(**usual), train_dataset=made, eval_dataset=made, **common)
    if kind == "seq2seq":
        from transformers import DataCollatorForSeq2Seq

        model = t5()
        lorakit.attach(model, ["q", "v"], rank=2, dropout=0.1, dora=True)
        common |= dict(data_collator=DataCollatorForSeq2Seq(tiny_tokenizer()))
        made = Dataset.from_list(rows("tokens"))
        return Translating(model, Seq2SeqTrainingArguments(**usual), train_dataset=made, eval_dataset=made, **common)
    model = models.llama()
    lorakit.attach(model, ["q_proj", "down_proj", "lm_head"], rank=2, dropout=0.1, init="pissa")
    made = Dataset.from_list([{"input_ids": row["input_ids"]} for row in rows("tokens")])
    return Finetuning(model, SFTConfig(**usual, max_length=16), train_dataset=made, eval_dataset=made, **common)


KINDS = ("classes", "seq2seq", "sft")


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def tensors_in(folder: Path) -> Iterator[str]:
    for path in folder.rglob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            yield from file.keys()


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_goes_on_equals_one_that_nothing_stopped(kind: str, tmp_path: Path) -> None:
    whole = trainer_of(kind, tmp_path / "whole")
    before = trained(whole.model)
    whole.train()
    assert not any(torch.equal(value, before[name]) for name, value in trained(whole.model).items())

    stopped = trainer_of(kind, tmp_path / "stopped", [StopAt(3)])
    stopped.train()
    assert stopped.state.global_step == 3 and not same(trained(stopped.model), trained(whole.model))
    resumed = trainer_of(kind, tmp_path / "stopped")
    resumed.train(resume_from_checkpoint=True)
    assert same(trained(resumed.model), trained(whole.model))
    moments, expected = (trainer.optimizer.state_dict()["state"] for trainer in (resumed, whole))
    assert all(torch.equal(moments[i]["exp_avg_sq"], expected[i]["exp_avg_sq"]) for i in expected)
    losses = [[entry["loss"] for entry in trainer.state.log_history if "loss" in entry] for trainer in (resumed, whole)]
    assert losses[0] == losses[1] and len(losses[0]) == 6


@pytest.mark.parametrize("kind", KINDS)
def test_no_base_weight_is_written(kind: str, tmp_path: Path) -> None:
    trainer = trainer_of(kind, tmp_path, max_steps=2)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    folders = [tmp_path / name for name in ("checkpoint-1", "checkpoint-2", "saved")]
    for folder in folders:
        names = {path.name for path in folder.iterdir()}
        assert {*ADAPTER, "tokenizer.json", "training_args.bin"} <= names
        assert not names & {"model.safetensors", "pytorch_model.bin", "config.json"}
    assert {path.name for path in tmp_path.glob("*.safetensors")} == set()
    allowed = ("lora_", "classifier")
    assert [name for name in tensors_in(tmp_path) if not any(part in name for part in allowed)] == []


@pytest.mark.parametrize("kind", ["classes", "seq2seq"])
def test_peft_reads_what_save_model_writes(kind: str, tmp_path: Path) -> None:
    trainer = trainer_of(kind, tmp_path, max_steps=2)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    theirs = load_in_peft(models.bert() if kind == "classes" else t5(), tmp_path / "saved")
    inputs = {"input_ids": torch.arange(4, 12)[None]}
    if kind == "seq2seq":
        inputs["decoder_input_ids"] = torch.arange(3)[None]
    found = trainer.model.eval()(**inputs).logits
    torch.testing.assert_close(found, theirs(**inputs).logits, rtol=1e-5, atol=1e-6)


class Noting(TrainerCallback):
    """The trained tensors after each step."""

    def __init__(self) -> None:
        self.after: dict[int, dict[str, Tensor]] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        self.after[state.global_step] = trained(model)


@pytest.mark.parametrize("kind", KINDS)
def test_the_best_adapter_is_loaded_at_the_end(kind: str, tmp_path: Path) -> None:
    noting, scores = Noting(), {1: 0.1, 2: 0.9, 3: 0.4, 4: 0.2}
    settings: dict[str, Any] = dict(eval_strategy="steps", eval_steps=1, load_best_model_at_end=True, max_steps=4)
    trainer = trainer_of(kind, tmp_path, [noting], metric_for_best_model="score", greater_is_better=True, **settings)
    trainer.evaluate = lambda **_: {"eval_score": scores[trainer.state.global_step]}
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    assert same(trained(trainer.model), noting.after[2]) and not same(noting.after[2], noting.after[4])


@pytest.mark.parametrize("kind", ["classes", "sft"])
def test_a_checkpoint_of_peft_alone_is_refused(kind: str, tmp_path: Path) -> None:
    """PiSSA's factors in it have twice the rank: with the optimizer's state, AdamW ended in a segmentation fault."""
    trainer_of(kind, tmp_path, [StopAt(2)]).train()
    (tmp_path / "checkpoint-2/adapter_state.safetensors").unlink()
    with pytest.raises(lorakit.LoraError, match=r"checkpoint-2 has no adapter_state\.safetensors.*call lorakit\.load"):
        trainer_of(kind, tmp_path).train(resume_from_checkpoint=True)


def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path) -> None:
    trainer_of("classes", tmp_path, max_steps=1).train()
    other = models.bert()
    lorakit.attach(other, ["query", "key"], rank=2)
    trainer = Classifying(other, trainer_of("classes", tmp_path).args, train_dataset=Dataset.from_list(rows("class")))
    said = r"checkpoint-1/adapter_state.safetensors belongs to an adapter of other settings; .*key\.lora_A differs"
    with pytest.raises(lorakit.LoraError, match=said):
        trainer.train(resume_from_checkpoint=True)


def test_what_the_mixin_cannot_do_is_refused(tmp_path: Path) -> None:
    arguments = trainer_of("classes", tmp_path).args
    with pytest.raises(lorakit.LoraError, match=r"BertForSequenceClassification has no adapter\. Call lorakit\.attach"):
        Classifying(models.bert(), arguments)
    with pytest.raises(lorakit.LoraError, match=r"Name the mixin first: class Wrong\(lorakit\.TrainerMixin, Trainer\)"):
        type("Wrong", (Trainer, lorakit.TrainerMixin), {})

    for flag, name in (("is_fsdp_enabled", "FSDP"), ("is_deepspeed_enabled", "DeepSpeed")):

        class Parted:
            model = models.bert()

            def __init__(self) -> None:
                setattr(self, flag, True)  # noqa: B023

        class Trains(lorakit.TrainerMixin, Parted):
            pass

        with pytest.raises(lorakit.LoraError, match=rf"under {name}, transformers' Trainer writes checkpoints of the"):
            Trains()


def test_a_layer_that_does_nothing_stops_the_run_in_its_first_step(tmp_path: Path) -> None:
    trainer = trainer_of("classes", tmp_path)
    for layer in trainer.model.bert.encoder.layer:
        lorakit.attach(layer, "value", rank=2)
        layer.attention.self.value.forward = nn.Linear(32, 32).forward  # it does not compute with its own weight
    with pytest.raises(lorakit.LoraError, match="2 adapted layers of BertForSequenceClassification do nothing"):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))


# --- accelerate ---


class Loop:
    """A loop of one's own on accelerate, on a model with dropout beside a plain one and a second adapted one."""

    def __init__(self) -> None:
        self.accelerator = accelerate.Accelerator(cpu=True)
        lorakit.hook_accelerator(self.accelerator)
        self.model, self.plain, self.second = models.bert(), nn.Linear(3, 1), models.conv_net()
        lorakit.attach(self.model, "query", rank=2, dropout=0.1, also_train=["classifier"])
        lorakit.attach(self.second, "6", rank=2, init="pissa")
        parts = (self.model, self.plain, self.second)
        learnt = [value for part in parts for value in part.parameters() if value.requires_grad]
        optimizer = torch.optim.AdamW(learnt, 0.01)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=6)
        *_, self.optimizer, self.schedule = self.accelerator.prepare(*parts, optimizer, schedule)

    def run(self, *steps: int) -> None:
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            ids = torch.randint(4, 60, (2, 8), generator=generator)
            logits = self.model.train()(input_ids=ids).logits
            pixels = torch.rand(2, 3, 9, 9, generator=generator)
            loss = self.plain(logits).square().mean() + self.second.train()(pixels).square().mean()
            self.accelerator.backward(loss)
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()

    def trained(self) -> list[dict[str, Tensor]]:
        return [trained(part) for part in (self.model, self.plain, self.second)]


def test_a_loop_on_accelerate_goes_on_exactly_from_the_adapter_alone(tmp_path: Path) -> None:
    torch.manual_seed(1)
    whole = Loop()
    torch.manual_seed(2)
    whole.run(*range(6))
    torch.manual_seed(1)
    stopped = Loop()
    torch.manual_seed(2)
    stopped.run(*range(3))
    stopped.accelerator.save_state(str(tmp_path))
    assert ADAPTER | {"model.safetensors"} <= {path.name for path in tmp_path.iterdir()}
    assert {path.name for path in (tmp_path / "adapter_2").iterdir()} == ADAPTER
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert set(file.keys()) == {"weight", "bias"}  # the plain model's
    adapters = [name for name in tensors_in(tmp_path) if name not in ("weight", "bias")]
    assert [name for name in adapters if "lora_" not in name and "classifier" not in name] == []

    torch.manual_seed(3)
    resumed = Loop()
    held = trained_ids(resumed.model)
    resumed.accelerator.load_state(str(tmp_path))
    assert trained_ids(resumed.model) == held  # the optimizer has these parameters
    resumed.run(*range(3, 6))
    assert all(same(*parts) for parts in zip(resumed.trained(), whole.trained(), strict=True))
    assert resumed.schedule.get_last_lr() == whole.schedule.get_last_lr()
    assert not any(same(*parts) for parts in zip(stopped.trained(), whole.trained(), strict=True))


def trained_ids(model: nn.Module) -> list[int]:
    return [id(value) for value in model.parameters() if value.requires_grad]


def test_states_that_accelerate_writes_whole_are_refused() -> None:
    for kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        with pytest.raises(lorakit.LoraError, match=f"under {kind}, accelerate writes states of the whole model"):
            lorakit.hook_accelerator(SimpleNamespace(distributed_type=accelerate.DistributedType[kind]))


# --- sentence-transformers ---


TEXTS = ["turn the light on", "turn the light off", "who is the user", "the system and the assistant"]


def sentence_trainer(folder: Path, more: list[TrainerCallback] | None = None, **settings: Any) -> Any:
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.sentence_transformer import losses

    class Embedding(lorakit.TrainerMixin, SentenceTransformerTrainer):
        pass

    model: Any = ELSEWHERE["sentence-transformers"].make()
    lorakit.attach(model, ["query", "value"], rank=2, init="pissa")
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_steps=1,
        max_steps=6,
        per_device_train_batch_size=2,
        learning_rate=0.01,
        dataloader_pin_memory=False,
        **checkpointing(False),
        **settings,
    )
    pairs = Dataset.from_dict({"anchor": TEXTS, "positive": TEXTS[1:] + TEXTS[:1]})
    loss = losses.MultipleNegativesRankingLoss(model)
    return Embedding(model, arguments, train_dataset=pairs, eval_dataset=pairs, loss=loss, callbacks=more or [])


def test_a_sentence_transformer_goes_on_exactly_and_gives_the_same_embeddings_again(tmp_path: Path) -> None:
    whole = sentence_trainer(tmp_path / "whole")
    base = whole.model.encode(TEXTS)
    whole.train()
    sentence_trainer(tmp_path / "stopped", [StopAt(3)]).train()
    resumed = sentence_trainer(tmp_path / "stopped")
    resumed.train(resume_from_checkpoint=True)
    assert same(trained(resumed.model), trained(whole.model))
    assert [name for name in tensors_in(tmp_path) if "lora_" not in name] == []

    expected = whole.model.encode(TEXTS)
    assert abs(expected - base).max() > 0.01
    whole.save_model(str(tmp_path / "saved"))
    again: Any = ELSEWHERE["sentence-transformers"].make()
    lorakit.load(again, tmp_path / "saved")
    assert (again.encode(TEXTS) == expected).all()


def test_the_best_adapter_of_a_sentence_transformer_is_loaded(tmp_path: Path) -> None:
    """sentence-transformers' own way fails with a line in the log alone, and keeps the last one."""
    noting, scores = Noting(), {step: -abs(step - 2) for step in range(1, 7)}
    settings: dict[str, Any] = dict(eval_strategy="steps", eval_steps=1, load_best_model_at_end=True)
    trainer = sentence_trainer(tmp_path, [noting], metric_for_best_model="score", greater_is_better=True, **settings)
    trainer.evaluate = lambda **_: {"eval_score": scores[trainer.state.global_step]}
    trainer.train()
    assert same(trained(trainer.model), noting.after[2]) and not same(noting.after[2], noting.after[6])


def test_an_adapted_sentence_transformer_in_files_for_others(tmp_path: Path) -> None:
    """Baked, it is saved by its own `save`. Its transformer's adapter alone is what PEFT reads."""
    from sentence_transformers import SentenceTransformer

    trainer = sentence_trainer(tmp_path / "run")
    trainer.train()
    model = trainer.model
    expected = model.encode(TEXTS)
    lorakit.save(model[0].model, tmp_path / "adapter")
    plain: Any = ELSEWHERE["sentence-transformers"].make()
    plain[0].model = load_in_peft(plain[0].model, tmp_path / "adapter")
    torch.testing.assert_close(plain.encode(TEXTS), expected, rtol=1e-5, atol=1e-6)

    lorakit.bake(model)
    model.save(str(tmp_path / "baked"))
    baked = SentenceTransformer(str(tmp_path / "baked"), device="cpu").encode(TEXTS)
    torch.testing.assert_close(baked, expected, rtol=1e-5, atol=1e-6)
