"""A batch whose rows have adapters of their own: equal to each row alone, forward, backward and in training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from measure import kept_bytes
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lorakit
from models import conv_net, gpt2, llama, qwen_moe
from quantised import BASES

F64 = torch.float64
IDS = torch.randint(0, 64, (6, 7), generator=torch.Generator().manual_seed(5))
NAMES = ["a", "b", None, "a", "c", "b"]

# name → a layer, the shape of its input for six rows, attach's settings of three adapters
KINDS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[dict, dict, dict]]] = {
    "linear": (lambda: nn.Linear(5, 4), (6, 3, 5), ({"rank": 2}, {"rank": 3, "alpha": 1}, {"rank": 1, "rslora": True})),
    "one position": (lambda: nn.Linear(5, 4, bias=False), (6, 5), ({"rank": 2}, {"rank": 1}, {"rank": 3})),
    "two rows for each": (
        lambda: nn.Linear(5, 4),
        (12, 2, 5),
        ({"rank": 2}, {"rank": 1}, {"init": "pissa", "rank": 2}),
    ),
    "Conv1D": (lambda: Conv1D(4, 5), (6, 3, 5), ({"rank": 2}, {"rank": 1}, {"rank": 3})),
    "fused": (
        lambda: nn.Linear(5, 6),
        (6, 3, 5),
        ({"rank_pattern": {"0": [2, 0, 1]}}, {"rank": 2}, {"rank_pattern": {"0": [0, 3]}}),
    ),
    "weight_norm": (
        lambda: torch.nn.utils.parametrizations.weight_norm(nn.Linear(5, 4)),
        (6, 3, 5),
        ({"rank": 2}, {"rank": 1}, {"rank": 3}),
    ),
    "embedding": (lambda: nn.Embedding(7, 4), (6, 3), ({"rank": 2}, {"rank": 1}, {"rank": 3})),
    "padded embedding": (lambda: nn.Embedding(7, 4, padding_idx=2), (6, 3), ({"rank": 2}, {"rank": 1}, {"rank": 3})),
    "conv1d": (lambda: nn.Conv1d(3, 4, 3, padding=1), (6, 3, 8), ({"rank": 2}, {"rank": 1}, {"rank": 3})),
    "conv2d": (
        lambda: nn.Conv2d(3, 4, (3, 2), stride=2, padding=(1, 0)),
        (12, 3, 6, 5),
        ({"rank": 2}, {"rank": 1}, {"rank": 3}),
    ),
    "circular conv2d": (
        lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"),
        (6, 3, 4, 4),
        ({"rank": 2}, {"rank": 1}, {"rank": 3}),
    ),
    "grouped conv2d": (
        lambda: nn.Conv2d(4, 6, 3, groups=2, dilation=2),
        (6, 4, 7, 7),
        ({"rank": 2}, {"rank": 1}, {"rank": 3}),
    ),
    "conv3d": (lambda: nn.Conv3d(2, 4, 2), (6, 2, 3, 3, 3), ({"rank": 2}, {"rank": 1}, {"rank": 3})),
}


def randomise(parameters: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def filled(model: nn.Module, settings: dict[str, lorakit.LoRASettings], **options: Any) -> lorakit.Bank:
    bank = lorakit.Bank(model, **options)
    for seed, (name, own) in enumerate(settings.items()):
        torch.manual_seed(seed)
        bank[name] = own
        randomise(bank.parameters(name), seed)
    return bank


def three() -> dict[str, lorakit.LoRASettings]:
    """Unlike ranks, scales and targets."""
    return {
        "a": lorakit.LoRASettings("all-linear", rank=2, alpha=3),
        "b": lorakit.LoRASettings(["q_proj", "embed_tokens", "lm_head"], rank=5),
        "c": lorakit.LoRASettings(["v_proj", "down_proj"], rank=3, rslora=True),
    }


def gradients(bank: lorakit.Bank) -> dict[str, list[Tensor | None]]:
    return {name: [own.grad for own in bank.parameters(name)] for name in bank}


def forget(bank: lorakit.Bank) -> None:
    for name in bank:
        for parameter in bank.parameters(name):
            parameter.grad = None


@pytest.mark.parametrize("kind", KINDS)
def test_problem_36_each_row_is_what_its_adapter_gives_alone(kind: str) -> None:
    """The output, the gradient of the input and that of each adapter, in float64."""
    torch.manual_seed(0)
    make, shape, settings = KINDS[kind]
    model = nn.Sequential(make()).double()
    bank = filled(model, {name: lorakit.LoRASettings("0", **own) for name, own in zip("abc", settings, strict=True)})
    x = torch.randint(0, 7, shape) if "embedding" in kind else torch.randn(shape, dtype=F64, requires_grad=True)
    each = len(x) // len(NAMES)
    inputs = [x] if x.requires_grad else []

    rows, expected = [], []
    forget(bank)
    for index, name in enumerate(NAMES):
        bank.use(name)
        y = model(x[index * each : (index + 1) * each])
        if wanted := [*inputs, *(bank.parameters(name) if name else [])]:
            y.sin().sum().backward(inputs=wanted)
        rows.append(y.detach())
    expected = [own.grad for own in (*inputs, *(p for name in bank for p in bank.parameters(name)))]
    x.grad = None
    forget(bank)
    bank.use(None)
    with bank.rows(NAMES):
        together = model(x)
        together.sin().sum().backward()
        with torch.no_grad():
            assert torch.equal(model(x), model(x))
            torch.testing.assert_close(model(x), torch.cat(rows), rtol=0, atol=1e-12)
    torch.testing.assert_close(together, torch.cat(rows), rtol=0, atol=1e-12)
    found = [own.grad for own in (*inputs, *(p for name in bank for p in bank.parameters(name)))]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    "base", [own for own in BASES if own.name in ("bitsandbytes nf4", "torchao int8", "GPTQ")], ids=lambda own: own.name
)
def test_a_quantised_base(base: Any) -> None:
    model = base.model()
    bank = filled(model, {name: lorakit.LoRASettings("0", rank=rank) for name, rank in (("a", 2), ("b", 5), ("c", 1))})
    x = torch.randn(6, 3, 64)
    with torch.no_grad():
        alone = []
        for index, name in enumerate(NAMES):
            bank.use(name)
            alone.append(model(x[index : index + 1]))
        with bank.rows(NAMES):
            together = model(x)
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=2e-2 * together.abs().max().item())
    assert (together[0] - together[2]).abs().max() > 0.5


def test_a_model_by_hand() -> None:
    """Two layers with the equation written out for each row."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    bank = filled(
        model, {"a": lorakit.LoRASettings(["0", "2"], rank=2, alpha=4), "b": lorakit.LoRASettings("2", rank=1, alpha=7)}
    )
    x = torch.randn(3, 3, dtype=F64)
    with bank.rows(["b", None, "a"]):
        got = model(x)
    (W1, b1), (W2, b2) = ((own.weight, own.bias) for own in (model[0], model[2]))
    a, b = (bank[name].updates for name in "ab")
    up = {"a": (2 * a["0"].B @ a["0"].A, 2 * a["2"].B @ a["2"].A), "b": (0 * W1, 7 * b["2"].B @ b["2"].A)}
    for y, row, name in zip(got, x, ["b", None, "a"], strict=True):
        one, two = up.get(name, (0 * W1, 0 * W2)) if name else (0 * W1, 0 * W2)
        torch.testing.assert_close(y, (W2 + two) @ torch.tanh((W1 + one) @ row + b1) + b2, rtol=0, atol=1e-12)


@pytest.mark.parametrize("make", [llama, gpt2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_problem_36_training_in_one_pass_is_training_each_alone(make: Callable[[], Any], checkpointing: bool) -> None:
    """Four steps of AdamW and SGD, each adapter with its own rate, rank and decay, against models of their own."""
    targets = ("c_attn", "c_fc") if make is gpt2 else ("q_proj", "down_proj", "embed_tokens")
    settings = {
        "a": lorakit.LoRASettings(targets, rank=2, alpha=4),
        "b": lorakit.LoRASettings(targets[:1], rank=5, alpha=1),
    }
    optimizers: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
        "a": lambda own: torch.optim.AdamW(own, lr=1e-2, weight_decay=0.1),
        "b": lambda own: torch.optim.SGD(own, lr=0.5, momentum=0.9),
    }
    data = torch.randint(0, 64, (4, 6, 7), generator=torch.Generator().manual_seed(1))  # step, row, position
    mine = {"a": [0, 1, 3], "b": [2, 4, 5]}
    names: list[str | None] = ["a", "a", "b", "a", "b", "b"]

    def loss(logits: Tensor, rows: Tensor) -> Tensor:
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten())

    def plain() -> Any:
        """Without GPT-2's own dropout, which draws for a whole batch."""
        model = make().double()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        return model

    model = plain()
    bank = filled(model, settings)
    begin = {name: bank[name] for name in bank}
    if checkpointing:
        model.activation_checkpointing_enable()
        model.train()
    running = {name: optimizers[name](bank.parameters(name)) for name in bank}
    for batch in data:
        with bank.rows(names):
            logits = model(batch).logits
            sum((loss(logits[rows], batch[rows]) for rows in mine.values()), torch.zeros(())).backward()
        for optimizer in running.values():
            optimizer.step()
            optimizer.zero_grad()
    for name, rows in mine.items():
        solo = plain()
        lorakit.insert(solo, begin[name])
        optimizer = optimizers[name](lorakit.parameters(solo))
        for batch in data:
            loss(solo(batch[rows]).logits, batch[rows]).backward()
            optimizer.step()
            optimizer.zero_grad()
        alone, together = lorakit.extract(solo).updates, bank[name].updates
        assert alone.keys() == together.keys()
        for module in alone:
            for tensor in ("A", "B"):
                right, got, first = (getattr(own[module], tensor) for own in (alone, together, begin[name].updates))
                torch.testing.assert_close(got, right, rtol=0, atol=1e-10)
                assert (right - first).abs().max() > 1e-5


def test_dropout_is_each_adapters_own() -> None:
    """Its masks do not depend on the others in the batch, and each drops about as many elements as it says."""

    def trained(names: list[str | None], rows: list[int]) -> Tensor:
        model = nn.Sequential(nn.Linear(50, 40), nn.Linear(40, 30)).double()
        bank = filled(
            model,
            {
                "a": lorakit.LoRASettings(["0", "1"], rank=2, alpha=4, dropout=0.3),
                "b": lorakit.LoRASettings("1", rank=4, alpha=8),
            },
        )
        bank["c"] = lorakit.LoRASettings(["0", "1"], rank=3, alpha=6, dropout=0.1)
        randomise(bank.parameters("c"), 9)
        model.train()
        x = torch.randn(6, 8, 50, dtype=F64, generator=torch.Generator().manual_seed(3))
        torch.manual_seed(11)
        with bank.rows(names):
            model(x[rows]).sin().sum().backward()
        return torch.cat([own.grad.flatten() for own in bank.parameters("a") if own.grad is not None])

    torch.manual_seed(0)
    state = torch.get_rng_state()

    def again(names: list[str | None], rows: list[int]) -> Tensor:
        torch.set_rng_state(state)
        return trained(names, rows)

    alone = again(["a", "a"], [1, 4])
    together = again(["b", "a", "c", "c", "a", None], [0, 1, 2, 3, 4, 5])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)
    # x = 1, A = B = 1, W = 0: the output counts the elements that were kept.
    layer = nn.Sequential(nn.Linear(4000, 1, bias=False)).double()
    bank = lorakit.Bank(layer)
    bank["a"] = lorakit.LoRASettings("0", rank=1, alpha=1, dropout=0.3)
    bank["b"] = lorakit.LoRASettings("0", rank=1, alpha=1)
    with torch.no_grad():
        layer[0].weight.zero_()
        for own in (*bank.parameters("a"), *bank.parameters("b")):
            own.fill_(1.0)
    layer.train()
    with bank.rows(["a", "b", "a"]):
        y = layer(torch.ones(3, 4000, dtype=F64)).flatten()
        kept = 0.7 * y / 4000
    assert abs(kept[0] - 0.7) < 0.03 and abs(kept[2] - 0.7) < 0.03 and y[1] == 4000 and kept[0] != kept[2]
    layer.eval()
    with bank.rows(["a", "b", "a"]):
        assert torch.equal(layer(torch.ones(3, 4000, dtype=F64)).flatten(), torch.full((3,), 4000.0, dtype=F64))


@pytest.mark.parametrize("how", [{"fused": True}, {"foreach": True}, {}], ids=str)
def test_a_step_inside_one_context_is_seen_by_the_next_pass_without_gradients(how: Any) -> None:
    model = llama().double()
    bank = filled(model, three())
    with bank.rows(NAMES):
        for _ in range(2):
            with torch.no_grad():
                model(IDS)
            model(IDS).logits.sin().sum().backward()
            for name in bank:
                torch.optim.AdamW(bank.parameters(name), lr=0.1, **how).step()
        with torch.no_grad():
            before = model(IDS).logits
            bank.parameters("a")[0].data.zero_()
            bank.written()
            together = model(IDS).logits
    assert not torch.equal(before, together)
    for index, used in enumerate(NAMES):
        bank.use(used)
        torch.testing.assert_close(together[index], model(IDS).logits[index], rtol=0, atol=1e-11)


def test_an_adapter_without_rows_in_a_batch_gets_no_gradient() -> None:
    model = llama().double()
    bank = filled(model, three())
    forget(bank)
    with bank.rows(["a", None, "a", "a", "a", "c"]):
        model(IDS).logits.sum().backward()
    assert all(own is None for own in gradients(bank)["b"])
    assert all(own is not None for name in "ac" for own in gradients(bank)[name])
    assert all(own.grad is None for own in model.parameters())
    assert all(own.requires_grad for own in model.parameters())


@pytest.mark.parametrize("how", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}, {"do_sample": False}])
def test_rows_stay_with_their_adapter_in_generate(how: dict[str, Any]) -> None:
    model = llama().double()
    bank = filled(model, three())
    settings = dict(max_new_tokens=6, min_new_tokens=6, pad_token_id=0, **how)
    with bank.rows(NAMES):
        together = model.generate(IDS, attention_mask=torch.ones_like(IDS), **settings)
    each = len(together) // len(NAMES)
    answers = []
    for index, name in enumerate(NAMES):
        bank.use(name)
        own = IDS[index : index + 1]
        alone = model.generate(own, attention_mask=torch.ones_like(own), **settings)
        assert torch.equal(together[index * each : (index + 1) * each], alone)
        bank.use(None)
        answers.append(not torch.equal(alone, model.generate(own, attention_mask=torch.ones_like(own), **settings)))
    assert sum(answers) >= 4  # the adapters change the answers


def test_a_batch_of_another_size_is_refused() -> None:
    model = llama().double()
    bank = filled(model, three())
    with (
        bank.rows(["a", "b", "a", "c"]),
        pytest.raises(lorakit.LoraError, match=r"names 4 rows, and '.*' was given \(6, 7"),
    ):
        model(IDS)
    with bank.rows(["a"]), pytest.raises(lorakit.LoraError, match="inside bank.rows. Leave that first"):
        bank.use("a")
    assert bank.used is None and torch.equal(model(IDS).logits, llama().double()(IDS).logits)


def test_what_cannot_be_one_of_several_is_refused() -> None:
    model = llama()
    bank = filled(model, {"dora": lorakit.LoRASettings("q_proj", dora=True), "plain": lorakit.LoRASettings("q_proj")})
    with (
        pytest.raises(
            lorakit.LoraError,
            match="'dora' cannot be one of several in a batch: model.layers.0.self_attn.q_proj has DoRA's",
        ),
        bank.rows(["dora", "plain"]),
    ):
        pass
    experts = nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(3, 3)])})
    bank = filled(experts, {"a": lorakit.LoRASettings("experts.0")})
    with pytest.raises(lorakit.LoraError, match="experts.0 is an expert, which sees chosen tokens"), bank.rows(["a"]):
        pass
    bank = filled(qwen_moe(), {"a": lorakit.LoRASettings("all-linear+experts")})
    with pytest.raises(lorakit.LoraError, match="is a parameter that the model reads"), bank.rows(["a"]):
        pass
    beside = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "up": nn.Linear(8, 8)})
    bank = filled(beside, {"a": lorakit.LoRASettings("up")})
    with pytest.raises(lorakit.LoraError, match="up is beside an attention with batch_first=False"), bank.rows(["a"]):
        pass


def test_a_layer_made_with_its_update_is_refused() -> None:
    with pytest.raises(lorakit.LoraError, match="'0' was made by a constructor of lorakit's"):
        lorakit.Bank(nn.Sequential(lorakit.Linear(3, 4, r=2)))


def test_a_layer_whose_weight_is_read_instead_is_noticed() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(3, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.up(x), self.down.weight)

    bank = filled(Reads(), {"a": lorakit.LoRASettings(["up", "down"], rank=1)})
    message = r"(?s)1 adapted layers of Reads do nothing, while 1 others were used:\s+down: no forward pass called it"
    with pytest.raises(lorakit.LoraError, match=message), bank.rows(["a", None]):
        bank.model(torch.randn(2, 3))
    assert type(bank.model.up) is nn.Linear


def test_a_whole_network_of_convolutions() -> None:
    net = conv_net().double()
    bank = filled(
        net,
        {
            "a": lorakit.LoRASettings(["0", "*.conv_pw", "*.conv_dw", "3", "6"], rank=2, alpha=4),
            "b": lorakit.LoRASettings("*.conv_dw", rank=3, alpha=6),
        },
    )
    x = torch.randn(4, 3, 16, 16, dtype=F64)
    names = ["a", "b", None, "a"]
    with torch.no_grad():
        with bank.rows(names):
            together = net(x)
        for index, name in enumerate(names):
            bank.use(name)
            torch.testing.assert_close(together[index], net(x[index : index + 1])[0], rtol=0, atol=1e-12)


class TestCompiled:
    @pytest.fixture(autouse=True)
    def _fresh(self) -> None:
        torch.compiler.reset()

    def test_problem_28_a_hundred_swaps_compile_once(self) -> None:
        """Other adapters in use and in rows, of other ranks and targets, in one graph."""
        model = llama()
        bank = filled(model, three(), rank=8, room=5)
        compiled = torch.compile(model.forward, fullgraph=True, backend="eager")
        expected: dict[str | None, Tensor] = {}
        plain = lorakit.Bank(llama())
        for name in "abc":
            plain[name] = bank[name]
        with torch.no_grad():
            for name in (*"abc", None):
                plain.use(name)
                expected[name] = plain.model(IDS).logits
            for names in (NAMES, ["c"] * 6):
                with bank.rows(names):
                    compiled(input_ids=IDS)
            bank.use("a")
            compiled(input_ids=IDS)
            with torch.compiler.set_stance("fail_on_recompile"):
                for turn in range(100):
                    names = [["a", "b", "c", None][(turn * place + turn) % 4] for place in range(5)] + ["a"]
                    with bank.rows([*names[turn % 6 :], *names[: turn % 6]]):
                        got = compiled(input_ids=IDS).logits
                    for row, named in enumerate([*names[turn % 6 :], *names[: turn % 6]]):
                        torch.testing.assert_close(got[row], expected[named][row], rtol=1e-4, atol=1e-4)
                    used = [*"abc", None][turn % 4]
                    bank.use(used)
                    torch.testing.assert_close(compiled(input_ids=IDS).logits, expected[used], rtol=1e-4, atol=1e-4)
                    if turn % 10 == 0:
                        bank["guest"] = lorakit.LoRASettings(["q_proj", "lm_head"], rank=1 + turn % 7)
                        del bank["guest"]

    def test_a_step_is_seen_by_the_compiled_model(self) -> None:
        model = llama()
        bank = filled(model, three(), rank=8, room=3)
        compiled = torch.compile(model.forward, fullgraph=True, backend="eager")
        bank.use("a")
        with torch.no_grad():
            before = compiled(input_ids=IDS).logits
        model(IDS).logits.sin().sum().backward()
        torch.optim.AdamW(bank.parameters("a"), lr=0.1, fused=True).step()
        with torch.no_grad():
            torch.testing.assert_close(compiled(input_ids=IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)
        assert (before - model(IDS).logits).abs().max() > 0.1

    def test_training_in_rows_compiles_whole(self) -> None:
        model = llama().double()
        bank = filled(model, three())
        forget(bank)
        with bank.rows(NAMES):
            model(IDS).logits.sin().sum().backward()
        expected = gradients(bank)
        forget(bank)
        compiled = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
        with bank.rows(NAMES):
            compiled(input_ids=IDS).logits.sin().sum().backward()
        torch.testing.assert_close(gradients(bank), expected, rtol=0, atol=1e-9)


def test_a_training_pass_keeps_x_and_one_thin_tensor() -> None:
    """Not the stacks, which are as large as all adapters: bytes by torch's own hooks, against the sizes written out."""
    model = nn.Sequential(nn.Linear(50, 40)).double()
    bank = filled(model, {name: lorakit.LoRASettings("0", rank=4) for name in "abc"})
    model.requires_grad_(False)
    x = torch.randn(6, 9, 50, dtype=F64, requires_grad=True)
    constants = [*model.parameters(), *(own for name in bank for own in bank.parameters(name))]
    with bank.rows(NAMES):
        kept = kept_bytes(lambda: model(x), constants)
    assert kept == 8 * (6 * 9 * 50 + 6 * 9 * 4)


def test_the_next_batch_may_have_other_adapters() -> None:
    model = llama().double()
    bank = filled(model, three())
    orders = (NAMES, NAMES[::-1], ["c", None])
    expected = []
    for names in orders:
        with bank.rows(names):
            expected.append(model(IDS).logits)
    with bank.rows(orders[0]):
        for names, own in zip(orders, expected, strict=True):
            bank.assign(names)
            assert torch.equal(model(IDS).logits, own)
    assert not torch.equal(expected[0], expected[1])
    with pytest.raises(lorakit.LoraError, match="bank.assign is for the inside of bank.rows"):
        bank.assign(NAMES)
    with pytest.raises(lorakit.LoraError, match="expected a name, or None"), bank.rows(NAMES):
        bank.assign([])
