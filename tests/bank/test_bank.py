"""`Bank`: one adapter in use, a sum, none; names; what stays on the model and what does not."""

from __future__ import annotations

import copy
import gc
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

import lorakit
from kinds import adapted as adapted_kind
from kinds import every_kind, given
from models import bert, conv_net, gpt2, llama, trainable_names

F64 = torch.float64
IDS = torch.randint(0, 64, (4, 7), generator=torch.Generator().manual_seed(5))
SETTINGS = {
    "wide": lorakit.LoRASettings("all-linear", rank=3, alpha=5),
    "dora": lorakit.LoRASettings(["q_proj", "down_proj"], rank=2, dora=True),
    "head": lorakit.LoRASettings(["q_proj", "embed_tokens", "lm_head"], rank=7, rslora=True, init="gaussian"),
}


def randomise(parameters: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


def made() -> tuple[nn.Module, lorakit.Bank]:
    model = llama().double()
    bank = lorakit.Bank(model)
    for seed, (name, settings) in enumerate(SETTINGS.items()):
        bank[name] = settings
        randomise(bank.parameters(name), seed)
    return model, bank


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def alone(adapter: lorakit.Adapter) -> Tensor:
    """What a fresh model gives with this adapter, by `insert`."""
    model = llama().double()
    lorakit.insert(model, adapter)
    return logits(model)


def test_each_name_gives_what_a_model_of_its_own_gives() -> None:
    model, bank = made()
    base = logits(llama().double())
    adapters = {name: bank[name] for name in bank}
    assert torch.equal(logits(model), base)
    for name in (*SETTINGS, None, "wide", None):
        bank.use(name)
        assert bank.used == name
        wanted = base if name is None else alone(adapters[name])
        assert torch.equal(logits(model), wanted)
        assert name is None or (wanted - base).abs().max() > 0.01


def test_a_weighted_sum_is_the_sum_of_the_updates_as_matrices() -> None:
    model, bank = made()
    weights = {"wide": 0.7, "head": -1.3}
    bank.use(weights)
    got, plain = logits(model), llama().double()
    with torch.no_grad():
        for name, weight in weights.items():
            for module, update in bank[name].updates.items():
                delta = weight * update.scale * update.B @ update.A
                plain.get_submodule(module).weight += delta.T if module.endswith("embed_tokens") else delta
    torch.testing.assert_close(got, logits(plain), rtol=0, atol=1e-11)
    with pytest.raises(lorakit.LoraError, match="is a DoRA update: its magnitudes do not add up"):
        bank.use({"wide": 1.0, "dora": 1.0})
    assert bank.used == weights and torch.equal(logits(model), got)


def test_the_model_is_the_base_bit_for_bit_when_no_adapter_is_used() -> None:
    model, bank = made()
    plain = llama().double()
    bank.use("dora")
    lorakit.merge(model)
    bank.use(None)
    assert {name: type(module) for name, module in model.named_modules()} == {
        name: type(module) for name, module in plain.named_modules()
    }
    assert trainable_names(model) == trainable_names(plain)
    ours, theirs = model.state_dict(), plain.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_what_works_with_one_adapter_works_with_the_one_in_use(tmp_path: Path) -> None:
    model, bank = made()
    bank.use("dora")
    expected = logits(model)
    lorakit.merge(model)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-11)
    bank.use("wide")  # leaves nothing of the merge behind
    assert torch.equal(logits(model), alone(bank["wide"]))
    with lorakit.disabled(model):
        assert torch.equal(logits(model), logits(llama().double()))
        with pytest.raises(lorakit.LoraError, match="inside lorakit.disabled"):
            bank.use(None)
    lorakit.save(model, tmp_path / "saved")
    bank["dora"].save(tmp_path / "other")
    again = llama().double()
    lorakit.load(again, tmp_path / "saved")
    assert torch.equal(logits(again), logits(model))
    bank["again"] = tmp_path / "other"
    bank.use("again")
    assert torch.equal(logits(model), expected)


def test_an_optimizer_stays_right_while_its_adapter_is_off() -> None:
    model, bank = made()
    parameters = bank.parameters("wide")
    bank.use("wide")
    assert {id(own) for own in parameters} == {id(own) for own in model.parameters() if own.requires_grad}
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    before = bank["wide"]
    bank.use(None)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    bank.use("wide")
    for name, update in bank["wide"].updates.items():
        torch.testing.assert_close(update.A, before.updates[name].A - 0.1)


@pytest.mark.parametrize("tied", [False, True])
def test_what_of_the_base_is_trained_is_what_it_was_before(tied: bool) -> None:
    """Whoever freezes or unfreezes the base between two uses finds it so again, and with an adapter it is frozen."""
    torch.manual_seed(0)
    model = llama(tie_word_embeddings=tied)
    bank = lorakit.Bank(model)
    bank["a"] = lorakit.LoRASettings("q_proj", rank=2)
    bank["b"] = lorakit.LoRASettings("v_proj", rank=2, also_train="lm_head")
    bank["c"] = lorakit.LoRASettings("v_proj", rank=2, bias="all")
    base = dict(model.named_parameters())
    trained = {"a": set(), "b": {"lm_head.weight"}, "c": set()}
    for norm, rest in ((True, False), (False, False), (True, True), (False, True)):
        model.requires_grad_(rest)
        base["model.norm.weight"].requires_grad = norm
        before = {name: own.requires_grad for name, own in base.items()}
        for name in bank:
            bank.use(name)
            found = {other for other, own in model.named_parameters() if own.requires_grad and "lora_" not in other}
            assert found == trained[name]
            assert {id(own) for own in bank.parameters(name)} == {
                id(own) for own in model.parameters() if own.requires_grad
            }
            bank.use(None)
            assert {other: own.requires_grad for other, own in model.named_parameters()} == before
        with bank.rows(["a", "a"]):
            assert not any(own.requires_grad for own in model.parameters())
        assert {name: own.requires_grad for name, own in model.named_parameters()} == before
        assert len(bank.parameters("b")) == 2 * len(bank.adaptation("b").layers()) + 1


def test_layers_of_one_that_is_off_have_nothing_of_the_one_in_use() -> None:
    """PiSSA's constant factors, and dropout that is a module for one and none for the other."""
    bank = lorakit.Bank(llama().double())
    bank["plain"] = lorakit.LoRASettings("q_proj", rank=2)
    bank["dropped"] = lorakit.LoRASettings("q_proj", rank=2, dropout=0.3)
    bank["pissa"] = lorakit.LoRASettings("q_proj", rank=2, init="pissa")
    for seed, name in enumerate(bank):
        randomise(bank.parameters(name), seed)
    expected = {name: bank[name].updates for name in bank}
    rates = {"plain": 0.0, "dropped": 0.3, "pissa": 0.0}
    for used in (*bank, None):
        bank.use(used)
        for name in bank:
            for module, layer in bank.adaptation(name).layers().items():
                update, right = layer.to_update(), expected[name][module]
                assert torch.equal(update.B @ update.A, right.B @ right.A) and update.scale == right.scale
                assert getattr(layer.lora_dropout, "p", 0.0) == rates[name]


def test_modules_trained_whole_and_biases_come_and_go_with_their_adapter() -> None:
    model, plain = bert(), bert()
    tokens = IDS[:, :5]
    bank = lorakit.Bank(model)
    for seed, name in enumerate(("one", "two")):
        bank[name] = lorakit.LoRASettings(["query"], rank=2, bias="all", also_train="classifier")
        bank.use(name)
        randomise(bank.parameters(name), seed)
        assert {id(own) for own in bank.parameters(name)} == {
            id(own) for own in model.parameters() if own.requires_grad
        }
    for name in ("one", "two", "one"):
        bank.use(name)
        other = bert()
        lorakit.insert(other, bank[name])
        assert torch.equal(model(tokens).logits, other(tokens).logits)
    assert not torch.equal(bank["one"].trained["classifier.weight"], bank["two"].trained["classifier.weight"])
    bank.use(None)
    assert torch.equal(model(tokens).logits, plain(tokens).logits)
    assert len(bank.parameters("one")) == len({id(own) for own in bank.parameters("one")}) > 6
    with (
        pytest.raises(lorakit.LoraError, match=r"'one' has tensors trained whole .* which all rows share"),
        bank.rows(["one"]),
    ):
        pass


def test_parameters_that_are_read_come_and_go_too() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).double().eval()
    x = torch.randn(2, 3, 8, dtype=F64)
    base = layer(x)
    bank = lorakit.Bank(layer)
    bank["a"] = lorakit.LoRASettings(["self_attn", "linear1"], rank=2)
    randomise(bank.parameters("a"), 1)
    bank.use("a")
    other = copy.deepcopy(layer)
    used = layer(x)
    bank.use(None)
    assert torch.equal(layer(x), base) and not torch.allclose(used, base)
    bank.use("a")
    assert torch.equal(layer(x), used) and torch.equal(other(x), used)
    message = "self_attn.out_proj is a parameter that the model reads"
    with pytest.raises(lorakit.LoraError, match=message), bank.rows(["a", None]):
        pass


@every_kind
def test_every_kind_of_layer_is_taken_off_and_put_back(kind: str) -> None:
    adapted = adapted_kind(kind)
    x = given(kind)
    expected, adapter = adapted(x), lorakit.extract(adapted)
    bank = lorakit.Bank(adapted)  # the adapter that is there is "default"
    assert bank.used == "default" and list(bank) == ["default"] and torch.equal(adapted(x), expected)
    bank["again"] = adapter
    bank.use(None)
    base = adapted(x)
    for name in ("again", "default"):
        bank.use(name)
        torch.testing.assert_close(adapted(x), expected, rtol=0, atol=1e-12)
        assert not torch.allclose(base, expected)


def test_frozen_statistics_move_with_the_adapter() -> None:
    net = conv_net().double()
    bank = lorakit.Bank(net)
    bank["a"] = lorakit.LoRASettings("conv_pw", rank=1)
    bank.use("a")
    net.train()
    x = torch.randn(2, 3, 8, 8, dtype=F64)
    before = {name: own.clone() for name, own in net.named_buffers()}
    net(x)
    with bank.rows(["a", None]):
        net(x)
    after = dict(net.named_buffers())
    assert all(torch.equal(before[name], after[name]) for name in before)
    bank.use(None)
    net(x)
    assert not all(torch.equal(before[name], after[name]) for name in before)


def test_problem_36_wrong_names_say_what_there_is() -> None:
    _, bank = made()
    for wrong in (
        lambda: bank["wdie"],
        lambda: bank.use("wdie"),
        lambda: bank.parameters("wdie"),
        lambda: bank.pop("wdie"),
    ):
        with pytest.raises(
            lorakit.LoraError, match="no adapter 'wdie', it has 'wide', 'dora', 'head'. Did you mean 'wide'"
        ):
            wrong()
    with pytest.raises(lorakit.LoraError, match="no adapter 'wdie'"), bank.rows(["wide", "wdie"]):
        pass
    with pytest.raises(lorakit.LoraError, match="'' is no name for an adapter"):
        bank[""] = SETTINGS["wide"]
    with pytest.raises(lorakit.LoraError, match="expected a name, or None, for each row"), bank.rows([]):
        pass
    assert bank.used is None


def test_an_adapter_that_does_not_fit_changes_nothing() -> None:
    model, bank = made()
    bank.use("wide")
    expected = logits(model)
    other = gpt2()
    lorakit.attach(other, "all-linear", rank=2)
    with pytest.raises(lorakit.LoraError, match="does not fit LlamaForCausalLM"):
        bank["other"] = lorakit.extract(other)
    assert list(bank) == list(SETTINGS) and bank.used == "wide" and torch.equal(logits(model), expected)


def test_deleting_and_replacing_the_one_in_use() -> None:
    model, bank = made()
    bank.use("head")
    bank["head"] = bank["wide"]
    assert torch.equal(logits(model), alone(bank["wide"]))
    del bank["head"]
    assert list(bank) == ["wide", "dora"] and torch.equal(logits(model), logits(llama().double()))


@pytest.mark.parametrize("options", [{}, {"rank": 8, "room": 4}], ids=str)
def test_disabled_is_the_base_in_rows_too(options: dict[str, int]) -> None:
    model = llama().double()
    bank = lorakit.Bank(model, **options)
    bank["wide"] = SETTINGS["wide"]
    randomise(bank.parameters("wide"), 1)
    base = logits(llama().double())
    bank.use("wide")
    used = logits(model)
    with lorakit.disabled(model):
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), used) and not torch.equal(used, base)
    with bank.rows(["wide", None, "wide", "wide"]):
        with lorakit.disabled(model):
            assert torch.equal(logits(model), base)
        assert not torch.equal(logits(model), base)


@pytest.mark.parametrize("options", [{}, {"rank": 8, "room": 4}], ids=str)
def test_the_one_in_use_stays_in_use_while_others_come_and_go(options: dict[str, int]) -> None:
    model = llama().double()
    bank = lorakit.Bank(model, **options)
    bank["wide"] = SETTINGS["wide"]
    randomise(bank.parameters("wide"), 1)
    bank.use("wide")
    used = logits(model)
    assert not torch.equal(used, logits(llama().double()))
    bank["head"] = SETTINGS["head"]
    torch.testing.assert_close(logits(model), used, rtol=0, atol=1e-12)
    del bank["head"]
    torch.testing.assert_close(logits(model), used, rtol=0, atol=1e-12)
    assert bank.used == "wide"


def test_an_adapter_that_was_baked_or_detached_is_no_longer_in_use() -> None:
    model, bank = made()
    bank.use("wide")
    lorakit.bake(model)
    baked = logits(model)
    assert bank.used is None
    assert len(bank["wide"].updates) == 14
    assert torch.equal(logits(model), baked)
    bank.use("dora")
    lorakit.detach(model)
    assert bank.used is None and torch.equal(logits(model), baked)
    bank.use("dora")
    assert not torch.equal(logits(model), baked)
    bank.clear()
    assert len(bank) == 0 and torch.equal(logits(model), baked)


def test_room_and_rank_are_kept() -> None:
    bank = lorakit.Bank(llama(), rank=4, room=2)
    bank["a"] = lorakit.LoRASettings("q_proj", rank=4)
    with pytest.raises(
        lorakit.LoraError, match="'b' has rank 5 in model.layers.0.self_attn.q_proj; the bank was made for rank=4"
    ):
        bank["b"] = lorakit.LoRASettings("q_proj", rank=5)
    bank["b"] = lorakit.LoRASettings("k_proj", rank=1)
    with pytest.raises(lorakit.LoraError, match="no room for 'c': the bank holds 2 adapters"):
        bank["c"] = lorakit.LoRASettings("k_proj", rank=1)
    bank["b"] = lorakit.LoRASettings("v_proj", rank=2)
    assert list(bank) == ["a", "b"]
    with pytest.raises(lorakit.LoraError, match="give both, or neither"):
        lorakit.Bank(llama(), rank=4)


def test_a_hundred_swaps_hold_memory_flat() -> None:
    model, bank = made()

    def held() -> int:
        gc.collect()
        tensors = {
            own.untyped_storage().data_ptr(): own.untyped_storage().nbytes()
            for own in gc.get_objects()
            if type(own) in (Tensor, nn.Parameter) and not is_lazy(own)
            if own.device.type == "cpu" and own.layout is torch.strided
        }
        return sum(tensors.values())

    def swap(turn: int) -> None:
        bank["guest"] = lorakit.LoRASettings(["q_proj", "v_proj"][turn % 2 :], rank=1 + turn % 5)
        bank.use("guest" if turn % 3 else {"wide": 0.5, "guest": turn + 1.0})
        with bank.rows(["wide", "guest", None, "wide"]), torch.no_grad():
            model(IDS)

    for turn in range(5):
        swap(turn)
    before = held()
    for turn in range(5, 125):  # ends as the first five do
        swap(turn)
    assert held() <= before


def test_off_the_model_an_adapter_follows_it_to_another_device() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    bank = lorakit.Bank(model)
    bank["a"] = lorakit.LoRASettings(["0", "1"], rank=1)
    model.to("meta")
    bank.use("a")
    assert {own.device.type for own in model.parameters()} == {"meta"}
