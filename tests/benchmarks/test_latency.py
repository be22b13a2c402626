"""benchmarks/latency.py measures what it says: the models that it compares, and the rows of ratios."""

import latency
import pytest
import torch
from torch import nn

import models
from lorakit.study.methods.structure import base_model_of


def llama() -> nn.Module:
    return base_model_of(models.llama())


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2Model

    torch.manual_seed(0)
    return GPT2Model(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64)).eval()


@pytest.mark.parametrize("make", [llama, gpt2])
@torch.no_grad()
def test_each_method_is_at_work_in_a_copy(make) -> None:
    plain = make()
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    served = latency.variants(plain)
    assert served["plain"] is plain and not any(model.training for model in served.values())
    ids = torch.arange(8).view(1, 8)
    out = {name: model(input_ids=ids, use_cache=False).last_hidden_state for name, model in served.items()}
    assert all(states.shape == (1, 8, 32) for states in out.values())

    # The merged update is that of the factors, and not small. The adapters' is zero at first, the prefix's is not.
    torch.testing.assert_close(out["LoRA merged"], out["LoRA unmerged"], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(out["LoRA merged"], out["plain"], rtol=1e-3, atol=1e-3)
    assert torch.equal(out["adapter-h"], out["plain"]) and torch.equal(out["adapter-p"], out["plain"])
    assert not torch.allclose(out["prefix-layer"], out["plain"], rtol=1e-3, atol=1e-3)
    extra = {name: sum(p.numel() for p in model.parameters()) for name, model in served.items()}
    assert extra["adapter-h"] - extra["plain"] == 2 * 2 * (2 * 32 * 8 + 8 + 32)  # blocks, places, down and up
    assert extra["adapter-p"] - extra["plain"] == 2 * (2 * 32 * 16 + 16 + 32)
    assert extra["prefix-layer"] - extra["plain"] == 2 * 32 * 32
    assert all(torch.equal(value, before[name]) for name, value in plain.state_dict().items())


def test_what_is_inserted_has_the_models_dtype() -> None:
    served = latency.variants(llama().to(torch.bfloat16))
    for name, model in served.items():
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}, name


def test_a_row_for_each_shape(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    passes = []

    def minima(steps, seconds, least):
        for step in steps.values():
            passes.append(tuple(step().last_hidden_state.shape))
        return {name: 0.2 + 0.1 * index for index, name in enumerate(steps)}

    monkeypatch.setattr("measure.minima", minima)
    rows = latency.compare("tiny", llama(), [(1, 4), (2, 6)])
    assert passes == [(1, 4, 32)] * 6 + [(2, 6, 32)] * 6
    ratios = dict(zip(latency.SERVED, [1.5, 2.0, 2.5, 3.0, 3.5], strict=True))
    start = {"model": "tiny", "dtype": "float32", "plain ms": "200"}
    assert rows == [{**start, "batch × length": shape, **ratios} for shape in ("1 × 4", "2 × 6")]
    assert "LoRA merged" in capsys.readouterr().out
