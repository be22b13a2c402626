"""Rows of a token table trained by themselves. The expectation is the plain model with these rows written into its
table, and the gradient that torch's autograd gives for that table.
"""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import lorakit
import models
from architectures import ARCHITECTURES
from lorakit.training.gradient_checkpointing import begin_checkpointing
from models import train_a_little
from storages import Made

TOKENS = torch.tensor([[3, 60, 61, 5, 60, 1], [61, 2, 2, 7, 9, 60]])
# The model, targets of A and B, and what is trained of which table. Embedding and head are tied, or two tables.
CASES: dict[str, tuple[str, str, Any]] = {
    "tied": ("llama-tied", "q_proj", [61, 60]),
    "tied, both named": ("llama-tied", "q_proj", {"embed_tokens": [61, 60], "lm_head": [61, 60]}),
    "tied, Conv1D": ("gpt2", "c_attn", {"wte": (60, 61)}),
    "tied, rows that are multiplied": ("gemma3", "q_proj", [60, 61]),
    "not tied": ("llama", "q_proj", [60, 61]),
    "not tied, other rows of the head": ("llama", "q_proj", {"embed_tokens": [60], "lm_head": [60, 61, 1]}),
    "encoder and decoder": ("t5", "q", [60, 61]),
}


def made(case: str) -> tuple[Any, Any]:
    """The plain model with the table's values of the adapted one, and the adapted one; both without A and B's update,
    so that the rows alone are compared.
    """
    name, targets, tokens = CASES[case]
    model = ARCHITECTURES[name].make().eval()
    plain = copy.deepcopy(model)
    lorakit.attach(model, targets, rank=2, trainable_tokens=tokens)
    torch.manual_seed(2)
    with torch.no_grad():
        for table, rows in lorakit.extract(model).token_rows.items():
            own, other = model.get_submodule(table), plain.get_submodule(table)
            own.lora_rows.add_(0.3 * torch.randn_like(own.lora_rows))
            other.weight[list(rows.tokens)] = own.lora_rows
    return plain, model


def logits(model: Any) -> torch.Tensor:
    inputs = {"decoder_input_ids": TOKENS.flip(1)} if model.config.is_encoder_decoder else {}
    return model(input_ids=TOKENS, **inputs).logits


@pytest.mark.parametrize(("case", "checkpointing"), [("tied", True), *((case, False) for case in CASES)])
def test_rows_compute_and_learn_as_those_of_a_table_that_holds_them(case: str, checkpointing: bool) -> None:
    plain, model = made(case)
    if checkpointing:
        begin_checkpointing(model.train())
    weights = torch.randn((*TOKENS.shape, model.config.get_text_config().vocab_size))
    for own in (plain, model):
        (logits(own) * weights).sum().backward()
    torch.testing.assert_close(logits(model), logits(plain), atol=1e-5, rtol=1e-5)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for table, rows in lorakit.extract(model).token_rows.items():
        expected = plain.get_submodule(table).weight.grad[list(rows.tokens)]
        torch.testing.assert_close(model.get_submodule(table).lora_rows.grad, expected, atol=1e-4, rtol=1e-4)
        trained.remove(f"{table}.lora_rows")
    assert all(name.endswith((".lora_A", ".lora_B")) for name in trained)


@pytest.mark.parametrize("case", CASES)
def test_all_that_is_done_to_an_adapter_is_done_to_rows(case: str) -> None:
    """Switched off, merged, taken off, copied, pickled, moved, loaded from a state dict, baked."""
    name, targets, tokens = CASES[case]
    plain, model = made(case)
    base = ARCHITECTURES[name].make().eval()
    with torch.no_grad():
        before, expected, bare = logits(model), logits(plain), logits(base)
        assert (expected - bare).abs().max() > 1e-3
        with lorakit.disabled(model):
            assert torch.equal(logits(model), bare)
        state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        lorakit.merge(model)
        assert torch.equal(logits(model), expected)
        assert model.state_dict().keys() == state.keys()
        assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
        assert model.get_output_embeddings().weight.equal(plain.get_output_embeddings().weight)
        with lorakit.disabled(model):
            assert torch.equal(logits(model), bare)
        assert torch.equal(logits(model), expected)
        model.double().float()
        assert torch.equal(logits(model), expected)
        lorakit.unmerge(model)
        assert torch.equal(logits(model), before)
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(logits(copied), before)
            for parameter in copied.parameters():
                parameter.add_(1)
            assert torch.equal(logits(model), before)
        other = copy.deepcopy(base)
        lorakit.attach(other, targets, rank=2, trainable_tokens=tokens)
        other.load_state_dict(state)
        assert torch.equal(logits(other), before)
        lorakit.detach(model)
        assert torch.equal(logits(model), bare)
        assert {n: type(m) for n, m in model.named_modules()} == {n: type(m) for n, m in base.named_modules()}
        assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in base.parameters()]
        lorakit.bake(other)
        assert torch.equal(logits(other), expected)
        tied = base.get_input_embeddings().weight is base.get_output_embeddings().weight
        assert (other.get_input_embeddings().weight is other.get_output_embeddings().weight) == tied


def test_problem_31_only_the_rows_are_trained_and_the_table_is_not_copied() -> None:
    """With 4,096 tokens in the table, no forward or backward pass makes anything as large as it."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"embed": nn.Embedding(4096, 8), "head": nn.Linear(8, 4096, bias=False)})
    model["head"].weight = model["embed"].weight
    both = nn.ModuleDict({"body": nn.Linear(8, 8), "lm": model})
    report = lorakit.attach(both, "body", rank=1, trainable_tokens={"embed": [7, 4095]})
    assert "rows trained: lm.embed  2 of 4,096  × 8" in str(report)
    assert report.trainable == 2 * 8 + 2 * 8 == sum(p.numel() for p in lorakit.parameters(both))
    optimizer = torch.optim.AdamW(lorakit.parameters(both), lr=0.1, weight_decay=0.1)
    embed: Any = model["embed"]
    table: torch.Tensor = embed.weight
    before = table.clone()
    with Made() as passes:
        hidden = both["body"](model["embed"](torch.tensor([[7, 8, 4095]])))
        model["head"](hidden[:, 1:2]).square().sum().backward()
        optimizer.step()
    assert max(passes.sizes) < table.numel() * 4
    assert model["head"].weight is model["embed"].weight is table and table.grad is None
    assert torch.equal(table, before) and not torch.equal(embed.lora_rows, before[[7, 4095]])
    assert {s.shape for state in optimizer.state.values() for s in state.values()} == {
        torch.Size(shape) for shape in ((), (2, 8), (1, 8), (8, 1))
    }


def test_a_padding_row_learns_from_the_head_alone() -> None:
    """As torch's embedding does: look-ups of the padding token give no gradient."""
    torch.manual_seed(0)
    plain = nn.ModuleDict({"body": nn.Linear(4, 4), "embed": nn.Embedding(6, 4, padding_idx=5)})
    with torch.no_grad():
        plain["embed"].weight[5] = 0.5
    model = copy.deepcopy(plain)
    lorakit.attach(model, "body", rank=1, trainable_tokens=[5, 2])
    for own in (plain, model):
        own["embed"](torch.tensor([5, 2, 1, 5])).square().sum().backward()
    assert torch.equal(model["embed"].lora_rows.grad, plain["embed"].weight.grad[[2, 5]])
    assert torch.equal(model["embed"].lora_rows.grad[1], torch.zeros(4))


def test_a_backward_pass_through_merged_rows_is_an_error() -> None:
    _, model = made("tied")
    lorakit.merge(model)
    with pytest.raises(RuntimeError, match="backward through a merged LoRA layer"):
        logits(model).sum().backward()


def test_a_program_that_reads_the_table_computes_with_the_rows() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.body = nn.Embedding(6, 4), nn.Linear(4, 4)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.body(self.embed(tokens)) @ self.embed.weight.T

    torch.manual_seed(0)
    plain: Any = Reads()
    model = copy.deepcopy(plain)
    lorakit.attach(model, "body", rank=1, trainable_tokens=[1, 4])
    train_a_little(model.embed)
    with torch.no_grad():
        plain.embed.weight[[1, 4]] = model.embed.lora_rows
    tokens = torch.arange(6)
    torch.testing.assert_close(model(tokens), plain(tokens))
    for own in (plain, model):
        own(tokens).square().sum().backward()
    torch.testing.assert_close(model.embed.lora_rows.grad, plain.embed.weight.grad[[1, 4]])


def test_what_is_written_on_merged_rows_is_kept() -> None:
    """A written row of a trained token is the trained row from then on; the base's other rows take what was written."""
    _, model = made("tied")
    table, base = model.get_input_embeddings(), ARCHITECTURES["llama-tied"].make().get_input_embeddings().weight
    rows = table.lora_rows.detach().clone()
    lorakit.merge(model)
    with torch.no_grad():
        table.weight[60] = 1.0
        table.weight[3] = 2.0
    lorakit.unmerge(model)
    expected = base.detach().clone()
    expected[3] = 2.0
    assert torch.equal(table.weight, expected) and table.weight is model.lm_head.weight
    assert torch.equal(table.lora_rows, torch.stack((torch.ones(32), rows[1])))


def test_a_table_may_grow_under_its_rows_and_not_lose_them() -> None:
    _, model = made("tied")
    with torch.no_grad():
        before = logits(model)
        model.resize_token_embeddings(70)
        torch.testing.assert_close(logits(model)[..., :64], before)
    logits(model)[..., 60].sum().backward()  # transformers freezes all of the table that it resizes
    assert model.get_input_embeddings().lora_rows.grad.abs().min() > 0
    model.resize_token_embeddings(61)
    with pytest.raises(lorakit.LoraError, match=r"row 61 .* is trained, .* table has 61 rows"):
        logits(model)


def test_compiled_rows_give_the_same_in_one_graph() -> None:
    _, model = made("tied")
    expected = logits(model).detach()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    found = compiled(input_ids=TOKENS).logits
    torch.testing.assert_close(found, expected)


def test_half_precision_tables_have_rows_in_float32() -> None:
    model: Any = ARCHITECTURES["llama-tied"].make().bfloat16()
    lorakit.attach(model, "q_proj", rank=2, trainable_tokens=[60])
    assert model.get_input_embeddings().lora_rows.dtype == torch.float32
    assert logits(model).dtype == torch.bfloat16


def max_norm(model: Any) -> None:
    model.get_input_embeddings().max_norm = 1.0


def by_frequency(model: Any) -> None:
    model.get_input_embeddings().scale_grad_by_freq = True


def other_class(model: Any) -> None:
    class Other(nn.Embedding):
        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return super().forward(tokens).cumsum(-2)

    model.get_input_embeddings().__class__ = Other


def other_head(model: Any) -> None:
    class Capped(nn.Linear):
        pass

    model.lm_head.__class__ = Capped


def quantised(model: Any) -> None:
    table = model.get_input_embeddings()
    table.weight = nn.Parameter(table.weight.to(torch.float8_e4m3fn), requires_grad=False)


REFUSED: dict[str, tuple[Any, Any, dict[str, Any], str]] = {
    "no row": (None, [64], {}, r"row 64 of 'model.embed_tokens' .* table has 64 rows.*resize_token_embeddings\(65\)"),
    "below": (None, [-1], {}, "-1 is no row, the first one is 0"),
    "twice": (None, [3, 60, 3], {}, "names 3 more than once"),
    "no number": (None, ["<tool>"], {}, "'<tool>' is no token's number"),
    "none": (None, {"embed_tokens": []}, {}, "names a table and no tokens"),
    "unknown": (None, {"embed_token": [1]}, {}, "matches no module. Closest: 'model.embed_tokens'"),
    "a norm": (None, {"norm": [1]}, {}, "LlamaRMSNorm is no embedding or linear layer"),
    "adapted": (None, [1], {"targets": ["q_proj", "embed_tokens"]}, "and targets adapts it. Choose one"),
    "whole": (None, [1], {"also_train": "embed_tokens"}, "also_train all of 'model.embed_tokens'"),
    "max_norm": (max_norm, [1], {}, "max_norm=1.0 renormalises"),
    "by frequency": (by_frequency, [1], {}, "scale_grad_by_freq divides"),
    "not by row": (other_class, [1], {}, "Other does not give out a row for each token"),
    "head": (other_head, {"lm_head": [1]}, {}, "Capped is a subclass of nn.Linear"),
    "quantised": (quantised, [1], {}, "stores them quantised"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_trained_is_refused_before_anything_changes(case: str) -> None:
    change, tokens, settings, message = REFUSED[case]
    model = models.llama()
    if change:
        change(model)
    before = str(model)
    with pytest.raises(lorakit.LoraError, match=message):
        lorakit.attach(model, settings.pop("targets", "q_proj"), trainable_tokens=tokens, **settings)
    assert str(model) == before and not any(name.endswith("lora_A") for name, _ in model.named_parameters())


@pytest.mark.parametrize(
    ("tokens", "settings", "message"),
    [
        ({"lm_head": [1]}, {}, r"'lm_head' is tied to 'model.embed_tokens': they have one table"),
        ({"embed_tokens": [1], "lm_head": [2]}, {}, r"'lm_head' is tied to 'model.embed_tokens'"),
        ([1], {"targets": ["q_proj", "lm_head"]}, "rows of 'lm_head', and targets adapts it"),
        ([1], {"also_train": "lm_head"}, "rows of 'lm_head', and also_train all of 'lm_head'"),
    ],
)
def test_tied_tables_are_one(tokens: Any, settings: dict[str, Any], message: str) -> None:
    model = ARCHITECTURES["llama-tied"].make()
    with pytest.raises(lorakit.LoraError, match=message):
        lorakit.attach(model, **{"targets": "q_proj", "trainable_tokens": tokens, **settings})


def test_a_module_with_rows_takes_no_other_adapter() -> None:
    _, model = made("tied")
    for again in ({"targets": "embed_tokens"}, {"targets": "k_proj", "trainable_tokens": [1]}):
        with pytest.raises(lorakit.LoraError, match="adapted already"):
            lorakit.attach(model, **again)


def test_a_part_is_detached_with_what_is_tied_to_it() -> None:
    _, model = made("tied")
    lorakit.detach(model.lm_head)
    assert type(model.get_input_embeddings()) is nn.Embedding and type(model.lm_head) is nn.Linear


def test_a_head_that_was_replaced_is_named() -> None:
    _, model = made("not tied, other rows of the head")
    model.resize_token_embeddings(70)  # a new lm_head
    with pytest.raises(lorakit.LoraError, match=r"lm_head \(now a Linear\)"):
        lorakit.extract(model)


def test_a_bank_changes_rows_with_their_adapter() -> None:
    model: Any = ARCHITECTURES["llama-tied"].make().eval()
    bank = lorakit.Bank(model)
    for name, tokens in {"one": [60, 61], "other": [1, 60, 3], "none": []}.items():
        bank[name] = lorakit.LoRASettings("q_proj", rank=2, trainable_tokens=tokens)
    with torch.no_grad():
        expected: dict[str | None, torch.Tensor] = {None: logits(model)}
        for name in ("one", "other"):
            bank.use(name)
            train_a_little(model)
            expected[name] = logits(model)
        for used in ("one", None, "other", "one"):
            bank.use(used)
            assert torch.equal(logits(model), expected[used])
    assert [tuple(own.shape) for own in bank.parameters("other") if len(own) == 3] == [(3, 32)]
    assert bank["one"].token_rows["model.embed_tokens"].tokens == (60, 61)
    with (
        pytest.raises(lorakit.LoraError, match=r"'one' has trained rows of token tables \(model.embed_tokens\)"),
        bank.rows(["none", "one"]),
    ):
        pass
    bank.use(None)
    model.double()
    bank.use("one")
    assert logits(model).dtype == torch.float64


def test_a_sum_of_adapters_has_the_rows_that_all_of_them_have() -> None:
    one, other = (lorakit.extract(made(case)[1]) for case in ("tied", "tied, both named"))
    assert lorakit.combine([one, other], [0.5, 0.5]).token_rows == one.token_rows
    with pytest.raises(lorakit.LoraError, match="rows of lm_head were trained and are not the same"):
        lorakit.combine([one, lorakit.extract(made("not tied, other rows of the head")[1])], [1, 1])
