"""Wrong words on the command line and in a file of settings: the message says what was meant, and where."""

from pathlib import Path

import pytest

from lorakit.cli.main import VERBS, _parser, main


def said(capsys: pytest.CaptureFixture[str], *words: str, code: int = 2) -> str:
    assert main(list(words)) == code, words
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" not in err
    return err.strip()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("TRAIN", "lorakit: unknown command 'TRAIN'. Did you mean 'train'? (lorakit --help lists them)"),
        ("evaluate", "lorakit: unknown command 'evaluate'."),
        ("xyzzy", "lorakit: unknown command 'xyzzy'. (lorakit --help lists them)"),
        ("--model m train", "lorakit: --model: a command comes first: lorakit train --model …"),
        ("--rank 4", "lorakit: --rank: a command comes first: lorakit COMMAND --rank …"),
        ("train --targets a b c", "unexpected 'b'. Separate names with commas: --targets a,b,c. (lorakit train"),
        ("train --also-train=a b", "unexpected 'b'. Separate names with commas: --also-train a,b."),
        ("compare f.yaml --metrics a b", "unexpected 'b'. Separate names with commas: --metrics a,b."),
        ("generate --model m --prompt hello big world", "of several words stands in quotes: --prompt \"hello big"),
        ("train --dora true", "--dora takes no value, found 'true'"),
        ("train --dora=true", "--dora: takes no value, found 'true'"),
        ("info a --modules b", "lorakit info: --modules takes no value, found 'b'"),
        ("info a --modules true b", "--modules takes no value, found 'true'"),
        ("train —rank 4", "unexpected '—rank'. Did you mean '--rank'?"),
        ("train --RANK 4", "unknown argument '--RANK'. Did you mean '--rank'?"),
        ("train --lora_rank 4", "unknown argument '--lora-rank'. Did you mean '--lora-r'?"),
        ("train -m x", "unknown argument '-m'."),
        ("train --rnk 4 --epchs 3", "unknown argument '--rnk'. Did you mean '--rank'? unknown argument '--epchs'."),
        ("train --temperature 1", "unknown argument '--temperature'. It is one of lorakit generate, chat."),
        ("generate --model m --prompt p --epochs 1", "'--epochs'. It is one of lorakit train, compare, check."),
        ("merge --model m -o o --tolerance", "--tolerance: expected one argument"),
        ("generate --modle m", "'--modle'. Did you mean '--model'?"),  # rather than: --model is missing
        ("generate", "the following arguments are required: --model/--model-name-or-path, --prompt/-p."),
        ("train --rank x", "--rank: expected a whole number, found 'x'."),
        ("train --config .", "--config . is a folder, not a file."),
        ("train --config ''", "--config '': no such file"),
    ],
)  # fmt: skip
def test_what_was_meant(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in said(capsys, *words.split())


def test_all_that_is_missing_and_wrong_is_listed_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    lines = said(capsys, "train", "--rank", "0", "--lr", "x", "--data", "d").splitlines()
    assert lines == [
        "lorakit train: --rank: expected at least 1, found '0'.",
        "--learning-rate: expected a number, found 'x'.",
        "missing: --model path/to/model --output-dir out   (or give them in a YAML file: --config FILE)",
    ]


def test_a_flags_own_name_is_never_suggested(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for verb in VERBS:
        for flag in set(_parser(verb)._option_string_actions) - {"-h", "--help", "--debug"}:
            assert f"Did you mean {flag!r}" not in said(capsys, verb, "--zzzz", flag)
    (tmp_path / "here").mkdir()
    assert "Did you mean" not in said(capsys, "train", "--config", str(tmp_path / "here"))


def test_help_fits_80_columns_and_needs_no_colour(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")
    for words in ([], *([verb, "--help"] for verb in VERBS), ["help"], ["help", "train"]):
        assert main(words) == 0
        text = capsys.readouterr().out
        assert max(map(len, text.splitlines())) <= 80 and "\x1b" not in text, words


GOOD = "model: m\ndata: d\noutput_dir: o\n"
# Line 4 of the file → the message about it.
LINES = {
    "rank: [1, 2]": "rank: expected a whole number, found [1, 2].",
    "rank: {a: 1}": "rank: expected a whole number, found {'a': 1}.",
    "rank:": "rank: expected a whole number, found None.",
    "rank: true": "rank: expected a whole number, found True.",
    "lr: .nan": "lr: expected a number, found nan.",
    "lr: -.inf": "lr: expected a finite number, found -inf.",
    "lr: 1e999": "lr: expected a finite number, found '1e999'.",
    "lora-r: 0": "lora-r: expected at least 1, found 0.",
    "dora: maybe": "dora: expected true or false, found 'maybe'.",
    "scheduler: liner": "scheduler: expected one of linear, cosine, constant, found 'liner'. Did you mean 'linear'?",
    "targets: [[q_proj]]": "targets: expected names separated by commas, found [['q_proj']].",
    "targets: []": "targets: expected a name, found [].",
    "system: [a]": "system: expected text, found ['a'].",
    "rnk: 4": "unknown key 'rnk'. Did you mean 'rank'?",
    "lora: {r: 4}": "unknown key 'lora'. The file is flat, without sections.",
    "? [a]\n: b": "expected the name of a setting before the colon.",
    "model: n": "'model' stands here and in line 1.",
    "dataset_name: n": "'dataset_name', which is 'data', stands here and in line 2.",
    "rank: !!int many": "rank: a value that cannot be read",
    "seed: 2020-99-99": "seed: a value that cannot be read",
    "seed: !!timestamp x": "seed: a value that cannot be read",
    "seed: !thing 3": "seed: a value that cannot be read",
    "rank: *none": "not YAML: found undefined alias 'none'.",
    "\trank: 4": "not YAML: found character '\\t' that cannot start any token. Indent with spaces, not with tabs.",
    "rank: 'four": "not YAML: found unexpected end of stream.",
    "rank: \x07": "not YAML: a character that it forbids, U+0007.",
}


@pytest.mark.parametrize("verb", ["train", "check", "compare"])
@pytest.mark.parametrize("line", LINES)
def test_a_wrong_line_of_a_file_is_named(line: str, verb: str, tmp_path: Path, capsys) -> None:
    file = tmp_path / "run.yaml"
    good, message = GOOD, LINES[line]
    if verb == "compare":  # it has fewer settings
        if line.partition(":")[0] in ("rank", "lora-r", "dora", "targets", "seed") and "not YAML" not in message:
            pytest.skip("no setting of lorakit compare")
        message = message.replace("Did you mean 'rank'?", "").strip()
    file.write_text(good + line + "\n", encoding="utf-8")
    err = said(capsys, verb, "--config", str(file))
    number = 5 if "end of stream" in message else 4
    assert err.startswith(f"lorakit {verb}: {file}:{number}: {message}") and len(err.splitlines()) == 1


@pytest.mark.parametrize("verb", ["train", "check", "compare"])
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (GOOD.encode() + b"system: gr\xfc\xdf\n", ":4: not UTF-8 (byte 41); save the file as UTF-8."),
        (GOOD.encode("utf-16"), ":1: the file is UTF-16; save it as UTF-8."),
        (b"\x00" * 20, ":1: not YAML: a character that it forbids, U+0000."),
        (b"- model: m\n", ":1: expected lines of the form `key: value`."),
        (b"model\n", ":1: expected lines of the form `key: value`."),
        (GOOD.encode() + b"---\nrank: 4\n", ":4: not YAML: but found another document."),
        (b"version https://git-lfs.github.com/spec/v1\n", " is a git-lfs pointer"),
        (b"[" * 5000, ""),
    ],
)
def test_a_file_that_holds_no_settings_is_named(data: bytes, message: str, verb: str, tmp_path: Path, capsys) -> None:
    file = tmp_path / "run.yaml"
    file.write_bytes(data)
    err = said(capsys, verb, "--config", str(file))
    assert err.startswith(f"lorakit {verb}: {file}{message}") and len(err.splitlines()) == 1


def test_a_file_may_use_every_name_that_a_flag_has(tmp_path: Path) -> None:
    from lorakit.training.config import TrainConfig
    from lorakit.training.settings import from_args

    file = tmp_path / "run.yaml"
    text = (
        "model-name-or-path: m\ndataset_name: d\noutput-dir: o\nlr: 1e-3\nlora_r: 4\nlora-alpha: 8\n"
        "target_modules: [q_proj]\nnum_train_epochs: 2\nper-device-train-batch-size: 3\nlora_dropout: 0.1\n"
    )
    file.write_bytes(b"\xef\xbb\xbf" + text.encode())  # as editors on Windows begin a file
    config = from_args(TrainConfig, _parser("train").parse_args(["--config", str(file), "--rank", "6"]))
    assert (config.model, config.data, config.output_dir, config.learning_rate) == ("m", "d", "o", 1e-3)
    assert (config.rank, config.alpha, config.targets) == (6, 8.0, ("q_proj",))
    assert (config.epochs, config.batch_size, config.dropout) == (2.0, 3, 0.1)
