"""A file names a task only if PEFT's class for that task reads the file and runs the model."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lorakit
from architectures import ARCHITECTURES
from in_peft import load_in_peft
from lorakit.core.exchange import extract
from models import train_a_little

CASES = [  # architecture, targets, trained whole, the task
    ("llama", "all-linear", (), "CAUSAL_LM"),
    ("gpt2", "all-linear", (), "CAUSAL_LM"),
    ("mixtral", "all-linear", (), "CAUSAL_LM"),
    ("t5", "all-linear", (), "SEQ_2_SEQ_LM"),
    ("bart", "all-linear", (), "SEQ_2_SEQ_LM"),
    ("whisper", "all-linear", (), None),
    ("llava", "all-linear", (), None),
    ("bert", "query", (), None),
    ("bert", "query", ("classifier",), "SEQ_CLS"),
    ("bert", ["query", "classifier"], (), None),
    ("roberta", "query", (), None),
    ("roberta", "query", ("classifier",), "SEQ_CLS"),
    ("roberta", "query", ("classifier.out_proj",), None),
    ("modernbert", "Wqkv", ("classifier",), "SEQ_CLS"),
    ("vit", "all-linear", ("classifier",), None),
    ("wav2vec2", "q_proj", (), None),
]


@pytest.mark.parametrize(("name", "targets", "whole", "task"), CASES)
def test_the_class_that_the_file_names_works(name: str, targets, whole, task: str | None, tmp_path: Path) -> None:
    architecture = ARCHITECTURES[name]
    model = architecture.make()
    lorakit.attach(model, targets, rank=2, also_train=whole)
    train_a_little(model)
    expected = architecture.run(model).detach()
    assert extract(model).task_type == task
    lorakit.save(model, tmp_path)
    theirs = load_in_peft(architecture.make(), tmp_path)
    torch.testing.assert_close(architecture.run(theirs), expected, atol=1e-5, rtol=1e-5)


def test_a_name_alone_makes_no_task() -> None:
    class TinyForCausalLM(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.q_proj(x)

    model = TinyForCausalLM()
    lorakit.attach(model, "q_proj")
    assert extract(model).task_type is None
