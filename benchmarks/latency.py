"""The time of a forward pass with each method, divided by that of the plain model (Hu et al. 2021, table 1).

    python benchmarks/latency.py        15 minutes on two threads if bfloat16 is fast, otherwise 30 minutes

LoRA merged has only the model's own layers, like a fully fine-tuned model, so its ratio shows the measurement error of
the others. LoRA unmerged is used when many adapters share one model. Adapters add layers that run one after the other,
which costs most if a pass is short. A prefix adds 32 positions to each sequence.

The transformer is measured without the vocabulary's head. The head is the same for all methods and would hide a part of
the difference: it is a fifth of SmolLM2's operations. Everything is in the model's dtype, including inserted modules,
although they train in float32. GPT-2 medium is the paper's model, here with random weights, which take as long as
trained ones.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import measure
import torch
from torch import nn

import lorakit
from lorakit.study.methods.baselines import METHODS
from lorakit.study.methods.structure import base_model_of

THREADS = 2
SMOLLM2 = [(batch, length) for batch in (1, 8, 32) for length in (128, 256, 512)]
GPT2 = [(batch, length) for batch in (1, 8) for length in (128, 512)]  # three times SmolLM2's operations
SERVED = {
    "LoRA merged": "lora",
    "LoRA unmerged": "lora",
    "adapter-h": "adapter-h",
    "adapter-p": "adapter-p",
    "prefix-layer": "prefix-layer",
}


def smollm2(dtype: torch.dtype) -> Any:
    """The blocks of SmolLM2-135M, without its head."""
    from lorakit.training.models import load_causal_lm

    return base_model_of(load_causal_lm(measure.smollm2(), dtype=str(dtype).removeprefix("torch.")).model)


def gpt2_medium(dtype: torch.dtype) -> Any:
    """A model with GPT-2 medium's sizes, without a head."""
    from transformers import GPT2Config, GPT2Model

    torch.manual_seed(0)
    return GPT2Model(GPT2Config(n_embd=1024, n_layer=24, n_head=16)).to(dtype)


def variants(model: nn.Module) -> dict[str, nn.Module]:
    """The model, and a copy with each method at its default size in METHODS, ready for inference."""
    dtype = next(model.parameters()).dtype
    made = {"plain": model}
    for name, method in SERVED.items():
        torch.manual_seed(0)
        own = copy.deepcopy(model)
        METHODS[method]().apply(own)
        for local, parameter in own.named_parameters():
            if "lora_B" in local:
                nn.init.normal_(parameter, std=0.02)  # so that the update is not zero
        if name == "LoRA merged":
            lorakit.merge(own)
        for parameter in own.parameters():  # not the buffers: rotary frequencies stay in float32
            parameter.data = parameter.data.to(dtype)
        made[name] = own
    return {name: own.eval().requires_grad_(False) for name, own in made.items()}


@torch.no_grad()
def compare(
    name: str, model: Any, shapes: Iterable[tuple[int, int]], seconds: float = 1.0, least: int = 3
) -> list[dict[str, Any]]:
    """A row for each (batch, length), with the time of each method over that of the plain model."""
    served = variants(model)
    rows = []
    for batch, length in shapes:
        ids = torch.randint(model.config.vocab_size, (batch, length))
        steps = {key: lambda own=own, ids=ids: own(input_ids=ids, use_cache=False) for key, own in served.items()}
        times = measure.minima(steps, seconds, least)
        rows.append(
            {
                "model": name,
                "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
                "batch × length": f"{batch} × {length}",
                "plain ms": f"{1000 * times['plain']:.0f}",
                **{key: round(times[key] / times["plain"], 3) for key in SERVED},
            }
        )
        measure.print_table(rows[-1:])
    return rows


def main() -> None:
    torch.set_num_threads(THREADS)
    dtype = torch.bfloat16 if measure.has_bfloat16() else torch.float32
    rows = compare("SmolLM2-135M", smollm2(dtype), SMOLLM2)
    rows += compare("GPT-2 medium", gpt2_medium(dtype), GPT2)
    measure.write("latency", "python benchmarks/latency.py", rows)


if __name__ == "__main__":
    main()
