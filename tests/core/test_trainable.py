"""loralib's two helpers, by structure."""

import pytest
import torch
from torch import nn

import lorakit


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lora_head = nn.Linear(4, 4)  # a name that only looks like an adapter's
        self.unbiased_gate = nn.Parameter(torch.ones(4))
        self.register_buffer("attn_bias", torch.zeros(4))
        self.proj = lorakit.Linear(4, 4, r=2)
        self.plain = nn.Linear(4, 4)
        self.attn = nn.MultiheadAttention(4, 2)


def trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_problem_18_names_are_matched_by_structure() -> None:
    model = Model()
    lorakit.mark_only_lora_as_trainable(model)
    assert trainable(model) == {"proj.lora_A", "proj.lora_B"}
    lorakit.mark_only_lora_as_trainable(model, bias="lora_only")
    assert trainable(model) == {"proj.lora_A", "proj.lora_B", "proj.bias"}
    lorakit.mark_only_lora_as_trainable(model, bias="all")
    assert trainable(model) == {
        *("proj.lora_A", "proj.lora_B", "proj.bias", "lora_head.bias", "plain.bias"),
        *("attn.in_proj_bias", "attn.out_proj.bias"),
    }
    assert set(lorakit.lora_state_dict(model)) == {"proj.lora_A", "proj.lora_B"}
    assert set(lorakit.lora_state_dict(model, bias="all")) == trainable(model)


def test_problem_18_loralib_fails_the_same_test() -> None:
    loralib = pytest.importorskip("loralib")
    model = Model()
    loralib.mark_only_lora_as_trainable(model, bias="all")
    assert {"lora_head.weight", "unbiased_gate"} <= trainable(model)
    assert "attn_bias" in loralib.lora_state_dict(model, bias="all")


def test_third_party_layers_with_the_mixin_are_recognised() -> None:
    class Factored(lorakit.LoRALayer, nn.Module):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            lorakit.LoRALayer.__init__(self, r=2, lora_alpha=1, lora_dropout=0.1, merge_weights=False)
            self.lora_down = nn.Linear(4, 2, bias=False)
            self.base = nn.Linear(4, 4)

    model = nn.Sequential(Factored())
    lorakit.mark_only_lora_as_trainable(model)
    assert trainable(model) == {"0.lora_down.weight"}


def test_unknown_bias_is_refused() -> None:
    with pytest.raises(ValueError, match="bias='some': expected one of 'none', 'lora_only', 'all'"):
        lorakit.mark_only_lora_as_trainable(Model(), bias="some")  # type: ignore[arg-type]
