"""Mixtures of experts, in each way of storing their matrices: against W + s·B A of every expert in float64."""

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorakit
import models
from architectures import ARCHITECTURES, Architecture, _causal
from lorakit.core.attach import adapted_layers
from lorakit.training.gradient_checkpointing import begin_checkpointing
from models import train_a_little, trainable_names
from storages import Made

TOKENS = torch.arange(2, 16).view(2, 7)
_DEEPSEEK = dict(
    num_hidden_layers=3, num_key_value_heads=4, moe_intermediate_size=24, n_routed_experts=4, num_experts_per_tok=2,
    n_group=1, topk_group=1, first_k_dense_replace=2, q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=8,
    qk_rope_head_dim=8, v_head_dim=8, n_shared_experts=1,
)  # fmt: skip
# Two dense layers before the experts, an expert that every token takes, a router with a correction of its scores (V3).
MODELS: dict[str, Architecture] = {
    **{name: ARCHITECTURES[name] for name in ("qwen3-moe", "mixtral", "gpt-oss", "llama4")},
    "deepseek-v2": _causal("DeepseekV2", topk_method="greedy", **_DEEPSEEK),
    "deepseek-v3": _causal("DeepseekV3", **_DEEPSEEK),
}
STORED_IN_OUT = ("gpt-oss", "llama4")  # by transformers' modelling code: x @ W, where the others are F.linear(x, W)
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


@functools.cache
def _plain(name: str) -> nn.Module:
    model = MODELS[name].make().double()
    model.config._experts_implementation = "eager"  # torch's grouped_mm has no float64
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "experts" in parameter_name and parameter_name.endswith("bias"):
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(3))
    return model


def plain(name: str) -> nn.Module:
    return copy.deepcopy(_plain(name))


def adapted(name: str, **settings) -> nn.Module:
    model = plain(name)
    lorakit.attach(model, EXPERTS, rank=2, alpha=6, **settings)
    train_a_little(model)
    return model


def stacks(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: p for name, p in model.named_parameters() if "experts" in name and p.dim() == 3 and "lora_" not in name
    }


def sums(name: str, model: nn.Module) -> dict[str, Tensor]:
    """W + 3·B A for each expert of each stack, by the names of the plain model; differentiable in A and B."""
    parameters, found = dict(model.named_parameters()), {}
    for stack, weight in stacks(model).items():
        owner, _, local = stack.rpartition(".")
        A, B = (parameters[f"{owner}.lora_{local}.lora_{factor}"] for factor in "AB")
        deltas = [3 * (b @ a) for a, b in zip(A, B, strict=True)]
        found[stack] = torch.stack(
            [w + (delta.T if name in STORED_IN_OUT else delta) for w, delta in zip(weight, deltas, strict=True)]
        )
    assert found
    return found


def of_sums(name: str, model: nn.Module) -> Callable[..., Any]:
    """The plain model as a function, with these in the place of its stacks."""
    return lambda *args, **kwargs: torch.func.functional_call(plain(name), sums(name, model), args, kwargs)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize("name", MODELS)
def test_problem_29_every_expert_is_the_dense_sum(name: str, tmp_path: Path) -> None:
    before, model = plain(name), adapted(name)
    width, inner = before.config.hidden_size, stacks(before).popitem()[1].shape[2 if name not in STORED_IN_OUT else 1]
    shapes = {(layer.parameter, *layer.lora_A.shape, *layer.lora_B.shape) for layer in adapted_layers(model).values()}
    assert shapes == {("gate_up_proj", 4, 2, width, 4, 2 * inner, 2), ("down_proj", 4, 2, inner, 4, width, 2)}
    expected = of_sums(name, model)(TOKENS).logits.detach()
    assert (expected - logits(before)).abs().max() > 1e-3
    torch.testing.assert_close(model(TOKENS).logits, expected, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(logits(model), expected, atol=1e-9, rtol=1e-9)

    lorakit.save(model, tmp_path)
    again = plain(name)
    lorakit.load(again, tmp_path)
    torch.testing.assert_close(logits(again), expected, atol=1e-9, rtol=1e-9)

    lorakit.merge(model)
    torch.testing.assert_close(logits(model), expected, atol=1e-9, rtol=1e-9)
    lorakit.detach(again)
    assert torch.equal(logits(again), logits(before))
    assert [type(module) for module in again.modules()] == [type(module) for module in before.modules()]
    state = again.state_dict()
    assert list(state) == list(before.state_dict())
    assert all(torch.equal(tensor, state[key]) for key, tensor in before.state_dict().items())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_problem_29_gradients_are_those_of_the_dense_sum(name: str, checkpointing: bool) -> None:
    model = adapted(name).train()
    if checkpointing:
        begin_checkpointing(model)
        model.enable_input_require_grads()
    factors = [parameter for parameter in model.parameters() if parameter.requires_grad]
    loss = model(TOKENS, labels=TOKENS, use_cache=False).loss
    got = torch.autograd.grad(loss, factors)
    expected_loss = of_sums(name, model)(TOKENS, labels=TOKENS).loss
    expected = torch.autograd.grad(expected_loss, factors)
    torch.testing.assert_close(loss, expected_loss, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(got, expected, atol=1e-9, rtol=1e-8)
    assert all(gradient.abs().max() > 0 for gradient in got)


@pytest.mark.parametrize("name", MODELS)
def test_problem_29_training_lowers_the_loss_and_generate_follows_it(name: str) -> None:
    model = plain(name).train()
    lorakit.attach(model, EXPERTS, rank=2, alpha=6)
    optimizer = torch.optim.AdamW(lorakit.parameters(model), lr=0.02)
    losses = []
    for _ in range(8):
        loss = model(TOKENS, labels=TOKENS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    written = plain(name)
    with torch.no_grad():
        for key, weight in sums(name, model).items():
            written.get_parameter(key).copy_(weight)
    asked = dict(max_new_tokens=6, do_sample=False, pad_token_id=0)
    expected = written.generate(TOKENS[:, :3], **asked)
    assert torch.equal(model.eval().generate(TOKENS[:, :3], **asked), expected)
    lorakit.merge(model)
    assert torch.equal(model.generate(TOKENS[:, :3], **asked), expected)


@pytest.mark.parametrize("targets", ["all-linear+experts", ["all-linear", "experts"], ["experts", "all-linear"]])
@pytest.mark.parametrize("name", MODELS)
def test_problem_29_all_linear_takes_the_experts_when_asked(name: str, targets: str | list[str]) -> None:
    model, linear = plain(name), plain(name)
    report, without = lorakit.attach(model, targets, rank=2), lorakit.attach(linear, rank=2)
    assert {row.name for row in report.rows} - {row.name for row in without.rows} == set(stacks(linear))
    assert not any("expert" in owner for owner in report.skipped)
    left_out = [owner for owner in without.skipped if "expert" in owner]
    assert {f"{owner}.{end}" for owner in left_out for end in ("gate_up_proj", "down_proj")} == set(stacks(linear))
    assert trainable_names(model) == {key for key in model.state_dict() if "lora_" in key}


def test_experts_that_are_excluded_or_not_there() -> None:
    model = plain("qwen3-moe")
    report = lorakit.attach(model, "all-linear+experts", exclude="*.0.mlp.experts", rank=2)
    assert [row.name for row in report.rows if "expert" in row.name] == [
        f"model.layers.1.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")
    ]
    for targets in ("all-linear+experts", ["q_proj", "all-linear+experts"]):
        dense = models.llama()
        with pytest.raises(lorakit.LoraError, match="LlamaForCausalLM keeps no stack of experts' matrices. Use 'all-l"):
            lorakit.attach(dense, targets)
        assert not adapted_layers(dense)
    with pytest.raises(lorakit.LoraError, match="'all-linear[+]expert'.* match no module"):
        lorakit.attach(plain("qwen3-moe"), "all-linear+expert")


@pytest.mark.parametrize("name", MODELS)
def test_problem_29_no_storage_of_a_step_is_as_large_as_a_stack(name: str) -> None:
    model = plain(name).train()
    lorakit.attach(model, "all-linear+experts", rank=2)
    train_a_little(model)
    smallest = min(weight.nbytes for weight in stacks(model).values())
    with Made() as made:
        model(TOKENS[:, :3], labels=TOKENS[:, :3]).loss.backward()
    assert 0 < max(made.sizes) < smallest
    with Made() as dense:
        lorakit.merge(model)
    assert max(dense.sizes) >= smallest  # what the test looks for
