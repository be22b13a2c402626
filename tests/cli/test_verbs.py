"""Every verb as a person runs it, on models of a few thousand parameters."""

import io
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

import lorakit
from conftest import tiny_tokenizer
from lorakit.cli.main import main


def rows(path: Path, count: int = 24) -> Path:
    lines = [{"prompt": f"turn {i % 6}", "completion": "on" if i % 2 else "off"} for i in range(count)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def sentences(path: Path, labels: tuple[object, ...] = ("good", "bad")) -> Path:
    lines = [{"text": f"the light is {'on' if i % 2 else 'off'}", "label": labels[i % len(labels)]} for i in range(24)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def train_args(model: Path, data: Path, out: Path, *more: str) -> list[str]:
    return ["train", "--model", str(model), "--data", str(data), "--output-dir", str(out), "--dtype", "float32", *more]


@pytest.fixture(scope="module")
def adapter(tiny_lm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    out = folder / "out"
    data = rows(folder / "data.jsonl")
    words = train_args(
        tiny_lm, data, out, "--system", "Be brief.", "--lr", "0.02", "--epochs", "12", "--eval-samples", "3"
    )
    assert main(words) == 0
    return out


def test_train_writes_the_folder_and_learns(adapter: Path, tiny_lm: Path) -> None:
    assert {path.name for path in adapter.iterdir() if path.is_file()} == {
        *("README.md", "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "config.yaml"),
        *("metrics.jsonl", "report.html", "results.json", "style.json", "tokenizer.json", "tokenizer_config.json"),
    }
    lines = [json.loads(line) for line in (adapter / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0] - 0.3
    assert any("eval_loss" in line for line in lines)
    assert (adapter / "chat_template.jinja").read_text() == tiny_tokenizer().chat_template
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert (config["task_type"], config["base_model_name_or_path"]) == ("CAUSAL_LM", str(tiny_lm))
    card = (adapter / "README.md").read_text()
    assert card.startswith("---\nbase_model: ") and "exact match" in card
    page = (adapter / "report.html").read_text()
    assert page.startswith("<!doctype html>") and "http" not in page
    assert all(
        one in page
        for one in (str(tiny_lm), lorakit.__version__, "peak memory", "<span>--learning-rate</span> <span>0.02</span>")
    )
    assert page.count('<g class="training">') == page.count('<g class="held-out">') == 1


def test_runs_lists_what_train_wrote(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", str(adapter.parent), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert (found["folder"], found["state"]) == (str(adapter), "finished")
    lines = [json.loads(line) for line in (adapter / "metrics.jsonl").read_text().splitlines()]
    assert found["losses"]["training"] == [line["loss"] for line in lines if "loss" in line][-1]
    results = found["results"]
    assert results["losses"] == found["losses"] and results["lorakit"] == lorakit.__version__
    assert results["seconds"] >= lines[-1]["seconds"] and results["peak_bytes"] > 1e7
    low, high = results["scores"]["exact match"]["adapter_interval"]
    assert 0 <= low <= results["scores"]["exact match"]["adapter"] <= high <= 1


def test_peft_and_lorakit_agree_on_what_was_trained(adapter: Path, tiny_lm: Path) -> None:
    from transformers import AutoModelForCausalLM

    tokens = torch.arange(12).view(1, 12)
    ours, base = (AutoModelForCausalLM.from_pretrained(tiny_lm).eval() for _ in range(2))
    lorakit.load(ours, adapter)
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(base, str(adapter)).eval()
    torch.testing.assert_close(ours(tokens).logits, theirs(tokens).logits)


def test_train_prints_what_a_person_needs(tiny_lm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(train_args(tiny_lm, rows(tmp_path / "d.jsonl"), out, "--max-steps", "2")) == 0
    printed = capsys.readouterr().out
    for expected in (
        "d.jsonl: prompt+completion; rows: train 23, valid 1;",
        "1 of 24 rows held out for evaluation",
        "<|im_start|>assistant\n⟦o",
        "model.layers.*.self_attn.q_proj  ×2  Linear",
        "trainable params: ",
        "2 steps of 8 rows",
        "of memory at the peak of training",
        "; peak memory ",
        " (planned ",
        "exact match",
        "\n    base",
        f"{out}/: README.md, adapter_config.json",
        f"lorakit generate --model {out} --prompt",
        f"lorakit merge --model {out}",
    ):
        assert expected in printed


def test_generate_streams_an_answer(adapter: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    words = ["generate", "--model", str(adapter), "--dtype", "float32", "--max-new-tokens", "5"]
    assert main([*words, "--prompt", "turn 1"]) == 0
    answer = capsys.readouterr().out
    monkeypatch.setattr(sys, "stdin", io.StringIO("turn 1\n"))
    assert main([*words, "--prompt", "-"]) == 0
    assert capsys.readouterr().out == answer
    assert main([*words, "--prompt", "turn 1", "--base"]) == 0
    assert capsys.readouterr().out != answer


def test_chat_answers_each_line_until_the_end(adapter: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("turn 1\n\n/help\n/base\nturn 1\n/base\n/clear\nturn 1\n/quit\n"))
    assert main(["chat", "--model", str(adapter), "--dtype", "float32", "--max-new-tokens", "3"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("(/help lists the commands, /base switches") == 1 and "/clear        starts over" in printed
    assert "(the base model answers)" in printed and "(the adapter answers)" in printed
    answers = [part.partition("\n")[0] for part in printed.split("\n> ")[1:]]
    assert answers[0] == answers[7]  # after /clear the conversation begins again
    assert answers[0] != answers[4]  # the base model says something else


def test_a_model_without_an_adapter_is_shown_alone(tiny_lm: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    rows(tmp_path / "train.jsonl", 6), rows(tmp_path / "test.jsonl", 4)
    assert main(["eval", "--model", str(tiny_lm), "--data", str(tmp_path), "--dtype", "float32"]) == 0
    printed = capsys.readouterr().out
    assert f"── 4 rows of {tmp_path} (test) ──" in printed
    assert "→" not in printed and "adapter" not in printed and printed.count("\n    answer") == 3
    assert len(re.findall(r"(?m)^exact match +\S+%   95 % interval \S+% to \S+%$", printed)) == 1
    monkeypatch.setattr(sys, "stdin", io.StringIO("/base\n/quit\n"))  # there is no adapter: the commands are listed
    assert main(["chat", "--model", str(tiny_lm), "--dtype", "float32"]) == 0
    printed = capsys.readouterr().out
    assert "(/help lists the commands, /quit ends)" in printed and "/retry" in printed and "/base" not in printed


def test_eval_compares_base_and_adapter(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, file = rows(tmp_path / "d.jsonl", 6), tmp_path / "scores.json"
    assert main(["eval", "--model", str(adapter), "--data", str(data), "--json", str(file), "--dtype", "float32"]) == 0
    assert f"6 rows of {data}: base → adapter" in capsys.readouterr().out
    scores = json.loads(file.read_text())
    before, after = scores["metrics"]["exact match"]
    assert before == 0
    assert after == sum(scores["right"]) / 6
    assert len(scores["samples"]) == 6


def test_problem_07_merge_writes_a_plain_model_that_answers_like_the_adapter(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM

    out = tmp_path / "merged"
    assert main(["merge", "--model", str(adapter), "--output-dir", str(out), "--dtype", "float32"]) == 0
    assert "largest logit difference" in capsys.readouterr().out
    tokens = torch.arange(12).view(1, 12)
    merged = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    assert not any("lora" in name for name, _ in merged.named_parameters())
    config = json.loads((adapter / "adapter_config.json").read_text())
    adapted = AutoModelForCausalLM.from_pretrained(config["base_model_name_or_path"]).eval()
    lorakit.load(adapted, adapter)
    torch.testing.assert_close(merged(tokens).logits, adapted(tokens).logits, atol=1e-5, rtol=1e-5)
    assert main(["merge", "--model", str(adapter), "--output-dir", str(out)]) == 1
    assert "is not empty" in capsys.readouterr().err
    words = ["merge", "--model", str(adapter), "--output-dir", str(tmp_path / "strict"), "--dtype", "bfloat16"]
    assert main([*words, "--tolerance", "1e-9"]) == 1
    assert "differs from base + adapter" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged"]


def test_merge_shard_by_shard_gives_the_same_weights_without_the_model(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["merge", "--model", str(adapter), "--output-dir"]
    assert main([*words, str(tmp_path / "in-memory")]) == 0
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    assert main([*words, str(tmp_path / "merged"), "--shard-by-shard"]) == 0
    out = capsys.readouterr().out
    assert "14 of 20 tensors in 1 file changed; all 14 updates found their weights" in out
    assert "lorakit generate" in out
    expected, found = (load_file(tmp_path / name / "model.safetensors") for name in ("in-memory", "merged"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    words.append(str(tmp_path / "again"))
    assert main([*words, "--shard-by-shard", "--tolerance", "0.1"]) == 2
    assert "--tolerance is for a model in memory" in capsys.readouterr().err
    monkeypatch.setattr("lorakit.training.merging_files._write", stopped)
    assert main([*words, "--shard-by-shard"]) == 130
    assert "interrupted; the same command goes on where it was" in capsys.readouterr().err


def stopped(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("where", ["adapter", "merged"])
def test_problem_45_the_template_of_training_travels_with_what_it_trained(
    where: str, adapter: Path, tiny_lm: Path, tmp_path: Path
) -> None:
    """Whatever template the base model has by then, a prompt is what the rows began with in training."""
    from transformers import AutoTokenizer

    from lorakit.training.models import load_with_adapter
    from lorakit.training.style import Style
    from lorakit.training.tokens import prompt_ids

    base, folder = shutil.copytree(tiny_lm, tmp_path / "base"), tmp_path / where
    if where == "merged":
        assert main(["merge", "--model", str(adapter), "--output-dir", str(folder)]) == 0
    else:
        shutil.copytree(adapter, folder)
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(base)}))
    (base / "chat_template.jinja").write_text("{% for message in messages %}[{{ message['content'] }}]{% endfor %}")
    expected = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nturn 1<|im_end|>\n<|im_start|>assistant\n"
    # transformers, as servers use it
    tokenizer = AutoTokenizer.from_pretrained(folder)
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "turn 1"}]
    assert tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) == expected
    # lorakit's own verbs
    loaded = load_with_adapter(str(folder), None, dtype="float32")
    style = Style.recorded(folder, loaded.tokenizer)
    ids = prompt_ids("turn 1", loaded.tokenizer, system=style.system, chat=style.chat)
    assert ids == tiny_tokenizer()(expected, add_special_tokens=False)["input_ids"]


def test_problem_05_merging_a_tied_head_unties_it(tiny_lm: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    out = tmp_path / "out"
    words = train_args(
        tiny_lm, rows(tmp_path / "d.jsonl"), out, "--targets", "lm_head", "--lr", "0.02", "--eval-samples", "0"
    )
    assert main(words) == 0
    assert main(["merge", "--model", str(out), "--output-dir", str(tmp_path / "merged"), "--dtype", "float32"]) == 0
    base = AutoModelForCausalLM.from_pretrained(tiny_lm)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(merged.model.embed_tokens.weight, base.model.embed_tokens.weight)
    assert not torch.equal(merged.lm_head.weight, base.lm_head.weight)


def test_info_and_check_need_no_weights(
    adapter: Path, tiny_lm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["info", str(adapter)]) == 0
    printed = capsys.readouterr().out
    assert "14 × linear  rank 16, alpha 32, scale 2" in printed
    assert "model.layers.*.mlp.up_proj" in printed
    # A (16, 32) and B (64, 16) in each of two layers.
    assert ["model.layers.*.mlp.up_proj", "×2", "16", "3,072"] in [line.split() for line in printed.splitlines()]
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in tiny_lm.iterdir():
        if file.suffix != ".safetensors":
            (bare / file.name).write_bytes(file.read_bytes())
    assert main(["check", "--model", str(bare), "--data", str(rows(tmp_path / "d.jsonl"))]) == 0
    assert "trainable params: " in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bare", "d.jsonl"]


def test_analyze_measures_an_adapter_beside_its_base_and_another(
    adapter: Path, tiny_lm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other, out = tmp_path / "other", tmp_path / "analysis"
    words = ["--rank", "4", "--seed", "1", "--epochs", "2", "--eval-samples", "0"]
    assert main(train_args(tiny_lm, rows(tmp_path / "d.jsonl"), other, *words)) == 0
    capsys.readouterr()
    assert main(["analyze", str(adapter), str(other), "--output-dir", str(out)]) == 0
    printed = capsys.readouterr()
    assert f"base weights: {tiny_lm}" in printed.out and "amplified" in printed.out and printed.err == ""
    assert f"φ with {other}" in printed.out and "note:" not in printed.out
    assert sorted(path.name for path in out.iterdir() if path.is_file()) == ["analysis.html", "analysis.json"]
    data = json.loads((out / "analysis.json").read_text())
    assert len(data["modules"]) == len(data["similarities"]) == 14
    assert all(module["base"]["change"] > 0 for module in data["modules"])
    assert (out / "analysis.html").read_text().startswith("<!doctype html>")
    assert main(["analyze", str(adapter), str(other), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == data
    assert main(["analyze", str(adapter), "--modules"]) == 0
    assert capsys.readouterr().out.count("self_attn.q_proj") == 2


def test_analyze_reads_an_adapter_that_peft_saved(
    tiny_lm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import warnings

    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_lm)
    weight = base.model.layers[1].self_attn.q_proj.weight.detach().double().clone()
    config = peft.LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=["q_proj"], task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(base, config)
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.1)
        model.save_pretrained(tmp_path / "theirs")
    layer = model.base_model.model.model.layers[1].self_attn.q_proj
    change = layer.get_delta_weight("default").detach().double()
    assert main(["analyze", str(tmp_path / "theirs"), "--model", str(tiny_lm), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["modules"]
    assert [module["name"] for module in found] == [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    assert found[1]["scale"] == 3  # 6/√4
    U, S, Vh = torch.linalg.svd(change)
    assert found[1]["singular_values"] == pytest.approx(S[:4].tolist(), rel=1e-5)
    assert found[1]["base"]["change"] == pytest.approx(float(change.norm() / weight.norm()), rel=1e-5)
    between = float((U[:, :4].T @ weight @ Vh[:4].T).norm())
    assert found[1]["base"]["amplification"] == pytest.approx(float(change.norm()) / between, rel=1e-4)


def test_analyze_without_base_weights_says_what_it_leaves_out(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network was asked"))
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in adapter.glob("adapter_*"):
        (moved / path.name).write_bytes(path.read_bytes())
    config = json.loads((moved / "adapter_config.json").read_text())
    for named in ("some/hub-model", str(tmp_path / "gone" / "base"), None):
        (moved / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": named}))
        assert main(["analyze", str(moved)]) == 0
        printed = capsys.readouterr().out
        notes = [line for line in printed.splitlines() if line.startswith("note: ")]
        assert len(notes) == 1 and "what needs W is left out" in notes[0] and (named or "names none") in notes[0]
        assert "amplified" not in printed and "eff." in printed


@pytest.mark.parametrize("labels", [("good", "bad"), (0.5, 1.25, 3.0)], ids=["classes", "regression"])
def test_problem_32_a_classifier_with_its_new_head(
    labels: tuple[Any, ...], tiny_encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = sentences(tmp_path / "d.jsonl", labels), tmp_path / "out"
    words = train_args(tiny_encoder, data, out, "--lr", "0.01", "--epochs", "10", "--holdout", "0.3")
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "trained whole: classifier.weight" in printed
    assert json.loads((out / "labels.json").read_text()) == (sorted(labels) if labels[0] == "good" else [])
    assert (
        main(
            ["eval", "--model", str(out), "--data", str(data), "--json", str(tmp_path / "s.json"), "--dtype", "float32"]
        )
        == 0
    )
    scores = json.loads((tmp_path / "s.json").read_text())
    if labels[0] == "good":
        assert scores["metrics"]["accuracy"][1] == 1.0
    else:
        assert set(scores["metrics"]) == {"pearson"}
    assert main(["merge", "--model", str(out), "--output-dir", str(tmp_path / "merged"), "--dtype", "float32"]) == 0
    capsys.readouterr()
    assert main(["analyze", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "amplified" in printed and "note: trained whole, with no low rank to analyze: classifier.bias" in printed


def test_problem_30_a_resumed_run_equals_the_uninterrupted_one(tiny_lm: Path, tmp_path: Path) -> None:
    data = rows(tmp_path / "d.jsonl")
    options = ["--epochs", "4", "--eval-samples", "0", "--save-steps", "3", "--lr", "0.01"]
    assert main(train_args(tiny_lm, data, tmp_path / "straight", *options)) == 0
    assert main(train_args(tiny_lm, data, tmp_path / "resumed", *options)) == 0
    # as an interruption after step 9 of 12 leaves it
    (tmp_path / "resumed" / "adapter_model.safetensors").unlink()
    shutil.rmtree(tmp_path / "resumed" / "checkpoint-12")
    assert main(train_args(tiny_lm, data, tmp_path / "resumed", *options, "--resume", "auto")) == 0
    straight, resumed = (
        (tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("straight", "resumed")
    )
    assert straight == resumed
    steps = [json.loads(line)["step"] for line in (tmp_path / "resumed" / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)


def test_gradient_checkpointing_trains_every_factor_as_without_it(tiny_lm: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    data = rows(tmp_path / "d.jsonl", 17)
    plain, checkpointed = tmp_path / "plain", tmp_path / "checkpointed"
    options = ["--max-steps", "2", "--lr", "0.01", "--eval-samples", "0"]
    assert main(train_args(tiny_lm, data, plain, *options)) == 0
    assert main(train_args(tiny_lm, data, checkpointed, *options, "--gradient-checkpointing")) == 0
    expected, found = (load_file(out / "adapter_model.safetensors") for out in (plain, checkpointed))
    torch.testing.assert_close(found, expected)
    factors = [tensor for name, tensor in found.items() if "lora_B" in name]
    assert len(factors) == 14
    assert all(factor.any() for factor in factors)


def test_problem_44_accumulated_gradients_are_those_of_the_whole_batch(tiny_lm: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    data = rows(tmp_path / "d.jsonl", 17)
    results = []
    for batch, accumulation in ((16, 1), (4, 4)):
        out = tmp_path / f"{batch}"
        words = ["--batch-size", f"{batch}", "--gradient-accumulation-steps", f"{accumulation}", "--max-steps", "1"]
        assert main(train_args(tiny_lm, data, out, *words, "--warmup-ratio", "0", "--eval-samples", "0")) == 0
        line = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])
        results.append((line["loss"], line["grad_norm"], load_file(out / "adapter_model.safetensors")))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-4)
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-4)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_every_verb_takes_what_peft_wrote_relative_to_a_changed_base(
    init: str, tiny_lm: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Such an update is known only with its model's weights, which are not read to see what a folder is for."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_lm)
    theirs = peft.get_peft_model(
        model, peft.LoraConfig(r=2, init_lora_weights=init, target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                parameter.add_(torch.randn_like(parameter) / 4)
    folder = tmp_path / "theirs"
    theirs.save_pretrained(folder)
    ids = torch.arange(6)[None]
    with torch.no_grad():
        expected = theirs(ids).logits
    own = ["--model", str(tiny_lm), "--adapter", str(folder)]
    rows = tmp_path / "d.jsonl"
    rows.write_text('{"prompt": "on", "completion": "off"}\n' * 3)
    for words in (
        ["info", str(folder)],
        ["generate", *own, "--prompt", "on", "--max-new-tokens", "2"],
        ["eval", *own, "--data", str(rows)],
        ["analyze", str(folder), "--model", str(tiny_lm), "-o", str(tmp_path / "analysis")],
        ["merge", *own, "--output-dir", str(tmp_path / "merged")],
    ):
        assert main(words) == 0, (words, capfd.readouterr().err)
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(ids).logits
    torch.testing.assert_close(merged, expected, rtol=1e-3, atol=1e-4)
