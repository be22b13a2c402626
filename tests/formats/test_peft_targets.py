"""Names that are the ends of other names: PEFT adapts what lorakit adapted, with the same ranks and alphas."""

import itertools
from pathlib import Path

import pytest
import torch
from torch import nn

import lorakit
from in_peft import load_in_peft
from models import train_a_little

NAMES = ("0", "1.0", "1.1", "2", "3.2")


def make() -> nn.Module:
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    other = nn.Sequential(nn.Tanh(), nn.Tanh(), nn.Linear(8, 8))
    return nn.Sequential(nn.Linear(8, 8), inner, nn.Linear(8, 8), other, nn.Tanh()).eval()


SELECTIONS = [own for count in range(1, 6) for own in itertools.combinations(NAMES, count)]


@pytest.mark.parametrize("names", SELECTIONS, ids="+".join)
def test_peft_adapts_the_same_modules(names: tuple[str, ...], tmp_path: Path) -> None:
    """PEFT warns of modules that it adapts and the file does not hold: here a warning is an error."""
    model, x = make(), torch.randn(3, 8)
    # Every second module has its own rank and alpha.
    ranks = {f"[{name[0]}]{name[1:]}": 3 for name in names[::2]}
    alphas = {f"[{name[0]}]{name[1:]}": 7 for name in names[1::2]}
    lorakit.attach(model, lambda module, name: name in names, rank=2, alpha=4, rank_pattern=ranks, alpha_pattern=alphas)
    train_a_little(model)
    lorakit.save(model, tmp_path)
    torch.testing.assert_close(load_in_peft(make(), tmp_path)(x), model(x), atol=1e-6, rtol=1e-5)
    again = make()
    lorakit.load(again, tmp_path)
    assert torch.equal(again(x), model(x))
