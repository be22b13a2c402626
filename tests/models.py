"""Tiny random models of real architectures, the same weights on every call."""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedTokenizerBase

# of a Llama and of models that are configured as one
SIZES: dict[str, Any] = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)


def llama(**settings: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES | settings)).eval()


def llama_config(tokenizer: "PreTrainedTokenizerBase", **settings: Any) -> "LlamaConfig":
    """The configuration of a Llama that reads a tokenizer's tokens."""
    from transformers import LlamaConfig

    tokens = dict(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id)
    return LlamaConfig(**SIZES | tokens | dict(intermediate_size=64, bos_token_id=None) | settings)


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32)
    return GPT2LMHeadModel(config).eval()


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_labels=3,
        max_position_embeddings=32,
    )
    return BertForSequenceClassification(config).eval()


def qwen_moe(**settings) -> nn.Module:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    experts: dict[str, Any] = dict(
        moe_intermediate_size=24, head_dim=8, num_experts=4, num_experts_per_tok=2, decoder_sparse_step=1
    )
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **experts, **settings)).eval()


def gpt_oss(**settings) -> nn.Module:
    """Experts whose matrices are stored transposed, with biases."""
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(0)
    experts: dict[str, Any] = dict(intermediate_size=24, head_dim=8, num_local_experts=4, num_experts_per_tok=2)
    model = GptOssForCausalLM(GptOssConfig(**SIZES | experts, **settings)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "experts" in name:
                parameter.normal_(std=0.1)
    return model


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv_dw = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        self.conv_pw = nn.Conv2d(channels, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv_pw(torch.relu(self.bn(self.conv_dw(x))))


def conv_net() -> nn.Module:
    """A small residual net in timm's style: plain, strided and depthwise convolutions, norms, a head."""

    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        Block(8),
        Block(8),
        nn.Conv2d(8, 6, 3, groups=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 4),
    ).eval()


def train_a_little(model: nn.Module) -> None:
    """Change every trainable parameter, so that it differs from its start."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def trainable_names(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}
