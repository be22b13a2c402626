"""Methods as a person writes them: read, written, and read again."""

import pytest

from lorakit.study.methods.baselines import (
    METHODS,
    BitFit,
    Full,
    HeadOnly,
    Houlsby,
    LoRA,
    Method,
    Pfeiffer,
    PrefixEmbedding,
    PrefixLayer,
    TopLayers,
)
from lorakit.study.methods.naming import method_of, name_of

# Text, its meaning, and the shortest text for it.
WRITTEN: list[tuple[str, Method, str]] = [
    ("full", Full(), "full"),
    ("bitfit", BitFit(), "bitfit"),
    ("head", HeadOnly(), "head"),
    ("top-layers", TopLayers(k=2), "top-layers k=2"),
    ("top-layers k=3", TopLayers(k=3), "top-layers k=3"),
    ("adapter-h", Houlsby(bottleneck=8, norms=True), "adapter-h bottleneck=8"),
    ("adapter-h norms=false bottleneck=64", Houlsby(64, norms=False), "adapter-h bottleneck=64 norms=false"),
    ("adapter-p bottleneck=1", Pfeiffer(1), "adapter-p bottleneck=1"),
    ("prefix-embedding length=5", PrefixEmbedding(5), "prefix-embedding length=5"),
    ("prefix-layer", PrefixLayer(32), "prefix-layer length=32"),
    ("lora", LoRA(rank=8), "lora rank=8"),
    (
        "lora  rank=4   targets=q_proj+v_proj",
        LoRA(4, targets=("q_proj", "v_proj")),
        "lora rank=4 targets=q_proj+v_proj",
    ),
    ("lora targets=*.q_proj alpha=8", LoRA(8, alpha=8.0, targets="*.q_proj"), "lora rank=8 alpha=8 targets=*.q_proj"),
    ("lora rank=2 dropout=0.05 init=olora", LoRA(2, dropout=0.05, init="olora"), "lora rank=2 dropout=0.05 init=olora"),
    ("lora rank=2 rslora=True", LoRA(2, rslora=True), "rslora rank=2"),
    ("lora dora=true", LoRA(dora=True), "dora rank=8"),
    ("pissa rank=16", LoRA(16, init="pissa"), "pissa rank=16"),
    ("pissa dora=true", LoRA(dora=True, init="pissa"), "dora rank=8 init=pissa"),
    ("dora dora=false", LoRA(), "lora rank=8"),
]


@pytest.mark.parametrize(("text", "method", "shortest"), WRITTEN, ids=[text for text, *_ in WRITTEN])
def test_a_method_is_read_and_written_in_as_few_words_as_possible(text: str, method: Method, shortest: str) -> None:
    assert method_of(text) == method
    assert name_of(method) == shortest


def test_every_method_of_the_table_reads_back_with_its_usual_settings() -> None:
    for name, make in METHODS.items():
        assert method_of(name) == make()
        assert method_of(name_of(make())) == make()


@pytest.mark.parametrize(
    "method",
    [
        *(method for _, method, _ in WRITTEN),
        LoRA(alpha=16.5, dropout=0.0),
        LoRA(rank=3, alpha=1 / 3, dropout=0.1234567),  # more digits than {:g} writes
        LoRA(alpha=12345678.0),
        LoRA(alpha=1e-7, rslora=True, dora=True, init="gaussian"),
        LoRA(targets=("q_proj",)),
        LoRA(targets="q_proj"),
    ],
    ids=str,
)
def test_what_is_written_reads_back(method: Method) -> None:
    assert method_of(name_of(method)) == method


def test_two_methods_never_have_one_name() -> None:
    methods = [method for _, method, _ in WRITTEN] + [LoRA(targets=("q_proj",)), LoRA(targets="q_proj")]
    names: dict[str, Method] = {}
    for method in methods:
        assert names.setdefault(name_of(method), method) == method


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lra rank=4", r"^unknown method 'lra'\. Did you mean 'lora'\? Methods: full, bitfit, "),
        ("", r"^unknown method ''\. Methods: full"),
        ("Lora", r"^unknown method 'Lora'\. Did you mean 'lora'\?"),
        ("lora rnk=4", r"^'lora rnk=4': 'rnk=4' is no setting; Did you mean 'rank'\? lora takes rank=…, alpha=…, "),
        ("lora 4", r"^'lora 4': '4' is no setting; lora takes rank=…"),
        ("full rank=4", r"^'full rank=4': 'rank=4' is no setting; full takes no settings\.$"),
        ("adapter-h rank=4", r"'rank=4' is no setting; adapter-h takes bottleneck=…, norms=…\.$"),
        ("lora rank=four", r"^'lora rank=four': rank: expected a whole number, found 'four'\.$"),
        ("lora rank=4.5", r"rank: expected a whole number, found '4\.5'"),
        ("lora rank=", r"rank: expected a whole number, found ''"),
        ("lora alpha=none", r"alpha: expected a number, found 'none'"),
        ("lora rslora=yes", r"rslora: expected true or false, found 'yes'"),
        ("lora init=pisa", r"init: expected one of kaiming, .*, found 'pisa'"),
        ("lora rank=4 alpha=8 rank=16", r"^'lora rank=4 alpha=8 rank=16': rank stands in it twice\.$"),
    ],
)
def test_an_error_says_which_word_is_wrong(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        method_of(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lora rank=0", "rank: expected at least 1, found '0'"),
        ("lora rank=1e12", "rank: expected at most 2147483647, found '1e12'"),
        ("lora alpha=-3", "alpha: expected more than 0, found '-3'"),
        ("lora alpha=nan", "alpha: expected a number, found 'nan'"),
        ("lora dropout=1", "dropout: expected less than 1, found '1'"),
        ("adapter-h bottleneck=0", "bottleneck: expected at least 1, found '0'"),
        ("adapter-p bottleneck=-4", "bottleneck: expected at least 1, found '-4'"),
        ("prefix-layer length=0", "length: expected at least 1, found '0'"),
        ("prefix-embedding length=0", "length: expected at least 1, found '0'"),
        ("top-layers k=0", "k: expected at least 1, found '0'"),
    ],
)
def test_a_number_outside_its_limits_is_refused_before_anything_is_run(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{text!r}: {message}"):
        method_of(text)
