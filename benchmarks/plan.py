"""Peak memory: what `lorakit train` plans before it starts, against what it measures, on SmolLM2-135M.

    python benchmarks/plan.py        about six minutes on one thread of a CPU

Each setting trains a few steps in a process of its own; both figures are those that it prints. Measured is the highest
resident memory from the first step to the end of training, loading the model left out.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import measure

EXAMPLE = measure.ROOT / "examples" / "toolcalls"
STEPS = 3

# name: rows a batch, tokens a row (None: the demo's rows), dtype, further flags
SETTINGS: dict[str, tuple[int, int | None, str, list[str]]] = {
    "demo": (4, None, "bfloat16", ["--system", "Reply with one tool call.", "--max-steps", "24"]),
    "4 × 256, dropout": (4, 256, "float32", ["--dropout", "0.05"]),
    "4 × 256, dropout, in bfloat16": (4, 256, "bfloat16", ["--dropout", "0.05"]),
    "the same, checkpointed": (4, 256, "bfloat16", ["--dropout", "0.05", "--gradient-checkpointing"]),
    "1 × 1024": (1, 1024, "float32", []),
}


def texts(path: Path, tokens: int) -> Path:
    """Twelve rows of plain text of more than so many tokens each, all of them labelled."""
    words = " ".join(json.loads(line)["prompt"] for line in (EXAMPLE / "train.jsonl").read_text().splitlines())
    rows = [{"text": words[50 * start : 50 * start + 8 * tokens]} for start in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def figures(printed: str) -> tuple[float, float]:
    """Measured and planned GB out of what a run prints."""
    found = re.search(r"peak memory ([\d.]+) (GB|MB) \(planned ([\d.]+) (GB|MB)\)", printed)
    assert found, printed
    unit = {"GB": 1.0, "MB": 1e-3}
    return float(found[1]) * unit[found[2]], float(found[3]) * unit[found[4]]


def run(batch: int, tokens: int | None, dtype: str, flags: list[str]) -> tuple[float, float]:
    with tempfile.TemporaryDirectory() as folder:
        data = EXAMPLE if tokens is None else texts(Path(folder) / "text.jsonl", tokens)
        command = [sys.executable, "-m", "lorakit", "train", "--model", measure.smollm2(), "--data", str(data)]
        command += ["--output-dir", f"{folder}/out", "--dtype", dtype, "--batch-size", f"{batch}", "--holdout", "0"]
        command += ["--max-steps", f"{STEPS}", "--eval-samples", "0", *flags]
        if tokens is not None:
            command += ["--max-seq-length", f"{tokens}", "--too-long", "truncate"]
        done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return figures(done.stdout)


def main() -> None:
    rows: list[dict[str, Any]] = []
    for name, (batch, tokens, dtype, flags) in SETTINGS.items():
        measured, planned = run(batch, tokens, dtype, flags)
        rows.append({"setting": name, "dtype": dtype, "measured GB": measured, "planned GB": planned})
        rows[-1]["planned ÷ measured"] = round(planned / measured, 3)
        print(f"{name}: measured {measured:.2f} GB, planned {planned:.2f} GB", flush=True)
    measure.print_table(rows)
    measure.write("plan", "python benchmarks/plan.py", rows)


if __name__ == "__main__":
    main()
