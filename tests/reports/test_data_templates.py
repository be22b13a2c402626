"""What the model reads and learns with many different chat templates, compared with texts written by hand."""

import datetime
from pathlib import Path
from unittest import mock

import pytest

from conftest import CHATML, tiny_tokenizer
from lorakit.training.data import Example
from lorakit.training.rows import DataError
from lorakit.training.tokens import Encoded, encode, encode_all, preview, prompt_ids, reference

S, U, A, E = "<|im_start|>system\n", "<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>\n"
PLAIN = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
ASKS = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
TURN = "<|im_start|>{{ m['role'] }}\n{{ m['content'] or '' }}"
CALL_JSON = "<call>{{ c['function']['name'] }} {{ c['function']['arguments'] | tojson }}</call>"
CALL_TEXT = "<call>{{ c['function']['name'] }} {{ c['function']['arguments'] }}</call>"
CALL_ITEMS = (
    "<call>{{ c['function']['name'] }} {% for k, v in c['function']['arguments'].items() %}{{ k }}={{ v }}"
    "{% endfor %}</call>"
)


def with_calls(call: str, tools: bool = True) -> str:
    before = "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}" if tools else ""
    calls = "{% for c in m.get('tool_calls') or [] %}" + call + "{% endfor %}"
    return before + "{% for m in messages %}" + TURN + calls + "<|im_end|>\n{% endfor %}" + ASKS


def turns(*texts: str) -> tuple[dict, ...]:
    return tuple({"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts))


def learnt(example: Example, tokenizer, **style) -> list[str]:
    tokens = encode(example, tokenizer, **{"system": None, "chat": True, **style})
    return [text for text, bears_loss in preview(tokens, tokenizer) if bears_loss]


def all_of(examples: list[Example], tokenizer, system: str | None = None) -> Encoded:
    return encode_all(examples, tokenizer, max_length=500, too_long="drop", system=system, chat=True)


@pytest.mark.parametrize(
    ("template", "texts", "expected"),
    [
        (PLAIN + ASKS, ("hi", "yes"), ["yes<|im_end|>"]),
        (PLAIN + "<|im_start|>assistant\n", ("hi", "yes"), ["yes<|im_end|>"]),
        (PLAIN + "{{ '<|im_start|>assistant\n' }}", ("hi", "yes"), ["yes<|im_end|>"]),
        (PLAIN + "{{ '<|im_start|>assistant\n' }}", ("hi", "yes", "b", "no"), ["yes<|im_end|>", "no<|im_end|>"]),
        (PLAIN + "<|im_start|>assistant\n", ("hi", "yes", "b", "no"), ["yes<|im_end|>", "no<|im_end|>"]),
        (PLAIN, ("hi", "yes"), ["<|im_start|>assistant\nyes<|im_end|>"]),  # the model must open its turn itself
        (PLAIN + ASKS.replace("\n", "\n<think>\n"), ("a", "yes", "b", "no"), ["yes<|im_end|>", "no<|im_end|>"]),
        (PLAIN + ASKS.replace("\n", "\n<think>\n"), ("a", "<think>\nhm</think>yes"), ["hm</think>yes<|im_end|>"]),
        (PLAIN.replace("'content']", "'content'] | trim") + ASKS, (" a ", "\n\n yes \n"), ["yes<|im_end|>"]),
        (PLAIN + ASKS, (" a ", "\n\n yes \n"), ["\n\n yes \n<|im_end|>"]),
    ],
)
def test_exactly_the_answer_and_its_end_bear_loss(template: str, texts: tuple[str, ...], expected: list[str]) -> None:
    tokenizer = tiny_tokenizer(template)
    example = Example("d:1", messages=turns(*texts))
    assert learnt(example, tokenizer) == expected
    # Generation begins where the last answer begins.
    asked = prompt_ids(example, tokenizer, system=None, chat=True)
    row = encode(example, tokenizer, system=None, chat=True).input_ids
    assert tokenizer.decode(row[: len(asked)]) == tokenizer.decode(asked)
    assert tokenizer.decode(row[len(asked) :]).startswith(expected[-1])


def test_a_question_is_asked_as_the_rows_were() -> None:
    """For a template that always prints the prompt for an answer, with a line break that only turns have."""
    tokenizer = tiny_tokenizer(PLAIN + "<|im_start|>assistant\n")
    pair = Example("d:1", prompt="hi", completion="yes")
    assert prompt_ids("hi", tokenizer, system=None, chat=True) == prompt_ids(
        Example("d:1", messages=turns("hi", "yes")), tokenizer, system=None, chat=True
    ) == prompt_ids(pair, tokenizer, system=None, chat=True)  # fmt: skip


def test_marked_turns_bear_no_loss() -> None:
    tokenizer = tiny_tokenizer()
    talk = Example("d:1", messages=turns("a", "BAD", "b", "good", "c", "WORSE"), unlearnt=frozenset({1, 5}))
    for system in (None, "Be brief."):
        assert learnt(talk, tokenizer, system=system) == ["good<|im_end|>"]
        asked = tokenizer.decode(prompt_ids(talk, tokenizer, system=system, chat=True))
        assert asked == (f"{S}Be brief.{E}" if system else "") + f"{U}a{E}{A}BAD{E}{U}b{E}{A}"
    assert reference(talk, tokenizer) == "good"


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (CALL_JSON, '<call>set {"on": true, "room": "hall"}</call>'),
        (CALL_TEXT, '<call>set {"on": true, "room": "hall"}</call>'),
        (CALL_ITEMS, "<call>set on=Trueroom=hall</call>"),
    ],
)
@pytest.mark.parametrize("beside", ["", "let me see"])
def test_tool_calls_are_learnt_in_the_form_of_the_template(call: str, expected: str, beside: str) -> None:
    tokenizer = tiny_tokenizer(with_calls(call))
    function = {"name": "set", "arguments": {"on": True, "room": "hall"}}
    calling = {"role": "assistant", "content": beside, "tool_calls": [{"type": "function", "function": function}]}
    tools = ({"type": "function", "function": {"name": "set"}},)
    messages = ({"role": "user", "content": "a"}, calling)
    example = Example("d:1", messages=messages, tools=tools)
    assert learnt(example, tokenizer) == [f"{beside}{expected}<|im_end|>"]
    assert reference(example, tokenizer) == beside + expected
    asked = tokenizer.decode(prompt_ids(example, tokenizer, system=None, chat=True))
    assert asked.startswith('<tools>[{"type": "function"') and asked.endswith(A)


def test_templates_that_tell_calls_by_content_that_is_not_there() -> None:
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{% if m['content'] is defined %}{{ m['content'] }}{% else %}{% for c in m['tool_calls'] %}"
        + CALL_JSON
        + "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
        + ASKS
    )
    call = {"type": "function", "function": {"name": "set", "arguments": {"on": 1}}}
    messages = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [call]})
    assert learnt(Example("d:1", messages=messages), tiny_tokenizer(template)) == [
        '<call>set {"on": 1}</call><|im_end|>'
    ]


CALL = {"type": "function", "function": {"name": "set", "arguments": {"on": True}}}
TWO_ROLES = (
    "{% for m in messages %}{% if m['role'] in ('user', 'assistant') %}" + TURN + "<|im_end|>\n{% endif %}{% endfor %}"
)
NO_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('No system') }}{% endif %}{% endfor %}"
)


def answering(**more: object) -> tuple[dict, ...]:
    return ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"} | more)


@pytest.mark.parametrize(
    ("template", "example", "message"),
    [
        (CHATML, {"tools": ({"name": "f"},)}, "the chat template does not print tools"),
        (CHATML, {"messages": answering(tool_calls=[CALL])}, "does not print tool_calls"),
        (CHATML, {"messages": answering(content="", tool_calls=[CALL])}, "does not print tool_calls"),
        (CHATML, {"messages": answering(reasoning_content="hm")}, "does not print reasoning_content"),
        (
            TWO_ROLES + ASKS,
            {"messages": ({"role": "developer", "content": "Obey"}, *turns("a", "b"))},
            "does not print the turn of the role 'developer'",
        ),
        (
            NO_SYSTEM + CHATML,
            {"messages": ({"role": "system", "content": "Obey"}, *turns("a", "b"))},
            "the chat template refuses it: No system",
        ),
        ("{{ messages[0].nothing.at_all }}", {}, "the chat template refuses it: "),
    ],
)
def test_every_row_that_a_template_refuses_or_would_lose_is_listed(template: str, example: dict, message: str) -> None:
    bad = {"messages": turns("a", "b"), **example}
    rows = [Example("d.jsonl:1", messages=turns("a", "b"))] * (0 if "nothing" in template else 1)
    rows += [Example(f"d.jsonl:{number}", **bad) for number in (2, 3, 7)]
    with pytest.raises(DataError, match=message) as error:
        all_of(rows, tiny_tokenizer(template))
    assert [problem.partition(": ")[0] for problem in error.value.problems] == ["d.jsonl:2", "d.jsonl:3", "d.jsonl:7"]
    assert "also d.jsonl:3, d.jsonl:7" in str(error.value)


def test_what_a_template_passes_over_is_said() -> None:
    named = [{**turn, "name": "Ann"} for turn in turns("a", "b")]
    found = all_of([Example("d:1", messages=tuple(named))], tiny_tokenizer())
    assert found.notes == ("the chat template prints nothing of name",)
    printing = tiny_tokenizer(CHATML.replace("{{ message['role'] }}", "{{ message['role'] }}{{ message['name'] }}"))
    assert all_of([Example("d:1", messages=tuple(named))], printing).notes == ()
    strips = CHATML.replace("content'] }}", "content'] if loop.last or message['role'] == 'user' else '-' }}")
    talk = Example("d:1", messages=turns("a", "b", "c", "d"))
    notes = all_of([talk], tiny_tokenizer(strips)).notes
    assert notes == ("1 earlier assistant turns are read, not learnt: the chat template changes them later on",)


def test_a_template_that_prints_the_date_says_so() -> None:
    dated = tiny_tokenizer("<|im_start|>system\nToday: {{ strftime_now('%d %b %Y') }}<|im_end|>\n" + CHATML)
    rows = [Example("d:1", prompt="a", completion="b")]
    assert "the chat template prints the date" in all_of(rows, dated).notes[0]
    import transformers.utils.chat_template_utils as templates

    moved = mock.Mock(now=mock.Mock(return_value=datetime.datetime(2031, 2, 3)))
    with mock.patch.object(templates, "datetime", moved, create=True):
        assert "03 Feb 2031" in dated.decode(all_of(rows, dated).rows[0].input_ids)
    told = tiny_tokenizer("{% set date = 'strftime_now' %}" + CHATML)
    assert all_of(rows, told).notes == ()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hello", "<s>hello<|im_end|>"),
        ("<s>hello", "<s>hello<|im_end|>"),
        ("hello<|im_end|>", "<s>hello<|im_end|>"),
        (f"<s>{U}hi{E}{A}yes{E}", f"<s>{U}hi{E}{A}yes{E}"),
        ("<s>hello<|im_end|>\n\n", "<s>hello<|im_end|>\n\n"),
    ],
)
def test_text_has_one_beginning_and_one_end(text: str, expected: str) -> None:
    tokenizer = tiny_tokenizer(bos=True)
    row = encode(Example("d:1", text=text), tokenizer, system=None, chat=True)
    assert tokenizer.decode(row.input_ids) == expected
    cut = len(text) // 2
    pair = Example("d:1", prompt=text[:cut], completion=text[cut:])
    assert tokenizer.decode(encode(pair, tokenizer, system=None, chat=False).input_ids) == expected
    assert "".join(learnt(Example("d:1", text=text), tokenizer)).rstrip("\n") == expected.rstrip("\n")


@pytest.mark.parametrize("command", ["check", "train"])
def test_bad_rows_of_both_splits_are_listed_before_a_folder_is_made(
    command: str, tiny_lm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import json

    from lorakit.cli.main import main

    row = {"messages": [*turns("a", "b")], "tools": [{"name": "f"}]}
    for name in ("train", "valid"):
        (tmp_path / f"{name}.jsonl").write_text(f"{json.dumps({'messages': turns('a', 'b')})}\n{json.dumps(row)}\n")
    words = [command, "--model", tiny_lm, "--data", tmp_path, "--output-dir", tmp_path / "out"]
    assert main([str(word) for word in words]) == 1
    assert capsys.readouterr().err.splitlines() == [
        "error: 2 bad rows; nothing was loaded:",
        "train.jsonl:2: the chat template does not print tools; use a model whose template knows tools",
        "    also valid.jsonl:2",
    ]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "marked", "learnt_text"),
    [
        ([], None, ["one", "two"]),
        (["--train-on", "last"], None, ["two"]),
        (["--train-on", "field"], 1, ["one"]),
        ([], 0, ["two"]),
    ],
)
def test_the_chosen_turns_bear_loss(
    words: list[str], marked: int | None, learnt_text: list[str], tiny_lm: Path, tmp_path: Path, capsys
) -> None:
    import json

    from lorakit.cli.main import main

    first = {"role": "assistant", "content": "one"} | ({} if marked is None else {"weight": marked})
    talk = [{"role": "user", "content": "a"}, first, *turns("b", "two")]
    (tmp_path / "d.jsonl").write_text(json.dumps({"messages": talk}) + "\n")
    assert main(["check", "--model", str(tiny_lm), "--data", str(tmp_path / "d.jsonl"), *words]) == 0
    shown = capsys.readouterr().out
    marked_text = shown.split("masked out of the loss:\n")[1].split("\n── ")[0]
    assert [part.partition("⟧")[0] for part in marked_text.split("⟦")[1:]] == [
        f"{own}<|im_end|>" for own in learnt_text
    ]


def test_a_chosen_turn_that_the_template_changes_is_refused() -> None:
    strips = CHATML.replace("content'] }}", "content'] if loop.last or message['role'] != 'assistant' else '-' }}")
    rows = [Example(f"d:{n}", messages=turns("a", "b", "c", "d"), unlearnt=frozenset({3})) for n in (1, 2)]
    options: dict = {"max_length": 500, "too_long": "drop", "chat": True, "chosen": True}
    for system in (None, "Be kind."):
        with pytest.raises(DataError, match="message 2 is to be learnt, and the chat template changes its words"):
            encode_all(rows, tiny_tokenizer(strips), system=system, **options)


def test_a_row_whose_learnt_turns_are_all_changed_is_an_error() -> None:
    strips = tiny_tokenizer(
        CHATML.replace("content'] }}", "content'] if loop.last or message['role'] == 'user' else '-' }}")
    )
    row = Example("d:1", messages=turns("a", "b", "c", "d"), unlearnt=frozenset({3}))
    with pytest.raises(DataError, match="d:1: the chat template changes every turn that is to be learnt"):
        all_of([row], strips)


def test_turns_of_rows_without_turns_cannot_be_chosen(tiny_lm: Path, tmp_path: Path, capsys) -> None:
    from lorakit.cli.main import main

    (tmp_path / "d.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    words = ["check", "--model", str(tiny_lm), "--data", str(tmp_path / "d.jsonl"), "--train-on", "last"]
    assert main(words) == 1
    assert "--train-on last chooses turns of conversations" in capsys.readouterr().err
