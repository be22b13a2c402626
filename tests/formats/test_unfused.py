"""Adapters with a pair for each layer of each expert, as transformers 4 had them: written, and read into a stack.

What they mean is told by transformers: each pair is added, as s·B A in float64, to the weight of its name in the base
model's checkpoint, and transformers loads that.
"""

import json
import re
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion

import lorakit
from architectures import ARCHITECTURES, _causal
from folders import CONFIG, TENSORS, factors, folder, read_in_peft
from lorakit.core.adapter import Adapter, Update
from lorakit.core.host import Host
from lorakit.core.layouts import Matrix, Stack
from lorakit.formats.unfused import unfused
from models import train_a_little

TOKENS = torch.arange(2, 16).view(2, 7)
_DEEPSEEK = ARCHITECTURES["deepseek-v3"].settings | dict(num_hidden_layers=3, first_k_dense_replace=2)
MODELS = {
    "mixtral": ARCHITECTURES["mixtral"],
    "qwen3-moe": ARCHITECTURES["qwen3-moe"],
    "deepseek-v2": _causal("DeepseekV2", topk_method="greedy", **_DEEPSEEK),
    "deepseek-v3": _causal("DeepseekV3", **_DEEPSEEK),
}
PREFIX = "base_model.model."


def make(name: str) -> nn.Module:
    model = MODELS[name].make().double()
    model.config._experts_implementation = "eager"  # torch's grouped_mm has no float64
    return model


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def checkpoint(name: str) -> dict[str, Tensor]:
    """The base model's weights by the names that its files have: those of transformers 4."""
    model = make(name)
    return {key: tensor.clone() for key, tensor in revert_weight_conversion(model, model.state_dict()).items()}


def meant(name: str, adapter: Path, where: Path) -> Tensor:
    """The logits of the base model whose checkpoint has W + s·B A for each pair in the adapter's file."""
    weights, tensors = checkpoint(name), safetensors.torch.load_file(adapter / TENSORS)
    config = json.loads((adapter / CONFIG).read_text())
    scale = config["lora_alpha"] / config["r"]
    for key in [key for key in tensors if ".lora_A." in key]:
        own = key.removeprefix(PREFIX).replace(".lora_A", "")
        weights[own] += scale * tensors[key.replace("lora_A", "lora_B")].double() @ tensors[key].double()
    where.mkdir()
    make(name).config.save_pretrained(where)
    safetensors.torch.save_file(weights, where / "model.safetensors", {"format": "pt"})
    changed = getattr(transformers, MODELS[name].cls).from_pretrained(
        where, dtype=torch.float64, experts_implementation="eager"
    )
    return logits(changed.eval())


@pytest.mark.parametrize("also", ["experts", "all-linear"])
@pytest.mark.parametrize("name", MODELS)
def test_problem_29_a_pair_for_each_expert_is_written(name: str, also: str, tmp_path: Path) -> None:
    model = make(name)
    lorakit.attach(model, ["experts", also, "gate.weight"], rank=2, alpha=3)
    train_a_little(model)
    lorakit.save(model, tmp_path / "adapter", experts="per-expert")
    tensors = safetensors.torch.load_file(tmp_path / "adapter" / TENSORS)
    pairs = {key.removeprefix(PREFIX).removesuffix(".lora_A.weight") for key in tensors if ".lora_A." in key}
    of_experts = [pair for pair in pairs if ".experts." in pair]
    experts, layers = 4, 2 if name in ("mixtral", "qwen3-moe") else 1
    assert len(of_experts) == layers * experts * 3
    assert {f"{pair}.weight" for pair in pairs} <= checkpoint(name).keys()
    assert {tensors[f"{PREFIX}{pair}.lora_A.weight"].shape[0] for pair in pairs} == {2}
    torch.testing.assert_close(meant(name, tmp_path / "adapter", tmp_path / "base"), logits(model), atol=1e-9, rtol=0)

    # The names that say what is adapted select these modules, and no others of the model that it was made for.
    targets = json.loads((tmp_path / "adapter" / CONFIG).read_text())["target_modules"]
    modules = [key.removesuffix(".weight") for key in checkpoint(name)]
    assert {m for m in modules if m.endswith(tuple(f".{target}" for target in targets))} == pairs

    again = make(name)
    lorakit.attach(again, ["experts", also, "gate.weight"], rank=2, alpha=3)  # the factors are those that were written
    lorakit.load(again, tmp_path / "adapter", dtype=torch.float64)
    state = again.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items() if "lora_" in key)


@pytest.mark.parametrize("name", MODELS)
def test_problem_29_a_pair_for_each_expert_is_read(name: str, tmp_path: Path) -> None:
    """Each with an A of its own, beside shared experts, dense layers and the router."""
    weights = {key: tensor for key, tensor in checkpoint(name).items() if tensor.dim() == 2}
    tensors: dict[str, Tensor] = {}
    for key, weight in weights.items():
        if "embed" not in key and "lm_head" not in key:
            tensors |= factors(key.removesuffix(".weight"), weight.shape[1], weight.shape[0], 2)
    tensors = {key: 0.2 * torch.randn(tensor.shape) for key, tensor in tensors.items()}
    path = folder(tmp_path / "adapter", tensors, r=2, lora_alpha=3, target_modules="all-linear")
    model = make(name)
    before = logits(model)
    lorakit.load(model, path, dtype=torch.float64)
    expected = meant(name, path, tmp_path / "base")
    assert (expected - before).abs().max() > 0.1
    torch.testing.assert_close(logits(model), expected, atol=1e-9, rtol=0)
    lorakit.save(model, tmp_path / "again", experts="per-expert")
    written = safetensors.torch.load_file(tmp_path / "again" / TENSORS)
    assert written.keys() == tensors.keys()
    assert all(torch.equal(tensor.double(), written[key]) for key, tensor in tensors.items())
    config = json.loads((tmp_path / "again" / CONFIG).read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (2, 3, {})


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
def test_peft_reads_what_is_written_for_single_experts(name: str, tmp_path: Path) -> None:
    model = MODELS[name].make()
    lorakit.attach(model, ["experts", "q_proj", "gate.weight"], rank=2, alpha=3)
    train_a_little(model)
    lorakit.save(model, tmp_path, experts="per-expert")
    theirs = read_in_peft(MODELS[name].make(), tmp_path)(input_ids=TOKENS).logits
    torch.testing.assert_close(theirs, model(TOKENS).logits, atol=2e-5, rtol=1e-4)


def test_loralibs_file_takes_single_experts(tmp_path: Path) -> None:
    model = make("mixtral")
    lorakit.attach(model, "experts", rank=2, alpha=3)
    train_a_little(model)
    lorakit.save(model, tmp_path / "adapter.pt", experts="per-expert")
    again = make("mixtral")
    lorakit.load(again, tmp_path / "adapter.pt", alpha=3, dtype=torch.float64)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("name", ["gpt-oss", "llama4"])
def test_what_never_was_a_layer_for_each_expert_is_refused(name: str, tmp_path: Path) -> None:
    model = ARCHITECTURES[name].make()
    lorakit.attach(model, "experts", rank=2)
    with pytest.raises(
        lorakit.LoraError, match=r"experts.gate_up_proj: transformers has never had .*experts='stacked'"
    ):
        lorakit.save(model, tmp_path / "adapter", experts="per-expert")
    assert not (tmp_path / "adapter").exists()
    with pytest.raises(lorakit.LoraError, match="experts='single': expected one of 'stacked', 'per-expert'"):
        lorakit.save(model, tmp_path / "adapter", experts="single")  # type: ignore[arg-type]


def test_a_model_without_experts_is_written_as_it_is(tmp_path: Path) -> None:
    model = ARCHITECTURES["llama"].make()
    lorakit.attach(model, rank=2)
    lorakit.save(model, tmp_path / "stacked")
    lorakit.save(model, tmp_path / "per-expert", experts="per-expert")
    for file in (CONFIG, TENSORS):
        assert (tmp_path / "stacked" / file).read_bytes() == (tmp_path / "per-expert" / file).read_bytes()


@pytest.mark.parametrize("kind", ["phimoe", "jamba", "minimax_m2", "nemotron_h", "longcat_flash", "qwen3_next"])
def test_the_names_are_those_of_the_base_models_checkpoint(kind: str) -> None:
    """By transformers' own way of writing checkpoints, for models with other rules: w1, feed_forward, backbone, …"""
    config = transformers.AutoConfig.for_model(kind)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    stacks = [name for name, p in model.named_parameters() if p.dim() == 3 and ".experts." in name][-2:]
    layers = [f"{name}.weight" for name, module in model.named_modules() if name.endswith("q_proj")][:1]
    updates = {name: Update(Stack("out-in"), torch.ones(2, 1, 1), torch.ones(2, 2, 1), 1, 1.0) for name in stacks}
    updates |= {name[:-7]: Update(Matrix(), torch.ones(1, 1), torch.ones(1, 1), 1, 1.0) for name in layers}
    found = unfused(Adapter(updates), Host(model)).updates
    state = {name: tensor for name, tensor in model.state_dict().items() if name in (*stacks, *layers)}
    expected = {
        key for key in revert_weight_conversion(model, state) if not re.search(r"experts\.([2-9]|\d\d+)\.", key)
    }
    assert {f"{name}.weight" for name in found} == expected
    assert len(found) == len(layers) + 2 * (2 if kind == "nemotron_h" else 3)  # no gate there
