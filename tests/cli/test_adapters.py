"""Several adapters on the command line: each gives what PEFT gives with it alone, and what does not go together is told
before any weight is loaded.
"""

import io
import json
import shutil
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lorakit
from adapters import classifier_adapter, labelled_rows, language_adapter, write_rows
from conftest import tiny_tokenizer
from lorakit.cli.main import main

LENGTH = 6
SHORT = ["--dtype", "float32", "--max-new-tokens", f"{LENGTH}"]
TEMPLATE = "{% for message in messages %}{{ message['content'] }} <|im_start|>{% endfor %}"


@pytest.fixture(scope="module")
def lively(tiny_lm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose answers follow from every word that it reads."""
    folder = shutil.copytree(tiny_lm, tmp_path_factory.mktemp("bases") / "lively")
    torch.manual_seed(1)
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_lm)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.5)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(lively: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {
        "fr": language_adapter(lively, root / "french", 0.5, seed=1, system="Be brief.", chat=True),
        "de": language_adapter(lively, root / "de", 0.6, seed=2, rank=3),
        "dora": language_adapter(lively, root / "dora", 0.4, seed=3, dora=True),
    }


def given(folders: Mapping[str, Path], *names: str) -> list[str]:
    return [word for name in names or folders for word in ("--adapter", f"{name}={folders[name]}")]


def run(capsys: pytest.CaptureFixture[str], *words: object, code: int = 0) -> str:
    found = main(list(map(str, words)))
    out, err = capsys.readouterr()
    assert found == code, err
    assert "Traceback" not in err
    return out if code == 0 else err


def by_peft(
    base: Path, weights: Mapping[Path, float], prompts: list[str], system: str | None, tokenizer: Any = None
) -> list[str]:
    """Greedy answers of PEFT's model with one adapter, with a weighted sum of some, or with none."""
    tokenizer = tokenizer or AutoTokenizer.from_pretrained(base)
    model: Any = AutoModelForCausalLM.from_pretrained(base).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number, folder in enumerate(weights):
            if number == 0:
                model = peft.PeftModel.from_pretrained(model, folder, adapter_name="0").eval()
            else:
                model.load_adapter(folder, adapter_name=f"{number}")
        if list(weights.values()) not in ([], [1.0]):
            names = [f"{number}" for number in range(len(weights))]
            model.add_weighted_adapter(names, list(weights.values()), "sum", combination_type="cat")
            model.set_adapter("sum")
    found = []
    for prompt in prompts:
        messages = [{"role": "system", "content": system}] if system else []
        messages += [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=LENGTH, do_sample=False)
        found.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    return found


SYSTEM = {"fr": "Be brief.", "de": None, "dora": None}


@pytest.fixture(scope="module")
def answers(lively: Path, folders: dict[str, Path]) -> dict[str, str]:
    """The answer to "turn 1" by PEFT, of each adapter and of the base asked as the first one is."""
    found = {name: by_peft(lively, {folder: 1.0}, ["turn 1"], SYSTEM[name])[0] for name, folder in folders.items()}
    found["none"] = by_peft(lively, {}, ["turn 1"], "Be brief.")[0]
    assert len(set(found.values())) == 4
    return found


# --- generate ------------------------------------------------------------------------------------------------------


def test_generate_answers_with_each_of_them(folders, answers, capsys) -> None:
    out = run(capsys, "generate", *given(folders), "-p", "turn 1", *SHORT)
    assert out == "".join(f"── {name}\n{answers[name]}\n" for name in folders)


def test_generate_answers_with_the_one_that_is_chosen(lively, folders, answers, capsys) -> None:
    for name in ("de", "fr", "none"):
        words = ["generate", "--model", lively, *given(folders), "-p", "turn 1", "--use", name, *SHORT]
        assert run(capsys, *words) == answers[name] + "\n"
    assert run(capsys, "generate", *given(folders), "-p", "turn 1", "--base", *SHORT) == answers["none"] + "\n"
    assert run(capsys, "generate", "--adapter", folders["de"], "-p", "turn 1", *SHORT) == answers["de"] + "\n"


def test_generate_answers_with_a_weighted_sum(lively, folders, answers, capsys) -> None:
    weights = {folders["de"]: 0.75, folders["fr"]: -0.5}
    (expected,) = by_peft(lively, weights, ["turn 1"], None)
    words = ["generate", *given(folders, "fr", "de"), "-p", "turn 1", *SHORT]
    assert run(capsys, *words, "--use", "de=0.75,fr=-0.5") == expected + "\n"
    assert expected not in answers.values()
    assert main([*map(str, words), "--use", "de=0.75,fr=-0.5"]) == 0
    assert "note: de, fr were trained in different styles; that of de is used." in capsys.readouterr().err
    message = run(capsys, "generate", *given(folders), "-p", "turn 1", "--use", "fr=1,dora=1", *SHORT, code=1)
    assert "is a DoRA update: its magnitudes do not add up" in message and message.count("\n") == 1


def test_only_what_is_used_is_put_on_the_model(folders, capsys, monkeypatch) -> None:
    put: list[str] = []
    put_in = lorakit.Bank.__setitem__

    def noted(bank: lorakit.Bank, name: str, value: Any) -> None:
        if next(bank.model.parameters()).device.type != "meta":  # there it is only seen whether it fits
            put.append(name)
        put_in(bank, name, value)

    monkeypatch.setattr(lorakit.Bank, "__setitem__", noted)
    run(capsys, "generate", *given(folders), "-p", "turn 1", "--use", "de=1,fr=1", *SHORT)
    assert put == ["fr", "de"]


def test_two_adapters_of_classifiers(tiny_encoder: Path, tmp_path: Path, capsys) -> None:
    labels = ("no", "yes")
    one = classifier_adapter(tiny_encoder, tmp_path / "one", labels, always=0)
    two = classifier_adapter(tiny_encoder, tmp_path / "two", labels, always=1)
    other = classifier_adapter(tiny_encoder, tmp_path / "other", ("yes", "no"))
    more = classifier_adapter(tiny_encoder, tmp_path / "more", ("yes", "no", "perhaps"))
    number = classifier_adapter(tiny_encoder, tmp_path / "number", ())
    lines = run(capsys, "generate", "--adapter", one, "--adapter", two, "-p", "on", "--dtype", "float32").splitlines()
    assert [lines[0], lines[1].split()[0]] == ["── one", "no"] and [lines[3], lines[4].split()[0]] == ["── two", "yes"]
    rows = labelled_rows(tmp_path / "d.jsonl", ["yes", "no", "no", "no"])
    score = tmp_path / "s.json"
    out = run(capsys, "eval", "--adapter", one, "--adapter", two, "--data", rows, "--json", score)
    found = {name: own["metrics"]["accuracy"][1] for name, own in json.loads(score.read_text())["by_adapter"].items()}
    assert found == {"one": 0.75, "two": 0.25} and "random" in out
    write_rows(
        rows, [{"text": "on", "label": "yes", "adapter": "two"}, {"text": "off", "label": "yes", "adapter": "one"}]
    )
    run(capsys, "eval", "--adapter", one, "--adapter", two, "--data", rows, "--json", score)
    written = json.loads(score.read_text())
    found = {name: own["metrics"]["accuracy"][1] for name, own in written["by_adapter"].items()}
    assert found == {"one": 0.0, "two": 1.0} and written["all"]["right"] == [True, False]
    for folder, why in (
        (
            other,
            "they have the same classes in another order: one is a classifier (no, yes), other is a classifier (yes",
        ),
        (more, "their classes differ: one is a classifier (no, yes), more is a classifier (yes, no, perhaps)"),
        (number, "they have different tasks: one is a classifier (no, yes), number is a regression"),
    ):
        message = run(capsys, "generate", "--adapter", one, "--adapter", folder, "-p", "on", code=1)
        assert why in message and message.count("\n") == 1


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_what_is_known_only_with_the_weights_is_one_of_several(lively, folders, answers, tmp_path, capsys) -> None:
    """PEFT's PiSSA: an update relative to a part of W."""
    model: Any = AutoModelForCausalLM.from_pretrained(lively)
    config = peft.LoraConfig(
        r=2, init_lora_weights="pissa", target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"
    )
    theirs: Any = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                parameter.add_(torch.randn_like(parameter) / 2)
    theirs.save_pretrained(tmp_path / "pissa")
    tokenizer = AutoTokenizer.from_pretrained(lively)
    asked = [{"role": "user", "content": "turn 1"}]
    text = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    out = theirs.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=LENGTH, do_sample=False)
    expected = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    both = given(folders | {"pissa": tmp_path / "pissa"}, "pissa", "de")
    out = run(capsys, "generate", *both, "-p", "turn 1", *SHORT)
    assert out == f"── pissa\n{expected}\n── de\n{answers['de']}\n" and expected != answers["de"]


# --- chat ----------------------------------------------------------------------------------------------------------


def test_chat_changes_the_adapter_in_a_conversation(lively, folders, answers, capsys, monkeypatch) -> None:
    said = ["turn 1", "/clear", "/use de", "turn 1", "/clear", "/use none", "/base", "/use fr", "turn 1", "/base"]
    said += ["/use de=0.75,fr=-0.5", "/clear", "turn 1", "/use frr", "/use fr=a", "/use fr=1,dora=1", "/help", "/quit"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(said) + "\n"))
    out = run(capsys, "chat", *given(folders), *SHORT)
    parts = [part.removesuffix("\n").partition("\n> ")[0] for part in out.split("\n> ")[1:]]
    (total,) = by_peft(lively, {folders["de"]: 0.75, folders["fr"]: -0.5}, ["turn 1"], None)
    found = dict(enumerate(part.rstrip("\n") for part in parts))
    assert found[0] == answers["fr"] and found[3] == answers["de"] and found[8] == answers["fr"] and found[12] == total
    assert [found[place] for place in (2, 5, 6, 7, 9)] == [
        "(de answers)",
        "(the base model answers)",
        "(the base model answers)",
        "(fr answers)",
        "(the base model answers)",
    ]
    assert found[10].startswith("(de=0.75,fr=-0.5 answers)\n(de, fr were trained in different styles")
    assert found[13] == "(no adapter is named 'frr', there are fr, de, dora. Did you mean 'fr'?)"
    assert found[14] == "(expected a number as a weight in 'fr=a', found 'a'.)"
    assert "magnitudes do not add up" in found[15]
    assert "chooses who answers: fr, de, dora, none (the base), or a sum such as fr=0.5,de=0.5" in found[16]


# --- eval ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    return [f"turn {number} on" for number in range(3)]


@pytest.fixture(scope="module")
def table(lively: Path, folders: dict[str, Path], prompts: list[str]) -> dict[str, list[str]]:
    """The answers to all prompts by PEFT, of each adapter alone."""
    return {name: by_peft(lively, {folder: 1.0}, prompts, SYSTEM[name]) for name, folder in folders.items()}


def test_eval_scores_each_in_one_table(lively, folders, prompts, table, tmp_path, capsys) -> None:
    expected = [table["fr"][0], table["fr"][1], table["dora"][2]]
    rows = [{"prompt": p, "completion": e} for p, e in zip(prompts, expected, strict=True)]
    data, file = write_rows(tmp_path / "d.jsonl", rows), tmp_path / "s.json"
    out = run(capsys, "eval", *given(folders), "--data", data, "--json", file, *SHORT)
    lines = [line.split() for line in out.splitlines()]
    assert f"── 3 rows of {data}: base → adapter" in out
    assert lines[2] == ["exact", "match", "rows", "base", "adapter"]
    assert [lines[place] for place in (3, 4, 5)] == [
        ["fr", "3", "0.0%", "66.7%"],
        ["de", "3", "0.0%", "0.0%"],
        ["dora", "3", "0.0%", "33.3%"],
    ]
    asked = ["base", *folders, "expected"]
    assert [line[0] for line in lines[7 : 7 + 6]] == ["turn", *asked]
    found = json.loads(file.read_text())
    assert found["all"] is None
    bases = set()
    for name, own in found["by_adapter"].items():
        assert [sample["adapter"] for sample in own["samples"]] == table[name]
        base = by_peft(lively, {}, prompts, SYSTEM[name])
        bases.add(tuple(base))
        assert [sample["base"] for sample in own["samples"]] == base
        one = tmp_path / "one.json"
        run(capsys, "eval", "--model", folders[name], "--data", data, "--json", one, *SHORT)
        assert json.loads(one.read_text()) == own
    assert len(bases) == 2  # with fr's system message, and without any


def test_rows_name_the_adapter_that_answers_them(
    lively, folders, prompts, table, tmp_path, capsys, monkeypatch
) -> None:
    batches: list[list[str | None]] = []
    rows_of = lorakit.Bank.rows

    def noted(bank: lorakit.Bank, names: list[str | None]) -> Any:
        batches.append(list(names))
        return rows_of(bank, names)

    monkeypatch.setattr(lorakit.Bank, "rows", noted)
    named = ["fr", "de", "dora", "fr", "de", None, "none"]
    # one system message for all, so that fr and de can share a batch
    alone = {name: by_peft(lively, {folder: 1.0}, prompts, "Be kind.") for name, folder in folders.items()}
    base = by_peft(lively, {}, prompts, "Be kind.")
    wanted = [base[i % 3] if name in (None, "none") else alone[str(name)][i % 3] for i, name in enumerate(named)]
    rows: list[dict[str, Any]] = [
        {
            "prompt": prompts[i % 3],
            "completion": "never" if i == 4 else wanted[i],
            "adapter": name,
        }
        for i, name in enumerate(named)
    ]
    data, file = write_rows(tmp_path / "d.jsonl", rows), tmp_path / "s.json"
    words = ["eval", *given(folders), "--data", data, "--json", file, "--system", "Be kind.", "--show", 1, *SHORT]
    out = run(capsys, *words)
    found = json.loads(file.read_text())
    assert [sample["adapter"] for sample in found["all"]["samples"]] == wanted
    lines = {line.split()[0]: line.split()[1:] for line in out.splitlines()[3:8]}
    assert lines["fr"] == ["2", "0.0%", "100.0%"] and lines["de"] == ["2", "0.0%", "50.0%"]
    assert lines["dora"] == ["1", "0.0%", "100.0%"] and lines["none"] == ["2", "100.0%", "100.0%"]
    assert lines["all"] == ["rows", "7", "28.6%", "85.7%"]
    assert "note" not in out
    together = next(batch for batch in batches if len(batch) > 1)
    assert sorted(map(str, together)) == ["de", "de", "fr", "fr"]  # and DoRA's row is not among them


def test_rows_are_asked_in_the_style_of_their_adapter(folders, prompts, table, tmp_path, capsys) -> None:
    named = ["fr", "de", "fr"]
    rows = [{"prompt": p, "completion": "x", "adapter": n} for p, n in zip(prompts, named, strict=True)]
    file = tmp_path / "s.json"
    run(capsys, "eval", *given(folders), "--data", write_rows(tmp_path / "d.jsonl", rows), "--json", file, *SHORT)
    samples = json.loads(file.read_text())["all"]["samples"]
    assert [own["adapter"] for own in samples] == [table[name][place] for place, name in enumerate(named)]


def test_perplexity_of_rows_that_name_their_adapter(lively, folders, tmp_path, capsys) -> None:
    texts = ["turn the light on", "and off", "system user", "assistant"]
    rows = [{"text": text, "adapter": name} for text, name in zip(texts, ["fr", "de", "dora", "de"], strict=True)]
    data, file, one = write_rows(tmp_path / "d.jsonl", rows), tmp_path / "s.json", tmp_path / "one.json"
    run(capsys, "eval", *given(folders), "--data", data, "--json", file, "--dtype", "float32")
    found = json.loads(file.read_text())
    tokenizer = AutoTokenizer.from_pretrained(lively)
    total, count = 0.0, 0
    for name in folders:
        own = [row for row in rows if row["adapter"] == name]
        run(
            capsys,
            "eval",
            "--model",
            folders[name],
            "--data",
            write_rows(tmp_path / "own.jsonl", own),
            "--json",
            one,
            "--dtype",
            "float32",
        )
        assert found["by_adapter"][name]["metrics"]["perplexity"] == pytest.approx(
            json.loads(one.read_text())["metrics"]["perplexity"], rel=1e-4
        )
        model: Any = AutoModelForCausalLM.from_pretrained(lively).eval()
        lorakit.load(model, folders[name])
        for row in own:
            ids = torch.tensor([[*tokenizer(row["text"])["input_ids"], tokenizer.eos_token_id]])
            with torch.no_grad():
                p = model(ids).logits[0, :-1].double().log_softmax(-1)
            total -= float(p.gather(1, ids[0, 1:, None]).sum())
            count += ids.shape[1] - 1
    assert found["all"]["metrics"]["perplexity"][1] == pytest.approx(float(torch.tensor(total / count).exp()), rel=1e-4)


def test_a_row_that_names_no_adapter_is_told_before_anything_is_loaded(folders, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("lorakit.training.several.load_base", lambda *_, **__: pytest.fail("loaded"))
    rows = [{"prompt": "a", "completion": "b", "adapter": name} for name in ("fr", "frr", "none", "nine", 3)]
    data = write_rows(tmp_path / "d.jsonl", rows)
    message = run(capsys, "eval", *given(folders, "fr", "de"), "--data", data, code=1)
    assert "d.jsonl:2: no adapter is named 'frr', there are fr, de. Did you mean 'fr'?" in message
    assert "d.jsonl:4: no adapter is named 'nine', there are fr, de. Did you mean 'none'?" in message
    assert "d.jsonl:5: no adapter is named 3, there are fr, de." in message


def test_where_no_adapter_has_a_name_rows_do_not_choose(folders, tmp_path, capsys) -> None:
    data = write_rows(tmp_path / "d.jsonl", [{"prompt": "a", "completion": "b", "adapter": "x"}])
    assert "note: keys that are not read: adapter" in run(capsys, "eval", "--model", folders["fr"], "--data", data)


# --- what does not go together -------------------------------------------------------------------------------------


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorakit.training.several.load_base", lambda *_, **__: pytest.fail("loaded"))


@pytest.fixture(scope="module")
def other_base(lively: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with the same tokenizer and fewer layers."""
    folder = tmp_path_factory.mktemp("bases") / "other"
    shutil.copytree(lively, folder)
    model = AutoModelForCausalLM.from_pretrained(lively)
    config = model.config
    config.num_hidden_layers = 1
    type(model)(config).save_pretrained(folder)
    return folder


def test_adapters_of_different_bases_are_refused(lively, other_base, folders, tmp_path, capsys, unloaded: None) -> None:
    other = language_adapter(other_base, tmp_path / "other")
    for verb in (["generate", "-p", "a"], ["chat"], ["eval", "--data", "d.jsonl"]):
        message = run(capsys, *verb, *given(folders | {"x": other}, "fr", "x"), code=1)
        assert f"the adapters are for different bases: fr for {lively}, x for {other_base}." in message
        assert message.count("\n") == 1
    # --model decides which base it is; then the adapters must fit it
    words = ["generate", "--model", other_base, "-p", "a", *given(folders | {"x": other}, "x", "fr")]
    message = run(capsys, *words, code=1)
    assert f"fr ({folders['fr']}) is not for {other_base}: the adapter does not fit LlamaForCausalLM" in message
    assert message.count("\n") == 1


def test_the_same_base_by_another_path_is_the_same(lively, folders, answers, tmp_path, capsys) -> None:
    (tmp_path / "link").symlink_to(lively)
    moved = shutil.copytree(folders["de"], tmp_path / "moved")
    config = json.loads((moved / "adapter_config.json").read_text())
    (moved / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(tmp_path / "link")}))
    out = run(capsys, "generate", *given(folders | {"de": moved}, "fr", "de"), "-p", "turn 1", *SHORT)
    assert out == f"── fr\n{answers['fr']}\n── de\n{answers['de']}\n"


def test_each_is_asked_in_its_own_chat_template(lively, folders, answers, tmp_path, capsys, monkeypatch) -> None:
    own = shutil.copytree(folders["de"], tmp_path / "own")
    tokenizer = tiny_tokenizer(TEMPLATE)
    tokenizer.save_pretrained(own)
    (expected,) = by_peft(lively, {own: 1.0}, ["turn 1"], None, tokenizer)
    assert expected != answers["de"]
    words = [*given(folders | {"own": own}, "fr", "own"), *SHORT]
    assert main(["generate", *words, "-p", "turn 1"]) == 0
    out, err = capsys.readouterr()
    assert out == f"── fr\n{answers['fr']}\n── own\n{expected}\n"
    assert err.splitlines()[-1] == "note: the tokenizers or chat templates of fr, own differ; each is asked in its own."
    assert main(["generate", *words, "-p", "turn 1", "--use", "fr=1,own=1"]) == 0
    assert "templates of fr, own differ; that of fr is used" in capsys.readouterr().err
    rows = [{"prompt": "turn 1", "completion": "x", "adapter": name} for name in ("fr", "own")]
    file = tmp_path / "s.json"
    out = run(capsys, "eval", *words, "--data", write_rows(tmp_path / "d.jsonl", rows), "--json", file)
    assert [own["adapter"] for own in json.loads(file.read_text())["all"]["samples"]] == [answers["fr"], expected]
    assert "each is asked in its own" in out
    monkeypatch.setattr(sys, "stdin", io.StringIO("/use own\nturn 1\n"))
    assert f"\n> {expected}\n" in run(capsys, "chat", *words)


def test_tokenizers_that_disagree_on_a_token_are_refused(folders, tmp_path, capsys, unloaded: None) -> None:
    other = shutil.copytree(folders["de"], tmp_path / "other")
    text = json.loads((other / "tokenizer.json").read_text())
    ids = text["model"]["vocab"]
    ids["a"], ids["b"] = ids["b"], ids["a"]
    (other / "tokenizer.json").write_text(json.dumps(text))
    message = run(capsys, "generate", *given(folders | {"x": other}, "fr", "x"), "-p", "a", code=1)
    assert "cannot share a base, because their tokenizers differ: '" in message
    assert f"is token {ids['b']} in one and {ids['a']} in the other" in message or (
        f"is token {ids['a']} in one and {ids['b']} in the other" in message
    )


def test_bases_that_were_quantised_differently_are_refused(folders, tmp_path, capsys, unloaded: None) -> None:
    other = shutil.copytree(folders["de"], tmp_path / "other")
    (other / "config.yaml").write_text("quantize: nf4\n")
    message = run(capsys, "generate", *given(folders | {"x": other}, "fr", "x"), "-p", "a", code=1)
    assert "quantised differently (fr: none, x: nf4): say --quantize." in message and message.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message", "code"),
    [
        (["--use", "frr"], "--use: no adapter is named 'frr', there are fr, de. Did you mean 'fr'?", 2),
        (["--use", "fr=1,dee=2"], "--use: no adapter is named 'dee', there are fr, de. Did you mean 'de'?", 2),
        (["--use", "fr,de"], "--use: 'fr' in 'fr,de' has no weight. A sum is written NAME=WEIGHT,NAME=WEIGHT.", 2),
        (["--use", "fr=x"], "--use: expected a number as a weight in 'fr=x', found 'x'.", 2),
        (["--use", "fr=inf"], "--use: expected a number as a weight in 'fr=inf', found 'inf'.", 2),
        (["--use", "fr=1,fr=2"], "--use: 'fr' stands twice in 'fr=1,fr=2'.", 2),
        (["--use", "fr", "--base"], "--base answers with the base model, as --use none does.", 2),
        (["--adapter", "fr=FOLDER"], "two adapters are named 'fr': ", 1),
        (["--adapter", "none=FOLDER"], "'none' means the base model. Name it: --adapter NAME=FOLDER", 1),
        (["--adapter", "=FOLDER"], "--adapter: expected NAME=PATH or PATH, found '=FOLDER'.", 2),
        (["--adapter", " "], "--adapter: expected NAME=PATH or PATH, found ' '.", 2),
        (["--adapter", "x="], "--adapter: expected NAME=PATH or PATH, found 'x='.", 2),
        (["--adapter", "x=nowhere"], "nowhere: no such file or folder", 1),
        (["--adaptr", "x"], "unknown argument '--adaptr'. Did you mean '--adapter'?", 2),
        (["--model", "nowhere"], "nowhere", 1),
    ],
)
def test_what_is_wrong_is_told_in_one_line(
    words: list[str], message: str, code: int, folders, capsys, unloaded: None
) -> None:
    filled = [word.replace("FOLDER", str(folders["de"])) for word in words]
    found = run(capsys, "generate", *given(folders, "fr", "de"), "-p", "a", *filled, code=code)
    assert message.replace("FOLDER", str(folders["de"])) in found and found.count("\n") == 1


def test_a_model_is_asked_for_where_no_adapter_names_it(capsys) -> None:
    assert "required: --model/--model-name-or-path" in run(capsys, "eval", "--data", "d", code=2)


def test_names_and_paths(folders, answers, tmp_path, capsys, monkeypatch) -> None:
    """~ is the home folder, a path alone has its folder's name, and a folder may have "=" in its name."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folders["fr"], tmp_path / "lr=0.1")
    (tmp_path / "german").symlink_to(folders["de"])
    expected = f"── lr=0.1\n{answers['fr']}\n── german\n{answers['de']}\n"
    for one, other in (("lr=0.1", "german"), ("~/lr=0.1", "~/german/"), ("lr=0.1=~/lr=0.1", "german=~/german")):
        words = ["generate", "--adapter", one, "--adapter", other, "-p", "turn 1", *SHORT]
        if one.startswith("lr=0.1="):  # the name ends at the first "="
            expected = expected.replace("── lr=0.1", "── lr")
            words[2] = "lr=lr=0.1"
        assert run(capsys, *words) == expected
    words = ["generate", "--adapter", "lr=0.1", "--adapter", "german", "-p", "turn 1", *SHORT]
    assert run(capsys, *words, "--use", "lr=0.1") == answers["fr"] + "\n"
