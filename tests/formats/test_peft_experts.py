"""Experts of PEFT before 0.19.1, which treated every stack as (experts, in, out)."""

import json
import warnings
from pathlib import Path

import peft
import pytest
import safetensors.torch
import torch
from torch import nn

import lorakit
from folders import CONFIG, TENSORS
from models import train_a_little


class Experts(nn.Module):
    """Two stacks as transformers has them: up (experts, 2·inner, width), down (experts, width, inner)."""

    def __init__(self, width: int, inner: int, is_transposed: bool) -> None:
        super().__init__()
        up, down = (3, 2 * inner, width), (3, width, inner)
        if is_transposed:
            up, down = (3, width, 2 * inner), (3, inner, width)
        self.is_transposed = is_transposed
        self.gate_up_proj, self.down_proj = nn.Parameter(torch.randn(up)), nn.Parameter(torch.randn(down))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        up, down = (w.mT if self.is_transposed else w for w in (self.gate_up_proj, self.down_proj))
        return torch.relu(x @ up.mT)[..., : down.shape[-1]] @ down.mT


def make(width: int, inner: int, is_transposed: bool = False) -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({"experts": Experts(width, inner, is_transposed)})


def saved(tmp_path: Path, targets: list[str], version: str | None, by_peft: bool, turn: bool, *shape) -> torch.Tensor:
    """Write an adapter in today's layout or in PEFT's old one; return the outputs."""
    model = make(*shape)
    lorakit.attach(model, targets, rank=2, alpha=3)
    train_a_little(model)
    lorakit.save(model, tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    config |= ({"auto_mapping": None} if by_peft else {}) | ({"peft_version": version} if version else {})
    (tmp_path / CONFIG).write_text(json.dumps(config))
    if turn:
        # The old layout: A (experts·r, out) has B's columns, expert by expert, and B (in, r·experts) has A's rows.
        tensors = safetensors.torch.load_file(tmp_path / TENSORS)
        for path in {key.partition(".lora_")[0] for key in tensors}:
            A, B = tensors[f"{path}.lora_A.weight"], tensors[f"{path}.lora_B.weight"]
            by_expert = [(A[2 * e : 2 * e + 2], B[:, e::3]) for e in range(3)]
            tensors[f"{path}.lora_A.weight"] = torch.cat([b.T for _, b in by_expert])
            tensors[f"{path}.lora_B.weight"] = torch.stack([a.T for a, _ in by_expert], -1).flatten(1).contiguous()
        safetensors.torch.save_file(tensors, tmp_path / TENSORS)
    return model["experts"](torch.ones(2, shape[0])).detach()


BOTH = ["gate_up_proj", "down_proj"]
X = {5: torch.ones(2, 5), 6: torch.ones(2, 6)}


def outputs(tmp_path: Path, *shape) -> torch.Tensor:
    model = make(*shape)
    lorakit.load(model, tmp_path)
    return model["experts"](X[shape[0]]).detach()


@pytest.mark.parametrize("turn", [False, True])
@pytest.mark.parametrize("version", [None, "0.17.1", "0.18.0", "0.18.2.dev0", "0.19.0", "0.19.1", "0.21.2", "strange"])
def test_shapes_tell_the_layout_whatever_the_version(version: str | None, turn: bool, tmp_path: Path) -> None:
    expected = saved(tmp_path, BOTH, version, True, turn, 5, 6)
    torch.testing.assert_close(outputs(tmp_path, 5, 6), expected)


@pytest.mark.parametrize("turn", [False, True])
@pytest.mark.parametrize("version", ["0.18.1", "0.19.0", "0.21.2"])
def test_a_square_stack_is_as_the_others_of_its_file(version: str, turn: bool, tmp_path: Path) -> None:
    """inner = width: down is square, up is not."""
    expected = saved(tmp_path, BOTH, version, True, turn, 6, 6)
    torch.testing.assert_close(outputs(tmp_path, 6, 6), expected)


@pytest.mark.parametrize(
    ("version", "by_peft", "turn"),
    [
        ("0.17.1", True, True),
        ("0.18.0", True, True),
        ("0.18.1", True, True),
        ("0.18.1.dev0", True, True),
        (None, True, True),  # PEFT names its version since 0.18
        ("0.19.1", True, False),
        ("0.19.2.dev0@abc", True, False),
        ("0.20.0", True, False),
        ("1.0.0", True, False),
        (None, False, False),  # lorakit's own
    ],
)
def test_of_square_stacks_alone_the_version_tells(version, by_peft: bool, turn: bool, tmp_path: Path) -> None:
    expected = saved(tmp_path, ["down_proj"], version, by_peft, turn, 6, 6)
    torch.testing.assert_close(outputs(tmp_path, 6, 6), expected)


@pytest.mark.parametrize("version", ["0.18.2", "0.18.2.dev0", "0.19.0", "0.19.0.dev0", "unknown"])
def test_where_nothing_tells_it_is_refused(version: str, tmp_path: Path) -> None:
    saved(tmp_path, ["down_proj"], version, True, False, 6, 6)
    model = make(6, 6)
    with pytest.raises(ValueError, match=f"experts.down_proj: its matrices are square, and PEFT {version} is of the"):
        lorakit.load(model, tmp_path)
    assert torch.equal(model["experts"](X[6]), make(6, 6)["experts"](X[6]))


@pytest.mark.parametrize("version", ["0.18.0", "0.19.0", "0.21.2"])
@pytest.mark.parametrize("shape", [(5, 6), (6, 6)])
def test_what_is_stored_transposed_was_never_turned(version: str, shape: tuple[int, int], tmp_path: Path) -> None:
    expected = saved(tmp_path, BOTH, version, True, False, *shape, True)
    torch.testing.assert_close(outputs(tmp_path, *shape, True), expected)


def test_a_stack_that_fits_neither_way_is_a_misfit(tmp_path: Path) -> None:
    saved(tmp_path, BOTH, "0.18.0", True, True, 5, 6)
    with pytest.raises(ValueError, match=r"the layer needs \(3, 2, 6\) and \(3, 14, 2\)"):
        lorakit.load(make(6, 7), tmp_path)


def test_what_peft_makes_today_is_read_as_it_computes_it(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(r=2, target_modules=[], target_parameters=["down_proj"], init_lora_weights=False)
        theirs = peft.get_peft_model(Wrapped(), config).eval()
        theirs.save_pretrained(str(tmp_path))
    model = Wrapped()
    lorakit.load(model, tmp_path)
    torch.testing.assert_close(model(X[6]), theirs(X[6]))


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.experts = Experts(6, 6, False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.experts(x)
