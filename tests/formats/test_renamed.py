"""Adapters made before transformers 5 renamed and fused modules: lorakit reads what PEFT reads, with equal outputs."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

import lorakit
import models
from folders import factors, folder, read_in_peft

TOKENS = torch.arange(10)[None]


def mixtral() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=2,
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config).eval()


def mixtral_before(names: tuple[str, ...], experts: range = range(3), rank: int = 4) -> dict[str, torch.Tensor]:
    shapes = {"w1": (16, 24), "w3": (16, 24), "w2": (24, 16), "gate": (16, 3), "q_proj": (16, 16)}
    places = {"gate": "block_sparse_moe.gate", "q_proj": "self_attn.q_proj"}
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(2):
        for name in names:
            for expert in experts if name in ("w1", "w2", "w3") else (0,):
                place = places.get(name, f"block_sparse_moe.experts.{expert}.{name}")
                own = factors(f"model.layers.{layer}.{place}", *shapes[name], rank)
                tensors |= {key: value * (0.1 + 0.1 * expert + 0.05 * layer) for key, value in own.items()}
    return tensors


def qwen_before(names: tuple[str, ...]) -> dict[str, torch.Tensor]:
    shapes = {"gate_proj": (32, 24), "up_proj": (32, 24), "down_proj": (24, 32)}
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(2):
        for expert in range(4):
            for name in names:
                own = factors(f"model.layers.{layer}.mlp.experts.{expert}.{name}", *shapes[name], 2)
                tensors |= {key: value * (0.1 + 0.1 * expert) for key, value in own.items()}
    return tensors


CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, torch.Tensor], dict[str, object]]] = {
    "all of Mixtral's experts": (mixtral, mixtral_before(("w1", "w2", "w3")), {}),
    "w2 alone": (mixtral, mixtral_before(("w2",)), {}),
    "with the router": (mixtral, mixtral_before(("w1", "w2", "w3", "gate")), {}),
    "with attention": (mixtral, mixtral_before(("w1", "w2", "w3", "q_proj")), {}),
    "rsLoRA": (mixtral, mixtral_before(("w1", "w2", "w3")), {"use_rslora": False, "lora_alpha": 3}),
    "Qwen": (models.qwen_moe, qwen_before(("gate_proj", "up_proj", "down_proj")), {"r": 2}),
}


@pytest.mark.parametrize("case", CASES)
def test_experts_of_their_own_are_a_stack_now(case: str, tmp_path: Path) -> None:
    make, tensors, settings = CASES[case]
    targets = sorted({key.partition(".lora_")[0].rpartition(".")[2] for key in tensors})
    path = folder(tmp_path / "old", tensors, **{"target_modules": targets, "task_type": "CAUSAL_LM", **settings})
    expected = read_in_peft(make(), path)(input_ids=TOKENS).logits.detach()
    assert (expected - make()(TOKENS).logits).abs().max() > 0.01
    model = make()
    lorakit.load(model, path)
    torch.testing.assert_close(model(TOKENS).logits, expected, atol=2e-5, rtol=1e-4)
    lorakit.save(model, tmp_path / "new")
    again = read_in_peft(make(), tmp_path / "new")(input_ids=TOKENS).logits
    torch.testing.assert_close(again, expected, atol=2e-5, rtol=1e-4)


def reference(tensors: dict[str, torch.Tensor], scale: Callable[[str], float]) -> nn.Module:
    """Mixtral with each expert's matrices changed by hand."""
    model = mixtral()
    with torch.no_grad():
        for key in tensors:
            found = re.search(r"layers\.(\d+)\.block_sparse_moe\.experts\.(\d+)\.(w[123])\.lora_A", key)
            if found is None:
                continue
            layer, expert, name = int(found[1]), int(found[2]), found[3]
            delta = scale(key) * tensors[key.replace("lora_A", "lora_B")] @ tensors[key]
            experts = model.model.layers[layer].mlp.experts
            if name == "w2":
                experts.down_proj[expert] += delta
            else:
                half = slice(0, 24) if name == "w1" else slice(24, 48)
                experts.gate_up_proj[expert, half] += delta
    return model


@pytest.mark.parametrize("names", [("w1",), ("w3",), ("w1", "w2"), ("w1", "w3")])
@pytest.mark.parametrize("experts", [range(3), range(1), range(1, 3)])
def test_what_the_adapter_left_alone_counts_as_zero(names: tuple[str, ...], experts: range, tmp_path: Path) -> None:
    """PEFT refuses these, fails on them, or drops them (w1 and w3 without w2)."""
    tensors = mixtral_before(names, experts)
    model = mixtral()
    lorakit.load(model, folder(tmp_path, tensors, target_modules=list(names)))
    expected = reference(tensors, lambda key: 2.0)
    torch.testing.assert_close(model(TOKENS).logits, expected(TOKENS).logits, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("rslora", [False, True])
def test_ranks_and_alphas_of_single_experts_are_kept(rslora: bool, tmp_path: Path) -> None:
    tensors = mixtral_before(("w1", "w2", "w3")) | mixtral_before(("w3",), range(1, 2), rank=2)
    path = folder(
        tmp_path, tensors, target_modules=["w1", "w2", "w3"], use_rslora=rslora,
        rank_pattern={r"experts\.1\.w3": 2}, alpha_pattern={r"layers\.1\..*\.w2": 5},
    )  # fmt: skip

    def scale(key: str) -> float:
        rank = 2 if "experts.1.w3" in key else 4
        alpha = 5 if "layers.1." in key and ".w2." in key else 8
        return alpha / (rank**0.5 if rslora else rank)

    model = mixtral()
    lorakit.load(model, path)
    expected = reference(tensors, scale)(TOKENS).logits
    torch.testing.assert_close(model(TOKENS).logits, expected, atol=2e-5, rtol=1e-4)


def llava() -> nn.Module:
    torch.manual_seed(0)
    text = transformers.LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=63)
    return transformers.LlavaForConditionalGeneration(config).eval()


@pytest.mark.parametrize(
    "prefix", ["language_model.model.layers.0", "model.language_model.layers.0", "language_model.layers.0"]
)
def test_text_towers_are_found_where_they_are_now(prefix: str, tmp_path: Path) -> None:
    tensors = factors(f"{prefix}.self_attn.q_proj", 16, 16)
    wanted, model = llava(), llava()
    lorakit.load(wanted, folder(tmp_path / "new", factors("model.language_model.layers.0.self_attn.q_proj", 16, 16)))
    lorakit.load(model, folder(tmp_path / "old", tensors, target_modules=["q_proj"]))
    assert torch.equal(model(TOKENS).logits, wanted(TOKENS).logits)


def test_other_towers_and_trained_tensors_too(tmp_path: Path) -> None:
    old = factors("vision_tower.vision_model.encoder.layers.0.self_attn.q_proj", 16, 16)
    head = {"base_model.model.language_model.lm_head.weight": torch.randn(64, 16)}
    model = llava()
    adapter = lorakit.load(model, folder(tmp_path, old | head, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    assert torch.equal(model.lm_head.weight, head["base_model.model.language_model.lm_head.weight"])
    assert adapter.also_train == ("lm_head",)
    assert [name for name in adapter.updates if "vision_tower" in name and name.endswith("q_proj")]


@pytest.mark.parametrize("make", [models.llama, models.bert])
def test_a_model_and_its_base_model_take_one_anothers_adapters(make, tmp_path: Path) -> None:
    """AutoModel lacks the prefix that AutoModelForCausalLM has."""
    model = make()
    base = model.base_model
    lorakit.attach(model, ["q_proj" if make is models.llama else "query"], rank=2)
    models.train_a_little(model)
    lorakit.save(model, tmp_path / "whole")
    other = make().base_model
    adapter = lorakit.load(other, tmp_path / "whole")
    assert set(adapter.updates) <= {name for name, _ in base.named_modules()}
    lorakit.save(other, tmp_path / "base")
    again = make()
    lorakit.load(again, tmp_path / "base")
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)


def test_what_has_no_place_is_refused_with_the_reason(tmp_path: Path) -> None:
    dora = mixtral_before(("w2",))
    dora |= {key.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(16) for key in dora if "lora_A" in key}
    with pytest.raises(ValueError, match="DoRA has no meaning in .*experts.down_proj, the stack of all experts"):
        lorakit.load(mixtral(), folder(tmp_path / "dora", dora, use_dora=True))
    with pytest.raises(ValueError, match="the adapter is for 5 experts, the model has 3"):
        lorakit.load(mixtral(), folder(tmp_path / "more", mixtral_before(("w2",), range(5))))
    narrow = factors("model.layers.0.block_sparse_moe.experts.0.w1", 12, 24)
    with pytest.raises(ValueError, match=r"experts.0.w1: .* are no part of an update of 48 × 16"):
        lorakit.load(mixtral(), folder(tmp_path / "narrow", narrow))
    with pytest.raises(ValueError, match=r"Closest: 'model.layers.0.self_attn.q_proj'"):
        lorakit.load(mixtral(), folder(tmp_path / "typo", factors("model.layers.0.self_attn.q_prj", 16, 16)))
