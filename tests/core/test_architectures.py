"""Every architecture: equal at first, trained everywhere, merged, saved and loaded, and read by PEFT."""

import functools
import sys
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import lorakit
from architectures import ARCHITECTURES, Architecture
from elsewhere import ELSEWHERE, Elsewhere
from lorakit.core.attach import adapted_layers

KINDS = ("Linear", "Conv1D", "Embedding", "Conv1d", "Conv2d", "FalconLinear", "Conv2dSame")
HELD = ("shared", "model.shared")  # tables that the model calls under other names


def every_layer(module: nn.Module, name: str) -> bool:
    return type(module).__name__ in KINDS and name not in HELD


TARGETS: dict[str, Any] = {"all-linear": "all-linear", "everything": every_layer}
MODELS: dict[str, Architecture | Elsewhere] = {**ARCHITECTURES, **ELSEWHERE}
if sys.version_info < (3, 11):  # the extra "dev" has no diffusers for it
    MODELS = {name: model for name, model in MODELS.items() if not name.startswith("diffusers")}
CASES = [
    (name, targets)
    for name in MODELS
    for targets in TARGETS
    if (name, targets) != ("resnet", "all-linear")  # its only linear layer is the head
]
# Modules that do not contribute to the compared output have no gradient: `diagnose` names them.
NO_GRADIENT = {
    "sam": ("prompt_encoder.mask_embed.", "prompt_encoder.point_embed.", "mask_decoder.iou_prediction_head."),
    "detr": ("bbox_predictor.",),
    "sentence-transformers": ("0.model.pooler.",),  # it takes the mean of the words
}
# Cases in which PEFT gives other results, and why.
_MAMBA = "PEFT refuses the modules of Mamba's mixer"
_READS = "PEFT does nothing where a weight is read and its layer is not called"
NOT_IN_PEFT = {
    **{(name, targets): _MAMBA for name in ("mamba", "falcon-mamba", "mamba2") for targets in TARGETS},
    **{("bloom-exact", targets): _READS for targets in TARGETS},
    **{(name, "everything"): _READS for name in ("deberta-v2", "sam", "detr")},
    ("whisper", "everything"): "Whisper asks its convolutions for their stride, which PEFT's have not",
    **{("deepseek-v3", targets): "PEFT takes gate_proj and up_proj for the experts' matrices" for targets in TARGETS},
}


@functools.cache
def plain(name: str) -> tuple[nn.Module, Tensor]:
    """A model that no test changes, and its output."""
    model = MODELS[name].make()
    with torch.no_grad():
        return model, MODELS[name].run(model)


def fresh(name: str) -> nn.Module:
    """Another model with the same weights."""
    return MODELS[name].make()


@pytest.mark.filterwarnings("ignore:.*(mamba|causal_conv1d|deprecated)")
@pytest.mark.parametrize(("name", "targets"), CASES)
def test_it_is_adapted_merged_saved_and_read(name: str, targets: str, tmp_path: Path) -> None:
    architecture = MODELS[name]
    _, before = plain(name)
    model = fresh(name)
    lorakit.attach(model, TARGETS[targets], rank=2, alpha=4)
    torch.testing.assert_close(architecture.run(model).detach(), before, atol=1e-6, rtol=1e-6)

    layers = adapted_layers(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    adapted = architecture.run(model)
    assert (adapted - before).abs().max() > 1e-3
    adapted.square().mean().backward()
    found = lorakit.diagnose(model)
    assert found.silent == () and not found.gone and found.moved == ()
    without = {layer for layer in layers if layers[layer].lora_B.grad is None}
    assert without <= {factor.rpartition(".")[0] for factor in found.without_gradient}
    assert all(layer.startswith(NO_GRADIENT.get(name, ())) for layer in without), sorted(without)
    expected = adapted.detach()

    with torch.no_grad():
        torch.testing.assert_close(architecture.run(model), expected, atol=1e-5, rtol=1e-5)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "[0-9]+ adapted layers lie in parts of SamModel")
            lorakit.save(model, tmp_path)
        lorakit.merge(model)
        torch.testing.assert_close(architecture.run(model), expected, atol=1e-4, rtol=1e-4)
        again = fresh(name)
        lorakit.load(again, tmp_path)
        torch.testing.assert_close(architecture.run(again), expected, atol=1e-5, rtol=1e-5)

    if (name, targets) in NOT_IN_PEFT:
        return
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(fresh(name), str(tmp_path)).eval()
        torch.testing.assert_close(architecture.run(theirs), expected, atol=1e-4, rtol=1e-4)
