"""What a person is told: plans of classifiers, aliases in files, and paths in the model card."""

import json
from pathlib import Path
from typing import Any

import pytest

from conftest import tiny_tokenizer
from lorakit.cli.main import main
from lorakit.training.config import TrainConfig
from lorakit.training.loop import train
from lorakit.training.prepare import prepare


def decoder(folder: Path, kind: str) -> Path:
    """The folder of a tiny GPT-2 or Llama."""
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = tiny_tokenizer()
    sizes: dict[str, Any] = {
        "gpt2": dict(n_embd=32, n_layer=2, n_head=4, n_positions=64),
        "llama": dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4),
    }[kind]
    special = dict(pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None)
    config = AutoConfig.for_model(kind, vocab_size=len(tokenizer), **sizes, **special)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_classifiers_on_decoders_are_planned(kind: str, tmp_path: Path) -> None:
    rows = [{"text": f"turn {i} on", "label": "ab"[i % 2]} for i in range(12)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = TrainConfig(str(decoder(tmp_path / kind, kind)), str(tmp_path / "d.jsonl"), str(tmp_path / "out"))
    plan = prepare(config).plan
    assert plan.unplanned == "" and plan.peak_bytes is not None and plan.peak_bytes > 0


@pytest.mark.usefixtures("few_objects")
def test_the_card_of_a_mixture_names_its_files_and_no_folder_of_this_machine(tiny_lm: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        rows = [{"prompt": f"turn {name} {i}", "completion": "on"} for i in range(6)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = f"{tmp_path / 'a.jsonl'},{tmp_path / 'b.jsonl'}=0.5"
    usual: dict[str, Any] = dict(rank=2, max_steps=1, eval_samples=0, holdout=0.0, dtype="float32")
    train(TrainConfig(str(tiny_lm), data, str(tmp_path / "out"), **usual))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Data: `a.jsonl,b.jsonl=0.5`" in card and str(tmp_path) not in card


def test_a_file_knows_the_aliases_of_the_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "lora.yaml"
    file.write_text(
        "model_name_or_path: nowhere\ndataset-name: d.jsonl\nlora_r: 4\nlr: 1e-3\noutput_dir: out\nfrom: x\n"
    )
    assert main(["train", "--config", str(file)]) == 1
    assert "no adapter at x" in capsys.readouterr().err  # every key was understood
