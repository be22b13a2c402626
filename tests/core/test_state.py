"""What a checkpoint has to hold: the tensors that training changes, and none of the frozen base."""

import pytest
import torch
from torch import nn

import lorakit
import models
from lorakit.core.state import take_trained_state, trained_state, without_base


def stepped(model: nn.Module, inputs: torch.Tensor) -> None:
    """One step of training, of whatever has a gradient."""
    optimizer = torch.optim.SGD([value for value in model.parameters() if value.requires_grad], lr=0.5)
    found = model.train()(inputs)
    getattr(found, "logits", found).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def changed(model: nn.Module, inputs: torch.Tensor) -> set[str]:
    """The names in the state dict whose tensors two steps change. A step alone leaves A where B is zero."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    stepped(model, inputs)
    stepped(model, inputs)
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


class WithHead(nn.Module):
    """A frozen base with an adapter, and a part of the program's own that is trained, with statistics."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.head = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.head(self.base(x))
        return found


@pytest.mark.parametrize(
    "settings",
    [
        {"targets": ["conv_pw", "6"]},
        {"targets": ["conv_pw", "6"], "also_train": ["1.bn"]},
        {"targets": ["6"], "bias": "all"},
        {"targets": ["conv_pw", "6"], "freeze": False},
        {"targets": ["6"], "dora": True},
    ],
)
@pytest.mark.parametrize("outer", [False, True])
def test_it_is_what_training_changes(settings: dict, outer: bool) -> None:
    model = models.conv_net()
    lorakit.attach(model, rank=2, **settings)
    whole = WithHead(model) if outer else model
    state = trained_state(whole)
    assert set(state) == changed(whole, torch.randn(8, 3, 9, 9))
    assert all(value.data_ptr() == whole.state_dict()[name].data_ptr() for name, value in state.items())


def test_an_init_that_takes_from_the_weight_has_its_constant_factors_too() -> None:
    """They are needed to resume: the update is s·(B A − B₀A₀)."""
    model = models.llama()
    lorakit.attach(model, "q_proj", rank=2, init="pissa")
    moved = changed(model, torch.arange(8)[None])
    assert moved < set(trained_state(model)) and {name for name in trained_state(model) if "lora_" not in name} == set()
    other = models.llama()
    lorakit.attach(other, "q_proj", rank=2, init="pissa")
    parameters = {name: value for name, value in other.named_parameters() if value.requires_grad}
    take_trained_state(other, trained_state(model), "here")
    assert all(torch.equal(value, model.get_parameter(name)) for name, value in parameters.items())  # in place
    assert torch.equal(other.eval()(torch.arange(8)[None]).logits, model.eval()(torch.arange(8)[None]).logits)


def test_names_are_those_of_the_plain_model_and_a_tied_weight_has_one() -> None:
    model = models.gpt2()
    lorakit.attach(model, "c_attn", rank=2)
    expected = set(trained_state(model))
    model.transformer.h[0] = torch.compile(model.transformer.h[0], backend="eager")  # adds _orig_mod to its names
    state = trained_state(nn.DataParallel(model))
    assert set(state) == expected and not any("_orig_mod" in name for name in model.state_dict() if name in state)
    model.transformer.h[0].attn.c_attn.lora_B.data.fill_(1.0)
    other = models.gpt2()
    lorakit.attach(other, "c_attn", rank=2)
    take_trained_state(other, state, "here")
    assert bool((other.transformer.h[0].attn.c_attn.lora_B == 1.0).all())
    take_trained_state(model, {name: torch.zeros_like(value) for name, value in state.items()}, "here")
    assert not model.transformer.h[0].attn.c_attn.lora_B.any()

    free = models.gpt2()
    lorakit.attach(free, "c_attn", rank=2, freeze=False)
    assert "transformer.wte.weight" in trained_state(free) and "lm_head.weight" not in trained_state(free)


def test_a_state_dict_without_the_base_keeps_what_is_no_model_of_ours() -> None:
    plain = models.conv_net()
    state = plain.state_dict()
    assert without_base(plain, state) == state
    lorakit.attach(plain.get_submodule("1"), "conv_pw", rank=2)  # a part of the model: the rest is not touched
    left = plain.state_dict().keys() - without_base(plain, plain.state_dict()).keys()
    assert left == {name for name in state if name.startswith("1.")}


def test_a_state_of_other_names_or_shapes_is_refused_before_anything_changes() -> None:
    model, other = models.llama(), models.llama()
    lorakit.attach(model, ["q_proj", "k_proj"], rank=2)
    lorakit.attach(other, ["q_proj", "k_proj"], rank=4)
    before = {name: value.clone() for name, value in trained_state(model).items()}
    with pytest.raises(lorakit.LoraError, match=r"^a file belongs to an adapter of other settings; .*lora_A differs"):
        take_trained_state(model, trained_state(other), "a file")
    with pytest.raises(lorakit.LoraError, match="other settings; model.layers.0.self_attn.k_proj.lora_A differs"):
        take_trained_state(model, {name: v for name, v in before.items() if "k_proj.lora_A" not in name}, "a file")
    assert all(torch.equal(value, before[name]) for name, value in trained_state(model).items())
