"""The configurations of the LoRA paper's rows, run from end to end without the hub.

The model is a tiny random one of the same architecture; the data are a few rows with the columns, types and splits of
the hub's data sets. Everything else is as in the file, with fewer rows, steps, seeds and, mostly, methods.
"""

import argparse
import copy
import json
import math
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

import lorakit
from conftest import tiny_tokenizer
from lorakit.cli.main import main
from lorakit.core.attach import adapted_layers
from lorakit.study.comparison.config import config_of
from lorakit.study.comparison.plan import plans_of
from lorakit.study.comparison.tasks import Answers, Sequences
from lorakit.study.methods.naming import method_of, name_of
from lorakit.training import hub

pytestmark = pytest.mark.usefixtures("runs_in_this_process")

FOLDER = Path(__file__).parents[3] / "benchmarks" / "experiments" / "paper"
GLUE = ["glue-roberta-base", "glue-roberta-large", "glue-deberta-v2-xxlarge"]
GPT2 = [f"{data}-gpt2-{size}" for data in ("e2e", "dart", "webnlg") for size in ("medium", "large")]

# --- models ----------------------------------------------------------------------------------------------------------

WIDTH, LAYERS = 32, 2


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders of a RoBERTa, a DeBERTa and a GPT-2, as on the hub: with their pretraining heads."""
    import transformers

    folder = tmp_path_factory.mktemp("models")
    vocabulary = len(tiny_tokenizer())
    encoder = dict(
        vocab_size=vocabulary, hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=LAYERS, initializer_range=0.1,
        num_attention_heads=4, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, pad_token_id=0,
    )  # fmt: skip
    relative = dict(
        relative_attention=True, position_buckets=256, pos_att_type=["p2c", "c2p"], share_att_key=True,
        norm_rel_ebd="layer_norm", position_biased_input=False, conv_kernel_size=3, conv_act="gelu",
    )  # fmt: skip
    end = tiny_tokenizer().eos_token_id
    made = {
        "roberta": transformers.RobertaForMaskedLM(
            transformers.RobertaConfig(**encoder, max_position_embeddings=514, type_vocab_size=1)
        ),
        "deberta": transformers.DebertaV2ForMaskedLM(
            transformers.DebertaV2Config(**encoder, **relative, max_position_embeddings=512, type_vocab_size=0)
        ),
        "gpt2": transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=vocabulary, n_embd=WIDTH, n_layer=LAYERS, n_head=4, initializer_range=0.1,
                resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=end, eos_token_id=end,
            )
        ),
    }  # fmt: skip
    for kind, model in made.items():
        model.save_pretrained(folder / kind)
        tokenizer = tiny_tokenizer(chat_template=None)
        if kind == "gpt2":  # its tokenizer has no padding token
            tokenizer.pad_token = None
        tokenizer.save_pretrained(folder / kind)
    return {kind: folder / kind for kind in made}


# --- data ------------------------------------------------------------------------------------------------------------

# Columns of nyu-mll/glue besides label and idx, and how many classes; none: a number.
COLUMNS: dict[str, tuple[list[str], int | None]] = {
    "mnli": (["premise", "hypothesis"], 3),
    "sst2": (["sentence"], 2),
    "mrpc": (["sentence1", "sentence2"], 2),
    "cola": (["sentence"], 2),
    "qnli": (["question", "sentence"], 2),
    "qqp": (["question1", "question2"], 2),
    "rte": (["sentence1", "sentence2"], 2),
    "stsb": (["sentence1", "sentence2"], None),
}


def glue(name: str, subset: str, revision: str | None = None) -> Any:
    """What load_dataset gives for nyu-mll/glue: test labels are −1."""
    import datasets

    assert (name, revision) == ("nyu-mll/glue", None)
    columns, classes = COLUMNS[subset]
    kind = datasets.ClassLabel(num_classes=classes) if classes else datasets.Value("float32")
    features = datasets.Features(
        {**dict.fromkeys(columns, datasets.Value("string")), "label": kind, "idx": datasets.Value("int32")}
    )

    def rows(split: str, count: int) -> Any:
        made = [
            {**{column: f"{subset} {split} {column} {i}" for column in columns}, "idx": i,
             "label": -1 if split.startswith("test") else i % classes if classes else (i % 11) / 2}
            for i in range(count)
        ]  # fmt: skip
        return datasets.Dataset.from_list(made, features=features)

    counts = {"train": 24, "validation": 7, "test": 3}
    if subset == "mnli":
        parts = {f"{split}_{part}": 7 for split in ("validation", "test") for part in ("matched", "mismatched")}
        counts = {"train": 24, **parts}
    return datasets.DatasetDict({split: rows(split, count) for split, count in counts.items()})


def e2e(split: str, i: int) -> dict[str, Any]:
    # Rows of one restaurant follow one another, with a text each.
    return {
        "meaning_representation": f"name[The Vaults {i // 2}], food[{split}]",
        "human_reference": f"The Vaults {i // 2} serves {split}, {'they say' if i % 2 else 'we hear'}.",
    }


def dart(split: str, i: int) -> dict[str, Any]:
    told = [f"College {i} joined {split}.", f"In {split} there is College {i}."]
    return {
        "gem_id": f"dart-{split}-{i}",
        "gem_parent_id": f"dart-{split}-{i}",
        "dart_id": i,
        "tripleset": [[f"College {i}", "JOINED", split], [f"College {i}", "LOCATED IN", "Mars Hill"]],
        "subtree_was_extended": False,
        "target_sources": ["WikiSQL_decl_sents"],
        "target": told[0],
        "references": [] if split == "train" else told,
    }


def webnlg(split: str, i: int) -> dict[str, Any]:
    told = [f"Airport {i} serves {split}.", f"{split} is served by Airport {i}."]
    return {
        "gem_id": f"web_nlg_en-{split}-{i}",
        "gem_parent_id": f"web_nlg_en-{split}-{i}",
        "input": [f"Airport_{i} | cityServed | {split}", f'Airport_{i} | operator | "Aarhus, Denmark"'],
        "target": told[0],
        "references": [] if split == "train" else told,
        "category": "Airport",
        "webnlg_id": f"{split}/Airport/2/Id{i}",
    }


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The hub's Parquet copies of E2E, DART and WebNLG, with its types."""
    import datasets

    text = datasets.Value("string")
    types = {
        "tripleset": datasets.List(datasets.List(text)), "references": datasets.List(text),
        "input": datasets.List(text), "target_sources": datasets.List(text), "dart_id": datasets.Value("int32"),
        "subtree_was_extended": datasets.Value("bool"),
    }  # fmt: skip
    folder = tmp_path_factory.mktemp("copies")
    for name, row in {"tuetschek/e2e_nlg/default": e2e, "GEM/dart/default": dart, "GEM/web_nlg/en": webnlg}.items():
        for split, count in {"train": 24, "validation": 4, "test": 4}.items():
            rows = [row(split, i) for i in range(count)]
            features = datasets.Features({column: types.get(column, text) for column in rows[0]})
            (folder / name / split).mkdir(parents=True)
            datasets.Dataset.from_list(rows, features=features).to_parquet(folder / name / split / "0000.parquet")
    return folder


@pytest.fixture(autouse=True)
def _hub(copies: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    real = datasets.load_dataset
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, *a, **s: (real if name == "parquet" else glue)(name, *a, **s)
    )
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(copies / "cache"))
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_, **__: None)  # it has them all
    monkeypatch.setattr(hub, "_CONVERTED_FOLDER", f"{copies}/{{name}}")


# --- running ---------------------------------------------------------------------------------------------------------


@dataclass
class Training:
    """The inputs and the effects of one training run."""

    model: nn.Module  # afterwards, a copy
    arguments: Any
    batches: list[dict[str, Tensor]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)  # of each step
    decays: set[float] = field(default_factory=set)  # of the groups of parameters
    start: dict[str, Tensor] = field(default_factory=dict)

    def fresh(self) -> nn.Module:
        """The model as it was at first."""
        model = copy.deepcopy(self.model)
        model.load_state_dict(self.start)
        return model.eval()


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[Training]:
    """All training runs, in order."""
    import transformers

    found: list[Training] = []
    train, step = transformers.Trainer.train, transformers.Trainer.training_step

    def recorded_train(self: Any, *args: Any, **settings: Any) -> Any:
        one = Training(self.model, self.args)
        one.start = {name: value.clone() for name, value in self.model.state_dict().items()}
        found.append(one)
        result = train(self, *args, **settings)
        one.decays = {group["weight_decay"] for group in self.optimizer.param_groups}
        one.model = copy.deepcopy(self.model)
        return result

    def recorded_step(self: Any, model: nn.Module, inputs: dict[str, Any], *args: Any, **settings: Any) -> Tensor:
        found[-1].batches.append({name: value.clone() for name, value in inputs.items()})
        found[-1].rates.append(self.optimizer.param_groups[0]["lr"])
        loss: Tensor = step(self, model, inputs, *args, **settings)
        found[-1].losses.append(float(loss))
        return loss

    monkeypatch.setattr(transformers.Trainer, "train", recorded_train)
    monkeypatch.setattr(transformers.Trainer, "training_step", recorded_step)
    return found


def written(name: str, models: dict[str, Path], out: Path, whole: Collection[str] = (), **changes: Any) -> Path:
    """The file with a tiny model and shortened for a test. whole: tasks that keep all methods."""
    config: dict[str, Any] = yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    model = str(models[name.split("-")[1]])
    config |= dict(model=model, output_dir=str(out / "out"), seeds=1, train_rows=16, max_steps=3) | changes
    shared = config.pop("methods", None)
    for task, own in config["tasks"].items():
        items = own.get("methods", shared)
        own["methods"] = items if task in whole else [item for item in items if "lora " in str(item)]
    path = out / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return path


def compared(path: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """Run the command and return its JSON output."""
    code = main(["compare", "--config", str(path), "--debug"])
    err = capsys.readouterr().err
    assert code == 0, err
    found: dict[str, Any] = json.loads((path.parent / "out" / "compare.json").read_text(encoding="utf-8"))
    return found


@dataclass
class Search:
    """A call of generate."""

    settings: dict[str, Any]
    answers: list[list[int]]
    widths: set[int]  # numbers of rows in the last block's batches


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> list[Search]:
    """Every call of GPT-2's generate, in order."""
    import transformers

    found: list[Search] = []
    generate = transformers.GPT2LMHeadModel.generate

    def recorded(self: Any, **settings: Any) -> Tensor:
        widths: set[int] = set()
        handle = self.transformer.h[-1].register_forward_hook(lambda module, args, output: widths.add(len(args[0])))
        ids: Tensor = generate(self, **settings)
        handle.remove()
        found.append(Search(settings, ids[:, settings["input_ids"].shape[1] :].tolist(), widths))
        return ids

    monkeypatch.setattr(transformers.GPT2LMHeadModel, "generate", recorded)
    return found


def only(path: Path, task: str, **changes: Any) -> Path:
    """The file with only this task, if it has several, and with changes to its method."""
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    config["tasks"] = {name: own for name, own in config["tasks"].items() if name == task or len(config["tasks"]) == 1}
    for own in config["tasks"].values():
        for item in own["methods"]:
            item.update(changes)
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return path


def applied() -> Any:
    """Takes the place of an applied method if no model is needed."""
    return SimpleNamespace(model=nn.Identity())


def tasks_in(path: Path) -> dict[str, Any]:
    plans = plans_of(config_of(argparse.Namespace(config=str(path))))
    return {plan.task.name: plan.task for plan in plans}


# Tasks on which every method of the file is run; on all others only LoRA is run.
WHOLE = {
    "glue-roberta-base": {"stsb"},
    "glue-roberta-large": {"cola"},
    "glue-deberta-v2-xxlarge": {"stsb"},
    "e2e-gpt2-medium": {"e2e"},
}
METRICS = {
    "mnli": ["accuracy"], "sst2": ["accuracy"], "mrpc": ["accuracy", "f1"], "cola": ["matthews", "accuracy"],
    "qnli": ["accuracy"], "qqp": ["accuracy", "f1"], "rte": ["accuracy"], "stsb": ["pearson", "spearman"],
    "e2e": ["bleu", "rouge-l", "chrf"], "dart": ["bleu", "ter", "chrf"], "webnlg": ["bleu", "ter", "chrf"],
}  # fmt: skip


@pytest.mark.parametrize("name", GLUE + GPT2)
def test_a_file_runs_to_its_tables(
    name: str,
    models: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    searches: list[Search],
) -> None:
    # The search takes as many rates as in the file for DeBERTa, one elsewhere.
    trials = 3 if "deberta" in name else 1
    path = written(name, models, tmp_path, WHOLE.get(name, ()), trials=trials)
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    found = compared(path, capsys)
    assert found["left_out"] == []
    expected = []
    for task, own in config["tasks"].items():
        texts = [item["method"] if isinstance(item, dict) else item for item in own["methods"]]
        expected += [(task, name_of(method_of(text))) for text in texts]
    assert [(row["task"], row["method"]) for row in found["rows"]] == expected
    for row in found["rows"]:
        assert list(row["scores"]) == METRICS[row["task"]]
        for score in row["scores"].values():
            # Equal predictions have no correlation; it is shown as 0.
            assert len(score["values"]) == 1 and math.isfinite(score["values"][0])
    assert {task["name"]: task["metrics"] for task in found["tasks"]} == {
        task: METRICS[task] for task in config["tasks"]
    }
    runs = [json.loads(line) for line in (tmp_path / "out" / "runs.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {(run["steps"], run["diverged"]) for run in runs} == {(3, False)}
    rates: dict[tuple[str, str], set[float]] = {}
    for run in runs:
        rates.setdefault((run["task"], run["method"]), set()).add(run["learning_rate"])
    for (task, method), tried in rates.items():
        given = [i["learning_rate"] for i in config["tasks"][task]["methods"] if "learning_rate" in i]
        assert (list(tried) == given) if method.startswith("lora ") else (len(tried) == trials)
    if name in GPT2:
        assert searches
        penalty = 0.9 if name.startswith("e2e") else 0.8
        asked = dict(num_beams=10, length_penalty=penalty, no_repeat_ngram_size=4, max_new_tokens=64, do_sample=False)
        for search in searches:
            assert {key: search.settings[key] for key in asked} == asked
            assert max(search.widths) == 10 * len(search.settings["input_ids"])
    assert all("published" in (tmp_path / "out" / file).read_text("utf-8") for file in ("compare.md", "compare.html"))


def test_a_task_that_the_data_does_not_hold_is_an_error(models: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--task classification does not fit GEM/dart, which holds prompt"):
        tasks_in(written("dart-gpt2-medium", models, tmp_path, task="classification"))


# --- data ------------------------------------------------------------------------------------------------------------

# The first row that is reported of each task: text, second text, label.
FIRST = {
    "mnli": ("mnli validation_matched premise 0", "mnli validation_matched hypothesis 0", "0"),
    "sst2": ("sst2 validation sentence 0", None, "0"),
    "mrpc": ("mrpc validation sentence1 0", "mrpc validation sentence2 0", "0"),
    "cola": ("cola validation sentence 0", None, "0"),
    "qnli": ("qnli validation question 0", "qnli validation sentence 0", "0"),
    "qqp": ("qqp validation question1 0", "qqp validation question2 0", "0"),
    "rte": ("rte validation sentence1 0", "rte validation sentence2 0", "0"),
    "stsb": ("stsb validation sentence1 0", "stsb validation sentence2 0", 0.0),
}


@pytest.mark.parametrize("name", GLUE)
def test_glue_is_read_as_texts_and_labels(name: str, models: dict[str, Path], tmp_path: Path) -> None:
    found = tasks_in(written(name, models, tmp_path, train_rows=None))
    assert list(found) == list(FIRST)
    for task, own in found.items():
        assert isinstance(own, Sequences)
        first, second = own.data.test[:2]
        assert (first.text, first.text_pair, first.label) == FIRST[task]
        assert second.label == (0.5 if task == "stsb" else "1")
        assert own.kind == ("regression" if task == "stsb" else "classification")
        assert own.data.labels == {"mnli": ("0", "1", "2"), "stsb": ()}.get(task, ("0", "1"))
        # The rates are chosen on rows held out of train, and no other split is read: test has no labels.
        assert own.rows == {"train": 22, "valid": 2, "test": 7}
        split = "validation_matched" if task == "mnli" else "validation"
        assert {example.where.partition(" ")[0] for example in own.data.test} == {f"nyu-mll/glue/{split}"}
        for example in (*own.data.train, *own.data.valid):
            assert example.where.startswith("nyu-mll/glue/train row ")
        pair = own.tokenizer.decode(own.train[0]["input_ids"])
        texts = (own.data.train[0].text, own.data.train[0].text_pair)
        assert pair == "".join(text for text in texts if text is not None)


TEXTS = {  # the first test question: what the model reads, and every right answer; and the first of train
    "e2e": (
        "name[The Vaults 0], food[test]\n",
        ["The Vaults 0 serves test, we hear.", "The Vaults 0 serves test, they say."],
        "name[The Vaults 0], food[train]\n",
        "The Vaults 0 serves train, we hear.",
    ),
    "dart": (
        "College 0 : JOINED : test | College 0 : LOCATED IN : Mars Hill\n",
        ["College 0 joined test.", "In test there is College 0."],
        "College 0 : JOINED : train | College 0 : LOCATED IN : Mars Hill\n",
        "College 0 joined train.",
    ),
    "webnlg": (
        'Airport_0 : cityServed : test | Airport_0 : operator : "Aarhus, Denmark"\n',
        ["Airport 0 serves test.", "test is served by Airport 0."],
        'Airport_0 : cityServed : train | Airport_0 : operator : "Aarhus, Denmark"\n',
        "Airport 0 serves train.",
    ),
}


@pytest.mark.parametrize("name", GPT2)
def test_gpt2_reads_lines_and_learns_the_answers(name: str, models: dict[str, Path], tmp_path: Path) -> None:
    ((task, own),) = tasks_in(written(name, models, tmp_path, train_rows=None)).items()
    assert isinstance(own, Answers)
    prompt, right, asked, answer = TEXTS[task]
    first = own.data.test[0]
    assert (first.prompt, [first.completion, *first.others]) == (prompt, right)
    # E2E's rows of one restaurant are one question; in training every row counts.
    assert own.rows == {"train": 24, "valid": 2 if task == "e2e" else 4, "test": 2 if task == "e2e" else 4}
    row = own.train[0]
    learned = [label for label in row["labels"] if label != -100]
    assert own.tokenizer.decode(row["input_ids"]) == f"{asked}{answer}<|im_end|>"
    assert own.tokenizer.decode(learned) == f"{answer}<|im_end|>"
    assert row["labels"][-len(learned) :] == learned


@pytest.mark.parametrize("name", ["e2e-gpt2-medium", "dart-gpt2-large", "webnlg-gpt2-medium"])
def test_any_of_the_right_answers_is_right(
    name: str, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ((task, own),) = tasks_in(written(name, models, tmp_path)).items()
    rows = [{"e2e": e2e, "dart": dart, "webnlg": webnlg}[task]("test", i) for i in range(4)]
    second = [row["human_reference"] for row in rows[1::2]] if task == "e2e" else [row["references"][1] for row in rows]
    monkeypatch.setattr("lorakit.study.comparison.tasks.answers", lambda *args, **settings: iter(second))
    scores = {metric: round(score, 3) for metric, score in own.test(applied()).items()}
    assert scores == {metric: 0.0 if metric == "ter" else 100.0 for metric in METRICS[task]}


def test_a_wrong_class_costs_its_share(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def all_but_the_first(loaded: Any, data: Any, examples: Any, *_: Any) -> list[Any]:
        if not data.labels:
            return [2 * example.label + 1 for example in examples]  # a line: both correlations are 1
        return ["1", *(example.label for example in examples[1:])]  # "0" is right

    monkeypatch.setattr("lorakit.study.comparison.tasks.predict", all_but_the_first)
    found = tasks_in(written("glue-roberta-base", models, tmp_path))
    # Seven rows with the labels 0 1 0 1 0 1 0, of which the first is taken for 1: tp 3, fp 1, fn 0, tn 3.
    accuracy, f1, matthews = 100 * 6 / 7, 100 * 2 * 3 / 7, 100 * 9 / math.sqrt(4 * 3 * 4 * 3)
    expected = {task: {"accuracy": accuracy} for task in ("mnli", "sst2", "qnli", "rte")}
    expected |= {task: {"accuracy": accuracy, "f1": f1} for task in ("mrpc", "qqp")}
    expected |= {"cola": {"matthews": matthews, "accuracy": accuracy}, "stsb": {"pearson": 100, "spearman": 100}}
    for task, own in found.items():
        assert own.test(applied()) == pytest.approx(expected[task])


# --- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "steps", "decay", "smoothing", "rates"),
    [
        # a first step of 0 in the warm-up, ⌈0.06 · 20⌉ = 2 steps, then down to 0 in 18
        ("glue-roberta-base", 20, 0.1, 0.0, [0.0, 2.5e-4, 5e-4, 5e-4 * 17 / 18]),
        # ⌈0.1 · 20⌉ = 2
        ("glue-deberta-v2-xxlarge", 20, 0.01, 0.0, [0.0, 3e-5, 6e-5, 6e-5 * 17 / 18]),
        # 500 steps of warm-up
        ("e2e-gpt2-medium", 4, 0.01, 0.1, [2e-4 * step / 500 for step in range(4)]),
        ("dart-gpt2-medium", 4, 0.0, 0.0, [2e-4 * step / 500 for step in range(4)]),
        ("webnlg-gpt2-large", 4, 0.01, 0.1, [2e-4 * step / 500 for step in range(4)]),
    ],
)
def test_loras_settings_reach_the_training(
    name: str,
    steps: int,
    decay: float,
    smoothing: float,
    rates: list[float],
    models: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    trainings: list[Training],
) -> None:
    compared(only(written(name, models, tmp_path, max_steps=steps, dtype="float32"), "sst2"), capsys)
    (one,) = trainings
    assert one.rates[:4] == pytest.approx(rates, rel=1e-6, abs=0)
    assert len(one.rates) == steps
    assert one.decays == {decay, 0.0}
    assert {len(batch["input_ids"]) for batch in one.batches} == {16 if "base" in name else 8}
    assert one.arguments.gradient_checkpointing == ("deberta" in name)
    # B is 0 at first, so the first loss is the base model's: −(1−ε) log p(label) − ε/V Σ log p.
    model = one.fresh()
    batch = {key: value for key, value in one.batches[0].items() if key != "labels"}
    with torch.no_grad():
        logits = model(**batch).logits.double()
    labels = one.batches[0]["labels"]
    if name in GPT2:
        logits, labels = logits[:, :-1][labels[:, 1:] != -100], labels[:, 1:][labels[:, 1:] != -100]
    logp = logits.log_softmax(-1)
    expected = -(1 - smoothing) * logp.gather(-1, labels[:, None]).mean() - smoothing * logp.mean()
    assert one.losses[0] == pytest.approx(float(expected), rel=1e-5)


QUERY_AND_VALUE = {
    "roberta": ("roberta.encoder.layer.{}.attention.self", ["query", "value"], ["classifier"]),
    "deberta": ("deberta.encoder.layer.{}.attention.self", ["query_proj", "value_proj"], ["pooler", "classifier"]),
    "gpt2": ("transformer.h.{}.attn", ["c_attn"], []),
}


@pytest.mark.parametrize("name", ["glue-roberta-large", "glue-deberta-v2-xxlarge", "e2e-gpt2-medium"])
def test_lora_changes_q_and_v_and_the_loss_falls(
    name: str, models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], trainings: list[Training]
) -> None:
    batch = {"glue-roberta-large": 4}.get(name, 8)  # as in the file: every step sees all rows
    faster: dict[str, Any] = dict(train_rows=batch, max_steps=40, warmup_steps=0)
    path = only(written(name, models, tmp_path, **faster), "sst2", learning_rate=5e-3)
    compared(path, capsys)
    (one,) = trainings
    assert {len(rows["input_ids"]) for rows in one.batches} == {batch}
    assert sum(one.losses[-5:]) / 5 < 0.9 * one.losses[0]

    place, layers, head = QUERY_AND_VALUE[name.split("-")[1]]
    expected = {f"{place.format(block)}.{layer}" for block in range(LAYERS) for layer in layers}
    assert set(adapted_layers(one.model)) == expected
    before = {key: value for key, value in one.start.items() if ".lora_" not in key}
    lorakit.merge(one.model)
    after = dict(one.model.named_parameters())  # merged; a state dict holds what was before
    changed = {key for key, value in before.items() if key in after and not torch.equal(value, after[key])}
    trained = {key for key in before if key.split(".")[0] in head}
    assert changed == {f"{layer}.weight" for layer in expected} | trained
    if name in GPT2:
        for layer in expected:
            delta = (after[f"{layer}.weight"] - before[f"{layer}.weight"]).view(WIDTH, 3, WIDTH)  # in × (q, k, v) × out
            assert [bool(delta[:, part].any()) for part in range(3)] == [True, False, True]
            assert [int(torch.linalg.matrix_rank(delta[:, part].double(), rtol=1e-3)) for part in (0, 2)] == [4, 4]


# --- answers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [4, 0])
def test_no_answer_repeats_four_tokens(
    limit: int, models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], searches: list[Search]
) -> None:
    """For a model that always gives the same output, so that it would repeat itself."""
    import transformers

    model = transformers.GPT2LMHeadModel.from_pretrained(models["gpt2"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(models["gpt2"])
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.copy_(model.transformer.wte.weight[70])
        model.transformer.wte.weight[tokenizer.eos_token_id] = -model.transformer.wte.weight[70]
    model.save_pretrained(tmp_path / "monotone")
    tokenizer.save_pretrained(tmp_path / "monotone")
    monotone = {**models, "gpt2": tmp_path / "monotone"}
    compared(written("e2e-gpt2-medium", monotone, tmp_path, max_steps=1, no_repeat_ngram=limit), capsys)
    said = [tokens for search in searches for tokens in search.answers]
    assert [len(tokens) for tokens in said] == [64, 64]
    for tokens in said:
        fours = [tuple(tokens[i : i + 4]) for i in range(len(tokens) - 3)]
        assert (len(set(fours)) == len(fours)) == (limit == 4)
