"""Tiny random models of other libraries than transformers: diffusers, timm and sentence-transformers."""

from __future__ import annotations

import functools
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from architectures import spread

_TORCHVISION = [
    "torchvision",
    *(f"torchvision.{part}" for part in ("datasets", "io", "models", "ops", "transforms")),
    *("torchvision.models.feature_extraction", "torchvision.ops.misc", "torchvision.transforms.functional"),
    *("torchvision.transforms.v2", "torchvision.transforms.v2.functional"),
]


@dataclass(frozen=True)
class Elsewhere:
    """How to make a model, and its output."""

    build: Callable[[], nn.Module]
    run: Callable[[nn.Module], Tensor]

    def make(self) -> nn.Module:
        """The same weights on every call."""
        torch.manual_seed(0)
        return spread(self.build().eval())


def _wave(*shape: int) -> Tensor:
    count = int(torch.tensor(shape).prod())
    return torch.sin(torch.arange(float(count))).view(shape)


# --- diffusers -------------------------------------------------------------------------------------------------------


def _unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=2,
        norm_num_groups=4,
    )


def _flux() -> nn.Module:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
    )


def _denoised(model: Any) -> Tensor:
    found: Tensor = model(_wave(1, 4, 8, 8), torch.tensor(10), _wave(1, 4, 32)).sample
    return found


def _flowed(model: Any) -> Tensor:
    found: Tensor = model(
        hidden_states=_wave(1, 16, 4),
        encoder_hidden_states=_wave(1, 12, 32),
        pooled_projections=_wave(1, 32),
        timestep=torch.tensor([0.5]),
        img_ids=torch.arange(48.0).view(16, 3),
        txt_ids=torch.zeros(12, 3),
    ).sample
    return found


# --- timm ------------------------------------------------------------------------------------------------------------


@functools.cache
def _timm() -> SimpleNamespace:
    """timm's models. They do not use torchvision, which timm imports and which a CPU build of torch cannot load from
    the package index.
    """
    absent = [name for name in _TORCHVISION if name not in sys.modules]
    sys.modules.update({name: mock.MagicMock() for name in absent})
    try:
        from timm.models._efficientnet_builder import decode_arch_def
        from timm.models.convnext import ConvNeXt
        from timm.models.efficientnet import EfficientNet
    finally:
        for name in absent:
            del sys.modules[name]
    return SimpleNamespace(ConvNeXt=ConvNeXt, EfficientNet=EfficientNet, decode_arch_def=decode_arch_def)


def _convnext() -> nn.Module:
    model: nn.Module = _timm().ConvNeXt(depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), num_classes=3, ls_init_value=1.0)
    return model


def _efficientnet() -> nn.Module:
    """Strided convolutions pad when they are called (Conv2dSame); the others have fixed padding."""
    blocks = _timm().decode_arch_def([["ds_r1_k3_s1_e1_c8_se0.25"], ["ir_r1_k3_s2_e2_c16_se0.25"]])
    model: nn.Module = _timm().EfficientNet(blocks, num_classes=3, stem_size=8, num_features=32, pad_type="same")
    for name, statistic in model.named_buffers():
        if name.endswith("running_var"):
            statistic.fill_(0.02)  # about what small layers leave of their input, so that all layers affect the output
    return model


def _classified(model: nn.Module) -> Tensor:
    found: Tensor = model(_wave(1, 3, 33, 33))
    return found


# --- sentence-transformers -------------------------------------------------------------------------------------------


def _sentences() -> nn.Module:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import BertConfig, BertModel

    from conftest import tiny_tokenizer

    tokenizer = tiny_tokenizer(chat_template=None)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        BertModel(config).save_pretrained(folder)
        words = Transformer(str(Path(folder)))
    return SentenceTransformer(modules=[words, Pooling(32)], device="cpu")


def _embedded(model: Any) -> Tensor:
    ids = torch.arange(2, 14)[None]
    found: Tensor = model({"input_ids": ids, "attention_mask": torch.ones_like(ids)})["sentence_embedding"]
    return found


ELSEWHERE = {
    "diffusers-unet": Elsewhere(_unet, _denoised),
    "diffusers-flux": Elsewhere(_flux, _flowed),
    "timm-convnext": Elsewhere(_convnext, _classified),
    "timm-efficientnet": Elsewhere(_efficientnet, _classified),
    "sentence-transformers": Elsewhere(_sentences, _embedded),
}
