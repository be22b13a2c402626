"""Folders that are neither a model nor an adapter: the message says what they are and what to do."""

import json
import shutil
from pathlib import Path

import pytest

from adapters import language_adapter
from lorakit.training.adapter_folder import base_and_adapter
from lorakit.training.models import load_with_adapter


@pytest.fixture
def run(tiny_lm: Path, tmp_path: Path) -> Path:
    """What an interrupted run leaves: settings, a tokenizer, and checkpoints, the newest of them half written."""
    out = tmp_path / "my run"
    whole = language_adapter(tiny_lm, out / "checkpoint-10")
    shutil.copytree(whole, out / "checkpoint-4")
    (out / "checkpoint-12").mkdir()
    shutil.copy(whole / "adapter_config.json", out / "checkpoint-12")
    shutil.copy(whole / "tokenizer_config.json", out)
    shutil.copy(whole / "tokenizer.json", out)
    (out / "config.yaml").write_text("plain: true\n")
    return out


def test_an_interrupted_run_is_told_with_its_newest_whole_checkpoint(run: Path, tiny_lm: Path) -> None:
    expected = (
        r"training run that was interrupted.*--config '.*/config\.yaml' --resume auto.*--model '.*/checkpoint-10'"
    )
    with pytest.raises(FileNotFoundError, match=expected):
        load_with_adapter(str(run), None)
    with pytest.raises(FileNotFoundError, match=expected):
        load_with_adapter(str(tiny_lm), str(run))
    assert base_and_adapter(str(run / "checkpoint-10"), None) == (str(tiny_lm), str(run / "checkpoint-10"))


def test_a_run_without_a_checkpoint_is_begun_again(run: Path) -> None:
    for path in run.glob("checkpoint-*"):
        shutil.rmtree(path)
    with pytest.raises(FileNotFoundError, match=r"ended before its first checkpoint.*config\.yaml' --overwrite"):
        load_with_adapter(str(run), None)


def test_a_checkpoint_speaks_with_the_tokenizer_of_its_run(run: Path, tiny_lm: Path) -> None:
    for path in run.glob("checkpoint-*/*oken*"):
        path.unlink()
    config = json.loads((run / "tokenizer_config.json").read_text())
    (run / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": "{{ 'mine' }}"}))
    loaded = load_with_adapter(str(run / "checkpoint-10"), None, dtype="float32")
    assert loaded.tokenizer.chat_template == "{{ 'mine' }}"


def test_model_and_adapter_that_do_not_go_together(run: Path, tiny_lm: Path, tmp_path: Path) -> None:
    one = str(run / "checkpoint-10")
    with pytest.raises(ValueError, match="is an adapter's folder itself. Give one adapter and its base"):
        base_and_adapter(one, str(run / "checkpoint-4"))
    with pytest.raises(FileNotFoundError, match="nowhere: no such file or folder"):
        base_and_adapter(str(tiny_lm), str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match=r"tiny-lm\d* is no adapter folder: it has no adapter_config\.json"):
        base_and_adapter(str(tiny_lm), str(tiny_lm))
    path = run / "checkpoint-10" / "adapter_config.json"
    config = json.loads(path.read_text())
    for base, message in (
        (None, "names no base model; give it"),
        ("/gone/away", "names the base model /gone/away: no model at .* Or give it: --model BASE"),
    ):
        path.write_text(json.dumps(config | {"base_model_name_or_path": base}))
        with pytest.raises(ValueError, match=message):
            base_and_adapter(one, None)
        assert base_and_adapter(str(tiny_lm), one) == (str(tiny_lm), one)


def test_a_model_without_a_head_does_not_answer(tiny_encoder: Path) -> None:
    with pytest.raises(ValueError, match="is no language model that can answer: its files hold no weights for"):
        load_with_adapter(str(tiny_encoder), None)
