"""The longest row of a model, tokens without an embedding row, and the loss of models that differ from others."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from conftest import tiny_tokenizer
from lorakit.cli.main import main
from lorakit.training.loss import causal_loss, check_causal, frozen_head
from lorakit.training.models import load_tokenizer
from lorakit.training.positions import longest_row, positions

SMALL: dict[str, Any] = dict(
    vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24
)


def model_of(name: str, kind: str = "Model", **settings: object) -> nn.Module:
    import transformers

    config = getattr(transformers, f"{name}Config")(**settings)
    return getattr(transformers, f"{name}{kind}")(config).eval()


LIMITS = [
    ("Bert", {**SMALL, "max_position_embeddings": 40}, 40),
    ("Roberta", {**SMALL, "max_position_embeddings": 42, "pad_token_id": 1}, 40),
    ("Roberta", {**SMALL, "max_position_embeddings": 42, "pad_token_id": 0}, 41),
    ("XLMRoberta", {**SMALL, "max_position_embeddings": 42, "pad_token_id": 1}, 40),
    ("MPNet", {**SMALL, "max_position_embeddings": 42, "pad_token_id": 1}, 40),
    ("Electra", {**SMALL, "embedding_size": 16, "max_position_embeddings": 40}, 40),
    ("DistilBert", {"vocab_size": 64, "dim": 16, "n_layers": 1, "n_heads": 2, "max_position_embeddings": 40}, 40),
    ("GPT2", {"vocab_size": 64, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 40}, 40),
    ("OPT", {**SMALL, "ffn_dim": 24, "word_embed_proj_dim": 16, "max_position_embeddings": 40}, 40),
    ("Llama", {**SMALL, "max_position_embeddings": 40}, 40),
    ("Mistral", {**SMALL, "num_key_value_heads": 2, "max_position_embeddings": 40, "sliding_window": 8}, 40),
    ("T5", {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}, None),
    ("Bloom", {"vocab_size": 64, "hidden_size": 16, "n_layer": 1, "n_head": 2}, None),
    ("Falcon", {**SMALL, "alibi": True}, None),
    ("DebertaV2", {**SMALL, "relative_attention": True, "position_biased_input": False, "pos_att_type": ["p2c"]}, None),
    ("XLNet", {"vocab_size": 64, "d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 24}, None),
    ("Mamba", {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}, None),
]  # fmt: skip


@pytest.mark.parametrize(("name", "settings", "limit"), LIMITS, ids=[name for name, *_ in LIMITS])
def test_a_models_own_limit_of_positions(name: str, settings: dict, limit: int | None) -> None:
    """The limit is found without weights. The model reads a row of that length, and no longer one if it has a table."""
    with FakeTensorMode():
        assert positions(model_of(name, **settings)) == limit
    if name in ("Bert", "Roberta", "XLMRoberta", "MPNet", "Electra", "DistilBert", "GPT2", "OPT"):
        model = model_of(name, **settings)
        model(input_ids=torch.full((1, limit or 0), 5))
        with pytest.raises((IndexError, RuntimeError), match="index out of range|must match|out of bounds"):
            model(input_ids=torch.full((1, (limit or 0) + 1), 5))


def test_stretched_positions_and_the_tokenizers_limit() -> None:
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 10000.0}
    tokenizer = tiny_tokenizer()
    with FakeTensorMode():
        assert positions(model_of("Llama", **SMALL, max_position_embeddings=32, rope_parameters=rope)) == 128
        endless = model_of("Mamba", vocab_size=64, hidden_size=16, num_hidden_layers=1, state_size=4)
        assert longest_row(1024, endless, tokenizer) == 1024
        tokenizer.model_max_length = 100
        assert longest_row(1024, endless, tokenizer) == 100
        assert longest_row(50, model_of("Llama", **SMALL, max_position_embeddings=32), tokenizer) == 32


def saved(model: nn.Module, folder: Path, tokenizer=None) -> Path:
    model.save_pretrained(folder)
    (tokenizer or tiny_tokenizer()).save_pretrained(folder)
    return folder


def train(model: Path, rows: list[dict], folder: Path, *more: str) -> int:
    (folder / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["train", "--model", model, "--data", folder / "d.jsonl", "--output-dir", folder / "out"]
    words += ["--dtype", "float32", "--max-steps", "1", "--eval-samples", "4", "--max-new-tokens", "1", *more]
    return main([str(word) for word in words])


def test_a_classifiers_long_texts_are_cut_where_its_positions_end(
    tiny_encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"text": "the light " * 60 + str(index), "label": "ab"[index % 2]} for index in range(8)]
    rows += [{"text": f"short {index}", "label": "ab"[index % 2]} for index in range(8)]
    assert train(tiny_encoder, rows, tmp_path, "--holdout", "0.2") == 0
    printed = capsys.readouterr().out
    assert "8 rows of 64 tokens (all that the model has positions for) or more: what is beyond is cut" in printed


@pytest.mark.parametrize("too_long", ["drop", "truncate"])
def test_a_language_models_long_rows_are_dropped_or_cut_where_its_positions_end(
    too_long: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = tiny_tokenizer()
    settings = dict(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=64)
    base = saved(model_of("GPT2", "LMHeadModel", **settings), tmp_path / "base", tokenizer)
    long = [{"prompt": "on", "completion": "light " * 60 + str(index)} for index in range(4)]
    short = [{"prompt": f"on {index}", "completion": "off"} for index in range(4)]
    assert train(base, [*long, *short], tmp_path, "--holdout", "0", "--too-long", too_long) == 0
    how = {"drop": "left out", "truncate": "cut"}[too_long]
    said = f"4 rows over 64 tokens (all that the model has positions for), --too-long {too_long}: {how}"
    assert said in capsys.readouterr().out
    if too_long == "drop":
        (tmp_path / "all").mkdir()
        assert train(base, long, tmp_path / "all", "--holdout", "0") == 1
        err = capsys.readouterr().err
        assert "all are over 64 tokens; shorten them, or cut them with --too-long truncate" in err
        assert not (tmp_path / "all" / "out").exists()


def test_tokens_without_a_row_in_the_embedding_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = tiny_tokenizer()
    size = len(tokenizer)
    tokenizer.add_tokens(["<ours>", "<more>"])
    base = saved(model_of("Llama", "ForCausalLM", **{**SMALL, "vocab_size": size}), tmp_path / "base", tokenizer)
    fine = [{"prompt": "a", "completion": f"b{index}"} for index in range(4)]
    assert train(base, fine, tmp_path) == 0
    (tmp_path / "bad").mkdir()
    capsys.readouterr()
    assert train(base, [*fine, {"prompt": "a", "completion": "<ours>"}], tmp_path / "bad") == 1
    err = capsys.readouterr().err
    assert f"the tokenizer has {size + 2} tokens, the model's embedding {size} rows" in err
    assert f"'<ours>' ({size})" in err and "<more>" not in err
    assert not (tmp_path / "bad" / "out").exists()


@pytest.mark.parametrize("lacks", ["end", "both"])
def test_a_tokenizer_without_end_or_padding_is_found_before_a_folder_is_made(
    lacks: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = tiny_tokenizer(chat_template=None if lacks == "end" else tiny_tokenizer().chat_template)
    tokenizer.eos_token = None
    if lacks == "both":
        tokenizer.pad_token = None
    base = saved(model_of("Llama", "ForCausalLM", **{**SMALL, "vocab_size": 300}), tmp_path / "base", tokenizer)
    assert load_tokenizer(str(base)).eos_token is None
    assert train(base, [{"prompt": "a", "completion": f"b{index}"} for index in range(4)], tmp_path) == 1
    expected = {"end": "has no end token", "both": "names neither a padding nor an end token"}[lacks]
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


class _Habits(nn.Module):
    """A causal model whose forward pass uses logits_to_keep, ignores it, or does not accept it."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.lm_head = nn.Embedding(32, 8), nn.Linear(8, 32, bias=False)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def run(self, ids: torch.Tensor, keep: Any = slice(None)) -> object:
        from types import SimpleNamespace

        hidden = torch.tanh(self.table(ids).cumsum(1))
        return SimpleNamespace(logits=self.lm_head(hidden[:, keep]))


class _Knows(_Habits):
    def forward(self, input_ids, attention_mask=None, use_cache=None, logits_to_keep=slice(None)):
        return self.run(input_ids, logits_to_keep)


class _Swallows(_Habits):
    def forward(self, input_ids, **kwargs):
        return self.run(input_ids)


class _TakesNeither(_Habits):
    def forward(self, input_ids, attention_mask=None):
        return self.run(input_ids)


@pytest.mark.parametrize("kind", [_Knows, _Swallows, _TakesNeither])
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("learnt", ["all", "some", "one", "none"])
def test_the_loss_is_that_of_all_logits_whatever_a_model_does_with_logits_to_keep(
    kind: type[_Habits], frozen: bool, learnt: str
) -> None:
    model = kind().requires_grad_(not frozen)
    ids = torch.randint(32, (3, 11))
    labels = ids.clone()
    if learnt != "all":
        labels[:, : {"some": 6, "one": 10, "none": 11}[learnt]] = -100
    if learnt == "some":
        labels[1, 8:] = -100
    head = frozen_head(model)
    assert (head is not None) == frozen
    found = causal_loss(model, {"input_ids": ids, "labels": labels}, head)
    logits = model(ids).logits[:, :-1].flatten(0, 1)
    torch.testing.assert_close(found, F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum"))


def test_logits_of_another_shape_are_no_loss() -> None:
    class Halves(_Habits):
        def forward(self, input_ids, **kwargs):
            return self.run(input_ids, slice(None, None, 2))

    ids = torch.randint(32, (2, 11))
    model = Halves().requires_grad_(True)
    with pytest.raises(ValueError, match="gives 6 columns of logits for rows of 11 tokens, of which 10 were asked for"):
        causal_loss(model, {"input_ids": ids, "labels": ids}, None)


@pytest.mark.parametrize(
    ("name", "kind", "settings", "causal"),
    [
        ("Bert", "LMHeadModel", {**SMALL, "is_decoder": False}, False),
        ("Bert", "LMHeadModel", {**SMALL, "is_decoder": True}, True),
        ("Roberta", "ForCausalLM", {**SMALL, "is_decoder": False}, False),
        ("Electra", "ForCausalLM", {**SMALL, "embedding_size": 16, "is_decoder": False}, False),
        ("Llama", "ForCausalLM", SMALL, True),
        ("GPT2", "LMHeadModel", {"vocab_size": 64, "n_embd": 16, "n_layer": 1, "n_head": 2}, True),
        ("Mamba", "ForCausalLM", {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1}, True),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_looks_ahead_is_found(
    name: str, kind: str, settings: dict, causal: bool, dtype: torch.dtype
) -> None:
    # In half precision the embeddings must be larger than rounding errors, as in a trained model.
    spread = 0.1 if dtype == torch.float32 else 1.0
    model = model_of(name, kind, **settings, initializer_range=spread).to(dtype)
    if causal:
        check_causal(model)
    else:
        with pytest.raises(ValueError, match=rf"{name}{kind} is not causal as it is configured"):
            check_causal(model)


def test_a_model_that_looks_ahead_is_not_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = tiny_tokenizer(chat_template=None)
    settings = {**SMALL, "vocab_size": len(tokenizer), "pad_token_id": 0}
    base = saved(model_of("Bert", "LMHeadModel", **settings), tmp_path / "base", tokenizer)
    assert train(base, [{"prompt": "a", "completion": f"b{index}"} for index in range(4)], tmp_path) == 1
    assert "BertLMHeadModel is not causal as it is configured" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("labels", [[1, 2, 3, 4, 5], ["1", "2", "3", "4", "5"]])
def test_ratings_can_be_numbers(
    labels: list, tiny_encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"text": f"light {index}", "label": labels[index % 5]} for index in range(20)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["check", "--model", str(tiny_encoder), "--data", str(tmp_path / "d.jsonl")]
    assert main([*words, "--task", "regression"]) == 0
    assert "predicts: a number" in capsys.readouterr().out
    assert main(words) == 0
    assert "taken as 5 classes; to predict them as numbers: --task regression" in capsys.readouterr().out
