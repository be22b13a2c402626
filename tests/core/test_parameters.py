"""Weights without a layer that is called: torch's attention and encoder, experts' matrices, any matrix by name."""

import copy
import pickle
from pathlib import Path
from typing import TypeVar

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lorakit
import models
from lorakit.core.adapted import AdaptedLayer
from lorakit.core.attach import adapted_layers
from lorakit.core.factored import Factored
from models import train_a_little, trainable_names

TOKENS = torch.arange(14).view(2, 7)
ENCODER_PARTS = ("in_proj_weight", "out_proj", "linear1", "linear2")


def encoder(layers: int = 2) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, layers).double().eval()


Model = TypeVar("Model", bound=nn.Module)


def with_written_weights(plain: Model, adapted: nn.Module) -> Model:
    """A copy of the plain model whose weights are W + s·B A, written out."""
    model = copy.deepcopy(plain)
    parameters = dict(model.named_parameters())
    for name, layer in adapted_layers(adapted).items():
        A, B = layer.lora_A.detach().double(), layer.lora_B.detach().double()
        update = layer.scaling * torch.einsum("...or,...ri->...oi", B, A)
        weight = parameters.get(name, parameters.get(f"{name}.weight"))
        assert weight is not None
        with torch.no_grad():
            weight.add_((update.mT if getattr(layer, "transposed", False) else update).to(weight.dtype))
    return model


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("settings", [{}, dict(kdim=6, vdim=10), dict(add_bias_kv=True, add_zero_attn=True)])
def test_problem_01_attention_equals_one_built_from_the_sum(settings: dict, need_weights: bool) -> None:
    torch.manual_seed(0)
    plain = nn.ModuleDict({"mha": nn.MultiheadAttention(16, 4, batch_first=True, **settings)}).double()
    model = copy.deepcopy(plain)
    report = lorakit.attach(model, "mha", rank=3)
    assert len(report.rows) == (4 if "kdim" in settings else 2)
    assert trainable_names(model) == {name for name, _ in model.named_parameters() if "lora_" in name}
    train_a_little(model)
    expected_model = with_written_weights(plain, model)
    query, key, value = (
        torch.randn(2, 5, size).double() for size in (16, *(settings.get(k, 16) for k in ("kdim", "vdim")))
    )
    mask = torch.tensor([[False] * 5, [False, False, False, True, True]])
    for mode in (True, False):
        for module in (model, expected_model):
            module.train(mode)
        for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
            with context():
                got = model["mha"](query, key, value, key_padding_mask=mask, need_weights=need_weights)
                expected = expected_model["mha"](query, key, value, key_padding_mask=mask, need_weights=need_weights)
            torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-12)
    lorakit.merge(model)
    with torch.no_grad():
        got = model["mha"](query, key, value, key_padding_mask=mask)
    torch.testing.assert_close(got, expected_model["mha"](query, key, value, key_padding_mask=mask), atol=1e-12, rtol=0)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("targets", [*ENCODER_PARTS, "0.linear1", "1.self_attn", "*", "all-linear"])
def test_problem_02_the_encoder_is_the_same_in_train_and_eval(targets: str, dora: bool) -> None:
    model, x = encoder(), torch.randn(3, 6, 16).double()
    padding = torch.arange(6).expand(3, 6) >= torch.tensor([[6], [4], [2]])
    kept = ~padding  # torch's fast path fills the padding with zeros

    def run(training: bool) -> torch.Tensor:
        with torch.set_grad_enabled(training):
            return model.train(training)(x, src_key_padding_mask=padding)[kept].detach()

    before = run(training=False)
    lorakit.attach(model, targets, rank=3, dora=dora)
    torch.testing.assert_close(run(training=False), before, atol=1e-12, rtol=0)
    train_a_little(model)
    in_training = run(training=True)
    assert not torch.allclose(in_training, before)
    torch.testing.assert_close(run(training=False), in_training, atol=1e-12, rtol=0)
    lorakit.merge(model)
    torch.testing.assert_close(run(training=False), in_training, atol=1e-12, rtol=0)


def test_problem_02_peft_has_no_effect_in_eval() -> None:
    import peft

    x, config = torch.randn(3, 6, 16).double(), peft.LoraConfig(target_modules=["linear1"], init_lora_weights=False)
    theirs = peft.get_peft_model(encoder(), config).double()
    in_training = theirs.train()(x).detach()
    with torch.no_grad():
        in_eval = theirs.eval()(x)
        assert not torch.allclose(in_eval, in_training)
        assert torch.equal(in_eval, encoder()(x))


@pytest.mark.parametrize("weights", ["in_proj_weight", "out_proj", "mha"])
def test_attention_gradients_are_those_of_the_dense_sum(weights: str) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"mha": nn.MultiheadAttention(8, 2)}).double()
    lorakit.attach(model, weights, rank=2)
    train_a_little(model)
    x = torch.randn(4, 3, 8).double().requires_grad_()
    factors = [parameter for parameter in model.parameters() if parameter.requires_grad]
    got = torch.autograd.grad(model["mha"](x, x, x)[0].square().sum(), [x, *factors])
    attention = model["mha"]
    dense = {
        name.replace("lora_", ""): layer.adapted_weight()
        for name, layer in attention.named_modules()
        if isinstance(layer, AdaptedLayer)
    }
    plain = nn.ModuleDict({"mha": nn.MultiheadAttention(8, 2)}).double()
    state = {name: tensor for name, tensor in attention.state_dict().items() if "lora_" not in name} | dense
    y = torch.func.functional_call(plain["mha"], state, (x, x, x))[0]
    expected = torch.autograd.grad(y.square().sum(), [x, *factors])
    torch.testing.assert_close(got, expected, atol=1e-10, rtol=1e-10)


MOES = {"qwen": models.qwen_moe, "gpt_oss": models.gpt_oss}


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("make", MOES.values(), ids=MOES)
def test_problem_29_experts_equal_those_built_from_the_sum(make, implementation: str) -> None:
    plain = make(experts_implementation=implementation)
    model = copy.deepcopy(plain)
    lorakit.attach(model, ["experts.gate_up_proj", "experts.down_proj"], rank=2)
    shapes = [tuple(layer.lora_A.shape) for layer in adapted_layers(model).values()]
    assert shapes == [(4, 2, 32), (4, 2, 24)] * 2  # experts, r, in: as applied to x, for both layouts of the weight
    train_a_little(model)
    expected = with_written_weights(plain, model)(TOKENS).logits.detach()
    assert (expected - plain(TOKENS).logits).abs().max() > 0.02
    torch.testing.assert_close(model(TOKENS).logits, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output(model, TOKENS), expected, atol=1e-5, rtol=1e-5)
    lorakit.merge(model)
    torch.testing.assert_close(output(model, TOKENS), expected, atol=1e-5, rtol=1e-5)
    lorakit.unmerge(model)
    # Rounding may send a token to another expert, so the median difference is compared.
    in_half = output(model.bfloat16(), TOKENS).float()
    assert (in_half - expected).abs().median() < 0.02


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize("make", MOES.values(), ids=MOES)
def test_problem_29_no_dense_update_is_formed(make, implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(experts_implementation=implementation)
    lorakit.attach(model, ["gate_up_proj", "down_proj"], rank=2)
    train_a_little(model)
    monkeypatch.setattr(Factored, "dense", lambda self: pytest.fail("the sum was formed"))
    frozen = {id(p): p.shape for p in model.parameters() if p.dim() == 3 and not p.requires_grad}
    assert len(frozen) == 4
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        loss = model(TOKENS, labels=TOKENS).loss
    loss.backward()
    stacks = [t for t in kept if t.dim() == 3 and t.shape in set(frozen.values())]
    bases = {p.data_ptr() for p in model.parameters()}
    assert all(t.data_ptr() in bases for t in stacks)
    for layer in adapted_layers(model).values():
        assert layer.lora_A.grad is not None and layer.lora_B.grad is not None


@pytest.mark.parametrize("make", MOES.values(), ids=MOES)
def test_problem_29_gradients_of_experts(make) -> None:
    gradients = []
    for implementation in ("eager", "grouped_mm", "batched_mm"):
        model = make(experts_implementation=implementation)
        lorakit.attach(model, ["gate_up_proj", "down_proj"], rank=2)
        train_a_little(model)
        model(TOKENS, labels=TOKENS).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    # Also by the dense sum, with only autograd's derivatives.
    model.zero_grad()
    read = {name: layer.adapted_weight() for name, layer in adapted_layers(model).items()}
    plain = make(experts_implementation="eager").requires_grad_(False)
    state = {name: tensor for name, tensor in plain.state_dict().items()} | read
    torch.func.functional_call(plain, state, (TOKENS,), dict(labels=TOKENS)).loss.backward()
    gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for other in gradients[:-1]:
        torch.testing.assert_close(other, gradients[-1], atol=1e-6, rtol=1e-4)


def adapted_models() -> list:
    moe = models.qwen_moe()
    lorakit.attach(moe, ["gate_up_proj", "down_proj", "q_proj"], rank=2)
    torch_encoder = encoder()
    lorakit.attach(torch_encoder, rank=2)
    for model in (moe, torch_encoder):
        train_a_little(model)
    return [(moe, TOKENS), (torch_encoder, torch.randn(3, 6, 16).double())]


def output(model: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        y = model(inputs)
    return y if isinstance(y, torch.Tensor) else y.logits


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("index", [0, 1], ids=["experts", "encoder"])
def test_problem_08_and_21_state_copies_and_moves(index: int, merged: bool) -> None:
    model, inputs = adapted_models()[index]
    expected, state = output(model, inputs), {k: v.clone() for k, v in model.state_dict().items()}
    if merged:
        lorakit.merge(model)
        expected = output(model, inputs)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(output(copied, inputs), expected)
        lorakit.detach(copied)
        assert not any("lora_" in name for name in copied.state_dict())
    train_a_little(model)
    model.load_state_dict(state)
    assert torch.equal(output(model, inputs), expected)
    model.bfloat16()
    if merged:
        lorakit.unmerge(model)
    assert all(torch.equal(tensor, state[name].bfloat16()) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("index", [0, 1], ids=["experts", "encoder"])
def test_problem_06_and_34_merging_and_detaching_restore_every_bit(index: int) -> None:
    model, inputs = adapted_models()[index]
    plain = models.qwen_moe() if index == 0 else encoder()
    adapted = output(model, inputs)
    with lorakit.disabled(model):
        assert torch.equal(output(model, inputs), output(plain, inputs))
    for _ in range(3):
        lorakit.merge(model)
        lorakit.unmerge(model)
    assert torch.equal(output(model, inputs), adapted)
    lorakit.detach(model)
    assert str(model) == str(plain)
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
    state = plain.state_dict()
    assert list(state) == list(model.state_dict())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


def test_merge_then_detach_leaves_a_plain_model() -> None:
    for model, inputs in adapted_models():
        lorakit.merge(model)
        expected = output(model, inputs)
        lorakit.detach(model)
        assert torch.equal(output(model, inputs), expected)
        assert not any("lora" in name for name in dict(model.named_modules()))


def test_problem_17_backward_through_a_merged_parameter_is_an_error() -> None:
    model, inputs = adapted_models()[1]
    lorakit.merge(model)
    with pytest.raises(RuntimeError, match="backward through a merged LoRA layer"):
        model.train()(inputs).sum().backward()


def test_only_the_biases_beside_adapted_weights_are_lora_only() -> None:
    model = encoder(1)
    lorakit.attach(model, ["in_proj_weight", "linear2"], bias="lora_only", rank=2)
    biases = {"layers.0.self_attn.in_proj_bias", "layers.0.linear2.bias"}
    assert {name for name in trainable_names(model) if "lora_" not in name} == biases
    train_a_little(model)
    adapter = lorakit.extract(model)
    assert adapter.bias == "lora_only" and set(adapter.trained) == biases
    again, x = encoder(1), torch.randn(2, 3, 16).double()
    lorakit.insert(again, adapter)
    assert torch.equal(output(again, x), output(model, x))


def test_any_matrix_by_its_name() -> None:
    class Projected(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(5, 3))
            self.projection = nn.Parameter(torch.randn(3, 4))

        def forward(self, index: torch.Tensor) -> torch.Tensor:
            return torch.einsum("br,rc->bc", self.table[index], self.projection) + (self.projection * 2).sum()

    torch.manual_seed(0)
    plain = nn.ModuleDict({"inner": Projected()})
    model = copy.deepcopy(plain)
    lorakit.attach(model, ["inner.table", "projection"], rank=2)
    train_a_little(model)
    index = torch.tensor([0, 3])
    expected = with_written_weights(plain, model)["inner"](index)
    torch.testing.assert_close(model["inner"](index), expected)
    with torch.no_grad():
        torch.testing.assert_close(model["inner"](index), expected)


def test_what_has_no_meaning_for_a_parameter_is_refused_before_anything_changes() -> None:
    model = nn.ModuleDict({"moe": models.qwen_moe(), "mha": nn.MultiheadAttention(8, 2), "rnn": nn.LSTM(4, 4)})
    before = str(model)
    for arguments, message in (
        (dict(targets="mha", dropout=0.1), "'mha.in_proj_weight' is a weight that MultiheadAttention.* dropout=0"),
        (dict(targets="gate_up_proj", dora=True), "a matrix for each expert: use dora=False"),
        (dict(targets="gate_up_proj", init="pissa"), "a matrix for each expert"),
        (dict(targets="mha", rank_pattern={"in_proj_weight": [2, 0, 2]}), "'mha.in_proj_weight' is a parameter: only"),
        (dict(targets="weight_ih_l0"), "LSTM hands over its weights from a list of its own"),
    ):
        with pytest.raises(ValueError, match=message):
            lorakit.attach(model, **arguments)
    assert str(model) == before
    lorakit.attach(model, "mha")
    with pytest.raises(ValueError, match="'mha.in_proj_weight' cannot be adapted: it is adapted already"):
        lorakit.attach(model, "mha")


def test_all_linear_names_the_experts_that_it_passes_over() -> None:
    report = lorakit.attach(models.qwen_moe())
    assert set(report.skipped) == {f"model.layers.{i}.mlp.experts" for i in range(2)}
    assert [line for line in str(report).splitlines() if "expert" in line] == [
        "passed over: model.layers.*.mlp.experts: Qwen3MoeExperts has a matrix for each expert; "
        "'all-linear+experts' takes them  ×2"
    ]


def test_problem_24_training_with_gradient_checkpointing() -> None:
    model = models.qwen_moe().train()
    lorakit.attach(model, ["gate_up_proj", "down_proj"], rank=2)
    model.activation_checkpointing_enable(dict(use_reentrant=False))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = model(TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1


def test_compiled_encoder_layer() -> None:
    model, x = encoder(1), torch.randn(2, 3, 16).double()
    lorakit.attach(model, rank=2)
    train_a_little(model)
    for dropout in (module for module in model.modules() if isinstance(module, nn.Dropout)):
        dropout.p = 0.0
    model.train()
    compiled = torch.compile(model.layers[0], backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model.layers[0](x), atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    "function",
    [
        lambda w: w[1:3] @ torch.eye(4).double(),
        lambda w: torch.eye(6).double() @ w,
        lambda w: w.T @ torch.eye(6).double(),
        lambda w: F.linear(torch.eye(4).double(), w, torch.ones(6).double()),
        lambda w: w.chunk(2)[0],
        lambda w: w.flatten(),
        lambda w: w + 1,
        lambda w: torch.stack([w, w]),
        lambda w: w.t().contiguous(),
        lambda w: w @ w.T,
        lambda w: w.sum(),
    ],
)
def test_factored_is_the_matrix_it_stands_for(function) -> None:
    torch.manual_seed(0)
    base, left, right = (torch.randn(shape).double() for shape in ((6, 4), (6, 2), (2, 4)))
    left.requires_grad_()
    factored, dense = Factored(base, left, right), base + left @ right
    assert factored.shape == dense.shape and factored.dtype == dense.dtype and len(factored) == 6
    got, expected = function(factored), function(dense)
    if isinstance(got, Factored):
        got = got.dense()
    torch.testing.assert_close(got, expected, atol=1e-13, rtol=0)
    torch.testing.assert_close(
        *(torch.autograd.grad(y.square().sum(), left)[0] for y in (got, expected)), atol=1e-11, rtol=0
    )


def test_files(tmp_path: Path) -> None:
    for index, (model, inputs) in enumerate(adapted_models()):
        lorakit.save(model, tmp_path / str(index))
        again = models.qwen_moe() if index == 0 else encoder()
        lorakit.load(again, tmp_path / str(index))
        torch.testing.assert_close(output(again, inputs), output(model, inputs), atol=0, rtol=0)
        with pytest.raises(ValueError, match="a parameter, which loralib does not have"):
            lorakit.save(model, tmp_path / "adapter.pt")
