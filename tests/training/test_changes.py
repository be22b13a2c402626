"""Where the update went: norms of weights and of groups of them, written out."""

import pytest
import torch

import lorakit
import models
from lorakit.training.changes import Change, by_kind, by_layer, together, weight_changes


def test_each_change_and_all_together_are_norms_of_the_weights() -> None:
    model = models.llama()
    before = {name: weight.double().clone() for name, weight in model.state_dict().items()}
    lorakit.attach(model, ["q_proj", "down_proj"], rank=2, dora=True)
    models.train_a_little(model)
    changes = weight_changes(model)
    lorakit.bake(model)
    after = model.state_dict()
    assert len(changes) == 4
    for change in changes:
        name = f"{change.name}.weight"
        moved = (after[name].double() - before[name]).norm()
        assert change.moved == pytest.approx(float(moved), rel=1e-4)
        assert change.ratio == pytest.approx(float(moved / before[name].norm()), rel=1e-4)
    moved, old = (torch.cat([one.flatten() for one in own]).norm() for own in (
        [after[f"{c.name}.weight"].double() - before[f"{c.name}.weight"] for c in changes],
        [before[f"{c.name}.weight"] for c in changes],
    ))  # fmt: skip
    assert together("all", changes).ratio == pytest.approx(float(moved / old), rel=1e-4)
    assert together("all", changes).count == 4


def change(name: str, moved: float = 1.0, weight: float = 2.0) -> Change:
    return Change(name, moved, weight)


def test_weights_are_grouped_by_kind_the_most_changed_first() -> None:
    kinds = by_kind(
        [
            *(change("model.layers.0.mlp.up", 3.0, 6.0), change("model.layers.1.mlp.up", 4.0, 8.0)),
            *(change("model.layers.10.self_attn.q", 6.0, 8.0), change("lm_head", 0.1, 1.0), change("3")),
        ]
    )
    assert [(kind.name, kind.ratio, kind.count) for kind in kinds] == [
        ("self_attn.q", 0.75, 1),
        ("mlp.up", 0.5, 2),  # √(9 + 16) / √(36 + 64)
        ("3", 0.5, 1),
        ("lm_head", 0.1, 1),
    ]


def test_weights_are_grouped_by_the_layers_of_each_stack() -> None:
    changes = [change(f"encoder.block.{i}.layer.{j}.q") for i in (0, 10, 2) for j in (0, 1)]
    changes += [change("decoder.block.0.layer.0.q"), change("lm_head"), change("0")]
    found = {stack: [(one.name, one.count) for one in layers] for stack, layers in by_layer(changes).items()}
    assert found == {"encoder.block": [("0", 2), ("2", 2), ("10", 2)], "decoder.block": [("0", 1)], "": [("0", 1)]}
