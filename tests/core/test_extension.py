"""What a program adds from outside the package, each by one public call: a layer kind, an init, a file format."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorakit
from lorakit.core import kinds

X = torch.randn(3, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    """What is added here is not there for other tests."""
    before = dict(kinds._kinds)
    yield
    kinds._kinds.clear()
    kinds._kinds.update(before)


# --- a layer kind ----------------------------------------------------------------------------------------------------


class Their(nn.Module):
    """A linear layer of another library: no nn.Linear, with attributes of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 6, dtype=torch.float64))
        self.bias = nn.Parameter(torch.randn(5, dtype=torch.float64))
        self.note = "theirs"

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias

    def theirs(self) -> str:
        return self.note


class Packed(nn.Module):
    """A linear layer that stores no weight as such: eight levels and a scale, as quantised layers do."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = 6, 5
        self.register_buffer("levels", torch.randint(-4, 4, (5, 6), dtype=torch.int8))
        self.scale = nn.Parameter(torch.rand(5, 1, dtype=torch.float64), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.levels.to(x.dtype) * self.scale).T


class Channels(nn.Module):
    """x (batch, in, positions) → (batch, out, positions), with a weight stored as (in, out)."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(6, 5, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bip,io->bop", x, self.kernel)


class AdaptedChannels(lorakit.AdaptedLayer, Channels):
    """The kind that a program writes for it: all that is said about the layer stands here."""

    @property
    def own_weight(self) -> Tensor:
        return self._parameters["kernel"]

    def _put_weight(self, weight: Any) -> None:
        self._parameters["kernel"] = weight

    def _weight_key(self, prefix: str) -> str:
        return f"{prefix}kernel"

    @classmethod
    def refusal_of(cls, module: nn.Module) -> str | None:
        return None

    def factor_shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        inputs, outputs = self._parameters["kernel"].shape
        return (rank, inputs), (outputs, rank)

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.T

    def from_matrix(self, matrix: Tensor) -> Tensor:
        return matrix.T

    def forward(self, x: Tensor) -> Tensor:
        y = torch.einsum("bip,io->bop", x, self.own_weight)
        if not self.active:
            return self.guard(y)
        self.mark()
        A, B = self.factors()
        return y + self.scaling * (B @ (A @ x))


def model(cls: type[nn.Module]) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(cls(), nn.Tanh())


def inputs(cls: type[nn.Module]) -> Tensor:
    return X[..., None] if cls is Channels else X


def delta(adapter: lorakit.Adapter) -> Tensor:
    (update,) = adapter.updates.values()
    return update.scale * update.B @ update.A


@pytest.mark.parametrize(
    ("cls", "kind", "targets"),
    [
        (Their, lorakit.Linear, "all-linear"),
        (Their, lorakit.Beside, "all-linear"),
        (Packed, lorakit.Beside, "all-linear"),
        (Channels, AdaptedChannels, "0"),
    ],
)
def test_a_kind_is_added_by_one_call(cls: type[nn.Module], kind: Any, targets: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be adapted|finds no linear layer"):
        lorakit.attach(model(cls), targets)
    lorakit.adapts(cls, kind)
    adapted, x = model(cls), inputs(cls)
    before = adapted(x).detach()
    report = lorakit.attach(adapted, targets, rank=2, alpha=3)
    assert [(row.name, row.rank) for row in report.rows] == [("0", 2)] and isinstance(adapted[0], cls)
    assert torch.equal(adapted(x), before)
    torch.manual_seed(2)
    with torch.no_grad():
        for factor in (adapted[0].lora_A, adapted[0].lora_B):
            factor.copy_(torch.randn_like(factor))
    adapter = lorakit.extract(adapted)
    # The sum by hand: what goes into tanh gets ΔW x more.
    plain, more = model(cls)[0](x), torch.einsum("oi,bi->bo", delta(adapter), X)
    expected = torch.tanh(plain + more.view(plain.shape))
    torch.testing.assert_close(adapted(x), expected)
    adapted(x).sum().backward()
    assert lorakit.diagnose(adapted).silent == () and adapted[0].lora_A.grad.abs().max() > 0

    lorakit.save(adapted, tmp_path / "peft")
    lorakit.save(adapted, tmp_path / "loralib.pt")
    for path, alpha in ((tmp_path / "peft", None), (tmp_path / "loralib.pt", 3)):
        again = model(cls)
        lorakit.load(again, path, alpha=alpha)
        torch.testing.assert_close(again(x), expected)
    both = lorakit.combine([adapter, adapter], [1.0, 0.5])
    torch.testing.assert_close(delta(both), 1.5 * delta(adapter))
    if cls is not Packed:
        lorakit.merge(adapted)
        with torch.no_grad():
            torch.testing.assert_close(adapted(x), expected)
        lorakit.unmerge(adapted)
    lorakit.detach(adapted)
    assert type(adapted[0]) is cls and torch.equal(adapted(x), before)
    assert getattr(adapted[0], "note", "theirs") == "theirs"


def test_methods_of_the_plain_class_stay() -> None:
    lorakit.adapts(Their, lorakit.Linear)
    adapted = model(Their)
    lorakit.attach(adapted, "0", rank=2)
    assert adapted[0].theirs() == "theirs"
    assert (adapted[0].in_features, adapted[0].out_features) == (6, 5)


def test_a_kind_by_its_name_is_not_imported() -> None:
    lorakit.adapts(f"{Their.__module__}.Their", lorakit.Linear)
    lorakit.attach(model(Their), "0", rank=2)


@pytest.mark.parametrize(("plain", "kind"), [(3, lorakit.Linear), (int, lorakit.Linear), (Their, Their), (Their, 3)])
def test_what_is_no_kind_is_refused(plain: Any, kind: Any) -> None:
    with pytest.raises(TypeError, match=r"^adapts\(.*: expected a subclass of "):
        lorakit.adapts(plain, kind)


def test_a_packed_layer_says_that_it_cannot_be_merged() -> None:
    lorakit.adapts(Packed, lorakit.Beside)
    adapted = model(Packed)
    lorakit.attach(adapted, "0", rank=2)
    with pytest.raises(ValueError, match="'0' cannot be merged: Packed computes its weight from other parameters"):
        lorakit.merge(adapted, force=True)


def test_a_layer_that_is_not_linear_is_refused_beside() -> None:
    class Squared(Packed):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).square()

    lorakit.adapts(Squared, lorakit.Beside)
    with pytest.raises(ValueError, match="it is not linear in x"):
        lorakit.attach(model(Squared), "0", rank=2)
