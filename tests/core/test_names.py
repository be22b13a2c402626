"""An adapter's names are those of the plain model, with every kind of wrapper."""

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import lorakit
from lorakit.core import names
from models import train_a_little


def plain() -> nn.Module:
    torch.manual_seed(0)
    inner = nn.Sequential(OrderedDict(first=nn.Linear(8, 8), act=nn.Tanh()))
    return nn.Sequential(OrderedDict(body=inner, middle=nn.Linear(8, 8), head=nn.Linear(8, 4))).eval()


def part_compiled(model: nn.Module) -> nn.Module:
    model.body = torch.compile(model.body, backend="eager")  # type: ignore[assignment]
    return model


def parts_checkpointed(model: nn.Module) -> nn.Module:
    model.body.first = checkpoint_wrapper(model.body.first)
    model.body = checkpoint_wrapper(model.body)
    model.head = checkpoint_wrapper(model.head)
    return model


class LikeFSDP(nn.Module):
    """Names as FullyShardedDataParallel makes them, without processes to shard over."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._fsdp_wrapped_module = module

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("_fsdp_wrapped_module"), name)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._fsdp_wrapped_module(x)


def parts_sharded(model: nn.Module) -> nn.Module:
    model.body = LikeFSDP(model.body)
    return LikeFSDP(model)


WRAPPED = {
    "torch.compile": lambda model: torch.compile(model, backend="eager"),
    "torch.compile of a part": part_compiled,
    "checkpointing of parts": parts_checkpointed,
    "DataParallel": nn.DataParallel,
    "FSDP": parts_sharded,
    "torch.compile of checkpointing": lambda model: torch.compile(parts_checkpointed(model), backend="eager"),
    "DataParallel of FSDP of checkpointing": lambda model: nn.DataParallel(parts_sharded(parts_checkpointed(model))),
}
TARGETS = ["body.first", "middle"]


@pytest.fixture(autouse=True)
def nothing_compiled() -> None:
    """torch limits how often it compiles a function, and these models share one."""
    torch._dynamo.reset()


SETTINGS: dict[str, Any] = dict(rank=2, alpha=4, also_train=["head"], bias="all")


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
@pytest.mark.parametrize(
    "targets",
    [TARGETS, ["body.*", "middle"], lambda module, name: name in TARGETS],
    ids=["names", "globs", "a function"],
)
@pytest.mark.parametrize("file", ["adapter", "adapter.pt"])
def test_saved_names_are_the_plain_models_and_both_directions_load(wrap, targets, file: str, tmp_path: Path) -> None:
    model, x = wrap(plain()), torch.randn(3, 8)
    report = lorakit.attach(model, targets, **SETTINGS)
    assert [row.name for row in report.rows] == TARGETS
    train_a_little(model)
    expected = model(x).detach()
    assert (expected - plain()(x)).abs().max() > 0.01
    lorakit.save(model, tmp_path / file)

    unwrapped = plain()
    lorakit.attach(unwrapped, TARGETS, **SETTINGS)
    lorakit.save(unwrapped, tmp_path / "of_the_plain_model")
    if file == "adapter":
        saved, same = (
            load_file(tmp_path / name / "adapter_model.safetensors") for name in (file, "of_the_plain_model")
        )
        assert saved.keys() == same.keys()
    for target in (plain(), wrap(plain())):  # a plain one, and one wrapped before it is adapted
        lorakit.load(target, tmp_path / file, alpha=4)
        torch.testing.assert_close(target(x), expected)
        lorakit.merge(target)
        torch.testing.assert_close(target(x), expected, atol=1e-5, rtol=1e-5)
        lorakit.detach(target)
    lorakit.load(model, tmp_path / "of_the_plain_model")
    torch.testing.assert_close(model(x), plain()(x))


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_a_wrapped_model_gives_loralibs_state_by_plain_names(wrap) -> None:
    model = plain()
    lorakit.attach(model, TARGETS, **SETTINGS)
    expected = lorakit.lora_state_dict(model, bias="all")
    wrapped = wrap(model)
    found = lorakit.lora_state_dict(wrapped, bias="all")
    assert found.keys() == expected.keys()
    assert {"body.first.lora_A", "middle.bias", "head.bias"} <= found.keys()
    lorakit.mark_only_lora_as_trainable(wrapped)
    assert {names.unwrapped_name(name) for name, p in names.named_parameters(wrapped) if p.requires_grad} == {
        *("body.first.lora_A", "body.first.lora_B", "middle.lora_A", "middle.lora_B")
    }


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_detach_gives_a_wrapped_model_back(wrap) -> None:
    model = wrap(plain())
    before, values = str(model), {name: p.clone() for name, p in names.named_parameters(model)}
    lorakit.attach(model, TARGETS, **SETTINGS)
    train_a_little(model)
    lorakit.detach(model)
    assert str(model) == before
    assert all(torch.equal(p, values[name]) for name, p in names.named_parameters(model))


def test_a_child_called_module_is_no_wrapper() -> None:
    model = nn.ModuleDict({"module": nn.Linear(4, 4)})
    assert names.unwrapped(model) is model
    assert [name for name, _ in names.named_modules(model)] == ["", "module"]


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_a_wrapped_model_is_diagnosed_and_detach_leaves_no_trace(wrap) -> None:
    inner = plain()
    inner.append(nn.BatchNorm1d(4, affine=False))
    model = wrap(inner)
    lorakit.attach(model, TARGETS, rank=2)
    norm = list(names.unwrapped(model).children())[-1]
    norm.running_mean += 1
    assert [name.rpartition(".")[2] for name in lorakit.diagnose(model).moved] == ["running_mean"]
    lorakit.detach(model)
    assert [key for module in model.modules() for key in module.__dict__ if "lorakit" in key] == []
