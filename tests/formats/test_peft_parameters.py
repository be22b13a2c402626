"""PEFT's folder for weights without a layer that is called: experts in PEFT itself, attention by its tensors."""

import json
import warnings
from pathlib import Path

import peft
import pytest
import safetensors.torch
import torch
from torch import nn

import lorakit
import models
from in_peft import load_in_peft
from lorakit.formats import peft as peft_format
from models import train_a_little

TOKENS = torch.arange(14).view(2, 7)
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@pytest.mark.parametrize("make", [models.qwen_moe, models.gpt_oss])
@pytest.mark.parametrize(
    "targets", [EXPERTS, EXPERTS[::-1], ["down_proj"], [*EXPERTS, "q_proj"], ["*q_proj", "gate_up_proj"]]
)
def test_problem_29_peft_reads_experts_and_back(make, targets: list[str], tmp_path: Path) -> None:
    model = make()
    lorakit.attach(model, targets, rank=3, alpha=5, rank_pattern={"*.1.*": 2})
    train_a_little(model)
    expected = model(TOKENS).logits.detach()
    assert (expected - make()(TOKENS).logits).abs().max() > 0.003
    lorakit.save(model, tmp_path / "ours")
    # PEFT warns that it ignores the ranks of parameters, but it uses them.
    theirs = load_in_peft(make(), tmp_path / "ours", ignored="The following rank_pattern keys")
    torch.testing.assert_close(theirs(TOKENS).logits, expected, atol=1e-5, rtol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(str(tmp_path / "theirs"))
    again = make()
    lorakit.load(again, tmp_path / "theirs")
    torch.testing.assert_close(again(TOKENS).logits, expected, atol=0, rtol=0)


def test_the_configuration_of_experts_and_what_info_knows_of_it(tmp_path: Path) -> None:
    model = models.qwen_moe()
    lorakit.attach(model, [*EXPERTS, "q_proj"], rank=2)
    lorakit.save(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_parameters"] == ["experts.down_proj", "experts.gate_up_proj"]
    assert config["target_modules"] == ["q_proj"]
    tensors = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    first = "base_model.model.model.layers.0.mlp.experts"
    assert tensors[f"{first}.base_layer.lora_A.weight"].shape == (4 * 2, 32)  # gate_up_proj: experts·r, in
    assert tensors[f"{first}.lora_B.weight"].shape == (32, 2 * 4)  # down_proj: out, r·experts
    without_a_model = peft_format.read(tmp_path).updates
    assert {name.partition("layers.0.")[2] for name in without_a_model if "layers.0." in name} == {
        "self_attn.q_proj",
        "mlp.experts.gate_up_proj",
        "mlp.experts.down_proj",
    }
    assert {update.kind for update in without_a_model.values()} == {"linear", "experts"}


class Pooler(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.attention(x, x, x)[0])


def pooler() -> nn.Module:
    torch.manual_seed(0)
    return Pooler().eval()


@pytest.mark.parametrize("targets", [["in_proj_weight"], ["in_proj_weight", "head"]])
def test_attention_without_its_output_in_peft(targets: list[str], tmp_path: Path) -> None:
    model, x = pooler(), torch.randn(2, 5, 16)
    lorakit.attach(model, targets, rank=2)
    train_a_little(model)
    lorakit.save(model, tmp_path)
    torch.testing.assert_close(load_in_peft(pooler(), tmp_path)(x), model(x), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("bias", ["none", "lora_only"])
def test_attention_made_in_peft_is_read_as_the_update_it_is(bias: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["attention"], init_lora_weights=False, bias=bias)
        theirs = peft.get_peft_model(pooler(), config).eval()
        theirs.save_pretrained(str(tmp_path / "theirs"))
    model, x = pooler(), torch.randn(2, 5, 16)
    lorakit.load(model, tmp_path / "theirs")
    layer = theirs.base_model.model.attention
    expected = pooler()
    with torch.no_grad():
        for weight, lora in (
            (expected.attention.in_proj_weight, layer),
            (expected.attention.out_proj.weight, layer.base_layer.out_proj),
        ):
            weight += 3 * lora.lora_B["default"].weight @ lora.lora_A["default"].weight
    torch.testing.assert_close(model(x), expected(x), atol=1e-5, rtol=1e-5)
    lorakit.save(model, tmp_path / "ours")
    ours, original = (
        safetensors.torch.load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs")
    )
    # PEFT's "lora_only" leaves the input's bias out.
    added = set() if bias == "none" else {"base_model.model.attention.base_layer.in_proj_bias"}
    assert ours.keys() - added == original.keys()
    assert all(torch.equal(tensor, ours[key]) for key, tensor in original.items())
    assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["target_modules"] == ["attention"]


def test_problem_01_peft_applies_the_output_twice() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(r=2, target_modules=["attention"], init_lora_weights=False)
        theirs = peft.get_peft_model(pooler(), config).eval()
    x = torch.randn(2, 5, 16)
    unmerged = theirs(x)
    expected = pooler()
    layer = theirs.base_model.model.attention
    with torch.no_grad():
        expected.attention.in_proj_weight += layer.get_delta_weight("default")
        expected.attention.out_proj.weight += layer.base_layer.out_proj.get_delta_weight("default")
    assert not torch.allclose(unmerged, expected(x), atol=1e-3)


def test_what_peft_cannot_hold_of_an_attention_is_refused(tmp_path: Path) -> None:
    model = pooler()
    lorakit.attach(model, "out_proj", rank=2)
    with pytest.raises(ValueError, match="PEFT adapts an attention's out_proj with its in_proj_weight only"):
        lorakit.save(model, tmp_path)
    lorakit.detach(model)
    lorakit.attach(model, "attention", rank=2, rank_pattern={"out_proj": 3})
    with pytest.raises(ValueError, match="PEFT's folder holds one rank and alpha for an attention"):
        lorakit.save(model, tmp_path)
    alone = nn.MultiheadAttention(8, 2)
    lorakit.attach(alone, "in_proj_weight", rank=2)
    with pytest.raises(ValueError, match="PEFT cannot adapt a parameter of the whole model"):
        lorakit.save(alone, tmp_path)
