"""LoRA's settings: checked once, made from an object that has them, and what `exclude` leaves out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

import lorakit
import models
from lorakit import LoRASettings


def adapted(model: nn.Module) -> list[str]:
    return list(lorakit.adapted_layers(model))


def test_settings_are_one_value() -> None:
    settings = LoRASettings(["q_proj", "v_proj"], rank=4, rslora=True, also_train="lm_head")
    one, other = models.llama(), models.llama()
    first = lorakit.attach(one, settings)
    second = lorakit.attach(other, ["q_proj", "v_proj"], rank=4, rslora=True, also_train=["lm_head"])
    assert first == second
    assert [layer.scaling for layer in lorakit.adapted_layers(one).values()] == [
        32 / 4**0.5
    ] * 4  # α is 32 at every rank
    third = lorakit.attach(models.llama(), settings, rank=2)  # one of them changed
    assert {row.rank for row in third.rows} == {2}


def test_settings_are_read_from_an_object_that_has_them() -> None:
    config = SimpleNamespace(targets=("q_proj",), rank=3, other="ignored")
    assert LoRASettings.of(config) == LoRASettings(targets=("q_proj",), rank=3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rank": 0}, "rank=0: a rank is at least 1."),
        ({"alpha": -1.0}, "alpha=-1.0: expected a positive number."),
        ({"alpha": None}, "alpha=None: expected a positive number."),
        ({"dropout": 1.0}, r"dropout=1.0: a probability in \[0, 1\) is expected."),
        ({"init": "kaimin"}, "init='kaimin': expected one of 'kaiming', 'gaussian', 'pissa', 'olora'."),
    ],
)
def test_settings_check_themselves(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        LoRASettings(**given)
    with pytest.raises(ValueError, match=f"^{message}"):
        lorakit.attach(models.llama(), **given)


def test_a_misspelt_setting_is_named() -> None:
    with pytest.raises(TypeError, match=r"^there is no setting 'rnak'\. Did you mean 'rank'\?$"):
        lorakit.attach(models.llama(), rnak=4)


# --- exclude ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "exclude", "left"),
    [
        ("q_proj", "*.0.*", ["model.layers.1.self_attn.q_proj"]),
        ("q_proj", "layers.1", ["model.layers.0.self_attn.q_proj"]),  # including all that is inside it
        (["q_proj", "k_proj"], ["k_proj"], ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]),
        (lambda module, name: name.endswith("q_proj"), ["*.0.*"], ["model.layers.1.self_attn.q_proj"]),
    ],
)
def test_what_is_excluded_is_not_adapted(targets: Any, exclude: Any, left: list[str]) -> None:
    if isinstance(targets, list):
        targets = [*targets]
        with pytest.raises(ValueError, match=r"^exclude=\['k_proj'\] leaves nothing of the target 'k_proj'\.$"):
            lorakit.attach(models.llama(), targets, exclude=exclude)
        targets = ["q_proj", "*.[qk]_proj"]
    model = models.llama()
    report = lorakit.attach(model, targets, exclude=exclude, rank=2)
    assert adapted(model) == left == [row.name for row in report.rows]


def test_all_linear_goes_without_what_is_excluded() -> None:
    whole, part = models.llama(), models.llama()
    lorakit.attach(whole, rank=2)
    lorakit.attach(part, exclude=["mlp", "*.0.*"], rank=2)
    assert adapted(part) == [name for name in adapted(whole) if ".mlp." not in name and ".0." not in name]


def test_a_layer_that_cannot_be_adapted_may_be_excluded() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ConvTranspose1d(4, 4, 1))
    with pytest.raises(ValueError, match="'1' cannot be adapted: ConvTranspose1d is not supported"):
        lorakit.attach(model, ["0", "1", "*"], rank=2)
    lorakit.attach(model, "*", exclude="1", rank=2)
    assert adapted(model) == ["0"]


def test_an_exclusion_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(
        ValueError, match=r"^exclude='\*\.q_prj' matches no module of LlamaForCausalLM\. Closest: .*q_proj"
    ):
        lorakit.attach(models.llama(), exclude="*.q_prj")
    with pytest.raises(ValueError, match=r"^exclude='self_attn' leaves nothing of the target 'q_proj'\.$"):
        lorakit.attach(models.llama(), "q_proj", exclude="self_attn")
