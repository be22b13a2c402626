"""The demo on a base in bfloat16, in 4 bits and in 8 bits: memory, time, and what is learnt.

    python benchmarks/bases.py               about half an hour on two cores that do nothing else
    python benchmarks/bases.py nf4           these alone

Each row is one training of SmolLM2-135M-Instruct on examples/toolcalls, in a process of its own. Memory is what
`lorakit train` plans and measures, time that of the training, exact match that of the 96 test rows.
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
import plan

BASES = ("none", "nf4", "int8")


def run(quantize: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "lorakit", "train", "--config", str(plan.EXAMPLE / "train.yaml")]
        command += ["--model", measure.smollm2(), "--data", str(plan.EXAMPLE), "--output-dir", f"{folder}/out"]
        command += ["--dtype", "bfloat16", "--quantize", quantize]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        lines = Path(folder, "out", "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    measured, planned = plan.figures(done.stdout)
    base, adapter = (float(share) for share in re.findall(r"exact match +([\d.]+)% → ([\d.]+)%", done.stdout)[0])
    return {
        "linear layers": "bfloat16" if quantize == "none" else quantize,
        "planned GB": planned,
        "measured GB": measured,
        "seconds": max(json.loads(line).get("seconds", 0.0) for line in lines),
        "exact match before, %": base,
        "after, %": adapter,
    }


def main(wanted: list[str]) -> None:
    rows = [run(quantize) for quantize in wanted or BASES]
    first = rows[0]["seconds"]
    for row in rows:
        row["time ÷ the first row's"] = round(row.pop("seconds") / first, 2)
    measure.print_table(rows)
    if not wanted:
        measure.write("bases", "python benchmarks/bases.py", rows)


if __name__ == "__main__":
    main(sys.argv[1:])
