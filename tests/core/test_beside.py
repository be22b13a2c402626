"""Layers of other classes or with special weights: the update is added to their output, or they are refused."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import lorakit
import models

F64 = torch.float64


class Falcon(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        hidden = x @ self.weight.T
        return hidden if self.bias is None else hidden + self.bias


class Cast(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


class Named(nn.Linear):
    """torch's forward method, with additional attributes."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.note = "kept"


class Head(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, F.normalize(self.weight), self.bias)


class Noisy(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + (torch.randn(self.out_features, dtype=x.dtype) if self.training else 0)


class StaticPadding(nn.Conv2d):
    """EfficientNet-lite's convolution, which pads its input itself."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 1, 0, 1))
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Centred(nn.Conv2d):
    """It transforms its weight linearly, so an update can be transformed in the same way."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight, self.bias)


class Standardised(nn.Conv2d):
    """Weight standardisation (BiT, NFNets), which is not linear in the weight."""

    def forward(self, x: Tensor) -> Tensor:
        weight = F.normalize(self.weight - self.weight.mean((1, 2, 3), keepdim=True), dim=1)
        return self._conv_forward(x, weight, self.bias)


class Symmetric(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.triu() + weight.triu(1).mT


def run_once(layer: nn.Module, *shape: int) -> nn.Module:
    layer(torch.randn(shape))
    return layer


def old_weight_norm(layer: nn.Module) -> nn.Module:
    return nn.utils.weight_norm(layer)


def old_spectral_norm(layer: nn.Module) -> nn.Module:
    return nn.utils.spectral_norm(layer)


def symmetric() -> nn.Module:
    layer = nn.Linear(6, 6)
    parametrize.register_parametrization(layer, "weight", Symmetric())
    return layer


# name → a layer that takes 6 features or channels, and whether its weight is used as it is
LAYERS: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    "Falcon": (lambda: Falcon(6, 5), True),
    "Falcon without bias": (lambda: Falcon(6, 5, bias=False), True),
    "Cast": (lambda: Cast(6, 5), True),
    "Named": (lambda: Named(6, 5), True),
    "NonDynamicallyQuantizableLinear": (lambda: nn.modules.linear.NonDynamicallyQuantizableLinear(6, 5), True),
    "LazyLinear after a pass": (lambda: run_once(nn.LazyLinear(5), 2, 6), True),
    "LazyConv2d after a pass": (lambda: run_once(nn.LazyConv2d(5, 3), 2, 6, 8, 8), True),
    "Head": (lambda: Head(6, 5), False),
    "Noisy": (lambda: Noisy(6, 5), True),
    "weight_norm": (lambda: parametrizations.weight_norm(nn.Linear(6, 5)), False),
    "old weight_norm": (lambda: old_weight_norm(nn.Linear(6, 5)), False),
    "spectral_norm": (lambda: parametrizations.spectral_norm(nn.Linear(6, 5)), False),
    "orthogonal": (lambda: parametrizations.orthogonal(nn.Linear(6, 5)), False),
    "symmetric": (symmetric, False),
    "weight_norm of Falcon": (lambda: parametrizations.weight_norm(Falcon(6, 5)), False),
    "StaticPadding": (lambda: StaticPadding(6, 5, 3, stride=2), True),
    "grouped StaticPadding": (lambda: StaticPadding(6, 6, 3, groups=3), True),
    "Centred": (lambda: Centred(6, 5, 3), True),
    "weight_norm of conv1d": (lambda: parametrizations.weight_norm(nn.Conv1d(6, 5, 3, padding=1)), False),
    "old weight_norm of conv2d": (lambda: old_weight_norm(nn.Conv2d(6, 5, (3, 2), dilation=2)), False),
    "spectral_norm of conv3d": (lambda: parametrizations.spectral_norm(nn.Conv3d(6, 5, 2)), False),
}
every_layer = pytest.mark.parametrize("name", LAYERS)
pytestmark = pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated", "ignore:Lazy modules are")


def made(name: str) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(LAYERS[name][0]()).double().eval()


def given(model: nn.Sequential) -> Tensor:
    torch.manual_seed(1)
    layer = model[0]
    sizes = () if isinstance(layer, nn.Linear) else (7,) * len(layer.kernel_size)
    return torch.randn(3, 6, *sizes, dtype=F64, requires_grad=True)


def expected(base: Tensor, plain: nn.Sequential, model: nn.Sequential, x: Tensor) -> Tensor:
    """The base's output plus that of torch's layer with ΔW as its weight."""
    A, B = model[0].lora_A, model[0].lora_B
    delta = 2 * torch.einsum("or,r...->o...", B.flatten(1), A)
    if isinstance(plain[0], nn.Linear):
        return base + x @ delta.T
    layer, x = plain[0], F.pad(x, (0, 1, 0, 1)) if isinstance(plain[0], StaticPadding) else x
    if isinstance(layer, Centred):
        delta = delta - delta.mean((1, 2, 3), keepdim=True)
    convolve = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[delta.dim()]
    return base + convolve(x, delta, None, layer.stride, layer.padding, layer.dilation, layer.groups)


@every_layer
def test_output_gradient_merge_and_detach(name: str) -> None:
    model, plain = made(name), made(name)
    x, state = given(model), copy.deepcopy(plain.state_dict())
    base = plain(x)
    report = lorakit.attach(model, "0", rank=2, alpha=4)
    assert type(plain[0]).__name__ in str(report) or name.startswith(("Lazy", "old"))
    assert torch.equal(model(x), base)
    layer = model[0]
    nn.init.normal_(layer.lora_A)
    nn.init.normal_(layer.lora_B)
    wanted = [x, layer.lora_A, layer.lora_B]
    y, exact = model(x), expected(base, plain, model, x)
    torch.testing.assert_close(y, exact)
    torch.testing.assert_close(
        torch.autograd.grad(y.sin().sum(), wanted), torch.autograd.grad(exact.sin().sum(), wanted)
    )
    y = torch.relu_(model(x))
    y.sum().backward()
    if LAYERS[name][1]:
        lorakit.merge(model)
        with torch.no_grad():
            torch.testing.assert_close(model(x), exact)
        lorakit.unmerge(model)
    else:
        with pytest.raises(ValueError, match="'0' cannot be merged: .* (computes its weight|does not use its weight)"):
            lorakit.merge(model)
    with torch.no_grad():
        torch.testing.assert_close(model(x), exact)
        with lorakit.disabled(model):
            assert torch.equal(model(x), base)
    lorakit.detach(model)
    assert type(model[0]) is type(plain[0]) or type(model[0]).__name__ == type(plain[0]).__name__
    assert torch.equal(model(x), base)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@every_layer
def test_attach_moves_nothing_in_training(name: str) -> None:
    """The vectors of spectral_norm, the random state and the mode stay."""
    model, plain = made(name).train(), made(name).train()
    x = given(model)
    torch.manual_seed(5)
    base = plain(x)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    lorakit.attach(model, "0", rank=2, freeze=False)
    nn.init.zeros_(model[0].lora_B)
    assert model[0].training
    torch.set_rng_state(state)
    assert torch.equal(model(x), base)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in plain.state_dict().items())


@every_layer
def test_read_back_from_a_file(name: str, tmp_path) -> None:
    model, other = made(name), made(name)
    lorakit.attach(model, "0", rank=2, dropout=0.25)
    nn.init.normal_(model[0].lora_B)
    lorakit.save(model, tmp_path / "adapter")
    lorakit.load(other, tmp_path / "adapter")
    x = given(model)
    assert torch.equal(other.eval()(x), model(x))
    torch.manual_seed(0)
    dropped = model.train()(x)
    assert name == "Noisy" or not torch.allclose(dropped, model.eval()(x))


@pytest.mark.parametrize(
    "name", [name for name in LAYERS if "norm" not in name and name not in ("orthogonal", "symmetric")]
)
@pytest.mark.parametrize("copier", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies(name: str, copier) -> None:
    model = made(name)
    lorakit.attach(model, "0", rank=2)
    nn.init.normal_(model[0].lora_B)
    other, x = copier(model), given(model)
    assert torch.equal(other(x), model(x)) and type(other[0]) is type(model[0])
    lorakit.detach(other)
    assert torch.equal(other(x), made(name)(x))


@pytest.mark.parametrize("name", ["weight_norm", "spectral_norm", "weight_norm of conv1d"])
def test_copies_of_parametrised_layers(name: str) -> None:
    model = made(name)
    lorakit.attach(model, "0", rank=2)
    nn.init.normal_(model[0].lora_B)
    x = given(model)
    assert torch.equal(copy.deepcopy(model)(x), model(x))


@every_layer
def test_compiled_whole(name: str) -> None:
    if name in (
        "StaticPadding",
        "grouped StaticPadding",
        "Centred",
        "old weight_norm",
        "old weight_norm of conv2d",
    ):
        pytest.skip("the graph breaks at the layer's own forward, or in torch's hook")
    model = made(name)
    lorakit.attach(model, "0", rank=2)
    nn.init.normal_(model[0].lora_B)
    x = given(model)
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))


def test_all_linear_takes_what_it_can_and_lists_the_rest() -> None:
    class Rounded(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).round()

    model = nn.ModuleDict({"a": Falcon(6, 5), "b": Rounded(6, 5), "c": nn.LazyLinear(3), "d": nn.LSTM(6, 6)})
    report = lorakit.attach(model, rank=2)
    assert [row.name for row in report.rows] == ["a"]
    assert "b" in report.skipped and "Rounded" in report.skipped["b"] and "not linear" in report.skipped["b"]
    assert "run the model once" in report.skipped["c"] and "LSTM" in report.skipped["d"]


def test_a_convolution_that_normalises_its_weight_is_refused() -> None:
    model = nn.Sequential(Standardised(6, 5, 3))
    with pytest.raises(
        ValueError, match="Standardised is a subclass that may read its weight .* it is not linear in it"
    ):
        lorakit.attach(model, "0")


def test_a_layer_that_raises_is_refused_with_its_error() -> None:
    class Two(nn.Linear):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x) + y

    model = nn.Sequential(Two(6, 5))
    with pytest.raises(ValueError, match="Two is a subclass that could not be tried: TypeError.*'y'"):
        lorakit.attach(model, "0")


@pytest.mark.parametrize("settings", [{"dora": True}, {"init": "pissa"}])
def test_what_needs_the_weight_itself_is_refused(settings: dict) -> None:
    model = nn.Sequential(Falcon(6, 5))
    with pytest.raises(ValueError, match="'0' is a Falcon, which computes output or weight in its own way"):
        lorakit.attach(model, "0", rank=2, **settings)
    assert type(model[0]) is Falcon


def test_one_layer_that_cannot_be_merged_leaves_all_unmerged() -> None:
    model = nn.Sequential(nn.Linear(6, 6), Head(6, 5))
    lorakit.attach(model, rank=2)
    with pytest.raises(ValueError, match="'1' cannot be merged: Head does not use its weight as it is"):
        lorakit.merge(model)
    assert not any(layer.merged for layer in model)
    with pytest.raises(ValueError, match="this layer cannot be merged: Head"):
        model[1].merge()


def test_falcon_by_all_linear() -> None:
    from transformers import FalconConfig, FalconForCausalLM

    torch.manual_seed(0)
    model = FalconForCausalLM(
        FalconConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    ).eval()
    tokens = torch.arange(14).view(2, 7)
    base = model(tokens).logits
    report = lorakit.attach(model, rank=2)
    assert {row.kind for row in report.rows} == {"FalconLinear"} and len(report.rows) == 8
    assert torch.equal(model(tokens).logits, base)
    models.train_a_little(model)
    with torch.no_grad():
        live = model(tokens).logits
        assert not torch.allclose(live, base, atol=1e-3)
        lorakit.merge(model)
        torch.testing.assert_close(model(tokens).logits, live, rtol=1e-4, atol=1e-4)
