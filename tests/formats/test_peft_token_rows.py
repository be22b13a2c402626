"""Trained rows of token tables in PEFT's files: read and written by PEFT itself, and of nothing but these rows."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import lorakit
from architectures import ARCHITECTURES
from in_peft import load_in_peft

TOKENS = torch.tensor([[3, 60, 61, 5, 60, 1], [61, 2, 2, 7, 9, 60]])
# The model, the target of A and B, `trainable_token_indices`, and what the file holds: tokens by table.
CASES: dict[str, tuple[str, str, Any, dict[str, tuple[int, ...]]]] = {
    "tied": ("llama-tied", "q_proj", [61, 60], {"model.embed_tokens": (60, 61)}),
    "tied, named": ("llama-tied", "q_proj", {"embed_tokens": [61, 3]}, {"model.embed_tokens": (3, 61)}),
    "tied, both named": (
        "llama-tied", "q_proj", {"lm_head": [61, 60], "embed_tokens": [61, 60]}, {"model.embed_tokens": (60, 61)},
    ),
    "not tied": ("llama", "q_proj", [61, 60], {"model.embed_tokens": (60, 61)}),
    "not tied, both named": (
        "llama", "q_proj", {"embed_tokens": [60], "lm_head": [61, 1, 60]},
        {"lm_head": (1, 60, 61), "model.embed_tokens": (60,)},
    ),
    "Gemma": ("gemma3", "q_proj", [61, 60], {"model.embed_tokens": (60, 61)}),
    "T5": ("t5", "q", [61, 60], {"shared": (60, 61)}),
}  # fmt: skip


def logits(model: Any) -> torch.Tensor:
    inputs = {"decoder_input_ids": TOKENS.flip(1)} if model.config.is_encoder_decoder else {}
    found: torch.Tensor = model(input_ids=TOKENS, **inputs).logits.detach()
    return found


def peft_model(make: Callable[[], Any], target: str, indices: Any) -> Any:
    """An adapter of PEFT's in which everything trained has random values."""
    model = peft.get_peft_model(make(), peft.LoraConfig(r=2, target_modules=[target], trainable_token_indices=indices))
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def of_rows(folder: Path) -> dict[str, torch.Tensor]:
    stored = load_file(folder / "adapter_model.safetensors")
    return {name: tensor for name, tensor in stored.items() if ".lora_" not in name}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("case", CASES)
def test_problem_31_files_go_both_ways_between_peft_and_lorakit(case: str, tmp_path: Path) -> None:
    name, target, indices, held = CASES[case]
    make = ARCHITECTURES[name].make
    theirs = peft_model(make, target, indices)
    theirs.save_pretrained(tmp_path / "theirs")
    model = make()
    adapter = lorakit.load(model, tmp_path / "theirs")
    assert {table: rows.tokens for table, rows in adapter.token_rows.items()} == held
    torch.testing.assert_close(logits(model), logits(theirs), atol=1e-5, rtol=1e-5)
    assert (logits(model) - logits(make())).abs().max() > 1e-2
    lorakit.save(model, tmp_path / "ours")
    assert of_rows(tmp_path / "ours").keys() == of_rows(tmp_path / "theirs").keys()
    config = json.loads((tmp_path / "ours/adapter_config.json").read_text())
    assert config["trainable_token_indices"] == {table: list(tokens) for table, tokens in held.items()}
    assert torch.equal(logits(load_in_peft(make(), tmp_path / "ours")), logits(theirs))
    again = make()
    lorakit.attach(again, target, rank=2, trainable_tokens=indices)  # filled, where it has these rows already
    lorakit.load(again, tmp_path / "ours")
    assert torch.equal(logits(again), logits(model))


def test_problem_31_a_file_holds_the_changed_rows_and_no_table(tmp_path: Path) -> None:
    """Its bytes: A and B, k rows of the table, and safetensors' header."""
    sizes = {}
    for tokens in ([], [60, 61]):
        model: Any = ARCHITECTURES["llama-tied"].make()
        lorakit.attach(model, "q_proj", rank=2, trainable_tokens=tokens)
        lorakit.save(model, tmp_path)
        data = (tmp_path / "adapter_model.safetensors").read_bytes()
        sizes[len(tokens)] = len(data) - 8 - int.from_bytes(data[:8], "little")
    assert sizes[2] - sizes[0] == 2 * 32 * 4
    rows = of_rows(tmp_path)
    assert rows.keys() == {"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"}
    weight = model.get_input_embeddings().weight
    assert torch.equal(next(iter(rows.values())), weight[[60, 61]])  # the rows themselves, not a difference


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:Setting `save_embedding_layers`:UserWarning")
def test_a_resized_models_file_of_peft_is_read_whole(tmp_path: Path) -> None:
    """PEFT then writes the resized tables beside the rows, and the rows of a tied head a second time."""
    make = ARCHITECTURES["llama-tied"].make
    plain: Any = make()
    plain.save_pretrained(tmp_path / "base")
    base: Any = type(plain).from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(66)
    theirs = peft_model(lambda: base, "q_proj", [64, 65])
    theirs.save_pretrained(tmp_path / "adapter")
    assert {tensor.shape for tensor in of_rows(tmp_path / "adapter").values()} == {(66, 32), (2, 32)}
    model: Any = make()
    message = (
        r"model.embed_tokens.weight: shape \(66, 32\), the model has \(64, 32\). The adapter was made for a table of "
        r"66 rows, and the model's has 64: call model.resize_token_embeddings\(66\) before loading"
    )
    with pytest.raises(lorakit.LoraError, match=message):
        lorakit.load(model, tmp_path / "adapter")
    model.resize_token_embeddings(66)
    lorakit.load(model, tmp_path / "adapter")
    torch.testing.assert_close(logits(model), logits(theirs), atol=1e-5, rtol=1e-5)
    assert list(lorakit.extract(model).token_rows) == ["model.embed_tokens"]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    "settings", [{"trainable_token_indices": [60]}, {"target_modules": ["q_proj", "embed_tokens"]}]
)
@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_a_table_in_the_file_is_the_same_whether_the_model_is_merged(
    name: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    plain: Any = ARCHITECTURES[name].make()
    config = peft.LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **settings})
    theirs = peft.get_peft_model(plain, config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    model = ARCHITECTURES[name].make()
    stored = lorakit.load(model, tmp_path).trained
    lorakit.merge(model)
    found = lorakit.extract(model).trained
    assert found and all(torch.equal(tensor, stored[key]) for key, tensor in found.items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"trainable_tokens": [64, 65]},
            r"model.embed_tokens: row 65 of 'model.embed_tokens' is to be trained, and the model's table has 64 rows. "
            r"If tokens were added, resize it first: model.resize_token_embeddings\(66\)",
        ),
        ({"also_train": "embed_tokens"}, r"shape \(66, 32\), the model has \(64, 32\).*resize_token_embeddings\(66\)"),
        ({"also_train": "lm_head"}, r"shape \(66, 32\), the model has \(64, 32\).*resize_token_embeddings\(66\)"),
        ({"targets": ["q_proj", "embed_tokens"]}, r"A and B are .* table of 66 rows, .*resize_token_embeddings\(66\)"),
        ({"targets": ["q_proj", "lm_head"]}, r"A and B are .* table of 66 rows, .*resize_token_embeddings\(66\)"),
    ],
)
def test_problem_31_another_vocabulary_is_named_with_what_to_do(
    settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """Once that is done, the file fits."""
    model: Any = ARCHITECTURES["llama"].make()
    model.resize_token_embeddings(66)
    lorakit.attach(model, **{"targets": "q_proj", **settings})
    lorakit.save(model, tmp_path)
    other: Any = ARCHITECTURES["llama"].make()
    with pytest.raises(lorakit.LoraError, match=message):
        lorakit.load(other, tmp_path)
    other.resize_token_embeddings(66)
    lorakit.load(other, tmp_path)


def saved(folder: Path, name: str = "llama", tokens: Any = (60, 61)) -> Path:
    model: Any = ARCHITECTURES[name].make()
    lorakit.attach(model, "q_proj", rank=2, trainable_tokens=tokens)
    lorakit.save(model, folder)
    return folder


WRONG: dict[str, tuple[Any, str]] = {
    "fewer": ([60], r"has trained rows \(2, 32\), and trainable_token_indices .* names 1 tokens"),
    "another table": ({"wte": [60, 61]}, r"has trained rows \(2, 32\), and trainable_token_indices .* names 0 tokens"),
    "no tensor": ({"embed_tokens": [60, 61], "lm_head": [5]}, "has no trained rows of lm_head"),
    "twice": ([60, 60], r"trainable_token_indices is \[60, 60\], expected each token once"),
    "a text": ("60", "trainable_token_indices is '60', expected a list of tokens"),
    "negative": ([60, -1], "expected a list of tokens"),
    "true": ({"embed_tokens": [True, 60]}, "expected a list of tokens"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_configuration_that_does_not_say_whose_rows_these_are_is_refused(case: str, tmp_path: Path) -> None:
    indices, message = WRONG[case]
    path = saved(tmp_path) / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"trainable_token_indices": indices}))
    with pytest.raises(lorakit.LoraError, match=message):
        lorakit.load(ARCHITECTURES["llama"].make(), tmp_path)


def wide(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        key: torch.cat((own, own), 1) if own.shape == (2, 32) and "delta" in key else own
        for key, own in tensors.items()
    }


def test_rows_that_do_not_fit_the_model_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "a") / "adapter_model.safetensors"
    tied: Any = ARCHITECTURES["llama-tied"].make()
    before = str(tied)
    save_file(wide(load_file(path)), path)
    with pytest.raises(lorakit.LoraError, match=r"2 rows are stored as \(2, 64\), and the model's table is \(64, 32\)"):
        lorakit.load(tied, tmp_path / "a")
    saved(tmp_path / "b", tokens={"embed_tokens": [60], "lm_head": [61]})
    with pytest.raises(lorakit.LoraError, match="its own rows are in the adapter, .* tied to model.embed_tokens"):
        lorakit.load(tied, tmp_path / "b")
    assert str(tied) == before
    model: Any = ARCHITECTURES["llama"].make()
    lorakit.attach(model, "q_proj", rank=2, trainable_tokens=[60])
    with pytest.raises(lorakit.LoraError, match="the adapter and the model train other rows: 61 in one of them"):
        lorakit.load(model, saved(tmp_path / "c"))
    with pytest.raises(lorakit.LoraError, match="rows of it are trained in the model, and none in the adapter"):
        lorakit.load(model, saved(tmp_path / "d", tokens=[]))


def test_files_that_hold_no_rows_say_so(tmp_path: Path) -> None:
    model: Any = ARCHITECTURES["llama"].make()
    lorakit.attach(model, "q_proj", rank=2, trainable_tokens=[60])
    with pytest.raises(lorakit.LoraError, match=r"rows of model.embed_tokens were trained.* Save into a folder"):
        lorakit.save(model, tmp_path / "a.pt")
    from lorakit.formats.portable import portable

    with pytest.raises(
        lorakit.LoraError, match=re.escape("rows of token tables that were trained (model.embed_tokens)")
    ):
        portable(lorakit.extract(model), "vllm")
    assert not os.listdir(tmp_path)
