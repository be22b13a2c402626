"""Quantised layers: the update beside what the library computes, against numbers that the library itself tells."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorakit
import quantised
from quantised import BASES, Base

BY_NAME = pytest.mark.parametrize("base", BASES, ids=lambda base: base.name)
pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning")


def random_factors(model: nn.Module) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in lorakit.parameters(model):
            parameter.copy_(torch.randn_like(parameter) / 8)


def adapted(base: Base, **settings: Any) -> Any:
    model = base.model()
    lorakit.attach(model, rank=4, alpha=8, **settings)
    random_factors(model)
    return model


def by_hand(model: Any, base: Base, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The output in float64, W + s·B A written out, and the gradients of its sum by the factors."""
    factors, h = [], x.double()
    for layer in (model[0], model[2]):
        A, B = (getattr(layer, name).detach().double().requires_grad_() for name in ("lora_A", "lora_B"))
        factors += [A, B]
        weight = base.weight(layer).double() + 2 * B @ A
        h = h @ weight.T + layer.bias.double()
        h = h.tanh() if layer is model[0] else h
    return h, list(torch.autograd.grad(h.sum(), factors))


@BY_NAME
def test_the_base_is_untouched_until_something_is_learnt(base: Base) -> None:
    model, x = base.model(), torch.randn(5, quantised.IN)
    before, classes = model(x).detach(), [type(module) for module in model]
    lorakit.attach(model, rank=4)
    assert all(isinstance(layer, lorakit.Beside) for layer in (model[0], model[2]))
    assert torch.equal(model(x), before)
    lorakit.detach(model)
    assert [type(module) for module in model] == classes and torch.equal(model(x), before)


@BY_NAME
def test_output_and_gradients_by_hand(base: Base) -> None:
    model = adapted(base)
    x = torch.randn(5, quantised.IN)
    y = model(x)
    y.sum().backward()
    expected, gradients = by_hand(model, base, x)
    tolerance = 3 * 10**base.digits
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=tolerance)
    found: list[Any] = [parameter.grad for parameter in lorakit.parameters(model)]
    for gradient, wanted in zip(found, gradients, strict=True):
        assert (gradient.double() - wanted).norm() < tolerance * wanted.norm()


@BY_NAME
def test_it_learns(base: Base) -> None:
    model = base.model()
    lorakit.attach(model, rank=8)
    torch.manual_seed(2)
    x = torch.randn(64, quantised.IN)
    wanted = x[:, : quantised.OUT].sin()
    optimizer = torch.optim.Adam(lorakit.parameters(model), 1e-2)
    losses = []
    for _ in range(60):
        loss = (model(x) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    assert lorakit.diagnose(model).silent == ()


@BY_NAME
def test_merging_wants_plain_numbers_first(base: Base) -> None:
    model = adapted(base)
    with pytest.raises(lorakit.LoraError, match=r"stores its weight quantised. lorakit.dequantize\(model\) makes"):
        lorakit.merge(model)
    numbers = [base.weight(layer).clone() for layer in (model[0], model[2])]
    x = torch.randn(5, quantised.IN)
    expected, _ = by_hand(model, base, x)
    assert lorakit.dequantize(model) == ["0", "2"]
    for layer, weight in zip((model[0], model[2]), numbers, strict=True):
        assert type(layer) is lorakit.Linear and layer.weight.dtype == torch.float32
        torch.testing.assert_close(layer.weight, weight.float(), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(model(x).double(), expected, rtol=0, atol=2e-2)
    before = model(x)
    lorakit.merge(model)
    with torch.no_grad():
        torch.testing.assert_close(model(x), before, rtol=0, atol=1e-5)


@BY_NAME
def test_saved_and_read_again(base: Base, tmp_path) -> None:
    model = adapted(base)
    lorakit.save(model, tmp_path)
    again = base.model()
    lorakit.load(again, tmp_path)
    x = torch.randn(5, quantised.IN)
    assert torch.equal(again(x), model(x))


@BY_NAME
def test_what_takes_the_weight_apart_is_refused_by_name(base: Base) -> None:
    for settings in ({"dora": True}, {"init": "pissa"}):
        model = base.model()
        with pytest.raises(lorakit.LoraError, match=r"'0'"):
            lorakit.attach(model, **settings)
        assert not lorakit.adapted_layers(model)


@pytest.mark.parametrize("base", [base for base in BASES if base.name.startswith("bitsandbytes")], ids=lambda b: b.name)
def test_peft_reads_the_folder_on_the_same_base(base: Base, tmp_path) -> None:
    import peft

    model = adapted(base)
    lorakit.save(model, tmp_path)
    x = torch.randn(5, quantised.IN)
    theirs = peft.PeftModel.from_pretrained(base.model(), tmp_path).train()
    torch.testing.assert_close(theirs(x), model(x), rtol=0, atol=1e-5)


def test_a_weight_that_was_packed_for_inference_passes_on_no_gradient() -> None:
    """bitsandbytes packs in `eval()`, on some CPUs. An adapted layer is never packed, a packed one is refused."""
    model = BASES[0].model().eval()
    lorakit.attach(model, rank=4)
    x = torch.randn(5, quantised.IN)
    for _ in range(2):
        with torch.no_grad():
            model(x)
    assert not getattr(model[0].weight.quant_state, "packing_format_for_cpu", False)
    model.train()(x).sum().backward()
    assert model[0].lora_B.grad.abs().max() > 0

    plain = BASES[0].model()
    plain[0].weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(lorakit.LoraError, match="packed its weight for inference"):
        lorakit.attach(plain, "0")


def test_a_base_without_a_backward_pass_is_not_trained_in_silence() -> None:
    class Detached(quantised.BASES[6].make):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).detach()

    model = nn.Sequential(nn.Linear(8, quantised.IN), Detached(nn.Linear(quantised.IN, 8)))
    lorakit.attach(model, rank=2)
    with pytest.raises(lorakit.LoraError, match="Detached passes no gradient on to its input"):
        model(torch.randn(3, 8))
    with torch.no_grad():
        assert model(torch.randn(3, 8)).shape == (3, 8)


def test_an_unknown_class_with_integers_is_tried() -> None:
    class Mine(nn.Linear):
        def __init__(self, layer: nn.Linear) -> None:
            super().__init__(layer.in_features, layer.out_features, bias=False)
            self.scale = layer.weight.detach().abs().max() / 127
            self.weight = nn.Parameter((layer.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return x @ (self.weight.to(x.dtype) * self.scale).T

    class Squares(Mine):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) ** 2

    class Raw(nn.Linear):
        pass

    model = nn.Sequential(Mine(nn.Linear(8, 6)))
    lorakit.attach(model, rank=2)
    assert isinstance(model[0], lorakit.Beside)
    with pytest.raises(lorakit.LoraError, match="Squares is a subclass that may read its weight.*not linear in x"):
        lorakit.attach(nn.Sequential(Squares(nn.Linear(8, 6))), "0")
    raw = Raw(8, 6)
    raw.weight = nn.Parameter(torch.ones(6, 8, dtype=torch.int8), requires_grad=False)
    with pytest.raises(lorakit.LoraError, match="Raw is a subclass that could not be tried"):
        lorakit.attach(nn.Sequential(raw), "0")


def test_copies_and_devices_keep_the_update() -> None:
    model = adapted(BASES[0])
    x = torch.randn(5, quantised.IN)
    expected = model(x)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    assert torch.equal(model.to("cpu")(x), expected)


def test_dequantize_says_when_there_is_nothing_to_do() -> None:
    with pytest.raises(lorakit.LoraError, match="Sequential has no quantised linear layer"):
        lorakit.dequantize(quantised.plain())


def test_dequantize_without_an_adapter_takes_the_dtype_of_the_rest() -> None:
    model = nn.Sequential(nn.Embedding(10, quantised.IN).to(torch.bfloat16), *BASES[0].model())
    lorakit.dequantize(model)
    assert type(model[1]) is nn.Linear and model[1].weight.dtype == model[1].bias.dtype == torch.bfloat16
    again = nn.Sequential(*BASES[0].model())
    lorakit.dequantize(again, dtype=torch.float64)
    assert again[0].weight.dtype == torch.float64
