"""TRL's trainers as they are, with a view as their model: what they compute is what they compute with PEFT's model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaForCausalLM, LlamaForSequenceClassification
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)

import lorakit
from conftest import tiny_tokenizer
from lorakit.training.gradient_checkpointing import checkpointing
from models import llama_config
from quantised import four_bits

pytestmark = [
    pytest.mark.usefixtures("few_objects"),
    # PEFT and TRL call transformers by old names.
    pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing.*` is deprecated:FutureWarning"),
]
PROMPTS = [
    "turn the light on",
    "turn it off",
    "the user",
    "a system turn",
    "light off",
    "user turn",
    "on and off",
    "it",
]
COLUMNS: dict[str, Callable[[str], Any]] = {
    "prompt": lambda prompt: prompt,
    "text": lambda prompt: f"{prompt} now",
    "chosen": lambda prompt: " on",
    "rejected": lambda prompt: " off now",
    "completion": lambda prompt: " on it",
    "label": lambda prompt: len(prompt) % 2 == 0,
}
REFERENCED = ("dpo", "kto", "grpo")  # what a loss of theirs compares the model with


def variety(completions: list[str], **more: Any) -> list[float]:
    return [float(len(set(completion))) for completion in completions]


TRAINERS: dict[str, tuple[Any, Any, tuple[str, ...], dict[str, Any], dict[str, Any]]] = {
    "sft": (SFTTrainer, SFTConfig, ("text",), {}, {}),
    "dpo": (DPOTrainer, DPOConfig, ("prompt", "chosen", "rejected"), {}, {}),
    "kto": (
        KTOTrainer,
        KTOConfig,
        ("prompt", "completion", "label"),
        dict(desirable_weight=1.0, undesirable_weight=1.0),
        {},
    ),
    "grpo": (
        GRPOTrainer,
        GRPOConfig,
        ("prompt",),
        dict(beta=0.1, num_generations=2, max_completion_length=6),
        dict(reward_funcs=variety),
    ),
    "reward": (RewardTrainer, RewardConfig, ("prompt", "chosen", "rejected"), {}, {}),
}
BY_TRAINER = pytest.mark.parametrize("kind", TRAINERS)


def base(kind: str) -> nn.Module:
    torch.manual_seed(0)
    config = llama_config(tiny_tokenizer(), num_labels=1)
    model: nn.Module = (LlamaForSequenceClassification if kind == "reward" else LlamaForCausalLM)(config)
    return model


def configuration(kind: str, **settings: Any) -> peft.LoraConfig:
    usual: dict[str, Any] = dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"])
    return peft.LoraConfig(**usual | settings, task_type="SEQ_CLS" if kind == "reward" else "CAUSAL_LM")


def trainer_of(kind: str, model: Any, folder: Path, **settings: Any) -> Any:
    trainer, arguments, columns, own, more = TRAINERS[kind]
    usual: dict[str, Any] = dict(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        max_steps=3,
        learning_rate=1e-2,
        weight_decay=0.1,
        logging_steps=1,
        save_steps=2,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        dataloader_pin_memory=False,
        **checkpointing(False),
    )
    rows = Dataset.from_list([{name: COLUMNS[name](prompt) for name in columns} for prompt in PROMPTS])
    return trainer(
        model=model,
        args=arguments(**usual | own | settings),
        train_dataset=rows,
        processing_class=tiny_tokenizer(),
        **more,
    )


def started(kind: str, folder: Path, make: Callable[[str], nn.Module] = base) -> tuple[Any, Any]:
    """PEFT's model, and a view of a model of lorakit's with the same factors."""
    theirs = peft.get_peft_model(make(kind), configuration(kind))
    theirs.save_pretrained(folder)
    model = make(kind)
    lorakit.load(model, folder)
    return theirs, lorakit.peft_view(model)


def losses(trainer: Any) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def saved(folder: Path) -> dict[str, list[str]]:
    """The files of tensors by folder, without those of the trainer's own state."""
    return {
        path.parent.relative_to(folder).as_posix(): [path.name]
        for path in sorted(folder.rglob("*"))
        if path.suffix in (".safetensors", ".bin") and path.name != "training_args.bin"
    }


def assert_close(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-5)


@BY_TRAINER
def test_a_view_is_trained_as_peft_s_model_is(kind: str, tmp_path: Path) -> None:
    theirs, view = started(kind, tmp_path / "start")
    weights = {name: p.detach().clone() for name, p in view.named_parameters() if "lora_" not in name}
    found = {}
    for name, model in (("peft", theirs), ("view", view)):
        trainer = trainer_of(kind, model, tmp_path / name)
        assert trainer.model is model and getattr(trainer, "ref_model", None) is None
        trainer.train()
        trainer.save_model(str(tmp_path / name / "final"))
        found[name] = losses(trainer)
        assert len(found[name]) == 3 and len(set(found[name])) > 1
    assert found["view"] == pytest.approx(found["peft"], rel=1e-4, abs=1e-6)
    assert saved(tmp_path / "view") == saved(tmp_path / "peft")
    folders = {folder for folder, files in saved(tmp_path / "view").items() if "adapter_model.safetensors" in files}
    assert {"checkpoint-2", "final"} <= folders
    for folder in folders:
        one, two = (load_file(tmp_path / name / folder / "adapter_model.safetensors") for name in ("peft", "view"))
        assert_close(one, two)
    for name, parameter in view.named_parameters():  # the base is not trained
        if name in weights and "modules_to_save" not in name:
            assert torch.equal(parameter, weights[name])


def test_activations_may_be_computed_again(tmp_path: Path) -> None:
    """TRL's default. The reference is computed between the forward and the backward pass, with another adapter."""
    found = []
    for name, model in zip(("peft", "view"), started("dpo", tmp_path / "start"), strict=True):
        trainer = trainer_of("dpo", model, tmp_path / name, **checkpointing(True))
        trainer.train()
        found.append(losses(trainer))
    assert found[1] == pytest.approx(found[0], rel=1e-4)


@BY_TRAINER
def test_a_run_goes_on_from_its_checkpoint_exactly(kind: str, tmp_path: Path) -> None:
    _, view = started(kind, tmp_path / "start")
    whole = trainer_of(kind, view, tmp_path / "run")
    whole.train()
    _, again = started(kind, tmp_path / "start")
    resumed = trainer_of(kind, again, tmp_path / "run")
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert losses(resumed)[-1] == losses(whole)[-1]
    for (name, one), (other, two) in zip(view.named_parameters(), again.named_parameters(), strict=True):
        assert name == other and torch.equal(one, two)


@pytest.mark.parametrize("kind", REFERENCED)
def test_the_reference_is_the_base_model_and_no_second_one_is_loaded(kind: str, tmp_path: Path) -> None:
    """A new adapter does nothing, so its copy, with which TRL computes the reference, is the base model."""
    _, view = started(kind, tmp_path / "start")
    trainer = trainer_of(kind, view, tmp_path / "run")
    trainer.train()
    assert trainer.ref_model is None
    assert {name for name, parameter in view.named_parameters() if ".ref." in name and parameter.requires_grad} == set()
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        expected = base(kind).eval()(input_ids=ids).logits
        view.eval()
        trained = view(input_ids=ids).logits
        view.set_adapter("ref")
        assert torch.equal(view(input_ids=ids).logits, expected)
        view.set_adapter("default")
        assert torch.equal(view(input_ids=ids).logits, trained)
        assert (trained - expected).abs().max() > 1e-3
        with view.disable_adapter():
            assert torch.equal(view(input_ids=ids).logits, expected)


def test_the_reference_of_a_trained_adapter_is_its_copy(tmp_path: Path) -> None:
    _, view = started("dpo", tmp_path / "start")
    with torch.no_grad():
        for parameter in view.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        before = view.eval()(input_ids=ids).logits
    trainer = trainer_of("dpo", view, tmp_path / "run")
    trainer.train()
    with torch.no_grad():
        assert (view.eval()(input_ids=ids).logits - before).abs().max() > 1e-3
        view.set_adapter("ref")
        assert torch.equal(view(input_ids=ids).logits, before)


def test_a_head_with_an_adapter_is_trained_by_sft(tmp_path: Path) -> None:
    """TRL multiplies by `lm_head.weight` itself. With PEFT it refuses such a head, which it would not train."""
    view = lorakit.get_peft_model(base("sft"), configuration("sft", target_modules=["q_proj", "lm_head"]))
    trainer = trainer_of("sft", view, tmp_path)
    head = {name: p.detach().clone() for name, p in view.named_parameters() if "lm_head.lora" in name}
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(view, dict(batch))
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in view.named_parameters() if p.grad is not None}
    view.zero_grad()
    logits = view(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    by_hand = F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100)
    by_hand.backward()
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-5)
    assert gradients.keys() == {name for name, p in view.named_parameters() if p.requires_grad}
    assert_close(gradients, {name: p.grad for name, p in view.named_parameters() if p.grad is not None})
    view.zero_grad()
    trainer.train()
    assert all((view.get_parameter(name) - before).abs().max() > 1e-3 for name, before in head.items())
    with pytest.raises(ValueError, match="lm_head"):
        trainer_of("sft", peft.get_peft_model(base("sft"), configuration("sft", target_modules=["lm_head"])), tmp_path)


def on_four_bits(kind: str) -> nn.Module:
    model = base(kind)
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name != "lm_head":
            model.set_submodule(name, four_bits("nf4")(module))
    return model


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_a_quantised_base_is_trained_as_with_peft(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    theirs, view = started(kind, tmp_path / "start", on_four_bits)
    found = []
    for name, model in (("peft", theirs), ("view", view)):
        trainer = trainer_of(kind, model, tmp_path / name)
        trainer.train()
        found.append(losses(trainer))
    assert found[1] == pytest.approx(found[0], rel=1e-4, abs=1e-6)
    one, two = (load_file(tmp_path / name / "checkpoint-3/adapter_model.safetensors") for name in ("peft", "view"))
    assert_close(one, two)
