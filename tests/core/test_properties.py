"""Properties of every layer, for all kinds and settings. hypothesis draws them, and reference/equation.py computes
the adapted weight in float64, which torch's own layer then applies.
"""

import copy
import math
import pickle
import tempfile
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lorakit
from reference import equation

F64 = torch.float64
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
FAMILIES = ["linear", "fused", "embedding", "convolution"]

pytestmark = [
    pytest.mark.parametrize("family", FAMILIES),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths"),
]
property_test = settings(derandomize=True, deadline=None, max_examples=50)


@dataclass(frozen=True)
class Case:
    """One layer, plain and adapted. It holds only numbers and words, so that a failing case can be read."""

    layer: type[nn.Module]  # torch's, or transformers' Conv1D
    sizes: tuple[Any, ...]  # its arguments
    options: dict[str, Any]
    shape: tuple[int, ...]  # of the input
    rank: int
    alpha: float
    attached: bool  # otherwise lorakit's constructor makes it
    blocks: tuple[tuple[int, int], ...] = ()  # (size, rank) of the parts of a fused output
    fan_in_fan_out: bool = False
    variant: dict[str, Any] = field(default_factory=dict)  # rslora, dora, init

    def plain(self, dtype: torch.dtype = F64) -> nn.Module:
        """The layer without an update: the same weights on every call."""
        torch.manual_seed(0)
        layer = self.layer(*self.sizes, **self.options).to(dtype)
        _add_noise(layer, "", 0.5)
        return layer

    def adapted(self, dtype: torch.dtype = F64, seed: int = 1) -> nn.Sequential:
        """The layer in a model, with factors that differ from their start."""
        plain = self.plain(dtype)
        torch.manual_seed(seed)
        if self.attached:
            model = nn.Sequential(plain)
            lorakit.attach(model, "0", rank=self.rank, alpha=self.alpha, **self.variant, **self._patterns())
        else:
            model = nn.Sequential(self._construct().to(dtype))
            weight = plain.weight.T if self.fan_in_fan_out else plain.weight
            model[0].load_state_dict({**plain.state_dict(), "weight": weight}, strict=False)
        _add_noise(model, "lora_", 0.3)
        return model

    def x(self) -> Tensor:
        torch.manual_seed(2)
        if self.layer is nn.Embedding:
            return torch.randint(0, self.sizes[0], self.shape)
        return torch.randn(self.shape, dtype=F64)

    def weight(self, model: nn.Sequential, dtype: torch.dtype = F64) -> Tensor:
        """The adapted weight in float64, laid out like the plain layer's; a function of the factors."""
        factors = {name: tensor.double() for name, tensor in model[0].state_dict(keep_vars=True).items()}
        W, A, B = self.plain(dtype).weight.detach().double(), factors["lora_A"], factors["lora_B"]
        if self.options.get("padding_idx") is not None:
            padding = torch.arange(A.shape[1]) == self.options["padding_idx"]
            A = torch.where(padding, A.detach(), A)  # without a gradient
        scale = self.alpha / (math.sqrt(self.rank) if self.variant.get("rslora") else self.rank)
        if "lora_A0" in factors:
            W = self._add(W, factors["lora_A0"], factors["lora_B0"], -scale)
        total = self._add(W, A, B, scale)
        if "lora_magnitude" not in factors:
            return total
        rows = total.T if self.layer in (Conv1D, nn.Embedding) else total
        norms = torch.stack([row.detach().square().sum().sqrt() for row in rows])
        rows = rows * (factors["lora_magnitude"] / norms).view(-1, *(1,) * (rows.dim() - 1))
        return rows.T if self.layer in (Conv1D, nn.Embedding) else rows

    def apply(self, x: Tensor, weight: Tensor) -> Tensor:
        """Torch's own layer with another weight."""
        if self.layer is nn.Embedding:
            return weight[x]
        return torch.func.functional_call(self.plain(), {"weight": weight}, (x,))

    def _add(self, W: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
        if self.blocks:
            rows = equation.merged_linear_weight(self._rows(W), A, B, scale, list(self.blocks))
            return self._rows(rows)
        if self.layer is nn.Embedding:
            return equation.embedding_weight(W, A, B, scale)
        if self.layer in (nn.Linear, Conv1D):
            return self._rows(equation.linear_weight(self._rows(W), A, B, scale))
        return (equation.conv_weight if self.attached else equation.loralib_conv_weight)(W, A, B, scale)

    def _rows(self, W: Tensor) -> Tensor:
        return W.T if self.layer is Conv1D else W

    def _patterns(self) -> dict[str, Any]:
        if not self.blocks:
            return {}
        return dict(rank_pattern={"0": [r for _, r in self.blocks]}, splits={"0": [size for size, _ in self.blocks]})

    def _construct(self) -> nn.Module:
        arguments: dict[str, Any] = dict(r=self.rank, lora_alpha=self.alpha, **self.options)
        if self.fan_in_fan_out:
            arguments["fan_in_fan_out"] = True
        if self.blocks:
            arguments |= dict(r=[r for _, r in self.blocks], splits=[size for size, _ in self.blocks])
            return lorakit.MergedLinear(*self.sizes, **arguments)
        return getattr(lorakit, self.layer.__name__)(*self.sizes, **arguments)


def _add_noise(model: nn.Module, part_of_name: str, size: float) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if part_of_name in name:
                parameter.add_(size * torch.randn_like(parameter))


# --- drawing a case ---------------------------------------------------------------------------------------------------

small, alphas = st.integers(1, 6), st.sampled_from([1, 2, 3.5, 16])


@st.composite
def cases(draw: st.DrawFn, family: str, attached: bool | None = None) -> Case:
    drawn = {"linear": _linear, "fused": _fused, "embedding": _embedding, "convolution": _convolution}[family](draw)
    layer, sizes, options, shape, blocks = drawn
    if attached is None:
        attached = layer is Conv1D or draw(st.booleans())
    rank = max(r for _, r in blocks) if blocks else draw(st.integers(1, 4))
    variant: dict[str, Any] = {}
    if attached:
        variant["rslora"] = draw(st.booleans())
        if not blocks:
            variant["dora"] = draw(st.booleans())
            variant["init"] = draw(st.sampled_from(["kaiming", "gaussian", "pissa", "olora"]))
        if variant.get("init") in ("pissa", "olora"):
            weight = layer(*sizes, **options).weight
            rank = min(rank, weight.shape[0], weight[0].numel())
    transposed = layer is nn.Linear and not attached and draw(st.booleans())
    return Case(layer, sizes, options, shape, rank, draw(alphas), attached, blocks, transposed, variant)


Drawn = tuple[type[nn.Module], tuple[Any, ...], dict[str, Any], tuple[int, ...], tuple[tuple[int, int], ...]]


def _linear(draw: st.DrawFn) -> Drawn:
    layer, inputs, outputs = draw(st.sampled_from([nn.Linear, Conv1D])), draw(small), draw(small)
    shape = (*draw(st.lists(small, min_size=layer is Conv1D, max_size=2)), inputs)
    if layer is Conv1D:
        return layer, (outputs, inputs), {}, shape, ()
    return layer, (inputs, outputs), dict(bias=draw(st.booleans())), shape, ()


def _fused(draw: st.DrawFn) -> Drawn:
    blocks = draw(
        st.lists(st.tuples(small, st.integers(0, 3)), min_size=1, max_size=4).filter(
            lambda blocks: any(rank for _, rank in blocks)
        )
    )
    layer, inputs, outputs = draw(st.sampled_from([nn.Linear, Conv1D])), draw(small), sum(size for size, _ in blocks)
    shape = (*draw(st.lists(small, min_size=1, max_size=2)), inputs)
    if layer is Conv1D:
        return layer, (outputs, inputs), {}, shape, tuple(blocks)
    return layer, (inputs, outputs), dict(bias=draw(st.booleans())), shape, tuple(blocks)


def _embedding(draw: st.DrawFn) -> Drawn:
    vocabulary = draw(st.integers(2, 9))
    padding = draw(st.none() | st.integers(0, vocabulary - 1))
    shape = tuple(draw(st.lists(small, max_size=2)))
    return nn.Embedding, (vocabulary, draw(small)), dict(padding_idx=padding), shape, ()


def _convolution(draw: st.DrawFn) -> Drawn:
    dimensions = draw(st.integers(1, 3))
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]

    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(dimensions))

    groups = draw(st.integers(1, 3))
    depthwise = draw(st.booleans())
    inputs, outputs = (groups * (1 if depthwise else draw(st.integers(1, 3))), groups * draw(st.integers(1, 3)))
    padding = draw(st.sampled_from(["numbers", "same", "valid"]))
    options = dict(
        stride=(1,) * dimensions if padding == "same" else each(1, 2),
        padding=each(0, 2) if padding == "numbers" else padding,
        dilation=each(1, 2),
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
    )
    return layer, (inputs, outputs, each(1, 3)), options, (draw(st.integers(1, 2)), inputs, *each(5, 6)), ()


# --- the properties ---------------------------------------------------------------------------------------------------


def merge(model: nn.Module, case: Case, merged: bool) -> None:
    """Merge or unmerge: an attached layer by a call, a constructed one by the mode."""
    if not case.attached:
        model.train(not merged)
    elif merged:
        lorakit.merge(model)
    else:
        lorakit.unmerge(model)


def outputs(model: nn.Sequential, case: Case) -> Tensor:
    x = case.x()
    with torch.no_grad():
        return model(x.to(model[0].weight.dtype) if x.is_floating_point() else x)


@given(data=st.data())
@property_test
def test_outputs_and_gradients_are_those_of_torch_with_the_adapted_weight(family: str, data: st.DataObject) -> None:
    case = data.draw(cases(family))
    model, x = case.adapted(), case.x()
    wanted: list[Tensor] = [p for name, p in model.named_parameters() if "lora_" in name]
    if x.is_floating_point():
        wanted.append(x.requires_grad_())
    actual, expected = model(x), case.apply(x, case.weight(model))
    torch.testing.assert_close(actual, expected)
    probe = torch.linspace(-1, 1, expected.numel(), dtype=F64).view_as(expected)
    torch.testing.assert_close(
        torch.autograd.grad((actual * probe).sum(), wanted), torch.autograd.grad((expected * probe).sum(), wanted)
    )


@given(data=st.data(), dtype=st.sampled_from(DTYPES), rounds=st.integers(1, 4))
@property_test
def test_merging_rounds_once_and_unmerging_restores_every_bit(
    family: str, data: st.DataObject, dtype: torch.dtype, rounds: int
) -> None:
    case = data.draw(cases(family))
    model = case.adapted(dtype)
    layer = model[0]
    base, bits = layer.weight, layer.weight.detach().clone()
    exact = case.weight(model, dtype).detach()
    exact = exact.T if case.fan_in_fan_out else exact
    for _ in range(rounds):
        merge(model, case, True)
        assert layer.weight.dtype == dtype
        assert (layer.weight.double() - exact).abs().le(rounding_of(exact, dtype)).all()
        merge(model, case, False)
    assert layer.weight is base
    assert torch.equal(base, bits)


def rounding_of(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Half a unit in the last place, plus the error of sums in float32."""
    finfo = torch.finfo(dtype)
    unit = torch.ldexp(torch.full_like(exact, finfo.eps), torch.frexp(exact).exponent - 1)
    precise = torch.finfo(dtype if dtype == F64 else torch.float32)
    return unit.clamp_min(finfo.smallest_normal * finfo.eps) / 2 + 32 * precise.eps * exact.abs().max()


@given(data=st.data(), dtype=st.sampled_from([torch.float64, torch.float32]))
@property_test
def test_a_merged_layer_gives_the_output_it_gave(family: str, data: st.DataObject, dtype: torch.dtype) -> None:
    case = data.draw(cases(family))
    model = case.adapted(dtype)
    expected = outputs(model, case)
    merge(model, case, True)
    merged = outputs(model, case)
    scale = expected.abs().max().clamp_min(1).item()
    torch.testing.assert_close(merged, expected, rtol=0, atol=100 * torch.finfo(dtype).eps * scale)
    merge(model, case, False)
    assert torch.equal(outputs(model, case), expected)


@given(data=st.data(), saved_merged=st.booleans(), loaded_merged=st.booleans())
@property_test
def test_a_state_dict_is_the_same_in_every_mode_and_loads_in_every_mode(
    family: str, data: st.DataObject, saved_merged: bool, loaded_merged: bool
) -> None:
    case = data.draw(cases(family))
    source, target = case.adapted(), case.adapted(seed=3)
    expected, state = outputs(source, case), copy.deepcopy(source.state_dict())
    merge(source, case, saved_merged)
    assert list(source.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in source.state_dict().items())
    with torch.no_grad():
        target[0].weight.add_(1)
    merge(target, case, loaded_merged)
    target.load_state_dict(source.state_dict())
    torch.testing.assert_close(outputs(target, case), expected)
    merge(target, case, False)
    assert torch.equal(outputs(target, case), expected)


@given(data=st.data(), dtype=st.sampled_from(DTYPES), frozen=st.booleans(), rounds=st.integers(0, 2))
@property_test
def test_detach_gives_back_the_layer(
    family: str, data: st.DataObject, dtype: torch.dtype, frozen: bool, rounds: int
) -> None:
    case = data.draw(cases(family, attached=True))
    untouched = case.plain(dtype)
    model = nn.Sequential(case.plain(dtype))
    layer = model[0]
    layer.weight.requires_grad = not frozen
    parameters = dict(layer.named_parameters())
    lorakit.attach(
        model, "0", rank=case.rank, alpha=case.alpha, dropout=0.1, bias="all", **case.variant, **case._patterns()
    )
    _add_noise(model, "lora_", 0.3)
    if getattr(layer, "bias", None) is not None:
        layer.bias.data.add_(1)  # it was trained too
    for _ in range(rounds):
        lorakit.merge(model)
        lorakit.unmerge(model)
    lorakit.detach(model)
    assert model[0] is layer
    assert type(layer) is type(untouched)
    assert layer.__dict__.keys() == untouched.__dict__.keys()
    assert list(model.state_dict()) == [f"0.{name}" for name in untouched.state_dict()]
    for name, parameter in layer.named_parameters():
        assert parameter is parameters[name]
        assert parameter.requires_grad is not (frozen and name == "weight")
        assert torch.equal(parameter, untouched.get_parameter(name))


@given(data=st.data(), merged=st.booleans())
@property_test
def test_copies_and_pickles_give_the_same_output(family: str, data: st.DataObject, merged: bool) -> None:
    case = data.draw(cases(family))
    model = case.adapted()
    unmerged_output = outputs(model, case)
    merge(model, case, merged)
    expected = outputs(model, case)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(outputs(other, case), expected)
        assert other[0].merged is merged
        merge(other, case, False)
        assert torch.equal(outputs(other, case), unmerged_output)
        assert other[0].weight is not model[0].weight


@given(data=st.data(), merged=st.booleans(), adapted_already=st.booleans())
@property_test
def test_extract_and_insert_give_the_same_output(
    family: str, data: st.DataObject, merged: bool, adapted_already: bool
) -> None:
    case = data.draw(cases(family))
    model = case.adapted()
    expected = outputs(model, case)
    merge(model, case, merged)
    if adapted_already or is_loralib_convolution(case):
        fresh = case.adapted(seed=3)
        merge(fresh, case, data.draw(st.booleans()))
    else:
        fresh = nn.Sequential(case.plain())
    lorakit.insert(fresh, lorakit.extract(model))
    torch.testing.assert_close(outputs(fresh, case), expected)


@given(data=st.data(), merged=st.booleans())
@property_test
def test_a_saved_adapter_gives_the_same_output(family: str, data: st.DataObject, merged: bool) -> None:
    case = data.draw(cases(family))
    model, fresh = case.adapted(), nn.Sequential(case.plain())
    expected = outputs(model, case)
    merge(model, case, merged)
    with tempfile.TemporaryDirectory() as folder:
        if is_loralib_convolution(case):
            with pytest.raises(ValueError, match="another rank than PEFT's"):
                lorakit.save(model, folder)
            return
        lorakit.save(model, folder)
        lorakit.load(fresh, folder)
    torch.testing.assert_close(outputs(fresh, case), expected)


def is_loralib_convolution(case: Case) -> bool:
    return not case.attached and issubclass(case.layer, nn.modules.conv._ConvNd)
