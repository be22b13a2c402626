"""The loss of a causal model on a CPU, against all logits and torch's cross-entropy."""

import pytest
import torch
import torch.nn.functional as F

import lorakit
import models
from lorakit.training.loss import cpu_causal_loss


@pytest.mark.parametrize("tokens", [12, 140], ids=["short rows", "long rows"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradient(dtype: torch.dtype, checkpointing: bool, tokens: int) -> None:
    model = models.llama().to(dtype).train()
    lorakit.attach(model, rank=2)
    if checkpointing:
        # transformers renamed it; the old name warns.
        new = hasattr(model, "activation_checkpointing_enable")
        (model.activation_checkpointing_enable if new else model.gradient_checkpointing_enable)()
    ids = torch.randint(64, (3, tokens), generator=torch.Generator().manual_seed(0))
    labels, mask = ids.clone(), torch.ones_like(ids)
    labels[:, :5] = -100
    labels[1, 8:], mask[1, 8:] = -100, 0
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    loss = cpu_causal_loss(model, {"input_ids": ids, "attention_mask": mask, "labels": labels})
    gradients = torch.autograd.grad(loss, trained)

    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    expected = F.cross_entropy(logits.flatten(0, 1).float(), labels[:, 1:].flatten(), reduction="sum")
    close = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.5}
    torch.testing.assert_close(loss, expected, rtol=1e-5 if dtype == torch.float32 else 0.01, atol=0)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, trained), **close)


def test_no_label_at_all() -> None:
    ids = torch.zeros(2, 6, dtype=torch.long)
    loss = cpu_causal_loss(models.llama(), {"input_ids": ids, "labels": torch.full_like(ids, -100)})
    assert loss == 0
