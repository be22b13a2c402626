"""Training that goes on with an adapter: where it begins, what it keeps, and settings that contradict it."""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import lorakit
from lorakit.core.errors import LoraError
from lorakit.training import loop
from lorakit.training.config import TrainConfig
from lorakit.training.loop import train
from lorakit.training.prepare import prepare
from lorakit.training.settings import add_setting_flags, from_args

pytestmark = pytest.mark.usefixtures("few_objects")


@pytest.fixture(autouse=True)
def _unplanned(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_counted(*_: object) -> None:
        raise NotImplementedError("not counted")

    monkeypatch.setattr("lorakit.training.plan.step_storages", not_counted)


def rows(path: Path, answer: str) -> str:
    lines = [{"prompt": f"turn {i % 6}", "completion": f"{answer} {i % 3}"} for i in range(16)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


@pytest.fixture
def first(tiny_lm: Path, tmp_path: Path) -> TrainConfig:
    """A finished run: rank 3, alpha 12, two kinds of targets, dropout."""
    usual: dict[str, Any] = dict(batch_size=8, epochs=2.0, eval_samples=0, holdout=0.0, dtype="float32", rank=3)
    usual |= dict(alpha=12.0, targets=("q_proj", "v_proj"), dropout=0.1, rslora=True, learning_rate=5e-3)
    config = TrainConfig(str(tiny_lm), rows(tmp_path / "a.jsonl", "on"), str(tmp_path / "first"), **usual)
    train(config)
    return config


def following(first: TrainConfig, tmp_path: Path, **changes: Any) -> TrainConfig:
    usual: dict[str, Any] = dict(batch_size=8, epochs=2.0, eval_samples=0, holdout=0.0, dtype="float32")
    usual |= dict(learning_rate=5e-3, from_adapter=first.output_dir, output_dir=str(tmp_path / "second"))
    return TrainConfig(first.model, rows(tmp_path / "b.jsonl", "off"), **usual | changes)


def tensors(folder: str) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "adapter_model.safetensors")


def test_a_run_begins_with_the_factors_of_the_adapter(first: TrainConfig, tmp_path: Path, capsys, monkeypatch) -> None:
    begins: dict[str, torch.Tensor] = {}
    from lorakit.training.prepare import adapt

    def noted(config, model, new_tokens, **options) -> None:
        adapt(config, model, new_tokens, **options)
        begins.update({k: v.detach().clone() for k, v in model.named_parameters() if v.requires_grad})

    monkeypatch.setattr(loop, "adapt", noted)
    second = following(first, tmp_path)
    train(second)
    before, after = tensors(first.output_dir), tensors(second.output_dir)
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        name = (
            key.removeprefix("base_model.model.").replace("lora_A.weight", "lora_A").replace("lora_B.weight", "lora_B")
        )
        assert torch.equal(begins[name], tensor), key
        assert after[key].shape == tensor.shape and not torch.equal(after[key], tensor), key
    assert len(begins) == len(before)
    one, two = (json.loads((Path(own.output_dir) / "adapter_config.json").read_text()) for own in (first, second))
    assert one == two and two["r"] == 3 and two["lora_alpha"] == 12 and two["use_rslora"] is True
    settings = yaml.safe_load((Path(second.output_dir) / "config.yaml").read_text())
    assert (settings["rank"], settings["alpha"], settings["rslora"], settings["dropout"]) == (3, 12.0, True, 0.1)
    assert settings["targets"] == ["q_proj", "v_proj"] and settings["from_adapter"] == first.output_dir
    assert f"goes on with the adapter {first.output_dir}" in capsys.readouterr().out


def test_with_a_rate_of_almost_nothing_the_adapter_stays(first: TrainConfig, tmp_path: Path) -> None:
    second = following(first, tmp_path, learning_rate=1e-12)
    train(second)
    for key, tensor in tensors(first.output_dir).items():
        torch.testing.assert_close(tensors(second.output_dir)[key], tensor, rtol=0, atol=1e-9)


def test_its_own_config_repeats_the_run(first: TrainConfig, tmp_path: Path) -> None:
    second = following(first, tmp_path)
    train(second)
    parser = argparse.ArgumentParser()
    add_setting_flags(TrainConfig, parser)
    words = ["--config", f"{second.output_dir}/config.yaml", "--output-dir", str(tmp_path / "again")]
    again = from_args(TrainConfig, parser.parse_args(words))
    train(again)
    assert all(torch.equal(tensors(again.output_dir)[k], v) for k, v in tensors(second.output_dir).items())


def given(config: TrainConfig, *words: str) -> TrainConfig:
    """The settings as flags give them."""
    parser = argparse.ArgumentParser()
    add_setting_flags(TrainConfig, parser)
    base = ["--model", config.model, "--data", config.data, "--output-dir", config.output_dir, "--dtype", "float32"]
    return from_args(TrainConfig, parser.parse_args([*base, "--from", str(config.from_adapter), *words]))


@pytest.mark.parametrize(
    ("words", "lines"),
    [
        (["--rank", "16"], ["--rank 16: the adapter has 3"]),  # the default, but given
        (["--rank", "4", "--alpha", "8"], ["--rank 4: the adapter has 3", "--alpha 8: the adapter has 12"]),
        (["--no-rslora"], ["--rslora False: the adapter has True"]),
        (["--dora"], ["--dora True: the adapter has False"]),
        (["--bias", "all"], ["--bias all: the adapter has none"]),
        (["--init", "pissa"], ["--init pissa: the factors begin as those of the adapter"]),
        (
            ["--targets", "q_proj,k_proj"],
            [
                "--targets: not in the adapter: model.layers.0.self_attn.k_proj, model.layers.1.self_attn.k_proj",
                "--targets: left out, and in the adapter: model.layers.0.self_attn.v_proj",
            ],
        ),
        (["--targets", "all-linear"], ["--targets: not in the adapter: model.layers.0.mlp.down_proj"]),
        (["--exclude", "layers.0"], ["--targets: "]),
        (["--also-train", "lm_head"], ["--also-train: not in the adapter: lm_head"]),
    ],
)
def test_settings_that_contradict_the_adapter_are_refused(
    words: list[str], lines: list[str], first: TrainConfig, tmp_path: Path
) -> None:
    config = given(following(first, tmp_path), *words)
    with pytest.raises(LoraError, match="goes on with an adapter of other settings:") as error:
        prepare(config)
    assert all(line in str(error.value) for line in lines)
    assert not Path(config.output_dir).exists()


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--rank", "3", "--alpha", "12", "--rslora", "--targets", "v_proj,q_proj"],
        ["--targets", "self_attn.q_proj,*.v_proj", "--no-dora", "--bias", "none"],
        ["--dropout", "0.5"],
    ],
)
def test_settings_that_say_the_same_are_taken(words: list[str], first: TrainConfig, tmp_path: Path) -> None:
    prepared = prepare(given(following(first, tmp_path), *words))
    assert prepared.config.rank == 3 and prepared.config.dropout == (0.5 if "--dropout" in words else 0.1)
    assert {row.name.rpartition(".")[2] for row in prepared.attached.rows} == {"q_proj", "v_proj"}
    assert {row.rank for row in prepared.attached.rows} == {3}


def test_python_gives_settings_by_values_that_are_not_the_default(first: TrainConfig, tmp_path: Path) -> None:
    with pytest.raises(LoraError, match="--rank 4: the adapter has 3"):
        prepare(following(first, tmp_path, rank=4))


def test_ranks_and_targets_of_their_own_are_kept(first: TrainConfig, tmp_path: Path) -> None:
    from lorakit.training.models import load_causal_lm

    model: Any = load_causal_lm(first.model, dtype="float32").model
    lorakit.attach(
        model,
        ["layers.0.self_attn.q_proj", "down_proj"],
        rank=2,
        rank_pattern={"q_proj": 5},
        dora=True,
        bias="lora_only",
    )
    lorakit.save(model, tmp_path / "mixed")
    second = following(first, tmp_path, from_adapter=str(tmp_path / "mixed"))
    prepared = prepare(second)
    assert {row.name: row.rank for row in prepared.attached.rows} == {
        "model.layers.0.self_attn.q_proj": 5,
        "model.layers.0.mlp.down_proj": 2,
        "model.layers.1.mlp.down_proj": 2,
    }
    train(second)
    before, after = tensors(str(tmp_path / "mixed")), tensors(second.output_dir)
    assert {key: value.shape for key, value in before.items()} == {key: value.shape for key, value in after.items()}


def test_an_interrupted_run_resumes(first: TrainConfig, tmp_path: Path) -> None:
    """A resumed run ends where the straight one does."""
    straight = following(first, tmp_path, save_steps=1, output_dir=str(tmp_path / "straight"))
    train(straight)
    short = dataclasses.replace(straight, max_steps=2, output_dir=str(tmp_path / "resumed"), scheduler="constant")
    whole = dataclasses.replace(straight, output_dir=str(tmp_path / "whole"), scheduler="constant")
    train(short), train(whole)
    train(dataclasses.replace(short, max_steps=None, resume=f"{short.output_dir}/checkpoint-2"))
    assert all(torch.equal(tensors(short.output_dir)[k], v) for k, v in tensors(whole.output_dir).items())


def test_a_classifier_goes_on_with_its_head_and_its_classes(tiny_encoder: Path, tmp_path: Path) -> None:
    def data(name: str, labels: str) -> str:
        lines = [{"text": f"turn {i}", "label": labels[i % len(labels)]} for i in range(12)]
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
        return str(tmp_path / name)

    usual: dict[str, Any] = dict(batch_size=4, epochs=1.0, eval_samples=0, holdout=0.0, rank=2, targets=("query",))
    one = TrainConfig(str(tiny_encoder), data("a.jsonl", "abc"), str(tmp_path / "one"), **usual)
    train(one)
    usual |= dict(rank=16, targets=("all-linear",), learning_rate=1e-12)
    two = TrainConfig(
        str(tiny_encoder), data("b.jsonl", "ca"), str(tmp_path / "two"), from_adapter=one.output_dir, **usual
    )
    train(two)
    before, after = tensors(one.output_dir), tensors(two.output_dir)
    assert before.keys() == after.keys() and any("classifier" in key for key in before)
    for key, tensor in before.items():
        torch.testing.assert_close(after[key], tensor, rtol=0, atol=1e-9)
    assert (Path(two.output_dir) / "labels.json").read_text() == '["a", "b", "c"]\n'


@pytest.mark.parametrize(
    ("folder", "error", "message"),
    [("nowhere", FileNotFoundError, "no adapter at"), ("", FileNotFoundError, "is no adapter folder")],
)
def test_folders_that_are_no_adapter(
    folder: str, error: type, message: str, first: TrainConfig, tmp_path: Path
) -> None:
    path = str(tmp_path / folder) if folder else first.model
    with pytest.raises(error, match=message):
        prepare(following(first, tmp_path, from_adapter=path))


def test_an_adapter_of_another_model_is_refused_before_a_folder_is_made(first: TrainConfig, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    settings = AutoConfig.from_pretrained(first.model)
    settings.num_hidden_layers = 1
    AutoModelForCausalLM.from_config(settings).save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(first.model).save_pretrained(tmp_path / "other")
    second = dataclasses.replace(following(first, tmp_path), model=str(tmp_path / "other"))
    with pytest.raises(LoraError, match=r"layers\.1\.self_attn"):
        train(second)
    assert not Path(second.output_dir).exists()


def test_the_adapters_own_folder_is_no_output_folder(first: TrainConfig, tmp_path: Path) -> None:
    second = following(first, tmp_path, output_dir=first.output_dir, overwrite=True)
    with pytest.raises(FileExistsError, match="which this command reads"):
        train(second)
