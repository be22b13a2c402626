"""Training under torchrun: the first process prints and writes, and the adapter is that of one process."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

DATA = Path(__file__).parents[2] / "examples" / "toolcalls" / "valid.jsonl"


@pytest.mark.slow
def test_two_processes_train_the_adapter_of_one(tiny_lm: Path, tmp_path: Path) -> None:
    """The same rows in batches of half the size; the loss is computed inside the wrapped model's forward pass."""
    adapters, printed, held_out = [], [], []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--standalone"]
        command += ["-m", "lorakit", "train", "--model", str(tiny_lm), "--data", str(DATA), "--output-dir", str(out)]
        command += [
            "--batch-size",
            str(4 // processes),
            "--max-steps",
            "4",
            "--dtype",
            "float32",
            "--eval-samples",
            "1",
            "--eval-steps",
            "4",
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        adapters.append(safetensors.torch.load_file(out / "adapter_model.safetensors"))
        printed.append(done.stdout)
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        held_out.append([line["eval_loss"] for line in lines if "eval_loss" in line])
    assert all(text.count("── done") == 1 and "4 steps of 4 rows" in text for text in printed)
    assert any(tensor.abs().max() > 1e-4 for name, tensor in adapters[0].items() if "lora_B" in name)
    torch.testing.assert_close(adapters[1], adapters[0], rtol=1e-4, atol=1e-6)
    # Rows that fill up the last batches of two processes count once.
    assert len(held_out[0]) == 1 and held_out[1] == pytest.approx(held_out[0], rel=1e-5)
