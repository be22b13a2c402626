"""The installed loralib 0.1.2 and lorakit: same calls, same numbers; and lorakit passes the tests that loralib fails.

Two layers that should agree are made by `pair`: the same arguments, the same weights, factors that are not zero. The
tests named after a problem show both sides of it. What test_merge.py and test_trainable.py show of loralib (drift,
names matched by substring) is not repeated here.
"""

import copy
import inspect
import itertools
import pickle
from collections.abc import Callable
from types import ModuleType
from typing import Any

import loralib
import pytest
import torch
import torch.nn.functional as F
from measure import operations
from torch import Tensor, nn

import lorakit
from models import trainable_names

F32, F64 = torch.float32, torch.float64
TOLERANCE = {F32: 1e-5, F64: 1e-12}
BOTH = pytest.mark.parametrize("library", [loralib, lorakit], ids=lambda module: module.__name__)


def pair(name: str, *args: Any, dtype: torch.dtype = F64, **kwargs: Any) -> tuple[nn.Module, nn.Module]:
    """loralib's layer and lorakit's, with the same state."""
    theirs, ours = (getattr(library, name)(*args, **kwargs).to(dtype) for library in (loralib, lorakit))
    randomise(theirs)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def randomise(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.5)


def assert_same(actual: Tensor, expected: Tensor) -> None:
    tolerance = TOLERANCE[expected.dtype]
    size = expected.abs().max().clamp_min(1).item() if expected.numel() else 1.0
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * size)


def assert_same_outputs_and_gradients(theirs: nn.Module, ours: nn.Module, x: Tensor) -> None:
    results = []
    for layer in (theirs, ours):
        leaf = x.clone().requires_grad_(x.is_floating_point())
        trained = [p for p in (leaf, *(p for _, p in sorted(factors(layer).items()))) if p.requires_grad]
        y = layer(leaf)
        probe = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
        results.append((y, *torch.autograd.grad((y * probe).sum(), trained)) if trained else (y,))
    for expected, actual in zip(*results, strict=True):
        assert_same(actual, expected)


def factors(layer: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in layer.named_parameters() if "lora_" in name}


def compare_in_every_mode(make: Callable[[torch.dtype], tuple[nn.Module, nn.Module]], x: Tensor) -> None:
    """In train mode, in eval mode and in train mode again, in float32 and float64."""
    for dtype in (F32, F64):
        given = x.to(dtype) if x.is_floating_point() else x
        theirs, ours = make(dtype)
        assert_same_outputs_and_gradients(theirs, ours, given)
        theirs.eval(), ours.eval()
        assert ours.merged == theirs.merged == ours.merge_weights
        if ours.merged:
            with torch.no_grad():
                assert_same(ours(given), theirs(given))
        else:
            assert_same_outputs_and_gradients(theirs, ours, given)
        theirs.train(), ours.train()
        assert not ours.merged
        assert_same_outputs_and_gradients(theirs, ours, given)


# --- the calls -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["LoRALayer", "Linear", "MergedLinear", "Embedding", "ConvLoRA"])
def test_constructors_begin_with_the_arguments_of_loralib(name: str) -> None:
    theirs, ours = (inspect.signature(getattr(library, name).__init__).parameters for library in (loralib, lorakit))
    positional = [p for p in theirs.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    for expected, actual in zip(positional, ours.values(), strict=False):
        assert (actual.name, actual.kind) == (expected.name, expected.kind)
        default = tuple(expected.default) if isinstance(expected.default, list) else expected.default
        assert actual.default == default
    added = [p for p in ours.values() if p.name not in theirs]
    assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in added)
    assert [p.name for p in ours.values() if p.kind is p.VAR_KEYWORD] == [
        p.name for p in theirs.values() if p.kind is p.VAR_KEYWORD
    ]


@pytest.mark.parametrize("name", ["Conv1d", "Conv2d", "Conv3d"])
def test_convolutions_take_the_arguments_of_conv_lora_by_position_and_by_name(name: str) -> None:
    by_position = (4, 6, 1, 2, 8, 0.5, False)
    names = list(inspect.signature(loralib.ConvLoRA.__init__).parameters)[2:-1]
    by_name = dict(zip(names, by_position, strict=True))
    for layer in (
        getattr(loralib, name)(*by_position, stride=2),
        getattr(lorakit, name)(*by_position, stride=2),
        getattr(lorakit, name)(**by_name, stride=2),
    ):
        assert (layer.r, layer.lora_alpha, layer.lora_dropout.p, layer.merge_weights) == (2, 8, 0.5, False)
        assert (layer.conv.in_channels, layer.conv.out_channels) == (4, 6)
        assert set(layer.conv.stride) == {2}


MADE: dict[str, tuple[str, tuple[Any, ...], dict[str, Any]]] = {
    "linear": ("Linear", (4, 6), dict(r=2, lora_alpha=3, lora_dropout=0.25)),
    "linear-transposed": ("Linear", (4, 6), dict(r=2, fan_in_fan_out=True, merge_weights=False)),
    "linear-plain": ("Linear", (4, 6), {}),
    "merged": ("MergedLinear", (4, 6), dict(r=2, lora_alpha=3, enable_lora=[True, False, True])),
    "merged-transposed": ("MergedLinear", (4, 6), dict(r=2, enable_lora=[False, True], fan_in_fan_out=True)),
    "embedding": ("Embedding", (7, 4), dict(r=2, lora_alpha=3, padding_idx=1)),
    "embedding-plain": ("Embedding", (7, 4), {}),
    "conv2d": ("Conv2d", (4, 6, 3), dict(r=2, lora_alpha=3, lora_dropout=0.25, padding=1)),
    "conv2d-groups": ("Conv2d", (4, 6, 3), dict(r=2, groups=2, bias=False)),
    "conv2d-plain": ("Conv2d", (4, 6, 3), {}),
}
ATTRIBUTES = ("r", "lora_alpha", "scaling", "merged", "merge_weights", "enable_lora", "fan_in_fan_out")


@pytest.mark.parametrize("made", MADE, ids=str)
def test_attributes_and_methods_of_loralib_are_there_with_the_same_values(made: str) -> None:
    name, args, kwargs = MADE[made]
    theirs, ours = pair(name, *args, **kwargs)
    for attribute in ATTRIBUTES:
        assert hasattr(ours, attribute) == hasattr(theirs, attribute), attribute
        if hasattr(theirs, attribute):
            value = getattr(ours, attribute)
            assert (value, type(value)) == (getattr(theirs, attribute), type(getattr(theirs, attribute))), attribute
    for attribute in ("lora_A", "lora_B", "lora_ind"):
        assert hasattr(ours, attribute) == hasattr(theirs, attribute), attribute
        if hasattr(theirs, attribute):
            assert torch.equal(getattr(ours, attribute), getattr(theirs, attribute))
            assert getattr(ours, attribute).requires_grad == getattr(theirs, attribute).requires_grad
    x = torch.randn(3, 4)
    assert type(ours.lora_dropout) is nn.Dropout or ours.lora_dropout(x) is x
    assert isinstance(theirs.lora_dropout, nn.Dropout) == isinstance(ours.lora_dropout, nn.Dropout)
    assert getattr(ours.lora_dropout, "p", 0) == getattr(theirs.lora_dropout, "p", 0)
    if hasattr(theirs, "conv"):
        assert torch.equal(ours.conv.weight, theirs.conv.weight)
        assert ours.conv.weight.requires_grad == theirs.conv.weight.requires_grad
        assert (ours.conv.bias is None) == (theirs.conv.bias is None)
    for method in ("reset_parameters", "train", "merge_AB", "zero_pad"):
        assert callable(getattr(ours, method, None)) == callable(getattr(theirs, method, None)), method


# --- the first parameters --------------------------------------------------------------------------------------------


def without_conv(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("conv."): tensor for name, tensor in state.items()}


@pytest.mark.parametrize("r", [0, 1, 3])
@pytest.mark.parametrize(
    ("name", "args", "kwargs"),
    [
        ("Linear", (5, 7), {}),
        ("Linear", (5, 7), dict(fan_in_fan_out=True, bias=False)),
        ("MergedLinear", (5, 6), dict(enable_lora=[True, False, True])),
        ("MergedLinear", (5, 6), dict(enable_lora=[False, True], fan_in_fan_out=True)),
        ("Embedding", (9, 5), dict(padding_idx=2)),
        ("Conv2d", (4, 6, 3), {}),
        ("Conv2d", (4, 6, 2), dict(groups=2, bias=False)),
        ("Conv1d", (4, 6, 1), {}),
        ("Conv3d", (4, 6, 1), {}),
    ],
    ids=lambda value: str(value) if not isinstance(value, tuple) else "x".join(map(str, value)),
)
def test_a_seed_gives_the_same_first_parameters(name: str, args: tuple, kwargs: dict, r: int) -> None:
    layers = []
    for library in (loralib, lorakit):
        torch.manual_seed(3)
        layers.append(getattr(library, name)(*args, r=r, **kwargs))
        layers.append(torch.rand(()))  # both drew equally many random numbers
    theirs, after_theirs, ours, after_ours = layers
    expected, actual = without_conv(theirs.state_dict()), ours.state_dict()
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[key], expected[key]) for key in expected)
    assert torch.equal(after_ours, after_theirs)
    assert {n.removeprefix("conv.") for n in trainable_names(theirs)} == trainable_names(ours)
    for layer in (theirs, ours):
        torch.manual_seed(4)
        layer.reset_parameters()
    expected, actual = without_conv(theirs.state_dict()), ours.state_dict()
    if not kwargs.get("fan_in_fan_out"):
        assert all(torch.equal(actual[key], expected[key]) for key in expected)


# --- the numbers -----------------------------------------------------------------------------------------------------


GRID = list(itertools.product((0, 1, 3), (1, 16), (True, False), (True, False), (True, False)))


@pytest.mark.parametrize(("r", "lora_alpha", "bias", "fan_in_fan_out", "merge_weights"), GRID)
def test_linear(r: int, lora_alpha: int, bias: bool, fan_in_fan_out: bool, merge_weights: bool) -> None:
    settings = dict(r=r, lora_alpha=lora_alpha, bias=bias, fan_in_fan_out=fan_in_fan_out, merge_weights=merge_weights)
    compare_in_every_mode(lambda dtype: pair("Linear", 5, 7, dtype=dtype, **settings), torch.randn(2, 3, 5, dtype=F64))


@pytest.mark.parametrize(("r", "lora_alpha", "bias", "fan_in_fan_out", "merge_weights"), GRID)
def test_merged_linear(r: int, lora_alpha: int, bias: bool, fan_in_fan_out: bool, merge_weights: bool) -> None:
    settings = dict(r=r, lora_alpha=lora_alpha, bias=bias, fan_in_fan_out=fan_in_fan_out, merge_weights=merge_weights)
    x = torch.randn(2, 3, 5, dtype=F64)
    for enabled in ([True], [True, False], [True, False, True], [False, True, True], [True, True, True, True]):
        compare_in_every_mode(
            lambda dtype, enabled=enabled: pair(  # type: ignore[misc]
                "MergedLinear", 5, 12, dtype=dtype, enable_lora=enabled, **settings
            ),
            x,
        )


@pytest.mark.parametrize(
    ("r", "lora_alpha", "merge_weights", "padding_idx", "scale_grad_by_freq"),
    list(itertools.product((0, 1, 3), (1, 16), (True, False), (None, 2), (True, False))),
)
def test_embedding(
    r: int, lora_alpha: int, merge_weights: bool, padding_idx: int | None, scale_grad_by_freq: bool
) -> None:
    settings = dict(r=r, lora_alpha=lora_alpha, merge_weights=merge_weights, padding_idx=padding_idx)
    compare_in_every_mode(
        lambda dtype: pair("Embedding", 9, 5, dtype=dtype, scale_grad_by_freq=scale_grad_by_freq, **settings),
        torch.randint(0, 9, (4, 6)),
    )


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "groups"),
    [
        (k, s, p, g)
        for k in (1, 2, 3)
        for s in (1, 2)
        for p in (0, 1, "same")
        for g in (1, 2, 4)
        if p != "same" or (s == 1 and k != 2)
    ],
)
def test_conv2d(kernel: int, stride: int, padding: int | str, groups: int) -> None:
    settings = dict(stride=stride, padding=padding, groups=groups)
    x = torch.randn(2, 4, 6, 5, dtype=F64)
    for r, alpha, bias, merge_weights in (
        (0, 1, True, True),
        (1, 16, False, True),
        (3, 1, True, True),
        (3, 16, True, False),
    ):
        compare_in_every_mode(
            lambda dtype, r=r, alpha=alpha, bias=bias, merge_weights=merge_weights: pair(  # type: ignore[misc]
                "Conv2d", 4, 8, kernel, r, alpha, bias=bias, merge_weights=merge_weights, dtype=dtype, **settings
            ),
            x,
        )


@pytest.mark.parametrize("padding_mode", ["reflect", "replicate", "circular"])
@pytest.mark.parametrize("dilation", [1, 2])
def test_conv2d_with_the_other_settings_of_torch(padding_mode: str, dilation: int) -> None:
    settings = dict(padding=2, padding_mode=padding_mode, dilation=dilation)
    compare_in_every_mode(
        lambda dtype: pair("Conv2d", 4, 6, 3, r=2, dtype=dtype, **settings), torch.randn(1, 4, 6, 5, dtype=F64)
    )


@pytest.mark.parametrize(("name", "shape"), [("Conv1d", (2, 4, 6)), ("Conv3d", (2, 4, 3, 2, 4))])
def test_pointwise_convolutions_which_loralib_can_do_in_every_dimension(name: str, shape: tuple[int, ...]) -> None:
    compare_in_every_mode(lambda dtype: pair(name, 4, 6, 1, r=2, dtype=dtype, groups=2), torch.randn(shape, dtype=F64))


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
@pytest.mark.parametrize("name", ["Linear", "MergedLinear"])
def test_a_seed_gives_the_same_dropout_masks(name: str, fan_in_fan_out: bool) -> None:
    more: dict[str, Any] = dict(enable_lora=[True, False, True]) if name == "MergedLinear" else {}
    theirs, ours = pair(name, 19, 6, r=2, lora_dropout=0.4, fan_in_fan_out=fan_in_fan_out, **more)
    x = torch.randn(3, 19, dtype=F64, requires_grad=True)
    results = []
    for layer in (theirs, ours):
        torch.manual_seed(5)
        first, second = layer(x), layer(x)  # the second draws are the same too
        gradients = torch.autograd.grad((first * second).sum(), [x, layer.lora_A, layer.lora_B])
        results.append((first, second, *gradients))
    assert not torch.equal(results[0][0], results[0][1])
    for expected, actual in zip(*results, strict=True):
        assert_same(actual, expected)
    theirs.eval(), ours.eval()
    with torch.no_grad():
        assert_same(ours(x), theirs(x))


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
@pytest.mark.parametrize("enabled", [[True, False, True], [False, True, True], [True]])
def test_merge_ab_and_zero_pad(enabled: list[bool], fan_in_fan_out: bool) -> None:
    """merge_AB has the weight's own layout in both: (in, out) with fan_in_fan_out. zero_pad adds rows in both."""
    theirs, ours = pair("MergedLinear", 5, 12, r=2, lora_alpha=6, enable_lora=enabled, fan_in_fan_out=fan_in_fan_out)
    assert ours.merge_AB().shape == theirs.merge_AB().shape == theirs.weight.shape
    assert ours.merge_AB().shape == ((5, 12) if fan_in_fan_out else (12, 5))
    assert_same(ours.merge_AB(), theirs.merge_AB())
    assert torch.equal(ours.delta(), ours.merge_AB())
    rows = torch.randn(12 // len(enabled) * sum(enabled), 3, 2, dtype=F64)
    assert torch.equal(ours.zero_pad(rows), theirs.zero_pad(rows))
    assert torch.equal(ours.zero_pad(rows[:, 0, 0]), theirs.zero_pad(rows[:, 0, 0]))


def test_merged_linear_takes_less_than_half_of_the_operations() -> None:
    """q and v of GPT-2's fused projection: loralib multiplies by a dense ΔW. Operations of forward and backward."""
    arguments = dict(r=8, enable_lora=[True, False, True])
    theirs, ours = (library.MergedLinear(768, 2304, **arguments) for library in (loralib, lorakit))
    frozen = nn.Linear(768, 2304).requires_grad_(False)
    x = torch.randn(256, 768, requires_grad=True)
    counts = [operations(lambda own=layer: own(x).sum().backward()) for layer in (theirs, ours, frozen)]  # type: ignore[misc]
    assert counts[1] < counts[0] / 2
    assert counts[1] - counts[2] == 6 * 256 * 16 * (768 + 2304)  # six thin products, of rank 8 for each of q and v


# --- the helpers -----------------------------------------------------------------------------------------------------


def network(library: ModuleType) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(
        library.Embedding(9, 8, r=2, lora_alpha=4),
        library.MergedLinear(8, 12, r=2, lora_alpha=4, enable_lora=[True, False, True]),
        nn.LayerNorm(12),
        library.Linear(12, 6, r=2, lora_alpha=4, bias=False),
        nn.Linear(6, 6),
        library.Linear(6, 3, r=2, lora_alpha=4),
    )
    return net.double()


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_the_helpers_choose_the_same_names(bias: Any) -> None:
    theirs, ours = network(loralib), network(lorakit)
    for library, net in ((loralib, theirs), (lorakit, ours)):
        assert library.mark_only_lora_as_trainable(net, bias) is None
    assert trainable_names(ours) == trainable_names(theirs)
    expected, actual = loralib.lora_state_dict(theirs, bias), lorakit.lora_state_dict(ours, bias)
    assert type(actual) is type(expected) is dict
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert all(actual[name].data_ptr() == ours.state_dict()[name].data_ptr() for name in actual)  # no copies, either


def test_loading_in_two_steps_reports_and_gives_the_same() -> None:
    tokens = torch.arange(9)
    results = []
    for library in (loralib, lorakit):
        trained = network(library)
        randomise(trained)
        lora = library.lora_state_dict(trained)
        base = {name: value for name, value in trained.state_dict().items() if name not in lora}
        fresh = network(library)
        fresh[0].reset_parameters()
        reports = [fresh.load_state_dict(base, strict=False), fresh.load_state_dict(lora, strict=False)]
        assert torch.equal(fresh(tokens), trained(tokens))
        results.append((fresh(tokens), [(set(r.missing_keys), r.unexpected_keys) for r in reports]))
    assert results[0][1] == results[1][1] == [(set(lora), []), (set(base), [])]
    assert_same(results[1][0], results[0][0])


# --- what programs do ------------------------------------------------------------------------------------------------


def own_layer(library: ModuleType, mixin_first: bool) -> nn.Module:
    bases = (library.LoRALayer, nn.Module) if mixin_first else (nn.Module, library.LoRALayer)

    class Scaled(*bases):  # type: ignore[misc]
        def __init__(self, size: int, r: int, lora_alpha: int, lora_dropout: float, merge_weights: bool) -> None:
            nn.Module.__init__(self)
            library.LoRALayer.__init__(self, r, lora_alpha, lora_dropout, merge_weights)
            self.base = nn.Linear(size, size)
            self.lora_A = nn.Parameter(torch.randn(r, size))
            self.lora_B = nn.Parameter(torch.randn(size, r))
            self.scaling = self.lora_alpha / self.r

        def forward(self, x: Tensor) -> Tensor:
            assert not self.merged
            return self.base(x) + self.lora_dropout(x) @ self.lora_A.T @ self.lora_B.T * self.scaling

    return Scaled(6, 2, 4, 0.5, True)


@pytest.mark.parametrize("mixin_first", [True, False])
def test_layers_of_their_own_with_the_mixin(mixin_first: bool) -> None:
    results = []
    for library in (loralib, lorakit):
        torch.manual_seed(1)
        net = nn.Sequential(own_layer(library, mixin_first), library.Linear(6, 3, r=2))
        library.mark_only_lora_as_trainable(net)
        assert isinstance(net[0], library.LoRALayer) and isinstance(net[0], nn.Module)
        results.append((trainable_names(net), set(library.lora_state_dict(net)), net(torch.ones(2, 6))))
    assert results[0][:2] == results[1][:2]
    assert_same(results[1][2], results[0][2])


def subclass_of_linear(library: ModuleType) -> nn.Module:
    class Scored(library.Linear):  # type: ignore[name-defined]
        """Its own forward from the layer's attributes, as in programs that log or gate the update."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.gate = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            if self.r > 0 and not self.merged:
                update = self.lora_dropout(x) @ self.lora_A.transpose(0, 1) @ self.lora_B.transpose(0, 1)
                return F.linear(x, self.weight, self.bias) + self.gate * update * self.scaling
            return F.linear(x, self.weight, self.bias)

    return Scored(6, 6, r=2, lora_alpha=3, lora_dropout=0.25)


def subclass_of_merged_linear(library: ModuleType) -> nn.Module:
    class FusedAttention(library.MergedLinear):  # type: ignore[name-defined]
        def __init__(self, size: int) -> None:
            super().__init__(size, 3 * size, r=2, lora_alpha=3, enable_lora=[True, False, True], fan_in_fan_out=True)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = library.MergedLinear.forward(self, x).chunk(3, -1)
            return F.scaled_dot_product_attention(q, k, v)

    return FusedAttention(6)


def subclass_of_conv_lora(library: ModuleType) -> nn.Module:
    class Downsample(library.ConvLoRA):  # type: ignore[name-defined]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(nn.Conv2d, *args, **kwargs)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.view(-1, 4, 3, 3)).flatten(1)

    return Downsample(4, 6, 3, r=2, padding=1)


@pytest.mark.parametrize("build", [subclass_of_linear, subclass_of_merged_linear, subclass_of_conv_lora])
def test_subclasses_give_the_same(build: Callable[[ModuleType], nn.Module]) -> None:
    x = torch.randn(4, 36) if build is subclass_of_conv_lora else torch.randn(4, 6)
    results = []
    for library in (loralib, lorakit):
        torch.manual_seed(2)
        layer = build(library)
        assert isinstance(layer, library.LoRALayer)
        torch.manual_seed(2)
        randomise(layer)
        y = layer(x)
        gradients = torch.autograd.grad(y.sin().sum(), [p for _, p in sorted(factors(layer).items())])
        layer.eval()
        with torch.no_grad():
            merged = layer(x)
        layer.train()
        results.append((y, *gradients, merged))
    for expected, actual in zip(*results, strict=True):
        assert_same(actual, expected)


@BOTH
def test_every_layer_is_an_instance_of_what_programs_ask_for(library: ModuleType) -> None:
    linear, merged = library.Linear(4, 6, r=2), library.MergedLinear(4, 6, r=2, enable_lora=[True, False])
    embedding, conv = library.Embedding(7, 4, r=2), library.Conv2d(4, 6, 3, r=2)
    assert all(isinstance(layer, library.LoRALayer) for layer in (linear, merged, embedding, conv))
    assert isinstance(linear, nn.Linear) and isinstance(merged, nn.Linear) and isinstance(embedding, nn.Embedding)
    assert isinstance(conv, library.ConvLoRA) and isinstance(conv, nn.Module)
    assert not isinstance(linear, library.MergedLinear | library.Embedding | library.ConvLoRA)
    assert all(issubclass(getattr(library, f"Conv{n}d"), library.ConvLoRA) for n in (1, 2, 3))


@BOTH
def test_a_weight_handed_over_is_the_one_that_is_used(library: ModuleType) -> None:
    """The loop that replaces each nn.Linear of a pretrained model by lora.Linear."""
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    x = torch.randn(2, 4)
    expected = model(x)
    for name, old in list(model.named_children()):
        if isinstance(old, nn.Linear):
            new = library.Linear(old.in_features, old.out_features, r=2, lora_alpha=4)
            new.weight, new.bias = old.weight, old.bias
            setattr(model, name, new)
            assert new.weight is old.weight
    library.mark_only_lora_as_trainable(model)
    assert trainable_names(model) == {"0.lora_A", "0.lora_B", "2.lora_A", "2.lora_B"}
    torch.testing.assert_close(model(x), expected)
    model.eval()
    torch.testing.assert_close(model(x), expected)
    model.train()
    torch.testing.assert_close(model(x), expected)


# --- where loralib fails ---------------------------------------------------------------------------------------------


def test_problem_05_merging_a_tied_head_shifts_the_logits_of_loralib_and_not_of_lorakit() -> None:
    tokens, shifts = torch.arange(11), []
    for library in (loralib, lorakit):
        torch.manual_seed(0)
        embedding, head = nn.Embedding(11, 6), library.Linear(6, 11, r=2, bias=False)
        head.weight = embedding.weight
        randomise(head)
        expected = head(embedding(tokens)).detach()
        head.eval()
        with torch.no_grad():
            shifts.append((head(embedding(tokens)) - expected).abs().max().item())
    assert shifts[0] > 0.1
    assert shifts[1] < 1e-5


@pytest.mark.parametrize("name", ["Linear", "Conv2d"])
def test_problem_08_a_state_dict_taken_in_eval_loads_wrong_in_loralib_and_right_in_lorakit(name: str) -> None:
    x = torch.randn(2, 4, 4, 4, dtype=F64)
    errors = []
    for layer in pair(name, 4, 6, *((3,) if name == "Conv2d" else ()), r=2):
        fresh, expected = copy.deepcopy(layer), layer(x)
        layer.eval()
        fresh.load_state_dict(layer.state_dict())
        errors.append((fresh(x) - expected).abs().max().item())
    assert errors[0] > 0.1
    assert errors[1] == 0


def test_problem_08_factors_loaded_in_eval_do_nothing_in_loralib_and_act_in_lorakit() -> None:
    """`model.eval()`, then loading the factors: loralib does not update the merged weight."""
    x, errors, drifts = torch.randn(2, 4, dtype=F64), [], []
    for library in (loralib, lorakit):
        torch.manual_seed(0)
        layer, trained = library.Linear(4, 6, r=2).double(), library.Linear(4, 6, r=2).double()
        trained.load_state_dict(layer.state_dict())
        randomise(trained)
        layer.eval()
        layer.load_state_dict(library.lora_state_dict(trained), strict=False)
        with torch.no_grad():
            errors.append((layer(x) - trained(x)).abs().max().item())
            layer.train()
            drifts.append((layer(x) - trained(x)).abs().max().item())
    assert min(errors[0], drifts[0]) > 0.1
    assert errors[1] < 1e-12 and drifts[1] == 0


def test_problem_09_loralib_knows_the_weight_of_a_convolution_by_another_name_and_lorakit_by_both() -> None:
    plain = nn.Conv2d(4, 6, 3)
    theirs, ours = loralib.Conv2d(4, 6, 3, r=2), lorakit.Conv2d(4, 6, 3, r=2)
    report = theirs.load_state_dict(plain.state_dict(), strict=False)
    assert {"conv.weight", "conv.bias"} <= set(report.missing_keys)
    report = ours.load_state_dict(plain.state_dict(), strict=False)
    assert (set(report.missing_keys), report.unexpected_keys) == ({"lora_A", "lora_B"}, [])
    ours.reset_parameters()
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours.weight, theirs.conv.weight)
    assert set(ours.state_dict()) == {"weight", "bias", "lora_A", "lora_B"}


@pytest.mark.parametrize(("name", "shape"), [("Conv1d", (2, 4, 6)), ("Conv3d", (2, 4, 3, 4, 3))])
def test_problem_11_loralib_crashes_on_conv1d_and_conv3d_and_lorakit_does_not(name: str, shape: tuple) -> None:
    theirs, ours = (getattr(library, name)(4, 6, 3, r=2) for library in (loralib, lorakit))
    with pytest.raises(RuntimeError, match="is invalid for input of size"):
        theirs(torch.randn(shape))
    with pytest.raises(RuntimeError, match="is invalid for input of size"):
        theirs.eval()
    assert theirs.lora_A.shape == ours.lora_A.shape == (6, 12)
    x = torch.randn(shape)
    randomise(ours)
    plain = getattr(nn, name)(4, 6, 3)
    plain.load_state_dict({"weight": ours.weight + ours.scaling * ours.delta(), "bias": ours.bias})
    torch.testing.assert_close(ours(x), plain(x))
    assert not torch.allclose(ours(x), ours._conv_forward(x, ours.weight, ours.bias))


@pytest.mark.parametrize("r", [0, 2])
def test_problem_11_loralib_refuses_tuple_kernels_and_lorakit_takes_them(r: int) -> None:
    with pytest.raises(AssertionError):
        loralib.Conv2d(4, 6, (3, 3), r=r)
    # A square kernel gives the same layer as an integer.
    layers = []
    for kernel in (3, (3, 3)):
        torch.manual_seed(0)
        layers.append(lorakit.Conv2d(4, 6, kernel, r=r))
    a, b = (layer.state_dict() for layer in layers)
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_problem_13_loralib_ignores_the_dropout_of_convolutions_and_lorakit_does_not() -> None:
    x = torch.randn(2, 4, 5, 5, dtype=F64)
    theirs, ours = pair("Conv2d", 4, 6, 3, r=2, lora_dropout=0.5)
    assert torch.equal(theirs(x), theirs(x))
    first, second = ours(x), ours(x)
    assert not torch.equal(first, second)
    theirs.eval(), ours.eval()
    with torch.no_grad():
        assert_same(ours(x), theirs(x))


def test_problem_15_after_a_global_freeze_loralib_trains_nothing_and_lorakit_the_factors() -> None:
    names = []
    for library in (loralib, lorakit):
        net = network(library).requires_grad_(False)
        library.mark_only_lora_as_trainable(net)
        names.append(trainable_names(net))
    assert names[0] == set()
    assert names[1] == set(lorakit.lora_state_dict(network(lorakit)))


def test_problem_15_loralib_leaves_out_the_biases_of_convolutions_with_lora_only_and_lorakit_does_not() -> None:
    factors_alone = {"0.lora_A", "0.lora_B"}
    theirs, ours = nn.Sequential(loralib.Conv2d(4, 6, 3, r=2)), nn.Sequential(lorakit.Conv2d(4, 6, 3, r=2))
    loralib.mark_only_lora_as_trainable(theirs, "lora_only")
    lorakit.mark_only_lora_as_trainable(ours, "lora_only")
    assert trainable_names(theirs) == set(loralib.lora_state_dict(theirs, "lora_only")) == factors_alone
    assert trainable_names(ours) == set(lorakit.lora_state_dict(ours, "lora_only")) == factors_alone | {"0.bias"}


def test_problem_15_loralib_trains_the_bias_of_a_layer_with_r_0_without_saving_it_and_lorakit_saves_it() -> None:
    theirs, ours = nn.Sequential(loralib.Linear(4, 6)), nn.Sequential(lorakit.Linear(4, 6))
    loralib.mark_only_lora_as_trainable(theirs, "lora_only")
    lorakit.mark_only_lora_as_trainable(ours, "lora_only")
    assert trainable_names(theirs) == trainable_names(ours) == {"0.bias"}
    assert set(loralib.lora_state_dict(theirs, "lora_only")) == set()
    assert set(lorakit.lora_state_dict(ours, "lora_only")) == {"0.bias"}


@pytest.mark.parametrize("made", [made for made in MADE if "plain" not in made])
def test_problem_17_train_and_eval_return_none_in_loralib_and_the_layer_in_lorakit(made: str) -> None:
    name, args, kwargs = MADE[made]
    theirs, ours = pair(name, *args, **kwargs)
    assert theirs.eval() is None and theirs.train() is None
    assert ours.eval() is ours and ours.train() is ours


def test_problem_17_backward_in_eval_is_silent_in_loralib_and_an_error_in_lorakit() -> None:
    x = torch.randn(3, 4, dtype=F64)
    theirs, ours = pair("Linear", 4, 6, r=2)
    for layer in (theirs, ours):
        loralib.mark_only_lora_as_trainable(layer, "all")
        layer.eval()
    theirs(x).sum().backward()
    assert theirs.bias.grad is not None
    assert theirs.lora_A.grad is None and theirs.lora_B.grad is None
    with pytest.raises(RuntimeError, match="its trained parameters would get no gradient"):
        ours(x).sum().backward()


def test_problem_19_loralib_crashes_without_an_enabled_block_and_lorakit_is_a_plain_linear() -> None:
    for arguments in (dict(r=2), dict(r=2, enable_lora=[False, False])):
        theirs, ours = loralib.MergedLinear(4, 6, **arguments), lorakit.MergedLinear(4, 6, **arguments)
        x = torch.randn(3, 4)
        with pytest.raises(AttributeError, match="lora_A"):
            theirs(x)
        assert torch.equal(ours(x), F.linear(x, ours.weight, ours.bias))
        assert trainable_names(ours) == trainable_names(theirs) == {"weight", "bias"}


def test_problem_19_loralib_has_equal_blocks_alone_and_lorakit_any() -> None:
    with pytest.raises(AssertionError, match="The length of enable_lora must divide out_features"):
        loralib.MergedLinear(4, 8, r=2, enable_lora=[True, False, True])
    grouped = lorakit.MergedLinear(4, 8, r=2, enable_lora=[True, False, True], splits=[4, 2, 2])
    assert grouped.lora_ind.tolist() == [True] * 4 + [False] * 2 + [True] * 2


def test_problem_20_looking_up_with_max_norm_changes_the_factors_of_loralib_and_is_refused_by_lorakit() -> None:
    layer = loralib.Embedding(9, 5, r=2, max_norm=1.0)
    randomise(layer)
    nn.init.normal_(layer.lora_A)
    before, tokens = layer.lora_A.detach().clone(), torch.arange(9)
    in_training = layer(tokens).detach()
    assert not torch.equal(layer.lora_A, before)
    layer.eval()
    assert (layer(tokens).detach() - in_training).abs().max() > 0.1
    with pytest.raises(ValueError, match="max_norm=1.0 cannot be combined with a LoRA update"):
        lorakit.Embedding(9, 5, r=2, max_norm=1.0)
    assert lorakit.Embedding(9, 5, max_norm=1.0)(tokens).norm(dim=1).max() < 1 + 1e-5


def test_problem_20_loralib_crashes_on_sparse_gradients_and_lorakit_does_not() -> None:
    theirs, ours = pair("Embedding", 9, 5, r=2, sparse=True)
    reference, _ = pair("Embedding", 9, 5, r=2)
    reference.load_state_dict(theirs.state_dict())
    tokens = torch.tensor([1, 1, 4])
    with pytest.raises(RuntimeError, match="sparse"):
        theirs(tokens).square().sum().backward()
    ours(tokens).square().sum().backward()
    reference(tokens).square().sum().backward()
    for name in ("lora_A", "lora_B"):
        assert_same(getattr(ours, name).grad.to_dense(), getattr(reference, name).grad)


def test_problem_21_loralib_does_not_pickle_and_lorakit_does() -> None:
    theirs, ours = pair("MergedLinear", 4, 6, r=2, enable_lora=[True, False])
    with pytest.raises((AttributeError, pickle.PicklingError), match="lambda"):
        pickle.dumps(theirs)
    x = torch.randn(3, 4, dtype=F64)
    assert torch.equal(pickle.loads(pickle.dumps(ours))(x), ours(x))


def test_problem_21_the_index_of_loralib_stays_where_it_was_made_and_that_of_lorakit_moves() -> None:
    theirs, ours = pair("MergedLinear", 4, 6, r=2, enable_lora=[True, False])
    assert torch.equal(ours.lora_ind, theirs.lora_ind)
    assert theirs.to("meta").lora_ind.device.type == "cpu"
    assert ours.to("meta").lora_ind.device.type == "meta"


def test_problem_22_loralib_crashes_on_float32_factors_beside_a_bfloat16_weight_and_lorakit_does_not() -> None:
    theirs, ours = pair("Linear", 4, 6, r=2, dtype=F32)
    x = torch.randn(3, 4).bfloat16()
    expected = theirs(x.float())
    for layer in (theirs, ours):
        layer.weight.data, layer.bias.data = layer.weight.data.bfloat16(), layer.bias.data.bfloat16()
    with pytest.raises(RuntimeError, match="dtype"):
        theirs(x)
    actual = ours(x)
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual.float(), expected, atol=0.05, rtol=0.05)


def test_the_flags_of_a_merged_linear_are_what_was_given_and_may_be_set() -> None:
    for library in (loralib, lorakit):

        class Subclass(library.MergedLinear):  # type: ignore[name-defined]
            def __init__(self) -> None:
                super().__init__(4, 6, r=0, enable_lora=[True, False])
                self.enable_lora = [True, False]

        assert Subclass().enable_lora == [True, False]
        assert library.MergedLinear(4, 6).enable_lora in ([False], (False,))
