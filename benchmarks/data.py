"""How fast rows are checked and converted to tokens and labels, and in how much memory, compared with datasets and TRL.

    python benchmarks/data.py            about five minutes
    python benchmarks/data.py 1000000    with another number of rows; this one takes half an hour

Both read the same JSON lines, a question and an answer as messages, put them into SmolLM2's chat template and find the
tokens of the answer. lorakit checks each row (file:line of what is wrong, repeated questions, held-out rows). Each run
is a new process, and the two take turns. rows/s: over that of datasets and TRL, both as measured here. memory: the peak
beyond what the process holds before it reads, with a fourth of the rows and with all (Linux only). The rows lie in
files; about fifty bytes of each are in memory at the peak: where it lies, what it asks, its class.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import measure

ROWS = 100_000
WORDS = ("light", "room", "hall", "kitchen", "turn", "on", "off", "please", "set", "alarm", "for", "monday", "seven")


def write_rows(path: Path, count: int) -> None:
    order = random.Random(0)

    def said(words: int) -> str:
        return " ".join(order.choice(WORDS) for _ in range(words))

    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            turns = {"prompt": [("user", said(30))], "completion": [("assistant", said(30))]}
            row = {key: [{"role": r, "content": c} for r, c in own] for key, own in turns.items()}
            file.write(json.dumps(row) + "\n")


def with_lorakit(file: str, tokenizer: Any) -> int:
    from lorakit.training.data import read_data
    from lorakit.training.tokens import encode_all

    data = read_data(file)
    rows = encode_all(data.train, tokenizer, max_length=1024, too_long="drop", system=None, chat=True).rows
    return len(rows) + len(data.valid)


def with_trl(file: str, tokenizer: Any) -> int:
    from datasets import load_dataset
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    small = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **small))
    with tempfile.TemporaryDirectory() as folder:
        rows = load_dataset("json", data_files=file, split="train", cache_dir=folder)
        settings = SFTConfig(output_dir=folder, use_cpu=True, report_to="none", bf16=False, max_length=1024)
        trainer = SFTTrainer(model, args=settings, train_dataset=rows, processing_class=tokenizer)
        return len(trainer.train_dataset)


def work(name: str, file: str) -> None:
    """One run in a process of its own; prints its rows, seconds and bytes."""
    import datasets  # noqa: F401  the libraries of both are there before the memory is noted
    import trl  # noqa: F401

    from lorakit.training.models import load_tokenizer

    tokenizer = load_tokenizer(measure.smollm2())
    before = start_of_peak()
    began = time.perf_counter()
    rows = (with_lorakit if name == "lorakit" else with_trl)(file, tokenizer)
    seconds = time.perf_counter() - began
    print(json.dumps({"rows": rows, "seconds": seconds, "bytes": peak() - before}))


def start_of_peak() -> int:
    """Let Linux measure the peak memory of this process anew; the bytes that it holds now."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def run(name: str, file: Path) -> dict[str, Any]:
    command = [sys.executable, __file__, "--work", name, str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(words: list[str]) -> None:
    count = int(words[0]) if words else ROWS
    names = {"lorakit": "lorakit", "trl": "datasets + TRL"}
    found: dict[tuple[str, int], dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for rows in (count // 4, count):
            file = Path(folder) / f"{rows}.jsonl"
            write_rows(file, rows)
            for name in names:
                found[name, rows] = run(name, file)
                assert found[name, rows]["rows"] == rows, (name, found[name, rows])
    table = []
    for (name, rows), own in found.items():
        speed, other = (rows / run_["seconds"] for run_ in (own, found["trl", rows]))
        table.append(
            {
                "rows": f"{rows:,}",
                "with": names[name],
                "rows/s": round(speed),
                "× datasets + TRL": round(speed / other, 2),
                "memory, MB": round(own["bytes"] / 1e6),
            }
        )
    measure.print_table(table)
    measure.write("data", "python benchmarks/data.py" + (f" {count}" if words else ""), table)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(*sys.argv[2:4])
    else:
        main(sys.argv[1:])
