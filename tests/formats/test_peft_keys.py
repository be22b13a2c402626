"""Keys as real programs write them, other programs' files, and names that belong to several adapters."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

import lorakit
from folders import TENSORS, factors, folder, small

P = "base_model.model."


def renamed(change) -> dict[str, torch.Tensor]:
    return {change(key): tensor for key, tensor in factors().items()}


SPELLINGS = {
    "torch.compile": lambda key: key.replace(P, f"{P}_orig_mod."),
    "torch.compile around PEFT": lambda key: f"_orig_mod.{key}",
    "torch.compile of a layer": lambda key: key.replace(".0.", ".0._orig_mod."),
    "DDP": lambda key: key.replace(P, f"{P}module."),
    "DDP around PEFT": lambda key: f"module.{key}",
    "DDP around torch.compile": lambda key: f"module._orig_mod.{key}",
    "torch.compile around DDP": lambda key: f"_orig_mod.module.{key}",
    "FSDP": lambda key: key.replace(".0.", "._fsdp_wrapped_module.0."),
    "FSDP around PEFT": lambda key: f"_fsdp_wrapped_module.{key}",
    "checkpointing": lambda key: key.replace(".0.", ".0._checkpoint_wrapped_module."),
    "FSDP and checkpointing": lambda key: key.replace(
        ".0.", "._fsdp_wrapped_module.0._checkpoint_wrapped_module._orig_mod."
    ),
    "the adapter's name": lambda key: key.replace(".weight", ".default.weight"),
    "another adapter's name": lambda key: key.replace(".weight", ".my-adapter.weight"),
    "no prefix": lambda key: key.removeprefix(P),
    "no prefix, DDP": lambda key: key.replace(P, "module."),
    "no prefix, the adapter's name": lambda key: key.removeprefix(P).replace(".weight", ".default.weight"),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("file", [TENSORS, "adapter_model.bin"])
def test_keys_are_read_as_they_are_meant(spelling: str, file: str, tmp_path: Path) -> None:
    wanted, model, x = small(), small(), torch.randn(3, 8)
    lorakit.load(wanted, folder(tmp_path / "plain"))
    tensors = renamed(SPELLINGS[spelling])
    path = folder(tmp_path / "other", tensors)
    if file != TENSORS:
        (path / TENSORS).unlink()
        torch.save(tensors, path / file)
    lorakit.load(model, path)
    assert torch.equal(model(x), wanted(x))


@pytest.mark.parametrize(
    "spelling", [name for name in SPELLINGS if not any(word in name for word in ("PEFT", "prefix", "adapter"))]
)
def test_loralibs_keys_too(spelling: str, tmp_path: Path) -> None:
    plain = {"0.lora_A": torch.randn(2, 8), "0.lora_B": torch.randn(8, 2), "0.bias": torch.randn(8)}
    torch.save(plain, tmp_path / "plain.pt")
    tensors = {SPELLINGS[spelling](P + key).replace(P, ""): value for key, value in plain.items()}
    torch.save(tensors, tmp_path / "a.pt")
    wanted, model, x = small(), small(), torch.randn(3, 8)
    lorakit.load(wanted, tmp_path / "plain.pt", alpha=4)
    lorakit.load(model, tmp_path / "a.pt", alpha=4)
    assert torch.equal(model(x), wanted(x))


class Own(nn.Module):
    """A model whose own children have the names of wrappers and of PEFT's prefix."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        owner: nn.Module = self
        for part in name.split("."):
            child = nn.Module()
            owner.add_module(part, child)
            owner = child
        owner.add_module("dense", nn.Linear(8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.get_submodule(f"{self.name}.dense")(x)


@pytest.mark.parametrize("name", ["module", "module.module", "base_model.model", "model.module"])
@pytest.mark.parametrize("prefix", [P, f"module.{P}"])
def test_a_models_own_children_may_be_called_so(name: str, prefix: str, tmp_path: Path) -> None:
    tensors = {key.replace(f"{P}0", f"{prefix}{name}.dense"): tensor for key, tensor in factors().items()}
    torch.manual_seed(0)
    model, x = Own(name), torch.randn(3, 8)
    torch.save({f"{name}.dense.lora_A": torch.ones(2, 8), f"{name}.dense.lora_B": torch.ones(8, 2)}, tmp_path / "a.pt")
    lorakit.load(model, tmp_path / "a.pt", alpha=1)
    lorakit.detach(model)
    before = model(x).detach()
    lorakit.load(model, folder(tmp_path, tensors))
    assert (model(x) - before).abs().max() > 0.1
    lorakit.save(model, tmp_path / "ours")
    again = Own(name)
    again.load_state_dict({key: v for key, v in model.state_dict().items() if "lora_" not in key})
    lorakit.load(again, tmp_path / "ours")
    assert torch.equal(again(x), model(x))


def test_several_adapters_in_one_file_are_refused(tmp_path: Path) -> None:
    tensors = {
        key.replace(".weight", f".{adapter}.weight"): value
        for adapter in ("en", "fr")
        for key, value in factors().items()
    }
    with pytest.raises(ValueError, match=r"holds several adapters \(en, fr\): give each a file of its own"):
        lorakit.load(small(), folder(tmp_path, tensors))


def test_one_tensor_under_two_keys_is_refused(tmp_path: Path) -> None:
    tensors = factors() | {f"_orig_mod.{key}": value for key, value in factors().items()}
    with pytest.raises(ValueError, match="_orig_mod.* are the same tensor of the model"):
        lorakit.load(small(), folder(tmp_path, tensors))


FOREIGN = {
    "kohya": ["lora_unet_mid_attn_to_q.lora_down.weight", "lora_unet_mid_attn_to_q.alpha"],
    "LyCORIS": ["lycoris_blocks_0.lokr_w1", "lycoris_blocks_0.lokr_w2"],
    "diffusers": ["unet.mid.attn.to_q.lora.up.weight", "unet.mid.attn.to_q.lora.down.weight"],
    "mlx-lm": ["model.layers.0.self_attn.q_proj.lora_a", "model.layers.0.self_attn.q_proj.lora_b"],
    "torchtune": ["layers.0.attn.q_proj.lora_a.weight", "layers.0.attn.q_proj.lora_b.weight"],
}


@pytest.mark.parametrize("program", FOREIGN)
def test_other_programs_files_are_called_by_their_format(program: str, tmp_path: Path) -> None:
    tensors = {key: torch.ones(4, 4) for key in FOREIGN[program]}
    alone = tmp_path / "style.safetensors"
    safetensors.torch.save_file(tensors, alone)
    with pytest.raises(ValueError, match=rf"style.safetensors is a file in .*{program}.* lorakit reads PEFT's folder"):
        lorakit.load(small(), alone)
    with pytest.raises(FileNotFoundError, match=rf"it has no adapter_config.json. style.safetensors in it.*{program}"):
        lorakit.load(small(), tmp_path)
    with pytest.raises(ValueError, match=rf"keys that no LoRA layer of lorakit has(.|\n)*{program}"):
        lorakit.load(small(), folder(tmp_path / "named", tensors))
    torch.save(tensors, tmp_path / "style.pt")
    with pytest.raises(ValueError, match=rf"style.pt: expected <module>.lora_A(.|\n)*{program}"):
        lorakit.load(small(), tmp_path / "style.pt", alpha=1)


def test_an_mlx_folder_and_a_gguf_adapter(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"fine_tune_type": "lora", "num_layers": 2}))
    with pytest.raises(ValueError, match="adapter_config.json is of an adapter in mlx-lm's format"):
        lorakit.load(small(), tmp_path)
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + b"\0" * 60)
    with pytest.raises(ValueError, match="a.gguf is a GGUF file"):
        lorakit.load(small(), tmp_path / "a.gguf")


def test_a_lone_file_of_pefts_tensors_lacks_its_configuration(tmp_path: Path) -> None:
    safetensors.torch.save_file(factors(), tmp_path / "my.safetensors")
    with pytest.raises(ValueError, match=r"in PEFT's format; .* Put it into a folder with its adapter_config.json"):
        lorakit.load(small(), tmp_path / "my.safetensors")
