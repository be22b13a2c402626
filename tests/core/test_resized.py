"""A vocabulary that is resized after attach: the update of the old rows stays, new rows begin without one and learn."""

from typing import Any

import pytest
import torch
from torch import nn

import lorakit
import models
from models import train_a_little

TOKENS = torch.arange(14).view(2, 7)


def embedding(adapted: nn.Module) -> nn.Embedding:
    return adapted.get_input_embeddings()


@pytest.mark.parametrize("init", ["kaiming", "pissa"])
@pytest.mark.parametrize("make", [models.llama, models.gpt2, models.bert])
@pytest.mark.parametrize("merged", [False, True])
def test_an_embedding_grows_and_shrinks_with_its_table(make, merged: bool, init: Any) -> None:
    model = make().eval()
    name = next(name for name, module in model.named_modules() if module is model.get_input_embeddings())
    lorakit.attach(model, [name, "all-linear"], rank=2, init=init)
    train_a_little(model)
    size, layer = len(embedding(model).weight), embedding(model)
    factor = layer.lora_A
    with torch.no_grad():
        before = layer(TOKENS)
    if merged:
        lorakit.merge(model)
    model.resize_token_embeddings(size + 5)
    if merged:
        lorakit.unmerge(model)
    with torch.no_grad():
        torch.testing.assert_close(layer(TOKENS), before)
        fresh = torch.arange(size, size + 5)
        assert embedding(model) is layer and len(layer.weight) == size + 5
        torch.testing.assert_close(layer(fresh), layer.weight[fresh])  # no update yet
    assert embedding(model) is layer and layer.lora_A is factor and factor.shape == (2, size + 5)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    layer(fresh).square().sum().backward()
    optimizer.step()
    assert not torch.allclose(layer(fresh), layer.weight[fresh])
    adapter = lorakit.extract(model)
    other = make().eval()
    other.resize_token_embeddings(size + 5)
    other.get_input_embeddings().weight.data.copy_(layer.weight)
    lorakit.insert(other, adapter)
    with torch.no_grad():
        torch.testing.assert_close(other.get_input_embeddings()(fresh), layer(fresh))
    model.resize_token_embeddings(size - 3)
    with torch.no_grad():
        torch.testing.assert_close(layer(TOKENS), layer(TOKENS.clone()))
        assert lorakit.extract(model).updates[name].A.shape[1] == size - 3


@pytest.mark.parametrize("use", ["forward", "extract", "merge"])
@pytest.mark.parametrize("settings", [{}, {"dora": True}, {"init": "olora"}, {"init": "pissa", "dora": True}])
@pytest.mark.parametrize("rows", [9, 4])
def test_an_output_layer_follows_its_weight(rows: int, settings: dict, use: str) -> None:
    model = nn.Sequential(nn.Linear(6, 7, bias=False)).double()
    lorakit.attach(model, "0", rank=2, **settings)
    layer, x = model[0], torch.randn(3, 6, dtype=torch.float64)
    nn.init.normal_(layer.lora_B)
    with torch.no_grad():
        before = model(x)
        weight = torch.randn(rows, 6, dtype=torch.float64)
        kept = min(rows, 7)
        weight[:kept] = layer.weight[:kept]
        layer.weight = nn.Parameter(weight, requires_grad=False)
        if use == "extract":
            assert len(lorakit.extract(model).updates["0"].B) == rows
        elif use == "merge":
            lorakit.merge(model)
        torch.testing.assert_close(model(x)[:, :kept], before[:, :kept])
        torch.testing.assert_close(model(x)[:, kept:], x @ weight[kept:].T)
    lorakit.unmerge(model)
    model(x).square().sum().backward()
    assert layer.lora_B.grad.abs().sum(1).ne(0).all() and layer.out_features == rows


@pytest.mark.parametrize(
    ("module", "settings", "shape"),
    [
        (nn.Linear(6, 4), {}, (4, 9)),
        (nn.Linear(6, 4, bias=False), {"rank_pattern": {"0": [2, 2]}}, (6, 6)),
        (nn.Embedding(6, 4), {}, (6, 5)),
        (nn.Embedding(6, 4), {"dora": True}, (9, 4)),
        (nn.Conv2d(6, 4, 3), {}, (5, 6, 3, 3)),
    ],
)
def test_what_cannot_follow_is_refused_in_words(module: nn.Module, settings: dict, shape: tuple[int, ...]) -> None:
    model = nn.Sequential(module)
    lorakit.attach(model, "0", rank=2, **settings)
    model[0].weight = nn.Parameter(torch.randn(shape))
    x = torch.randn(1, 6, 5, 5) if len(shape) == 4 else torch.arange(3)
    x = torch.randn(2, shape[1]) if isinstance(module, nn.Linear) else x
    for use in (lambda: model(x), lambda: lorakit.extract(model), lambda: lorakit.merge(model)):
        with pytest.raises(ValueError, match="is now .* as a matrix, and its update is for .* lorakit.detach before"):
            use()


def test_a_resized_head_is_a_new_module_and_is_named() -> None:
    model = models.llama()
    lorakit.attach(model, ["lm_head", "q_proj"], rank=2)
    train_a_little(model)
    model.resize_token_embeddings(model.config.vocab_size + 3)
    for use in (lorakit.extract, lorakit.merge):
        with pytest.raises(ValueError, match=r"updates are lost: lm_head \(now a Linear\)"):
            use(model)
    lorakit.attach(model, "lm_head", rank=2)
    model(TOKENS)
    lorakit.extract(model)


@pytest.mark.parametrize("rows", [16, 24])
def test_what_is_saved_between_a_resize_and_unmerging_changes_nothing(rows: int) -> None:
    """A weight of 20 rows is merged, resized, read and unmerged: old rows keep their bits and their update."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(20, 4))
    lorakit.attach(model, "0", rank=2)
    layer = model[0]
    nn.init.normal_(layer.lora_A)
    base, A = layer.weight.detach().clone(), layer.lora_A.detach().clone()
    lorakit.merge(model)
    resized = torch.zeros(rows, 4)
    kept = min(rows, 20)
    resized[:kept] = layer.weight.detach()[:kept]
    layer.weight = nn.Parameter(resized, requires_grad=False)
    assert lorakit.extract(model).updates["0"].A.shape == (2, rows)
    lorakit.unmerge(model)
    assert torch.equal(layer.weight[:kept], base[:kept]) and torch.equal(layer.lora_A[:, :kept], A[:, :kept])
