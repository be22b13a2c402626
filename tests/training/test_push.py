"""`lorakit push`, with the hub's own client and a server that stands in for the hub."""

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
from huggingface_hub import ModelCard

import folders
from lorakit.cli.main import main


class HubThatTakes(BaseHTTPRequestHandler):
    """Makes repositories and keeps what is committed to them."""

    asked: ClassVar[list[tuple[str, str, Any]]] = []  # method, path, body
    files: ClassVar[dict[str, bytes]] = {}
    authorized = "Bearer hf_secret"
    status = 200

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        lines = [json.loads(line) for line in body.splitlines() if line.strip()]
        self.asked.append((self.command, self.path, lines))
        url = f"http://{self.headers['Host']}"
        if self.headers["Authorization"] != self.authorized:
            return self.answer(401, {"error": "Invalid credentials"})
        if self.path == "/api/repos/create":
            return self.answer(self.status, {"url": f"{url}/me/adapter", "name": "me/adapter"})
        if self.path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if self.path == "/api/models/me/adapter/preupload/main":
            found = [{"path": one["path"], "uploadMode": "regular", "shouldIgnore": False} for one in lines[0]["files"]]
            return self.answer(200, {"files": found})
        if self.path == "/api/models/me/adapter/commit/main":
            self.files.update(
                {
                    one["value"]["path"]: base64.b64decode(one["value"]["content"])
                    for one in lines
                    if one["key"] == "file"
                }
            )
            commit = "0123456789abcdef0123456789abcdef01234567"
            return self.answer(200, {"commitUrl": f"{url}/me/adapter/commit/{commit}", "commitOid": commit})
        self.answer(404, {"error": f"nothing at {self.path}"})

    def answer(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[HubThatTakes]]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), HubThatTakes)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_secret")
    monkeypatch.setattr(HubThatTakes, "asked", [])
    monkeypatch.setattr(HubThatTakes, "files", {})
    yield HubThatTakes
    server.shutdown()
    server.server_close()


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = folders.folder(tmp_path / "adapter", base_model_name_or_path="owner/base")
    (folder / "README.md").write_text('---\nbase_model: base\n---\n\nlorakit.load(model, "THIS_FOLDER")\n')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "style.json").write_text('{"chat": true, "system": null}')
    for name in ("config.yaml", "metrics.jsonl", "report.html", "results.json", "notes of mine.txt"):
        (folder / name).write_text(f"{tmp_path}/secret")
    (folder / "checkpoint-4").mkdir()
    return folder


def test_what_others_need_is_uploaded_and_the_rest_stays(
    hub: type[HubThatTakes], adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in adapter.iterdir() if path.is_file()}
    assert main(["push", str(adapter), "--to", "me/adapter", "--private"]) == 0
    assert hub.files.keys() == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "style.json", "tokenizer.json"
    }  # fmt: skip
    assert hub.files["adapter_model.safetensors"] == before[adapter / "adapter_model.safetensors"]
    assert not any(str(tmp_path).encode() in content for content in hub.files.values())
    assert b'snapshot_download("me/adapter")' in hub.files["README.md"]
    (made,) = (lines[0] for _, path, lines in hub.asked if path == "/api/repos/create")
    assert (made["name"], made["organization"]) == ("adapter", "me")
    assert made.get("private") is True or made.get("visibility") == "private"
    printed = capsys.readouterr().out.splitlines()
    assert (
        printed[0] == "uploaded: README.md, adapter_config.json, adapter_model.safetensors, style.json, tokenizer.json"
    )
    assert printed[1] == "kept here: config.yaml, metrics.jsonl, notes of mine.txt, report.html, results.json"
    assert printed[2].endswith("/me/adapter")
    assert {path: path.read_bytes() for path in adapter.iterdir() if path.is_file()} == before


@pytest.mark.parametrize("card", [True, False], ids=["with a card", "without"])
def test_a_base_that_only_this_machine_has_is_named_as_the_hub_names_it(
    card: bool, hub: type[HubThatTakes], adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here = tmp_path / "models" / "base"
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(here)}))
    if not card:
        (adapter / "README.md").unlink()
    assert main(["push", str(adapter), "--to", "me/adapter"]) == 1
    error = capsys.readouterr().err
    assert f"its base model is {here}, a path of this machine, which nobody else can load" in error
    assert f"lorakit push {adapter} --to me/adapter --base-model USER/MODEL" in error and hub.asked == []
    assert main(["push", str(adapter), "--to", "me/adapter", "--base-model", "owner/base"]) == 0
    assert json.loads(hub.files["adapter_config.json"]) == {**config, "base_model_name_or_path": "owner/base"}
    assert ModelCard(hub.files["README.md"].decode()).data.to_dict()["base_model"] == "owner/base"


def test_without_a_token_nothing_is_asked(
    hub: type[HubThatTakes], adapter: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert main(["push", str(adapter), "--to", "me/adapter"]) == 1
    error = capsys.readouterr().err
    assert "no token for the hub" in error and "hf auth login" in error and "HF_TOKEN" in error
    assert hub.asked == []


def test_what_the_hub_refuses_is_told_with_its_answer(
    hub: type[HubThatTakes], adapter: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(hub, "status", 403)
    assert main(["push", str(adapter), "--to", "me/adapter"]) == 1
    assert "error: me/adapter: the hub answers: " in (told := capsys.readouterr().err) and "403" in told
    monkeypatch.setattr(hub, "authorized", "Bearer another")
    assert main(["push", str(adapter), "--to", "me/adapter"]) == 1
    assert "401" in capsys.readouterr().err and hub.files == {}


def test_a_hub_that_is_not_reached_is_told(
    adapter: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_secret")
    assert main(["push", str(adapter), "--to", "me/adapter"]) == 1
    assert "error: me/adapter: the hub is not reached (" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--to", "a/b/c"], "--to: expected a name at the hub such as user/name, found 'a/b/c'."),
        (
            ["--to", "me/adapter", "--base-model", "/srv/x"],
            "--base-model: expected a name at the hub such as user/name",
        ),
    ],
)
def test_names_that_are_none_are_refused(
    words: list[str], message: str, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["push", str(adapter), *words]) == 1
    assert message in capsys.readouterr().err


def test_a_folder_without_an_adapter_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["push", str(tmp_path), "--to", "me/adapter"]) == 1
    assert "is no adapter folder" in capsys.readouterr().err
