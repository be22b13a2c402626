"""The first step of training fails if adapted layers are not used. Also with trainers that are not lorakit's."""

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import lorakit
import models

ROWS = [{"x": torch.full((4,), float(i)), "labels": torch.tensor(0.0)} for i in range(4)]
TEXTS = [{"text": "turn the light on and off"}] * 4


class Regression(nn.Module):
    """A model that calls only the layers in `order`."""

    def __init__(self, order: str) -> None:
        super().__init__()
        self.order = order.split()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.tower = nn.Sequential(nn.Linear(4, 4))

    def forward(self, x: Tensor) -> SimpleNamespace:
        for name in self.order:
            x = getattr(self, name)(x)
        return SimpleNamespace(logits=x.sum(-1, keepdim=True))


def arguments(folder: Path, cls=None, **more):
    from transformers import TrainingArguments

    settings = dict(
        output_dir=str(folder), max_steps=2, per_device_train_batch_size=2, learning_rate=0.1, warmup_steps=0,
        use_cpu=True, report_to="none", save_strategy="no", dataloader_pin_memory=False, disable_tqdm=True, **more,
    )  # fmt: skip
    return (cls or TrainingArguments)(**settings)


def train_regression(order: str, folder: Path) -> nn.Module:
    from lorakit.formats.folder import OutputFolder
    from lorakit.training.start import TRAINING
    from lorakit.training.trainers import ClassifierTrainer

    model = Regression(order)
    lorakit.attach(model, rank=2)
    out = OutputFolder(folder, TRAINING)
    ClassifierTrainer(
        model=model, args=arguments(folder, remove_unused_columns=False), train_dataset=ROWS, folder=out, record={}
    ).train()
    return model


def test_a_layer_that_the_first_step_passes_over_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"1 adapted layers of Regression do nothing.*\n  b: .*\n.*Name other targets"):
        train_regression("a", tmp_path)


def test_an_idle_tower_does_not_stop_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = train_regression("a b", tmp_path)
    assert "note: in the first step 1 adapted layers lie in parts of Regression" in capsys.readouterr().out
    assert model.a.lora_B.abs().max() > 0 and model.tower[0].lora_B.abs().max() == 0
    with pytest.warns(UserWarning, match=r"not used:\n  tower.0"):
        lorakit.save(model, tmp_path)


def tiny(folder: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("generated_before", [False, True])
def test_trls_fused_head_trains_an_adapter_on_the_head(tiny_lm: Path, tmp_path: Path, generated_before: bool) -> None:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model, tokenizer = tiny(tiny_lm)
    lorakit.attach(model, ["q_proj", "lm_head"], rank=2)
    if generated_before:
        model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2, do_sample=False)
    trainer = SFTTrainer(
        model=model, args=arguments(tmp_path, SFTConfig, max_length=16), train_dataset=Dataset.from_list(TEXTS),
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    assert model.lm_head.lora_B.abs().max() > 0
    assert lorakit.diagnose(model).silent == ()


@pytest.mark.filterwarnings("ignore")
def test_dpo_with_the_base_model_as_its_reference(tiny_lm: Path, tmp_path: Path) -> None:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    model, tokenizer = tiny(tiny_lm)
    reference = copy.deepcopy(model)
    lorakit.attach(model, rank=2)
    models.train_a_little(model)
    rows = [{"prompt": "turn", "chosen": " the light on", "rejected": " off"}] * 4
    trainer = DPOTrainer(
        model=model, ref_model=reference, args=arguments(tmp_path, DPOConfig, logging_steps=1),
        train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    first = trainer.state.log_history[0]
    assert first["rewards/chosen"] != 0  # the reference is the base, which the adapter differs from
    assert all(p.grad is None for p in reference.parameters())
