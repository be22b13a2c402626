"""A merged folder is the base plus the adapter, as a plain model in the base's own dtype."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import lorakit
from adapters import classifier_adapter, language_adapter
from conftest import tiny_tokenizer
from lorakit.training.merging import merge_to_folder
from lorakit.training.task import Task, model_task

TOKENS = torch.arange(12).view(2, 6)


def cast(base: Path, folder: Path, dtype: torch.dtype | None, **options: Any) -> Path:
    """The base in another dtype; None: its configuration does not say which."""
    from transformers import AutoModelForCausalLM

    shutil.copytree(base, folder)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype or torch.float16)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, **options)
    if dtype is None:
        config = json.loads((folder / "config.json").read_text())
        config.pop("dtype", None)
        (folder / "config.json").write_text(json.dumps(config))
    return folder


@torch.no_grad()
def logits(folder: Path, adapter: Path | None = None) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if adapter is not None:
        lorakit.load(model, adapter)
    out: torch.Tensor = model(TOKENS).logits
    return out


@pytest.mark.parametrize(
    ("own", "asked", "expected"),
    [
        (torch.bfloat16, "base", "bfloat16"),
        (torch.float16, "base", "float16"),
        (torch.float32, "base", "float32"),
        (None, "base", "float16"),  # the weights decide
        (torch.float32, "bfloat16", "bfloat16"),
        (torch.float16, "float32", "float32"),
    ],
)
def test_the_dtype_is_the_bases_own_unless_another_is_asked_for(
    own: torch.dtype | None, asked: str, expected: str, tiny_lm: Path, tmp_path: Path
) -> None:
    base = cast(tiny_lm, tmp_path / "base", own)
    adapter = language_adapter(tiny_lm, tmp_path / "adapter")
    merged = merge_to_folder(str(base), str(adapter), str(tmp_path / "merged"), dtype=asked)
    assert (merged.dtype, merged.notes) == (expected, ())
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == expected
    weights = load_file(tmp_path / "merged" / "model.safetensors")
    assert {str(weight.dtype) for weight in weights.values()} == {f"torch.{expected}"}
    if expected == "float32":
        torch.testing.assert_close(logits(tmp_path / "merged"), logits(base, adapter), atol=2e-4, rtol=1e-4)


def test_problem_47_a_merge_that_leaves_the_adapter_out_is_refused(tiny_lm: Path, tmp_path: Path, monkeypatch) -> None:
    """Because the writer wrote the base, because nothing was trained, or because the dtype rounds every change away."""
    from lorakit.training import merging
    from lorakit.training.models import load_causal_lm

    base, out = cast(tiny_lm, tmp_path / "base", torch.bfloat16), tmp_path / "merged"
    adapter = language_adapter(tiny_lm, tmp_path / "adapter", scale=0.3)

    def forgetful(loaded: Any, folder: Path) -> None:
        load_causal_lm(str(base), dtype="bfloat16").model.save_pretrained(folder)

    with monkeypatch.context() as patch:
        patch.setattr(merging, "_write_model", forgetful)
        with pytest.raises(ValueError, match=r"the merged model differs from base \+ adapter: .*Nothing was written"):
            merge_to_folder(str(base), str(adapter), str(out))
    untrained = lorakit.Adapter.load(adapter)
    for update in untrained.updates.values():
        update.B.zero_()
    untrained.save(tmp_path / "untrained")
    small = language_adapter(tiny_lm, tmp_path / "small", scale=1e-10)
    for folder in (tmp_path / "untrained", small):
        with pytest.raises(
            ValueError, match=r"changes no weight of .* in bfloat16: the merged model would be the base"
        ):
            merge_to_folder(str(base), str(folder), str(out))
    assert not out.exists()


def test_updates_that_change_nothing_are_counted(tiny_lm: Path, tmp_path: Path) -> None:
    adapter = lorakit.Adapter.load(language_adapter(tiny_lm, tmp_path / "adapter"))
    for update in list(adapter.updates.values())[:3]:
        update.B.zero_()
    adapter.save(tmp_path / "less")
    merged = merge_to_folder(str(tiny_lm), str(tmp_path / "less"), str(tmp_path / "merged"))
    assert len(merged.notes) == 1 and merged.notes[0].startswith("3 of 14 updates changed no number of their weight")


def test_a_base_in_several_files_merges_like_one(tiny_lm: Path, tmp_path: Path) -> None:
    base = cast(tiny_lm, tmp_path / "base", torch.float32, max_shard_size="20KB")
    assert len(list(base.glob("model-*.safetensors"))) > 1
    adapter = language_adapter(tiny_lm, tmp_path / "adapter")
    merge_to_folder(str(base), str(adapter), str(tmp_path / "merged"))
    torch.testing.assert_close(logits(tmp_path / "merged"), logits(base, adapter), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens"], ["q_proj", "lm_head", "embed_tokens"]])
def test_tied_matrices_are_parted_where_the_adapter_parts_them(
    targets: list[str], tiny_lm: Path, tmp_path: Path
) -> None:
    from lorakit.training.models import load_causal_lm

    model = load_causal_lm(str(tiny_lm), dtype="float32").model
    lorakit.attach(model, targets, rank=2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    lorakit.save(model, tmp_path / "adapter")
    merge_to_folder(str(tiny_lm), str(tmp_path / "adapter"), str(tmp_path / "merged"))
    expected = logits(tiny_lm, tmp_path / "adapter")
    torch.testing.assert_close(logits(tmp_path / "merged"), expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "config",
    [
        {"temperature": 0.9, "top_p": 0.6},
        {"temperature": 0.0},
        {"num_beams": 3, "repetition_penalty": 1.3},
        {"early_stopping": True, "length_penalty": 2.0},
        {"top_k": 5, "typical_p": 0.5},
        {"eos_token_id": [1, 9]},
    ],
    ids=lambda config: "-".join(config),
)
def test_any_generation_config_of_the_base_can_be_written_and_stops_at_what_was_learnt(
    config: dict[str, Any], tiny_lm: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_lm, base)
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": 1, "pad_token_id": 0, **config}))
    adapter = language_adapter(tiny_lm, tmp_path / "adapter")
    merge_to_folder(str(base), str(adapter), str(tmp_path / "merged"))
    written = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    end = tiny_tokenizer().convert_tokens_to_ids("<|im_end|>")
    own = config.get("eos_token_id", 1)
    ends = sorted({*(own if isinstance(own, list) else [own]), end})
    assert config | {"eos_token_id": ends} == {name: written[name] for name in {*config, "eos_token_id"}}


@pytest.mark.parametrize("labels", [("no", "yes", "perhaps"), ()], ids=["classes", "a number"])
def test_a_merged_classifier_knows_its_classes(labels: tuple[str, ...], tiny_encoder: Path, tmp_path: Path) -> None:
    adapter = classifier_adapter(tiny_encoder, tmp_path / "adapter", labels, value=1.5)
    merged = merge_to_folder(str(tiny_encoder), str(adapter), str(tmp_path / "merged"))
    assert merged.difference.same_choice == 1
    expected = Task("classification", labels) if labels else Task("regression")
    assert model_task(str(tmp_path / "merged"), None) == expected


def test_the_style_travels_with_the_merged_model(tiny_lm: Path, tmp_path: Path) -> None:
    from lorakit.training.style import Style

    adapter = language_adapter(tiny_lm, tmp_path / "adapter", chat=False, system="Be brief.")
    merge_to_folder(str(tiny_lm), str(adapter), str(tmp_path / "merged"))
    assert Style.recorded(tmp_path / "merged", tiny_tokenizer()) == Style(False, "Be brief.")


def test_fewer_positions_than_the_probe_has_tokens(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    base, tokenizer = tmp_path / "base", tiny_tokenizer()
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=8)
    GPT2LMHeadModel(config).save_pretrained(base)
    tokenizer.save_pretrained(base)
    adapter = language_adapter(base, tmp_path / "adapter")
    assert merge_to_folder(str(base), str(adapter), str(tmp_path / "merged")).difference.relative < 1e-4


def test_what_cannot_be_merged_is_refused_before_a_model_is_loaded(
    tiny_lm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(ValueError, match="is a base model without an adapter; give --adapter"):
        merge_to_folder(str(tiny_lm), None, str(tmp_path / "merged"))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    with pytest.raises(FileNotFoundError, match=r"has adapter_config\.json but no adapter_model"):
        merge_to_folder(str(tiny_lm), str(adapter), str(tmp_path / "merged"))
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("dtype", "message"), [("base", r"dequantised.* in float32 \(--dtype bfloat16"), ("bfloat16", "plain one\\.$")]
)
def test_what_becomes_of_a_packed_base_is_said(dtype: str, message: str, tmp_path: Path) -> None:
    from lorakit.training.merging import _notes

    (tmp_path / "model.gguf").touch()
    for base in (tmp_path, tmp_path / "model.gguf"):
        (note,) = _notes(str(base), dtype)
        assert re.search(message, note)
