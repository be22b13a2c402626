"""`diagnose`, `save` and `merge` find an adapter that does nothing; a weight that is read counts as used."""

import copy
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lorakit
from lorakit.core.attach import adapted_layers
from models import train_a_little


class Reader(nn.Module):
    """Multiplies by the weights of its layers in ways that models do, and calls only `called`."""

    def __init__(self) -> None:
        super().__init__()
        self.called = nn.Linear(8, 8)
        self.matrix = nn.Linear(8, 8, bias=False)
        self.table = nn.Embedding(5, 8)
        self.kernel = nn.Conv1d(8, 8, 3, padding=1, groups=8)

    def forward(self, x: Tensor) -> Tensor:
        y = (self.matrix.weight @ self.called(x).T).T + F.layer_norm(self.table.weight, (8,)).sum(0)
        kernel = self.kernel.weight.view(8, 1, 3)
        return F.conv1d(y.T[None], kernel, self.kernel.bias, padding=1, groups=8)[0].T


class Product(torch.autograd.Function):
    """Another library's product with its own gradient, like those of fused losses and kernels."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx, dy: Tensor):
        x, weight = ctx.saved_tensors
        return dy @ weight, dy.T @ x


READ = ["matrix", "table", "kernel"]


def reader(targets: list[str] | None = None, **settings) -> tuple[nn.Module, nn.Module]:
    """The plain model, and an adapted one with the same weights."""
    torch.manual_seed(0)
    plain = Reader().double()
    model = copy.deepcopy(plain)
    lorakit.attach(model, targets or ["called", *READ], rank=2, **settings)
    return plain, model


def with_sums(plain: nn.Module, adapted: nn.Module) -> nn.Module:
    """A copy of the plain model with W + s·ΔW written out."""
    model = copy.deepcopy(plain)
    for name, layer in adapted_layers(adapted).items():
        A, B = layer.lora_A.detach(), layer.lora_B.detach()
        update = layer.scaling * B.flatten(1) @ A.flatten(1)
        weight = model.get_parameter(f"{name}.weight")
        with torch.no_grad():
            weight.add_((update.T if isinstance(layer, nn.Embedding) else update).view(weight.shape))
    return model


@pytest.mark.parametrize("target", READ)
def test_a_weight_that_the_model_reads_is_the_adapted_one(target: str) -> None:
    plain, model = reader([target])
    x = torch.randn(6, 8).double()
    torch.testing.assert_close(model(x), plain(x), atol=1e-12, rtol=0)
    train_a_little(model)
    expected = with_sums(plain, model)(x)
    assert (expected - plain(x)).abs().max() > 1e-4
    torch.testing.assert_close(model(x), expected, atol=1e-12, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, atol=1e-12, rtol=0)
    with lorakit.disabled(model):
        torch.testing.assert_close(model(x), plain(x), atol=1e-12, rtol=0)
    lorakit.merge(model)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, atol=1e-12, rtol=0)
    lorakit.detach(model)
    torch.testing.assert_close(model(x), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("way", ["plain", "reentrant", "non-reentrant", "compiled"])
def test_the_gradients_of_a_read_weight_are_those_of_the_sum(way: str) -> None:
    plain, model = reader()
    train_a_little(model)
    x = torch.randn(6, 8, dtype=torch.float64, requires_grad=True)

    def run(module: nn.Module) -> Tensor:
        if "reentrant" in way:
            return checkpoint(lambda x: module.forward(x), x, use_reentrant=way == "reentrant")
        return module(x)

    if way == "compiled":
        torch._dynamo.reset()
        with torch._dynamo.config.patch(error_on_recompile=True):
            compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
            for _ in range(3):
                y = compiled(x)
    else:
        y = run(model)
    y.square().sum().backward()
    summed = with_sums(plain, model)
    summed(x).square().sum().backward()
    layer, weight = model.matrix, summed.matrix.weight
    torch.testing.assert_close(layer.lora_B.grad, layer.scaling * weight.grad @ layer.lora_A.T)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert not lorakit.diagnose(model)


def test_a_table_that_is_read_whole_begins_as_a_matrix_and_a_lookup_as_an_embedding() -> None:
    class Tables(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(5, 4)
            self.positions = nn.Embedding(5, 4, padding_idx=1)
            self.queries = nn.ModuleList([nn.Embedding(2, 4)])
            self.both = nn.Embedding(5, 4)

        def forward(self, tokens: Tensor) -> Tensor:
            words = self.words(tokens).to(self.words.weight.dtype) + self.both(tokens)
            return words @ (self.positions.weight + self.both.weight).T @ self.positions.weight + self.queries[0].weight

    model = Tables()
    lorakit.attach(model, "*", rank=2)
    zero = {name: bool((layer.lora_A == 0).all()) for name, layer in adapted_layers(model).items()}
    assert zero == {"words": True, "positions": False, "queries.0": False, "both": True}
    assert (model.positions.lora_B == 0).all() and (model.positions.lora_A[:, 1] == 0).all()


def test_somebody_elses_function_gives_the_read_weight_a_gradient() -> None:
    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor, fused: bool = True) -> Tensor:
            x = self.body(x)
            return Product.apply(x, self.head.weight) if fused else self.head(x)

    model = Fused()
    lorakit.attach(model, ["body", "head"], rank=2)
    with torch.no_grad():
        model(torch.ones(2, 8), fused=False)  # a layer that was called before gives the same result
    model(torch.ones(2, 8)).sum().backward()
    assert model.head.lora_B.grad is not None and model.head.lora_B.grad.abs().max() > 0


def test_whoever_looks_at_a_weight_sees_the_stored_one() -> None:
    plain, model = reader()
    before = dict(plain.named_parameters())
    stored = dict(model.named_parameters())
    train_a_little(model)
    model(torch.randn(6, 8).double())
    for name in ("called", *READ):
        layer = model.get_submodule(name)
        assert layer.weight is stored[f"{name}.weight"]
        torch.testing.assert_close(layer.weight, before[f"{name}.weight"], atol=0, rtol=0)
    model.matrix.weight = nn.Parameter(torch.zeros(8, 8).double())  # it can still be set
    assert model.matrix.weight is dict(model.named_parameters())["matrix.weight"]
    again = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert again.matrix.weight.abs().max() == 0 and lorakit.diagnose(again).used == 4


class Branches(nn.Module):
    """A used body with a skipped layer, experts that are idle, and a tower that is not called."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleDict({"first": nn.Linear(4, 4), "skipped": nn.Linear(4, 4)})
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.deep_experts = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(4, 4)}) for _ in range(3))
        self.tower = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.deep_experts[2].get_submodule("up")(self.experts[1](self.body["first"](x)))


IDLE = ("experts.0", "experts.2", "deep_experts.0.up", "deep_experts.1.up", "tower.0", "tower.1")


def test_a_skipped_layer_is_silent_and_an_idle_part_is_not(tmp_path: Path) -> None:
    model = Branches()
    lorakit.attach(model, rank=2)
    model(torch.ones(2, 4)).sum().backward()
    found = lorakit.diagnose(model)
    assert found and found.silent == ("body.skipped",) and found.idle == IDLE and found.used == 3
    assert "body.skipped.lora_A" in found.without_gradient and "body.first.lora_A" not in found.without_gradient
    assert "never used" in str(found) and "idle" in str(found)
    with pytest.raises(
        ValueError, match=r"1 adapted layers of Branches do nothing.*\n  body.skipped: .*\n.*force=True"
    ):
        lorakit.save(model, tmp_path)
    with pytest.raises(ValueError, match=r"body.skipped: .*\n.*force=True"):
        lorakit.merge(model)
    lorakit.save(model, tmp_path, force=True)
    lorakit.merge(model, force=True)
    lorakit.unmerge(model)
    lorakit.detach(model.body["skipped"])  # the other remedy
    with pytest.warns(
        UserWarning, match=r"2 adapted layers lie in parts of Branches .* not used:\n  tower.0\n  tower.1"
    ):
        lorakit.save(model, tmp_path)


def test_idle_parts_alone_are_saved_and_merged(tmp_path: Path) -> None:
    """Experts of a mixture give no warning; a whole tower gives one."""
    for targets, warned in ((["body.first", "experts.*", "deep_experts.*"], 0), (["body.first", "tower.*"], 1)):
        model = Branches()
        lorakit.attach(model, targets, rank=2)
        model(torch.ones(2, 4)).sum().backward()
        assert lorakit.diagnose(model).idle and not lorakit.diagnose(model).silent
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            lorakit.save(model, tmp_path)
        assert len(caught) == warned
        lorakit.merge(model)


@pytest.mark.parametrize("use", ["nothing", "no_grad", "inference_mode", "disabled"])
def test_a_model_that_is_only_loaded_and_used_is_saved_and_merged(use: str, tmp_path: Path) -> None:
    model = Branches()
    lorakit.attach(model, rank=2)
    contexts: dict[str, Callable] = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}
    with contexts.get(use, lambda: lorakit.disabled(model))():
        if use != "nothing":
            model(torch.ones(2, 4))
    assert not lorakit.diagnose(model)
    lorakit.save(model, tmp_path)
    lorakit.load(model, tmp_path)
    lorakit.merge(model)


def test_marks_can_be_forgotten() -> None:
    model = Branches()
    lorakit.attach(model, rank=2)
    model(torch.ones(2, 4)).sum().backward()
    assert lorakit.diagnose(model, reset=True).used == 3
    assert lorakit.diagnose(model).used == 0
    lorakit.merge(model)


def test_a_layer_that_was_replaced_is_named(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    lorakit.attach(model, ["0", "1"], rank=2)
    copied = copy.deepcopy(model)
    model[1] = nn.Linear(4, 4)
    copied[0] = nn.Identity()
    assert lorakit.diagnose(model).gone == {"1": "Linear"} and lorakit.diagnose(copied).gone == {"0": "Identity"}
    with pytest.raises(ValueError, match=r"their updates are lost: 1 \(now a Linear\)"):
        lorakit.save(model, tmp_path)
    lorakit.save(model, tmp_path, force=True)


def test_statistics_that_move_and_parameters_that_no_file_holds_are_named() -> None:
    model = nn.Sequential(nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4), nn.Flatten(), nn.Linear(20, 2))
    lorakit.attach(model, ["0", "3"], rank=2)
    assert not lorakit.diagnose(model)
    with torch.no_grad():
        model[1].running_mean += 1  # for any reason
    model[3].bias.requires_grad = True
    found = lorakit.diagnose(model)
    assert found.moved == ("1.running_mean",) and found.not_saved == ("3.bias",)
    assert "no adapter file holds them" in str(found) and "3.bias" in str(found)
    lorakit.detach(model)
    with pytest.raises(ValueError, match="Sequential has no adapted layer"):
        lorakit.diagnose(model)


def test_dropout_that_never_acts_is_named() -> None:
    _, model = reader(["called", "matrix"], dropout=0.5)
    model(torch.randn(6, 8).double()).sum().backward()
    assert lorakit.diagnose(model).without_dropout == ("matrix",)


def test_a_compiled_graph_leaves_no_note_and_is_whole_with_checkpointing() -> None:
    """There, gradients and steps show which layers were used."""
    torch._dynamo.reset()
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "skipped": nn.Linear(4, 4)})
    lorakit.attach(model, ["a", "b", "skipped"], rank=2)
    compiled = torch.compile(
        lambda x: checkpoint(model["a"], x, use_reentrant=False), fullgraph=True, backend="aot_eager"
    )
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model["b"](compiled(torch.randn(3, 4))).sum().backward()
    assert lorakit.diagnose(model).silent == ("skipped",)
    optimizer.step()
    optimizer.zero_grad()
    assert lorakit.diagnose(model, reset=True).silent == ("skipped",)
    assert lorakit.diagnose(model).used == 0


def test_factors_that_were_written_on_are_no_training() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    lorakit.attach(model, ["0", "1"], rank=2)
    nn.init.normal_(model[0].lora_B)
    assert lorakit.diagnose(model).silent == ()
    lorakit.merge(model)


def test_factors_that_something_froze_are_named() -> None:
    """transformers' `resize_token_embeddings` freezes the whole module like its weight."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    lorakit.attach(model, ["0", "1"], rank=2)
    model[1].requires_grad_(False)
    model(torch.randn(2, 4)).sum().backward()
    assert lorakit.diagnose(model).without_gradient == ("1.lora_A", "1.lora_B")


class Doubled(nn.Linear):
    """A subclass, so the update is added to its forward pass."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * nn.functional.linear(x, self.weight, self.bias)


@pytest.mark.parametrize("calls", [True, False])
def test_a_layer_of_another_class_is_read_as_the_sum_too(calls: bool) -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Doubled(4, 4, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return (self.layer(x) if calls else 0) + x @ self.layer.weight.T

    torch.manual_seed(0)
    model, x = Reader().double(), torch.randn(3, 4, dtype=torch.float64)
    W = model.layer.weight.detach().clone()
    lorakit.attach(model, "layer", rank=2)
    nn.init.normal_(model.layer.lora_B)
    layer = model.layer
    delta = layer.scaling * layer.lora_B @ layer.lora_A
    called = 2 * x @ W.T + x @ delta.T if calls else 0
    torch.testing.assert_close(model(x), called + x @ (W + delta).T)
    assert torch.equal(layer.weight, W)
