"""The model card: what a hub page needs, read by the hub's own reader, and no path of the machine."""

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from lorakit.training.card import hub_card, is_hub_id, model_card
from lorakit.training.report import Evaluation, Sample


def card(given: str = "owner/model", data: str = "rows.jsonl", **more: Any) -> str:
    settings = {"model": given, "data": data, "output_dir": "/srv/out", "rank": 2, "targets": ("q_proj", "v_proj")}
    whole: dict[str, Any] = dict(parameters="trainable params: 1", result=None, seconds=1.0, settings=settings)
    return model_card(base_model=given, data=data, **{**whole, **more})


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("/srv/models/base", "base"),
        ("~/data/rows.jsonl", "rows.jsonl"),
        ("../secret/base", "base"),
        ("here/base", "base"),
        ("a/b/c", "c"),
        ("organisation/model", "organisation/model"),
        ("gpt2", "gpt2"),
        ("no: yaml #1", "no: yaml #1"),
    ],
)
def test_the_card_names_no_place_of_this_machine_alone(
    given: str, shown: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "base").mkdir(parents=True)
    text = card(given, given)
    assert ModelCard(text).data.to_dict()["base_model"] == shown
    assert f"| model | {shown} |" in text and f"| data | {shown} |" in text and f"Data: `{shown}`" in text
    assert given == shown or given not in text
    assert "srv" not in text and "/" not in shown.replace("organisation/model", "")


def test_the_front_matter_is_what_a_hub_page_needs() -> None:
    found = ModelCard(card(data="owner/rows")).data.to_dict()
    assert found == {
        "base_model": "owner/model",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "lorakit"],
        "datasets": ["owner/rows"],
    }
    classifier = ModelCard(card(labels=("no", "yes"))).data.to_dict()
    assert classifier["pipeline_tag"] == "text-classification" and "datasets" not in classifier


def test_a_system_message_is_no_path() -> None:
    text = card(settings={"system": "/be/brief", "targets": ("q_proj", "v_proj"), "alpha": None})
    assert "| system | /be/brief |" in text and "| targets | q_proj,v_proj |" in text and "| alpha | none |" in text


def test_the_card_of_a_repository_says_how_to_load_it_there() -> None:
    samples = (Sample("asked", 'from_pretrained("x")', "adapter", "expected"),)
    result = Evaluation(1, "test", {"exact match": (0.0, 1.0)}, samples, (True,))
    text = hub_card(card("/srv/models/base", result=result, labels=("no", "yes")), "owner/base", "me/adapter")
    assert ModelCard(text).data.to_dict()["base_model"] == "owner/base"
    assert "Base model: `owner/base`" in text and "THIS_FOLDER" not in text
    assert 'AutoModelForSequenceClassification.from_pretrained("owner/base", num_labels=2)' in text
    assert 'lorakit.load(model, snapshot_download("me/adapter"))' in text
    assert 'PeftModel.from_pretrained(model, "me/adapter")' in text
    block = text.split("```python\n")[1].split("```")[0]
    compile(block, "card", "exec")
    assert "from huggingface_hub import snapshot_download" in block


def test_the_card_of_a_classifier_says_what_its_logits_are() -> None:
    """A reader has the folder's card alone: without the problem type, transformers takes one class for each text."""
    one, several = card(labels=("no", "yes")), card(labels=("no", "yes"), multi_label=True)
    assert 'num_labels=2, problem_type="multi_label_classification")' in several and "problem_type" not in one
    assert "classes `no`, `yes`, in this order. Of a text these are all classes whose logit is at least 0." in several
    assert "classes `no`, `yes`, in this order. The largest logit decides." in one
    assert "logits" not in card() + card(labels=())
    assert 'from_pretrained("owner/b", num_labels=2, problem_type=' in hub_card(several, "owner/b", "me/adapter")


def test_a_card_without_front_matter_gets_one() -> None:
    text = hub_card("# Mine\n", "owner/base", "me/adapter")
    assert ModelCard(text).data.to_dict()["base_model"] == "owner/base" and text.endswith("# Mine\n")


@pytest.mark.parametrize(
    ("name", "is_one"),
    [("user/name", True), ("gpt2", True), ("a/b/c", False), ("/a", False), ("./a", False), ("~/a", False), ("", False)],
)
def test_names_that_may_be_at_the_hub(name: str, is_one: bool) -> None:
    assert is_hub_id(name) == is_one
