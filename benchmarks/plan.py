"""Peak memory: what `lorakit train` plans before it starts, compared with what it measures.

    python benchmarks/plan.py        about five minutes on two idle cores

Each setting trains a few steps in a separate process, which prints both numbers. The measured number is the highest
resident memory from the first step to the end of training, without loading the model. SmolLM2-135M has its real
weights; the other models have random ones. The benchmark fails if a plan is below what was measured, or more than a
quarter above it.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measure

from lorakit.training.models import load_tokenizer

EXAMPLE = measure.ROOT / "examples" / "toolcalls"
ABOVE = 1.25  # planned ÷ measured, at most
_VOCABULARY = 49_152  # of SmolLM2's tokenizer, which the random models use


def smollm2(folder: Path) -> str:
    return measure.smollm2()


def gpt2(folder: Path) -> str:
    """Six layers of width 768, learnt positions, transposed weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=_VOCABULARY, n_layer=6, bos_token_id=0, eos_token_id=0)
    return _random(GPT2LMHeadModel(config), folder)


def qwen2(folder: Path) -> str:
    """Eight layers of width 640 and a vocabulary of 151,936."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=151_936,
        hidden_size=640,
        intermediate_size=2048,
        num_hidden_layers=8,
        num_attention_heads=10,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    return _random(Qwen2ForCausalLM(config), folder)


def bert(folder: Path) -> str:
    """A classifier with eight layers of width 512."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=_VOCABULARY,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=8,
        num_attention_heads=8,
    )
    return _random(BertForSequenceClassification(config), folder)


def _random(model: Any, folder: Path) -> str:
    model.save_pretrained(folder)
    load_tokenizer(measure.smollm2()).save_pretrained(folder)
    return str(folder)


@dataclass(frozen=True)
class Setting:
    """model: makes the model's folder. tokens: of every row; None: the demo's rows. flags: further flags."""

    model: Callable[[Path], str]
    rows: int
    tokens: int | None
    dtype: str
    flags: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        words = " ".join(self.flags).replace("--", "").replace("gradient-", "").replace("-steps", "")
        return f"{self.rows} × {self.tokens or 'demo'}" + (f", {words}" if words else "")


_DROPOUT, _CHECKPOINTING = ("--dropout", "0.05"), ("--gradient-checkpointing",)
_TWICE = ("--gradient-accumulation-steps", "2")
SETTINGS = [
    Setting(smollm2, 4, None, "bfloat16"),
    Setting(smollm2, 2, 256, "float32", _DROPOUT),
    Setting(smollm2, 4, 128, "bfloat16", _DROPOUT),
    Setting(smollm2, 2, 256, "bfloat16", _CHECKPOINTING),
    Setting(smollm2, 1, 512, "float32", _CHECKPOINTING),
    Setting(gpt2, 8, 64, "float32"),
    Setting(gpt2, 2, 128, "bfloat16", _TWICE),
    Setting(qwen2, 2, 256, "float32"),
    Setting(qwen2, 4, 64, "bfloat16", _DROPOUT),
    Setting(bert, 8, 128, "float32"),
]


def texts(path: Path, tokens: int, labelled: bool) -> Path:
    """Write 32 rows of more than `tokens` tokens each: plain text, or text with a label."""
    words = " ".join(json.loads(line)["prompt"] for line in (EXAMPLE / "train.jsonl").read_text().splitlines())
    rows: list[dict[str, str]] = [{"text": words[50 * start : 50 * start + 8 * tokens]} for start in range(32)]
    for number, row in enumerate(rows):
        row |= {"label": f"{number % 2}"} if labelled else {}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def figures(printed: str) -> tuple[float, float]:
    """The measured and the planned GB from what a run prints."""
    found = re.search(r"peak memory ([\d.]+) (GB|MB) \(planned ([\d.]+) (GB|MB)\)", printed)
    assert found, printed
    unit = {"GB": 1.0, "MB": 1e-3}
    return float(found[1]) * unit[found[2]], float(found[3]) * unit[found[4]]


def arguments(setting: Setting, folder: Path) -> list[str]:
    """The arguments of `lorakit train`."""
    data, tokens = EXAMPLE, setting.tokens
    if tokens is not None:
        data = texts(folder / "text.jsonl", tokens, setting.model is bert)
    flags = ["--model", setting.model(folder / "model"), "--data", str(data), "--output-dir", f"{folder}/out"]
    flags += ["--dtype", setting.dtype, "--batch-size", f"{setting.rows}", "--holdout", "0", "--eval-samples", "0"]
    # With rows of one length, memory stops growing after few steps. Rows of many lengths need more steps.
    flags += ["--max-steps", f"{12 if tokens is None else 3}", *setting.flags]
    if tokens is not None:
        flags += ["--max-seq-length", f"{tokens}", "--too-long", "truncate"]
    return flags


def run(setting: Setting) -> tuple[float, float]:
    """The measured and the planned GB of a setting."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "lorakit", "train", *arguments(setting, Path(folder))]
        done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return figures(done.stdout)


def row(setting: Setting) -> dict[str, Any]:
    measured, planned = run(setting)
    print(f"{setting.model.__name__}, {setting.name}: measured {measured:.2f} GB, planned {planned:.2f} GB", flush=True)
    return {
        "model": setting.model.__name__,
        "setting": setting.name,
        "dtype": setting.dtype,
        "measured GB": measured,
        "planned GB": planned,
        "planned ÷ measured": round(planned / measured, 2),
    }


def main() -> None:
    with ThreadPoolExecutor(2) as pool:  # memory, unlike time, is the same beside another run
        rows = list(pool.map(row, SETTINGS))
    measure.print_table(rows)
    measure.write("plan", "python benchmarks/plan.py", rows)
    wrong = [
        own["setting"] for own in rows if not own["measured GB"] <= own["planned GB"] <= ABOVE * own["measured GB"]
    ]
    if wrong:
        raise SystemExit(f"planned below what was measured, or over {ABOVE} times as much: {'; '.join(wrong)}")


if __name__ == "__main__":
    main()
