"""Bases that are quantised while they are loaded, and those that are quantised in their files."""

import importlib
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import lorakit
import models
from lorakit.cli.main import main
from lorakit.training.config import TrainConfig
from lorakit.training.merging import merge_to_folder
from lorakit.training.models import load_causal_lm, load_classifier, load_with_adapter, skeleton
from lorakit.training.prepare import prepare
from lorakit.training.quantize import quantise_layers
from lorakit.training.start_block import start_block

pytestmark = [pytest.mark.usefixtures("few_objects"), pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning")]
CLASSES = {"nf4": "Linear4bit", "int8": "Linear8bitLt"}


def rows(path: Path, **more: str) -> str:
    lines = [{"prompt": f"turn {i % 6}", "completion": f"on {i % 3}", **more} for i in range(16)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def flags(model: Path, tmp_path: Path, *more: str) -> list[str]:
    usual = ["--model", str(model), "--data", rows(tmp_path / "d.jsonl"), "--output-dir", str(tmp_path / "out")]
    return [
        "train",
        *usual,
        "--dtype",
        "float32",
        "--batch-size",
        "8",
        "--holdout",
        "0",
        "--learning-rate",
        "1e-2",
        *more,
    ]


def kinds(model: nn.Module) -> set[str]:
    return {type(module).__name__ for module in model.modules() if isinstance(module, nn.Linear)}


@pytest.mark.parametrize("how", ["nf4", "int8"])
def test_trained_evaluated_and_asked_on_a_quantised_base(
    how: str, tiny_lm: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(flags(tiny_lm, tmp_path, "--quantize", how, "--epochs", "4", "--logging-steps", "1")) == 0
    printed = capfd.readouterr().out
    assert f"linear layers in {how}, the rest in float32; " in printed and f" {CLASSES[how]} " in printed
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    losses = [line["loss"] for line in map(json.loads, lines) if "loss" in line]
    assert losses[-1] < losses[0] - 0.5
    # As in training, unless something else is asked for.
    loaded = load_with_adapter(str(tmp_path / "out"), None, dtype="float32", quantize=None)
    assert kinds(loaded.model) == {CLASSES[how], "Linear"}  # the head stays
    assert kinds(load_with_adapter(str(tmp_path / "out"), None, dtype="float32").model) == {"Linear"}
    asked = ["generate", "--model", str(tmp_path / "out"), "--prompt", "turn 1", "--max-new-tokens", "4"]
    for more in ([], ["--quantize", "none"], ["--base"]):
        assert main([*asked, *more]) == 0
    assert main(["eval", "--model", str(tmp_path / "out"), "--data", str(tmp_path / "d.jsonl")]) == 0


def test_the_numbers_are_those_of_bitsandbytes(tiny_lm: Path) -> None:
    """A folder is quantised by transformers, the layers of a plain model one after the other: the same bytes."""
    functional: Any = importlib.import_module("bitsandbytes").functional
    by_transformers = load_causal_lm(str(tiny_lm), dtype="float32", quantize="nf4").model
    plain = load_causal_lm(str(tiny_lm), dtype="float32").model
    x = torch.randn(3, 32)
    weight = plain.model.layers[0].mlp.gate_proj.weight.clone()
    packed, state = functional.quantize_4bit(weight, quant_type="nf4")
    expected = x @ functional.dequantize_4bit(packed, state).T
    quantise_layers(plain, "nf4")
    for model in (by_transformers, plain):
        torch.testing.assert_close(model.model.layers[0].mlp.gate_proj.train()(x), expected)
    assert type(plain.lm_head) is type(by_transformers.lm_head) is nn.Linear


@pytest.mark.slow
def test_one_gguf_file_in_four_bits(smollm2_folder: Path) -> None:
    loaded = load_causal_lm(str(smollm2_folder), dtype="bfloat16", quantize="nf4")
    layers = [module for module in loaded.model.modules() if type(module).__name__ == "Linear4bit"]
    assert len(layers) == 7 * 30
    assert (
        sum(layer.weight.nbytes for layer in layers)
        == sum(layer.in_features * layer.out_features for layer in layers) // 2
    )


def test_a_classifier_keeps_its_head(tiny_encoder: Path, tmp_path: Path) -> None:
    data = tmp_path / "c.jsonl"
    data.write_text("".join(json.dumps({"text": f"turn {i}", "label": f"{i % 2}"}) + "\n" for i in range(16)))
    out = tmp_path / "out"
    usual = ["--model", str(tiny_encoder), "--data", str(data), "--output-dir", str(out), "--max-steps", "2"]
    assert main(["train", *usual, "--quantize", "nf4", "--holdout", "0", "--dtype", "float32"]) == 0
    model = load_classifier(str(tiny_encoder), labels=("0", "1"), dtype="float32", quantize="nf4").model
    assert type(model.classifier) is nn.Linear
    assert type(model.bert.encoder.layer[0].output.dense).__name__ == "Linear4bit"


def test_a_base_that_is_quantised_in_its_files(tiny_lm: Path, tmp_path: Path) -> None:
    folder = tmp_path / "packed"
    loaded = load_causal_lm(str(tiny_lm), dtype="float32", quantize="nf4")
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    again = load_causal_lm(str(folder), dtype="float32")
    assert kinds(again.model) == {"Linear4bit", "Linear"}
    ids = torch.arange(8)[None]
    torch.testing.assert_close(again.model(ids).logits, loaded.model(ids).logits)
    assert main(flags(folder, tmp_path, "--max-steps", "1")) == 0
    with pytest.raises(lorakit.LoraError, match=r"--quantize nf4: .* is quantised already \(bitsandbytes\)"):
        load_causal_lm(str(folder), quantize="nf4")


def test_what_cannot_be_quantised_is_said_before_anything_is_loaded(
    tiny_lm: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(flags(tiny_lm, tmp_path, "--quantize", "gguf")) == 1
    assert (
        "--quantize gguf: " in (said := capfd.readouterr().err) and "is not a .gguf file. Take --quantize nf4" in said
    )
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find_spec(name))
    assert main(flags(tiny_lm, tmp_path, "--quantize", "nf4")) == 1
    assert "needs the package bitsandbytes: pip install 'lorakit[quantize]'" in capfd.readouterr().err


def test_a_gguf_file_without_kernels_for_its_blocks() -> None:
    """transformers dequantises such a file with a warning; the user asked for something else."""
    model: Any = models.llama()
    with pytest.raises(lorakit.LoraError, match="transformers could not keep this file's blocks here"):
        quantise_layers(model, "gguf")


def test_a_module_that_is_quantised_cannot_be_trained_whole(tiny_lm: Path) -> None:
    model = load_causal_lm(str(tiny_lm), dtype="float32", quantize="nf4").model
    with pytest.raises(lorakit.LoraError, match=r"also_train='down_proj' cannot be trained: .*stored as torch.uint8"):
        lorakit.attach(model, "q_proj", also_train="down_proj")
    assert not lorakit.adapted_layers(model)


def test_the_plan_counts_the_packed_weights(tiny_lm: Path, tmp_path: Path) -> None:
    with FakeTensorMode():
        sizes = {
            how: sum(p.nbytes for p in skeleton(str(tiny_lm), labels=None, dtype="float32", quantize=how).parameters())
            for how in ("none", "nf4", "int8")
        }
    linear = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 64)  # the weights of two layers; two of the four heads have k, v
    assert sizes["none"] - sizes["int8"] == 3 * linear
    assert sizes["none"] - sizes["nf4"] == 4 * linear - linear // 2 - 4 * linear // 64
    config = TrainConfig(str(tiny_lm), rows(tmp_path / "d.jsonl"), "unused", dtype="float32", quantize="nf4")
    prepared = prepare(config)
    assert prepared.plan.peak_bytes is not None
    block = start_block(prepared)
    assert re.search(r"q_proj +×2 +Linear4bit", block)
    assert prepared.weights == (sizes["nf4"], sizes["none"])
    assert re.search(r"layers in nf4, the rest in float32; \S+ .B of weights, \S+ .B with all in float32 on cpu", block)


def test_transformers_trainer_takes_the_model(tiny_lm: Path, tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    model: Any = load_causal_lm(str(tiny_lm), dtype="float32", quantize="nf4").model
    assert model.is_quantized
    settings: dict[str, Any] = dict(max_steps=2, save_strategy="no", report_to="none", dataloader_pin_memory=False)
    arguments = TrainingArguments(str(tmp_path), learning_rate=1e-2, **settings)
    with pytest.raises(ValueError, match="purely quantized models"):
        Trainer(model, arguments)
    lorakit.attach(model, rank=4)
    ids = [{"input_ids": list(range(8)), "labels": list(range(8))}] * 8
    Trainer(model, arguments, train_dataset=ids).train()
    assert all(layer.lora_B.detach().abs().max() > 0 for layer in lorakit.adapted_layers(model).values())
    lorakit.detach(model)
    assert model.is_quantized


def trained_adapter(base: Path, tmp_path: Path, *more: str) -> Path:
    """An adapter that was trained on the base, and whose data is still there."""
    out = tmp_path / "out"
    assert main([*flags(base, tmp_path, "--max-steps", "12", *more), "--holdout", "0.25"]) == 0
    return out


@pytest.mark.parametrize("onto", [None, "original", "dequantised"])
def test_merging_tells_how_far_each_base_is(
    onto: str | None, tiny_lm: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    adapter = trained_adapter(tiny_lm, tmp_path, "--quantize", "nf4")
    trained: Any = load_with_adapter(str(adapter), None, dtype="float32", quantize=None).model
    ids = torch.arange(40)[None]
    with torch.no_grad():
        wanted = trained(ids).logits
        original: Any = load_with_adapter(str(adapter), None, dtype="float32").model
        far = (original(ids).logits - wanted).abs().max()
    capfd.readouterr()
    words = [] if onto is None else ["--onto", onto]
    assert main(["merge", "--model", str(adapter), "--output-dir", str(tmp_path / "merged"), *words]) == 0
    printed = capfd.readouterr().out
    assert f"against base + adapter as trained, on rows of {tmp_path / 'd.jsonl'}:" in printed
    shown = re.findall(r"onto (\w+): largest logit difference (\S+) .*, (\d+)% of the greedy answers equal", printed)
    assert [name for name, *_ in shown] == (["original", "dequantised"] if onto is None else [onto])
    merged: Any = load_causal_lm(str(tmp_path / "merged"), dtype="float32").model
    assert kinds(merged) == {"Linear"} and not hasattr(merged.config, "quantization_config")
    with torch.no_grad():
        off = (merged(ids).logits - wanted).abs().max()
    # The dequantised weights are those that were trained beside; the original ones are not.
    assert off < 1e-4 * wanted.abs().max() if onto != "original" else off > 0.5 * far
    written = re.findall(r"onto (\w+):.*\(written\)", printed)
    assert written == [onto or "dequantised"]


def test_the_base_that_is_not_there_is_refused(tiny_lm: Path, tmp_path: Path) -> None:
    adapter = trained_adapter(tiny_lm, tmp_path)
    with pytest.raises(lorakit.LoraError, match="--onto dequantised: .* is not quantised"):
        merge_to_folder(str(adapter), None, str(tmp_path / "merged"), onto="dequantised")
    folder = tmp_path / "packed"
    loaded = load_causal_lm(str(tiny_lm), dtype="float32", quantize="nf4")
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    with pytest.raises(lorakit.LoraError, match="--onto original: .* is quantised in its files. Name the original"):
        merge_to_folder(str(folder), str(adapter), str(tmp_path / "merged"), onto="original")
    merged = merge_to_folder(str(folder), str(adapter), str(tmp_path / "merged"))
    assert list(merged.tried) == ["dequantised"] and merged.tried["dequantised"].relative < 1e-3
    assert not (tmp_path / "merged" / "config.json").read_text().count("quantization_config")


def test_rows_to_compare_on_may_be_named(tiny_lm: Path, tmp_path: Path) -> None:
    adapter = trained_adapter(tiny_lm, tmp_path, "--quantize", "int8")
    (tmp_path / "d.jsonl").rename(tmp_path / "moved.jsonl")
    merged = merge_to_folder(str(adapter), None, str(tmp_path / "one"), onto="dequantised")
    assert merged.rows == "random tokens" and merged.tried["dequantised"].same_answers is None
    data = str(tmp_path / "moved.jsonl")
    merged = merge_to_folder(str(adapter), None, str(tmp_path / "two"), onto="dequantised", data=data)
    assert merged.rows == data and merged.tried["dequantised"].same_answers == 1.0
    with pytest.raises(FileNotFoundError, match=r"gone\.jsonl"):
        merge_to_folder(str(adapter), None, str(tmp_path / "three"), data=str(tmp_path / "gone.jsonl"))
