"""Parameters for an optimizer: all that is trained, and LoRA+'s two groups as PEFT makes them."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import nn

import lorakit
import models


def rates(groups: list[dict[str, object]], model: nn.Module) -> dict[str, float]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(parameter)]: group["lr"] for group in groups for parameter in group["params"]}  # type: ignore[misc,attr-defined]


def test_parameters_are_those_that_are_trained() -> None:
    model = models.llama()
    with pytest.raises(ValueError, match="LlamaForCausalLM has nothing to train"):
        for parameter in model.parameters():
            parameter.requires_grad = False
        lorakit.parameters(model)
    lorakit.attach(model, "q_proj", rank=2, also_train="lm_head")
    assert {id(p) for p in lorakit.parameters(model)} == {id(p) for p in model.parameters() if p.requires_grad}
    assert sum(p.numel() for p in lorakit.parameters(model)) == 2 * 2 * (32 + 32) + model.lm_head.weight.numel()


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")
def test_the_groups_are_those_of_the_papers_optimizer() -> None:
    from peft.optimizers import create_loraplus_optimizer

    ours, theirs = models.llama(), models.llama()
    lorakit.attach(ours, ["q_proj", "v_proj"], rank=2)
    wrapped = peft.get_peft_model(theirs, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    optimizer = create_loraplus_optimizer(wrapped, torch.optim.AdamW, lr=1e-4, loraplus_lr_ratio=8.0)
    expected = {
        name.removeprefix("base_model.model.").replace(".default.weight", ""): rate
        for name, rate in rates(optimizer.param_groups, wrapped).items()
    }
    assert rates(lorakit.parameter_groups(ours, 1e-4, ratio=8), ours) == pytest.approx(expected)
    assert set(expected.values()) == {1e-4, 8e-4}


def test_an_embeddings_factors_have_one_rate() -> None:
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 4))
    lorakit.attach(model, ["0", "1"], rank=2)
    assert rates(lorakit.parameter_groups(model, 1.0, weight_decay=0.1), model) == {
        "0.lora_A": 1.0,
        "0.lora_B": 1.0,
        "1.lora_A": 1.0,
        "1.lora_B": 16.0,
    }
    assert {group["weight_decay"] for group in lorakit.parameter_groups(model, 1.0, weight_decay=0.1)} == {0.1}
    torch.optim.AdamW(lorakit.parameter_groups(model, 1e-3))
