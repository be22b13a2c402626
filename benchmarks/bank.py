"""Several adapters on one model: a batch of 64 adapters over a batch of one, and training 8 in one pass over 8 runs.

    python benchmarks/bank.py            about three minutes on two cores; writes results/bank.json
    python benchmarks/bank.py --quick    one row of each kind, not written to a file

The model is a Llama with the widths of SmolLM2-135M (on a GPU, of Llama-3-8B in bfloat16), few layers and random
weights; every linear layer but the head is adapted, rank 16.

answer, 64 ÷ 1: a forward pass of 64 rows with 64 adapters (`bank.rows`) over one of the same rows with one adapter
(`bank.use`). train, 8 ÷ 8 × 1: a step that trains 8 adapters in one pass over the sum of 8 steps, one for each adapter
on its own rows; each with its optimizer. On a CPU the pass is divided into batches of at most 1024 tokens, as `lorakit
train` does it. base ÷ 8 × 1: forward and backward pass of the base alone, on all rows at once, over the
same sum: the least that one batch for all can take. kept: what a training pass keeps beyond one with a single adapter
on the same rows, over the bytes of the adapters. Times are minima, taken in turns.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import measure
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lorakit
from lorakit.training.own_run import most_tokens

GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if GPU else ("cpu", torch.float32)
WIDTHS = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers")
SIZES: dict[str, Any] = dict(zip(WIDTHS, (4096, 14336, 32, 8, 4) if GPU else (576, 1536, 9, 3, 6), strict=True))
VOCABULARY, RANK = 4096, 16
ANSWERED = [16, 64, 128]  # tokens of each of the 64 rows
TRAINED = [(1, 8), (1, 16), (1, 32), (1, 64), (2, 64), (4, 128)]  # rows of each of the 8 adapters, tokens of each row


def bank_of(count: int) -> lorakit.Bank:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=VOCABULARY, **SIZES)
    with torch.device(DEVICE):
        bank = lorakit.Bank(LlamaForCausalLM(config).to(DTYPE).eval())
    for index in range(count):
        bank[f"a{index}"] = lorakit.LoRASettings("all-linear", rank=RANK)
        for parameter in bank.parameters(f"a{index}"):
            parameter.data.normal_(0, 0.01)
    return bank


def wall(step: Callable[[], Any]) -> float:
    """Seconds of a step, with the device's work."""

    def waited() -> None:
        step()
        if GPU:
            torch.cuda.synchronize()

    if GPU:
        torch.cuda.synchronize()
    return measure.wall_seconds(waited)


def answering(bank: lorakit.Bank, tokens: int) -> dict[str, Any]:
    names = list(bank)
    ids = torch.randint(0, VOCABULARY, (len(names), tokens), device=DEVICE)

    def forward() -> None:
        with torch.no_grad():
            bank.model(input_ids=ids)

    def timed_one() -> float:
        bank.use(names[0])
        forward()
        return wall(forward)

    def timed_many() -> float:
        bank.use(None)
        with bank.rows(names):
            forward()  # the factors are gathered once for each `rows`
            return wall(forward)

    def timed_with_entering() -> float:
        bank.use(None)

        def whole() -> None:
            with bank.rows(names):
                forward()

        return wall(whole)

    ways = {"one": timed_one, "many": timed_many, "entering": timed_with_entering}
    times = measure.minima(ways, seconds=2.0, clock=lambda way: way())
    return {
        "batch": f"64 × {tokens}",
        "answer, 64 ÷ 1": times["many"] / times["one"],
        "with entering rows": times["entering"] / times["one"],
    }


def loss_of(bank: lorakit.Bank, ids: torch.Tensor, each: int) -> torch.Tensor:
    """The sum of each adapter's mean loss, over its own rows."""
    logits = bank.model(input_ids=ids).logits[:, :-1].float()
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return losses.view(-1, each, ids.shape[1] - 1).mean((1, 2)).sum()


def training(bank: lorakit.Bank, each: int, tokens: int) -> dict[str, Any]:
    names = list(bank)
    bank.use(None)
    bank.model.requires_grad_(False)
    ids = torch.randint(0, VOCABULARY, (len(names) * each, tokens), device=DEVICE)
    optimizers = {name: torch.optim.AdamW(bank.parameters(name), lr=1e-4) for name in names}
    rows = [name for name in names for _ in range(each)]

    most = max(1, most_tokens(torch.device(DEVICE)) // (each * tokens))  # adapters in a batch
    parts = [slice(start, start + most) for start in range(0, len(names), most)]
    batches = [
        (rows[part.start * each : part.stop * each], ids[part.start * each : part.stop * each]) for part in parts
    ]
    model: Any = bank.model
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()

    def together() -> None:
        for own, batch in batches:
            bank.assign(own)
            loss_of(bank, batch, each).backward()
        for optimizer in optimizers.values():
            optimizer.step()
            optimizer.zero_grad()

    def alone(name: str, own: torch.Tensor) -> None:
        loss_of(bank, own, each).backward()
        optimizers[name].step()
        optimizers[name].zero_grad()

    def timed_together() -> float:
        bank.use(None)
        with bank.rows(rows):
            return wall(together)

    def base() -> None:
        logits = bank.model(inputs_embeds=embedded).logits[:, :-1].float()
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()

    def timed_base() -> float:
        bank.use(None)
        return wall(base)

    def timed_alone() -> float:
        total = 0.0
        for index, name in enumerate(names):
            bank.use(name)
            total += wall(partial(alone, name, ids[index * each : (index + 1) * each]))
        return total

    ways = {"together": timed_together, "alone": timed_alone, "base": timed_base}
    times = measure.minima(ways, seconds=2.0, clock=lambda way: way())
    constants = [own for name in names for own in bank.parameters(name)] + list(bank.model.parameters())
    bank.use(names[0])
    one = measure.kept_bytes(partial(loss_of, bank, ids, each), constants)
    bank.use(None)
    with bank.rows(rows):
        many = measure.kept_bytes(partial(loss_of, bank, ids, each), constants)
    size = sum(own.numel() * own.element_size() for name in names for own in bank.parameters(name))
    return {
        "batch": f"8 × {each} × {tokens}",
        "train, 8 ÷ 8 × 1": times["together"] / times["alone"],
        "base ÷ 8 × 1": times["base"] / times["alone"],
        "kept beyond one ÷ adapters": (many - one) / size,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one row of each kind, not written to a file")
    quick = parser.parse_args().quick
    answered, trained = (ANSWERED[1:2], TRAINED[1:2]) if quick else (ANSWERED, TRAINED)
    many, few = bank_of(64), bank_of(8)
    rows = [answering(many, tokens) for tokens in answered] + [training(few, *sizes) for sizes in trained]
    measure.print_table(rows)
    if not quick:
        measure.write("bank-gpu" if GPU else "bank", "python benchmarks/bank.py", rows)


if __name__ == "__main__":
    main()
