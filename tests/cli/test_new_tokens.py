"""`--new-tokens`: added to the tokenizer, rows for them trained, and every verb on the folder that comes of it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import lorakit
from conftest import tiny_tokenizer
from lorakit.cli.main import main
from lorakit.training.vocabulary import add_tokens

pytestmark = pytest.mark.usefixtures("few_objects")
WORDS = ["--dtype", "float32", "--lr", "0.02", "--epochs", "12", "--holdout", "0.2", "--eval-samples", "2"]
ROWS = ".token_adapter.trainable_tokens_delta"


def rows(path: Path) -> Path:
    lines = [{"prompt": f"turn {i % 6}", "completion": "<tool>on<end>" if i % 2 else "off"} for i in range(24)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "not tied"])
def base(request: Any, tiny_lm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param:
        return tiny_lm
    folder = tmp_path_factory.mktemp("not-tied")
    shutil.copytree(tiny_lm, folder, dirs_exist_ok=True)
    torch.manual_seed(0)
    config = AutoModelForCausalLM.from_pretrained(tiny_lm).config
    config.tie_word_embeddings = False
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("new-tokens")
    words = ["--model", str(base), "--data", str(rows(folder / "data.jsonl")), "-o", str(folder / "out")]
    assert main(["train", *words, *WORDS, "--save-steps", "10", "--new-tokens", "<tool>,<end>,<none>"]) == 0
    return folder / "out"


def test_problem_31_the_folder_has_the_tokens_and_their_rows(
    trained: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    size = AutoModelForCausalLM.from_pretrained(base).config.vocab_size
    tied = AutoModelForCausalLM.from_pretrained(base).config.tie_word_embeddings
    tokenizer = AutoTokenizer.from_pretrained(trained)
    numbers = [size, size + 1, size + 2]
    assert tokenizer.convert_tokens_to_ids(["<tool>", "<end>", "<none>"]) == numbers
    assert tokenizer("on<end>").input_ids == [*tokenizer("on").input_ids, size + 1]
    tables = ["model.embed_tokens", *([] if tied else ["lm_head"])]
    config = json.loads((trained / "adapter_config.json").read_text())
    assert config["trainable_token_indices"] == {table: numbers for table in tables}
    stored = load_file(trained / "adapter_model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in stored.items() if "lora_" not in name} == {
        f"base_model.model.{table}{ROWS}": (3, 32) for table in tables
    }
    assert len(AutoModelForCausalLM.from_pretrained(base).get_input_embeddings().weight) == size  # as it was
    # Of the loaded model: the rows begin as the mean of the table, which no seed changes.
    command = ["train", "--model", str(base), "--data", str(trained.parent / "data.jsonl"), "-o", str(tmp_path / "o")]
    assert main([*command, *WORDS, "--new-tokens", "<tool>,<end>,<none>", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert f"tokens whose rows are trained: <tool> {size}, <end> {size + 1}, <none> {size + 2}" in printed
    assert "warning: no row holds <none>" in printed
    assert f"rows trained: model.embed_tokens  3 of {size + 3}  × 32" in printed
    count = sum(tensor.numel() for tensor in stored.values())
    assert f"trainable params: {count:,} ||" in printed


def test_each_verb_loads_the_folder(
    trained: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It answers with the new tokens; scores and the merged model are those of base and rows, put together by hand."""
    data = tmp_path / "text.jsonl"
    shown = "<|im_start|>user\nturn 1<|im_end|>\n<|im_start|>assistant\n<tool>on<end><|im_end|>"
    data.write_text(json.dumps({"text": shown}) + "\n")
    assert main(["generate", "--model", str(trained), "--prompt", "turn 3", "--dtype", "float32"]) == 0
    assert "<tool>" in capsys.readouterr().out
    score = ["eval", "--data", str(data), "--json", str(tmp_path / "s.json"), "--dtype", "float32", "--adapter"]
    assert main([*score, f"a={trained}", "--adapter", f"b={trained}", "--model", str(base)]) == 0
    assert main([*score, str(trained), "--model", str(base)]) == 0
    perplexity = json.loads((tmp_path / "s.json").read_text())["metrics"]["perplexity"]
    capsys.readouterr()
    assert main(["info", str(trained)]) == 0
    assert "their rows of model.embed_tokens are trained" in capsys.readouterr().out
    assert main(["merge", "--model", str(trained), "-o", str(tmp_path / "m"), "--dtype", "float32"]) == 0
    ids = torch.tensor([AutoTokenizer.from_pretrained(tmp_path / "m")(shown).input_ids])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert perplexity[1] == pytest.approx(float(merged(ids, labels=ids).loss.detach().exp()), rel=1e-3)
    assert abs(perplexity[1] - perplexity[0]) > 10
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(merged.config.vocab_size, mean_resizing=False)
    lorakit.load(model, trained)
    torch.testing.assert_close(merged(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4)
    capsys.readouterr()
    assert main(["merge", "--model", str(trained), "-o", str(tmp_path / "n"), "--shard-by-shard"]) == 1
    assert "tokens were added. Merge in memory" in capsys.readouterr().err


def test_a_resumed_run_has_the_same_rows(trained: Path, base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(trained, out)
    before = (out / "adapter_model.safetensors").read_bytes()
    (out / "adapter_model.safetensors").unlink()
    last = max(out.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    shutil.rmtree(last)  # as an interruption before the last step leaves it
    words = ["--model", str(base), "--data", str(trained.parent / "data.jsonl"), "-o", str(out), "--save-steps", "10"]
    assert main(["train", *words, *WORDS, "--new-tokens", "<tool>,<end>,<none>", "--resume", "auto"]) == 0
    assert (out / "adapter_model.safetensors").read_bytes() == before


def test_a_run_goes_on_with_the_rows_of_an_adapter(
    trained: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", str(base), "--data", str(trained.parent / "data.jsonl"), "--from", str(trained), *WORDS]
    assert main(["train", *words, "-o", str(tmp_path / "a"), "--max-steps", "1", "--lr", "1e-9"]) == 0
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (trained, tmp_path / "a"))
    torch.testing.assert_close(second, first)
    capsys.readouterr()
    assert main(["train", *words, "-o", str(tmp_path / "b"), "--new-tokens", "<other>"]) == 1
    assert "--new-tokens <other>: the adapter has <tool>, <end>, <none>" in capsys.readouterr().err


def test_words_that_are_no_tokens_are_refused(
    tiny_lm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", str(tiny_lm), "--data", str(rows(tmp_path / "d.jsonl")), "-o", str(tmp_path / "o")]
    assert main(["train", *words, "--new-tokens", "<a>,<b>,<a>"]) == 1
    assert "--new-tokens: '<a>' is no token of its own" in capsys.readouterr().err
    with pytest.raises(lorakit.LoraError, match="' ' is no token of its own"):
        add_tokens(tiny_tokenizer(), [" "])
    assert main(["train", *words, "--new-tokens", "<a>", "--also-train", "embed_tokens"]) == 1
    assert "trainable_tokens trains rows of 'model.embed_tokens', and also_train all" in capsys.readouterr().err


def test_a_token_that_is_there_already_keeps_its_number_and_the_table_its_size(
    tiny_lm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", str(tiny_lm), "--data", str(rows(tmp_path / "d.jsonl")), "-o", str(tmp_path / "o"), "--dry-run"]
    assert main(["train", *words, "--new-tokens", "<|im_start|>,Ġlight"]) == 0
    number, size = (tiny_tokenizer().convert_tokens_to_ids("Ġlight"), len(tiny_tokenizer()))
    printed = capsys.readouterr().out
    assert f"tokens whose rows are trained: <|im_start|> 2, Ġlight {number}" in printed
    assert f"rows trained: model.embed_tokens  2 of {size}  × 32" in printed
