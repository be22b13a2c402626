"""The loss of a causal model on a CPU, against all logits and torch's cross-entropy."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import lorakit
import models
from lorakit.training import loss as loss_module
from lorakit.training.loss import causal_loss, frozen_head


@pytest.mark.parametrize("targets", ["all-linear", "lm_head"])
@pytest.mark.parametrize("tokens", [12, 140], ids=["short rows", "long rows"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradient(dtype: torch.dtype, checkpointing: bool, tokens: int, targets: str) -> None:
    model = models.llama().to(dtype).train()
    lorakit.attach(model, targets, rank=2)
    models.train_a_little(model)
    if checkpointing:
        # transformers renamed it; the old name warns.
        new = hasattr(model, "activation_checkpointing_enable")
        (model.activation_checkpointing_enable if new else model.gradient_checkpointing_enable)()
    ids = torch.randint(64, (3, tokens), generator=torch.Generator().manual_seed(0))
    labels, mask = ids.clone(), torch.ones_like(ids)
    labels[:, :5] = -100
    labels[1, 8:], mask[1, 8:] = -100, 0
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    head = frozen_head(model)
    assert (head is None) == (targets == "lm_head")
    loss = causal_loss(model, {"input_ids": ids, "attention_mask": mask, "labels": labels}, head)
    assert "forward" not in vars(model.get_output_embeddings())
    gradients = torch.autograd.grad(loss, trained)

    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    expected = F.cross_entropy(logits.flatten(0, 1).float(), labels[:, 1:].flatten(), reduction="sum")
    close: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.5}
    torch.testing.assert_close(loss, expected, rtol=1e-5 if dtype == torch.float32 else 0.01, atol=0)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, trained), **close)


@pytest.mark.parametrize("count", [1, 5, 11])
def test_chunks_of_a_frozen_head(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The value and the gradient of each label, with different weights, in chunks of 5 with and without a remainder."""
    monkeypatch.setattr(loss_module, "_CHUNK", 5)
    hidden = torch.randn(count, 6, dtype=torch.float64, requires_grad=True)
    weight, labels = torch.randn(17, 6, dtype=torch.float64), torch.randint(17, (count,))
    upstream = torch.randn(count, dtype=torch.float64)
    losses = loss_module._FrozenHead.apply(hidden, weight, labels)
    expected = F.cross_entropy(hidden @ weight.T, labels, reduction="none")
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(
        torch.autograd.grad(losses, hidden, upstream), torch.autograd.grad(expected, hidden, upstream)
    )


def test_a_head_is_used_alone_only_where_its_output_is_what_the_model_returns() -> None:
    from transformers import CohereConfig, CohereForCausalLM, Gemma2Config, Gemma2ForCausalLM

    sizes = models.SIZES | dict(num_hidden_layers=1, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    plain = models.llama().requires_grad_(False)
    assert frozen_head(plain) is plain.lm_head
    assert frozen_head(models.llama()) is None  # trained
    for model in (
        Gemma2ForCausalLM(Gemma2Config(**sizes, head_dim=8, final_logit_softcapping=0.5)),
        CohereForCausalLM(CohereConfig(**sizes, logit_scale=0.0625)),
    ):
        model.requires_grad_(False).eval()
        assert frozen_head(model) is None
        ids = torch.randint(3, 64, (2, 9))
        loss = causal_loss(model, {"input_ids": ids, "labels": ids}, None)
        logits = model(input_ids=ids).logits[:, :-1]
        torch.testing.assert_close(loss, F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"))


@pytest.mark.parametrize("frozen", [False, True])
def test_no_label_at_all(frozen: bool) -> None:
    ids = torch.zeros(2, 6, dtype=torch.long)
    model = models.llama().requires_grad_(not frozen)
    head = frozen_head(model)
    assert (head is not None) == frozen
    assert causal_loss(model, {"input_ids": ids, "labels": torch.full_like(ids, -100)}, head) == 0
