"""The measures on constructed cases with known answers, and against dense float64 SVDs of W and the merged weight.

The dense reference takes the weights of a plain copy of the model and of the merged model, so it shares neither the
factors nor the decomposition with the code under test.
"""

import copy
import dataclasses
import inspect
import math
import warnings
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import lorakit
import models
from lorakit.core.adapted import AdaptedLayer
from lorakit.study.analysis import measures, page, report, run
from lorakit.study.analysis.measures import (
    analyze,
    directions,
    directions_holding,
    effective_rank,
    energy_within,
    factors_of,
    intruder_cosines,
    projections,
    similarities,
    subspace_similarity,
)
from models import train_a_little


def orthonormal(rows: int, columns: int) -> Tensor:
    return torch.linalg.qr(torch.randn(rows, columns).double())[0]


def planted(left: Tensor, values: list[float], right: Tensor) -> Tensor:
    return left @ torch.diag(torch.tensor(values).double()) @ right.T


# --- the spectrum of ΔW ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("out", "inputs", "rank"), [(20, 30, 4), (30, 20, 4), (6, 5, 5), (4, 30, 9), (1, 3, 1)])
def test_directions_are_the_svd_of_the_dense_product(out: int, inputs: int, rank: int) -> None:
    A, B = torch.randn(rank, inputs), torch.randn(out, rank)
    dense = 0.5 * B.double() @ A.double()
    found = directions(A, B, 0.5)
    count = min(rank, out, inputs)
    torch.testing.assert_close(found.values, torch.linalg.svdvals(dense)[:count], atol=1e-12, rtol=1e-12)
    torch.testing.assert_close((found.left * found.values) @ found.right.T, dense, atol=1e-12, rtol=1e-12)
    eye = torch.eye(count).double()
    for basis in (found.left, found.right):
        torch.testing.assert_close(basis.T @ basis, eye, atol=1e-12, rtol=0)


def test_a_planted_rank_is_found_and_zero_has_no_directions() -> None:
    B = torch.randn(20, 2) @ torch.randn(2, 6)  # of rank 2, in float32
    A = torch.randn(6, 30)
    assert len(directions(A.double(), (torch.randn(20, 2).double() @ torch.randn(2, 6).double())).values) == 2
    assert directions(A, B).values[2:].sum() < 1e-4 * directions(A, B).values[0]
    nothing = directions(A, torch.zeros(20, 6))
    assert (nothing.left.shape, nothing.values.shape, nothing.right.shape) == ((20, 0), (0,), (30, 0))
    # PiSSA's file before the first step: [B, −B] [A; A] is zero, so its singular values are rounding errors.
    assert len(directions(torch.cat((A, A)), torch.cat((B, -B), 1)).values) == 0


def test_effective_rank_counts_equal_directions_and_weighs_others() -> None:
    assert effective_rank(torch.full((7,), 0.3)) == pytest.approx(7)
    assert effective_rank(torch.tensor([5.0])) == 1
    assert effective_rank(torch.tensor([])) == 0
    # Shares of the energy 3/4 and 1/4: exp of their entropy is (4/3)^(3/4) · 4^(1/4).
    assert effective_rank(torch.tensor([3.0, 1.0]).sqrt()) == pytest.approx((4 / 3) ** 0.75 * 4**0.25)
    assert effective_rank(1e-200 * torch.tensor([3.0, 1.0]).double().sqrt()) == pytest.approx(1.7547653506)


def test_directions_holding_counts_the_fewest() -> None:
    values = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64).sqrt()
    assert [directions_holding(values, share) for share in (0.4, 0.5, 0.79, 0.9, 0.99, 1.0)] == [1, 1, 2, 3, 4, 4]
    assert directions_holding(torch.ones(10), 0.9) == 9
    assert directions_holding(torch.tensor([]), 0.9) == 0


# --- φ ---------------------------------------------------------------------------------------------------------------


def test_phi_of_equal_orthogonal_nested_and_slanted_spaces() -> None:
    basis = orthonormal(40, 12)
    torch.testing.assert_close(subspace_similarity(basis, basis), torch.ones(12, 12).double())
    assert subspace_similarity(basis[:, :5], basis[:, 5:]).max() < 1e-24
    turned = basis @ orthonormal(12, 12)  # the same space in other directions
    phi = subspace_similarity(basis[:, :4], turned)
    assert phi.shape == (4, 12)
    torch.testing.assert_close(phi[:, -1], torch.ones(4).double())  # nested
    assert phi[0, 0] < 0.9
    slanted = (basis[:, :1] + basis[:, 1:2]) / math.sqrt(2)
    torch.testing.assert_close(subspace_similarity(basis[:, :1], slanted), torch.tensor([[0.5]]).double())


def test_phi_divides_by_the_smaller_of_the_two_dimensions() -> None:
    basis = orthonormal(30, 6)
    phi = subspace_similarity(basis[:, :2], basis[:, [0, 2, 3, 1]])
    torch.testing.assert_close(phi, torch.tensor([[1, 1, 1, 1], [1, 0.5, 0.5, 1]]).double())


def test_phi_of_random_spaces_is_near_what_is_derived() -> None:
    """max(i, j)/d on average; over 400 pairs the standard error is below a fiftieth of it."""
    d, first, second = 48, 3, 8
    pairs = [subspace_similarity(orthonormal(d, first), orthonormal(d, second)) for _ in range(400)]
    mean = torch.stack(pairs).mean(0)
    expected = torch.maximum(torch.arange(1, 4)[:, None], torch.arange(1, 9)).double() / d
    torch.testing.assert_close(mean[-1, -1], expected[-1, -1], atol=0, rtol=0.06)
    torch.testing.assert_close(mean[1:], expected[1:], atol=0, rtol=0.15)


def test_compare_equals_phi_of_dense_svds() -> None:
    first, second = models.llama(), models.llama()
    lorakit.attach(first, "q_proj", rank=5)
    lorakit.attach(second, "q_proj", rank=3, rslora=True)
    for seed, model in enumerate((first, second)):
        torch.manual_seed(seed)
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter)
    ours, theirs = lorakit.extract(first), lorakit.extract(second)
    found = similarities(ours, theirs)
    assert [similarity.name for similarity in found] == list(ours.updates)
    for similarity in found:
        one, other = (adapter.updates[similarity.name] for adapter in (ours, theirs))
        dense = [torch.linalg.svd(update.B.double() @ update.A.double()) for update in (one, other)]
        rows = [torch.linalg.svd(update.A.double())[2].T for update in (one, other)]
        bases = {
            "A": rows,
            "right": [svd[2].T for svd in dense],
            "left": [svd[0] for svd in dense],
        }
        for side, (U1, U2) in bases.items():
            phi = torch.tensor(getattr(similarity, side))
            assert phi.shape == (5, 3) == similarity.ranks
            for i in range(1, 6):
                for j in range(1, 4):
                    expected = torch.linalg.matrix_norm(U1[:, :i].T @ U2[:, :j]) ** 2 / min(i, j)
                    assert phi[i - 1, j - 1] == pytest.approx(float(expected), abs=1e-6)
        assert similarity.chance == (5 / 32, 5 / 32)
    for same in similarities(ours, ours):
        torch.testing.assert_close(torch.tensor([same.A, same.right, same.left]), torch.ones(3, 5, 5))


def test_compare_lists_what_the_adapters_do_not_share() -> None:
    def adapter(targets: list[str], model: nn.Module) -> lorakit.Adapter:
        lorakit.attach(model, targets, rank=2)
        return lorakit.extract(model)

    first = adapter(["q_proj", "k_proj"], models.llama())
    second = adapter(["q_proj", "v_proj"], models.llama())
    with pytest.raises(ValueError, match="do not cover the same modules") as raised:
        similarities(first, second)
    lines = str(raised.value).splitlines()
    assert "  model.layers.1.self_attn.k_proj: in the first adapter only" in lines
    assert "  model.layers.0.self_attn.v_proj: in the second adapter only" in lines
    assert not any("q_proj" in line for line in lines)
    wide = adapter(["0"], nn.Sequential(nn.Linear(6, 8)))
    with pytest.raises(ValueError, match="0: 8 × 6 in the first adapter, 8 × 5 in the second"):
        similarities(wide, adapter(["0"], nn.Sequential(nn.Linear(5, 8))))


# --- beside W --------------------------------------------------------------------------------------------------------


def test_a_planted_amplification_factor_is_found() -> None:
    """ΔW = 3·u₇v₇ᵀ + 4·u₈v₈ᵀ on a W with 0.3 and 0.4 there: ‖ΔW‖ = 5, ‖UᵀWV‖ = 0.5, ten times as much."""
    left, right = orthonormal(24, 12), orthonormal(16, 12)
    values = [9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 0.3, 0.4, 0.2, 0.1, 0.05, 0.01]
    weight = planted(left, values, right)
    A = (right[:, 6:8]).T
    B = left[:, 6:8] * torch.tensor([3.0, 4.0]).double()
    update = directions(A, B)
    found = projections(update, weight, torch.linalg.svdvals(weight))
    assert found.update == pytest.approx(0.5)
    assert float(update.values.norm()) / found.update == pytest.approx(10)
    assert found.strongest == pytest.approx(math.hypot(9, 8))
    draws = [(orthonormal(24, 2).T @ weight @ orthonormal(16, 2)).square().sum() for _ in range(3000)]
    assert found.random == pytest.approx(math.sqrt(sum(draws) / len(draws)), rel=0.05)


def test_energy_is_found_where_it_was_planted() -> None:
    left, right = orthonormal(24, 16), orthonormal(16, 16)
    # 16/25 of the energy goes from W's third input direction to its first output direction, 9/25 from 12 to 10.
    B = left[:, [0, 9]] * torch.tensor([4.0, 3.0]).double()
    shares = energy_within(directions(right[:, [2, 11]].T, B), left, right)
    assert sorted(shares) == [1, 2, 4, 8, 16]
    expected = {1: (0.64, 0), 2: (0.64, 0), 4: (0.64, 0.64), 8: (0.64, 0.64), 16: (1, 1)}
    for k, pair in expected.items():
        assert shares[k] == pytest.approx(pair, abs=1e-12)
    three = directions(orthonormal(16, 3).T, orthonormal(24, 3))
    assert sorted(energy_within(three, left, right)) == [1, 2, 3, 4, 8, 16]  # its own rank too
    assert energy_within(directions(torch.zeros(2, 16), torch.zeros(24, 2)), left, right) == {}


def test_a_planted_intruder_is_found_and_a_strengthened_direction_is_none() -> None:
    """W has 32 directions; a new one with an equal share of each has |cosine| 1/√32 with each."""
    left, right = orthonormal(32, 32), orthonormal(32, 32)
    values = torch.linspace(2, 1, 32).tolist()
    weight = planted(left, values, right)

    def cosines(change: Tensor) -> tuple[float, ...]:
        before, _, _ = torch.linalg.svd(weight)
        return intruder_cosines(before, torch.linalg.svd(weight + change)[0][:, :10])

    assert cosines(torch.zeros(32, 32)) == pytest.approx([1.0] * 10)
    even = torch.full((32,), 1 / math.sqrt(32)).double()
    new = cosines(1e6 * torch.outer(left @ even, right @ even))
    assert new[0] == pytest.approx(1 / math.sqrt(32), abs=1e-4)
    assert cosines(50 * torch.outer(left[:, 20], right[:, 20])) == pytest.approx([1.0] * 10)
    assert intruder_cosines(left, left[:, :0]) == ()


def test_intruders_are_those_that_peft_counts() -> None:
    plain = models.llama()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(copy.deepcopy(plain), peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.2)
        ours = copy.deepcopy(plain)
        lorakit.attach(ours, ["q_proj", "down_proj"], rank=4, alpha=8)
        for name, layer in ours.named_modules():
            if isinstance(layer, AdaptedLayer):
                wrapped = theirs.base_model.model.get_submodule(name)
                layer.lora_A.data = wrapped.lora_A["default"].weight.data.clone()
                layer.lora_B.data = wrapped.lora_B["default"].weight.data.clone()
        lines: list[str] = []
        from peft.tuners.lora.intruders import reduce_intruder_dimension

        reduce_intruder_dimension(theirs, logging_sink=lines.append)
    counted = {}
    for line in lines:
        name, _, said = line.partition(": ")
        if "ntruders" not in said:
            continue
        counted[name.removeprefix("base_model.model.")] = 0 if said == "No intruders" else int(said.split()[-1])
    found = {module.name: module.base.intruders for module in analyze(lorakit.extract(ours), ours) if module.base}
    assert found == counted
    assert sum(found.values()) > 3


# --- every kind of module --------------------------------------------------------------------------------------------


def fused() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 48))


def attention() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"mha": nn.MultiheadAttention(8, 2)})


def kernel() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(lorakit.Conv2d(4, 6, 3, r=2, lora_alpha=4, merge_weights=False))


CASES: dict[str, tuple[Callable[[], Any], Any]] = {
    "linear": (models.llama, {"targets": "all-linear"}),
    "rslora": (models.llama, {"targets": ["q_proj", "down_proj"], "rslora": True}),
    "dora": (models.llama, {"targets": ["q_proj", "down_proj"], "dora": True}),
    "pissa": (models.llama, {"targets": ["q_proj", "down_proj"], "init": "pissa"}),
    "conv1d": (models.gpt2, {"targets": ["c_attn", "c_proj"]}),
    "conv1d dora": (models.gpt2, {"targets": ["c_attn"], "dora": True}),
    "embedding": (models.gpt2, {"targets": ["wte"]}),
    "convolutions": (models.conv_net, {"targets": ["0", "conv_dw", "conv_pw", "3"]}),
    "fused": (fused, {"targets": "0", "splits": {"0": [32, 8, 8]}, "rank_pattern": {"0": [4, 0, 2]}}),
    "attention": (attention, {"targets": "mha"}),
    "experts": (models.qwen_moe, {"targets": ["gate_up_proj", "down_proj"]}),
    "transposed experts": (models.gpt_oss, {"targets": ["gate_up_proj"]}),
    "loralib's convolution": (kernel, None),
}


def dense_weights(model: nn.Module, name: str, case: str) -> list[Tensor]:
    """The weight under an update's name as matrices (out, in)."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    weight: Tensor = parameters[name] if name in parameters else parameters[f"{name}.weight"]
    weight = weight.detach().clone()
    if case == "loralib's convolution":  # the factors multiply to (out·3, in·3), which is viewed as the kernel
        return [weight.reshape(18, 12)]
    if weight.dim() == 3 and "experts" in case:
        return list(weight.mT if "transposed" in case else weight)
    if "conv1d" in case or case == "embedding":
        weight = weight.T
    return [weight.flatten(1)]


@pytest.mark.parametrize("case", CASES)
def test_each_kind_of_module_equals_dense_svds_of_the_merged_weight(case: str) -> None:
    make, settings = CASES[case]
    model = make().double()
    plain = copy.deepcopy(model)
    if settings is None:
        model[0].lora_A.data.normal_()
        model[0].lora_B.data.normal_()
    else:
        lorakit.attach(model, **{"rank": 3, **settings})
        train_a_little(model)
    adapter = lorakit.extract(model)
    found = list(analyze(adapter, model))
    alone = list(analyze(adapter))
    assert [dataclasses.replace(module, base=None) for module in found] == alone
    lorakit.merge(model)
    by_name = {module.name: module for module in found}
    count = 0
    for name, update in adapter.updates.items():
        befores, afters = dense_weights(plain, name, case), dense_weights(model, name, case)
        for index, (before, after) in enumerate(zip(befores, afters, strict=True)):
            module = by_name[f"{name}[{index}]" if update.kind == "experts" else name]
            count += 1
            assert module.base is not None
            assert module.shape == tuple(before.shape)
            assert module.dora == (update.magnitude is not None)
            change = update.scale * update.B.double() @ update.A.double() if module.dora else after - before
            U, S, Vh = torch.linalg.svd(change, full_matrices=False)
            k = len(module.singular_values)
            assert 0 < k <= module.rank and (S[k:] < 1e-10 * S[0]).all()
            torch.testing.assert_close(
                torch.tensor(module.singular_values, dtype=torch.float64), S[:k], atol=0, rtol=1e-8
            )
            assert module.norm == pytest.approx(float(change.norm()))
            moved = float((after - before).norm())
            assert module.base.change == pytest.approx(moved / float(before.norm()))
            assert module.base.weight_norm == pytest.approx(float(before.norm()))
            middle = float((U[:, :k].T @ before @ Vh[:k].T).norm())
            assert module.base.amplification == pytest.approx(float(change.norm()) / middle)
            WU, WS, WVh = torch.linalg.svd(before, full_matrices=False)
            assert module.base.projections.strongest == pytest.approx(float(WS[:k].norm()))
            for top, (left, right) in module.base.energy_within.items():
                assert left == pytest.approx(float(((WU[:, :top].T @ change).norm() / change.norm()) ** 2), abs=1e-9)
                assert right == pytest.approx(float(((change @ WVh[:top].T).norm() / change.norm()) ** 2), abs=1e-9)
            new = torch.linalg.svd(after, full_matrices=False)[0][:, :10]
            closest = [max(abs(float(u @ v)) for v in WU.T) for u in new.T]
            assert module.base.cosines == pytest.approx(closest, abs=1e-6)
    assert count == len(found)


def test_the_model_is_left_as_it_was_merged_or_not() -> None:
    model = models.llama()
    lorakit.attach(model, "q_proj", rank=3)
    train_a_little(model)
    adapter = lorakit.extract(model)
    unmerged = list(analyze(adapter, model))
    lorakit.merge(model)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    merged = list(analyze(adapter, model))
    assert merged == unmerged
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


def test_half_precision_weights_are_measured_in_float32() -> None:
    model = models.llama().bfloat16()
    lorakit.attach(model, "up_proj", rank=3)
    train_a_little(model)
    adapter = lorakit.extract(model)
    half = list(analyze(adapter, model))
    exact = list(analyze(adapter, model.double()))  # the same numbers
    for one, other in zip(half, exact, strict=True):
        assert one.base and other.base
        assert one.base.amplification == pytest.approx(other.base.amplification, rel=1e-4)
        assert one.base.change == pytest.approx(other.base.change, rel=1e-5)


def test_an_adapter_without_a_change_has_dashes_and_no_intruders() -> None:
    model = models.llama()
    lorakit.attach(model, "q_proj", rank=3)
    adapter = lorakit.extract(model)
    modules = list(analyze(adapter, model))
    for module in modules:
        assert module.base is not None
        assert (module.singular_values, module.norm, module.effective_rank, module.directions_90) == ((), 0, 0, 0)
        assert (module.base.change, module.base.amplification, module.base.energy_within) == (0, None, {})
        assert module.base.intruders == 0 and min(module.base.cosines) > 0.999
    text = report.tables_text(report.Study("a", "base", tuple(modules)))
    assert " – " in text
    with torch.no_grad():
        model.get_parameter("model.layers.0.self_attn.q_proj.weight").zero_()
    train_a_little(model)
    first = next(analyze(lorakit.extract(model), model))
    assert first.base is not None and first.base.change is None and first.base.amplification is None


def test_what_cannot_be_analyzed_is_refused() -> None:
    model = models.llama()
    lorakit.attach(model, "q_proj", rank=3)
    adapter = lorakit.extract(model)
    with pytest.raises(ValueError, match=r"does not hold this adapter; not in it:\n  model.layers.0.self_attn.q_proj"):
        list(analyze(adapter, models.llama()))
    with pytest.raises(ValueError, match="no LoRA update to analyze"):
        factors_of(lorakit.Adapter(updates={}))
    adapter.updates["model.layers.1.self_attn.q_proj"].B[0, 0] = float("nan")
    with pytest.raises(
        ValueError, match=r"NaN or infinite numbers in the factors of:\n  model.layers.1.self_attn.q_pr"
    ):
        list(analyze(adapter))


@pytest.mark.parametrize("module", [measures, report, page, run], ids=lambda module: module.__name__)
def test_public_functions_and_classes_say_what_they_do(module) -> None:
    assert module.__doc__ and len(module.__doc__) > 80
    own = {name: value for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__}
    named = {name: value for name, value in own.items() if inspect.isfunction(value) or inspect.isclass(value)}
    assert [name for name, value in named.items() if not name.startswith("_") and not value.__doc__] == []
