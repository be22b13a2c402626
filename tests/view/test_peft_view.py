"""`peft_view` and `get_peft_model`, against PEFT's own model of the same configuration and the same factors."""

from __future__ import annotations

import copy
import pickle
import sys
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import lorakit
from in_peft import load_in_peft
from models import bert, gpt2, llama, qwen_moe

# PEFT asks transformers by an old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
IDS = torch.randint(0, 64, (3, 7), generator=torch.Generator().manual_seed(5))
CONFIGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "names": (llama, dict(target_modules=["q_proj", "v_proj"])),
    "regular expression": (llama, dict(target_modules=r".*layers\.1\..*(q|down)_proj")),
    "all-linear": (llama, dict(target_modules="all-linear")),
    "usual targets": (llama, dict(r=4)),
    "without some": (llama, dict(target_modules="all-linear", exclude_modules=["down_proj", "0.self_attn.q_proj"])),
    "one layer": (llama, dict(target_modules=["q_proj", "o_proj"], layers_to_transform=[1])),
    "patterns": (
        llama,
        dict(
            target_modules=["q_proj", "v_proj"],
            r=4,
            rank_pattern={"1.self_attn.q_proj": 2},
            alpha_pattern={"v_proj": 3},
        ),
    ),
    "rslora": (llama, dict(target_modules=["q_proj"], use_rslora=True, lora_alpha=3)),
    "dora": (llama, dict(target_modules=["q_proj", "down_proj"], use_dora=True)),
    "embedding and head": (llama, dict(target_modules=["embed_tokens", "lm_head"])),
    "saved whole": (llama, dict(target_modules=["q_proj"], modules_to_save=["lm_head"])),
    "classifier": (bert, dict(target_modules=["value"], task_type="SEQ_CLS")),
    "Conv1D": (gpt2, dict(target_modules=["c_attn"], fan_in_fan_out=True)),
    "token rows": (
        llama,
        dict(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [3], "lm_head": [5]}),
    ),
    "rows of a tied table": (
        gpt2,
        dict(target_modules=["c_attn"], fan_in_fan_out=True, trainable_token_indices=[3, 5]),
    ),
    "biases": (bert, dict(target_modules=["attention.self.value"], bias="lora_only")),
    "experts": (
        qwen_moe,
        dict(target_modules=["q_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"]),
    ),
}
BY_CONFIG = pytest.mark.parametrize("config", CONFIGS)
TWO = {
    "default": dict(target_modules=["q_proj", "v_proj"], r=4, init_lora_weights=False),
    "de": dict(target_modules=["q_proj", "down_proj"], r=2, lora_alpha=7, init_lora_weights=False),
}


def theirs(make: Any, **config: Any) -> Any:
    return peft.get_peft_model(make(), LoraConfig(**config))


def ours(make: Any, **config: Any) -> Any:
    return lorakit.get_peft_model(make(), LoraConfig(**config))


def with_two() -> tuple[Any, Any]:
    """PEFT's model and a view with the same two adapters."""
    other = theirs(llama, **TWO["default"])
    other.add_adapter("de", LoraConfig(**TWO["de"]))
    view = ours(llama, **TWO["default"])
    view.add_adapter("de", LoraConfig(**TWO["de"]))
    view.load_state_dict(other.state_dict())
    return other.eval(), view.eval()


def logits(model: Any, **more: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, **more).logits


def close(one: Tensor, two: Tensor) -> None:
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


def test_a_view_is_a_peft_model_over_the_model_itself() -> None:
    model = llama()
    lorakit.attach(model, "q_proj", rank=3, alpha=5)
    view = lorakit.peft_view(model)
    assert isinstance(view, peft.PeftModel)
    assert view.get_base_model() is view.base_model.model is model
    assert view.active_adapter == "default" and view.active_adapters == ["default"]
    config = view.peft_config["default"]
    assert (config.r, config.lora_alpha, config.target_modules) == (3, 5, {"q_proj"})
    assert view.config is model.config and view.device == model.device
    names = [name for name, parameter in view.named_parameters() if parameter.requires_grad]
    assert names[0] == "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
    assert view.get_parameter(names[0]) is model.model.layers[0].self_attn.q_proj.lora_A


@BY_CONFIG
def test_a_configuration_gives_the_parameters_that_peft_gives(config: str) -> None:
    make, settings = CONFIGS[config]
    expected, view = theirs(make, **settings), ours(make, **settings)
    stacks = config == "experts"  # lorakit holds a factor for each expert, PEFT all of them in one matrix

    def named(model: Any) -> dict[str, Any]:
        return {
            name: (parameter.numel() if stacks else tuple(parameter.shape), parameter.requires_grad)
            for name, parameter in model.named_parameters()
        }

    assert named(view) == named(expected)
    assert view.get_nb_trainable_parameters() == expected.get_nb_trainable_parameters()
    if not stacks:
        assert {name: tuple(own.shape) for name, own in view.state_dict().items()} == {
            name: tuple(own.shape) for name, own in expected.state_dict().items()
        }


@BY_CONFIG
def test_with_the_same_factors_it_computes_what_peft_computes(config: str, tmp_path: Path) -> None:
    make, settings = CONFIGS[config]
    view = ours(make, **settings)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in view.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    view.eval()
    adapted = logits(view)
    assert (adapted - logits(make())).abs().max() > 1e-3
    view.save_pretrained(tmp_path)
    close(logits(load_in_peft(make(), tmp_path)), adapted)
    with view.disable_adapter():
        assert torch.equal(logits(view), logits(make()))
    assert torch.equal(logits(view), adapted)
    if config != "experts":
        expected = theirs(make, **settings)
        expected.load_state_dict(view.state_dict())
        close(logits(expected.eval()), adapted)


def test_two_adapters_are_chosen_as_in_peft() -> None:
    expected, view = with_two()
    for name in ("de", "default", "de"):
        expected.set_adapter(name)
        view.set_adapter(name)
        close(logits(view), logits(expected))
        assert view.active_adapter == name
        assert {n for n, p in view.named_parameters() if p.requires_grad} == {
            n for n, p in expected.named_parameters() if p.requires_grad
        }
    expected.base_model.set_adapter(["default", "de"])
    view.base_model.set_adapter(["default", "de"])
    close(logits(view), logits(expected))
    expected.delete_adapter("default")
    view.delete_adapter("default")
    assert list(view.peft_config) == list(view.bank) == ["de"]
    close(logits(view), logits(expected))


def test_adapter_names_gives_each_row_its_adapter() -> None:
    expected, view = with_two()
    names = ["de", "__base__", "default"]
    close(logits(view, adapter_names=names), logits(expected, adapter_names=names))
    for own in ({}, {"num_beams": 2}):
        options: dict[str, Any] = dict(max_new_tokens=5, do_sample=False, pad_token_id=0, **own)
        mine = view.generate(input_ids=IDS, adapter_names=names, **options)
        assert torch.equal(mine, expected.generate(input_ids=IDS, adapter_names=names, **options))
        assert not torch.equal(mine, view.generate(input_ids=IDS, **options))
    with view.disable_adapter():
        assert torch.equal(logits(view, adapter_names=names), logits(llama()))
    with pytest.raises(lorakit.LoraError, match="no adapter 'fr'"):
        view(input_ids=IDS, adapter_names=["de", "fr", "de"])


def test_merging_switching_off_and_unloading_are_peft_s() -> None:
    expected, view = with_two()
    base = logits(llama())
    for names in (None, ["de"], ["default", "de"]):
        expected.base_model.set_adapter(names or ["default"])
        expected.merge_adapter()
        view.merge_adapter(names)
        assert view.base_model.merged_adapters == (names or ["default"])
        close(logits(view), logits(expected))
        with view.disable_adapter():
            assert torch.equal(logits(view), base)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT's about layers that had nothing to merge
            expected.unmerge_adapter()
        view.unmerge_adapter()
        assert view.active_adapters == ["default"] and view.base_model.merged_adapters == []
    one_by_one = logits(view)
    view.merge_adapter(["de"])
    view.merge_adapter(["default"])
    both = logits(view)
    view.unmerge_adapter()
    assert torch.equal(logits(view), one_by_one)
    view.base_model.set_adapter(["default", "de"])
    close(logits(view), both)
    view.set_adapter("default")
    view.base_model.disable_adapter_layers()
    assert torch.equal(logits(view), base)
    view.set_adapter("de")
    assert torch.equal(logits(view), base)
    view.base_model.enable_adapter_layers()
    expected.set_adapter("de")
    close(logits(view), logits(expected))
    close(logits(copy.deepcopy(view).merge_and_unload()), logits(expected))
    plain = view.unload()
    assert type(plain) is type(llama()) and not list(view.bank)
    assert torch.equal(logits(plain), base)


def test_adding_or_saving_leaves_a_merged_model_merged(tmp_path: Path) -> None:
    _, view = with_two()
    view.merge_adapter()
    merged = logits(view)
    view.save_pretrained(tmp_path)
    view.add_adapter("new", LoraConfig(**TWO["de"]))
    view.delete_adapter("de")
    assert view.base_model.merged_adapters == ["default"] and torch.equal(logits(view), merged)
    with pytest.raises(lorakit.LoraError, match="is merged into the model"):
        view.delete_adapter("default")
    with pytest.raises(lorakit.LoraError, match="merged adapters"):
        view(input_ids=IDS, adapter_names=["new"] * 3)


def test_safe_merge_refuses_what_is_not_finite_and_leaves_the_model_unmerged() -> None:
    view = ours(llama, **TWO["default"])
    with torch.no_grad():
        view.get_base_model().model.layers[0].self_attn.q_proj.lora_A[0, 0] = torch.nan
    with pytest.raises(lorakit.LoraError, match="not finite"):
        view.merge_adapter(safe_merge=True)
    assert view.base_model.merged_adapters == []


def test_folders_are_laid_out_as_peft_lays_them_out(tmp_path: Path) -> None:
    expected, view = with_two()
    expected.save_pretrained(tmp_path / "peft")
    view.save_pretrained(tmp_path / "view")

    def files(name: str) -> list[str]:
        return sorted(path.relative_to(tmp_path / name).as_posix() for path in (tmp_path / name).rglob("*.*"))

    assert files("view") == files("peft")
    read = load_in_peft(llama(), tmp_path / "view")
    read.load_adapter(tmp_path / "view/de", "de")
    for name in ("default", "de"):
        read.set_adapter(name)
        expected.set_adapter(name)
        close(logits(read), logits(expected))
    view.save_pretrained(tmp_path / "one", selected_adapters=["de"])
    assert [path.name for path in sorted((tmp_path / "one").iterdir())] == ["README.md", "de"]
    with pytest.raises(ValueError, match="selected_adapters"):
        view.save_pretrained(tmp_path / "none", selected_adapters=["fr"])
    view.save_pretrained(tmp_path / "none", is_main_process=False)
    assert not (tmp_path / "none").exists()


def test_loading_fills_the_parameters_that_there_are(tmp_path: Path) -> None:
    expected, view = with_two()
    expected.save_pretrained(tmp_path)
    fresh = ours(llama, **TWO["default"])
    before = dict(fresh.named_parameters())
    fresh.load_adapter(tmp_path, "default", is_trainable=True)
    fresh.load_adapter(tmp_path / "de", "de")
    assert all(parameter is before[name] for name, parameter in fresh.named_parameters() if name in before)
    assert fresh.active_adapter == "default"
    close(logits(fresh.eval()), logits(view))
    fresh.set_adapter("de", inference_mode=True)
    assert not any(parameter.requires_grad for parameter in fresh.parameters())
    view.set_adapter("de")
    close(logits(fresh), logits(view))
    fresh.load_adapter(tmp_path, "de")  # of another rank and other targets: it takes the place of the old one
    view.set_adapter("default")
    close(logits(fresh), logits(view))
    with pytest.raises(FileNotFoundError, match="no such adapter folder"):
        fresh.load_adapter(tmp_path / "nothing", "fr")


def test_from_pretrained_makes_a_view(tmp_path: Path) -> None:
    expected, _ = with_two()
    expected.save_pretrained(tmp_path)
    view = type(ours(llama, r=2)).from_pretrained(llama(), tmp_path, is_trainable=True)
    close(logits(view.eval()), logits(expected))
    assert view.get_nb_trainable_parameters()[0] > 0


def test_peft_s_own_functions_find_the_adapter() -> None:
    expected, view = with_two()
    for name in ("default", "de"):
        wanted = peft.get_peft_model_state_dict(expected, adapter_name=name)
        found = peft.get_peft_model_state_dict(view, adapter_name=name)
        assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)
        doubled = {key: 2 * value for key, value in wanted.items()}
        for model in (expected, view):
            peft.set_peft_model_state_dict(model, doubled, adapter_name=name)
            model.set_adapter(name)
        close(logits(view), logits(expected))
    status, wanted_status = view.get_model_status(), expected.get_model_status()
    for own in ("base_model_type", "peft_types", "trainable_params", "total_params", "num_adapter_layers", "enabled"):
        assert getattr(status, own) == getattr(wanted_status, own)
    for own in ("active_adapters", "merged_adapters", "requires_grad", "available_adapters"):
        assert getattr(status, own) == getattr(wanted_status, own)
    with view.disable_adapter():
        assert view.get_model_status().enabled is False


def test_the_trainer_decays_what_it_decays_with_peft(tmp_path: Path) -> None:
    settings = dict(target_modules=["query"], task_type="SEQ_CLS", bias="lora_only")

    def decayed(model: Any) -> list[list[str]]:
        arguments = TrainingArguments(output_dir=str(tmp_path), weight_decay=0.1, use_cpu=True, report_to="none")
        optimizer = Trainer(model=model, args=arguments).create_optimizer()
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        return [sorted(names[id(own)] for own in group["params"]) for group in optimizer.param_groups]

    expected = decayed(theirs(bert, **settings))
    assert expected[0] and expected[1]
    assert decayed(ours(bert, **settings)) == expected


def test_modules_of_an_adapter_that_is_not_active_are_found_too() -> None:
    """TRL sets the dropout of every module to 0, and computes the reference with an adapter that is not active."""
    view = ours(llama, target_modules=["q_proj"], lora_dropout=0.5, init_lora_weights=False).train()
    view.add_adapter("ref", LoraConfig(target_modules=["q_proj"], lora_dropout=0.5, init_lora_weights=False))
    for module in view.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0
    for name in ("ref", "default"):
        view.set_adapter(name)
        assert torch.equal(logits(view), logits(view))


def test_an_adapter_copied_by_names_is_the_same_adapter() -> None:
    """TRL copies "default" into "ref" so, also what is trained whole, while "ref" is off the model."""
    settings = dict(target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head"], use_dora=True)
    view = ours(llama, **settings).eval()
    with torch.no_grad():
        for parameter in view.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2)
    adapted = logits(view)
    view.add_adapter("ref", LoraConfig(**settings))
    for name, parameter in view.named_parameters():
        if ".default." in name or name.endswith(".default"):
            view.get_parameter(name.replace(".default", ".ref")).data.copy_(parameter.data)
    for name in ("ref", "default", "ref"):
        view.set_adapter(name)
        assert torch.equal(logits(view), adapted)
    with view.disable_adapter():
        assert torch.equal(logits(view), logits(llama()))


def test_a_copy_is_a_view_of_its_own() -> None:
    _, view = with_two()
    twin = copy.deepcopy(view)
    before = logits(view)
    assert torch.equal(logits(twin), before)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1.0)
    assert torch.equal(logits(view), before)
    twin.set_adapter("de")
    assert view.active_adapter == "default"
    assert torch.equal(logits(pickle.loads(pickle.dumps(view))), before)


def test_without_any_adapter_it_is_the_base_model(tmp_path: Path) -> None:
    view = ours(llama, **TWO["default"]).eval()
    view.delete_adapter("default")
    assert view.active_adapter == [] and not view.peft_config
    assert torch.equal(logits(view), logits(llama()))
    with pytest.raises(lorakit.LoraError, match="has no adapter"):
        view.save_pretrained(tmp_path)
    with pytest.raises(lorakit.LoraError, match="no adapter to merge"):
        view.merge_adapter()
    view.add_adapter("new", LoraConfig(**TWO["de"]))
    view.set_adapter("new")
    assert not torch.equal(logits(view), logits(llama()))


def test_a_view_of_a_bank_has_all_its_adapters() -> None:
    model = llama()
    bank = lorakit.Bank(model)
    bank["fr"] = lorakit.LoRASettings("q_proj", rank=2)
    bank["de"] = lorakit.LoRASettings("all-linear", rank=4)
    bank.use("de")
    view = lorakit.peft_view(bank)
    assert list(view.peft_config) == ["fr", "de"] and view.active_adapter == "de"
    trained = {name for name, parameter in view.named_parameters() if parameter.requires_grad}
    assert trained and all(".de." in name for name in trained)
    view.set_adapter("fr")
    assert bank.used == "fr" and len(bank.parameters("fr")) == 4


def test_weighted_sums_are_exact_or_the_nearest_of_their_rank() -> None:
    _, view = with_two()
    view.add_weighted_adapter(["default", "de"], [0.5, -2.0], "sum", combination_type="cat")
    view.add_weighted_adapter(["default", "de"], [0.5, -2.0], "near", svd_rank=3)
    base, near = llama(), llama()
    adapters = {name: view.bank[name] for name in ("default", "de")}
    for name, layer in base.named_modules():
        parts = [
            weight * own.updates[name].scale * own.updates[name].B.double() @ own.updates[name].A.double()
            for own, weight in zip(adapters.values(), (0.5, -2.0), strict=True)
            if name in own.updates
        ]
        if parts:
            U, S, Vh = torch.linalg.svd(sum(parts), full_matrices=False)
            layer.weight.data += sum(parts).float()
            near.get_submodule(name).weight.data += (U[:, :3] * S[:3] @ Vh[:3]).float()
    for name, expected in (("sum", base), ("near", near)):
        view.set_adapter(name)
        close(logits(view), logits(expected))
    assert (logits(near) - logits(base)).abs().max() > 1e-3
    assert view.peft_config["near"].r == 3 and max(own.rank for own in view.bank["sum"].updates.values()) == 6
    with pytest.raises(lorakit.LoraError, match="mix the factors"):
        view.add_weighted_adapter(["default", "de"], [1.0, 1.0], "other", combination_type="linear")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "lora_bias": (dict(lora_bias=True), "B has a bias of its own"),
    "layer_replication": (dict(layer_replication=[[0, 1]]), "layers are used several times"),
    "trainable_token_indices": (dict(trainable_token_indices=[1, 64]), "row 64 of 'model.embed_tokens'"),
    "init": (dict(init_lora_weights="eva"), "lorakit.add_init"),
    "velora": (dict(velora_config=peft.VeloraConfig(num_groups=2)), "VeLoRA"),
    "tied": (dict(ensure_weight_tying=True), "tied"),
    "no target": (dict(target_modules=["q_prj"]), "match nothing in LlamaForCausalLM"),
    "no module": (dict(modules_to_save=["heads"]), "'heads' matches no module"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_lorakit_does_not_compute_is_refused_by_name_and_changes_nothing(case: str) -> None:
    settings, message = REFUSED[case]
    model = llama()
    before = {name: type(module) for name, module in model.named_modules()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own about its settings
        config = LoraConfig(**{"target_modules": ["q_proj"], **settings})
    with pytest.raises(lorakit.LoraError, match=message):
        lorakit.get_peft_model(model, config)
    assert {name: type(module) for name, module in model.named_modules()} == before


def test_other_methods_than_lora_and_mixed_models_are_refused() -> None:
    with pytest.raises(lorakit.LoraError, match="IA3Config: lorakit makes LoRA adapters"):
        lorakit.get_peft_model(llama(), peft.IA3Config(target_modules=["q_proj"]))
    with pytest.raises(lorakit.LoraError, match="mixed=True"):
        lorakit.get_peft_model(llama(), LoraConfig(), mixed=True)
    view = ours(llama, target_modules=["q_proj"])
    with pytest.raises(lorakit.LoraError, match="safe_serialization"):
        view.save_pretrained("nowhere", safe_serialization=False)
    with pytest.raises(lorakit.LoraError, match="aLoRA"):
        view(input_ids=IDS, alora_offsets=[1, 2, 3])
    layer = next(module for module in view.modules() if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer))
    with pytest.raises(lorakit.LoraError, match="method of the whole model"):
        layer.set_adapter("default")


def test_lorakit_s_own_functions_take_a_view_for_its_model(tmp_path: Path) -> None:
    _, view = with_two()
    model = view.get_base_model()
    assert list(lorakit.adapted_layers(view)) == list(lorakit.adapted_layers(model))
    lorakit.save(view, tmp_path / "view")
    lorakit.save(model, tmp_path / "model")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "view" / name).read_bytes() == (tmp_path / "model" / name).read_bytes()
    with lorakit.disabled(view):
        assert torch.equal(logits(view), logits(llama()))
    assert lorakit.Bank(view).model is model
    lorakit.merge(view)
    assert view.base_model.merged_adapters == ["default"]
    with pytest.raises(lorakit.LoraError, match="is a view already"):
        lorakit.peft_view(view)


def test_a_model_without_adapter_has_no_view() -> None:
    with pytest.raises(lorakit.LoraError, match="LlamaForCausalLM has no adapter to view"):
        lorakit.peft_view(llama())
    bank = lorakit.Bank(llama(), rank=4, room=2)
    bank["fr"] = lorakit.LoRASettings("q_proj", rank=2)
    with pytest.raises(lorakit.LoraError, match="a bank with rank and room"):
        lorakit.peft_view(bank)


def test_without_peft_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.delitem(sys.modules, "lorakit.view.model", raising=False)
    model = llama()
    lorakit.attach(model, "q_proj")
    with pytest.raises(lorakit.LoraError, match="pip install peft"):
        lorakit.peft_view(model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [True, False])
def test_the_factors_dtype_is_the_one_that_peft_chooses(dtype: torch.dtype, autocast: bool) -> None:
    config = LoraConfig(target_modules=["q_proj"])
    expected = peft.get_peft_model(llama().to(dtype), config, autocast_adapter_dtype=autocast)
    view = lorakit.get_peft_model(llama().to(dtype), config, autocast_adapter_dtype=autocast)
    assert {n: p.dtype for n, p in view.named_parameters()} == {n: p.dtype for n, p in expected.named_parameters()}
