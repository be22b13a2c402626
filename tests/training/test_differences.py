"""The marks of differences between an answer and the expected one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.training.differences import word_differences


@pytest.mark.parametrize(
    ("answer", "expected", "ours", "theirs"),
    [
        ('{"on": true}', '{"on": false}', ["true"], ["false"]),
        ('{"room": "bath", "on": true}', '{"room": "hall", "on": true}', ["bath"], ["hall"]),
        ("set an alarm at 05:25 on monday", "set an alarm at 05:25", [" on monday"], []),
        ("the same text", "the same text", [], []),
        (
            "A bathroom can be a beautiful space",
            '{"name": 1}',
            ["A bathroom can be a beautiful space"],
            ['{"name": 1}'],
        ),
        ("", "on", [], ["on"]),
        ("", "", [], []),
    ],
)
def test_words_that_the_other_text_lacks_are_marked(
    answer: str, expected: str, ours: list[str], theirs: list[str]
) -> None:
    left, right = word_differences(answer, expected)
    assert [text for text, differs in left if differs] == ours
    assert [text for text, differs in right if differs] == theirs


@given(st.text(max_size=60), st.text(max_size=60))
def test_the_pieces_are_the_texts(answer: str, expected: str) -> None:
    left, right = word_differences(answer, expected)
    assert "".join(text for text, _ in left) == answer and "".join(text for text, _ in right) == expected
    same = ["".join(text for text, differs in side if not differs) for side in (left, right)]
    assert same[0] == same[1]
