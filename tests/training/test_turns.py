"""Where the assistant's turns stand in the templates of real models, compared with the templates' own marks.

TRL has these templates, some in a second version in which `{% generation %}` marks the assistant's turns.
"""

import json
from importlib.resources import files
from typing import Any

import pytest

from conftest import CHATML, tiny_tokenizer
from lorakit.core.errors import LoraError
from lorakit.training.data import Example, read_data
from lorakit.training.tokens import IGNORED, encode, encode_all, preview, prompt_ids

TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = {"id": "call00001", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'}}
CALLING: list[dict[str, Any]] = [
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "name": "get_weather", "tool_call_id": "call00001", "content": "sunny, 30"},
    {"role": "assistant", "content": "It is sunny."},
]
TALK = [
    {"role": "user", "content": "Q1"},
    {"role": "assistant", "content": "A1"},
    {"role": "user", "content": "Q2"},
    {"role": "assistant", "content": "A2"},
]


def of_model(name: str):
    tokenizer = tiny_tokenizer(files("trl").joinpath("chat_templates", f"{name}.jinja").read_text(encoding="utf-8"))
    tokenizer.bos_token = "<s>"
    return tokenizer


def row(tmp_path, **keys: Any) -> Example:
    (tmp_path / "d.jsonl").write_text(json.dumps(keys) + "\n")
    return read_data(str(tmp_path / "d.jsonl"), holdout=0).train[0]


def learnt(example: Example, tokenizer, **options: Any) -> list[str]:
    tokens = encode(example, tokenizer, system=None, chat=True, **options)
    return [text for text, bears_loss in preview(tokens, tokenizer) if bears_loss]


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        *((name, {"messages": TALK}) for name in ("cohere_training", "cohere2_training", "gemma3_training")),
        *((name, {"messages": TALK}) for name in ("glm4moe_training", "llama3_training")),
        *((name, {"messages": TALK}) for name in ("qwen3_training", "lfm2_training", "qwen3_vl_training")),
        *((name, {"messages": CALLING, "tools": [TOOL]}) for name in ("glm4moe_training", "qwen3_vl_training")),
        *((name, {"messages": CALLING, "tools": [TOOL]}) for name in ("qwen3_training", "lfm2_v2_training")),
    ],
)
def test_turns_that_are_found_are_those_that_the_template_marks(name: str, keys: dict, tmp_path) -> None:
    tokenizer = of_model(name)
    example = row(tmp_path, **keys)
    found = encode(example, tokenizer, system=None, chat=True)
    messages = [
        {**own, "tool_calls": [{**CALL, "function": {"name": "get_weather", "arguments": {"city": "Rome"}}}]}
        if "tool_calls" in own
        else own
        for own in keys["messages"]
    ]
    messages = [{**own, "content": own["content"] or ""} for own in messages]
    marked = tokenizer.apply_chat_template(
        messages, tools=keys.get("tools"), return_dict=True, return_assistant_tokens_mask=True
    )
    ids = marked["input_ids"]
    assert found.input_ids[: len(ids)] == ids
    ours = [label != IGNORED for label in found.labels[: len(ids)]]
    # Some marks go on to the line break after the end token, which the model never has to write.
    line_break = tokenizer.encode("\n", add_special_tokens=False)
    theirs = [
        bool(mark) and not (ids[i] in line_break and ids[i - 1] == tokenizer.eos_token_id)
        for i, mark in enumerate(marked["assistant_masks"])
    ]
    assert any(theirs) and ours == theirs


@pytest.mark.parametrize(
    ("name", "messages", "expected"),
    [
        # An empty thought is printed before the last answer alone.
        ("qwen3", TALK, ["A1<|im_end|>", "<think>\n\n</think>\n\nA2<|im_end|>"]),
        # The prompt for an answer opens a thought, and before earlier answers stands none: they are read.
        ("qwen3_6", TALK, ["\n</think>\n\nA2<|im_end|>"]),
        # The last answer ends with another token than those before it, which is not learnt there.
        (
            "gptoss",
            TALK,
            ["<|channel|>final<|message|>A1", "<|channel|>final<|message|>A2<|return|><|im_end|>"],
        ),
        (
            "qwen3",
            CALLING,
            [
                '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call><|im_end|>',
                "<think>\n\n</think>\n\nIt is sunny.<|im_end|>",
            ],
        ),
    ],
)
def test_a_turn_is_learnt_as_it_is_printed(name: str, messages: list, expected: list[str], tmp_path) -> None:
    keys = {"messages": messages} | ({"tools": [TOOL]} if messages is CALLING else {})
    assert learnt(row(tmp_path, **keys), of_model(name)) == expected


def test_a_turn_without_its_thoughts_is_read() -> None:
    thinking = [{**own, "reasoning_content": "hm"} if own["role"] == "assistant" else own for own in TALK]
    example = Example("d:1", messages=tuple(thinking))
    tokenizer = of_model("qwen3")
    assert learnt(example, tokenizer) == ["<think>\nhm\n</think>\n\nA2<|im_end|>"]
    options: dict[str, Any] = {"max_length": 500, "too_long": "drop", "system": None, "chat": True}
    notes = encode_all([example], tokenizer, **options).notes
    assert "1 earlier assistant turns are read, not learnt: the chat template changes them later on" in notes


MOVING = (  # the system message stands before the last question, as in Mistral's template
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST]{% if loop.index0 >= messages | length - 2 and "
    "messages[0]['role'] == 'system' %}{{ messages[0]['content'] }} {% endif %}{{ m['content'] }}[/INST]"
    "{% elif m['role'] == 'assistant' %}{{ m['content'] }}<|im_end|>{% endif %}{% endfor %}"
)


def test_turns_are_found_where_the_text_before_them_changes() -> None:
    tokenizer = tiny_tokenizer(MOVING)
    messages = ({"role": "system", "content": "Be kind."}, *TALK)
    tokens = encode(Example("d:1", messages=messages), tokenizer, system=None, chat=True)
    assert tokenizer.decode(tokens.input_ids) == "[INST]Q1[/INST]A1<|im_end|>[INST]Be kind. Q2[/INST]A2<|im_end|>"
    assert [text for text, bears in preview(tokens, tokenizer) if bears] == ["A1<|im_end|>", "A2<|im_end|>"]


@pytest.mark.parametrize(
    "template",
    [
        CHATML + CHATML,  # all turns twice
        "{% for m in messages %}{{ m['role'] }} {% endfor %}" + "{% for m in messages %}{{ m['content'] }}{% endfor %}"
        "{% for m in messages | reverse %}{{ m['content'] }}{% endfor %}",
    ],
)
def test_a_template_that_mixes_the_turns_is_refused(template: str) -> None:
    with pytest.raises(LoraError, match="does not let the assistant's turns be found"):
        learnt(Example("d:1", messages=tuple(TALK)), tiny_tokenizer(template))


# --- in the form that the template takes -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen3", "gptoss", "glm4moe", "lfm2_2_5", "nemotron_3_nano"])
@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking", "part"])
def test_thoughts_reach_the_template_under_every_name(name: str, key: str, tmp_path) -> None:
    said: dict[str, Any] = {"role": "assistant", "content": "A"}
    if key == "part":
        parts = [{"type": "thinking", "thinking": "hm hm"}, {"type": "text", "text": "A"}]
        said = {"role": "assistant", "content": parts}
    else:
        said[key] = "hm hm"
    example = row(tmp_path, messages=[{"role": "user", "content": "Q"}, said])
    tokenizer = of_model(name)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A", "reasoning_content": "hm hm"}],
        tokenize=False,
    )
    assert "hm hm" in text
    found = tokenizer.decode(encode(example, tokenizer, system=None, chat=True).input_ids)
    assert found in (text, text + "<|im_end|>")  # the tokenizer's end, where the template prints another
    assert "hm hm" in learnt(example, tokenizer)[-1]


@pytest.mark.parametrize("name", ["qwen2_5_training", "qwen3_instruct_2507_training", "gemma4_v2", "deepseekv3"])
def test_thoughts_that_a_template_never_prints_are_refused(name: str) -> None:
    """The names of two of these templates' own settings, or comments, hold the word."""
    said = {"role": "assistant", "content": "A", "thinking": "hm hm"}
    with pytest.raises(ValueError, match="does not print thinking; put it into content"):
        learnt(Example("d:1", messages=({"role": "user", "content": "Q"}, said)), of_model(name))


@pytest.mark.parametrize("name", ["qwen2_5", "llama3_1", "glm4moe", "gemma4", "gptoss"])
@pytest.mark.parametrize("bare", [False, True])
def test_tools_are_printed_as_transformers_prints_them(name: str, bare: bool, tmp_path) -> None:
    tokenizer = of_model(name)
    example = row(tmp_path, messages=CALLING, tools=[TOOL["function"] if bare else TOOL])
    messages: list[dict[str, Any]] = [{**own} for own in CALLING]
    messages[1] = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{**CALL, "function": {"name": "get_weather", "arguments": {"city": "Rome"}}}],
    }
    # Qwen, Llama and GLM print a plain function as it is; the others take it in "function" alone.
    plain = bare and name in ("qwen2_5", "llama3_1", "glm4moe")
    tools = [TOOL["function"] if plain else TOOL]
    asked = prompt_ids(example, tokenizer, system=None, chat=True)
    expected = tokenizer.apply_chat_template(messages[:-1], tools=tools, tokenize=False, add_generation_prompt=True)
    text = tokenizer.decode(asked)
    assert "The weather of a city" in expected and "sunny, 30" in expected
    assert text.startswith(expected) or expected.startswith(text)
    assert "sunny, 30" in text


@pytest.mark.parametrize("name", ["smolvlm", "idefics3", "llava_next"])
def test_templates_that_take_only_parts_get_parts(name: str) -> None:
    tokenizer = of_model(name)
    parts = [{**own, "content": [{"type": "text", "text": own["content"]}]} for own in TALK]
    expected = tokenizer.apply_chat_template(parts, tokenize=False)
    found = tokenizer.decode(encode(Example("d:1", messages=tuple(TALK)), tokenizer, system=None, chat=True).input_ids)
    assert found in (expected, expected + "<|im_end|>")
