"""What other programs compute from an exported folder, by their own formulas, is the update of the original."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import lorakit
import models
from lorakit.formats.portable import Target, portable

TOKENS = torch.arange(14).view(2, 7)
TARGETS: tuple[Target, ...] = ("vllm", "sglang", "llama.cpp")
Scale = Callable[[dict[str, Any], Tensor], float]  # adapter_config.json and A of one module
# As these programs' sources compute it; none of them reads rank_pattern or alpha_pattern.
SCALES: dict[Target, Scale] = {
    "vllm": lambda config, A: config["lora_alpha"] / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"]),
    "sglang": lambda config, A: config["lora_alpha"] / config["r"],
    "llama.cpp": lambda config, A: config["lora_alpha"] / A.shape[0],
}
# Settings, and the programs that misread what is saved with them.
SETTINGS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "plain": ({}, set()),
    "rslora": (dict(rslora=True), {"sglang", "llama.cpp"}),
    "ranks": (dict(rank_pattern={"*.1.*": 2, "*.up_proj": 7}), {"vllm", "sglang"}),
    "alphas": (dict(alpha_pattern={"*.0.*": 3, "*.q_proj": 5.5}), {*TARGETS}),
    "all three": (dict(rslora=True, rank_pattern={"*.q_proj": 9}, alpha_pattern={"*.1.*": 1}), {*TARGETS}),
    "pissa": (dict(init="pissa", rank_pattern={"*.q_proj": 2}), {"vllm", "sglang"}),
}


def updates_read(folder: Path, scale: Scale) -> dict[str, Tensor]:
    """ΔW of each module in float64."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = {name: tensor.double() for name, tensor in load_file(folder / "adapter_model.safetensors").items()}
    found = {}
    for name, A in tensors.items():
        if name.endswith(".lora_A.weight"):
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            found[module] = scale(config, A) * tensors[name.replace("lora_A", "lora_B")] @ A
    return found


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("settings", "misread"), SETTINGS.values(), ids=SETTINGS)
def test_problem_46_every_program_computes_the_same_update(
    settings: dict[str, Any], misread: set[str], target: Target, tmp_path: Path
) -> None:
    model = models.llama()
    lorakit.attach(model, rank=4, alpha=6, **settings)
    models.train_a_little(model)
    lorakit.save(model, tmp_path / "own", force=True)
    portable(lorakit.Adapter.load(tmp_path / "own"), target).save(tmp_path / "exported")
    plain = models.llama()
    weights = dict(plain.named_modules())
    lorakit.merge(model, force=True)
    found = updates_read(tmp_path / "exported", SCALES[target])
    assert len(found) == 14
    for name, update in found.items():
        merged, base = model.get_submodule(name).weight, weights[name].weight
        assert isinstance(merged, Tensor) and isinstance(base, Tensor)
        torch.testing.assert_close(base.double() + update, merged.double(), rtol=0, atol=2e-6)
        assert update.abs().max() > 0.01
    as_saved = updates_read(tmp_path / "own", SCALES[target])
    off = max(float((as_saved[name] - update).abs().max()) for name, update in found.items())
    assert (off > 1e-3) == (target in misread)  # what the test looks for
    again = models.llama()
    lorakit.load(again, tmp_path / "exported")
    torch.testing.assert_close(again(TOKENS).logits, model(TOKENS).logits, rtol=0, atol=2e-6)


@pytest.mark.parametrize("target", TARGETS)
def test_problem_46_what_a_program_cannot_read_is_listed_with_what_to_do(target: Target) -> None:
    def problems(model: nn.Module, *targets: str, **settings: Any) -> str:
        lorakit.attach(model, targets or "all-linear", rank=2, **settings)
        models.train_a_little(model)
        with pytest.raises(ValueError, match="cannot read this adapter:\n") as caught:
            portable(lorakit.extract(model, force=True), target)
        return str(caught.value)

    said = problems(models.llama(), "q_proj", dora=True, also_train=["lm_head"])
    assert "DoRA (model.layers.0.self_attn.q_proj, model.layers.1.self_attn.q_proj): merge it into the base" in said
    assert "tensors that were trained whole (lm_head.weight): merge it into the base: lorakit merge" in said
    said = problems(models.gpt2(), "c_attn", bias="lora_only")
    assert "trained whole (transformer.h.0.attn.c_attn.bias, transformer.h.1.attn.c_attn.bias)" in said
    said = problems(models.qwen_moe(), "experts.gate_up_proj")
    assert 'experts="per-expert"), and export that folder' in said and said.count("\n") == 1
    said = problems(models.conv_net(), "0", "1.conv_dw")
    assert "updates of other layers" in said and "(0, 1.conv_dw): merge" in said


def test_an_embedding_and_a_large_rank() -> None:
    model = models.llama()
    lorakit.attach(model, ["embed_tokens"], rank=2)
    adapter = lorakit.extract(model, force=True)
    for target in ("vllm", "llama.cpp"):
        assert portable(adapter, target).updates["model.embed_tokens"].rank == 2
    with pytest.raises(ValueError, match=r"SGLang cannot read .*\n  updates of other layers .*model.embed_tokens"):
        portable(adapter, "sglang")
    wide = nn.Sequential(nn.Linear(600, 600))
    lorakit.attach(wide, "0", rank=513)
    with pytest.raises(ValueError, match="rank 513, and its largest is 512"):
        portable(lorakit.extract(wide, force=True), "vllm")
    assert portable(lorakit.extract(wide, force=True), "sglang").updates["0"].rank == 513
