"""Base + adapter, read back, equals the trained model, for every kind of buffer that the base has."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from torch import nn

import lorakit
import models

NORMS: dict[str, Callable[[], nn.Module]] = {
    "BatchNorm1d": lambda: nn.BatchNorm1d(6),
    "cumulative": lambda: nn.BatchNorm1d(6, momentum=None),
    "not affine": lambda: nn.BatchNorm1d(6, affine=False),
    "InstanceNorm1d": lambda: nn.InstanceNorm1d(6, track_running_stats=True),
    "SyncBatchNorm": lambda: nn.SyncBatchNorm(6),
    "a subclass": lambda: Activated(6),
    "spectral_norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Conv1d(6, 6, 1)),
}
every_norm = pytest.mark.parametrize("name", NORMS)


class Activated(nn.BatchNorm1d):
    """Like timm's norms: its own forward method reads `training`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert self.running_mean is not None and self.running_var is not None
        mean, var = (self.running_mean, self.running_var) if not self.training else (x.mean((0, 2)), x.var((0, 2)))
        if self.training:
            self.running_mean.lerp_(mean.detach(), 0.1), self.running_var.lerp_(var.detach(), 0.1)
        return ((x - mean[:, None]) / (var[:, None] + 1e-5).sqrt() * self.weight[:, None]).relu()


def made(name: str) -> nn.ModuleDict:
    torch.manual_seed(0)
    model = nn.ModuleDict({"conv": nn.Conv1d(4, 6, 3), "norm": NORMS[name](), "head": nn.Conv1d(6, 3, 1)})
    with torch.no_grad():
        for key, buffer in model.named_buffers():
            if "running_var" in key:
                buffer.uniform_(0.5, 2)
    return model


def run(model: nn.ModuleDict, x: torch.Tensor) -> torch.Tensor:
    return model["head"](model["norm"](model["conv"](x)))


def train(model: nn.ModuleDict) -> None:
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    for _ in range(4):
        optimizer.zero_grad()
        run(model, 3 + 2 * torch.randn(8, 4, 7)).square().mean().backward()
        optimizer.step()


@every_norm
@pytest.mark.parametrize("through_a_file", [False, True])
def test_a_frozen_base_stays_and_what_is_read_back_is_what_was_trained(
    name: str, through_a_file: bool, tmp_path: Path
) -> None:
    model, other, x = made(name), made(name), torch.randn(5, 4, 7)
    buffers = copy.deepcopy(dict(model.named_buffers()))
    lorakit.attach(model, ["conv", "head"], rank=2, alpha=4)
    train(model)
    assert all(torch.equal(buffer, buffers[key]) for key, buffer in model.named_buffers())
    if through_a_file:
        lorakit.save(model, tmp_path / "adapter")
        lorakit.load(other, tmp_path / "adapter")
    else:
        lorakit.insert(other, lorakit.extract(model))
    with torch.no_grad():
        in_training = run(model, x)
        torch.testing.assert_close(run(model.eval(), x), in_training)
        torch.testing.assert_close(run(other.eval(), x), in_training)
        lorakit.merge(model)
        torch.testing.assert_close(run(model, x), in_training)


@every_norm
@pytest.mark.parametrize("trained", ["", "norm"])
def test_detach_leaves_no_trace(name: str, trained: str) -> None:
    model, untouched = made(name), made(name)
    before = copy.deepcopy(model.state_dict())
    lorakit.attach(model, "conv", rank=2, also_train=[trained] if trained else [])
    train(model)
    lorakit.detach(model)
    state = model.state_dict()
    assert state.keys() == before.keys() and all(torch.equal(state[key], value) for key, value in before.items())
    assert [type(m).__name__ for m in model.modules()] == [type(m).__name__ for m in untouched.modules()]
    assert str(model) == str(untouched)
    assert model.training and all(module.training for module in model.modules())
    assert all(not module.training for module in model.eval().modules())


@every_norm
def test_a_norm_that_is_trained_whole_keeps_its_statistics_and_the_file_holds_them(name: str, tmp_path: Path) -> None:
    model = made(name)
    lorakit.attach(model, "conv", rank=2, also_train=["norm"])
    before = copy.deepcopy(dict(model["norm"].named_buffers()))
    x = torch.randn(5, 4, 7)
    with torch.no_grad():
        base = run(copy.deepcopy(model).eval(), x)
    train(model)
    moved = [key for key, buffer in model["norm"].named_buffers() if not torch.equal(buffer, before[key])]
    assert moved
    lorakit.save(model, tmp_path / "adapter")
    other = made(name)
    lorakit.load(other, tmp_path / "adapter")
    with torch.no_grad():
        live = run(model.eval(), x)
        torch.testing.assert_close(run(other.eval(), x), live)
        with lorakit.disabled(model):
            torch.testing.assert_close(run(model, x), base)
        torch.testing.assert_close(run(model, x), live)


def test_a_second_attach_may_train_a_norm_that_was_frozen() -> None:
    model = made("BatchNorm1d")
    lorakit.attach(model, "conv", rank=2)
    lorakit.attach(model, "head", rank=2, also_train=["norm"])
    before = model["norm"].running_mean.clone()
    train(model)
    assert not torch.equal(model["norm"].running_mean, before)


def test_without_freezing_the_statistics_move() -> None:
    model = made("BatchNorm1d")
    lorakit.attach(model, "conv", rank=2, freeze=False)
    before = model["norm"].running_mean.clone()
    train(model)
    assert not torch.equal(model["norm"].running_mean, before)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies(copier) -> None:
    model = made("BatchNorm1d")
    lorakit.attach(model, "conv", rank=2)
    other, x = copier(model).train(), torch.randn(5, 4, 7)
    assert torch.equal(run(other, x), run(model.eval(), x))
    lorakit.detach(other)
    assert type(other["norm"]) is nn.BatchNorm1d and other["norm"].training


def test_compiled_whole() -> None:
    model, x = models.conv_net().train(), torch.randn(2, 3, 16, 16)
    lorakit.attach(model, ["conv_pw", "conv_dw"], rank=2)
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))
    torch.testing.assert_close(model(x), model.eval()(x))


@pytest.mark.filterwarnings("ignore")
def test_peft_reads_the_statistics_of_a_norm_that_was_trained_whole(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.inner, self.norm, self.head = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.norm(self.inner(x)))

    model = Net()
    lorakit.attach(model, "inner", rank=2, also_train=["norm"])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(4):
        optimizer.zero_grad()
        model(3 + torch.randn(8, 4)).square().mean().backward()
        optimizer.step()
    lorakit.save(model, tmp_path / "adapter")
    theirs, x = peft.PeftModel.from_pretrained(Net(), tmp_path / "adapter").eval(), torch.randn(5, 4)
    with torch.no_grad():
        torch.testing.assert_close(theirs(x), model.eval()(x))
