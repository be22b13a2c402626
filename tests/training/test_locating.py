"""Where a model is looked for: locally first, then on the hub; a missing one is an error at once."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from lorakit.training.locating import locate
from lorakit.training.models import load_causal_lm, load_tokenizer, load_with_adapter, skeleton


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with models of several kinds in it."""
    for name in ("smollm", "models/llama", "runs/demo"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "smollm" / "config.json").write_text("{}")
    (tmp_path / "models" / "llama" / "model.gguf").touch()
    (tmp_path / "runs" / "demo" / "adapter_config.json").write_text("{}")
    (tmp_path / "notes").mkdir()
    (tmp_path / "data.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    return tmp_path


class Hub:
    """Replaces the hub: what it has, and what it was asked."""

    def __init__(self, known: tuple[str, ...] = (), error: Exception | None = None) -> None:
        self.known, self.error = known, error
        self.asked: list[Any] = []
        self.limits: list[float] = []  # seconds

    def model_info(self, api: Any, name: str, timeout: float, **_: Any) -> None:
        import httpx2
        from huggingface_hub.errors import RepositoryNotFoundError

        self.asked.append(name)
        self.limits.append(timeout)
        if self.error is not None:
            raise self.error
        if name not in self.known:
            response = httpx2.Response(404, request=httpx2.Request("GET", "https://huggingface.co"))
            raise RepositoryNotFoundError("404 Client Error.\nmany lines", response=response)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    from huggingface_hub import HfApi

    made = Hub(known=("gpt2", "org/model", "smolm"))
    monkeypatch.setattr(HfApi, "model_info", lambda *args, **rest: made.model_info(*args, **rest))
    return made


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./smolm", "no model at smolm: no such file or folder. Did you mean 'smollm'?"),
        ("smolm", "no model at smolm. Did you mean 'smollm'? For the hub's model of that name: https://huggingface.co/smolm"),
        ("models/lama", "Did you mean 'llama'?"),
        ("modles/llama", "Did you mean 'models/llama'?"),
        ("runs/dmeo", "Did you mean 'demo'?"),
        ("run/demo", "Did you mean 'runs/demo'?"),
        ("a/b/c", "no model at a/b/c: no such file or folder"),
        ("models\\llama", "no such file or folder"),
        ("no model", "no such file or folder"),
        ("smollm/model.gguf", "no such file or folder"),
        ("weights.safetensors", "no such file or folder"),
        ("~/surely/not/here", "no such file or folder"),
        ("~nobody-of-this-name/x", "no such file or folder"),
        ("models", "models is no model folder: it has no config.json and no .gguf file. Did you mean 'models/llama'?"),
        ("data.jsonl", "data.jsonl is a file; a model is a folder, a .gguf file or a hub id."),
    ],
)  # fmt: skip
def test_a_mistyped_path_never_asks_the_hub(name: str, message: str, here: Path, hub: Hub) -> None:
    with pytest.raises(FileNotFoundError) as error:
        locate(name)
    assert message in str(error.value)
    assert hub.asked == []


@pytest.mark.parametrize("name", ["gpt2", "org/model"])
def test_ids_of_the_hub_are_its_own(name: str, here: Path, hub: Hub) -> None:
    assert locate(name) == (name, {})
    assert hub.asked == [name]


def test_an_address_is_the_hubs_whatever_lies_here(here: Path, hub: Hub) -> None:
    assert locate("https://huggingface.co/smolm") == ("smolm", {})
    assert locate("https://huggingface.co/org/model/tree/main") == ("org/model", {})


def test_folders_and_files_here_are_never_asked_for(here: Path, hub: Hub) -> None:
    assert locate("smollm") == ("smollm", {})
    assert locate("models/llama") == ("models/llama", {"gguf_file": "model.gguf"})
    assert locate("models/llama/model.gguf") == ("models/llama", {"gguf_file": "model.gguf"})
    assert hub.asked == []


def test_what_the_hub_lacks_is_said_at_once(here: Path, hub: Hub) -> None:
    with pytest.raises(FileNotFoundError, match="^no folder 'notez' here, and the hub has no such model. Did you mean 'notes'"):  # fmt: skip  # noqa: E501
        locate("notez")
    hub.error = ConnectionError("[Errno -3] Temporary failure in name resolution\nmore")
    with pytest.raises(FileNotFoundError, match=r"^no folder 'gpt2' here, and the hub is not reached \(\[Errno -3\]"):
        locate("gpt2")


def test_without_a_network_the_error_comes_soon(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's client may ask again, and waits longer each time; the sum of these waits is short."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # where nothing answers
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    with pytest.raises(FileNotFoundError, match="^no folder 'org/nothing' here, and the hub is not reached"):
        locate("org/nothing")
    assert sum(waits) < 5


def test_the_hub_is_given_a_time_limit(here: Path, hub: Hub) -> None:
    locate("gpt2")
    assert len(hub.limits) == 1 and 0 < hub.limits[0] <= 10


def copied(tiny_lm: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_lm, tmp_path / "model"))


BROKEN = {
    "empty": b"",
    "cut": b'{"a": [1, 2',
    "text": b"not found",
    "page": b"<!DOCTYPE html>",
    "binary": bytes(range(256)),
    "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 123\n",
    "latin-1": b'{"a": "\xe4"}',
    "list": b"[]",
    "null": b"null",
}


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize(
    "file", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "model.safetensors"]
)
def test_a_broken_file_of_the_base_is_named(file: str, kind: str, tiny_lm: Path, tmp_path: Path) -> None:
    folder = copied(tiny_lm, tmp_path)
    (folder / file).write_bytes(BROKEN[kind])
    try:
        load_causal_lm(str(folder))
    except ValueError as error:
        assert file in str(error) and "\n" not in str(error)
        assert kind != "pointer" or "git-lfs" in str(error)
    else:
        assert file == "generation_config.json"  # transformers ignores it, as if it were not there


@pytest.mark.parametrize(
    "wrong",
    [{"model_type": "no-such-model"}, {"hidden_size": "many"}, {"num_attention_heads": 0}, {"hidden_size": None}],
)
def test_a_configuration_that_makes_no_model_names_the_folder(wrong: dict, tiny_lm: Path, tmp_path: Path) -> None:
    folder = copied(tiny_lm, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **wrong}))
    for load in (lambda: load_causal_lm(str(folder)), lambda: skeleton(str(folder), labels=None, dtype="float32")):
        with pytest.raises(ValueError, match="model cannot be loaded: ") as error:
            load()
        assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_a_broken_adapter_is_found_before_the_base_is_loaded(tiny_lm: Path, tmp_path: Path) -> None:
    import lorakit
    import models

    base = copied(tiny_lm, tmp_path)
    (base / "model.safetensors").write_text("found only where the weights are read")
    model = models.llama()
    lorakit.attach(model, "q_proj", rank=2)
    for file, content, message in [
        ("adapter_config.json", "{", r"adapter_config\.json:1: not JSON"),
        ("adapter_model.safetensors", "nothing", r"adapter_model\.safetensors"),
        ("labels.json", "{}", r"labels\.json: expected a list"),
        ("labels.json", "[1, 2]", r"labels\.json: expected a list of different names"),
        ("tokenizer_config.json", "[", r"tokenizer_config\.json:1: not JSON"),
    ]:
        adapter = tmp_path / file / str(len(content))
        lorakit.save(model, adapter)
        if file == "labels.json":
            config = json.loads((adapter / "adapter_config.json").read_text())
            (adapter / "adapter_config.json").write_text(json.dumps({**config, "task_type": "SEQ_CLS"}))
        (adapter / file).write_text(content)
        with pytest.raises(ValueError, match=message):
            load_with_adapter(str(base), str(adapter))
    assert load_tokenizer(str(tiny_lm)).pad_token_id is not None
