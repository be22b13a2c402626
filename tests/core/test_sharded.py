"""FSDP2 with two processes trains and saves the adapter of one (problem 26)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

import lorakit
import models
from in_shards import IDS, adapted, trained

HERE = Path(__file__).parent


@pytest.mark.slow
def test_problem_26_two_sharded_processes_train_the_adapter_of_one(tmp_path: Path) -> None:
    model = models.llama()
    lorakit.attach(model, rank=4)
    torch.manual_seed(5)
    with torch.no_grad():  # an update that is not zero, so that adding it twice would show
        for parameter in lorakit.parameters(model):
            parameter.copy_(torch.randn_like(parameter) / 8)
    lorakit.save(model, tmp_path / "begun", force=True)
    lorakit.save(trained(adapted(tmp_path / "begun"), IDS), tmp_path / "alone")
    paths = os.pathsep.join([str(HERE.parent), *sys.path])
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    done = subprocess.run(
        [*command, str(HERE.parent / "in_shards.py"), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    one, two = (
        safetensors.torch.load_file(tmp_path / name / "adapter_model.safetensors") for name in ("alone", "sharded")
    )
    torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-6)
    assert (tmp_path / "alone" / "adapter_config.json").read_bytes() == (
        tmp_path / "sharded" / "adapter_config.json"
    ).read_bytes()
