"""`lora_embedding`: the plain equation, and the gradient written out. What all kinds of layer share is in
test_gradients.py.
"""

import pytest
import torch
import torch.nn.functional as F
from measure import kept_bytes
from torch import nn

import lorakit
from kinds import SCALE, adapted, factors
from lorakit.core.embedding import LoRAEmbedding, lora_embedding, plain_embedding


@pytest.mark.parametrize("by", [LoRAEmbedding.apply, plain_embedding])
@pytest.mark.parametrize("dropped", [False, True])
def test_both_ways_are_the_equation(by, dropped: bool) -> None:
    """The same arguments give a look-up in W + s·(B A)ᵀ, and its gradients."""
    torch.manual_seed(0)
    tokens = torch.tensor([[1, 4, 1], [0, 6, 2]])
    sizes = ((7, 5), (2, 7), (5, 2))
    weight, A, B = (torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes)
    kept = torch.tensor([[0, 2, 2], [2, 0, 2]], dtype=torch.float64) if dropped else None
    y = by(weight[tokens], tokens, A, B, kept, 0.7, None, False)
    update = 0.7 * (B @ A).T[tokens]
    exact = weight[tokens] + (update if kept is None else kept[..., None] * update)
    torch.testing.assert_close(y, exact)
    wanted = [weight, A, B]
    torch.testing.assert_close(
        torch.autograd.grad(y.sin().sum(), wanted), torch.autograd.grad(exact.sin().sum(), wanted)
    )


def test_the_shapes_that_the_source_shows() -> None:
    """Those of the worked example in embedding.py."""
    weight, A, B = (torch.zeros(size) for size in ((49152, 576), (16, 49152), (576, 16)))
    tokens = torch.zeros(4, 128, dtype=torch.int64)
    base = F.embedding(tokens, weight)
    y = lora_embedding(tokens, base, A, B, 2.0, padding_idx=None, scale_grad_by_freq=False)
    assert y.shape == base.shape == (4, 128, 576)


def test_padding_and_frequency_of_an_embedding() -> None:
    """torch's own embedding of A's columns has the same two options."""
    model = adapted("padded embedding")
    tokens = torch.tensor([[1, 1, 2], [1, 5, 2]])
    layer = model[0]
    dA, dB = torch.autograd.grad(model(tokens).sin().sum(), [layer.lora_A, layer.lora_B])
    columns = nn.functional.embedding(tokens, layer.lora_A.T, 2, scale_grad_by_freq=True)
    y = layer.weight[tokens] + SCALE * columns @ layer.lora_B.T
    torch.testing.assert_close((dA, dB), torch.autograd.grad(y.sin().sum(), [layer.lora_A, layer.lora_B]))
    assert dA[:, 2].eq(0).all() and dA[:, 1].ne(0).all()


def test_kept_by_an_embedding_is_its_tokens() -> None:
    model = nn.Sequential(nn.Embedding(50, 64))
    lorakit.attach(model, "0", rank=4)
    tokens = torch.randint(0, 50, (3, 20))
    assert kept_bytes(lambda: model(tokens), model.parameters()) == 60 * 8


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_dropout_of_an_embedding_drops_the_updates_of_tokens(dora: bool, compiled: bool) -> None:
    """The input is a one-hot row: dropout drops the update of the whole token, or scales it."""
    model = nn.Sequential(nn.Embedding(7, 5)).double()
    lorakit.attach(model, "0", rank=2, alpha=2 * SCALE, dora=dora, dropout=0.5)
    layer, tokens = model[0], torch.randint(0, 7, (40, 3))
    nn.init.normal_(layer.lora_A)
    base, gain = layer.weight[tokens], 1.0
    update = SCALE * (layer.lora_B @ layer.lora_A).T[tokens]
    if dora:
        gain = layer.lora_magnitude / (layer.weight.T + SCALE * layer.lora_B @ layer.lora_A).norm(dim=1).detach()
    torch.compiler.reset()
    run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    y = run(tokens)
    kept = ((y - gain * base) / (gain * update)).detach()
    torch.testing.assert_close(kept, kept[..., :1].expand_as(kept))  # a token as a whole
    mask = kept[..., :1].round()
    torch.testing.assert_close(kept[..., :1], mask)
    assert set(mask.unique().tolist()) == {0.0, 2.0} and 30 < (mask == 0).sum() < 90
    wanted = factors(model)
    expected_ = gain * (base + mask * update)
    torch.testing.assert_close(
        torch.autograd.grad(y.sin().sum(), wanted), torch.autograd.grad(expected_.sin().sum(), wanted)
    )
    torch.testing.assert_close(model.eval()(tokens), gain * (base + update))
