"""An error in the middle leaves the model unchanged; `disabled` may be nested, in any order, from any thread."""

import copy
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import lorakit
import models
from models import train_a_little


class Failing(TorchDispatchMode):
    """The operation after `steps` others runs out of memory."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.steps -= 1
        if self.steps == -1:
            raise MemoryError("out of memory, as a test wants it")
        return func(*args, **(kwargs or {}))


def made() -> nn.Module:
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return nn.ModuleDict(
        {
            "embed": nn.Embedding(9, 8, padding_idx=0),
            "encoder": encoder,
            "conv": nn.Conv1d(8, 8, 3, padding=1),
            "norm": nn.BatchNorm1d(8),
            "head": nn.Linear(8, 3),
        }
    ).requires_grad_(True)


def state(model: nn.Module) -> list[Any]:
    """The full state of a model: classes, attributes, identities and bits of its tensors."""
    seen: list[Any] = []
    for name, module in model.named_modules():
        own = {key: value for key, value in module.__dict__.items() if not key.startswith("_")}
        seen.append((name, type(module), sorted(module.__dict__), own))
        tensors = {**module._parameters, **module._buffers}
        seen += [(key, id(t), None if t is None else (t.requires_grad, t.tolist())) for key, t in tensors.items()]
    return seen


ATTACHES: dict[str, Callable[[nn.Module], object]] = {
    "everything": lambda model: lorakit.attach(
        model, ["all-linear", "embed", "conv"], rank=2, bias="all", also_train=["norm"]
    ),
    "pissa": lambda model: lorakit.attach(model, ["head", "embed"], rank=2, init="pissa"),
    "olora, DoRA": lambda model: lorakit.attach(model, ["head", "linear1"], rank=2, init="olora", dora=True),
    "blocks": lambda model: lorakit.attach(model, ["head", "conv"], rank_pattern={"head": [1, 0, 2]}),
}


def fails_at_each_step(model: nn.Module, change: Callable[[nn.Module], object]) -> None:
    before, steps = state(model), 0
    while True:
        try:
            with Failing(steps):
                change(model)
            break
        except MemoryError:
            assert state(model) == before, f"after {steps} operations"
        steps += 1
    assert steps > 5 and state(model) != before


@pytest.mark.parametrize("name", ATTACHES)
def test_attach_that_runs_out_of_memory_at_any_step(name: str) -> None:
    model = made()
    fails_at_each_step(model, ATTACHES[name])
    lorakit.detach(model)
    assert state(model) == state_with_ids_of(model)


def state_with_ids_of(model: nn.Module) -> list:
    """The state of a new model, with the identities of the tensors of `model`."""
    fresh = state(made())
    return [(own[0], mine[1], own[2]) if len(own) == 3 else own for own, mine in zip(fresh, state(model), strict=True)]


def test_a_second_attach_that_fails_keeps_the_first() -> None:
    model = made()
    lorakit.attach(model, "head", rank=2, also_train=["norm"])
    train = [parameter.requires_grad for parameter in model.parameters()]
    fails_at_each_step(model, lambda model: lorakit.attach(model, ["conv", "in_proj_weight"], rank=2, bias="all"))
    assert train.count(True) == 4
    assert {name for name, module in model.named_modules() if isinstance(module, lorakit.LoRALayer)} >= {"head"}


@pytest.mark.parametrize("filled", ["a plain model", "an adapted one", "a merged one"])
def test_insert_that_runs_out_of_memory_at_any_step(filled: str) -> None:
    source, model = made(), made()
    for own in (source, model) if filled != "a plain model" else (source,):
        ATTACHES["everything"](own)
    train_a_little_by_hand(source)
    if filled == "a merged one":
        lorakit.merge(model)
    adapter = lorakit.extract(source)
    fails_at_each_step(model, lambda model: lorakit.insert(model, adapter))
    again = lorakit.extract(model)
    assert all(torch.equal(again.updates[name].B, update.B) for name, update in adapter.updates.items())
    assert all(torch.equal(again.trained[name], value) for name, value in adapter.trained.items())


def train_a_little_by_hand(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))


@pytest.mark.parametrize("function", ["create_update", "choose_trainable", "_report", "remember"])
def test_errors_of_any_other_kind(function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from lorakit.core import attach as module
    from lorakit.core.adapted import AdaptedLayer

    calls = []

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2 or function != "create_update":
            raise KeyboardInterrupt("stopped")
        return real(*args, **kwargs)

    owner = AdaptedLayer if function == "create_update" else module
    real = getattr(owner, function)
    monkeypatch.setattr(owner, function, failing)
    model = made()
    before = state(model)
    with pytest.raises(KeyboardInterrupt, match="stopped"):
        lorakit.attach(model, ["head", "conv"], rank=2)
    assert state(model) == before


# --- disabled ------------------------------------------------------------------------------------------------------

TOKENS = torch.arange(14).view(2, 7)


class Adapted:
    """A model with an adapter and a trained head, its base outputs, and its own."""

    def __init__(self, merged: bool) -> None:
        self.model = models.bert()
        self.base = self.model(TOKENS).logits.detach()
        lorakit.attach(self.model, also_train=["classifier"], rank=2)
        train_a_little(self.model)
        self.before = copy.deepcopy(self.model.state_dict())
        if merged:
            lorakit.merge(self.model)
        with torch.no_grad():
            self.own = self.model(TOKENS).logits

    def is_base(self) -> bool:
        with torch.no_grad():
            return torch.equal(self.model(TOKENS).logits, self.base)

    def is_itself(self) -> bool:
        state = self.model.state_dict()
        assert state.keys() == self.before.keys()
        with torch.no_grad():
            return torch.equal(self.model(TOKENS).logits, self.own) and all(
                torch.equal(state[name], value) for name, value in self.before.items()
            )


@pytest.mark.parametrize("merged", [False, True])
def test_disabled_inside_disabled(merged: bool) -> None:
    adapted = Adapted(merged)
    with lorakit.disabled(adapted.model):
        with lorakit.disabled(adapted.model):
            assert adapted.is_base()
            with lorakit.disabled(adapted.model.bert.encoder):
                assert adapted.is_base()
            assert adapted.is_base()
        assert adapted.is_base()
        with pytest.raises(KeyError, match="inner"), lorakit.disabled(adapted.model):
            raise KeyError("inner")
        assert adapted.is_base()
    assert adapted.is_itself()
    assert all(layer.merged == merged for layer in adapted.model.modules() if isinstance(layer, lorakit.LoRALayer))


def test_disabled_for_a_part_and_then_for_the_whole() -> None:
    adapted = Adapted(False)
    with lorakit.disabled(adapted.model.classifier):
        assert not adapted.is_base()
        with lorakit.disabled(adapted.model):
            assert adapted.is_base()
        assert not adapted.is_base()
    assert adapted.is_itself()


@pytest.mark.parametrize("merged", [False, True])
def test_generators_leave_in_any_order(merged: bool) -> None:
    adapted = Adapted(merged)

    def answers():
        with lorakit.disabled(adapted.model):
            yield adapted.is_base()

    first, second = answers(), answers()
    assert next(first) and next(second)
    first.close()
    assert adapted.is_base()
    second.close()
    assert adapted.is_itself()


@pytest.mark.parametrize("merged", [False, True])
def test_threads_enter_and_leave_at_any_time(merged: bool) -> None:
    adapted, seen = Adapted(merged), []

    def ask(count: int) -> None:
        for _ in range(count):
            with lorakit.disabled(adapted.model):
                seen.append(adapted.is_base())

    threads = [threading.Thread(target=ask, args=(6,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 24 and all(seen)
    assert adapted.is_itself()


def test_what_is_asked_of_the_layers_inside_happens_afterwards() -> None:
    model = nn.Sequential(lorakit.Linear(4, 3, r=2))
    nn.init.normal_(model[0].lora_B)
    x = torch.randn(2, 4)
    base = nn.functional.linear(x, model[0].weight, model[0].bias)
    with torch.no_grad():
        own = model(x)
        with lorakit.disabled(model):
            model.eval()
            assert torch.equal(model(x), base) and not model[0].merged
            model.double().float()
        assert model[0].merged
        torch.testing.assert_close(model(x), own)
        with lorakit.disabled(model):
            model.train()
            model.double().float()
        assert not model[0].merged and torch.equal(model(x), own)


def test_what_is_saved_inside_is_what_was_trained() -> None:
    adapted = Adapted(False)
    outside = lorakit.extract(adapted.model)
    with lorakit.disabled(adapted.model):
        inside = lorakit.extract(adapted.model)
    assert outside.trained.keys() == inside.trained.keys() == {"classifier.weight", "classifier.bias"}
    assert all(torch.equal(inside.trained[name], value) for name, value in outside.trained.items())


def test_detached_inside() -> None:
    adapted = Adapted(False)
    with lorakit.disabled(adapted.model):
        lorakit.detach(adapted.model)
        assert adapted.is_base()
    assert adapted.is_base()
    assert not any(isinstance(module, lorakit.LoRALayer) for module in adapted.model.modules())


# --- modules that were replaced ------------------------------------------------------------------------------------


@pytest.mark.parametrize("made_by", ["attach", "insert"])
@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize(
    "use",
    [lorakit.extract, lorakit.merge, lambda model: lorakit.save(model, "nowhere")],
    ids=["extract", "merge", "save"],
)
def test_an_adapted_module_that_was_replaced_is_named(use, copied: bool, made_by: str) -> None:
    model = made()
    lorakit.attach(model, ["head", "conv"], rank=2)
    if made_by == "insert":
        adapter, model = lorakit.extract(model), made()
        lorakit.insert(model, adapter)
    model = copy.deepcopy(model) if copied else model
    model["head"] = nn.Linear(8, 3)
    with pytest.raises(ValueError, match=r"updates are lost: head \(now a Linear\).*resize_token_embeddings"):
        use(model)
    lorakit.attach(model, "head", rank=2)
    lorakit.extract(model)
    lorakit.detach(model)
    assert not any("_lorakit" in key for module in model.modules() for key in module.__dict__)


def test_modules_taken_out_moved_or_detached_are_not_replaced() -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
    lorakit.attach(model, rank=2)
    lorakit.detach(model[1])
    del model[3]
    model[0], model[2] = model[2], model[0]
    assert set(lorakit.extract(nn.ModuleDict({"wrapped": model})).updates) == {"wrapped.0", "wrapped.2"}
    model[0] = lorakit.Linear(4, 4, r=2)  # adapted too
    lorakit.merge(model)


@pytest.mark.parametrize("also_train", [(), ("1",)])
def test_nothing_is_loaded_inside_disabled(also_train: tuple[str, ...], tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    lorakit.attach(model, "0", rank=2, also_train=also_train)
    with torch.no_grad():
        model[1].bias += 1 if also_train else 0
    lorakit.save(model, tmp_path)
    x = torch.randn(3, 4)
    expected = model(x)
    with lorakit.disabled(model), pytest.raises(ValueError, match="inside lorakit.disabled"):
        lorakit.load(model, tmp_path)
    torch.testing.assert_close(model(x), expected)
