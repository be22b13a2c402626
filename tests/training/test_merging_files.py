"""An adapter folded into its base's files has the bits of a merge in memory, and the model is never there."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import lorakit
import models
from adapters import classifier_adapter, language_adapter
from lorakit.core.errors import LoraError
from lorakit.formats import shards
from lorakit.training.merging import merge_to_folder
from lorakit.training.task import Task, model_task

INDEX = "model.safetensors.index.json"
TINY: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                        "num_attention_heads": 4}  # fmt: skip


def made(cls: Any, config: Any) -> Any:
    torch.manual_seed(0)
    return cls(config).eval()


def nomic() -> nn.Module:
    """Files have q, k and v in one matrix (Chunk), under other names."""
    return made(transformers.NomicBertModel, transformers.NomicBertConfig(**TINY, max_position_embeddings=32))


def resnet() -> nn.Module:
    config = transformers.ResNetConfig(num_channels=3, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])
    return made(transformers.ResNetForImageClassification, config)


def falcon() -> nn.Module:
    """A subclass of nn.Linear with a forward of its own."""
    config = transformers.FalconConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    return made(transformers.FalconForCausalLM, config)


def albert() -> nn.Module:
    """One layer under several names."""
    config = transformers.AlbertConfig(**TINY | {"num_hidden_layers": 3}, embedding_size=16, max_position_embeddings=32)
    return made(transformers.AlbertForSequenceClassification, config)


def mamba() -> nn.Module:
    config = transformers.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4)
    return made(transformers.MambaForCausalLM, config)


def t5() -> nn.Module:
    config = transformers.T5Config(vocab_size=64, d_model=32, d_ff=48, num_layers=1, num_heads=4, d_kv=8)
    return made(transformers.T5ForConditionalGeneration, config)


EXPERTS = ["q_proj", "gate_up_proj", "down_proj"]
# What each stands for: the model, the targets, the settings of `attach`.
CASES: dict[str, tuple[Callable[[], nn.Module], Any, dict[str, Any]]] = {
    "linear": (models.llama, "all-linear", {}),
    "DoRA": (models.llama, "all-linear", {"dora": True}),
    "PiSSA": (models.llama, "all-linear", {"init": "pissa"}),
    "Conv1D, rsLoRA, biases": (models.gpt2, ["c_attn", "c_proj"], {"rslora": True, "bias": "lora_only"}),
    "blocks, a tied embedding": (models.gpt2, ["c_attn", "wte"], {"rank_pattern": {"c_attn": [4, 0, 4]}}),
    "DoRA of Conv1D and embedding": (models.gpt2, ["c_attn", "wte"], {"dora": True}),
    "a tied head": (models.gpt2, ["lm_head"], {}),
    "head and embedding, tied": (models.gpt2, ["lm_head", "wte"], {}),
    "a tied head trained whole": (models.gpt2, ["c_attn"], {"also_train": ["lm_head"]}),
    "a head trained whole": (models.bert, ["query", "value"], {"bias": "all", "also_train": ["classifier"]}),
    "experts, one by one in the files": (models.qwen_moe, [*EXPERTS, "gate.weight"], {}),
    "experts, one stack, stored (in, out)": (models.gpt_oss, EXPERTS, {}),
    "one matrix in the files, three layers": (nomic, "all-linear", {"dora": True}),
    "convolutions": (resnet, ["convolution"], {"also_train": ["classifier.1"]}),
    "DoRA of convolutions": (resnet, ["convolution"], {"dora": True}),
    "a subclass of nn.Linear": (falcon, "all-linear", {}),
    "a shared layer": (albert, ["query", "value"], {}),
    "grouped convolution, weights that are read": (mamba, ["conv1d", "dt_proj"], {}),
    "tied embeddings that stay as they are": (t5, ["q", "wo"], {}),
    "rows of a tied table": (models.gpt2, ["c_attn"], {"trainable_tokens": [3, 60]}),
    "rows of two tables": (models.llama, ["q_proj"], {"trainable_tokens": {"embed_tokens": [3], "lm_head": [60, 0]}}),
}  # fmt: skip


UNTIED = {
    *("blocks, a tied embedding", "DoRA of Conv1D and embedding"),
    *("a tied head", "head and embedding, tied", "a tied head trained whole"),
}


def base_and_adapter(folder: Path, case: str, dtype: torch.dtype, shard: str = "20KB") -> tuple[Path, Path, Any]:
    make, targets, settings = CASES[case]
    model: Any = make().to(dtype)
    model.save_pretrained(folder / "base", max_shard_size=shard)
    lorakit.attach(model, targets, rank=4, **settings)
    models.train_a_little(model)
    lorakit.save(model, folder / "adapter")
    return folder / "base", folder / "adapter", type(model)


def in_memory(base: Path, adapter: Path, cls: Any, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    model = cls.from_pretrained(base, dtype=dtype)
    lorakit.load(model, adapter)
    lorakit.bake(model)
    state: dict[str, torch.Tensor] = model.state_dict()
    return state


def loaded(folder: Path, cls: Any, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    model, info = cls.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    state: dict[str, torch.Tensor] = model.state_dict()
    return state


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_the_bits_are_those_of_a_merge_in_memory(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    base, adapter, cls = base_and_adapter(tmp_path, case, dtype)
    merged = lorakit.merge_files(base, adapter, tmp_path / "merged")
    assert (merged.unmoved, merged.resumed, merged.untied) == (0, 0, case in UNTIED)
    assert_same(loaded(tmp_path / "merged", cls, dtype), in_memory(base, adapter, cls, dtype))
    assert merged.changed > 0 and merged.updates > 0


def test_one_file_is_merged_like_several(tmp_path: Path) -> None:
    several, one = tmp_path / "several", tmp_path / "one"
    base, adapter, _ = base_and_adapter(several, "linear", torch.bfloat16)
    assert len(list(base.glob("*.safetensors"))) > 1
    single, *_ = base_and_adapter(one, "linear", torch.bfloat16, shard="1GB")
    assert lorakit.merge_files(base, adapter, several / "merged").files == len(list(base.glob("*.safetensors")))
    assert lorakit.merge_files(single, adapter, one / "merged").files == 1
    index = json.loads((several / "merged" / INDEX).read_text())
    tensors = {name: load_file(several / "merged" / file)[name] for name, file in index["weight_map"].items()}
    assert_same(tensors, load_file(one / "merged" / "model.safetensors"))
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert not (one / "merged" / INDEX).exists()


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (models.llama, {"target_modules": ["q_proj", "down_proj"]}),
        (models.llama, {"target_modules": ["q_proj", "down_proj"], "use_dora": True}),
        (models.gpt2, {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
        # PEFT saves the table of the embedding beside its factors.
        (models.llama, {"target_modules": ["embed_tokens"]}),
        # On the weight as it is: A₀ and B₀ are computed from the one in the file.
        (models.llama, {"target_modules": ["q_proj"], "init_lora_weights": "pissa", "task_type": "CAUSAL_LM"}),
    ],
    ids=["linear", "DoRA", "Conv1D", "embedding", "PiSSA"],
)
def test_the_numbers_are_those_that_peft_merges(
    make: Callable[[], Any], settings: dict[str, Any], tmp_path: Path
) -> None:
    base = make()
    base.save_pretrained(tmp_path / "base")
    wrapped: Any = peft.get_peft_model(base, peft.LoraConfig(r=4, **settings))
    models.train_a_little(wrapped)
    wrapped.save_pretrained(tmp_path / "adapter")
    expected = wrapped.merge_and_unload().state_dict()
    lorakit.merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    found = loaded(tmp_path / "merged", type(base), torch.float32)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-5)
    changed = [name for name, value in make().state_dict().items() if not torch.equal(found[name], value)]
    assert {name.split(".")[-2] for name in changed} == set(settings["target_modules"])


@pytest.mark.parametrize(("own", "asked"), [("float32", "bfloat16"), ("bfloat16", "float32"), ("float32", "float16")])
def test_another_dtype_is_the_one_of_a_model_loaded_in_it(own: str, asked: str, tmp_path: Path) -> None:
    base, adapter, cls = base_and_adapter(tmp_path, "experts, one by one in the files", getattr(torch, own))
    lorakit.merge_files(base, adapter, tmp_path / "merged", dtype=asked)
    dtype = getattr(torch, asked)
    assert_same(loaded(tmp_path / "merged", cls, dtype), in_memory(base, adapter, cls, dtype))
    written = [load_file(path) for path in (tmp_path / "merged").glob("*.safetensors")]
    assert {tensor.dtype for tensors in written for tensor in tensors.values()} == {dtype}
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == asked


def test_older_names_in_the_files_stay(tmp_path: Path) -> None:
    """A BERT without its prefix, whose norms have the names gamma and beta."""
    base, adapter, cls = base_and_adapter(tmp_path, "a head trained whole", torch.float32, shard="1GB")
    tensors = load_file(base / "model.safetensors")
    older = {"bert.": "", "LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    old = {}
    for name, tensor in tensors.items():
        for now, before in older.items():
            name = name.replace(now, before)
        old[name] = tensor
    save_file(old, base / "model.safetensors", {"format": "pt"})
    lorakit.merge_files(base, adapter, tmp_path / "merged")
    assert load_file(tmp_path / "merged" / "model.safetensors").keys() == old.keys()
    assert_same(loaded(tmp_path / "merged", cls, torch.float32), in_memory(base, adapter, cls, torch.float32))


def test_two_tied_tensors_that_both_lie_in_the_files_are_two_afterwards(tmp_path: Path) -> None:
    base, adapter, cls = base_and_adapter(tmp_path, "blocks, a tied embedding", torch.float32, shard="1GB")
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    assert lorakit.merge_files(base, adapter, tmp_path / "merged").untied
    assert_same(loaded(tmp_path / "merged", cls, torch.float32), in_memory(base, adapter, cls, torch.float32))


def test_tensors_that_the_model_does_not_know_are_carried_over(tmp_path: Path) -> None:
    base, adapter, _ = base_and_adapter(tmp_path, "linear", torch.float32, shard="1GB")
    more = {"mtp.layers.0.weight": torch.randn(3, 3), "scales": torch.arange(4, dtype=torch.uint8)}
    save_file(load_file(base / "model.safetensors") | more, base / "model.safetensors", {"format": "pt"})
    lorakit.merge_files(base, adapter, tmp_path / "merged")
    found = load_file(tmp_path / "merged" / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in more.items())


def test_an_adapter_at_hand_is_merged_like_its_file(tmp_path: Path) -> None:
    base, adapter, cls = base_and_adapter(tmp_path, "a tied head", torch.float32)
    model = cls.from_pretrained(base)
    lorakit.load(model, adapter)
    lorakit.merge_files(base, lorakit.extract(model), tmp_path / "merged")
    lorakit.merge_files(base, adapter, tmp_path / "from-file")
    for path in sorted((tmp_path / "from-file").glob("*.safetensors")):
        assert (tmp_path / "merged" / path.name).read_bytes() == path.read_bytes()


# --- the folder ------------------------------------------------------------------------------------------------------


def test_the_folder_is_that_of_the_merge_in_memory(tiny_lm: Path, tmp_path: Path) -> None:
    adapter = language_adapter(tiny_lm, tmp_path / "adapter", chat=False, system="Be brief.")
    merge_to_folder(str(tiny_lm), str(adapter), str(tmp_path / "in-memory"))
    lorakit.merge_files(tiny_lm, adapter, tmp_path / "merged")
    expected, found = tmp_path / "in-memory", tmp_path / "merged"
    assert_same(load_file(found / "model.safetensors"), load_file(expected / "model.safetensors"))
    names = [path.name for path in expected.iterdir() if path.is_file() and path.suffix != ".safetensors"]
    assert {"config.json", "generation_config.json", "tokenizer.json", "style.json"} <= set(names)
    for name in names:
        if name == "config.json":  # transformers adds to its own what a model of another version would not have
            said = json.loads((found / name).read_text())
            assert said.items() <= json.loads((expected / name).read_text()).items()
        elif name == "generation_config.json":
            assert json.loads((found / name).read_text()) == json.loads((expected / name).read_text())
        else:
            assert (found / name).read_bytes() == (expected / name).read_bytes(), name


@pytest.mark.parametrize("labels", [("no", "yes", "perhaps"), ()], ids=["classes", "a number"])
def test_a_classifier_gets_its_head_and_its_classes(
    labels: tuple[str, ...], tiny_encoder: Path, tmp_path: Path
) -> None:
    adapter = classifier_adapter(tiny_encoder, tmp_path / "adapter", labels, value=1.5)
    merge_to_folder(str(tiny_encoder), str(adapter), str(tmp_path / "in-memory"))
    lorakit.merge_files(tiny_encoder, adapter, tmp_path / "merged")
    assert model_task(str(tmp_path / "merged"), None) == (
        Task("classification", labels) if labels else Task("regression")
    )
    cls = transformers.AutoModelForSequenceClassification
    found, expected = (loaded(tmp_path / name, cls, torch.float32) for name in ("merged", "in-memory"))
    assert_same(found, expected)


def test_other_files_are_carried_over_and_other_weights_are_not(tmp_path: Path) -> None:
    base, adapter, _ = base_and_adapter(tmp_path, "linear", torch.float32)
    for name in ("README.md", "additional_chat_templates/tool.jinja", "onnx/model.onnx", "pytorch_model.bin", ".git/x"):
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text(name)
    (base / "consolidated.safetensors").write_text("other weights")
    lorakit.merge_files(base, adapter, tmp_path / "merged")
    found = {str(path.relative_to(tmp_path / "merged")) for path in (tmp_path / "merged").rglob("*") if path.is_file()}
    own = {path.name for path in base.glob("model-*")} | {INDEX, "config.json", "generation_config.json"}
    assert found == own | {"README.md", "additional_chat_templates/tool.jinja", ".lorakit/merge.json"}
    assert (tmp_path / "merged" / "README.md").read_text() == "README.md"


def test_what_was_merged_before_is_replaced_only_when_asked(tmp_path: Path) -> None:
    base, adapter, _ = base_and_adapter(tmp_path, "linear", torch.float32)
    lorakit.merge_files(base, adapter, tmp_path / "merged")
    with pytest.raises(FileExistsError, match="holds a merged model.*--overwrite"):
        lorakit.merge_files(base, adapter, tmp_path / "merged", dtype="bfloat16")
    lorakit.merge_files(base, adapter, tmp_path / "merged", dtype="bfloat16", overwrite=True)
    written = [load_file(path) for path in (tmp_path / "merged").glob("*.safetensors")]
    assert {tensor.dtype for tensors in written for tensor in tensors.values()} == {torch.bfloat16}


# --- refused before anything is written ------------------------------------------------------------------------------


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    said = json.loads(path.read_text())
    change(said)
    path.write_text(json.dumps(said))


def without(base: Path, end: str, instead: torch.Tensor | None = None) -> None:
    for path in base.glob("*.safetensors"):
        tensors = load_file(path)
        for name in [name for name in tensors if name.endswith(end)]:
            del tensors[name]
            if instead is not None:
                tensors[name] = instead
            else:
                said = json.loads((base / INDEX).read_text())
                del said["weight_map"][name]
                (base / INDEX).write_text(json.dumps(said))
        save_file(tensors, path, {"format": "pt"})


def other_adapter(base: Path, adapter: Path, config: dict[str, int]) -> None:
    model = models.llama(**config)
    lorakit.attach(model, ["q_proj"], rank=2)
    shutil.rmtree(adapter)
    lorakit.save(model, adapter)


def quantised(base: Path, adapter: Path) -> None:
    edit(base / "config.json", lambda said: said.update(quantization_config={"quant_method": "gptq"}))


Q_PROJ, NORM = "0.self_attn.q_proj.weight", "1.input_layernorm.weight"
REFUSED: dict[str, tuple[Callable[[Path, Path], Any], str]] = {
    "another size": (
        lambda base, adapter: other_adapter(base, adapter, {"hidden_size": 64}),
        r"adapter does not fit LlamaForCausalLM.*\n.*A and B are",
    ),
    "more layers": (
        lambda base, adapter: other_adapter(base, adapter, {"num_hidden_layers": 3}),
        r"layers\.2\.self_attn\.q_proj: the model has no such module",
    ),
    "a file is missing": (
        lambda base, adapter: sorted(base.glob("*.safetensors"))[1].unlink(),
        r"names model-00002-of-.* which is not there",
    ),
    "no weight for an update": (
        lambda base, adapter: without(base, Q_PROJ),
        r"no tensor of model\.layers\.0\.self_attn\.q_proj\.weight, which the adapter updates\.",
    ),
    "no weight at all": (
        lambda base, adapter: without(base, "model.norm.weight"),
        r"holds no weights for model\.norm\.weight, and the adapter brings none",
    ),
    "another shape": (
        lambda base, adapter: without(base, NORM, torch.ones(5)),
        r"input_layernorm\.weight has the shape \(5,\), the model has \(32,\)",
    ),
    "8-bit weights": (
        lambda base, adapter: without(base, Q_PROJ, torch.ones(32, 32, dtype=torch.uint8)),
        "stored as U8, so the base is quantised",
    ),
    "quantised": (quantised, r"is quantised \(gptq\)"),
    "no model": (lambda base, adapter: (base / "config.json").unlink(), r"no model folder: it has no config\.json"),
    "no adapter": (lambda base, adapter: shutil.rmtree(adapter), "adapter: no such adapter folder"),
}


@pytest.mark.parametrize(("spoil", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_merged_is_refused_before_anything_is_written(
    spoil: Callable[[Path, Path], Any], message: str, tmp_path: Path
) -> None:
    base, adapter, _ = base_and_adapter(tmp_path, "linear", torch.float32)
    spoil(base, adapter)
    with pytest.raises((LoraError, FileNotFoundError), match=message):
        lorakit.merge_files(base, adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_packed_base_is_refused(tmp_path: Path) -> None:
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "model.gguf").touch()
    with pytest.raises(LoraError, match=r"packed is a \.gguf file; only safetensors files are merged shard by shard"):
        lorakit.merge_files(tmp_path / "packed", tmp_path / "adapter", tmp_path / "merged")


def test_a_model_of_the_hub_is_fetched_without_its_other_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter, _ = base_and_adapter(tmp_path, "linear", torch.float32)
    asked: dict[str, Any] = {}

    def fetched(name: str, **options: Any) -> str:
        asked[name] = options
        return str(base)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetched)
    monkeypatch.setattr("lorakit.training.merging_files.locate", lambda name: (name, {}))
    lorakit.merge_files("someone/llama", adapter, tmp_path / "merged")
    assert {"*.bin", "*.gguf", "consolidated*"} <= set(asked["someone/llama"]["ignore_patterns"])
    assert "*.safetensors" not in asked["someone/llama"]["ignore_patterns"]
    assert (tmp_path / "merged" / "config.json").is_file()


def test_a_tie_that_no_setting_undoes_is_refused(tmp_path: Path) -> None:
    model: Any = t5()
    model.save_pretrained(tmp_path / "base")
    lorakit.attach(model, ["lm_head"], rank=2)
    lorakit.save(model, tmp_path / "adapter")
    with pytest.raises(LoraError, match=r"lm_head\.weight is tied to decoder\.embed_tokens\.weight, .*unmerged"):
        lorakit.merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


_RESIZED = r"embed_tokens\.weight has 70 rows, .* 64: .*resize_token_embeddings\(70\)"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"targets": ["q_proj"], "also_train": ["embed_tokens"]}, _RESIZED),
        ({"targets": ["embed_tokens"]}, _RESIZED),
        ({"trainable_tokens": [69]}, r"row 69 of model\.embed_tokens\.weight .* 64 rows: .*without --shard-by-shard"),
    ],
)
def test_a_vocabulary_that_was_resized_is_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    model: Any = models.llama()
    model.save_pretrained(tmp_path / "base")
    model.resize_token_embeddings(70)
    lorakit.attach(model, rank=2, **settings)
    lorakit.save(model, tmp_path / "adapter")
    with pytest.raises(LoraError, match=message):
        lorakit.merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")


def test_a_weight_that_is_computed_is_refused(tmp_path: Path) -> None:
    """Wav2Vec2's positions have weight_norm."""
    config = transformers.Wav2Vec2Config(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48, num_feat_extract_layers=1,
        conv_dim=[16], conv_kernel=[3], conv_stride=[2], num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    model = made(transformers.Wav2Vec2Model, config)
    model.save_pretrained(tmp_path / "base")
    lorakit.attach(model, ["pos_conv_embed.conv"], rank=2)
    lorakit.save(model, tmp_path / "adapter")
    with pytest.raises(LoraError, match=r"pos_conv_embed\.conv\.weight cannot be merged: .*computes its weight"):
        lorakit.merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_the_bases_folder_and_others_are_no_output(tmp_path: Path) -> None:
    base, adapter, _ = base_and_adapter(tmp_path, "linear", torch.float32)
    before = {path: path.read_bytes() for path in base.iterdir()}
    with pytest.raises(FileExistsError, match="which this command reads"):
        lorakit.merge_files(base, adapter, base, overwrite=True)
    assert {path: path.read_bytes() for path in base.iterdir()} == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"holds notes\.txt, which lorakit merge did not write"):
        lorakit.merge_files(base, adapter, tmp_path / "mine", overwrite=True)
    with pytest.raises(LoraError, match="is an adapter's folder; the base is to be a model's"):
        lorakit.merge_files(adapter, adapter, tmp_path / "merged")
    with pytest.raises(LoraError, match="dtype='int8': expected float32, bfloat16, float16 or float64"):
        lorakit.merge_files(base, adapter, tmp_path / "merged", dtype="int8")


def test_a_disk_without_room_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter, _ = base_and_adapter(tmp_path, "linear", torch.float32)
    needed = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    usage = shutil.disk_usage(tmp_path)._replace(free=needed - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(LoraError, match=r"merged needs \d+ kB more, and \d+ kB are free there\. Nothing was written"):
        lorakit.merge_files(base, adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


# --- what was written is looked at -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case",
    [
        *("linear", "DoRA", "blocks, a tied embedding", "DoRA of Conv1D and embedding", "convolutions"),
        *("experts, one by one in the files", "experts, one stack, stored (in, out)"),
    ],
)
def test_a_wrong_number_in_the_first_row_of_a_merged_tensor_is_found(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter, _ = base_and_adapter(tmp_path, case, torch.float32)
    write = shards.ShardWriter.write

    def spoilt(self: Any, name: str, tensor: torch.Tensor) -> None:
        if tensor.dim() > 1:
            tensor = tensor.clone()
            tensor.view(-1)[1] += 1e-3
        write(self, name, tensor)

    monkeypatch.setattr(shards.ShardWriter, "write", spoilt)
    with pytest.raises(LoraError, match=r"numbers in row 0 are not base \+ adapter|does not hold what was trained"):
        lorakit.merge_files(base, adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_updates_that_rounding_swallows_are_counted(tmp_path: Path) -> None:
    model: Any = models.llama().to(torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    lorakit.attach(model, ["q_proj", "v_proj"], rank=2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.fill_(1e-9 if "q_proj" in name else 0.1)
    lorakit.save(model, tmp_path / "adapter")
    merged = lorakit.merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert (merged.updates, merged.unmoved) == (4, 2)
    assert "2 of 4 updates changed none of the numbers" in merged.notes[0]


# --- interrupted and gone on with ------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and ".lorakit" not in path.parts
    }


def interrupted(monkeypatch: pytest.MonkeyPatch, after: int, error: BaseException | None = None) -> list[str]:
    """From the file of this number on, an error comes in its middle. Returns the names of the files that were begun."""
    begun: list[str] = []
    carry, enter = shards.ShardWriter._next, shards.ShardWriter.__enter__

    def entered(self: Any) -> Any:
        begun.append(self.path.name)
        return enter(self)

    def stopped(self: Any, *args: Any) -> None:
        if len(begun) > after and len(self._left) < len(self.tensors):
            raise error or KeyboardInterrupt
        carry(self, *args)

    monkeypatch.setattr(shards.ShardWriter, "__enter__", entered)
    monkeypatch.setattr(shards.ShardWriter, "_next", stopped)
    return begun


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (KeyboardInterrupt(), "the same command goes on"),
        (OSError(errno.ENOSPC, "No space left on device"), r"could not be written: No space.*MB are free there"),
    ],
    ids=["Ctrl-C", "a full disk"],
)
def test_a_merge_that_was_stopped_goes_on_at_the_file_that_it_was_writing(
    error: BaseException, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter, _ = base_and_adapter(tmp_path, "linear", torch.float32)
    lorakit.merge_files(base, adapter, tmp_path / "whole")
    with monkeypatch.context() as stopping:
        interrupted(stopping, 2, error)
        with pytest.raises(type(error), match=message):
            lorakit.merge_files(base, adapter, tmp_path / "merged")
    assert contents(tmp_path / "merged") == {}
    with monkeypatch.context() as counting:
        begun = interrupted(counting, after=1000)
        merged = lorakit.merge_files(base, adapter, tmp_path / "merged")
    files = sorted(path.name for path in base.glob("*.safetensors"))
    assert (merged.resumed, begun) == (2, files[2:])
    assert "2 of 5 files were there already" in merged.notes[0]
    assert contents(tmp_path / "merged") == contents(tmp_path / "whole")
    assert lorakit.merge_files(base, adapter, tmp_path / "merged").resumed == 5  # and then there is nothing to do


@pytest.mark.parametrize("other", ["adapter", "base", "dtype"])
def test_files_of_another_merge_are_not_gone_on_with(
    other: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter, cls = base_and_adapter(tmp_path, "linear", torch.float32)
    with monkeypatch.context() as stopping:
        interrupted(stopping, after=2)
        with pytest.raises(KeyboardInterrupt):
            lorakit.merge_files(base, adapter, tmp_path / "merged")
    if other == "adapter":
        tensors = load_file(adapter / "adapter_model.safetensors")
        save_file({name: 2 * tensor for name, tensor in tensors.items()}, adapter / "adapter_model.safetensors")
    if other == "base":
        path = sorted(base.glob("*.safetensors"))[0]
        save_file({name: 2 * tensor for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    dtype = "bfloat16" if other == "dtype" else None
    merged = lorakit.merge_files(base, adapter, tmp_path / "merged", dtype=dtype)
    assert merged.resumed == 0
    own = torch.bfloat16 if dtype else torch.float32
    assert_same(loaded(tmp_path / "merged", cls, own), in_memory(base, adapter, cls, own))


_KILLED = """
import json, os, shutil, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
import lorakit
from lorakit.formats import files, folder, shards
base, adapter, out = map(Path, sys.argv[1:4])
moment = [0]

def counted(owner, name):
    own = getattr(owner, name)
    def call(*args, **kwargs):
        moment[0] -= 1
        if moment[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return own(*args, **kwargs)
    setattr(owner, name, call)

import transformers, transformers.models.llama.modeling_llama
for owner, name in ((os, "replace"), (os, "fsync"), (shards.ShardWriter, "_next"), (folder, "remove")):
    counted(owner, name)
def contents(folder):
    found = [path for path in sorted(folder.rglob("*")) if path.is_file() and ".lorakit" not in path.parts]
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}

def merged(at):
    # The exit status of a process that is killed at the moment of this number, 0 for none.
    child = os.fork()
    if child == 0:
        moment[0] = at
        lorakit.merge_files(base, adapter, out)
        os._exit(0)
    return os.waitpid(child, 0)[1]

merged(0)
whole, seen, at = contents(out), [], 1
while True:
    shutil.rmtree(out)
    status = merged(at)
    there = contents(out)
    if status == 0:
        break
    # Whoever finds config.json finds all of the model; before that there is nothing that could be taken for one.
    assert "config.json" not in there or there == whole, (at, sorted(there))
    assert merged(0) == 0, at
    assert contents(out) == whole, at
    seen.append(len(there))
    at += 3
print(json.dumps(seen))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_merge_that_was_killed_at_any_moment_goes_on_and_ends_with_the_same_bytes(tmp_path: Path) -> None:
    """At each third of the moments in which a tensor is written, a file is synced, renamed or removed."""
    base, adapter, _ = base_and_adapter(tmp_path, "linear", torch.float32, shard="60KB")
    command = [sys.executable, "-c", _KILLED, str(base), str(adapter), str(tmp_path / "merged")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    files = len(list(base.iterdir()))
    assert seen[0] == 0 and any(0 < there < files for there in seen)  # also while all is put in its place


_MEASURED = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
import lorakit
from lorakit.training.memory import forget_peak, peak_memory, resident_memory
cpu = torch.device("cpu")
small, base, adapter = map(Path, sys.argv[1:])
lorakit.merge_files(small / "base", small / "adapter", small / "merged")  # what is imported and made once
forget_peak(cpu)
before = resident_memory()
lorakit.merge_files(base, adapter, small / "large-merged")
print(peak_memory(cpu) - before)
"""


@pytest.fixture(scope="module")
def large_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six files of some 40 MB."""
    sizes = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 7, "num_attention_heads": 8}
    with torch.random.fork_rng():
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, vocab_size=8000))
    folder = tmp_path_factory.mktemp("large")
    model.save_pretrained(folder, max_shard_size="46MB")
    assert len(list(folder.glob("*.safetensors"))) >= 6
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is the system's")
@pytest.mark.parametrize(("targets", "dora"), [(["embed_tokens", "lm_head", "q_proj"], False), ("all-linear", True)])
def test_the_peak_of_memory_is_at_most_one_and_a_half_files(
    targets: Any, dora: bool, large_base: Path, tmp_path: Path
) -> None:
    """Besides what the process held before: torch and transformers."""
    base_and_adapter(tmp_path, "linear", torch.float32)
    model = transformers.LlamaForCausalLM.from_pretrained(large_base)
    lorakit.attach(model, targets, rank=8, dora=dora)
    models.train_a_little(model)
    lorakit.save(model, tmp_path / "large")
    command = [sys.executable, "-c", _MEASURED, str(tmp_path), str(large_base), str(tmp_path / "large")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    largest = max(path.stat().st_size for path in large_base.glob("*.safetensors"))
    assert 0 < int(done.stdout.split()[-1]) <= 1.5 * largest
