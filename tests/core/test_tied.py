"""One weight under several names: tables that are only held, and tied modules that are trained whole."""

import copy
import warnings
from pathlib import Path

import peft
import pytest
import safetensors.torch
import torch
from torch import nn

import lorakit
from architectures import ARCHITECTURES, IDS
from in_peft import load_in_peft
from models import train_a_little

TIED = ARCHITECTURES["llama-tied"]
TIES = "Model has .tie_word_embeddings=True. and a tied layer"  # PEFT warns, and does the same
WHOLE = (["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head"])


@pytest.mark.parametrize(("name", "held"), [("t5", "shared"), ("bart", "model.shared")])
def test_a_table_that_is_only_held_is_refused_with_the_names_that_are_called(name: str, held: str) -> None:
    model = ARCHITECTURES[name].make()
    called = "'.*encoder.embed_tokens' and '.*decoder.embed_tokens'"
    with pytest.raises(ValueError, match=f"'{held}' cannot be adapted: it only holds the .* table .* {called}"):
        lorakit.attach(model, "shared")
    with pytest.raises(ValueError, match=f"also_train='shared' cannot be trained: it only holds .* {called}"):
        lorakit.attach(model, "q_proj" if name == "bart" else "q", also_train="shared")
    report = lorakit.attach(model, "*q*" if name == "bart" else "*")
    assert held not in {row.name for row in report.rows}


def test_a_table_that_is_called_beside_those_inside_is_adapted() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.decoder = nn.Embedding(5, 4), nn.ModuleDict({"embed": nn.Embedding(5, 4)})
            self.decoder["embed"].weight = self.embed.weight

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.embed(tokens) + self.decoder["embed"](tokens)

    model = Pair()
    assert [row.name for row in lorakit.attach(model, "embed", rank=2).rows] == ["embed", "decoder.embed"]


@pytest.mark.parametrize("targets", ["encoder.embed_tokens", "decoder.embed_tokens", "embed_tokens"])
def test_each_table_that_is_called_is_adapted(targets: str, tmp_path: Path) -> None:
    t5 = ARCHITECTURES["t5"]
    model = t5.make()
    lorakit.attach(model, targets, rank=2)
    train_a_little(model)
    expected = t5.run(model).detach()
    assert (expected - t5.run(t5.make())).abs().max() > 1e-4
    lorakit.save(model, tmp_path)
    torch.testing.assert_close(t5.run(load_in_peft(t5.make(), tmp_path, TIES)), expected, atol=1e-5, rtol=1e-5)
    lorakit.merge(model)
    with torch.no_grad():
        torch.testing.assert_close(t5.run(model), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("whole", WHOLE)
def test_tied_modules_trained_whole_are_the_same_in_the_file_after_reload_and_in_peft(whole, tmp_path: Path) -> None:
    model = TIED.make()
    lorakit.attach(model, "q_proj", rank=2, also_train=whole)
    assert torch.equal(TIED.run(model), TIED.run(TIED.make()))
    train_a_little(model)
    expected = TIED.run(model).detach()
    lorakit.save(model, tmp_path)
    kept = set(safetensors.torch.load_file(tmp_path / "adapter_model.safetensors"))
    assert sum("lora_" not in key for key in kept) == len(whole)
    again = TIED.make()
    lorakit.load(again, tmp_path)
    torch.testing.assert_close(TIED.run(again), expected)
    torch.testing.assert_close(TIED.run(load_in_peft(TIED.make(), tmp_path, TIES)), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("whole", WHOLE)
def test_what_peft_trained_beside_a_tied_weight_is_read(whole: list[str], tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=whole, task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(TIED.make(), config).eval()
        train_a_little(theirs)
        theirs.save_pretrained(str(tmp_path))
    model = TIED.make()
    lorakit.load(model, tmp_path)
    torch.testing.assert_close(TIED.run(model), theirs(input_ids=IDS).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("whole", WHOLE)
def test_detach_ties_the_weights_again(whole: list[str]) -> None:
    plain, model = TIED.make(), TIED.make()
    lorakit.attach(model, "q_proj", rank=2, also_train=whole)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    train_a_little(model)
    with lorakit.disabled(copy.deepcopy(model)) as base:
        torch.testing.assert_close(TIED.run(base), TIED.run(plain), atol=0, rtol=0)
    lorakit.detach(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(TIED.run(model), TIED.run(plain))


def test_a_weight_that_two_modules_inside_share_stays_shared() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
            self.second.weight = self.first.weight

    model = nn.ModuleDict({"body": nn.Linear(4, 4), "head": Pair()})
    lorakit.attach(model, "body", also_train="head")
    assert model["head"].first.weight is model["head"].second.weight
