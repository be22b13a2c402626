"""The verbs that use an adapter, as a person runs them: each suits the adapter, or names the verb that does."""

import io
import json
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters import classifier_adapter, labelled_rows, language_adapter, write_rows
from lorakit.cli.main import main


@pytest.fixture(scope="module")
def classifier(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("using") / "my classifier"
    return classifier_adapter(tiny_encoder, folder, ("no", "yes", "perhaps"), always=1)


@pytest.fixture(scope="module")
def language(tiny_lm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return language_adapter(tiny_lm, tmp_path_factory.mktemp("using") / "language", scale=0.5, chat=True, system=None)


def said(capsys: pytest.CaptureFixture[str], *words: object, code: int = 0) -> str:
    """What a command prints; if it fails, what it prints to standard error."""
    capsys.readouterr()
    found = main([str(word) for word in words])
    printed = capsys.readouterr()
    assert found == code, printed.err
    assert "Traceback" not in printed.err and "(--debug" not in printed.err
    return printed.err if code else printed.out


def test_generate_gives_the_classes_of_a_text_with_their_probabilities(
    classifier: Path, tiny_encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from lorakit.training.models import load_with_adapter

    merged = tmp_path / "merged"
    said(capsys, "merge", "--model", classifier, "-o", merged)
    loaded = load_with_adapter(str(classifier), None, dtype="float32")
    for more in ([], ["--pair", "and off"]):
        with torch.no_grad():
            inputs = loaded.tokenizer("turn the light on", *more[1:], return_tensors="pt")
            p = loaded.model(**inputs).logits[0].softmax(-1)
        for model in (classifier, merged):
            words = ["generate", "--model", model, "--dtype", "float32", "--prompt", "turn the light on", *more]
            lines = [line.split() for line in said(capsys, *words).splitlines()]
            assert lines[0][0] == "yes"
            found = {label: float(share.rstrip("%")) for label, share in lines}
            expected = dict(zip(("no", "yes", "perhaps"), (100 * p).tolist(), strict=True))
            assert found == pytest.approx(expected, abs=0.06)
    assert "classifier (no, yes, perhaps) and needs a text" in said(
        capsys, "generate", "--model", classifier, "--prompt", " ", code=1
    )
    assert "has no trained head" in said(capsys, "generate", "--model", classifier, "-p", "on", "--base", code=1)


def test_generate_gives_the_number_that_is_predicted(
    tiny_encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = classifier_adapter(tiny_encoder, tmp_path / "adapter", (), value=2.5)
    found = float(said(capsys, "generate", "--model", adapter, "--prompt", "turn", "--dtype", "float32"))
    assert found == pytest.approx(2.5, abs=0.2)  # the head's weights are small


def test_a_classifier_does_not_chat_and_names_the_command_that_asks_it(
    classifier: Path, tiny_encoder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorakit.training.several.load_base", lambda *_, **__: pytest.fail("loaded"))
    for words in (["--model", classifier], ["--model", tiny_encoder, "--adapter", classifier]):
        message = said(capsys, "chat", *words, code=1)
        command = shlex.split(message.partition("lorakit generate ")[2])
        assert command == [*map(str, words), "--prompt", "TEXT"]


def test_eval_reads_a_merged_classifier(classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said(capsys, "merge", "--model", classifier, "-o", tmp_path / "merged")
    data = labelled_rows(tmp_path / "d.jsonl", ["yes", "no", "yes", "yes"])
    for model in (classifier, tmp_path / "merged"):
        said(capsys, "eval", "--model", model, "--data", data, "--json", tmp_path / "s.json", "--dtype", "float32")
        assert json.loads((tmp_path / "s.json").read_text())["metrics"]["accuracy"][1] == 0.75


@pytest.mark.parametrize(
    ("model", "rows", "message"),
    [
        ("language", [{"text": "a", "label": "x"}], r"d\.jsonl:1: a row with a label, but the model is no classifier"),
        ("classifier", [{"prompt": "a", "completion": "b"}], r"holds prompt\+completion rows, and .* is a classifier"),
        ("classifier", [{"text": "a"}], r"holds text rows, and .* is a classifier \(no, yes, perhaps\)"),
        ("classifier", [{"text": "a", "label": "never"}], r"d\.jsonl:1: 'never' is no class .*no, yes, perhaps"),
        ("classifier", None, r"d\.jsonl: no such file"),
    ],
)
def test_eval_checks_the_rows_before_a_model_is_loaded(
    model: str, rows: list[dict[str, str]] | None, message: str, tmp_path: Path, request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("lorakit.training.several.load_base", lambda *_, **__: pytest.fail("loaded"))
    data = tmp_path / "d.jsonl"
    if rows is not None:
        write_rows(data, rows)
    found = said(capsys, "eval", "--model", request.getfixturevalue(model), "--data", data, code=1)
    assert re.search(message, found)


@pytest.mark.parametrize(
    "words",
    [
        ["--temperature", "-1"], ["--temperature", "nan"], ["--temperature", "inf"], ["--temperature", "warm"],
        ["--top-p", "0"], ["--top-p", "2"], ["--top-p", "nan"], ["--top-p", "-0.5"], ["--max-new-tokens", "0"],
        ["--max-new-tokens", "1.5"], ["--seed", "-1"], ["--seed", "x"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_a_wrong_number_is_refused_before_anything_is_read(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for verb in (["generate", "--prompt", "a"], ["chat"]):
        message = said(capsys, *verb, "--model", "nowhere/at/all", *words, code=2)
        assert message.startswith(f"lorakit {verb[0]}: {words[0]}: expected") and message.count("\n") == 1


def test_a_seed_gives_the_same_answer_again(language: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", "--model", language, "--prompt", "turn", "--temperature", "3", "--max-new-tokens", "12"]
    first, again, other = (said(capsys, *words, "--dtype", "float32", "--seed", seed) for seed in (1, 1, 2))
    assert first == again != other


def chat(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], lines: list[str], *words: object) -> str:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    return said(capsys, "chat", *words, "--dtype", "float32")


def test_a_conversation_that_outgrows_the_positions_forgets_its_beginning_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    from conftest import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    lines = ["turn the light on"] * 4
    printed = chat(monkeypatch, capsys, lines, "--model", tmp_path, "--max-new-tokens", "12")
    assert "oldest messages are forgotten)" in printed
    printed = chat(monkeypatch, capsys, ["turn " * 80, "on"], "--model", tmp_path, "--max-new-tokens", "2")
    assert re.search(r"\(the prompt has \d+ tokens, and this model has positions for 64: shorten it\.\)", printed)
    assert printed.count("\n> ") == 3  # the conversation goes on
    printed = chat(monkeypatch, capsys, lines * 3, "--model", tmp_path, "--max-new-tokens", "2", "--plain")
    assert "forgotten" not in printed  # each line is continued on its own
    message = said(capsys, "generate", "--model", tmp_path, "--prompt", "turn " * 80, code=1)
    assert "this model has positions for 64" in message


def test_what_was_learnt_as_plain_text_is_asked_as_plain_text(
    tiny_lm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_rows(tmp_path / "d.jsonl", [{"text": f"turn the light on {i}"} for i in range(9)])
    out, merged = tmp_path / "out", tmp_path / "merged"
    said(capsys, "train", "--model", tiny_lm, "--data", data, "-o", out, "--dtype", "float32", "--max-steps", "1")
    assert json.loads((out / "style.json").read_text()) == {"chat": False, "system": None}
    said(capsys, "merge", "--model", out, "-o", merged)
    asked: list[list[int]] = []

    def stream(loaded: object, prompt: list[int], **_: object) -> list[str]:
        asked.append(prompt)
        return ["on"]

    monkeypatch.setattr("lorakit.training.generation.stream", stream)
    plain, templated = [], []
    for model in (out, merged):
        said(capsys, "generate", "--model", model, "--prompt", "turn", "--dtype", "float32")
        chat(monkeypatch, capsys, ["turn"], "--model", model)
        plain += asked[-2:]
        said(capsys, "generate", "--model", model, "--prompt", "turn", "--no-plain", "--dtype", "float32")
        templated += asked[-1:]
    from conftest import tiny_tokenizer

    assert plain == [tiny_tokenizer()("turn")["input_ids"]] * 4
    text = "<|im_start|>user\nturn<|im_end|>\n<|im_start|>assistant\n"
    assert templated == [tiny_tokenizer()(text)["input_ids"]] * 2
    assert "perplexity" in said(capsys, "eval", "--model", out, "--data", data, "--dtype", "float32")


def next_commands(printed: str) -> list[list[str]]:
    """The commands under "next", as a shell reads them."""
    block = printed.partition("── next ")[2].partition("\n")[2]
    commands: list[list[str]] = []
    for line in io.StringIO(block):
        commands.append(shlex.split(line)) if line.startswith("  ") else None
    return commands


@pytest.mark.parametrize(
    "rows",
    [
        [{"text": f"the light's on {i}", "label": "ab"[i % 2]} for i in range(8)],
        [{"text": f"-on {i}", "text_pair": "it's off", "label": "ab"[i % 2]} for i in range(8)],
        [{"text": f"on {i}", "label": i / 3} for i in range(8)],
        [{"prompt": f'-say "it\'s $HOME" {i}', "completion": "on"} for i in range(8)],
        [{"text": f"turn the light on {i}"} for i in range(8)],
    ],
    ids=["classes", "pairs", "numbers", "answers", "text"],
)
def test_the_next_commands_that_train_prints_work(
    rows: list[dict[str, object]], tiny_lm: Path, tiny_encoder: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    out = tmp_path / "my run's"
    (tmp_path / "my run's-merged").mkdir()
    (tmp_path / "my run's-merged" / "note").write_text("in use")
    model = tiny_encoder if "label" in rows[0] else tiny_lm
    words: list[Any] = [
        "--data",
        write_rows(tmp_path / "d.jsonl", rows),
        "-o",
        out,
        "--max-steps",
        "1",
        "--eval-samples",
        "0",
    ]
    commands = next_commands(said(capsys, "train", "--model", model, *words, "--dtype", "float32"))
    assert [command[1] for command in commands] == (
        ["generate", "merge"] if "label" in rows[0] else ["generate", "chat", "merge"]
    )
    for command in commands:
        monkeypatch.setattr(sys, "stdin", io.StringIO("/quit\n"))
        more = ["--max-new-tokens", "3"] if command[1] == "generate" else []
        printed = said(capsys, *command[1:], *more)
    for command in next_commands(printed):
        monkeypatch.setattr(sys, "stdin", io.StringIO("/quit\n"))
        said(capsys, *command[1:])
    card = (out / "README.md").read_text()
    assert str(tmp_path) not in card and str(model.parent) not in card
    assert ("AutoModelForSequenceClassification" in card) == ("label" in rows[0])


def test_info_tells_what_an_adapter_is_for(
    classifier: Path, language: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "SEQ_CLS: a classifier (no, yes, perhaps)" in said(capsys, "info", classifier)
    assert "CAUSAL_LM: a language model" in said(capsys, "info", language)
    shutil.copytree(classifier, tmp_path / "bare")
    (tmp_path / "bare" / "labels.json").unlink()
    assert "SEQ_CLS: a classifier (0, 1, 2)" in said(capsys, "info", tmp_path / "bare")


@pytest.mark.parametrize("own", [("positive", "negative"), ("POSITIVE", "NEGATIVE")], ids=["same", "in capitals"])
def test_a_trained_head_keeps_the_order_of_its_classes(
    own: tuple[str, ...], tiny_encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from lorakit.training.models import load_classifier

    base = load_classifier(str(tiny_encoder), labels=own, dtype="float32")
    with torch.no_grad():
        base.model.classifier.bias.copy_(torch.tensor([5.0, 0.0]))  # "positive", whatever it reads
    base.model.save_pretrained(tmp_path / "base")
    base.tokenizer.save_pretrained(tmp_path / "base")
    data = labelled_rows(tmp_path / "d.jsonl", ["positive"] * 6 + ["negative"] * 2)
    words = ["-o", tmp_path / "out", "--max-steps", "1", "--lr", "1e-9", "--holdout", "0", "--dtype", "float32"]
    said(capsys, "train", "--model", tmp_path / "base", "--data", data, *words)
    assert json.loads((tmp_path / "out" / "labels.json").read_text()) == ["positive", "negative"]
    said(capsys, "eval", "--model", tmp_path / "out", "--data", data, "--json", tmp_path / "s.json")
    assert json.loads((tmp_path / "s.json").read_text())["metrics"]["accuracy"] == [0.75, 0.75]
