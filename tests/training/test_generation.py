"""Only the model and the caller's options decide an answer; from generation_config.json only the end of an answer is
taken."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import CHATML, tiny_tokenizer
from lorakit.training.generation import answers, end_tokens, room, stream
from lorakit.training.models import Loaded, load_causal_lm
from lorakit.training.positions import positions
from lorakit.training.tokens import prompt_ids
from models import llama_config

TEXTS = ("on", "turn the light off and on", "system user assistant")


@pytest.fixture(scope="module")
def lively(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model whose likeliest tokens vary."""
    from transformers import LlamaForCausalLM

    folder = tmp_path_factory.mktemp("lively")
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    varied: dict[str, Any] = dict(num_key_value_heads=4, initializer_range=0.5, max_position_embeddings=48)
    LlamaForCausalLM(llama_config(tokenizer, **varied)).save_pretrained(folder)
    return folder


@torch.no_grad()
def likeliest(loaded: Loaded, prompt: list[int], count: int) -> str:
    """The greedy answer, one forward pass over everything for each token."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(loaded.model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == 3:
            break
    return str(loaded.tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True))


@pytest.mark.parametrize(
    "config",
    [
        {"repetition_penalty": 1.8},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.1},
        {"no_repeat_ngram_size": 1},
        {"max_length": 5},
        {"min_new_tokens": 12},
        {"suppress_tokens": [10, 11]},
        {"bad_words_ids": [[20], [30], [40]]},
        {"forced_eos_token_id": 3},
        {"return_dict_in_generate": True, "output_scores": True},
        {"do_sample": True, "temperature": 5.0, "top_k": 3},
        {"guidance_scale": 3.0},
        {"use_cache": False},
        {},
    ],
    ids=lambda config: "-".join(config) or "nothing",
)
def test_greedy_is_the_likeliest_token_whatever_the_models_configuration_asks(
    config: dict[str, Any], lively: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(lively, folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 3, "pad_token_id": 0, **config}))
    loaded = load_causal_lm(str(folder), dtype="float32")
    prompts = [prompt_ids(text, loaded.tokenizer, system=None, chat=False) for text in TEXTS]
    expected = [likeliest(loaded, prompt, 10) for prompt in prompts]
    own = loaded.model.generation_config
    assert list(answers(loaded, prompts, max_new_tokens=10)) == expected
    assert ["".join(stream(loaded, prompt, max_new_tokens=10)) for prompt in prompts] == expected
    assert loaded.model.generation_config is own


def test_answers_of_a_batch_are_those_of_each_prompt_alone_up_to_the_last_position(lively: Path) -> None:
    loaded = load_causal_lm(str(lively), dtype="float32")
    prompts = [[5] * 2, [5, 9, 30] * 12, [7] * 45, [8] * 47, [5, 9, 30] * 4]
    assert positions(loaded.model) == 48
    together = list(answers(loaded, prompts, max_new_tokens=12))
    assert together == [likeliest(loaded, prompt, min(12, 48 - len(prompt))) for prompt in prompts]
    assert room(loaded, prompts[2], 12) == 3
    with pytest.raises(ValueError, match="the prompt has 48 tokens, and this model has positions for 48"):
        list(answers(loaded, [[7] * 48], max_new_tokens=1))
    with pytest.raises(ValueError, match="the prompt has 60 tokens"):
        list(stream(loaded, [7] * 60, max_new_tokens=1))


def test_an_empty_prompt_begins_with_the_beginning_token_or_is_refused(lively: Path) -> None:
    loaded = load_causal_lm(str(lively), dtype="float32")
    with pytest.raises(ValueError, match="the prompt is empty, and this model's tokenizer has no token to begin with"):
        list(stream(loaded, [], max_new_tokens=4))
    with_start = Loaded(loaded.model, tiny_tokenizer(bos=True))
    assert "".join(stream(with_start, [], max_new_tokens=4)) == likeliest(loaded, [1], 4)


def test_sampling_draws_from_the_share_that_is_asked_for(lively: Path) -> None:
    loaded = load_causal_lm(str(lively), dtype="float32")
    prompt = [5, 9, 30]
    with torch.no_grad():
        logits = loaded.model(torch.tensor([prompt])).logits[0, -1]
    for temperature, top_p in ((1.0, 0.5), (3.0, 1.0)):
        p, order = (logits / temperature).softmax(-1).sort(descending=True)
        kept = order[: int((p.cumsum(0) < top_p).sum()) + 1]
        allowed = {str(loaded.tokenizer.decode([token], skip_special_tokens=True)) for token in kept.tolist()}
        torch.manual_seed(0)
        options: dict[str, Any] = {"max_new_tokens": 1, "temperature": temperature, "top_p": top_p}
        drawn = {"".join(stream(loaded, prompt, **options)) for _ in range(120)}
        assert drawn <= allowed
        assert len(drawn) > 1
    # Not only the 50 likeliest tokens, which are transformers' default.
    first = {str(loaded.tokenizer.decode([token], skip_special_tokens=True)) for token in order[:50].tolist()}
    assert drawn - first


@pytest.mark.parametrize("temperature", [1e-7, 1e-30, 1e-300])
def test_no_temperature_is_too_cold(temperature: float, lively: Path) -> None:
    loaded = load_causal_lm(str(lively), dtype="float32")
    found = "".join(stream(loaded, [5, 9, 30], max_new_tokens=6, temperature=temperature))
    assert found == likeliest(loaded, [5, 9, 30], 6)


def test_pieces_hold_whole_characters_and_every_space(lively: Path) -> None:
    from lorakit.training.generation import _pieces

    tokenizer = tiny_tokenizer()
    for text in ("a\n  b\n\n c", "né 😀 日本", "x \n", " ", "don 't . stop ?"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        pieces = list(_pieces(tokenizer, [[token] for token in ids]))  # type: ignore[arg-type]
        assert "".join(pieces) == text
        assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (CHATML, "<|im_end|>"),
        (CHATML.replace("<|im_end|>", "<s>"), "<|im_end|>"),  # no known end token, so training adds the tokenizer's
        (None, "<|im_end|>"),
        ("{{ raise_exception('no such roles') }}", "<|im_end|>"),
    ],
)
def test_answers_end_where_training_ends_them(template: str | None, end: str, lively: Path) -> None:
    loaded = load_causal_lm(str(lively), dtype="float32")
    loaded.model.generation_config.eos_token_id = [7, 9]
    tokenizer = tiny_tokenizer(chat_template=template)
    ends = end_tokens(Loaded(loaded.model, tokenizer))
    assert ends == sorted({7, 9, tokenizer.convert_tokens_to_ids(end)})
    other = tiny_tokenizer()
    other.eos_token = "<s>"
    assert end_tokens(Loaded(loaded.model, other)) == [1, 3, 7, 9]  # ChatML's end is learnt, not the tokenizer's


def test_stopping_to_read_stops_the_generation(lively: Path) -> None:
    import threading

    loaded = load_causal_lm(str(lively), dtype="float32")
    before = set(threading.enumerate())
    pieces = stream(loaded, [5, 9], max_new_tokens=40)
    next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert set(threading.enumerate()) <= before


def test_a_failure_of_the_model_reaches_the_reader(lively: Path) -> None:
    loaded = load_causal_lm(str(lively), dtype="float32")
    with pytest.raises(IndexError, match="index out of range"):
        list(stream(loaded, [100_000], max_new_tokens=4))
