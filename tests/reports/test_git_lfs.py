"""A repository cloned without git-lfs holds pointers: every reader names the file and says what to do."""

import json
from pathlib import Path

import pytest

from conftest import tiny_tokenizer
from lorakit.cli.main import main
from lorakit.training.data import read_data
from lorakit.training.models import load_causal_lm

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 123\n"


@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.csv", "d.tsv", "d.parquet", "d.txt"])
def test_data(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(POINTER)
    with pytest.raises(ValueError, match=rf"{name} is a git-lfs pointer .*git lfs pull"):
        read_data(str(path), holdout=0)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "pytorch_model.bin", "tokenizer.json", "model-00002.safetensors"]
)
def test_base_models(name: str, tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / name).write_text(POINTER)
    with pytest.raises(ValueError, match=rf"{name} is a git-lfs pointer .*git lfs pull"):
        load_causal_lm(str(tmp_path))


def test_a_gguf_file(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_text(POINTER)
    with pytest.raises(ValueError, match="model.gguf is a git-lfs pointer"):
        load_causal_lm(str(path))


def test_the_command_line_says_it_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "adapter_config.json").write_text(POINTER)
    assert main(["info", str(tmp_path)]) == 1
    assert "git-lfs pointer" in capsys.readouterr().err
