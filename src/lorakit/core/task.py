"""The `task_type` of a PEFT file: which of PEFT's model classes reads it.

Without a task type, PEFT uses its general class, which passes all arguments on. Its special classes do more, and not
every model allows that: they pass arguments of their own choice (Whisper has no `input_ids`), and those for
classification expect the trained head in the file. So a task is named only if its class works with the model.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection
from dataclasses import dataclass

from torch import nn

_HEADS = ("classifier", "score")
_ALWAYS = ("attention_mask", "inputs_embeds", "output_attentions", "output_hidden_states", "return_dict")
_DECODER = ("decoder_input_ids", "decoder_attention_mask", "decoder_inputs_embeds")


@dataclass(frozen=True)
class _Task:
    """One of PEFT's classes: what it passes to the model, and what it expects of the model and the file."""

    name: str
    inputs: tuple[str, ...] = ("input_ids", "labels")  # the model must know these by name
    passed: tuple[str, ...] = _ALWAYS  # and accept these
    heads: tuple[str, ...] = ()  # modules of these names are in the file
    generates: bool = False


_BY_ENDING = {
    "ForCausalLM": (causal := _Task("CAUSAL_LM", generates=True)),
    "LMHeadModel": causal,
    "ForConditionalGeneration": _Task(
        "SEQ_2_SEQ_LM", ("input_ids", "labels", "decoder_input_ids"), (*_ALWAYS, *_DECODER), generates=True
    ),
    "ForSequenceClassification": _Task("SEQ_CLS", heads=_HEADS),
    "ForTokenClassification": _Task("TOKEN_CLS", heads=_HEADS),
    "ForQuestionAnswering": _Task(
        "QUESTION_ANS", ("input_ids", "start_positions", "end_positions"), heads=("qa_outputs",)
    ),
}


def task_type(model: nn.Module, saved: Collection[str], adapted: Collection[str]) -> str | None:
    """PEFT's name for what the model does, or None. It is told from the class name that transformers gives such models.

    saved: names of the parameters that the file holds whole. adapted: names of the adapted layers.
    """
    name = type(model).__name__
    task = next((task for ending, task in _BY_ENDING.items() if name.endswith(ending)), None)
    if task is None or (task.generates and not callable(getattr(model, "prepare_inputs_for_generation", None))):
        return None
    known = inspect.signature(type(model).forward).parameters
    accepts_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
    if not known.keys() >= set(task.inputs) or not (accepts_all or known.keys() >= set(task.passed)):
        return None
    for path, module in model.named_modules():
        if path.rpartition(".")[2] in task.heads:
            prefix = f"{path}."
            whole = all(prefix + local in saved for local, _ in module.named_parameters())
            if not whole or any(f"{layer}.".startswith(prefix) for layer in adapted):
                return None
    return task.name
