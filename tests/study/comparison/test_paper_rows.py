"""The configurations of the LoRA paper's rows, compared with the tables in the paper.

The numbers here are copied from its text (arXiv 2106.09685 v2: tables 2, 3, 9, 10, 11, 13 and 14) by table, not by
file. The parameters are counted on models of the real sizes, without weights.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from lorakit.study.methods.baselines import METHODS, Method

FOLDER = Path(__file__).parents[3] / "benchmarks" / "experiments" / "paper"
GLUE = ("mnli", "sst2", "mrpc", "cola", "qnli", "qqp", "rte", "stsb")  # in the order of table 2
GPT2 = [f"{data}-gpt2-{size}" for data in ("e2e", "dart", "webnlg") for size in ("medium", "large")]
FILES = ["glue-roberta-base", "glue-roberta-large", "glue-deberta-v2-xxlarge", *GPT2]

TRAINING = {
    "epochs", "max_steps", "batch_size", "gradient_accumulation_steps", "learning_rate", "scheduler", "warmup_ratio",
    "warmup_steps", "weight_decay", "label_smoothing", "gradient_checkpointing", "dtype",
}  # fmt: skip
DATA = {
    "data", "revision", "subset", "train_split", "valid_split", "test_split", "task", "plain", "system", "template",
    "prompt_field", "completion_field", "references_field", "text_field", "label_field", "messages_field",
    "max_seq_length", "train_rows", "valid_rows", "test_rows", "metrics", "max_new_tokens", "beams", "length_penalty",
    "no_repeat_ngram", "published",
}  # fmt: skip
TOP = {"model", "tasks", "methods", "seeds", "trials", "output_dir"}
METRICS = {"accuracy", "matthews", "f1", "pearson", "spearman", "bleu", "chrf", "rouge-l", "ter"}


def read(name: str) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    return config


def rows(config: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    """The task, the method and the resulting settings of every training run in a file."""
    found = []
    for task, own in config["tasks"].items():
        for item in own.get("methods", config.get("methods")):
            training = item if isinstance(item, dict) else {"method": item}
            found.append((task, training["method"], {**config, **own, **training}))
    return found


def method_of(text: str) -> Method:
    """ "adapter-h bottleneck=8 norms=false" as the method that it names."""
    name, *settings = text.split()
    return METHODS[name](**{key: yaml.safe_load(value) for key, _, value in (s.partition("=") for s in settings)})


def test_there_is_a_file_for_each_model_and_data_set() -> None:
    assert {path.name for path in FOLDER.iterdir()} == {"README.md", *(f"{name}.yaml" for name in FILES)}
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert [name for name in FILES if f"{name}.yaml" not in readme] == []


@pytest.mark.parametrize("name", FILES)
def test_a_file_begins_with_its_command_its_table_and_what_differs(name: str) -> None:
    head = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8").partition("\nmodel:")[0]
    assert all(line.startswith("#") or not line for line in head.splitlines())
    assert f"#   lorakit compare --config benchmarks/experiments/paper/{name}.yaml\n" in head
    table = {"glue": "table 2", "e2e": "table 3", "dart": "table 13", "webnlg": "table 14"}[name.partition("-")[0]]
    assert table in head.splitlines()[0]
    assert "# What differs from the paper, and why:\n" in head


@pytest.mark.parametrize("name", FILES)
def test_every_key_and_every_value_is_of_its_kind(name: str) -> None:
    config = read(name)
    assert set(config) <= TOP | DATA | TRAINING
    for own in config["tasks"].values():
        assert set(own) <= DATA | TRAINING | {"methods"}
        assert set(config | own) >= {"data", "train_split", "valid_split", "metrics", "published"}
    for _, text, settings in rows(config):
        assert set(settings["metrics"]) <= METRICS
        assert all(isinstance(value, float | dict) for value in settings["published"].values())
        numbers = {"learning_rate", "weight_decay", "warmup_ratio", "label_smoothing", "length_penalty"}
        assert {key: value for key in numbers if not isinstance(value := settings.get(key, 0.0), float)} == {}
        # LoRA's rate is the paper's, the others' are searched.
        assert ("learning_rate" in settings) == text.startswith("lora ")
        assert dataclasses.is_dataclass(method_of(text))
    items = [item for own in config["tasks"].values() for item in own.get("methods", config.get("methods"))]
    assert set().union(*(item for item in items if isinstance(item, dict))) <= TRAINING | {"method"}


# --- GLUE ------------------------------------------------------------------------------------------------------------

# As the columns of nyu-mll/glue are called.
TEXTS = dict(
    mnli="premise,hypothesis", sst2="sentence", mrpc="sentence1,sentence2", cola="sentence", qnli="question,sentence",
    qqp="question1,question2", rte="sentence1,sentence2", stsb="sentence1,sentence2",
)  # fmt: skip


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("glue")])
def test_the_tasks_are_glues_eight(name: str) -> None:
    config = read(name)
    assert tuple(config["tasks"]) == GLUE
    assert (config["data"], config["train_split"], config["task"]) == ("nyu-mll/glue", "train", "classification")
    for task, own in config["tasks"].items():
        settings = config | own
        assert settings["subset"] == task
        assert settings["text_field"] == TEXTS[task]
        assert settings["metrics"][0] == {"cola": "matthews", "stsb": "pearson"}.get(task, "accuracy")
        assert settings["valid_split"] == ("validation_matched" if task == "mnli" else "validation")
        assert "test_split" not in settings  # its labels are all −1
    assert (config["seeds"], config["trials"]) == (5, 3)


PRINTED_GLUE = [  # table 9 and table 10, a number for each task
    (
        "glue-roberta-base", "lora rank=8 alpha=8", dict(
            batch_size="16 16 16 32 32 16 32 16", epochs="30 60 30 80 25 25 80 40", max_seq_length="512",
            learning_rate="5E-04 5E-04 4E-04 4E-04 4E-04 5E-04 5E-04 4E-04", warmup_ratio="0.06",
        ),
    ),
    (
        "glue-roberta-large", "lora rank=8 alpha=16", dict(
            batch_size="4", epochs="10 10 20 20 10 20 20 10", max_seq_length="128",
            learning_rate="3E-04 4E-04 3E-04 2E-04 2E-04 3E-04 4E-04 2E-04", warmup_ratio="0.06",
        ),
    ),
    (
        "glue-roberta-large", "adapter-p bottleneck=64",
        dict(batch_size="32", epochs="10 20 20 20 10 20 20 20", max_seq_length="128"),
    ),
    (
        "glue-roberta-large", "adapter-p bottleneck=16",
        dict(batch_size="32", epochs="5 20 20 20 10 20 20 20", max_seq_length="128"),
    ),
    (
        "glue-roberta-large", "adapter-h bottleneck=64 norms=false",
        dict(batch_size="32", epochs="10 5 10 10 5 20 20 10", max_seq_length="128"),
    ),
    (
        "glue-roberta-large", "adapter-h bottleneck=8 norms=false",
        dict(batch_size="32", epochs="10 5 10 10 5 20 20 10", max_seq_length="128"),
    ),
    (
        "glue-deberta-v2-xxlarge", "lora rank=16 alpha=32", dict(
            batch_size="8 8 32 4 6 8 4 4", epochs="5 16 30 10 8 11 11 10", warmup_ratio="0.1",
            learning_rate="1E-04 6E-05 2E-04 1E-04 1E-04 1E-04 2E-04 2E-04",
            weight_decay="0 0.01 0.01 0 0.01 0.01 0.01 0.1", max_seq_length="256 128 128 64 512 320 320 128",
        ),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("name", "method", "printed"), PRINTED_GLUE, ids=lambda value: str(value)[:40])
def test_the_settings_on_glue_are_those_of_the_appendix(name: str, method: str, printed: dict[str, str]) -> None:
    found = {task: settings for task, text, settings in rows(read(name)) if text == method}
    assert tuple(found) == GLUE
    for setting, values in printed.items():
        expected = [float(value) for value in values.split()]
        assert [found[task][setting] for task in GLUE] == (expected if len(expected) > 1 else expected * len(GLUE))
    assert {settings["scheduler"] for settings in found.values()} == {"linear"}


# The column "Avg." of table 2.
AVERAGES = {
    "glue-roberta-base": {
        "FT (125.0M)": 86.4, "BitFit (0.1M)": 85.2, "AdptD (0.3M)": 84.4, "AdptD (0.9M)": 85.4, "LoRA (0.3M)": 87.2,
    },
    "glue-roberta-large": {
        "FT (355.0M)": 88.9, "LoRA (0.8M)": 89.0, "AdptP† (3.0M)": 88.4, "AdptP† (0.8M)": 87.9, "AdptH† (6.0M)": 87.8,
        "AdptH† (0.8M)": 86.4, "LoRA† (0.8M)": 88.6,
    },
    "glue-deberta-v2-xxlarge": {"FT (1500.0M)": 91.1, "LoRA (4.7M)": 91.3},
}  # fmt: skip


@pytest.mark.parametrize("name", AVERAGES)
def test_what_is_published_on_glue_has_the_printed_averages(name: str) -> None:
    tasks = read(name)["tasks"]
    for label, average in AVERAGES[name].items():
        # Half a unit in the last digit of the average, because of rounding.
        assert sum(own["published"][label] for own in tasks.values()) / 8 == pytest.approx(average, abs=0.0501)
    assert all(list(own["published"]) == list(AVERAGES[name]) for own in tasks.values())


# --- GPT-2 -----------------------------------------------------------------------------------------------------------

PRINTED_GPT2 = {  # table 11
    "e2e": dict(weight_decay=0.01, label_smoothing=0.1, length_penalty=0.9),
    "webnlg": dict(weight_decay=0.01, label_smoothing=0.1, length_penalty=0.8),
    "dart": dict(weight_decay=0.0, label_smoothing=0.0, length_penalty=0.8),
}
BOTH = dict(
    batch_size=8, epochs=5, warmup_steps=500, scheduler="linear", learning_rate=0.0002, beams=10, no_repeat_ngram=4
)
# Id on the hub, folder of its Parquet copy, and the columns: prompt, completion, all references of a row.
HUB = {
    "e2e": ("tuetschek/e2e_nlg", "default", "meaning_representation", "human_reference", None),
    "dart": ("GEM/dart", "default", "tripleset", "target", "references"),
    "webnlg": ("GEM/web_nlg", "en", "input", "target", "references"),
}
# As the authors' repository prints them (README.md, the table of GPT-2).
BLEU = {
    "e2e-gpt2-medium": 70.4, "dart-gpt2-medium": 47.1, "webnlg-gpt2-medium": 55.3,
    "e2e-gpt2-large": 70.4, "dart-gpt2-large": 47.5, "webnlg-gpt2-large": 57.0,
}  # fmt: skip


@pytest.mark.parametrize("name", GPT2)
def test_the_settings_of_gpt2_are_those_of_the_appendix(name: str) -> None:
    data = name.partition("-")[0]
    ((task, text, settings),) = [row for row in rows(read(name)) if row[1].startswith("lora ")]
    assert task == data
    assert text == "lora rank=4 alpha=32" + ("" if data == "dart" else " dropout=0.1")
    expected = BOTH | PRINTED_GPT2[data]
    assert {key: settings[key] for key in expected} == expected
    assert (settings["seeds"], settings["trials"], settings["task"]) == (3, 3, "causal-lm")
    assert settings["metrics"][0] == "bleu"


@pytest.mark.parametrize("name", GPT2)
def test_the_data_of_gpt2_is_the_hubs_parquet_copy(name: str) -> None:
    config = read(name)
    keys = ("data", "subset", "prompt_field", "completion_field", "references_field")
    assert tuple(config.get(key) for key in keys) == HUB[name.partition("-")[0]]
    assert config["revision"] == "refs/convert/parquet"
    assert [config[f"{split}_split"] for split in ("train", "valid", "test")] == ["train", "validation", "test"]
    assert (config["plain"], config["template"]) == (True, "{prompt}\n")  # GPT-2 has no chat template


@pytest.mark.parametrize("name", GPT2)
def test_what_is_published_of_gpt2_fits_the_metrics(name: str) -> None:
    config = read(name)
    ((_, own),) = config["tasks"].items()
    second = "rouge-l" if name.startswith("e2e") else "ter"
    for scores in own["published"].values():
        assert list(scores) == ["bleu", second]
        assert set(scores) <= set(config["metrics"])
        assert all(20 < score < 80 for score in scores.values())  # per cent, not shares
    (lora,) = [scores for label, scores in own["published"].items() if label.startswith("LoRA")]
    assert lora["bleu"] == BLEU[name]


# --- parameters ------------------------------------------------------------------------------------------------------


def on_meta(kind: str, config: str, **sizes: Any) -> nn.Module:
    import transformers

    with torch.device("meta"):
        model: nn.Module = getattr(transformers, kind)(getattr(transformers, config)(**sizes))
    return model


def architecture(name: str) -> nn.Module:
    """The model that a file names, with the sizes of its config.json."""
    if name.startswith("glue-roberta"):
        large = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16)
        sizes = dict(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1)
        sizes |= large if name.endswith("large") else {}
        return on_meta("RobertaForSequenceClassification", "RobertaConfig", **sizes)
    if name.startswith("glue-deberta"):
        sizes = dict(vocab_size=128100, hidden_size=1536, num_hidden_layers=48, num_attention_heads=24)
        relative = dict(relative_attention=True, position_buckets=256, pos_att_type=["p2c", "c2p"], share_att_key=True)
        more = dict(norm_rel_ebd="layer_norm", position_biased_input=False, type_vocab_size=0, conv_kernel_size=3)
        everything = {**sizes, **relative, **more, "intermediate_size": 6144, "conv_act": "gelu"}
        return on_meta("DebertaV2ForSequenceClassification", "DebertaV2Config", **everything)
    sizes = dict(n_embd=1280, n_layer=36, n_head=20) if name.endswith("large") else dict(n_embd=1024, n_layer=24)
    return on_meta("GPT2LMHeadModel", "GPT2Config", **{"n_head": 16} | sizes)


@functools.cache
def count(model: str, text: str) -> int:
    return method_of(text).apply(architecture(model)).parameter_count


# Each method with the row of the paper that it reproduces, whose label has the printed count; and our count if it
# differs. The paper's adapters of RoBERTa-large have the printed counts if a million is 2²⁰.
STANDS_FOR = {
    "glue-roberta-base": [
        ("full", "FT (125.0M)", "124.1"),  # RoBERTa's own number, 0.6M of which are a pooler that no classifier has
        ("bitfit", "BitFit (0.1M)", ""),
        ("adapter-p bottleneck=16", "AdptD (0.3M)", ""),
        ("adapter-p bottleneck=48", "AdptD (0.9M)", ""),
        ("lora rank=8 alpha=8", "LoRA (0.3M)", ""),
    ],
    "glue-roberta-large": [
        ("full", "FT (355.0M)", "354.3"),
        ("adapter-p bottleneck=64", "AdptP† (3.0M)", ""),
        ("adapter-p bottleneck=16", "AdptP† (0.8M)", ""),
        ("adapter-h bottleneck=64 norms=false", "AdptH† (6.0M)", ""),
        ("adapter-h bottleneck=8 norms=false", "AdptH† (0.8M)", ""),
        ("lora rank=8 alpha=16", "LoRA† (0.8M)", ""),
    ],
    "glue-deberta-v2-xxlarge": [
        ("full", "FT (1500.0M)", "1564.5"),  # called 1.5B, in round numbers
        ("lora rank=16 alpha=32", "LoRA (4.7M)", ""),
    ],
    "e2e-gpt2-medium": [
        ("full", "FT (354.92M)", "354.82"),
        ("adapter-p bottleneck=7", "AdapterL (0.37M)", ""),
        ("adapter-p bottleneck=225", "AdapterL (11.09M)", ""),
        ("adapter-h bottleneck=112 norms=false", "AdapterH (11.09M)", "11.06"),
        ("top-layers k=2", "FTTop2 (25.19M)", ""),
        ("prefix-layer length=14", "PreLayer (0.35M)", "0.34"),
        ("lora rank=4 alpha=32 dropout=0.1", "LoRA (0.35M)", "0.39"),  # 2 · 48 · 1024 · 4
    ],
    "e2e-gpt2-large": [
        ("full", "FT (774.03M)", ""),
        ("adapter-p bottleneck=9", "AdapterL (0.88M)", ""),
        ("adapter-p bottleneck=249", "AdapterL (23.00M)", ""),
        ("prefix-layer length=17", "PreLayer (0.77M)", "0.78"),
        ("lora rank=4 alpha=32 dropout=0.1", "LoRA (0.77M)", "0.74"),  # 2 · 72 · 1280 · 4
    ],
    "dart-gpt2-medium": [
        ("full", "FT (354M)", "355"),
        ("adapter-p bottleneck=7", "AdapterL (0.37M)", ""),
        ("adapter-p bottleneck=225", "AdapterL (11M)", ""),
        ("top-layers k=2", "FTTop2 (24M)", "25"),
        ("prefix-layer length=14", "PrefLayer (0.35M)", "0.34"),
        ("lora rank=4 alpha=32", "LoRA (0.35M)", "0.39"),
    ],
    "dart-gpt2-large": [
        ("full", "FT (774M)", ""),
        ("adapter-p bottleneck=9", "AdapterL (0.88M)", ""),
        ("adapter-p bottleneck=249", "AdapterL (23M)", ""),
        ("prefix-layer length=17", "PrefLayer (0.77M)", "0.78"),
        ("lora rank=4 alpha=32", "LoRA (0.77M)", "0.74"),
    ],
    "webnlg-gpt2-medium": [
        ("full", "FT (354M), WebNLG 2017", "355"),
        ("adapter-p bottleneck=7", "AdapterL (0.37M), WebNLG 2017", ""),
        ("adapter-p bottleneck=225", "AdapterL (11M), WebNLG 2017", ""),
        ("top-layers k=2", "FTTop2 (24M), WebNLG 2017", "25"),
        ("prefix-layer length=14", "Prefix (0.35M), WebNLG 2017", "0.34"),
        ("lora rank=4 alpha=32 dropout=0.1", "LoRA (0.35M), WebNLG 2017", "0.39"),
    ],
    "webnlg-gpt2-large": [
        ("full", "FT (774M), WebNLG 2017", ""),
        ("adapter-p bottleneck=9", "AdapterL (0.88M), WebNLG 2017", ""),
        ("adapter-p bottleneck=249", "AdapterL (23M), WebNLG 2017", ""),
        ("prefix-layer length=17", "Prefix (0.77M), WebNLG 2017", "0.78"),
        ("lora rank=4 alpha=32 dropout=0.1", "LoRA (0.77M), WebNLG 2017", "0.74"),
    ],
}


@pytest.mark.parametrize("name", FILES)
def test_each_method_trains_as_many_parameters_as_the_row_it_stands_for(name: str) -> None:
    config = read(name)
    model = name if name.startswith("glue") else name.partition("-")[2]
    methods = [text for text, _, _ in STANDS_FOR[name]]
    for task, own in config["tasks"].items():
        assert [text for of, text, _ in rows(config) if of == task] == methods
        # LoRA of RoBERTa-large in the setting without † is published only.
        assert [label for label in own["published"] if label != "LoRA (0.8M)"] == [
            label for _, label, _ in STANDS_FOR[name]
        ]
    for text, label, ours in STANDS_FOR[name]:
        printed = label.partition("(")[2].partition("M)")[0]
        million = 2**20 if label.startswith("Adpt") and "†" in label else 10**6
        places = len(printed.partition(".")[2])
        assert f"{count(model, text) / million:.{places}f}" == (ours or printed), text
        assert ours != printed
