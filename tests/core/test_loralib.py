"""Programs written for loralib, run on lorakit in a separate process."""

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import torch
from torch import nn
import loralib as lora
import loralib.layers
from loralib.layers import Linear, LoRALayer
from loralib.utils import lora_state_dict

class Gate(LoRALayer, nn.Module):
    def __init__(self, size, r):
        nn.Module.__init__(self)
        lora.LoRALayer.__init__(self, r=r, lora_alpha=2, lora_dropout=0.0, merge_weights=True)
        self.lora_A = nn.Parameter(torch.zeros(r, size))

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = lora.Embedding(11, 8, r=2)
        self.qkv = lora.MergedLinear(8, 24, r=2, lora_alpha=4, lora_dropout=0.1, enable_lora=[True, False, True])
        self.out = lora.Linear(24, 3, r=2, lora_alpha=4)
        self.gate = Gate(3, 2)
    def forward(self, x):
        return self.out(torch.tanh(self.qkv(self.embed(x))))

torch.manual_seed(0)
net = Net().double()
lora.mark_only_lora_as_trainable(net, bias="lora_only")
optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
x = torch.arange(11)
for _ in range(3):
    net.train()
    optimizer.zero_grad()
    net(x).square().sum().backward()
    optimizer.step()
torch.save(lora.lora_state_dict(net, bias="lora_only"), "lora.pt")
net.load_state_dict(torch.load("lora.pt"), strict=False)
net.eval()
print(sorted(lora_state_dict(net)), isinstance(net.out, lora.layers.Linear), net.out.merged, net.out.scaling)
print(net(x).sum(0).tolist())
"""


def run(first: str, folder: Path) -> list[str]:
    command = [sys.executable, "-c", first + PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_program_gives_the_same_with_the_real_loralib_and_with_lorakit(tmp_path: Path) -> None:
    theirs, mine = run("", tmp_path), run("import lorakit; lorakit.install_as_loralib()\n", tmp_path)
    assert mine[0] == theirs[0]
    # The same draws, the same dropout masks, the same updates: float64, up to the order of sums.
    values = [[float(value) for value in line[1].strip("[]").split(",")] for line in (mine, theirs)]
    assert all(abs(a - b) < 1e-9 for a, b in zip(*values, strict=True)), values


def test_it_can_be_called_twice_but_not_after_the_real_one() -> None:
    twice = "from lorakit import install_as_loralib as f; f(); f(); import loralib; print(loralib.Linear)"
    late = "import loralib, lorakit; lorakit.install_as_loralib()"
    done = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True) for code in (twice, late)]
    assert "lorakit.core.layers.linear.Linear" in done[0].stdout
    assert "RuntimeError: install_as_loralib(): loralib is imported already" in done[1].stderr


def test_a_star_import_gives_the_same_names() -> None:
    program = "from loralib{} import *; print(sorted(name for name in dir() if name[0] != '_'))"
    for module in ("", ".layers", ".utils"):
        theirs, mine = (
            subprocess.run(
                [sys.executable, "-c", first + program.format(module)], capture_output=True, text=True
            ).stdout
            for first in ("", "from lorakit import install_as_loralib as f; f(); del f\n")
        )
        assert theirs and mine == theirs
