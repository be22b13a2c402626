"""A mixture of experts on the command line: its experts are named when they are left out, and taken when asked for."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import lorakit
import models
from conftest import tiny_tokenizer
from lorakit.cli.main import main
from lorakit.core.attach import adapted_layers
from lorakit.study.methods.naming import method_of, name_of

LEFT_OUT = "Qwen3MoeExperts has a matrix for each expert; 'all-linear+experts' takes them  ×2"


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("moe")
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    settings = models.qwen_moe().config.to_dict() | dict(
        vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id
    )
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**settings)).save_pretrained(folder)
    return folder


def words(verb: str, moe: Path, tmp_path: Path, *more: str) -> list[str]:
    rows = [{"prompt": f"turn {i % 6}", "completion": "on" if i % 2 else "off"} for i in range(12)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ["--model", str(moe), "--data", str(tmp_path / "d.jsonl"), "--dtype", "float32", *more]
    return [verb, *data] if verb == "check" else [verb, *data, "--output-dir", str(tmp_path / "out")]


def test_all_linear_says_that_the_experts_are_left_out(moe: Path, tmp_path: Path, capsys) -> None:
    assert main(words("check", moe, tmp_path)) == 0
    printed = capsys.readouterr().out
    assert [line for line in printed.splitlines() if "experts" in line] == [
        f"passed over: model.layers.*.mlp.experts: {LEFT_OUT}"
    ]


def test_problem_29_experts_are_trained_and_written(moe: Path, tmp_path: Path, capsys) -> None:
    more = ("--targets", "all-linear+experts", "--max-steps", "3", "--eval-samples", "0", "--lr", "0.05", "--rank", "2")
    assert main(words("train", moe, tmp_path, *more)) == 0
    printed = capsys.readouterr().out
    assert "passed over" not in printed and "model.layers.*.mlp.experts.gate_up_proj" in printed
    model = AutoModelForCausalLM.from_pretrained(moe)
    adapter = lorakit.load(model, tmp_path / "out")
    stacks = {name for name, update in adapter.updates.items() if update.kind == "experts"}
    assert stacks == {f"model.layers.{i}.mlp.experts.{name}_proj" for i in range(2) for name in ("gate_up", "down")}
    assert all(adapter.updates[name].B.abs().max() > 0 for name in stacks)
    assert main(["info", str(tmp_path / "out")]) == 0
    assert "4 × experts rank 2" in capsys.readouterr().out
    lorakit.save(model, tmp_path / "single", experts="per-expert")
    assert main(["info", str(tmp_path / "single")]) == 0
    shown = {line.split()[0]: line.split(maxsplit=1)[1] for line in capsys.readouterr().out.splitlines()}
    assert shown["targets"].startswith("experts.*.down_proj ×4, experts.*.gate_proj ×4, experts.*.up_proj ×4, k_proj, ")
    assert shown["model.layers.*.mlp.experts.*.gate_proj"].split() == ["×8", "2", f"{8 * 2 * (32 + 24):,}"]


def test_a_comparison_takes_them_too() -> None:
    written = "lora rank=2 targets=all-linear+experts"
    method = method_of(written)
    assert name_of(method) == written
    model, same = models.qwen_moe(), models.qwen_moe()
    method.apply(model, head=())
    lorakit.attach(same, "all-linear+experts", rank=2)
    assert adapted_layers(model).keys() == adapted_layers(same).keys()
