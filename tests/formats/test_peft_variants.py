"""PEFT's variants of plain LoRA: each is read as PEFT reads it, or refused with the reason."""

import json
import warnings
from pathlib import Path

import peft
import pytest
import safetensors.torch
import torch
from torch import nn

import lorakit
import models
from folders import CONFIG, TENSORS, factors, folder, made_in_peft, read_in_peft, small
from models import train_a_little

TOKENS = torch.arange(14).view(2, 7)


# --- updates that count from a changed base weight -----------------------------------------------------------------


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("make", [models.llama, models.gpt2])
@pytest.mark.parametrize(
    "settings",
    [
        dict(lora_alpha=2),
        dict(lora_alpha=7, use_rslora=True),
        dict(lora_alpha=5, rank_pattern={"layers.1.*": 3, "h.1.*": 3}, alpha_pattern={"layers.0.*": 9, "h.0.*": 9}),
    ],
)
def test_a_residual_is_computed_from_the_base_model(init: str, make, settings: dict, tmp_path: Path) -> None:
    targets = ["q_proj", "down_proj"] if make is models.llama else ["c_attn"]
    if init == "olora" and make is models.gpt2:
        targets = ["attn.c_proj"]  # PEFT decomposes the matrix as it is stored, so only square ones work
    settings |= dict(r=2, target_modules=targets, init_lora_weights=init, fan_in_fan_out=make is models.gpt2)
    live = made_in_peft(make(), tmp_path / "theirs", 0.05, **settings)
    expected = live(TOKENS).logits.detach()
    torch.testing.assert_close(read_in_peft(make(), tmp_path / "theirs")(TOKENS).logits, expected)
    model = make()
    lorakit.load(model, tmp_path / "theirs")
    torch.testing.assert_close(model(TOKENS).logits, expected, atol=3e-5, rtol=1e-4)
    # When it is saved again, it is relative to the base model, and every reader computes the same.
    lorakit.save(model, tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / CONFIG).read_text())["init_lora_weights"] is True
    torch.testing.assert_close(read_in_peft(make(), tmp_path / "ours")(TOKENS).logits, expected, atol=3e-5, rtol=1e-4)
    lorakit.load(model, tmp_path / "theirs")  # into a model that is already adapted
    torch.testing.assert_close(model(TOKENS).logits, expected, atol=3e-5, rtol=1e-4)
    lorakit.merge(model)
    lorakit.load(model, tmp_path / "theirs")  # a merged weight is not the base's
    torch.testing.assert_close(model(TOKENS).logits, expected, atol=3e-5, rtol=1e-4)


def test_what_peft_converted_counts_from_the_base_model(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        live = peft.get_peft_model(
            small(), peft.LoraConfig(r=2, lora_alpha=3, target_modules=["0"], init_lora_weights="pissa")
        ).eval()
        live.save_pretrained(str(tmp_path / "start"))
        config = json.loads((tmp_path / "start" / CONFIG).read_text())
        (tmp_path / "start" / CONFIG).write_text(json.dumps({**config, "init_lora_weights": True}))
        train_a_little(live)
        live.save_pretrained(
            str(tmp_path / "converted"), path_initial_model_for_weight_conversion=str(tmp_path / "start")
        )
    model, x = small(), torch.randn(3, 8)
    lorakit.load(model, tmp_path / "converted")
    torch.testing.assert_close(model(x), live(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("init", ["pissa_niter_4", "corda", "loftq", "lora_ga", "CorDA", "a_new_one"])
def test_a_changed_base_that_cannot_be_computed_is_refused(init: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"init_lora_weights='{init}'.*path_initial_model_for_weight_conversion"):
        lorakit.load(small(), folder(tmp_path, init_lora_weights=init))


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal", "mica", None])
def test_an_init_that_leaves_the_base_alone_is_read(init: object, tmp_path: Path) -> None:
    wanted, model, x = small(), small(), torch.randn(3, 8)
    lorakit.load(wanted, folder(tmp_path / "plain"))
    lorakit.load(model, folder(tmp_path / "init", init_lora_weights=init))
    assert torch.equal(model(x), wanted(x))


def test_without_a_model_a_residual_is_refused(tmp_path: Path) -> None:
    from lorakit.formats import peft as peft_format

    with pytest.raises(ValueError, match="init_lora_weights='pissa' counts from a part of the base weights"):
        peft_format.read(folder(tmp_path, init_lora_weights="pissa"))


# --- modules trained whole -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names", [["lm_head", "norm"], ["norm"], ["layernorm"], ["embed_tokens"], ["model.norm", "lm_head"], ["mlp"]]
)
@pytest.mark.parametrize("bias", ["none", "all"])
def test_modules_to_save_read_and_written_again_are_the_same_in_peft(names, bias: str, tmp_path: Path) -> None:
    """PEFT compares the ends of names as texts: "norm" is every layer's input_layernorm too."""
    settings = dict(r=2, target_modules=["q_proj"], modules_to_save=names, bias=bias)
    live = made_in_peft(models.llama(), tmp_path / "theirs", **settings)
    expected = live(TOKENS).logits.detach()
    model = models.llama()
    lorakit.load(model, tmp_path / "theirs")
    torch.testing.assert_close(model(TOKENS).logits, expected)
    lorakit.save(model, tmp_path / "ours")
    torch.testing.assert_close(read_in_peft(models.llama(), tmp_path / "ours")(TOKENS).logits, expected)
    again = models.llama()
    lorakit.load(again, tmp_path / "ours")
    torch.testing.assert_close(again(TOKENS).logits, expected)
    ours, theirs = (safetensors.torch.load_file(tmp_path / name / TENSORS) for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()


def test_what_is_trained_whole_is_trained_on_after_loading(tmp_path: Path) -> None:
    made_in_peft(models.llama(), tmp_path, r=2, target_modules=["q_proj"], modules_to_save=["norm"])
    model = models.llama()
    adapter = lorakit.load(model, tmp_path)
    assert set(adapter.also_train) == {name for name, _ in model.named_modules() if name.endswith("norm")}
    trainable = models.trainable_names(model)
    assert {f"{name}.weight" for name in adapter.also_train} <= trainable
    assert all("lora_" in name or "norm" in name for name in trainable)


def tied_llama() -> nn.Module:
    model = models.llama(num_hidden_layers=1, tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    return model


@pytest.mark.parametrize("names", [["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head"]])
def test_of_two_tied_modules_the_one_that_is_trained_whole_gets_a_weight_of_its_own(names, tmp_path: Path) -> None:
    """As in PEFT, where it is a copy; and detach ties them again."""
    settings = dict(r=2, target_modules=["q_proj"], modules_to_save=names, task_type="CAUSAL_LM")
    expected = made_in_peft(tied_llama(), tmp_path / "theirs", **settings)(TOKENS).logits.detach()
    model = tied_llama()
    before = model(TOKENS).logits.detach()
    lorakit.load(model, tmp_path / "theirs")
    torch.testing.assert_close(model(TOKENS).logits, expected)
    lorakit.save(model, tmp_path / "ours")
    torch.testing.assert_close(read_in_peft(tied_llama(), tmp_path / "ours")(TOKENS).logits, expected)
    again = tied_llama()
    lorakit.load(again, tmp_path / "ours")
    torch.testing.assert_close(again(TOKENS).logits, expected)
    lorakit.detach(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    torch.testing.assert_close(model(TOKENS).logits, before)


@pytest.mark.parametrize("names", [["lm_head"], ["model.embed_tokens"], ["lm_head", "model.embed_tokens"]])
def test_values_that_would_tear_tied_modules_apart_are_refused_until_they_are_untied(names, tmp_path: Path) -> None:
    """Weights that no list names are loaded into the base model, as a resized embedding's are."""
    tables = {f"base_model.model.{name}.weight": torch.randn(64, 32) for name in names}
    path = folder(tmp_path, factors("model.layers.0.self_attn.q_proj", 32, 32) | tables, target_modules=["q_proj"])
    model = tied_llama()
    before = model(TOKENS).logits.detach()
    with pytest.raises(ValueError, match="in the model it is tied to .*Untie it first: (.|\n)*get_submodule") as error:
        lorakit.load(model, path)
    assert torch.equal(model(TOKENS).logits, before)
    exec(str(error.value).partition("Untie it first: ")[2].splitlines()[0], {"model": model, "torch": torch})
    lorakit.load(model, path)
    for key, table in tables.items():
        assert torch.equal(model.get_parameter(key.removeprefix("base_model.model.")), table)


@pytest.mark.parametrize("settings", [dict(modules_to_save=["embed_tokens"]), dict(target_modules=["embed_tokens"])])
def test_names_that_peft_tied_are_read_into_what_is_tied(settings: dict, tmp_path: Path) -> None:
    """ensure_weight_tying: both names are in the file, with one value."""
    settings = dict(r=2, target_modules=["q_proj"], ensure_weight_tying=True, task_type="CAUSAL_LM") | settings
    live = made_in_peft(tied_llama(), tmp_path, **settings)
    model = tied_llama()
    lorakit.load(model, tmp_path)
    torch.testing.assert_close(model(TOKENS).logits, live(TOKENS).logits, atol=1e-5, rtol=1e-5)
    lorakit.save(model, tmp_path / "ours")
    again = read_in_peft(tied_llama(), tmp_path / "ours")(TOKENS).logits
    torch.testing.assert_close(again, live(TOKENS).logits, atol=1e-5, rtol=1e-5)


class NamedLikeLora(nn.Module):
    """Modules whose names look like an adapter's, beside one that is adapted."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.body = nn.Linear(8, 8)
        self.add_module(name, nn.Sequential(nn.Linear(8, 4), nn.LayerNorm(4)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.get_submodule(self.name)(torch.tanh(self.body(x)))


@pytest.mark.parametrize("name", ["lora_head", "lora_down", "lora_A_head", "xlora_", "lora_B2", "lora_"])
@pytest.mark.parametrize("file", ["adapter", "adapter.pt"])
def test_a_head_whose_name_begins_like_an_adapters_is_restored(name: str, file: str, tmp_path: Path) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return NamedLikeLora(name)

    model, x = make(), torch.randn(3, 8)
    lorakit.attach(model, "body", rank=2, alpha=4, also_train=[name])
    train_a_little(model)
    lorakit.save(model, tmp_path / file)
    again = make()
    adapter = lorakit.load(again, tmp_path / file, alpha=4)
    torch.testing.assert_close(again(x), model(x), atol=0, rtol=0)
    if file == "adapter":
        assert adapter.also_train == (name,)
        torch.testing.assert_close(read_in_peft(make(), tmp_path / file)(x), model(x))
    assert models.trainable_names(again) == models.trainable_names(model)


def test_the_base_weights_of_an_adapted_embedding_travel_with_it(tmp_path: Path) -> None:
    """PEFT saves the whole table of an embedding that it adapts, which may have rows that the base model lacks."""
    live = made_in_peft(models.llama(), tmp_path / "theirs", r=2, target_modules=["embed_tokens"])
    path = tmp_path / "theirs" / TENSORS
    tensors = safetensors.torch.load_file(path)
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    tensors[key] = tensors[key] + 1
    safetensors.torch.save_file(tensors, path)
    expected = read_in_peft(models.llama(), tmp_path / "theirs")(TOKENS).logits.detach()
    assert not torch.allclose(expected, live(TOKENS).logits)
    model = models.llama()
    plain = model(TOKENS).logits.detach()
    lorakit.load(model, tmp_path / "theirs")
    torch.testing.assert_close(model(TOKENS).logits, expected)
    assert not model.model.embed_tokens.weight.requires_grad
    lorakit.save(model, tmp_path / "ours")
    torch.testing.assert_close(read_in_peft(models.llama(), tmp_path / "ours")(TOKENS).logits, expected)
    lorakit.detach(model)
    torch.testing.assert_close(model(TOKENS).logits, plain)


# --- DoRA ----------------------------------------------------------------------------------------------------------


def test_magnitudes_must_agree_with_the_configuration(tmp_path: Path) -> None:
    """PEFT drops magnitudes that its configuration does not mention, and initialises missing ones."""
    magnitude = {"base_model.model.0.lora_magnitude_vector": torch.ones(8)}
    with pytest.raises(ValueError, match="0 has a magnitude, and adapter_config.json says use_dora=False"):
        lorakit.load(small(), folder(tmp_path / "more", factors() | magnitude))
    with pytest.raises(ValueError, match="0 has no magnitude, and adapter_config.json says use_dora=True"):
        lorakit.load(small(), folder(tmp_path / "less", use_dora=True))


# (channels, outputs, groups, rank of the file): ordinary groups, depthwise, depthwise with several outputs
GROUPED = [(4, 6, 2, 4), (6, 6, 3, 6), (4, 4, 4, 4), (4, 4, 4, 8), (4, 8, 4, 4)]


def grouped(channels: int, outputs: int, groups: int, own: bool, used: bool) -> dict[str, torch.Tensor]:
    """An A whose rows read only the channels of their own group (or all channels), and a B that is used (or zero)."""
    generator = torch.Generator().manual_seed(2)
    rank = next(r for c, o, g, r in GROUPED if (c, o, g) == (channels, outputs, groups))
    A = torch.randn(rank, channels, 3, 3, generator=generator)
    if own:
        kept = torch.zeros(groups, rank // groups, groups, channels // groups, 1, 1)
        for group in range(groups):
            kept[group, :, group] = 1
        A = A * kept.view(rank, channels, 1, 1)
    B = torch.randn(outputs, rank // groups, 1, 1, generator=generator) * used
    return {"base_model.model.0.lora_A.weight": A, "base_model.model.0.lora_B.weight": B}


@pytest.mark.parametrize(("channels", "outputs", "groups", "rank"), [GROUPED[i] for i in (0, 1, 2, 4)])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize(("own", "used"), [(True, True), (True, False), (False, False), (False, True)])
def test_grouped_convolutions_are_read_where_they_are_updates_of_the_kernel(
    channels: int, outputs: int, groups: int, rank: int, dora: bool, own: bool, used: bool, tmp_path: Path
) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(channels, outputs, 3, groups=groups)).eval()

    tensors = grouped(channels, outputs, groups, own, used)
    if dora:
        tensors["base_model.model.0.lora_magnitude_vector"] = torch.rand(1, outputs, 1, 1) + 0.5
    path = folder(tmp_path, tensors, r=rank, use_dora=dora)
    if used and not own:
        with pytest.raises(ValueError, match="adapter_model.safetensors: 0: .*reads channels of other groups"):
            lorakit.load(make(), path)
        return
    if dora and used and outputs != groups:
        with pytest.raises(ValueError, match="PEFT's DoRA of a convolution with .* another matrix"):
            lorakit.load(make(), path)
        return
    model, x = make(), torch.randn(2, channels, 6, 6)
    lorakit.load(model, path)
    torch.testing.assert_close(model(x), read_in_peft(make(), path)(x), atol=1e-5, rtol=1e-5)
    lorakit.save(model, tmp_path / "ours")
    torch.testing.assert_close(read_in_peft(make(), tmp_path / "ours")(x), model(x), atol=1e-5, rtol=1e-5)
    before = model(x).detach()
    lorakit.merge(model)
    torch.testing.assert_close(model(x), before, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("names", [["2"], ["2", "classifier"]])
def test_a_module_trained_whole_whose_tensors_are_missing_is_an_error(names: list[str], tmp_path: Path) -> None:
    """PEFT's classifiers list names that the model may lack ("score"); what it has must be in the file."""
    with pytest.raises(ValueError, match=r"it has no tensor of 2, which modules_to_save='2' names"):
        lorakit.load(small(), folder(tmp_path / "without", modules_to_save=names))
    head = {"base_model.model.2.weight": torch.ones(4, 8), "base_model.model.2.bias": torch.ones(4)}
    model = small()
    lorakit.load(model, folder(tmp_path / "with", factors() | head, modules_to_save=names))
    assert torch.equal(model[2].weight, torch.ones(4, 8))


def test_a_folder_of_adapters_names_them(tmp_path: Path) -> None:
    """PEFT saves an adapter of another name than "default" into a folder of that name."""
    for name in ("fr", "de"):
        folder(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"it has no adapter_config.json. Adapters are in it: .*de, .*fr\."):
        lorakit.load(small(), tmp_path)


class WithStatistics(nn.Module):
    """A head that counts what it sees, trained whole; and a BatchNorm of the base, which is not."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)
        self.head = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(torch.tanh(self.body(x))))


def with_statistics() -> nn.Module:
    torch.manual_seed(0)
    return WithStatistics().eval()


@pytest.mark.parametrize("file", ["adapter", "adapter.pt"])
def test_the_statistics_of_a_head_travel_with_it(file: str, tmp_path: Path) -> None:
    model, x = with_statistics(), torch.randn(5, 8)
    lorakit.attach(model, "body", rank=2, alpha=4, also_train=["head"])
    train_a_little(model)
    model.head.train()(3 * x + 1)
    model.eval()
    lorakit.save(model, tmp_path / file)
    again = with_statistics()
    lorakit.load(again, tmp_path / file, alpha=4)
    torch.testing.assert_close(again(x), model(x))
    assert again.head[1].num_batches_tracked == 1
    if file == "adapter":
        torch.testing.assert_close(read_in_peft(with_statistics(), tmp_path / file)(x), model(x))


def test_the_statistics_of_a_head_made_in_peft_are_read(tmp_path: Path) -> None:
    live = made_in_peft(with_statistics(), tmp_path, r=2, target_modules=["body"], modules_to_save=["head"])
    model, x = with_statistics(), torch.randn(5, 8)
    lorakit.load(model, tmp_path)
    torch.testing.assert_close(model(x), live(x))
