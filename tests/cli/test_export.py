"""`lorakit export`: a folder for a server, with the tokenizer, and never in the place of anything else."""

import json
from pathlib import Path

import pytest

import lorakit
from adapters import language_adapter
from lorakit.cli.main import main


@pytest.fixture(scope="module")
def adapter(tiny_lm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from lorakit.training.models import load_causal_lm

    folder = language_adapter(tiny_lm, tmp_path_factory.mktemp("export") / "adapter")
    loaded = load_causal_lm(str(tiny_lm), dtype="float32")
    lorakit.attach(loaded.model, rank=4, rslora=True, rank_pattern={"*.q_proj": 20})
    lorakit.save(loaded.model, folder, force=True)
    return folder


@pytest.mark.parametrize(
    ("target", "command"),
    [
        ("vllm", "vllm serve {base} --enable-lora --max-lora-rank 32 --lora-modules adapter={out}"),
        ("sglang", "python -m sglang.launch_server --model-path {base} --enable-lora --lora-paths adapter={out}"),
        ("llama.cpp", "python convert_lora_to_gguf.py {out} --base {base} "),
    ],
)
def test_problem_46_an_export_is_one_folder_and_one_command(
    target: str, command: str, adapter: Path, tiny_lm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["export", str(adapter), "--target", target, "--output-dir", str(out)]) == 0
    printed = capsys.readouterr().out
    assert command.format(base=tiny_lm, out=out) in printed
    assert "one rank (20)" in printed and "14 of 14 modules had others" in printed
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["r"], config["use_rslora"], config["rank_pattern"], config["alpha_pattern"]) == (20, False, {}, {})
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (adapter / name).read_bytes()
    assert sorted(path.name for path in out.iterdir() if path.is_file()) == [
        *("adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "tokenizer.json"),
        "tokenizer_config.json",
    ]


def test_what_cannot_be_read_is_refused_and_nothing_is_written(
    adapter: Path, tiny_lm: Path, tmp_path: Path, capsys
) -> None:
    from lorakit.training.models import load_causal_lm

    model = load_causal_lm(str(tiny_lm), dtype="float32").model
    lorakit.attach(model, rank=2, dora=True)
    lorakit.save(model, tmp_path / "dora", force=True)
    out = tmp_path / "out"
    assert main(["export", str(tmp_path / "dora"), "--target", "vllm", "--output-dir", str(out)]) == 1
    said = capsys.readouterr().err
    assert "error: vLLM cannot read this adapter:\n  DoRA (" in said and "lorakit merge" in said
    assert not out.exists()
    assert main(["export", str(tiny_lm), "--target", "vllm", "--output-dir", str(out)]) == 1
    assert not out.exists()


def test_only_an_earlier_export_is_replaced(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    words = ["export", str(adapter), "--target", "sglang", "--output-dir"]
    assert main([*words, str(out)]) == 0
    assert main([*words, str(out)]) == 1
    assert "holds an export. Choose another, or add --overwrite" in capsys.readouterr().err
    assert main([*words, str(out), "--overwrite"]) == 0
    (out / "notes.txt").write_text("mine")
    assert main([*words, str(out), "--overwrite"]) == 1
    assert "notes.txt" in capsys.readouterr().err and (out / "notes.txt").read_text() == "mine"
    before = (adapter / "adapter_config.json").read_bytes()
    assert main([*words, str(adapter), "--overwrite"]) == 1
    assert (adapter / "adapter_config.json").read_bytes() == before
