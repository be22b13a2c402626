"""Scores on held-out rows, against what the model itself gives for them."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats

from adapters import classifier_adapter, language_adapter
from conftest import tiny_tokenizer
from lorakit.training.data import Data, Example
from lorakit.training.evaluate import evaluate, outputs, predict
from lorakit.training.models import Loaded, load_with_adapter
from lorakit.training.style import Style
from storages import Outputs


def data(examples: list[Example], task: str = "causal-lm", labels: tuple[str, ...] = ()) -> Data:
    return Data("any", task, examples, [], [], labels)


@pytest.fixture(scope="module")
def language(tiny_lm: Path, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    folder = language_adapter(tiny_lm, tmp_path_factory.mktemp("evaluate") / "adapter", scale=0.5)
    return load_with_adapter(str(folder), None, dtype="float32")


@torch.no_grad()
def perplexity(model: Any, tokenizer: Any, texts: list[str], most: int) -> float:
    total, count = 0.0, 0
    for text in texts:
        ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id][:most]
        p = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        total -= sum(float(p[i, ids[i + 1]]) for i in range(len(ids) - 1))
        count += len(ids) - 1
    return math.exp(total / count)


@pytest.mark.parametrize("most", [64, 6])
def test_plain_text_is_scored_by_its_perplexity(most: int, language: Loaded) -> None:
    from lorakit.core.switching import disabled

    texts = ["turn the light on", "and off", "system user assistant turn the light on and off"]
    examples = [Example(f"d:{i}", text=text) for i, text in enumerate(texts)]
    result = evaluate(language, data(examples), "test", examples, Style(False), max_length=most)
    with disabled(language.model):
        base = perplexity(language.model, language.tokenizer, texts, most)
    adapted = perplexity(language.model, language.tokenizer, texts, most)
    assert result.metrics.keys() == {"perplexity"}
    assert result.metrics["perplexity"] == pytest.approx((base, adapted), rel=1e-4)
    assert base != pytest.approx(adapted, rel=1e-2)
    assert (result.rows, result.samples) == (3, ())
    assert bool(result.notes) == (most == 6)
    # The interval lies between the perplexities of the easiest and of the hardest text.
    alone = [perplexity(language.model, language.tokenizer, [text], most) for text in texts]
    low, high = result.intervals["perplexity"][1]
    assert min(alone) <= low * (1 + 1e-4) < adapted < high <= max(alone) * (1 + 1e-4)


def test_answers_are_compared_with_what_is_expected_row_by_row(language: Loaded) -> None:
    from lorakit.training.generation import answers
    from lorakit.training.tokens import prompt_ids

    asked = ["turn the light on", "off", "system"]
    style = Style(True, "Be brief.")
    prompts = [prompt_ids(text, language.tokenizer, system="Be brief.", chat=True) for text in asked]
    own = list(answers(language, prompts, max_new_tokens=8))
    expected = [own[0], "something else", own[2]]
    examples = [Example(f"d:{i}", prompt=p, completion=c) for i, (p, c) in enumerate(zip(asked, expected, strict=True))]
    result = evaluate(language, data(examples), "test", examples, style, max_length=64, max_new_tokens=8)
    assert result.right == (True, False, True)
    assert result.metrics["exact match"][1] == 2 / 3
    assert [sample.adapter for sample in result.samples] == own
    within = stats.binomtest(2, 3).proportion_ci(0.95, method="wilson")
    assert result.intervals["exact match"][1] == pytest.approx((within.low, within.high))


def test_problem_49_texts_are_read_with_one_row_of_logits_in_memory(language: Loaded) -> None:
    examples = [Example(f"d:{i}", text="turn the light on " * (i + 1)) for i in range(5)]
    with Outputs(language.model) as outputs_of:
        evaluate(language, data(examples), "test", examples, Style(False), max_length=64)
    assert len(outputs_of.alive) == 10 and max(outputs_of.alive) == 1  # with the base model and with the adapter


def test_no_rows_and_rows_beyond_the_positions(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = tiny_tokenizer()
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=24)
    loaded = Loaded(GPT2LMHeadModel(config).eval(), tokenizer)
    long = Example("d.jsonl:1", prompt="turn the light on and off " * 9, completion="on")
    short = Example("d.jsonl:2", prompt="on", completion="off")
    result = evaluate(loaded, data([long, short]), "test", [long, short], Style(False), max_length=64)
    assert (result.rows, len(result.samples)) == (1, 1)
    assert result.notes == ("1 rows left out, d.jsonl:1 first: the model has positions for 24 tokens",)
    assert evaluate(loaded, data([long]), "test", [long], Style(False), max_length=64).rows == 0
    for task in ("causal-lm", "classification", "regression"):
        assert evaluate(loaded, data([short], task), "test", [], Style(False), max_length=64).rows == 0


def test_texts_of_a_classifier_are_cut_at_its_positions_and_batches_change_nothing(
    tiny_encoder: Path, tmp_path: Path
) -> None:
    adapter = classifier_adapter(tiny_encoder, tmp_path / "adapter", ("no", "yes", "perhaps"))
    loaded = load_with_adapter(str(adapter), None, dtype="float32")
    texts = ["on", "turn the light off and on", "the light " * 200, "system user"]
    examples = [Example(f"d:{i}", text=text, text_pair="and off" if i % 2 else None) for i, text in enumerate(texts)]
    together = outputs(loaded, examples, 1024, "reading")
    with torch.no_grad():
        for row, example in zip(together, examples, strict=True):
            inputs = loaded.tokenizer(
                example.text, example.text_pair, return_tensors="pt", truncation=True, max_length=64
            )
            torch.testing.assert_close(row, loaded.model(**inputs).logits[0], atol=1e-5, rtol=1e-4)
    found = predict(loaded, data(examples, "classification", ("no", "yes", "perhaps")), examples, 1024, "model")
    assert found == [("no", "yes", "perhaps")[i] for i in together.argmax(-1).tolist()]
    result = evaluate(
        loaded, data(examples, "classification", ("no", "yes", "perhaps")), "test",
        [Example("d:0", text="on", label="no")], Style(False), max_length=64,
    )  # fmt: skip
    assert "random" in result.notes[0]


def test_a_regression_has_an_interval_of_its_correlation_and_no_right_rows(tiny_encoder: Path, tmp_path: Path) -> None:
    adapter = classifier_adapter(tiny_encoder, tmp_path / "adapter", ())
    loaded = load_with_adapter(str(adapter), None, dtype="float32")
    examples = [Example(f"d:{i}", text="on " * (i + 1), label=float(i % 7)) for i in range(30)]
    result = evaluate(loaded, data(examples, "regression"), "test", examples, Style(False), max_length=64)
    numbers = outputs(loaded, examples, 64, "reading")[:, 0].numpy()
    truth = [float(i % 7) for i in range(30)]
    score = stats.pearsonr(numbers, truth)
    expected = score.confidence_interval(method=stats.BootstrapMethod(method="percentile", random_state=0))
    assert result.metrics["pearson"][1] == pytest.approx(score.statistic, abs=1e-5)
    assert result.intervals["pearson"][1] == pytest.approx((expected.low, expected.high), abs=0.06)
    assert result.right == ()
