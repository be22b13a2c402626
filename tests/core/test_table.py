"""`Table`, compared with text and Markdown written by hand."""

import pytest

from lorakit.core.table import Table, escaped

SCORES = Table(
    ("method", "", "score", "file"),
    (("lora rank=8", "×2", "91.0", "1.2 MB"), ("a|b <i> *c*", "", "9.5", "412 kB")),
    marked=frozenset({(0, 2)}),
)


def test_names_begin_and_numbers_end_under_each_other() -> None:
    assert SCORES.lines() == [
        "method           score    file",
        "lora rank=8  ×2  *91.0  1.2 MB",
        "a|b <i> *c*        9.5  412 kB",
    ]


def test_other_columns_begin_under_each_other_where_the_table_says_so() -> None:
    table = Table(
        ("kind", "shape", "rank"), (("Linear", "4 → 16", "8"), ("Embedding", "100 → 4", "16")), frozenset({0, 1})
    )
    assert table.lines() == [
        "kind       shape    rank",
        "Linear     4 → 16      8",
        "Embedding  100 → 4    16",
    ]


def test_a_column_without_a_cell_is_not_shown_and_a_table_may_have_no_head() -> None:
    assert Table(("a", "", "b"), (("1", "", "2"),)).lines() == ["a  b", "1  2"]
    assert Table((), (("good", " 91.0%"), ("bad", "  9.0%"))).lines() == ["good   91.0%", "bad     9.0%"]
    assert Table((), ()).lines() == []
    assert Table(("a", "", "b"), (("1", "", "2"),)).markdown() == "| a | b |\n| --- | ---: |\n| 1 | 2 |"


def test_what_is_too_wide_goes_on_below_beside_the_names() -> None:
    table = Table(("name", "one", "two", "three"), (("a long name", "1", "2", "3"), ("b", "10", "20", "30")))
    # 6 wide for the names: "name", "a", "  long", "  name". "one" and "two" make 6 + 5 + 5 = 16; "three" would make 23.
    assert table.lines(width=16, first=6) == [
        "name    one  two",
        "a long    1    2",
        "  name",
        "b        10   20",
        "",
        "name    three",
        "a long      3",
        "  name",
        "b          30",
    ]


def test_markdown_has_the_alignment_marks_in_bold_and_nothing_that_markdown_reads() -> None:
    assert SCORES.markdown() == (
        "| method |  | score | file |\n"
        "| --- | ---: | ---: | ---: |\n"
        "| lora rank=8 | ×2 | **91.0** | 1.2 MB |\n"
        "| a\\|b &lt;i&gt; \\*c\\* |  | 9.5 | 412 kB |"
    )
    assert Table((), (("a", "1"),)).markdown() == "|  |  |\n| --- | ---: |\n| a | 1 |"


@pytest.mark.parametrize(
    ("given", "shown"), [("a\n  b", "a b"), ("[x](y)", r"\[x\](y)"), ("a\\b", r"a\\b"), ("&", "&amp;"), (3, "3")]
)
def test_text_stays_text_in_markdown(given: object, shown: str) -> None:
    assert escaped(given) == shown
