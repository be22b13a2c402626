"""A mistake gives one clear message, no traceback, exit code 1 or 2, and writes nothing."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lorakit.cli.main import main

ROW = json.dumps({"prompt": "a", "completion": "b"})


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text(f"{ROW}\n" * 4)
    return path


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    code = main([str(word) for word in words])
    err = capsys.readouterr().err
    assert "Traceback" not in err
    return code, err.strip()


def train(model: Path, data: Path, out: Path, *more: object) -> list[object]:
    return ["train", "--model", model, "--data", data, "--output-dir", out, *more]


def test_help_and_no_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    overview = capsys.readouterr().out
    assert main(["--help"]) == 0
    assert capsys.readouterr().out == overview
    for verb in ("train", "generate", "chat", "eval", "merge", "info", "analyze", "check", "init"):
        assert f"\n  {verb} " in overview
        assert main([verb, "--help"]) == 0
        text = capsys.readouterr().out
        assert f"lorakit {verb}" in text and max(map(len, text.splitlines())) <= 110
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("lorakit 0.")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "lorakit: unknown command 'trian'. Did you mean 'train'? (lorakit --help lists them)"),
        (
            ["train", "--rnk", "4"],
            "lorakit train: unknown argument '--rnk'. Did you mean '--rank'? (lorakit train --help)",
        ),
        (["train"], "lorakit train: missing: --model path/to/model --data data.jsonl --output-dir out"),
        (["train", "--rank"], "lorakit train: --rank: expected one argument. (lorakit train --help)"),
        (
            ["generate", "--model", "x"],
            "lorakit generate: the following arguments are required: --prompt/-p. (lorakit generate",
        ),
        (["analyze"], "lorakit analyze: the following arguments are required: adapter. (lorakit analyze --help)"),
        (
            ["analyze", "x", "--ouput-dir", "y"],
            "lorakit analyze: unknown argument '--ouput-dir'. Did you mean '--output",
        ),
        (["train", "--config", "no.yaml"], "lorakit train: --config no.yaml: no such file"),
    ],
)
def test_usage_errors_are_one_line_and_exit_2(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, err = run(capsys, *words)
    assert code == 2
    assert "\n" not in err
    assert err.startswith(message)


def test_bad_data_is_found_before_weights_are_loaded(tiny_lm: Path, tmp_path: Path, capsys) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text(f'{ROW}\n{ROW}\n{{"prompt": "a" "x"}}\n{{"q": 1}}\n{{"prompt": null, "completion": "b"}}\n')
    bare = tmp_path / "no-weights"
    bare.mkdir()
    for file in tiny_lm.iterdir():
        if file.suffix != ".safetensors":
            (bare / file.name).write_bytes(file.read_bytes())
    code, err = run(capsys, *train(bare, bad, tmp_path / "out"))
    assert code == 1
    assert err.splitlines() == [
        "error: 3 bad rows; nothing was loaded:",
        "bad.jsonl:3: not JSON: Expecting ',' delimiter at column 16",
        "bad.jsonl:4: found keys ['q'], expected one of: messages | conversations | prompt+completion | "
        "instruction+output | text+label | text.",
        "bad.jsonl:5: prompt is null",
    ]
    assert not (tmp_path / "out").exists()


def test_failures_are_one_message_and_exit_1(
    tiny_lm: Path, tiny_encoder: Path, data: Path, tmp_path: Path, capsys
) -> None:
    out = tmp_path / "out"
    code, err = run(capsys, *train(tiny_lm, tmp_path / "daat.jsonl", out))
    assert (code, "daat.jsonl: no such file or folder. Did you mean" in err) == (1, True)
    code, err = run(capsys, *train(tmp_path / "model", data, out))
    assert (code, f"no model at {tmp_path / 'model'}" in err) == (1, True)
    code, err = run(capsys, *train(tmp_path, data, out))
    assert (code, "is no model folder: it has no config.json and no .gguf file" in err) == (1, True)
    code, err = run(capsys, *train(tiny_lm, data, out, "--targets", "q_prj"))
    assert code == 1
    assert "targets=['q_prj'] match no module of LlamaForCausalLM" in err and "Did you mean 'q_proj'?" in err
    code, err = run(capsys, *train(tiny_lm, data, out, "--task", "classification"))
    assert (code, "--task classification does not fit" in err) == (1, True)
    code, err = run(capsys, *train(tiny_lm, data, out, "--max-seq-length", "3"))
    assert (code, "no row of" in err and "--max-seq-length 3" in err) == (1, True)
    assert not out.exists()
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    code, err = run(capsys, *train(tiny_lm, data, out))
    assert (code, "is not empty: it holds precious.txt, which lorakit train did not write." in err) == (1, True)
    assert [path.name for path in out.iterdir()] == ["precious.txt"]


def test_adapters_that_do_not_fit(tiny_lm: Path, tiny_encoder: Path, data: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    assert (
        main(
            [str(w) for w in train(tiny_lm, data, out, "--max-steps", "1", "--eval-samples", "0", "--dtype", "float32")]
        )
        == 0
    )
    capsys.readouterr()
    from transformers import GPT2Config, GPT2LMHeadModel

    other = tmp_path / "gpt2"
    GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=16, n_layer=1, n_head=2)).save_pretrained(other)
    for file in tiny_lm.glob("tokenizer*"):
        (other / file.name).write_bytes(file.read_bytes())
    capsys.readouterr()
    code, err = run(capsys, "generate", "--model", other, "--adapter", out, "--prompt", "x")
    assert code == 1
    assert "the adapter does not fit GPT2LMHeadModel" in err
    assert "q_proj: the model has no such module" in err
    code, err = run(capsys, "info", tmp_path)
    assert (code, "is no adapter folder: it has no adapter_config.json" in err) == (1, True)
    code, err = run(capsys, "merge", "--model", tiny_lm, "--output-dir", tmp_path / "m")
    assert (code, "is a base model without an adapter; give --adapter FOLDER" in err) == (1, True)


def test_analyze_says_what_does_not_fit(tiny_lm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import lorakit
    import models

    for name, targets in (("one", ["q_proj", "k_proj"]), ("two", ["q_proj"])):
        model = models.llama()
        lorakit.attach(model, targets, rank=2)
        lorakit.save(model, tmp_path / name)
    one, two = tmp_path / "one", tmp_path / "two"
    code, err = run(capsys, "analyze", one, two, "--model", tiny_lm)
    assert (code, err.splitlines()[0]) == (1, "error: the two adapters do not cover the same modules:")
    assert "  model.layers.0.self_attn.k_proj: in the first adapter only" in err and "q_proj" not in err
    missing = f"error: no adapter at {tmp_path}/none: no such file or folder."
    whole = f"error: {tiny_lm} is no adapter folder: it has no adapter_config.json. It holds a whole model."
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    begun = f"error: {tmp_path}/run holds a training run that ended before its first checkpoint, and no adapter."
    for words in (["analyze"], ["info"], ["analyze", one]):
        for folder, message in ((tmp_path / "none", missing), (tiny_lm, whole), (tmp_path / "run", begun)):
            code, err = run(capsys, *words, folder)
            assert (code, err.startswith(message)) == (1, True), err
    code, err = run(capsys, "analyze", one, "--model", tmp_path / "no" / "model")
    assert (code, "no model at" in err) == (1, True)
    (tmp_path / "file").touch()
    code, err = run(capsys, "analyze", one, "--output-dir", tmp_path / "file")
    assert (code, err) == (1, f"error: --output-dir {tmp_path / 'file'} is a file.")
    other = models.bert()
    lorakit.attach(other, "query", rank=2)
    lorakit.save(other, tmp_path / "bert")
    (tmp_path / "bert" / "labels.json").write_text('["a", "b"]')
    code, err = run(capsys, "analyze", tmp_path / "bert", "--model", tiny_lm)
    assert (code, "the adapter does not fit LlamaForSequenceClassification" in err) == (1, True)


def test_problem_50_a_loss_that_is_no_number_stops_the_run(tiny_lm: Path, data: Path, tmp_path: Path, capsys) -> None:
    words = train(
        tiny_lm, data, tmp_path / "out", "--lr", "1e30", "--warmup-ratio", "0", "--epochs", "30", "--dtype", "float32"
    )
    for steps, said in (
        ("100", r"the loss is (nan|inf) at step \d+.* rows: "),
        ("1", r"diverged after 1 steps: .* rows: "),
    ):
        code, err = run(capsys, *words, "--logging-steps", "1", "--save-steps", steps)
        assert code == 1 and re.search(said + r"\S+\.jsonl:\d+", err), err
        assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_debug_shows_the_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--debug", "info", str(tmp_path)]) == 1
    assert "Traceback" in capsys.readouterr().err
    assert main(["info", str(tmp_path), "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_interrupts_are_quiet(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from lorakit.cli import info

    def interrupted(args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(info, "run", interrupted)
    code, err = run(capsys, "info", "x")
    assert (code, err) == (130, "interrupted")


@pytest.mark.parametrize(
    ("module", "extra"),
    [
        ("sacrebleu", "study"),
        ("rouge_score.rouge_scorer", "study"),
        ("sklearn.metrics", "study"),
        ("scipy.stats", "study"),
        ("transformers", "train"),
        ("scipy_like", "train"),
    ],
)
def test_a_missing_package_names_the_extra(module: str, extra: str, monkeypatch, capsys) -> None:
    from lorakit.cli import info

    monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    monkeypatch.setattr(info, "run", lambda args: importlib.import_module(module))
    code, err = run(capsys, "info", "x")
    assert (code, module in err, err.endswith(f' pip install "lorakit[{extra}]"')) == (1, True, True)


def test_init_writes_a_file_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "lora.yaml"
    assert main(["init", str(file)]) == 0
    assert f"lorakit check --config {file}" in capsys.readouterr().out
    assert "# r, the rank of the update\n# rank: 16" in file.read_text()
    code, err = run(capsys, "init", file)
    assert (code, "exists already. Choose another name, or add --force." in err) == (1, True)
    assert main(["init", str(file), "--force"]) == 0
    capsys.readouterr()
    assert main(["init", "-"]) == 0
    assert capsys.readouterr().out == file.read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["lora.yaml"]


def test_the_overview_imports_no_torch() -> None:
    script = (
        "import sys; from lorakit.cli.main import main; main(['--help']); main(['train', '--help']);"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'datasets')))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
