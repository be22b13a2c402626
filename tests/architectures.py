"""Tiny random models of many architectures, made from transformers' configurations alone: two layers, width 32."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from models import SIZES

IDS = torch.arange(2, 14)[None] % 60
PIXELS = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(5))


@dataclass(frozen=True)
class Architecture:
    """How to make a model, its inputs, and which output is compared."""

    cls: str
    config: str
    settings: dict[str, Any] = field(default_factory=dict)
    inputs: Callable[[], Mapping[str, Tensor | bool]] = lambda: {"input_ids": IDS}
    output: str = "logits"

    def make(self) -> nn.Module:
        """The same weights on every call."""
        import transformers

        torch.manual_seed(0)
        config = getattr(transformers, self.config)(**self.settings)
        return spread(getattr(transformers, self.cls)(config).eval())

    def run(self, model: nn.Module) -> Tensor:
        found: Tensor = getattr(model(**self.inputs()), self.output)
        return found


def spread(model: nn.Module) -> nn.Module:
    """The model with weights so large that every layer changes its output."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "norm" not in name.lower():
                parameter.normal_(std=0.15)
            elif "expert" in name and name.endswith("bias"):
                parameter.zero_()
    return model


def _decoder(**more: Any) -> dict[str, Any]:
    return (
        dict(
            SIZES,
            max_position_embeddings=32,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
        | more
    )


def _causal(name: str, **more: Any) -> Architecture:
    return Architecture(f"{name}ForCausalLM", f"{name}Config", _decoder(**more))


_ENCODER = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=32,
    pad_token_id=0,
)
_VISION = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8
)
_SEQ2SEQ = dict(
    vocab_size=64,
    d_model=32,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=48,
    decoder_ffn_dim=48,
)
_RELATIVE = dict(relative_attention=True, pos_att_type=["c2p", "p2c"], max_relative_positions=16)


def _both() -> dict[str, Tensor]:
    return {"input_ids": IDS, "decoder_input_ids": IDS}


def _pixels() -> dict[str, Tensor]:
    return {"pixel_values": PIXELS}


ARCHITECTURES = {
    "llama": _causal("Llama"),
    "llama-tied": _causal("Llama", tie_word_embeddings=True),
    "qwen2": _causal("Qwen2"),
    "qwen3": _causal("Qwen3", head_dim=8),
    "qwen3-moe": _causal(
        "Qwen3Moe", head_dim=8, moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2, decoder_sparse_step=1
    ),
    "mixtral": _causal("Mixtral", num_local_experts=4, num_experts_per_tok=2),
    "gemma2": _causal("Gemma2", head_dim=8),
    "gemma3": Architecture("Gemma3ForCausalLM", "Gemma3TextConfig", _decoder(head_dim=8)),
    "phi3": _causal("Phi3"),
    "gpt2": Architecture(
        "GPT2LMHeadModel", "GPT2Config", dict(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32)
    ),
    "gpt-neox": _causal("GPTNeoX"),
    "falcon": Architecture(
        "FalconForCausalLM",
        "FalconConfig",
        dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4),
    ),
    "bloom": Architecture("BloomForCausalLM", "BloomConfig", dict(vocab_size=64, hidden_size=32, n_layer=2, n_head=4)),
    "bloom-exact": Architecture(
        "BloomForCausalLM",
        "BloomConfig",
        dict(vocab_size=64, hidden_size=32, n_layer=2, n_head=4, pretraining_tp=2, slow_but_exact=True),
    ),
    "opt": Architecture(
        "OPTForCausalLM",
        "OPTConfig",
        dict(
            vocab_size=64,
            hidden_size=32,
            word_embed_proj_dim=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=32,
        ),
    ),
    "mamba": Architecture(
        "MambaForCausalLM",
        "MambaConfig",
        dict(vocab_size=64, hidden_size=32, state_size=8, num_hidden_layers=2, time_step_rank=4),
    ),
    "falcon-mamba": Architecture(
        "FalconMambaForCausalLM",
        "FalconMambaConfig",
        dict(vocab_size=64, hidden_size=32, state_size=8, num_hidden_layers=2, time_step_rank=4),
    ),
    "mamba2": Architecture(
        "Mamba2ForCausalLM",
        "Mamba2Config",
        dict(vocab_size=64, hidden_size=32, num_heads=8, head_dim=8, state_size=8, n_groups=1, num_hidden_layers=2),
    ),
    "rwkv": Architecture(
        "RwkvForCausalLM",
        "RwkvConfig",
        dict(vocab_size=64, hidden_size=32, attention_hidden_size=32, num_hidden_layers=2),
        lambda: {"input_ids": IDS, "use_cache": False},  # the state is changed in place
    ),
    "deepseek-v3": _causal(
        "DeepseekV3",
        num_key_value_heads=4,
        moe_intermediate_size=24,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
    ),
    "gpt-oss": _causal("GptOss", head_dim=8, num_local_experts=4, num_experts_per_tok=2),
    "llama4": Architecture(
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        _decoder(head_dim=8, intermediate_size_mlp=48, num_local_experts=4, num_experts_per_tok=1, moe_layers=[1]),
    ),
    "t5": Architecture(
        "T5ForConditionalGeneration",
        "T5Config",
        dict(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0),
        _both,
    ),
    "bart": Architecture(
        "BartForConditionalGeneration", "BartConfig", _SEQ2SEQ | dict(max_position_embeddings=32), _both
    ),
    "whisper": Architecture(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        _SEQ2SEQ
        | dict(
            num_mel_bins=8,
            max_source_positions=20,
            max_target_positions=20,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
        ),
        lambda: {"input_features": torch.ones(1, 8, 40), "decoder_input_ids": IDS},
    ),
    "bert": Architecture("BertForSequenceClassification", "BertConfig", _ENCODER),
    "roberta": Architecture("RobertaForSequenceClassification", "RobertaConfig", _ENCODER),
    "deberta-v2": Architecture(
        "DebertaV2ForSequenceClassification",
        "DebertaV2Config",
        _ENCODER | _RELATIVE | dict(position_biased_input=False),
    ),
    "modernbert": Architecture(
        "ModernBertForSequenceClassification",
        "ModernBertConfig",
        _ENCODER | dict(bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2),
    ),
    "albert": Architecture("AlbertForSequenceClassification", "AlbertConfig", _ENCODER | dict(embedding_size=16)),
    "vit": Architecture("ViTForImageClassification", "ViTConfig", _VISION, _pixels),
    "clip": Architecture(
        "CLIPModel",
        "CLIPConfig",
        dict(
            text_config=_ENCODER | dict(bos_token_id=1, eos_token_id=2),
            vision_config=_VISION,
            projection_dim=16,
        ),
        lambda: {"input_ids": IDS, "pixel_values": PIXELS},
        "logits_per_image",
    ),
    "resnet": Architecture(
        "ResNetForImageClassification",
        "ResNetConfig",
        dict(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic"),
        _pixels,
    ),
    "segformer": Architecture(
        "SegformerForImageClassification",
        "SegformerConfig",
        dict(
            num_encoder_blocks=2,
            depths=[1, 1],
            sr_ratios=[2, 1],
            hidden_sizes=[16, 32],
            patch_sizes=[3, 3],
            strides=[2, 2],
            num_attention_heads=[2, 4],
            mlp_ratios=[2, 2],
        ),
        _pixels,
    ),
    "wav2vec2": Architecture(
        "Wav2Vec2ForCTC",
        "Wav2Vec2Config",
        dict(
            vocab_size=32,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            conv_dim=(16, 16),
            conv_kernel=(10, 3),
            conv_stride=(5, 2),
            num_conv_pos_embeddings=16,
            num_conv_pos_embedding_groups=2,
            num_feat_extract_layers=2,
        ),
        lambda: {"input_values": torch.sin(torch.arange(800.0))[None]},
    ),
    "llava": Architecture(
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        dict(
            text_config=dict(model_type="llama") | _decoder(),
            vision_config=dict(model_type="clip_vision_model", projection_dim=16) | _VISION,
            image_token_index=63,
            image_seq_length=16,
            vision_feature_layer=-1,
        ),
        lambda: {"input_ids": torch.cat((torch.full((1, 16), 63), IDS), 1), "pixel_values": PIXELS},
    ),
    "sam": Architecture(
        "SamModel",
        "SamConfig",
        dict(
            vision_config=dict(
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                image_size=32,
                patch_size=8,
                output_channels=16,
                window_size=2,
                global_attn_indexes=[1],
                mlp_dim=48,
                num_pos_feats=8,
            ),
            prompt_encoder_config=dict(hidden_size=16, image_size=32, patch_size=8, mask_input_channels=8),
            mask_decoder_config=dict(
                hidden_size=16, mlp_dim=24, num_hidden_layers=2, num_attention_heads=2, iou_head_hidden_dim=16
            ),
        ),
        lambda: {"pixel_values": PIXELS, "input_points": torch.tensor([[[[8.0, 9.0], [20.0, 3.0]]]])},
        "pred_masks",
    ),
    "detr": Architecture(
        "DetrForObjectDetection",
        "DetrConfig",
        _SEQ2SEQ
        | dict(
            use_timm_backbone=False,
            use_pretrained_backbone=False,
            backbone=None,
            backbone_config=dict(
                model_type="resnet",
                embedding_size=16,
                hidden_sizes=[16, 32],
                depths=[1, 1],
                layer_type="basic",
                out_features=["stage2"],
            ),
            num_queries=5,
            num_labels=3,
            auxiliary_loss=False,
        ),
        _pixels,
    ),
    "qwen2-vl": Architecture(
        "Qwen2VLForConditionalGeneration",
        "Qwen2VLConfig",
        dict(
            text_config=_decoder(rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[1, 1, 2])),
            vision_config=dict(
                depth=2, embed_dim=32, hidden_size=32, num_heads=4, mlp_ratio=2, patch_size=4, temporal_patch_size=2
            ),
            image_token_id=63,
            video_token_id=62,
            vision_start_token_id=61,
            vision_end_token_id=60,
        ),
        lambda: {
            "input_ids": torch.cat((torch.full((1, 4), 63), IDS), 1),
            "mm_token_type_ids": torch.cat(
                (torch.ones(1, 4, dtype=torch.int), torch.zeros_like(IDS, dtype=torch.int)), 1
            ),
            "pixel_values": torch.sin(torch.arange(16.0 * 96)).view(16, 96),
            "image_grid_thw": torch.tensor([[1, 4, 4]]),
        },
    ),
}
