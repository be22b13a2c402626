"""What a program adds from outside the package, each by one public call: a layer kind, an init, a file format."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorakit
from lorakit.core import format as formats
from lorakit.core import init, kinds, layouts

X = torch.randn(3, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    """Remove what is added here before other tests run."""
    assert lorakit.Adapter.load is not None  # its formats are there from then on
    registries: list[dict[Any, Any]] = [kinds._kinds, init._inits, formats._formats]
    before = [dict(registry) for registry in registries]
    yield
    for registry, own in zip(registries, before, strict=True):
        registry.clear()
        registry.update(own)


# --- a layer kind ----------------------------------------------------------------------------------------------------


class Their(nn.Module):
    """A linear layer of another library: not an nn.Linear, and with other attributes."""

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
    """The kind that a program writes for this layer. It holds everything about it."""

    @property
    def own_weight(self) -> Tensor:
        return self.kernel

    def _put_weight(self, weight: Any) -> None:
        self._parameters["kernel"] = weight

    def _weight_key(self, prefix: str) -> str:
        return f"{prefix}kernel"

    @classmethod
    def refusal_of(cls, module: nn.Module) -> str | None:
        return None

    def factor_shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        inputs, outputs = self.kernel.shape
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
    # The sum by hand: ΔW x is added to the input of tanh.
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


# --- an init ---------------------------------------------------------------------------------------------------------


def orthogonal(A: Tensor, B: Tensor, lookup: bool) -> None:
    nn.init.orthogonal_(B if lookup else A)
    nn.init.zeros_(A if lookup else B)


def first_rows(matrix: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """s·B₀A₀ is the first rows of W and zero elsewhere."""
    B = torch.zeros(len(matrix), rank, dtype=matrix.dtype)
    B[:rank] = torch.eye(rank, dtype=matrix.dtype) / scale
    return matrix[:rank], B


@pytest.mark.parametrize("layer", [nn.Linear(6, 5), nn.Embedding(7, 4), nn.Conv2d(3, 4, 3)])
def test_an_init_that_draws_is_added_by_one_call(layer: nn.Module) -> None:
    lorakit.add_init("orthogonal", draw=orthogonal)
    adapted = nn.Sequential(layer)
    lorakit.attach(adapted, "0", rank=2, init="orthogonal")
    A, B = adapted[0].lora_A.flatten(1), adapted[0].lora_B.flatten(1)
    drawn, zero = (B.T, A) if isinstance(layer, nn.Embedding) else (A, B)
    torch.testing.assert_close(drawn @ drawn.T, torch.eye(2))
    assert not zero.any()
    lorakit.detach(adapted)


def test_an_init_that_looks_at_the_weight_is_added_by_one_call(tmp_path: Path) -> None:
    lorakit.add_init("first-rows", take=first_rows)
    torch.manual_seed(0)
    adapted = nn.Sequential(nn.Linear(6, 5).double())
    before = adapted(X).detach()
    lorakit.attach(adapted, "0", rank=2, alpha=6, init="first-rows")
    torch.testing.assert_close(
        3 * adapted[0].lora_B @ adapted[0].lora_A, adapted[0].weight * (torch.arange(5) < 2)[:, None]
    )
    torch.testing.assert_close(adapted(X), before)
    with torch.no_grad():
        adapted[0].lora_B.zero_()
    expected = before - X @ (adapted[0].weight * (torch.arange(5) < 2)[:, None]).T
    torch.testing.assert_close(adapted(X), expected)  # what was moved into the factors is missing now
    lorakit.save(adapted, tmp_path)
    again = nn.Sequential(nn.Linear(6, 5).double())
    again.load_state_dict({"0.weight": adapted[0].weight, "0.bias": adapted[0].bias})
    lorakit.load(again, tmp_path)
    torch.testing.assert_close(again(X), expected)
    with pytest.raises(ValueError, match="'0' has a weight of rank 5 at most: init='first-rows' cannot take rank=6"):
        lorakit.attach(nn.Sequential(nn.Linear(6, 5)), "0", rank=6, init="first-rows")


def test_an_init_is_one_of_two_kinds() -> None:
    both: list[dict[str, Any]] = [{}, {"draw": orthogonal, "take": first_rows}]
    for given in both:
        with pytest.raises(ValueError, match=r"^add_init\('x'\): give draw or take, one of them\.$"):
            lorakit.add_init("x", **given)
    with pytest.raises(ValueError, match="init='x': expected one of 'kaiming', 'gaussian', 'pissa', 'olora'"):
        lorakit.attach(nn.Sequential(nn.Linear(6, 5)), "0", init="x")


# --- a file format ---------------------------------------------------------------------------------------------------


class Npz:
    """Factors as NumPy arrays, with their scale; nothing else."""

    name = "npz"
    limits = "It holds linear layers alone."

    def recognises(self, path: Path) -> bool:
        return path.suffix == ".npz"

    def read(self, path: Path, host: Any = None, alpha: float | None = None) -> lorakit.Adapter:
        import numpy

        with numpy.load(path) as arrays:
            tensors = {key: torch.from_numpy(arrays[key]) for key in arrays.files}
        names = [key.removesuffix(".A") for key in tensors if key.endswith(".A")]
        updates = {
            name: lorakit.Update(
                layouts.Matrix(),
                tensors[f"{name}.A"],
                tensors[f"{name}.B"],
                rank=len(tensors[f"{name}.A"]),
                alpha=float(tensors[f"{name}.scale"]) * len(tensors[f"{name}.A"]),
            )
            for name in names
        }
        return lorakit.Adapter(updates, targets=tuple(names))

    def write(self, adapter: lorakit.Adapter, path: Path) -> None:
        import numpy

        arrays: dict[str, Any] = {}
        for name, update in adapter.updates.items():
            update = update.pair()
            if not isinstance(update.layout, layouts.Matrix):
                raise ValueError(f"{name}: {update.kind} updates are not held by {self.name}.")
            arrays |= {f"{name}.A": update.A.numpy(), f"{name}.B": update.B.numpy(), f"{name}.scale": update.scale}
        numpy.savez(path, **arrays)


def test_a_format_is_added_by_one_call(tmp_path: Path) -> None:
    lorakit.add_format(Npz())
    torch.manual_seed(0)
    adapted = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 6)).double()
    lorakit.attach(adapted, ["0", "1"], rank=2, alpha=3, rank_pattern={"1": [1, 3]})
    with torch.no_grad():
        for parameter in lorakit.parameters(adapted):
            parameter.normal_()
    expected = adapted(X).detach()
    lorakit.save(adapted, tmp_path / "own.npz")
    lorakit.save(adapted, tmp_path / "folder.of.peft")
    adapter = lorakit.Adapter.load(tmp_path / "folder.of.peft")  # without a model, and written elsewhere
    adapter.save(tmp_path / "other", format="npz")
    assert not (tmp_path / "other").exists() and (tmp_path / "other.npz").is_file()  # NumPy adds the suffix
    for path, format in (
        (tmp_path / "own.npz", None),
        (tmp_path / "other.npz", "npz"),
        (tmp_path / "folder.of.peft", None),
    ):
        again = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 6)).double()
        again.load_state_dict({name: value for name, value in adapted.state_dict().items() if "lora" not in name})
        lorakit.load(again, path, format=format)
        torch.testing.assert_close(again(X), expected)
    lorakit.detach(adapted)
    lorakit.attach(adapted, "0", rank=2)
    embedding = nn.Sequential(nn.Embedding(4, 4))
    lorakit.attach(embedding, "0", rank=2)
    with pytest.raises(ValueError, match=r"^0: embedding updates are not held by npz\.$"):
        lorakit.save(embedding, tmp_path / "no.npz", force=True)


def test_a_format_that_there_is_not_is_named() -> None:
    message = r"^format='pef': expected one of 'peft', 'peft-0\.18', 'loralib'\. Did you mean 'peft'\?$"
    with pytest.raises(ValueError, match=message):
        lorakit.Adapter.load("x", format="pef")
