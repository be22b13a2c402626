"""adapter_config.json: each field is used or refused by name, and its type is checked."""

import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import lorakit
from folders import CONFIG, folder, made_in_peft, small
from lorakit.formats.peft_config import FIELDS, read_config

ROOT = Path(__file__).parents[2]


def test_every_field_of_pefts_configuration_has_a_rule() -> None:
    """A field that a new version of PEFT adds fails here until somebody decides what it does to the function."""
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert sorted(fields - FIELDS.keys()) == []
    assert sorted(FIELDS.keys() - fields) == ["enable_lora", "merge_weights"]  # of PEFT before 0.3


def test_the_page_shows_the_rules() -> None:
    spec = importlib.util.spec_from_file_location("fields", ROOT / "docs" / "fields.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.main(["--check"]) == 0, "run python docs/fields.py"


def test_what_peft_writes_by_itself_is_read(tmp_path: Path) -> None:
    """PEFT writes every field, also those with the default."""
    made_in_peft(small(), tmp_path, r=2, target_modules=["0"])
    assert set(json.loads((tmp_path / CONFIG).read_text())) >= FIELDS.keys() - {
        *("runtime_config", "enable_lora", "merge_weights")
    }
    config = read_config(tmp_path)
    assert (config.r, config.lora_alpha, config.target_modules) == (2, 8.0, ("0",))
    assert config.peft_version == peft.__version__ and config.by_peft


OTHER_FUNCTIONS: dict[str, Any] = {
    "alora_invocation_tokens": [5, 6],
    "use_qalora": True,
    "lora_bias": True,
    "arrow_config": {"top_k": 2},
    "layer_replication": [[0, 1], [0, 1]],
    "megatron_config": {"tensor_model_parallel_size": 2},
    "use_bdlora": {"nblocks": 2},
    "monteclora_config": {"num_samples": 4},
    "kasa_config": {"beta": 1e-4},
    "enable_lora": [True, False, True],
    "a_field_of_next_year": {"mode": "other"},
    "another_one": "on",
    "and_a_number": 3,
    "or_zero": 0,
}


def test_the_fields_refused_here_are_all_that_the_table_refuses() -> None:
    assert {name for name, rule in FIELDS.items() if rule.verdict == "refused"} <= OTHER_FUNCTIONS.keys()


@pytest.mark.parametrize("field", OTHER_FUNCTIONS)
def test_a_field_that_makes_another_function_is_refused_by_name(field: str, tmp_path: Path) -> None:
    path, before = folder(tmp_path, **{field: OTHER_FUNCTIONS[field]}), str(small())
    model = small()
    with pytest.raises(ValueError, match=rf"adapter_config.json: {field}="):
        lorakit.load(model, path)
    assert str(model) == before
    settings: list[Any] = [None, False, [], "", *([] if field.endswith("_config") else [{}])]
    for nothing in settings:
        lorakit.load(small(), folder(tmp_path, **{field: nothing}))


@pytest.mark.parametrize(
    "fields",
    [
        dict(inference_mode=False, revision="main", auto_mapping={"base_model_class": "X", "unsloth_fixed": True}),
        dict(exclude_modules=["lm_head"], layers_to_transform=[0], layers_pattern="layers"),
        dict(eva_config={"rho": 2.0}, init_lora_weights="eva"),
        dict(megatron_core="megatron.core", qalora_group_size=16, loftq_config={"loftq_bits": 4}, merge_weights=True),
        dict(corda_config={}, lora_ga_config={"direction": "ArBr"}, velora_config={"num_groups": 2}),
        dict(bias=None, lora_dropout=None, rank_pattern=None, alpha_pattern=None, target_modules=None),
        dict(target_modules="all-linear"),
        dict(target_modules=r".*\.?(0|2)$"),
        dict(lora_alpha=8.0, peft_type="lora", use_dora=None, modules_to_save=[]),
    ],
)
def test_fields_without_effect_and_nulls_are_read(fields: dict, tmp_path: Path) -> None:
    wanted, model, x = small(), small(), torch.randn(3, 8)
    lorakit.load(wanted, folder(tmp_path / "plain"))
    lorakit.load(model, folder(tmp_path / "more", **fields))
    assert torch.equal(model(x), wanted(x))


WRONG: dict[str, list[Any]] = {
    "r": [None, 0, -1, "4", 4.0, 2.5, True, [], {}],
    "lora_alpha": [None, 0, "8", float("nan"), float("inf"), True, [8], 10**400],
    "lora_dropout": [1, -0.1, "0.1", True, [], float("nan")],
    "rank_pattern": [[], "x", 3, {"0": 0}, {"0": "4"}, {"0": None}, {"([": 4}, {"(" * 2000: 4}],
    "alpha_pattern": [[1], {"0": 0}, {"0": None}, {"*": 4}, {"x{99999999999999999}": 1.0}],
    "use_rslora": ["true", 1, []],
    "use_dora": ["no", 0.5, {}],
    "fan_in_fan_out": ["false"],
    "bias": ["some", True, 3, ["all"]],
    "modules_to_save": ["head", {"head": 1}, [1], [None], [""]],
    "target_modules": [{"0": 1}, [0], 3],
    "target_parameters": ["experts", [[]]],
    "init_lora_weights": [3, [], {}, "from next year"],
    "base_model_name_or_path": [3, ["gpt2"]],
    "task_type": [True, 1.5],
    "peft_version": [0.19],
    "peft_type": ["PREFIX_TUNING", None, 3, []],
}


@pytest.mark.parametrize(("field", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_a_value_of_another_type_or_out_of_range_is_named(field: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"adapter_config.json: {field}"):
        lorakit.load(small(), folder(tmp_path, **{field: value}))


@pytest.mark.parametrize("field", ["r", "lora_alpha", "peft_type"])
def test_a_field_that_must_be_there_is_named(field: str, tmp_path: Path) -> None:
    path = folder(tmp_path) / CONFIG
    values = json.loads(path.read_text())
    del values[field]
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=rf"adapter_config.json: {field} is (missing|None)"):
        lorakit.load(small(), tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "adapter_config.json:1: not JSON: the file is empty"),
        (b"[]", r"adapter_config.json: expected an object \{…\}, found a list"),
        (b"null", "adapter_config.json: expected .*, found null"),
        (b'"LORA"', "adapter_config.json: expected .*, found text"),
        (b"\xff\xfe{\x00}\x00", "adapter_config.json:1: the file is UTF-16"),
        (b"[" * 200_000, "adapter_config.json: not JSON that can be read"),
        (b'{"r": ' + b"9" * 5000 + b"}", "adapter_config.json: not JSON that can be read: Exceeds the limit"),
        (b'{"peft_type": "LORA",\n "r": 4, "r": 8}', "adapter_config.json: 'r' stands in it twice"),
        (b"{\n\n'r': 4}", "adapter_config.json:3: not JSON"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "adapter_config.json is a git-lfs pointer"),
        (b'{"fine_tune_type": "lora", "lora_parameters": {"rank": 8}}', "adapter_config.json is of .* mlx-lm's format"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_a_file_that_is_no_configuration_is_named(text: bytes, message: str, tmp_path: Path) -> None:
    (folder(tmp_path) / CONFIG).write_bytes(text)
    with pytest.raises(ValueError, match=message):
        lorakit.load(small(), tmp_path)


def test_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    path = folder(tmp_path) / CONFIG
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    lorakit.load(small(), tmp_path)


@pytest.mark.parametrize("name", ["kasa_config", "monteclora_config", "arrow_config", "megatron_config", "next_config"])
def test_an_empty_configuration_switches_on_and_is_refused(name: str, tmp_path: Path) -> None:
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q"], name: {}}
    (tmp_path / CONFIG).write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"adapter_config.json: {name}=\{{\}}"):
        read_config(tmp_path)
    (tmp_path / CONFIG).write_text(json.dumps({**config, name: None}))
    assert read_config(tmp_path).r == 4
