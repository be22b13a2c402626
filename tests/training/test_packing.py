"""Rows that share a pack: the loss of each is what it is alone, and models that would read across rows are refused."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lorakit
import models
from lorakit.core.errors import LoraError
from lorakit.training.config import TrainConfig
from lorakit.training.loop import train
from lorakit.training.loss import causal_loss, frozen_head
from lorakit.training.packing import PackCollator, check_packing, packed, unpacked
from lorakit.training.prepare import prepare

LENGTHS = (9, 3, 14, 5, 2, 7, 11, 4)


def some_rows() -> list[dict[str, Any]]:
    """Rows of several lengths; the first third of each bears no loss, and of one every token bears loss."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for number, length in enumerate(LENGTHS):
        ids = torch.randint(64, (length,), generator=generator).tolist()
        asked = 0 if number == 3 else length // 3
        rows.append({"input_ids": ids, "labels": [-100] * asked + ids[asked:]})
    return rows


def sliding() -> nn.Module:
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(**models.SIZES, sliding_window=4)).eval()


def mamba() -> nn.Module:
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    return MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4)).eval()


def bloom() -> nn.Module:
    from transformers import BloomConfig, BloomForCausalLM

    torch.manual_seed(0)
    return BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4)).eval()


def opt() -> nn.Module:
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=64, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32
    )
    return OPTForCausalLM(config).eval()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("make", [models.llama, models.gpt2, sliding, models.qwen_moe])
def test_problem_43_the_loss_and_gradient_of_packs_are_those_of_rows_alone(make, attention: str) -> None:
    # The grouped product of experts knows no float64.
    dtype = torch.float32 if make is models.qwen_moe else torch.float64
    model: Any = make().to(dtype)
    model.set_attn_implementation(attention)
    lorakit.attach(model, rank=2, alpha=4)
    models.train_a_little(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rows = some_rows()
    alone: Any = torch.zeros((), dtype=dtype)
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[:, :-1]
        alone = alone + F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    expected = torch.autograd.grad(alone, trained)

    packs = packed(rows, 20)
    assert len(packs) < len(rows) and sum(len(pack["seq_lengths"]) for pack in packs) == len(rows)
    batch = PackCollator(pad_token_id=0)(packs)
    assert batch["input_ids"].shape[1] <= 20 and "attention_mask" not in batch
    for head in (None, frozen_head(model)):
        loss = causal_loss(model, batch, head)
        assert float((loss - alone).detach().abs()) < 1e-6 * float(alone.detach())
        for own, gradient in zip(torch.autograd.grad(loss, trained), expected, strict=True):
            torch.testing.assert_close(own, gradient, rtol=1e-5, atol=1e-6)  # full logits are rounded to float32
    check_packing(model)


def test_packs_hold_every_token_of_every_row_once() -> None:
    rows = some_rows()
    packs = packed(rows, 14)
    found = []
    for pack in packs:
        assert len(pack["input_ids"]) == len(pack["labels"]) == sum(pack["seq_lengths"]) <= 14
        batch = PackCollator(0)([pack])
        found += [tuple(ids) for ids in unpacked(batch)]
        expected = [position for length in pack["seq_lengths"] for position in range(length)]
        assert batch["position_ids"].tolist() == [expected]
        assert all(label == -100 for label, position in zip(pack["labels"], expected, strict=True) if position == 0)
    assert sorted(found) == sorted(tuple(row["input_ids"]) for row in rows)
    labels = sorted(label for row in rows for label in row["labels"][1:])
    assert sorted(label for pack in packs for label in pack["labels"] if label != -100) == [
        label for label in labels if label != -100
    ]
    assert packed(rows, 14) == packs


@pytest.mark.parametrize("make", [models.llama, models.gpt2, sliding, models.qwen_moe])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_whose_rows_stay_apart_are_taken(make, dtype: torch.dtype) -> None:
    check_packing(make().to(dtype))


@pytest.mark.parametrize("make", [mamba, bloom, opt, models.gpt_oss])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_whose_rows_would_leak_are_refused(make, dtype: torch.dtype) -> None:
    with pytest.raises(LoraError, match="--packing: "):
        check_packing(make().to(dtype))


# --- in a run --------------------------------------------------------------------------------------------------------


@pytest.fixture
def config(tiny_lm: Path, tmp_path: Path) -> TrainConfig:
    rows = [{"prompt": f"turn {'on ' * (i % 7)}", "completion": f"light {i % 3}"} for i in range(40)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return TrainConfig(
        str(tiny_lm),
        str(tmp_path / "d.jsonl"),
        str(tmp_path / "out"),
        packing=True,
        max_seq_length=128,
        batch_size=2,
        epochs=2.0,
        dtype="float32",
        learning_rate=5e-3,
        rank=4,
        eval_samples=0,
        logging_steps=1,
        holdout=0.1,
    )


@pytest.mark.usefixtures("few_objects")
def test_a_run_on_packs(config: TrainConfig, capsys: pytest.CaptureFixture[str]) -> None:
    prepared = prepare(config)
    rows = len(prepared.data.train)
    assert len(prepared.train) < rows / 2 and prepared.plan.peak_bytes is not None
    assert prepared.tokens == prepare(dataclasses.replace(config, packing=False)).tokens
    train(config)
    printed = capsys.readouterr().out
    assert f"{rows} rows in {len(prepared.train)} packs of at most 128 tokens" in printed
    lines = [json.loads(line) for line in (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    held_out = [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert losses[-1] < losses[0] and held_out[-1] < held_out[0]
    assert (Path(config.output_dir) / "adapter_model.safetensors").is_file()


@pytest.mark.usefixtures("few_objects")
def test_packs_and_rows_give_the_same_adapter(config: TrainConfig, tmp_path: Path) -> None:
    """One step on all rows at once, where no order of rows can differ."""
    from safetensors.torch import load_file

    found = []
    for name, packing, batch in (("rows", False, 40), ("packs", True, 40)):
        own = dataclasses.replace(
            config, packing=packing, batch_size=batch, max_steps=1, holdout=0.0, output_dir=str(tmp_path / name)
        )
        train(own)
        found.append(load_file(Path(own.output_dir) / "adapter_model.safetensors"))
    one, two = found
    assert one.keys() == two.keys()
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, rtol=1e-4, atol=1e-5)


def test_packing_is_for_language_models(tiny_encoder: Path, tmp_path: Path) -> None:
    rows = [{"text": f"turn {i}", "label": ("a", "b")[i % 2]} for i in range(8)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(LoraError, match="--packing is for language models"):
        prepare(TrainConfig(str(tiny_encoder), str(tmp_path / "d.jsonl"), str(tmp_path / "out"), packing=True))


@pytest.mark.usefixtures("few_objects")
def test_trls_fused_head_takes_packs(config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the loss comes from TRL's head. It is the same that `loss.py` computes on a CPU."""
    from safetensors.torch import load_file

    from lorakit.training.trainers import CausalTrainer

    found = []
    made = CausalTrainer.__init__
    for fused in (False, True):

        def chosen(self: Any, *args: Any, on: bool = fused, **kwargs: Any) -> None:
            made(self, *args, **kwargs)
            self._fused = on

        monkeypatch.setattr(CausalTrainer, "__init__", chosen)
        own = dataclasses.replace(config, max_steps=2, holdout=0.0, output_dir=str(tmp_path / str(fused)))
        train(own)
        found.append(load_file(Path(own.output_dir) / "adapter_model.safetensors"))
    for key, tensor in found[0].items():
        torch.testing.assert_close(found[1][key], tensor, rtol=1e-4, atol=1e-5)
