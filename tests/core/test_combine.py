"""A combination is the sum of the updates: every kind, any weights, in the model and through the file."""

import warnings
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, nn

import lorakit
import models
from models import train_a_little

TOKENS = torch.arange(14).view(2, 7)
KINDS = {
    "linear": (lambda: nn.Linear(6, 8), {}),
    "blocks": (lambda: nn.Linear(6, 8), dict(splits={"0": [4, 2, 2]}, rank_pattern={"0": [2, 0, 1]})),
    "embedding": (lambda: nn.Embedding(9, 5), {}),
    "conv": (lambda: nn.Conv2d(4, 6, 3), {}),
    "grouped conv": (lambda: nn.Conv2d(4, 6, 3, groups=2), {}),
    "attention": (lambda: nn.MultiheadAttention(8, 2), {}),
}


def plain_model(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(KINDS[kind][0]()).double()


def adapter_and_change(kind: str, seed: int, **settings) -> tuple[lorakit.Adapter, dict[str, Tensor]]:
    """An adapter, and how merging it changes each weight."""
    model = plain_model(kind)
    before = model.state_dict()
    lorakit.attach(model, "0", **{**KINDS[kind][1], **settings})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(generator=generator)
    adapter = lorakit.extract(model)
    lorakit.merge(model)
    lorakit.detach(model)
    return adapter, {name: tensor - before[name] for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("kind", KINDS)
def test_problem_14_a_combination_is_the_sum_of_the_updates(kind: str) -> None:
    weights = (0.7, -1.3, 2.0)
    ranks = (2, 3, 2) if kind != "blocks" else (2, 2, 2)
    made = [adapter_and_change(kind, seed, rank=rank, alpha=5, rslora=seed == 1) for seed, rank in enumerate(ranks)]
    model = plain_model(kind)
    expected = {
        name: tensor + sum(weight * change[name] for weight, (_, change) in zip(weights, made, strict=True))
        for name, tensor in model.state_dict().items()
    }
    lorakit.insert(model, lorakit.combine([adapter for adapter, _ in made], weights))
    lorakit.merge(model)
    lorakit.detach(model)
    torch.testing.assert_close(model.state_dict(), expected, atol=1e-12, rtol=0)


def test_problem_14_through_a_file_and_with_modules_that_one_adapter_lacks(tmp_path: Path) -> None:
    adapters, updates = [], []
    for seed, targets in enumerate((["q_proj", "v_proj"], ["v_proj", "down_proj", "embed_tokens"])):
        model = models.llama()
        lorakit.attach(model, targets, rank=2 + seed, rslora=seed == 0)
        train_a_little(model)
        adapters.append(lorakit.extract(model))
        updates.append({name: layer.delta() * layer.scaling for name, layer in _layers(model).items()})
    model = models.llama()
    lorakit.insert(model, lorakit.combine(adapters, [1.5, -0.5]))
    for name, layer in _layers(model).items():
        parts = [w * update[name] for w, update in zip((1.5, -0.5), updates, strict=True) if name in update]
        torch.testing.assert_close(layer.delta() * layer.scaling, sum(parts), atol=1e-6, rtol=1e-5)
    lorakit.save(model, tmp_path)
    again = models.llama()
    lorakit.load(again, tmp_path)
    torch.testing.assert_close(again(TOKENS).logits, model(TOKENS).logits, atol=0, rtol=0)


def _layers(model: nn.Module) -> dict:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, lorakit.LoRALayer)}


def test_problem_14_peft_has_cross_terms(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(
            models.llama(), peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False), adapter_name="a"
        )
        theirs.add_adapter("b", peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False))
        theirs.add_weighted_adapter(["a", "b"], [0.5, 0.5], "sum", combination_type="linear")
    layer = theirs.base_model.model.model.layers[0].self_attn.q_proj
    expected = 0.5 * layer.get_delta_weight("a") + 0.5 * layer.get_delta_weight("b")
    assert not torch.allclose(layer.get_delta_weight("sum"), expected, atol=1e-3)


def test_what_has_no_sum_is_refused() -> None:
    plain, _ = adapter_and_change("linear", 0)
    dora, _ = adapter_and_change("linear", 0, dora=True)
    conv, _ = adapter_and_change("conv", 0)
    with pytest.raises(ValueError, match="0 is a DoRA update"):
        lorakit.combine([plain, dora], [1, 1])
    with pytest.raises(ValueError, match="0: a conv update cannot be added to a linear one"):
        lorakit.combine([plain, conv], [1, 1])
    with pytest.raises(ValueError, match="2 adapters and 1 weights"):
        lorakit.combine([plain, plain], [1])
    heads = []
    for seed in range(2):
        model = models.bert()
        lorakit.attach(model, "query", also_train=["classifier"])
        torch.manual_seed(seed)
        nn.init.normal_(model.classifier.weight)
        heads.append(lorakit.extract(model))
    with pytest.raises(ValueError, match="classifier.weight was trained whole and is not the same"):
        lorakit.combine(heads, [1, 1])
    assert lorakit.combine([heads[0], heads[0]], [1, 1]).trained.keys() == heads[0].trained.keys()
