"""Consoles with few characters, outputs without a reader, and machines with few or old packages."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import lorakit
from lorakit.cli import requirements

SOURCE = str(Path(lorakit.__file__).parents[1])


def lorakit_in(script: str, *, encoding: str = "utf-8", **settings: Any) -> subprocess.CompletedProcess[bytes]:
    """A new interpreter whose standard streams have this encoding, as on Windows' consoles and in bare containers."""
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0", "PYTHONPATH": SOURCE}
    return subprocess.run([sys.executable, "-c", script], env=environment, timeout=200, check=False, **settings)


@pytest.mark.parametrize("encoding", ["cp1252", "gbk", "ascii"])
def test_any_console_takes_what_every_command_prints(encoding: str, tiny_lm: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "grüß → \U0001f600", "completion": "été ×"}] * 8
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model, data = str(tiny_lm), str(tmp_path / "d.jsonl")
    commands = [
        ["--help"],
        *([verb, "--help"] for verb in ("train", "compare", "analyze", "eval", "merge", "chat")),
        ["init", "-"],
        ["init", "-", "--compare"],
        ["train", "--config", str(tmp_path / "nö→.yaml")],
        ["train", "--mödel→", "x"],
    ]
    if encoding == "ascii":  # only the smallest encoding runs the slower commands
        commands += [["info", str(tmp_path / "näh→")], ["check", "--model", model, "--data", data]]
    script = f"""
import sys
from lorakit.cli.main import main
for words in {commands!r}:
    code = main(words)
    assert code in (0, 1, 2), (words, code)
"""
    done = lorakit_in(script, encoding=encoding, capture_output=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert b"UnicodeEncodeError" not in done.stderr and b"codec can't encode" not in done.stderr
    text, err = done.stdout.decode(encoding), done.stderr.decode(encoding)  # the console can read all of it
    assert "usage: lorakit train" in text
    assert err.count("no such file") >= 1
    if encoding == "ascii":
        assert "-- data ---" in text and "[[" in text and "gr\\xfc\\xdf -> \\U0001f600" in text


def test_half_an_emoji_is_printed_even_in_utf_8() -> None:
    done = lorakit_in(
        r"import sys; from lorakit.cli.console import lasting_output"
        "\nwith lasting_output(): print('a \\ud83d \u2500 b')",
        capture_output=True,
    )
    assert (done.returncode, done.stdout.decode().strip()) == (0, "a \\ud83d ─ b")


def test_the_streams_are_as_before_afterwards(capsys: pytest.CaptureFixture[str]) -> None:
    from lorakit.cli.console import lasting_output

    before = sys.stdout, sys.stderr, sys.stdout.errors, sys.stderr.errors
    with pytest.raises(KeyError, match="x"), lasting_output():
        print("→ fine")
        assert sys.stdout is not before[0] and sys.stdout.encoding == before[0].encoding
        raise KeyError("x")
    assert (sys.stdout, sys.stderr, sys.stdout.errors, sys.stderr.errors) == before
    assert capsys.readouterr().out == "→ fine\n"


WORK = """
import sys
from pathlib import Path
from lorakit.cli import info
from lorakit.cli.main import main

def run(args):
    for number in range(20_000):
        print("line", number, file=sys.stderr if args.modules else sys.stdout)
    Path(args.adapter).write_text("done")

info.run = run
sys.exit(main(["info", *sys.argv[1:]]))
"""


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_work_goes_on_without_a_reader(stream: str, tmp_path: Path) -> None:
    words = [sys.executable, "-c", WORK, str(tmp_path / "end"), *(["--modules"] if stream == "stderr" else [])]
    process = subprocess.Popen(words, env={**os.environ, "PYTHONPATH": SOURCE}, stdout=-1, stderr=-1)
    read, other = (process.stdout, process.stderr) if stream == "stdout" else (process.stderr, process.stdout)
    assert read is not None and other is not None
    assert read.readline() == b"line 0\n"
    read.close()  # | head -1
    assert other.read() == b""  # no error
    other.close()
    assert process.wait(60) == 0
    assert (tmp_path / "end").read_text() == "done"


@pytest.mark.skipif(os.name == "nt", reason="the shell is POSIX's")
@pytest.mark.parametrize(
    ("shell", "code", "said"),
    [(">&-", 0, b""), ("2>&-", 0, b""), (">&- 2>&-", 0, b""), (">/dev/full", 1, b"no space left on device")],
)
def test_outputs_that_are_closed_or_full(shell: str, code: int, said: bytes, tmp_path: Path) -> None:
    if "full" in shell and not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    done = subprocess.run(
        f'"$PYTHON" -m lorakit init - {shell}',
        shell=True,
        env={**os.environ, "PYTHON": sys.executable, "PYTHONPATH": SOURCE},
        capture_output=True,
        check=False,
    )
    assert done.returncode == code and said in done.stderr and b"Exception ignored" not in done.stderr
    assert done.stderr.count(b"\n") <= 1


NEEDED = ["transformers", "trl", "datasets", "accelerate", "gguf", "pyyaml", "jinja2", "matplotlib"]


@pytest.mark.parametrize(
    "missing",
    [[], ["transformers", "trl", "datasets", "accelerate", "gguf", "yaml", "jinja2", "matplotlib", "peft", "numpy"]],
)
def test_the_library_needs_torch_alone_and_commands_say_what_is_missing(missing: list[str], tmp_path: Path) -> None:
    script = f"""
import sys
for name in {missing!r}:
    sys.modules[name] = None
import torch, lorakit
def model(): return torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
m = model()
lorakit.attach(m, rank=2)
lorakit.save(m, {str(tmp_path)!r})
lorakit.save(m, {str(tmp_path / "a.pt")!r})
lorakit.load(model(), {str(tmp_path)!r})
from lorakit.cli.main import main
assert main(["info", {str(tmp_path)!r}]) == 0
assert main(["init", "-"]) == 0
for verb in ("train", "chat", "generate", "eval", "merge", "compare", "check", "analyze"):
    assert main([verb, "--help"]) == 0
"""
    for verb, words in (
        ("train", ["--model", "m", "--data", "d", "--output-dir", "o"]),
        ("generate", ["--model", str(tmp_path), "--prompt", "x"]),
        ("merge", ["--model", "m", "--output-dir", "o"]),
        ("analyze", [str(tmp_path / "none")]),
    ):
        script += f"assert main({[verb, *words]!r}) == 1\n"
    done = lorakit_in(script, capture_output=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    said = [line for line in done.stderr.decode().splitlines() if line.startswith("error: ")]
    assert len(said) == 4
    for line in said:
        assert ('pip install "lorakit[train]"' in line) == bool(missing)
        for name in missing:
            if name not in ("peft", "numpy"):
                assert f"{name.replace('yaml', 'pyyaml')} " in line and "or newer (not installed)" in line


def test_packages_that_are_too_old_are_named_with_the_version_that_is_needed(tmp_path: Path, capsys) -> None:
    from lorakit.cli.main import main

    for name, version in (("transformers", "4.44.2"), ("trl", "0.9"), ("pyyaml", "6.0")):
        folder = tmp_path / f"{name}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    sys.path.insert(0, str(tmp_path))
    try:
        assert main(["train", "--model", "m", "--data", "d", "--output-dir", "o"]) == 1
    finally:
        sys.path.remove(str(tmp_path))
    err = capsys.readouterr().err
    assert "transformers 5.20 or newer (4.44.2 is installed), trl 1.14 or newer (0.9 is installed)" in err
    assert "pyyaml" not in err and err.count("\n") == 1


def test_what_is_needed_is_what_the_package_declares() -> None:
    assert [name for name, _ in requirements._needed("train")] == NEEDED
    assert requirements._needed("no such extra") == []
    for newer, older in (("5.20", "5.3"), ("5.20.0rc1", "5.19"), ("1.14.0", "1.9.9"), ("10", "9.9")):
        assert requirements._release(newer) > requirements._release(older)
    assert requirements._release("5.20.0.dev1+cu12") == (5, 20, 0)
    assert requirements._release("odd") == ()
