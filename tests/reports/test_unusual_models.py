"""attach on models with unusual layers: each works in value, gradient and merge, or is refused."""

import copy
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lorakit

LAZY: dict[str, Callable[[], nn.Module]] = {
    "LazyBatchNorm1d": lambda: nn.LazyBatchNorm1d(),
    "LazyLinear": lambda: nn.LazyLinear(4),
    "LazyConv1d": lambda: nn.LazyConv1d(4, 1),
    "LazyConvTranspose2d": lambda: nn.LazyConvTranspose2d(4, 2),
    "LazyInstanceNorm2d": lambda: nn.LazyInstanceNorm2d(affine=True),
}
pytestmark = pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")


@pytest.mark.parametrize("targets", ["all-linear", "0", "*0*"])
@pytest.mark.parametrize("name", LAZY)
def test_beside_lazy_layers(name: str, targets: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8), LAZY[name]())
    report = lorakit.attach(model, targets, rank=2)
    assert [row.name for row in report.rows] == ["0"]
    assert report.trainable == 2 * (8 + 8)
    lorakit.detach(model)
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("targets", ["all-linear", "0"])
@pytest.mark.parametrize("name", ["LazyLinear", "LazyConv1d"])
def test_a_lazy_layer_says_to_run_the_model_once_and_works_then(name: str, targets: str) -> None:
    model = nn.Sequential(LAZY[name]())
    targets = "0" if name == "LazyConv1d" else targets
    with pytest.raises(ValueError, match=f"{name} has no weight before its first forward pass: run the model once"):
        lorakit.attach(model, targets, rank=2)
    model(torch.randn(2, 8, 3) if name == "LazyConv1d" else torch.randn(2, 8))
    lorakit.attach(model, targets, rank=2)


class Router(nn.Module):
    """A program's own linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.bag, self.cell, self.memory = nn.EmbeddingBag(16, 8), nn.GRUCell(8, 8), nn.LSTMCell(8, 8)
        self.bilinear, self.gate, self.lstm = nn.Bilinear(8, 8, 8), Router(), nn.LSTM(8, 8, batch_first=True)
        self.out = nn.Linear(8, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.bag(tokens)
        x = self.memory(self.cell(self.gate(self.bilinear(x, x)), x))[0]
        return self.out(self.lstm(x[None])[0])


PARAMETERS = ("bilinear.weight", "bag.weight", "gate.weight", "cell.weight_ih", "cell.weight_hh", "memory.weight_hh")
TOKENS = torch.arange(12).view(3, 4)


@pytest.mark.parametrize("parameter", PARAMETERS)
def test_a_parameter_by_its_name(parameter: str, tmp_path: Path) -> None:
    model, other, plain = Net().double(), Net().double(), Net().double()
    report = lorakit.attach(model, parameter, rank=2, alpha=4)
    assert [row.name for row in report.rows] == [parameter]
    assert torch.equal(model(TOKENS), plain(TOKENS))
    layer = next(module for module in model.modules() if isinstance(module, lorakit.LoRALayer))
    nn.init.normal_(layer.lora_A)
    nn.init.normal_(layer.lora_B)
    total = plain.get_parameter(parameter).detach() + 2 * layer.lora_B @ layer.lora_A
    exact = torch.func.functional_call(plain, {parameter: total}, (TOKENS,))
    torch.testing.assert_close(model(TOKENS), exact)
    wanted = [layer.lora_A, layer.lora_B]
    torch.testing.assert_close(
        torch.autograd.grad(model(TOKENS).sin().sum(), wanted), torch.autograd.grad(exact.sin().sum(), wanted)
    )
    lorakit.save(model, tmp_path / "adapter")
    lorakit.load(other, tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(other(TOKENS), exact)
        lorakit.merge(model)
        torch.testing.assert_close(model(TOKENS), exact)
    lorakit.detach(other)
    assert type(other.bag) is nn.EmbeddingBag and torch.equal(other(TOKENS), plain(TOKENS))


@pytest.mark.filterwarnings("ignore")
def test_peft_reads_the_weight_of_a_layer_of_a_program_s_own(tmp_path: Path) -> None:
    model = Net()
    lorakit.attach(model, ["gate.weight", "out"], rank=2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    lorakit.save(model, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(Net(), tmp_path / "adapter")
    torch.testing.assert_close(theirs(TOKENS), model(TOKENS), rtol=1e-4, atol=1e-4)


def test_all_linear_says_what_it_passed_over() -> None:
    report = lorakit.attach(Net(), rank=2)
    assert [row.name for row in report.rows] == ["out"]
    assert {"lstm", "bilinear.weight", "cell.weight_ih", "memory.weight_hh"} <= report.skipped.keys()
    assert "expert" not in str(report)


@pytest.mark.parametrize("targets", ["all-linear", "0", "base_model.model.2.base_layer"])
@pytest.mark.parametrize("kind", ["LoRA", "IA3"])
def test_a_model_with_adapters_of_peft_s_is_refused_and_works_without_them(kind: str, targets: str) -> None:
    plain = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
    names = {"target_modules": ["0", "2"]}
    config = peft.LoraConfig(r=2, **names) if kind == "LoRA" else peft.IA3Config(feedforward_modules=[], **names)
    model = peft.get_peft_model(copy.deepcopy(plain), config)
    with pytest.raises(ValueError, match=r"has PEFT's adapters already \('base_model.model.0'.*merge_and_unload"):
        lorakit.attach(model, targets, rank=2)
    assert not any(type(module).__module__.startswith("lorakit") for module in model.modules())
    assert len(lorakit.attach(model.unload(), rank=2).rows) == 2
