"""Which tokens bear loss: checked on decoded text, with a real tokenizer and with templates of other kinds."""

from typing import Any

import pytest

from conftest import CHATML, tiny_tokenizer
from lorakit.training.data import Example
from lorakit.training.rows import DataError
from lorakit.training.tokens import IGNORED, Tokens, encode, encode_all, preview, prompt_ids, reference

PAIR = Example("d:1", prompt="Turn it on", completion="done")
TALK = Example(
    "d:1",
    messages=(
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "more"},
        {"role": "assistant", "content": "bye"},
    ),
)

LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }}<|im_end|>{% endif %}{% endfor %}"
)
NO_END = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
STRIPS_THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and not loop.last %}{{ m['content'].split('</t>')[-1] }}"
    "{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def learnt(tokens: Tokens, tokenizer) -> list[str]:
    """The runs of text that bear loss."""
    return [text for text, bears_loss in preview(tokens, tokenizer) if bears_loss]


@pytest.fixture(scope="module")
def smollm2(smollm2_folder):
    from lorakit.training.models import load_tokenizer

    return load_tokenizer(str(smollm2_folder))


def test_problem_39_and_40_the_answer_and_its_end_bear_loss_and_nothing_else(smollm2) -> None:
    tokens = encode(PAIR, smollm2, system="Be brief.", chat=True)
    text = smollm2.decode(tokens.input_ids)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nTurn it on<|im_end|>\n"
        "<|im_start|>assistant\ndone<|im_end|>\n"
    )
    assert learnt(tokens, smollm2) == ["done<|im_end|>"]
    reference_ids = smollm2.apply_chat_template(
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Turn it on"},
            {"role": "assistant", "content": "done"},
        ],
        tokenize=True,
    )["input_ids"]
    assert tokens.input_ids == reference_ids


def test_every_assistant_turn_bears_loss(smollm2) -> None:
    assert learnt(encode(TALK, smollm2, system=None, chat=True), smollm2) == ["hello<|im_end|>", "bye<|im_end|>"]
    assert TALK.messages is not None
    with_system = Example("d:1", messages=({"role": "system", "content": "own"}, *TALK.messages))
    text = smollm2.decode(encode(with_system, smollm2, system="other", chat=True).input_ids)
    assert "own" in text and "other" not in text


@pytest.mark.parametrize("example", [PAIR, TALK], ids=["pair", "talk"])
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_generation_starts_where_the_loss_does(smollm2, example: Example, system: str | None) -> None:
    tokens = encode(example, smollm2, system=system, chat=True)
    end = max(i for i, label in enumerate(tokens.labels) if label != IGNORED)
    start = max(i for i in range(end) if tokens.labels[i] == IGNORED) + 1
    assert prompt_ids(example, smollm2, system=system, chat=True) == tokens.input_ids[:start]
    assert smollm2.decode(tokens.input_ids[start:end]) == reference(example, smollm2)


@pytest.mark.parametrize("bos", [False, True])
def test_plain_rows_have_one_beginning_and_one_end(bos: bool) -> None:
    tokenizer = tiny_tokenizer(bos=bos)
    tokens = encode(PAIR, tokenizer, system=None, chat=False)
    assert tokenizer.decode(tokens.input_ids) == ("<s>" if bos else "") + "Turn it ondone<|im_end|>"
    assert learnt(tokens, tokenizer) == ["done<|im_end|>"]
    start = tokens.labels.index(next(label for label in tokens.labels if label != IGNORED))
    assert prompt_ids(PAIR, tokenizer, system=None, chat=False) == tokens.input_ids[:start]
    text = encode(Example("d:1", text="on and off"), tokenizer, system=None, chat=True)
    assert tokenizer.decode(text.input_ids) == ("<s>" if bos else "") + "on and off<|im_end|>"
    assert text.labels == text.input_ids


def test_problem_41_a_template_with_a_beginning_token_gets_no_second_one() -> None:
    tokenizer = tiny_tokenizer(LLAMA2, bos=True)
    tokens = encode(TALK, tokenizer, system=None, chat=True)
    assert tokens.input_ids.count(tokenizer.bos_token_id) == 1
    assert learnt(tokens, tokenizer) == [" hello<|im_end|>", " bye<|im_end|>"]
    assert prompt_ids(PAIR, tokenizer, system=None, chat=True).count(tokenizer.bos_token_id) == 1


def test_problem_40_a_template_without_an_end_token_gets_one() -> None:
    tokenizer = tiny_tokenizer(NO_END)
    tokens = encode(PAIR, tokenizer, system=None, chat=True)
    assert tokens.input_ids[-1] == tokens.labels[-1] == tokenizer.eos_token_id
    assert "".join(learnt(tokens, tokenizer)).startswith("done")


def test_a_template_that_strips_earlier_thinking_teaches_the_last_turn() -> None:
    tokenizer = tiny_tokenizer(STRIPS_THINKING)
    talk = Example(
        "d:1",
        messages=(
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "<t>b</t>c"},
            {"role": "user", "content": "d"},
            {"role": "assistant", "content": "<t>e</t>f"},
        ),
    )
    assert learnt(encode(talk, tokenizer, system=None, chat=True), tokenizer) == ["<t>e</t>f<|im_end|>"]


def test_conversations_need_a_template() -> None:
    with pytest.raises(ValueError, match="tokenizer has no chat template"):
        encode(TALK, tiny_tokenizer(None), system=None, chat=False)


def test_problem_42_long_rows_are_dropped_or_cut_and_counted() -> None:
    tokenizer = tiny_tokenizer()
    long = Example("d:2", prompt="Turn it on", completion="on " * 50)
    asks = Example("d:3", prompt="off " * 50, completion="on")
    options: dict[str, Any] = {"max_length": 40, "system": None, "chat": True}
    dropped = encode_all([PAIR, long], tokenizer, too_long="drop", **options)
    assert (len(dropped.rows), dropped.dropped, dropped.truncated) == (1, 1, 0)
    cut = encode_all([PAIR, long, asks], tokenizer, too_long="truncate", **options)
    assert (len(cut.rows), cut.dropped, cut.truncated) == (2, 1, 1)  # nothing of the third row's answer is left
    assert len(cut.rows[1].input_ids) == 40


def test_problem_39_a_row_without_loss_is_an_error() -> None:
    silent = CHATML.replace(
        "{{ message['content'] }}", "{% if message['role'] == 'user' %}{{ message['content'] }}{% endif %}"
    )
    with pytest.raises(DataError, match=r"d:1: no token of this row bears loss"):
        encode_all([PAIR], tiny_tokenizer(silent), max_length=100, too_long="drop", system=None, chat=True)
    endless = tiny_tokenizer(NO_END)
    endless.eos_token = None
    with pytest.raises(ValueError, match="this tokenizer has no end token"):
        encode(PAIR, endless, system=None, chat=True)
