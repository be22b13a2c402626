"""The tasks of a comparison: splits, losses and scores, each computed again here."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lorakit.study.comparison.config import CompareConfig, MethodConfig, TaskConfig
from lorakit.study.comparison.fit import steps_of
from lorakit.study.comparison.plan import TaskPlan
from lorakit.study.comparison.tasks import Answers, Sequences, read_task, served
from lorakit.study.methods.baselines import Full, LoRA

Rows = Iterable[dict[str, Any]]


def write(path: Path, rows: Rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def make(model: Path, data: Path, **settings: Any) -> Any:
    config = CompareConfig(model=str(model), output_dir="unused", data=str(data), dtype="float32", **settings)
    return read_task(TaskConfig("task", config, ()), str(model))


def sentences(count: int, begin: int = 0) -> list[dict[str, Any]]:
    """Sentences of several lengths; those that end in an even number are "on"."""
    return [
        {"text": " ".join(["turn the light"] * (1 + i % 4)) + f" {i}", "label": "off" if i % 2 else "on"}
        for i in range(begin, begin + count)
    ]


def pairs(questions: int, begin: int = 0, each: int = 2) -> list[dict[str, Any]]:
    """`each` right answers for each question, not adjacent in the file."""
    return [
        {"prompt": f"light {question}", "completion": f"turn {question} {'on' * (1 + answer)}"}
        for answer in range(each)
        for question in range(begin, begin + questions)
    ]


def folder(path: Path, rows: Any, **counts: int) -> Path:
    """A folder with a file for each split, of so many rows (questions), none of them in two files."""
    path.mkdir()
    begin = 0
    for split, count in counts.items():
        write(path / f"{split}.jsonl", rows(count, begin))
        begin += count
    return path


def prompts(examples: Any) -> list[str]:
    return [example.prompt for example in examples]


# --- splits --------------------------------------------------------------------------------------------------------


def test_one_file_is_split_three_ways_and_no_question_is_on_two_sides(tiny_lm: Path, tmp_path: Path) -> None:
    data = make(tiny_lm, write(tmp_path / "d.jsonl", pairs(40))).data
    train, valid, test = ({*prompts(rows)} for rows in (data.train, data.valid, data.test))
    # A tenth of 40 questions to report; a tenth of the remaining 36 for validation.
    assert (len(data.test), len(data.valid), len(data.train)) == (4, 4, 2 * 32)
    assert (len(test), len(valid), len(train)) == (4, 4, 32)
    assert not (train & valid or train & test or valid & test)
    assert train | valid | test == {f"light {i}" for i in range(40)}
    # Of a question to report every right answer counts, in the file's order.
    for example in (*data.valid, *data.test):
        number = example.prompt.removeprefix("light ")
        assert (example.completion, *example.others) == (f"turn {number} on", f"turn {number} onon")
    # To train on, each answer is a row.
    assert sorted(example.completion for example in data.train) == sorted(
        row["completion"] for row in pairs(40) if row["prompt"] in train
    )


@pytest.mark.parametrize(
    ("files", "train", "valid", "test"),
    [
        # by question numbers: the file of each split, and how many questions it has
        (dict(train=20), (range(20), 16), (range(20), 2), (range(20), 2)),
        (dict(train=20, valid=6), (range(20), 18), (range(20), 2), (range(20, 26), 6)),
        (dict(train=20, test=6), (range(20), 18), (range(20), 2), (range(20, 26), 6)),
        (dict(train=20, valid=5, test=6), (range(20), 20), (range(20, 25), 5), (range(25, 31), 6)),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else None,
)
def test_what_the_data_lacks_is_held_out_of_train(
    tiny_lm: Path, tiny_encoder: Path, tmp_path: Path, files: dict[str, int], train: Any, valid: Any, test: Any
) -> None:
    for kind, model, rows, each in (("answers", tiny_lm, pairs, 2), ("classes", tiny_encoder, sentences, 1)):
        task = make(model, folder(tmp_path / kind, rows, **files))
        found = {}
        for split, (numbers, count) in (("train", train), ("valid", valid), ("test", test)):
            examples = getattr(task.data, split)
            found[split] = {int((example.prompt or example.text).split()[-1]) for example in examples}
            assert found[split] <= {*numbers}
            assert len(found[split]) == count
            assert task.rows[split] == len(examples) == count * (each if split == "train" else 1)
        assert not found["train"] & found["valid"] and not found["train"] & found["test"]
        assert not found["valid"] & found["test"]


def test_limits_are_drawn_once_and_keep_the_order(tiny_encoder: Path, tmp_path: Path) -> None:
    data = folder(tmp_path / "d", sentences, train=40, valid=30, test=20)
    limits = dict(train_rows=12, valid_rows=9, test_rows=5)
    first, again = make(tiny_encoder, data, **limits), make(tiny_encoder, data, **limits)
    assert first.rows == {"train": 12, "valid": 9, "test": 5}
    assert first.data == again.data
    assert first.fingerprint == again.fingerprint
    for split, every in (("train", range(40)), ("valid", range(40, 70)), ("test", range(70, 90))):
        kept = [int(example.text.split()[-1]) for example in getattr(first.data, split)]
        assert kept == sorted(kept)
        assert {*kept} <= {*every}
        assert kept != list(every)[: len(kept)]  # drawn, not cut off
    fewer = make(tiny_encoder, data, train_rows=11, valid_rows=9, test_rows=5)
    assert (fewer.data.valid, fewer.data.test) == (first.data.valid, first.data.test)
    assert fewer.fingerprint != first.fingerprint


def test_limits_hold_for_questions_not_for_their_answers(tiny_lm: Path, tmp_path: Path) -> None:
    task = make(tiny_lm, write(tmp_path / "d.jsonl", pairs(60, each=3)), train_rows=7, valid_rows=2, test_rows=4)
    assert task.rows == {"train": 7, "valid": 2, "test": 4}
    assert all(len(example.others) == 2 for example in (*task.data.valid, *task.data.test))


def test_a_data_set_without_a_training_file_is_refused(tiny_lm: Path, tmp_path: Path) -> None:
    """`eval` reads such a folder; to compare on it would be to train on its test rows."""
    for name, files in (("a", dict(test=9)), ("b", dict(valid=9)), ("c", dict(valid=9, test=9))):
        with pytest.raises(FileNotFoundError, match=f"{name} holds no train file"):
            make(tiny_lm, folder(tmp_path / name, pairs, **files))


def test_too_few_questions_to_hold_some_out(tiny_lm: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "d.jsonl", pairs(2, each=5))
    with pytest.raises(ValueError, match=r"^1 questions are too few to train on and to hold some out\.$"):
        make(tiny_lm, data)


def test_equal_texts_with_labels_are_rows_of_their_own(tiny_encoder: Path, tmp_path: Path) -> None:
    rows = [{"text": "turn", "label": label} for label in ("on", "off") * 10]
    task = make(tiny_encoder, write(tmp_path / "d.jsonl", rows))
    assert task.rows == {"train": 16, "valid": 2, "test": 2}


def test_a_row_without_room_for_its_answer_is_not_counted(tiny_lm: Path, tmp_path: Path) -> None:
    """After the cut only the prompt is left, so nothing can be learnt from the row and it is in no step."""
    long = [{"prompt": "light " * 30 + str(i), "completion": "on"} for i in range(3)]
    data = tmp_path / "d"
    data.mkdir()
    for split, begin in (("train", 0), ("valid", 20), ("test", 30)):
        write(data / f"{split}.jsonl", [*pairs(5, begin, each=1), *(long if split == "train" else long[:1])])
    task = make(tiny_lm, data, plain=True, max_seq_length=24, batch_size=1, epochs=2.0)
    assert len(task.train) == 5
    assert task.rows == {"train": 5, "valid": 5, "test": 6}  # its question is still asked
    assert steps_of(task, task.settings) == 10
    for split in ("train", "valid", "test"):
        kept = (data / f"{split}.jsonl").read_text(encoding="utf-8")
        write(data / f"{split}.jsonl", long)
        with pytest.raises(ValueError, match=f"no {split} row of .*d has room for its answer within 24 tokens"):
            make(tiny_lm, data, plain=True, max_seq_length=24)
        (data / f"{split}.jsonl").write_text(kept, encoding="utf-8")


def test_the_template_is_put_around_every_prompt(tiny_lm: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "d.jsonl", pairs(20))
    task = make(tiny_lm, data, template="Q: {prompt}\nA:", plain=True)
    plain = make(tiny_lm, data, plain=True)
    for split in ("train", "valid", "test"):
        before, after = getattr(plain.data, split), getattr(task.data, split)
        assert prompts(after) == [f"Q: {prompt}\nA:" for prompt in prompts(before)]
        assert [e.completion for e in after] == [e.completion for e in before]
    row, example = task.train[0], task.data.train[0]
    text = task.tokenizer.decode(row["input_ids"])
    assert text == f"{example.prompt}{example.completion}<|im_end|>"
    read = [t for t, label in zip(row["input_ids"], row["labels"], strict=True) if label == -100]
    assert task.tokenizer.decode(read) == example.prompt
    assert task.fingerprint != plain.fingerprint


def test_what_decides_a_score_is_in_the_fingerprint(tiny_lm: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "d.jsonl", pairs(20))
    changes: list[dict[str, Any]] = [
        {},
        *({name: value} for name, value in dict(plain=True, system="s", max_seq_length=100, beams=2).items()),
        *({name: value} for name, value in dict(length_penalty=2.0, no_repeat_ngram=3, max_new_tokens=4).items()),
        *({name: value} for name, value in dict(metrics=("bleu",), test_rows=1, template="{prompt} ").items()),
    ]
    fingerprints = [make(tiny_lm, data, **change).fingerprint for change in changes]
    assert len({*fingerprints}) == len(changes)
    # Training settings and settings that only affect the display change nothing here.
    same = dict(epochs=9.0, batch_size=1, seeds=1, trials=1, published={"paper": 1.0})
    assert make(tiny_lm, data, **same).fingerprint == fingerprints[0]


# --- classes and numbers -------------------------------------------------------------------------------------------


def logits_of(model: Any, tokenizer: Any, texts: list[str]) -> Tensor:
    """Computed in float64, one text at a time, without padding."""
    with torch.no_grad():
        return torch.cat([model.double()(**tokenizer(text, return_tensors="pt")).logits for text in texts])


def test_the_loss_of_classes_is_cross_entropy(tiny_encoder: Path, tmp_path: Path) -> None:
    task = make(tiny_encoder, write(tmp_path / "d.jsonl", sentences(40)))
    assert isinstance(task, Sequences)
    assert (task.kind, task.metrics, task.data.labels) == ("classification", ("accuracy", "matthews"), ("off", "on"))
    model = task.model(0)
    with torch.no_grad():
        found = {share: float(task.loss(model, share)(task.collate(list(task.train[:7])))) for share in (0.0, 0.1)}
    examples = task.data.train[:7]
    logp = F.log_softmax(logits_of(model, task.tokenizer, [example.text or "" for example in examples]), -1)
    right = torch.tensor([("off", "on").index(example.label) for example in examples])
    plain = -logp[torch.arange(7), right].mean()
    smoothed = 0.9 * plain - 0.1 * logp.mean(-1).mean()
    assert found[0.0] == pytest.approx(float(plain), rel=1e-5)
    assert found[0.1] == pytest.approx(float(smoothed), rel=1e-5)
    assert abs(plain - smoothed) > 1e-4


def test_the_loss_of_numbers_is_the_mean_square(tiny_encoder: Path, tmp_path: Path) -> None:
    rows = [{"text": row["text"], "label": i / 8} for i, row in enumerate(sentences(40))]
    task = make(tiny_encoder, write(tmp_path / "d.jsonl", rows))
    assert (task.kind, task.metrics) == ("regression", ("pearson", "spearman"))
    model = task.model(0)
    with torch.no_grad():
        found = float(task.loss(model)(task.collate(list(task.train[:7]))))
    examples = task.data.train[:7]
    logits = logits_of(model, task.tokenizer, [example.text or "" for example in examples])
    expected = torch.tensor([float(example.label) for example in examples], dtype=torch.float64)
    assert logits.shape == (7, 1)
    assert found == pytest.approx(float((logits[:, 0] - expected).square().mean()), rel=1e-5)


def test_a_text_with_any_number_of_classes(tiny_encoder: Path, tmp_path: Path) -> None:
    """The loss is transformers' own of a multi-label classifier, the scores are scikit-learn's."""
    from sklearn.metrics import accuracy_score, f1_score

    sets: tuple[list[str], ...] = (["light", "on"], ["light"], [])
    rows = [{"text": row["text"], "label": sets[i % 3]} for i, row in enumerate(sentences(60))]
    task = make(tiny_encoder, write(tmp_path / "d.jsonl", rows))
    assert (task.kind, task.metrics, task.data.labels) == ("multi-label", ("micro-f1", "exact-set"), ("light", "on"))
    model = task.model(0)
    assert model.config.problem_type == task.blueprint().config.problem_type == "multi_label_classification"
    batch = task.collate(list(task.train[:7]))
    targets = torch.tensor([[float(label in e.label) for label in ("light", "on")] for e in task.data.train[:7]])
    with torch.no_grad():
        found = {share: float(task.loss(model, share)(batch)) for share in (0.0, 0.1)}
        theirs = float(model(**{**batch, "labels": targets}).loss)
        logp = F.logsigmoid(
            torch.stack([-(out := model(**{n: v for n, v in batch.items() if n != "labels"}).logits), out])
        )
    assert found[0.0] == pytest.approx(theirs, rel=1e-5)
    # 0.1 of each class's probability is spread over its two answers, no and yes.
    assert found[0.1] == pytest.approx(0.9 * theirs - 0.1 * float(logp.mean()), rel=1e-5)
    scores = task.test(Full().apply(model))
    logits = logits_of(model, task.tokenizer, [example.text for example in task.data.test])
    predicted = (logits >= 0).int().numpy()
    expected = [[int(label in example.label) for label in ("light", "on")] for example in task.data.test]
    assert scores["micro-f1"] == pytest.approx(100 * f1_score(expected, predicted, average="micro", zero_division=0.0))
    assert scores["exact-set"] == pytest.approx(100 * accuracy_score(expected, predicted))


def test_a_classifier_is_validated_by_the_loss_of_every_row_and_scored_by_its_classes(
    tiny_encoder: Path, tmp_path: Path
) -> None:
    data = folder(tmp_path / "d", sentences, train=8, valid=37, test=41)  # more than one batch, not a multiple of it
    task = make(tiny_encoder, data)
    model = task.model(3)
    applied = Full().apply(model)
    valid, test = task.validate(applied), task.test(applied)
    assert task.chosen_by == "loss"
    assert [*valid] == ["loss", "accuracy", "matthews"] and [*test] == ["accuracy", "matthews"]
    for examples, scores in ((task.data.valid, valid), (task.data.test, test)):
        logits = logits_of(model, task.tokenizer, [example.text or "" for example in examples])
        right = torch.tensor([("off", "on").index(example.label) for example in examples])
        share = (logits.argmax(-1) == right).double().mean()
        assert scores["accuracy"] == pytest.approx(100 * float(share))
        if "loss" in scores:
            assert scores["loss"] == pytest.approx(float(F.cross_entropy(logits, right)), rel=1e-5)


def test_the_head_is_drawn_by_the_seed_and_nothing_else_is(tiny_encoder: Path, tmp_path: Path) -> None:
    task = make(tiny_encoder, write(tmp_path / "d.jsonl", sentences(20)))
    torch.manual_seed(5)
    first = task.model(0).state_dict()
    torch.rand(3)
    again, other = task.model(0).state_dict(), task.model(1).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert {name for name in first if not torch.equal(first[name], other[name])} == {"classifier.weight"}


# --- answers -------------------------------------------------------------------------------------------------------


def losses_by_hand(model: Any, rows: list[dict[str, Any]]) -> list[Tensor]:
    """−log p of the tokens with a label, one row at a time in float64."""
    found = []
    with torch.no_grad():
        for row in rows:
            ids, labels = torch.tensor(row["input_ids"]), row["labels"]
            logp = F.log_softmax(model.double()(input_ids=ids[None]).logits[0], -1)
            places = [i for i in range(1, len(ids)) if labels[i] != -100]
            found.append(torch.stack([-logp[i - 1, ids[i]] for i in places]))
    return found


def answering(model: Path, path: Path, **settings: Any) -> Any:
    rows = [{"prompt": f"light {i} " + "turn " * (i % 5), "completion": "on and off" * (1 + i % 3)} for i in range(200)]
    return make(model, write(path / "d.jsonl", rows), **settings)


def test_the_loss_of_answers_is_the_mean_over_their_tokens(tiny_lm: Path, tmp_path: Path) -> None:
    task = answering(tiny_lm, tmp_path)
    assert isinstance(task, Answers) and task.chosen_by == "perplexity"
    applied = LoRA(rank=2).apply(task.model(0))
    with torch.no_grad():
        for name, parameter in applied.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    batch = list(task.train[:7])
    with torch.no_grad():
        found = float(task.loss(applied.model)(task.collate(batch)))
        smoothed = float(task.loss(applied.model, 0.2)(task.collate(batch)))
    by_hand = torch.cat(losses_by_hand(applied.model, batch))
    assert found == pytest.approx(float(by_hand.mean()), rel=1e-5)
    with torch.no_grad():
        every = torch.cat(
            [
                -F.log_softmax(applied.model(input_ids=torch.tensor([row["input_ids"]])).logits[0], -1).mean(-1)[
                    [i - 1 for i in range(1, len(row["labels"])) if row["labels"][i] != -100]
                ]
                for row in batch
            ]
        )
    assert smoothed == pytest.approx(float(0.8 * by_hand.mean() + 0.2 * every.mean()), rel=1e-5)


def test_perplexity_is_over_all_tokens_of_all_rows(tiny_lm: Path, tmp_path: Path) -> None:
    task = answering(tiny_lm, tmp_path, metrics=("perplexity",))
    applied = Full().apply(task.model(0))
    scores = task.validate(applied), task.test(applied)
    assert (len(task._valid), len(task._test)) == (18, 20)  # more than one batch of each
    for rows, found in zip((task._valid, task._test), scores, strict=True):
        by_hand = torch.cat(losses_by_hand(applied.model, rows))
        assert found == {"perplexity": pytest.approx(math.exp(float(by_hand.mean())), rel=1e-4)}


@pytest.mark.parametrize("beams", [1, 3])
def test_answers_are_what_generate_writes(tiny_lm: Path, tmp_path: Path, beams: int) -> None:
    task = answering(
        *(tiny_lm, tmp_path), beams=beams, length_penalty=0.5, no_repeat_ngram=4, max_new_tokens=6, test_rows=5
    )
    applied = LoRA(rank=2).apply(task.model(0))
    with torch.no_grad():
        for name, parameter in applied.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    expected = []
    for example in task.data.test:
        chat = [{"role": "user", "content": example.prompt}]
        ids = task.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")["input_ids"]
        search = dict(num_beams=3, length_penalty=0.5) if beams == 3 else {}
        written = applied.model.generate(
            *(ids,),
            attention_mask=torch.ones_like(ids),
            max_new_tokens=6,
            do_sample=False,
            no_repeat_ngram_size=4,
            **search,
        )
        expected.append(task.tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True))
    assert task._answers(applied, [(e.completion,) for e in task.data.test]) == expected
    assert len({*expected}) > 1


def test_scores_of_answers_take_any_right_one(tiny_lm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = make(tiny_lm, write(tmp_path / "d.jsonl", pairs(40)), metrics=("exact-match", "chrf"))
    asked: list[int] = []

    def answers(loaded: Any, prompts: Any, *, max_new_tokens: int, **_: Any) -> list[str]:
        asked.append(max_new_tokens)
        return [task.data.test[0].completion, task.data.test[1].others[0], "else", "else"]

    monkeypatch.setattr("lorakit.study.comparison.tasks.answers", answers)
    scores = task.test(Full().apply(task.model(0)))
    assert [*scores] == ["exact-match", "chrf"]
    assert scores["exact-match"] == 50
    longest = max(len(task.tokenizer(text)["input_ids"]) for e in task.data.test for text in (e.completion, *e.others))
    assert asked == [16 + longest]


def test_plain_text_is_scored_by_perplexity_alone(tiny_lm: Path, tmp_path: Path) -> None:
    task = make(tiny_lm, write(tmp_path / "d.jsonl", [{"text": f"turn the light {i}"} for i in range(20)]))
    assert task.metrics == ("perplexity",)
    assert [*task.test(Full().apply(task.model(0)))] == ["perplexity"]
    with pytest.raises(ValueError, match=r"^bleu is for texts; this task is causal-lm without prompts\."):
        make(tiny_lm, tmp_path / "d.jsonl", metrics=("bleu",))


def test_one_model_of_answers_serves_all_seeds(tiny_lm: Path, tmp_path: Path) -> None:
    task = answering(tiny_lm, tmp_path)
    assert task.model(0) is task.model(1)


@pytest.mark.parametrize("make_rows", [pairs, sentences])
def test_methods_on_a_quantised_base(make_rows: Any, tiny_lm: Path, tiny_encoder: Path, tmp_path: Path) -> None:
    model = tiny_lm if make_rows is pairs else tiny_encoder
    data = write(tmp_path / "d.jsonl", make_rows(24))
    plain, task = make(model, data), make(model, data, quantize="nf4")
    assert plain.fingerprint != task.fingerprint
    loaded = task.model(0)
    layers = [module for module in loaded.modules() if type(module).__name__ == "Linear4bit"]
    assert layers and all(layer.compute_dtype == torch.float32 for layer in layers)
    costs = TaskPlan(task, [MethodConfig(method, task.settings) for method in (Full(), LoRA(rank=2))]).costs
    assert costs["full"].left_out.endswith("which is quantised and takes no gradient.")
    applied = LoRA(rank=2).apply(loaded, task.head)
    assert costs["lora rank=2"].parameters == applied.parameter_count
    batch = task.collate(list(task.train)[:4])
    loss = task.loss(loaded)
    before = loss(batch)
    before.backward()
    with torch.no_grad():
        for parameter in applied.parameters():
            assert parameter.grad is not None
            parameter.sub_(0.02 * parameter.grad / (parameter.grad.norm() + 1e-9))
    assert loss(batch) < before
    scores = task.test(applied)
    assert scores.keys() == set(task.metrics)
    task.serve(served(applied, half=True))
