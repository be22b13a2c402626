"""attach and detach on real architectures: what is chosen, what is refused, what stays the same."""

import copy
import pickle
from typing import Any

import peft
import pytest
import torch
from torch import nn

import lorakit
import models
from models import train_a_little, trainable_names

TOKENS = torch.arange(14).view(2, 7)


def linear_names(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, lorakit.LoRALayer)}


def test_all_linear_is_every_linear_layer_but_the_head() -> None:
    llama = models.llama()
    lorakit.attach(llama)
    per_layer = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
    assert linear_names(llama) == {f"model.layers.{i}.{name}" for i in range(2) for name in per_layer}
    gpt2 = models.gpt2()
    lorakit.attach(gpt2)
    per_layer = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    assert linear_names(gpt2) == {f"transformer.h.{i}.{name}" for i in range(2) for name in per_layer}
    bert = models.bert()
    lorakit.attach(bert)
    assert "classifier" not in linear_names(bert)
    assert "bert.pooler.dense" in linear_names(bert)
    plain = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    lorakit.attach(plain)
    assert linear_names(plain) == {"0", "2"}


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("q_proj", {"model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"}),
        ("0.self_attn.q_proj", {"model.layers.0.self_attn.q_proj"}),
        ("*.1.*.[qv]_proj", {"model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"}),
        (["up_proj", "embed_tokens"], {*(f"model.layers.{i}.mlp.up_proj" for i in range(2)), "model.embed_tokens"}),
        (lambda module, name: name.endswith("1.mlp.down_proj"), {"model.layers.1.mlp.down_proj"}),
        ("lm_head", {"lm_head"}),
    ],
    ids=["suffix", "longer-suffix", "glob", "list", "filter", "head-by-name"],
)
def test_targets(targets, expected: set[str]) -> None:
    model = models.llama()
    report = lorakit.attach(model, targets)
    assert linear_names(model) == expected == {row.name for row in report.rows}


def test_problem_04_a_pattern_that_matches_nothing_is_an_error_with_the_real_names() -> None:
    model = models.llama()
    before = str(model)
    with pytest.raises(ValueError, match=r"targets=\['\*.q_prj'\] match no module of LlamaForCausalLM") as error:
        lorakit.attach(model, "*.q_prj")
    assert "Closest: 'model.layers.0.self_attn.q_proj' and 1 like it. Did you mean '*.q_proj'?" in str(error.value)
    with pytest.raises(ValueError, match="target 'v_prj' matches no module") as error:
        lorakit.attach(model, ["q_proj", "v_prj"])
    assert "Did you mean 'v_proj'?" in str(error.value)
    with pytest.raises(ValueError, match="rank_pattern='k_proj' matches none of the adapted modules"):
        lorakit.attach(model, "q_proj", rank_pattern={"k_proj": 2})
    with pytest.raises(ValueError, match="alpha_pattern='q_prj' matches none.*Did you mean 'q_proj'"):
        lorakit.attach(model, "q_proj", alpha_pattern={"q_prj": 2})
    with pytest.raises(ValueError, match="also_train='lm_haed' matches no module.*Did you mean 'lm_head'"):
        lorakit.attach(model, "q_proj", also_train=["lm_haed"])
    with pytest.raises(ValueError, match="targets is empty"):
        lorakit.attach(model, [])
    with pytest.raises(ValueError, match="selects no module"):
        lorakit.attach(model, lambda module, name: False)
    assert str(model) == before
    assert trainable_names(model) == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(rank=0), "rank=0: a rank is at least 1"),
        (dict(alpha=-1), "alpha=-1: expected a positive number"),
        (dict(dropout=1.0), "dropout=1.0: a probability"),
        (dict(init="pisa"), "init='pisa': expected one of 'kaiming'"),
        (dict(bias="some"), "bias='some': expected one of 'none'"),
    ],
)
def test_wrong_settings_are_refused_before_anything_changes(arguments: dict, message: str) -> None:
    model = models.llama()
    before = str(model)
    with pytest.raises(ValueError, match=message):
        lorakit.attach(model, **arguments)
    assert str(model) == before


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("module", [nn.Linear(3, 40), nn.Embedding(40, 3), nn.Conv2d(40, 3, 3)])
def test_a_rank_beyond_that_of_the_weight_is_refused_where_the_factors_are_taken_from_it(
    module: nn.Module, init: Any
) -> None:
    model = nn.Sequential(copy.deepcopy(module))
    with pytest.raises(ValueError, match=f"'0' has a weight of rank 3 at most: init={init!r} cannot take rank=4"):
        lorakit.attach(model, "0", rank=4, init=init)
    assert type(model[0]) is type(module)
    lorakit.attach(model, "0", rank=3, init=init)


class Padded(nn.Conv2d):
    """A convolution that uses its weight in its own way."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).relu()


class Rounded(nn.Linear):
    """A layer that is not linear in its input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward((x * 8).round() / 8)


def patched() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.forward = layer.forward  # type: ignore[method-assign]
    return layer


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Padded(3, 3, 3), "Padded is a subclass that may read its weight"),
        (nn.ConvTranspose2d(3, 3, 3), "ConvTranspose2d is not supported"),
        (nn.LayerNorm(4), "LayerNorm is no linear, embedding or convolution layer"),
        (nn.Sequential(nn.Linear(4, 4)), "Sequential is no linear.*inside it: 0"),
        (Rounded(4, 4), "Rounded is a subclass that may read its weight in a way of its own: it is not linear"),
        (nn.LazyLinear(4), "LazyLinear has no weight before its first forward pass: run the model once"),
        (patched(), "its forward is replaced on the instance"),
        (nn.Linear(4, 4).to(torch.float8_e4m3fn), "its weight is stored as torch.float8_e4m3fn"),
        (lorakit.Linear(4, 4, r=2), "it is adapted already; call lorakit.detach"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_what_would_silently_do_nothing_is_refused(module: nn.Module, message: str) -> None:
    model = nn.ModuleDict({"inner": module})
    with pytest.raises(ValueError, match=message):
        lorakit.attach(model, "inner")


@pytest.mark.parametrize("make", [models.llama, models.gpt2, models.bert])
def test_problem_09_attach_shares_the_weight_and_changes_no_output(make) -> None:
    model = make()
    before = model(TOKENS).logits
    tensors, keys = dict(model.named_parameters()), set(model.state_dict())
    lorakit.attach(model)
    assert torch.equal(model(TOKENS).logits, before)
    for name, parameter in tensors.items():
        assert model.get_parameter(name) is parameter
    added = set(model.state_dict()) - keys
    assert keys <= set(model.state_dict())
    assert added == {f"{name}.lora_{factor}" for name in linear_names(model) for factor in "AB"}


@pytest.mark.parametrize("make", [models.llama, models.gpt2, models.bert, models.conv_net])
@pytest.mark.parametrize("dora", [False, True])
def test_problem_34_detach_leaves_no_trace(make, dora: bool) -> None:
    model, untouched = make(), make()
    inputs = torch.randn(2, 3, 16, 16) if make is models.conv_net else TOKENS
    next(model.parameters()).requires_grad = False
    hook_calls = []
    last = list(model.modules())[-1]
    last.register_forward_hook(lambda *_: hook_calls.append(1))
    attributes = {name: set(module.__dict__) for name, module in model.named_modules()}
    before = model(inputs)
    targets = ["all-linear", "*conv*", "0", "3"] if make is models.conv_net else "all-linear"
    lorakit.attach(
        model, targets, dora=dora, bias="all", dropout=0.1, also_train=["classifier"] if make is models.bert else ()
    )
    train_a_little(model)
    changed = model(inputs)
    lorakit.detach(model)
    after = model(inputs)
    if make is not models.conv_net:
        before, changed, after = before.logits, changed.logits, after.logits
    assert not torch.equal(changed, before)
    assert torch.equal(after, before)
    assert str(model) == str(untouched)
    assert [type(m).__name__ for m in model.modules()] == [type(m).__name__ for m in untouched.modules()]
    assert not linear_names(model)
    assert list(model.state_dict()) == list(untouched.state_dict())
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == attributes
    assert [p.requires_grad for p in model.parameters()] == [False] + [True] * (len(list(model.parameters())) - 1)
    assert len(hook_calls) == 3


def test_problem_15_the_trainable_parameters_are_exactly_these() -> None:
    model = models.bert()
    lorakit.attach(model, ["query", "value"], also_train=["classifier"])
    adapters = {
        f"bert.encoder.layer.{i}.attention.self.{name}.lora_{factor}"
        for i in range(2)
        for name in ("query", "value")
        for factor in "AB"
    }
    assert trainable_names(model) == adapters | {"classifier.weight", "classifier.bias"}
    with lorakit.disabled(model):
        assert trainable_names(model) == adapters | {"classifier.weight", "classifier.bias"}
    assert trainable_names(model) == adapters | {"classifier.weight", "classifier.bias"}
    lorakit.merge(model)
    lorakit.unmerge(model)
    assert trainable_names(model) == adapters | {"classifier.weight", "classifier.bias"}
    # the whole model was frozen before; the adapter is still trained
    frozen = models.bert().requires_grad_(False)
    lorakit.attach(frozen, ["query"], bias="lora_only")
    expected = {
        f"bert.encoder.layer.{i}.attention.self.query.{p}" for i in range(2) for p in ("lora_A", "lora_B", "bias")
    }
    assert trainable_names(frozen) == expected
    free = models.bert()
    lorakit.attach(free, ["query"], freeze=False)
    assert trainable_names(free) == {name for name, _ in free.named_parameters()}


@pytest.mark.parametrize("training", [False, True])
def test_problem_16_modes_and_dtypes_stay(training: bool) -> None:
    model = models.llama().train(training)
    model.model.layers[0].eval()
    flags = {name: module.training for name, module in model.named_modules()}
    lorakit.attach(model, dropout=0.1)
    for name, flag in flags.items():
        assert model.get_submodule(name).training is flag
    assert model.model.layers[0].mlp.up_proj.lora_dropout.training is False
    assert model.model.layers[1].mlp.up_proj.lora_dropout.training is training


def test_problem_23_a_loss_scaler_takes_the_gradients_beside_float16_weights() -> None:
    """The factors are float32: the scaler unscales them, and gradients that float16 would round to 0 arrive."""
    model = nn.Sequential(nn.Linear(6, 5)).half()
    lorakit.attach(model, "0", rank=2, alpha=4)
    train_a_little(model)
    factors = A, B = [model[0].lora_A, model[0].lora_B]
    x, upstream = torch.randn(3, 6).half(), 1e-9 * torch.randn(3, 5)
    thin = 2 * x.double() @ A.detach().double().T  # s = alpha/r = 2
    expected = [2 * (upstream.double() @ B.detach().double()).T @ x.double(), upstream.double().T @ thin]
    assert all(gradient.half().count_nonzero() == 0 for gradient in expected)
    scaler, optimizer = torch.amp.GradScaler("cpu", init_scale=2.0**20), torch.optim.SGD(factors, lr=1.0)
    scaler.scale((model(x).float() * upstream).sum()).backward()
    scaler.unscale_(optimizer)
    for factor, gradient in zip(factors, expected, strict=True):
        torch.testing.assert_close(factor.grad.double(), gradient, rtol=0.01, atol=1e-12)
    before = B.detach().clone()
    scaler.step(optimizer)
    assert not torch.equal(B, before)


def test_problem_23_peft_without_its_cast_fails_the_same_test() -> None:
    settings = peft.LoraConfig(r=2, target_modules=["0"])
    model = peft.get_peft_model(nn.Sequential(nn.Linear(6, 5)).half(), settings, autocast_adapter_dtype=False)
    scaler = torch.amp.GradScaler("cpu")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    scaler.scale(model(torch.randn(3, 6).half()).float().sum()).backward()
    with pytest.raises(ValueError, match="Attempting to unscale FP16 gradients"):
        scaler.unscale_(optimizer)


def test_disabled_is_the_base_model_also_while_merged_and_with_a_trained_head() -> None:
    model = models.bert()
    base = model(TOKENS).logits
    lorakit.attach(model, also_train=["classifier"])
    train_a_little(model)
    adapted = model(TOKENS).logits
    with lorakit.disabled(model) as same:
        assert same is model
        assert torch.equal(model(TOKENS).logits, base)
    assert torch.equal(model(TOKENS).logits, adapted)
    lorakit.merge(model)
    with lorakit.disabled(model), torch.no_grad():
        assert torch.equal(model(TOKENS).logits, base)
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS).logits, adapted)
    with pytest.raises(KeyError, match="inside"), lorakit.disabled(model):
        raise KeyError("inside")
    lorakit.unmerge(model)
    assert torch.equal(model(TOKENS).logits, adapted)


def test_rank_and_alpha_patterns() -> None:
    model = models.llama()
    report = lorakit.attach(model, ["q_proj", "v_proj"], rank=4, rank_pattern={"*.1.*": 2}, alpha_pattern={"v_proj": 7})
    layers = model.model.layers
    seen = {
        (i, n): (m.r, m.lora_alpha)
        for i in (0, 1)
        for n, m in (("q", layers[i].self_attn.q_proj), ("v", layers[i].self_attn.v_proj))
    }
    assert seen == {(0, "q"): (4, 32), (0, "v"): (4, 7), (1, "q"): (2, 32), (1, "v"): (2, 7)}
    assert layers[1].self_attn.v_proj.scaling == 3.5
    # q: 32→32, v: 32→16
    assert report.trainable == 4 * (32 + 32) + 4 * (32 + 16) + 2 * (32 + 32) + 2 * (32 + 16)


def test_problem_19_blocks_of_a_fused_projection() -> None:
    """q and v of GPT-2's c_attn, as in the paper: k keeps its weight."""
    model = models.gpt2()
    before = model(TOKENS).logits
    report = lorakit.attach(model, "c_attn", rank_pattern={"c_attn": [4, 0, 2]})
    layer = model.transformer.h[0].attn.c_attn
    assert torch.equal(model(TOKENS).logits, before)
    assert (type(layer).__name__, layer.r, layer.lora_alpha) == ("MergedLinear", 4, 32)
    assert report.trainable == 2 * ((4 + 2) * 32 + 2 * 32 * 4)
    train_a_little(model)
    expected = model(TOKENS).logits
    changed = layer.delta().abs().sum(0) > 0  # Conv1D: (in, out)
    assert changed.tolist() == [True] * 32 + [False] * 32 + [True] * 32
    adapter = lorakit.extract(model)
    lorakit.detach(model)
    assert torch.equal(model(TOKENS).logits, before)
    lorakit.insert(model, adapter)
    assert torch.equal(model(TOKENS).logits, expected)

    grouped_query = nn.Sequential(nn.Linear(8, 8 + 2 + 2))
    lorakit.attach(grouped_query, "0", rank=3, splits={"0": [8, 2, 2]})
    assert grouped_query[0].blocks == ((8, 3), (2, 3), (2, 3))


def test_blocks_that_do_not_fit_are_refused_before_anything_changes() -> None:
    model = nn.Sequential(nn.Linear(4, 12), nn.Embedding(5, 4))
    before = str(model)
    for arguments, message in (
        (dict(splits={"0": [8, 3]}), "'0': out_features=12, r=16, .*sizes that sum to 12"),
        (dict(rank_pattern={"0": [4, 0, 4, 4, 4]}), "the output is not a multiple of 5 equal blocks"),
        (dict(rank_pattern={"0": [0, 0]}), "'0': every block has rank 0"),
        (dict(rank_pattern={"0": 0}), "rank=0: a rank is at least 1"),
        (dict(rank_pattern={"1": [2, 2]}), "'1' is a Embedding: only the output of a linear layer comes in blocks"),
        (dict(rank_pattern={"0": [2, 2]}, dora=True), "'0' is adapted in blocks, where dora"),
        (dict(rank_pattern={"0": [2, 2]}, init="pissa"), "'0' is adapted in blocks, .* init 'pissa' have no meaning"),
    ):
        with pytest.raises(ValueError, match=message):
            lorakit.attach(model, ["0", "1"], **arguments)
        assert str(model) == before


def test_report_reads_as_a_table() -> None:
    text = str(lorakit.attach(models.llama(), ["q_proj", "down_proj"], rank=4))
    rows = [line.split() for line in text.splitlines()]
    assert rows[1] == ["model.layers.*.self_attn.q_proj", "×2", "Linear", "32", "→", "32", "4", "512"]
    assert rows[2] == ["model.layers.*.mlp.down_proj", "×2", "Linear", "48", "→", "32", "4", "640"]
    assert rows[3][:3] == ["trainable", "params:", "1,152"]


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_of_an_attached_model_work_and_detach(copier) -> None:
    model = models.llama()
    base = model(TOKENS).logits
    lorakit.attach(model, dropout=0.1)
    train_a_little(model)
    other = copier(model)
    assert torch.equal(other(TOKENS).logits, model(TOKENS).logits)
    lorakit.detach(other)
    assert torch.equal(other(TOKENS).logits, base)
    assert linear_names(model)


def test_shared_layers_are_adapted_once() -> None:
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.Tanh(), shared)
    report = lorakit.attach(model, ["0", "2"], rank=2)
    assert [row.name for row in report.rows] == ["0"]
    assert report.trainable == 2 * (4 + 4)


def test_training_an_attached_model_lowers_the_loss_and_leaves_the_base_alone() -> None:
    model = models.llama().train()
    lorakit.attach(model, rank=4, alpha=8)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(40):
        loss = model(TOKENS, labels=TOKENS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.2
    assert all(torch.equal(model.get_parameter(n), p) for n, p in frozen.items())


def test_an_adapter_for_another_model_is_told_in_few_lines() -> None:
    from lorakit.core.exchange import extract, insert

    def model(width: int, layers: int) -> nn.Module:
        blocks = [nn.ModuleDict({"up": nn.Linear(width, 8), "down": nn.Linear(8, width)}) for _ in range(layers)]
        return nn.ModuleDict({"layers": nn.ModuleList(blocks), "head": nn.Linear(width, 2)})

    source = model(4, 12)
    lorakit.attach(source, ["up", "down", "head"], rank=2)
    with pytest.raises(ValueError, match="^the adapter does not fit ModuleDict:\n") as error:
        insert(model(6, 12), extract(source))
    lines = str(error.value).splitlines()[1:]
    assert sum(line.startswith("  layers.*.up: A and B are (2, 4) and (8, 2)") and "×" in line for line in lines) == 1
    assert len(lines) <= 4  # 25 layers of three kinds; only the first has the hint
    assert "Did you mean 'layers" not in str(error.value)  # the names are right
    with pytest.raises(ValueError, match=r"layers\.\*\.up: the model has no such module \(×4\)"):
        insert(model(4, 8), extract(source))


def test_a_name_that_is_spelt_rightly_is_not_suggested() -> None:
    from lorakit.core.targets import closest

    names = ["layers.0.q_proj", "layers.0.k_proj"]
    assert closest("q_proj", names) == closest("layers.0.q_proj", names) == closest("*.q_proj", names) == ""
    assert "Did you mean 'q_proj'?" in closest("q_prj", names)
    assert "Did you mean '*.q_proj'?" in closest("*.Q_Proj", names)  # upper and lower case are equal
