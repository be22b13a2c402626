"""What an adaptation did to the weights: the measurements of Hu et al. 2021, section 7 and appendix H, and two more.

    ΔW = s·B A = U Σ Vᵀ            B (out, r)   A (r, in)   →   U (out, r)   Σ (r)   V (in, r)

A column of V is a direction of the input that the adapter reads. The same column of U is the direction of the output
that it writes, and σ is the strength. From the factors alone:

    how much         ‖ΔW‖ = √Σσ², and how many directions carry it (`effective_rank`, `directions_holding`)
    how similar      whether two adapters learnt the same directions (`subspace_similarity`, eq. 4, figures 3 and 4)

With the weight W that was adapted:

    how far          ‖W' − W‖ / ‖W‖
    how amplified    ‖ΔW‖ / ‖Uᵀ W V‖: how many times larger ΔW is than what W itself does in ΔW's directions
                     (`projections`, section 7.3, table 7)
    where            the share of ΔW's energy in W's own strongest directions (`energy_within`)
    what is new      directions of W' that W does not have (`intruder_cosines`, Shuttleworth et al. 2024)

ΔW has in·out entries, but only r directions. The SVD does not form it: with thin QR decompositions B = Q_B R_B and
Aᵀ = Q_A R_A, ΔW = Q_B (s·R_B R_Aᵀ) Q_Aᵀ, so only an r × r matrix is decomposed.

W is decomposed in full, one weight at a time, on its device and in float32 or more. Every update is a matrix
(out, in). For an embedding it is (dim, vocabulary). For a convolution it is the kernel with in/groups·∏k columns, or,
in loralib's layout, the product of its two factors. A stack of experts gives one matrix for each expert, `name[3]`.

DoRA: ΔW is s·B A, the change of direction. The gain g is one number for each row of W and has no low rank. It therefore
counts only where W is known, in W' = g ⊙ (W + s·B A): in "how far" and in "what is new".

These numbers do not say how well the adapter works: a large change can be useless and a small one decisive.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...core.adapted import AdaptedLayer
from ...core.adapter import Adapter, Update
from ...core.attach import adapted_layers
from ...core.errors import LoraError
from ...core.matrix import precise
from ...core.mergeable import unmerged

TOP, THRESHOLD = 10, 0.5  # of `intruder_cosines`: the directions looked at, and the cosine below which one is new
_LISTED = 20  # names in an error


@dataclass(frozen=True)
class Factors:
    """One matrix of an adapter: ΔW = scale · B A.   A (r, in)   B (out, r)"""

    A: Tensor
    B: Tensor
    scale: float
    module: str  # the update's name
    expert: int | None = None  # which of the update's matrices, if it has several

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)"""
        return self.B.shape[0], self.A.shape[1]


@dataclass(frozen=True)
class Directions:
    """A thin SVD, strongest direction first: left (out, k), values (k), right (in, k). k is the rank and may be 0."""

    left: Tensor
    values: Tensor
    right: Tensor

    def to(self, like: Tensor) -> Directions:
        """The same on the device and in the dtype of `like`."""
        return Directions(self.left.to(like), self.values.to(like), self.right.to(like))


@dataclass(frozen=True)
class Projections:
    """‖Uᵀ W V‖ with the k directions of ΔW, with W's own k strongest, and with k random ones (table 7)."""

    update: float
    strongest: float
    random: float


@dataclass(frozen=True)
class AgainstBase:
    """One update beside the weight W that it changes. A ratio to zero is None."""

    weight_norm: float  # ‖W‖
    change: float | None  # ‖W' − W‖ / ‖W‖; with DoRA, including the gain
    projections: Projections
    amplification: float | None  # ‖ΔW‖ / ‖Uᵀ W V‖
    # k → shares of ‖ΔW‖² within W's k strongest output and input directions; k: powers of two, and ΔW's rank
    energy_within: dict[int, tuple[float, float]]
    cosines: tuple[float, ...]  # `intruder_cosines`

    @property
    def intruders(self) -> int:
        """How many of the strongest directions of W' are new: W had no similar one."""
        return sum(cosine < THRESHOLD for cosine in self.cosines)


@dataclass(frozen=True)
class Analysis:
    """One matrix of an adapter. Norms are Frobenius norms."""

    name: str
    shape: tuple[int, int]  # (out, in)
    rank: int  # rows of A
    scale: float
    dora: bool
    singular_values: tuple[float, ...]  # of ΔW, largest first; as many as ΔW has rank
    norm: float  # ‖ΔW‖
    effective_rank: float
    directions_90: int  # that hold 90 % of ‖ΔW‖²
    directions_99: int
    base: AgainstBase | None = None


@dataclass(frozen=True)
class Similarity:
    """φ(i, j) of one matrix in two adapters of ranks r₁ and r₂, at row i − 1 and column j − 1.

    It is computed from A's rows, from ΔW's input directions (right) and from its output directions (left). If B has
    full rank, A and the input directions span the same space, but in another order: A's order depends on how A and B
    share the product, ΔW's order does not. B starts at zero, so similarity on the left was learnt. A starts at random
    from the seed. PiSSA's and OLoRA's files hold [A; A₀], with A₀ taken from W, so φ of A says little there.
    """

    name: str
    shape: tuple[int, int]
    A: tuple[tuple[float, ...], ...]
    right: tuple[tuple[float, ...], ...]
    left: tuple[tuple[float, ...], ...]

    @property
    def ranks(self) -> tuple[int, int]:
        """r₁ and r₂, the rows of the two A's."""
        return len(self.A), len(self.A[0]) if self.A else 0

    @property
    def chance(self) -> tuple[float, float]:
        """φ(r₁, r₂) of random spaces: of the input, of the output."""
        outputs, inputs = self.shape
        return max(self.ranks) / inputs, max(self.ranks) / outputs


# --- one matrix ------------------------------------------------------------------------------------------------------


def directions(A: Tensor, B: Tensor, scale: float = 1.0) -> Directions:
    """The SVD of scale · B A from its factors, in float64, without forming ΔW (out, in).

    A (r, in)   B (out, r).   Singular values that are only rounding errors of the product are left out with their
    directions, which would be arbitrary. ΔW = 0 has none.
    """
    left_basis, left_part = torch.linalg.qr(B.double())  # (out, k), (k, r)
    right_basis, right_part = torch.linalg.qr(A.double().T)
    left, values, right = torch.linalg.svd(scale * left_part @ right_part.T, full_matrices=False)
    size = abs(scale) * float(left_part.norm() * right_part.norm())
    kept = int((values > size * max(len(B), A.shape[1]) * torch.finfo(torch.float64).eps).sum())
    return Directions(left_basis @ left[:, :kept], values[:kept], right_basis @ right[:kept].T)


def effective_rank(values: Tensor) -> float:
    """exp(−Σ p ln p) with p = σ²/Σσ², the directions' shares of the energy. k equal values give k; no values give 0.

    values (k), positive. Roy and Vetterli 2007 use the shares of Σσ. The squares count the energy ‖ΔW‖², as everywhere
    else in this file.
    """
    if not len(values):
        return 0.0
    shares = _shares(values)
    return math.exp(float(torch.special.entr(shares).sum()))


def directions_holding(values: Tensor, share: float) -> int:
    """The smallest number of directions that hold `share` of the energy Σσ². values (k), largest first."""
    if not len(values):
        return 0
    reached = _shares(values).cumsum(0)
    return min(int((reached < share * (1 - 1e-12)).sum()) + 1, len(values))


def subspace_similarity(first: Tensor, second: Tensor) -> Tensor:
    """φ(i, j) = ‖U₁ᵀ U₂‖² / min(i, j), with the first i columns of `first` and the first j of `second`: (r₁, r₂).

    first (d, r₁)   second (d, r₂), each with orthonormal columns. 1: the smaller of the two spaces lies in the larger;
    0: they are orthogonal. Hu et al. 2021, eq. 4 (appendix G derives it from the projection metric).

    For random spaces it is max(i, j)/d: a random U₁ has E[U₁U₁ᵀ] = (i/d)·I, so E‖U₁ᵀU₂‖² = (i/d)·tr(U₂U₂ᵀ) = i·j/d.
    """
    rows = torch.arange(1, first.shape[1] + 1, device=first.device)
    columns = torch.arange(1, second.shape[1] + 1, device=first.device)
    together = (first.T @ second).square().cumsum(0).cumsum(1)
    return (together / torch.minimum(rows[:, None], columns)).clamp(max=1)


def projections(update: Directions, weight: Tensor, weight_values: Tensor) -> Projections:
    """‖Uᵀ W V‖ in three pairs of k-dimensional spaces. weight (out, in), weight_values: its singular values.

    random: the root mean square over all spaces, from E‖Uᵀ W V‖² = (k/out)·(k/in)·‖W‖². The paper draws one instead.
    """
    k = len(update.values)
    return Projections(
        update=float((update.left.T @ weight @ update.right).norm()),
        strongest=float(weight_values[:k].norm()),
        random=float(k * weight_values.norm() / math.sqrt(weight.numel())),
    )


def energy_within(update: Directions, left: Tensor, right: Tensor) -> dict[int, tuple[float, float]]:
    """For several k, ‖U_kᵀ ΔW‖² / ‖ΔW‖² and ‖ΔW V_k‖² / ‖ΔW‖² with the first k columns of W's U and V.

    left (out, m), right (in, m). k: the powers of two up to m, and ΔW's own rank. Empty for ΔW = 0. For random
    directions the two shares are k/out and k/in.
    """
    if not len(update.values):
        return {}
    total = update.values.square().sum()
    on_left = (left.T @ (update.left * update.values)).square().sum(1).cumsum(0) / total
    on_right = (right.T @ (update.right * update.values)).square().sum(1).cumsum(0) / total
    most = left.shape[1]
    powers = {1 << bit for bit in range(most.bit_length())}
    chosen = sorted(k for k in {*powers, len(update.values)} if k <= most)
    return {k: (float(on_left[k - 1].clamp(max=1)), float(on_right[k - 1].clamp(max=1))) for k in chosen}


def intruder_cosines(before: Tensor, after: Tensor) -> tuple[float, ...]:
    """For each column of `after`, the largest |cosine| with a column of `before`.

    before (out, m): W's left singular vectors. after (out, k): the strongest left singular vectors of W'. A small
    cosine marks an intruder dimension (Shuttleworth et al. 2024): a strong direction that is similar to none of W's.
    Directions of W with equal singular values may rotate among themselves. Each then has small cosines without being
    new.
    """
    if not after.shape[1]:
        return ()
    return tuple((before.T @ after).abs().amax(0).clamp(max=1).tolist())


# --- an adapter ------------------------------------------------------------------------------------------------------


def factors_of(adapter: Adapter) -> dict[str, Factors]:
    """The matrices of `adapter` by name, a stack of experts as `name[0]`, `name[1]`, …

    Raises ValueError for an adapter without updates, and for updates with NaN or infinite numbers, which it names.
    """
    found: dict[str, Factors] = {}
    for name, update in adapter.updates.items():
        for number, (end, (A, B)) in enumerate(update.layout.matrices(update.A, update.B).items()):
            found[name + end] = Factors(A, B, update.scale, name, number if end else None)
    if not found:
        raise LoraError("the adapter has no LoRA update to analyze, only tensors trained whole.")
    broken = [name for name, f in found.items() if not (torch.isfinite(f.A).all() and torch.isfinite(f.B).all())]
    if broken:
        raise LoraError(f"NaN or infinite numbers in the factors of:\n{_listed(broken)}")
    return found


@torch.no_grad()
def analyze(adapter: Adapter, model: nn.Module | None = None) -> Iterator[Analysis]:
    """Each matrix of `adapter`, one after another.

    model: the model that holds the adapter, merged or not (`lorakit.load(model, path)`). The measures that need base
    weights read them from it, one at a time. Raises ValueError naming updates that are not in the model.
    """
    layers = adapted_layers(model) if model is not None else {}
    missing = [name for name in adapter.updates if name not in layers]
    if model is not None and missing:
        raise LoraError(f"{type(model).__name__} does not hold this adapter; not in it:\n{_listed(missing)}")
    for name, factors in factors_of(adapter).items():
        update = directions(factors.A, factors.B, factors.scale)
        layer = layers.get(factors.module)
        yield Analysis(
            name=name,
            shape=factors.shape,
            rank=factors.A.shape[0],
            scale=factors.scale,
            dora=adapter.updates[factors.module].magnitude is not None,
            singular_values=tuple(update.values.tolist()),
            norm=float(update.values.norm()),
            effective_rank=effective_rank(update.values),
            directions_90=directions_holding(update.values, 0.9),
            directions_99=directions_holding(update.values, 0.99),
            base=None if layer is None else _against_base(update, layer, factors, adapter.updates[factors.module]),
        )


def matched(first: Adapter, second: Adapter) -> dict[str, tuple[Factors, Factors]]:
    """Each matrix of the two adapters by name; their ranks may differ.

    Raises ValueError listing the matrices that only one adapter has, or that differ in shape.
    """
    ours, theirs = factors_of(first), factors_of(second)
    problems = [f"{name}: in the first adapter only" for name in ours if name not in theirs]
    problems += [f"{name}: in the second adapter only" for name in theirs if name not in ours]
    problems += [
        f"{name}: {' × '.join(map(str, own.shape))} in the first adapter, "
        f"{' × '.join(map(str, theirs[name].shape))} in the second"
        for name, own in ours.items()
        if name in theirs and own.shape != theirs[name].shape
    ]
    if problems:
        raise LoraError(f"the two adapters do not cover the same modules:\n{_listed(problems)}")
    return {name: (own, theirs[name]) for name, own in ours.items()}


def similarities(first: Adapter, second: Adapter) -> list[Similarity]:
    """φ of each matrix of two adapters. Raises ValueError if they do not cover the same modules (`matched`)."""
    return [_similarity(name, *pair) for name, pair in matched(first, second).items()]


def _similarity(name: str, first: Factors, second: Factors) -> Similarity:
    mine, other = (directions(factors.A, factors.B) for factors in (first, second))
    # The right singular vectors of A alone are those of I A.
    row_spaces = (directions(factors.A, torch.eye(len(factors.A))).right for factors in (first, second))
    return Similarity(
        name=name,
        shape=first.shape,
        A=_rows(subspace_similarity(*row_spaces)),
        right=_rows(subspace_similarity(mine.right, other.right)),
        left=_rows(subspace_similarity(mine.left, other.left)),
    )


def _against_base(update: Directions, layer: AdaptedLayer, factors: Factors, whole: Update) -> AgainstBase:
    with unmerged(layer):
        product = layer.as_product(layer.weight)
        weight = precise(product if factors.expert is None else product[factors.expert])
        update = update.to(weight)
        if whole.magnitude is None:
            changed = weight + (update.left * update.values) @ update.right.T
            moved = float(update.values.norm())
        else:
            changed = layer.as_product(layer.from_matrix(layer.adapted_matrix()))
            moved = float((changed - weight).norm())
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    after = torch.linalg.svd(changed, full_matrices=False)[0][:, :TOP]
    norm, projected = float(values.norm()), projections(update, weight, values)
    return AgainstBase(
        weight_norm=norm,
        change=moved / norm if norm else None,
        projections=projected,
        amplification=float(update.values.norm()) / projected.update if projected.update else None,
        energy_within=energy_within(update, left, right.T),
        cosines=intruder_cosines(left, after),
    )


def _shares(values: Tensor) -> Tensor:
    # First divided by the largest value, because the squares of a tiny update would underflow.
    energy = (values.double() / values[0]).square()
    return energy / energy.sum()


def _rows(matrix: Tensor) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row) for row in matrix.tolist())


def _listed(lines: Sequence[str]) -> str:
    more = [f"… and {len(lines) - _LISTED} more"] if len(lines) > _LISTED else []
    return "\n".join(f"  {line}" for line in [*lines[:_LISTED], *more])
