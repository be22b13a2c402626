"""A whole training step of SmolLM2-135M: time and peak memory of lorakit, loralib, PEFT and full fine-tuning.

    python benchmarks/step.py            about ten minutes on two cores; needs 20 GB of memory

4 rows of 256 tokens, all linear layers except the head, r = 16, two threads, with AdamW's step. Each variant runs in a
separate process. The processes take turns, one step each, so that all have the same disturbances.

time: the shortest step, divided by that of the floor, which is the frozen model with an input that needs a gradient.
Nothing that trains through the model can be faster. peak: the most memory that the process held in a step: GB for the
floor, and GB beyond the floor for the others.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from typing import Any

import measure
import torch
from torch import nn

from lorakit.training.memory import forget_peak, peak_memory

ROWS, TOKENS, RANK, ALPHA, THREADS = 4, 256, 16, 32, 2
VARIANTS = ["floor", "lorakit", "loralib", "PEFT", "full"]


def load(dtype: torch.dtype) -> Any:
    """SmolLM2-135M-Instruct from its package, dequantised."""
    from lorakit.training.models import load_causal_lm

    return load_causal_lm(measure.smollm2(), dtype=str(dtype).removeprefix("torch.")).model


def adapt(variant: str, model: Any, dropout: float) -> Any:
    """The model as each library would train it."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]
    if variant == "floor":
        model.requires_grad_(False)
        model.enable_input_require_grads()
    elif variant == "lorakit":
        import lorakit

        lorakit.attach(model, rank=RANK, alpha=ALPHA, dropout=dropout)
    elif variant == "loralib":
        import loralib

        for name in names:
            plain = model.get_submodule(name)
            layer = loralib.Linear(
                plain.in_features, plain.out_features, RANK, ALPHA, dropout, bias=plain.bias is not None
            )
            layer.to(plain.weight.dtype).load_state_dict(plain.state_dict(), strict=False)
            parent, _, local = name.rpartition(".")
            setattr(model.get_submodule(parent), local, layer)
        loralib.mark_only_lora_as_trainable(model)
    elif variant == "PEFT":
        import peft

        config = peft.LoraConfig(target_modules=names, r=RANK, lora_alpha=ALPHA, lora_dropout=dropout)
        model = peft.get_peft_model(model, config)
    return model.train()


def worker(variant: str, dtype: torch.dtype, dropout: float) -> None:
    """Run one variant. For each line read, take a step and write its seconds; at the end, write the peak in bytes."""
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    model = adapt(variant, load(dtype), dropout)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5) if trained else None
    ids = torch.randint(0, 49152, (ROWS, TOKENS))

    def step() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    forget_peak(torch.device("cpu"))
    step()
    print("ready", flush=True)
    for line in sys.stdin:
        if line.strip() == "end":
            break
        began = time.perf_counter()
        step()
        print(time.perf_counter() - began, flush=True)
    print(peak_memory(torch.device("cpu")), flush=True)


def compare(dtype: torch.dtype, dropout: float, steps: int) -> list[dict[str, Any]]:
    """A row for each variant."""
    name = str(dtype).removeprefix("torch.")
    command = [sys.executable, __file__, "--worker"]
    processes: dict[str, subprocess.Popen[str]] = {}

    def ask(process: subprocess.Popen[str], word: str) -> float:
        assert process.stdin is not None
        print(word, file=process.stdin, flush=True)
        return answer(process)

    def answer(process: subprocess.Popen[str]) -> float:
        assert process.stdout is not None
        line = process.stdout.readline().strip()
        if not line:
            raise RuntimeError("a process ended without an answer; its error stands above")
        return 0.0 if line == "ready" else float(line)

    try:
        for variant in VARIANTS:  # one after the other: loading two at once takes more than twice as long
            own = [*command, variant, "--dtype", name, "--dropout", str(dropout)]
            processes[variant] = subprocess.Popen(own, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            answer(processes[variant])
        best = dict.fromkeys(VARIANTS, float("inf"))
        for _ in range(steps):
            for variant, process in processes.items():
                best[variant] = min(best[variant], ask(process, "step"))
        peaks = {variant: ask(process, "end") / 1e9 for variant, process in processes.items()}
    finally:
        for process in processes.values():
            process.kill()
    return [
        {
            "model": f"SmolLM2-135M, {ROWS} × {TOKENS}",
            "dtype": name,
            "dropout": str(dropout),
            "variant": variant,
            "time": round(best[variant] / best["floor"], 3),
            "peak GB": f"{peaks['floor']:.2f}" if variant == "floor" else f"{peaks[variant] - peaks['floor']:+.2f}",
        }
        for variant in VARIANTS
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8, help="number of steps; the shortest counts")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="measure only this dtype")
    parser.add_argument("--dropout", type=float, help="measure only this dropout (default: 0.05 and 0)")
    parser.add_argument("--worker", choices=VARIANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.worker, getattr(torch, arguments.dtype), arguments.dropout)
        return
    torch.set_num_threads(THREADS)
    dtypes = [torch.float32, torch.bfloat16] if measure.has_bfloat16() else [torch.float32]
    rows = []
    for dtype in [getattr(torch, arguments.dtype)] if arguments.dtype else dtypes:
        for dropout in [0.05, 0.0] if arguments.dropout is None else [arguments.dropout]:
            rows += compare(dtype, dropout, arguments.steps)
            measure.print_table(rows[-len(VARIANTS) :])
    measure.write("step", " ".join(["python benchmarks/step.py", *sys.argv[1:]]), rows)


if __name__ == "__main__":
    main()
