"""Tools reach the chat template in checked rows, scored rows, one answer and a conversation."""

import io
import json
import sys
from pathlib import Path

import pytest

from lorakit.cli.main import main

TEMPLATE = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{{ m['content'] or '' }}{% for c in m.get('tool_calls') or [] %}<call>{{ c['function'] | tojson }}</call>"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOLS = [{"type": "function", "function": {"name": "set_light"}}]
CALL = {"type": "function", "function": {"name": "set_light", "arguments": {"on": True}}}
ROW = {
    "tools": TOOLS,
    "messages": [
        {"role": "user", "content": "on"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "done"},
        {"role": "assistant", "content": "light on"},
    ],
}


@pytest.fixture
def tool_model(tiny_lm: Path, tmp_path: Path) -> Path:
    """The tiny model with a template that prints tools."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in tiny_lm.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The prompts, as text, that the model is asked while a test runs."""
    from lorakit.training import evaluate, generation

    prompts: list[str] = []
    stream, answers = generation.stream, generation.answers

    def noting_stream(loaded, prompt, **options):
        prompts.append(loaded.tokenizer.decode(prompt))
        return stream(loaded, prompt, **options)

    def noting_answers(loaded, many, **options):
        prompts.extend(loaded.tokenizer.decode(prompt) for prompt in many)
        return answers(loaded, many, **options)

    monkeypatch.setattr(generation, "stream", noting_stream)
    monkeypatch.setattr(evaluate, "answers", noting_answers)
    return prompts


def test_tools_are_in_what_is_learnt_and_in_what_is_scored(
    tool_model: Path, tmp_path: Path, asked: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "d.jsonl"
    data.write_text(json.dumps(ROW) + "\n")
    assert main(["check", "--model", str(tool_model), "--data", str(data), "--max-seq-length", "400"]) == 0
    head = '<tools>[{"type": "function", "function": {"name": "set_light"}}]</tools><|im_start|>user\non<|im_end|>\n'
    before = f"{head}<|im_start|>assistant\n"
    call = '<call>{"name": "set_light", "arguments": {"on": true}}</call><|im_end|>'
    after = "\n<|im_start|>tool\ndone<|im_end|>\n<|im_start|>assistant\n"
    assert f"{before}⟦{call}⟧{after}⟦light on<|im_end|>⟧" in capsys.readouterr().out
    assert main(["eval", "--model", str(tool_model), "--data", str(data), "--max-new-tokens", "2"]) == 0
    assert asked == [f"{before}{call}{after}"]


def test_generate_and_chat_take_tools(
    tool_model: Path, tmp_path: Path, asked: list[str], capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    file = tmp_path / "tools.json"
    file.write_text(json.dumps(TOOLS))
    common = ["--model", str(tool_model), "--tools", str(file), "--max-new-tokens", "2"]
    assert main(["generate", *common, "--prompt", "on"]) == 0
    head = '<tools>[{"type": "function", "function": {"name": "set_light"}}]</tools><|im_start|>user\non<|im_end|>\n'
    assert asked == [f"{head}<|im_start|>assistant\n"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("on\n/tool done\n/help\n/quit\n"))
    assert main(["chat", *common]) == 0
    assert asked[1] == asked[0]
    assert asked[2].startswith(asked[0])
    assert asked[2].endswith("<|im_end|>\n<|im_start|>tool\ndone<|im_end|>\n<|im_start|>assistant\n")
    assert "/tool TEXT answers the assistant's call" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "more", "message"),
    [
        ("[1]", [], "expected a list of objects"),
        ("[", [], "tools is text that is not JSON"),
        (json.dumps(TOOLS), ["--plain"], "--tools: only a chat template prints tools"),
    ],
)
def test_tools_that_cannot_be_used(
    content: str, more: list[str], message: str, tool_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tools.json").write_text(content)
    words = ["generate", "--model", tool_model, "--tools", tmp_path / "tools.json", "--prompt", "on", *more]
    assert main([str(word) for word in words]) in (1, 2)
    assert message in capsys.readouterr().err


def test_a_template_without_tools_refuses_them(tiny_lm: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "tools.json").write_text(json.dumps(TOOLS))
    words = ["generate", "--model", tiny_lm, "--tools", tmp_path / "tools.json", "--prompt", "on"]
    assert main([str(word) for word in words]) == 1
    assert "the chat template does not print tools" in capsys.readouterr().err
