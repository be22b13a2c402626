"""The settings of `lorakit train`, each declared once; `settings.py` makes flags, files and help of them.

Nothing heavy is imported here: `lorakit --help` reads this file.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Literal

from ..core.errors import LoraError
from ..core.numbers import size_in
from .settings import UsageError, check_settings, setting

_DATA, _ADAPTER, _TRAINING, _OUTPUT = "model and data", "adapter", "training", "output"

Quantize = Literal["none", "nf4", "int8", "gguf"]
# By what held-out rows are judged. `scores.py` has all but the loss, and some more.
Judged = Literal["loss", "exact-match", "bleu", "rouge-l", "accuracy", "f1", "micro-f1", "exact-set", "pearson"]
QUANTIZE = "quantise the frozen weights: nf4 (4 bits) or int8 by bitsandbytes; gguf: keep the blocks of a GGUF file"


@dataclass(frozen=True)
class TrainConfig:
    """Everything that `lorakit train` takes."""

    given: ClassVar[frozenset[str]] = frozenset()  # of one that flags and a file made: the settings that they hold

    model: str = setting(
        help="base model: a folder, a .gguf file or a hub id",
        group=_DATA,
        example="path/to/model",
        aliases=("model-name-or-path",),
        path=True,
    )
    data: str = setting(
        help="jsonl, json, csv, parquet or txt file; a folder with train|valid|test files; or a hub id. Several are "
        "separated by commas, or --data is given again; name=0.3 reads three tenths of the rows, name=2 all twice",
        group=_DATA,
        example="data.jsonl",
        aliases=("dataset-name",),
        path=True,
        many=True,
    )
    output_dir: str = setting(
        help="folder for the adapter, its settings and its report",
        group=_OUTPUT,
        example="out",
        aliases=("o",),
        path=True,
    )
    task: Literal["auto", "causal-lm", "classification", "regression"] = setting(
        "auto", help="kind of task; auto: chosen by the data", group=_DATA
    )
    system: str | None = setting(None, help="system message put before conversations that have none", group=_DATA)
    plain: bool = setting(False, help="do not wrap prompts in the model's chat template", group=_DATA)
    prompt_field: str | None = setting(None, help="the data's key for the prompt", group=_DATA)
    completion_field: str | None = setting(None, help="the data's key for the completion", group=_DATA)
    text_field: str | None = setting(None, help="the data's key for the text (two, with a comma: a pair)", group=_DATA)
    label_field: str | None = setting(None, help="the data's key for the label", group=_DATA)
    messages_field: str | None = setting(None, help="the data's key for the messages", group=_DATA)
    train_on: Literal["all", "last", "field"] = setting(
        "all",
        help='assistant turns of a conversation that are learnt: all, the last, or those with "weight": 1',
        group=_DATA,
    )
    class_weights: str | None = setting(
        None,
        help="how much each class counts in a classifier's loss: balanced (the rarer, the more), or numbers, a=1,b=3",
        group=_DATA,
        many=True,
    )
    max_seq_length: int = setting(1024, help="longest row in tokens", group=_DATA, at_least=2)
    too_long: Literal["drop", "truncate"] = setting(
        "drop", help="what happens to rows longer than max-seq-length", group=_DATA
    )
    packing: bool = setting(
        False,
        help="put short rows behind one another, up to max-seq-length, without letting one see another; batch-size "
        "then counts these packs",
        group=_DATA,
    )
    holdout: float = setting(
        0.05,
        help="share of the training rows held out when the data has no other split",
        group=_DATA,
        at_least=0,
        below=1,
    )

    from_adapter: str | None = setting(
        None,
        help="folder of an adapter to go on with: its factors, rank and targets",
        group=_ADAPTER,
        aliases=("from",),
        path=True,
    )
    rank: int = setting(16, help="r, the rank of the update", group=_ADAPTER, aliases=("lora-r",), at_least=1)
    alpha: float = setting(
        32.0,
        help="numerator of the scale alpha/r",
        group=_ADAPTER,
        aliases=("lora-alpha",),
        above=0,
        at_most=1e6,
    )
    dropout: float = setting(
        0.0,
        help="dropout probability on the input of the update",
        group=_ADAPTER,
        aliases=("lora-dropout",),
        at_least=0,
        below=1,
    )
    targets: tuple[str, ...] = setting(
        ("all-linear",),
        help="modules to adapt: all-linear, all-linear+experts, ends of names, globs; separated by commas",
        group=_ADAPTER,
        aliases=("target-modules",),
    )
    exclude: tuple[str, ...] = setting(
        (),
        help="modules to leave out of the targets: ends of names, globs",
        group=_ADAPTER,
        aliases=("exclude-modules",),
    )
    rslora: bool = setting(False, help="use the scale alpha/sqrt(r) in place of alpha/r", group=_ADAPTER)
    dora: bool = setting(False, help="also learn the magnitude of each output row (DoRA)", group=_ADAPTER)
    init: Literal["kaiming", "gaussian", "pissa", "olora"] = setting(
        "kaiming", help="how the factors A and B are initialised", group=_ADAPTER
    )
    bias: Literal["none", "lora_only", "all"] = setting("none", help="which biases to train", group=_ADAPTER)
    also_train: tuple[str, ...] = setting((), help="modules to train in full, separated by commas", group=_ADAPTER)
    new_tokens: tuple[str, ...] = setting(
        (),
        help="tokens to add to the vocabulary, separated by commas; their rows of the embedding and of the head are "
        "trained",
        group=_ADAPTER,
    )

    epochs: float = setting(
        3.0, help="passes over the data", group=_TRAINING, aliases=("num-train-epochs",), above=0, at_most=1e6
    )
    max_steps: int | None = setting(None, help="stop after this many steps", group=_TRAINING, at_least=1)
    batch_size: int = setting(
        8, help="rows per step on each device", group=_TRAINING, aliases=("per-device-train-batch-size",), at_least=1
    )
    gradient_accumulation_steps: int = setting(
        1, help="batches whose gradients are added for one step", group=_TRAINING, at_least=1
    )
    learning_rate: float = setting(
        2e-4, help="peak learning rate", group=_TRAINING, aliases=("lr",), above=0, at_most=1e30
    )
    scheduler: Literal["linear", "cosine", "constant"] = setting(
        "linear", help="how the learning rate falls after its peak", group=_TRAINING
    )
    warmup_ratio: float = setting(
        0.03,
        help="share of the steps in which the learning rate rises to its peak",
        group=_TRAINING,
        at_least=0,
        below=1,
    )
    sweep: str | None = setting(
        None,
        help="settings to train on the same rows, and keep the best of: 'learning_rate=1e-4,3e-4 rank=4,16'",
        group=_TRAINING,
    )
    auto: str | None = setting(
        None,
        help="budget in which to search the learning rate and the rank, as far as they are not given, by the held-out "
        "loss: 30m, 2h, or '12 runs'",
        group=_TRAINING,
    )
    weight_decay: float = setting(0.0, help="weight decay of AdamW", group=_TRAINING, at_least=0, at_most=1000)
    gradient_checkpointing: bool = setting(
        False, help="recompute activations in the backward pass: less memory, more time", group=_TRAINING
    )
    fit: str | None = setting(
        None,
        help="memory that the plan may need, such as 24GB, or auto: what is free. Chooses batch-size, "
        "gradient-accumulation-steps, gradient-checkpointing and quantize, as far as they are not given",
        group=_TRAINING,
    )
    ignore_memory: bool = setting(
        False, help="start even if the plan needs more memory than the machine has", group=_TRAINING
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "auto", help="dtype of the base weights; auto: bfloat16 if the device is fast at it", group=_TRAINING
    )
    quantize: Quantize = setting("none", help=QUANTIZE, group=_TRAINING)
    seed: int = setting(0, help="random seed", group=_TRAINING, at_least=0, at_most=2**32 - 1)

    eval_steps: int | None = setting(
        None, help="steps between held-out losses (default: an epoch)", group=_OUTPUT, at_least=1
    )
    metric: Judged = setting(
        "loss",
        help="what held-out rows are judged by; all but loss answer or predict eval-samples of them at each evaluation",
        group=_OUTPUT,
    )
    patience: int | None = setting(
        None, help="stop after this many evaluations in a row without a better metric", group=_OUTPUT, at_least=1
    )
    keep: Literal["last", "best"] = setting(
        "last", help="which adapter the run ends with: the last one, or that of the best evaluation", group=_OUTPUT
    )
    save_steps: int | None = setting(
        None, help="steps between checkpoints (default: an epoch)", group=_OUTPUT, at_least=1
    )
    logging_steps: int = setting(10, help="steps between lines of metrics.jsonl", group=_OUTPUT, at_least=1)
    eval_samples: int = setting(100, help="number of held-out rows to compare at the end", group=_OUTPUT, at_least=0)
    general_data: str | None = setting(
        None,
        help="file of plain text that is not trained on; its perplexity before and after shows what was forgotten",
        group=_OUTPUT,
        path=True,
    )
    max_new_tokens: int | None = setting(
        None,
        help="longest answer in tokens (default: 16 more than the longest expected one)",
        group=_OUTPUT,
        at_least=1,
    )
    report_to: tuple[str, ...] | None = setting(
        None,
        help="trackers to report to, by transformers' names: tensorboard (events in OUT/runs), wandb, …",
        group=_OUTPUT,
    )
    resume: str | None = setting(
        None,
        help="checkpoint to continue from; auto: the newest complete one, if there is one",
        group=_OUTPUT,
        path=True,
    )
    overwrite: bool = setting(False, help="replace the run in --output-dir when the new one is complete", group=_OUTPUT)
    dry_run: bool = setting(False, help="check and plan only, without training", group=_OUTPUT)

    def __post_init__(self) -> None:
        check_settings(self)
        if self.fit not in (None, "auto"):
            try:
                size_in(self.fit)
            except LoraError as error:
                raise UsageError(f"--fit: {error}; auto takes what is free.") from None


def is_given(config: TrainConfig, name: str) -> bool:
    """Whether a setting was chosen: by a flag or a file, or by a value other than the default."""
    default = {own.name: own for own in dataclasses.fields(TrainConfig)}[name]
    usual = default.default_factory() if default.default_factory is not dataclasses.MISSING else default.default
    value = getattr(config, name)
    return value is not None and (name in config.given or value != usual)


def warnings_for(config: TrainConfig) -> list[str]:
    """Warnings about settings that are allowed but seldom intended."""
    if config.learning_rate < 2e-5:
        return [
            f"learning rate {config.learning_rate:g} is what full fine-tuning uses; LoRA's factor B starts at zero and "
            "needs about ten times more: 1e-4 to 5e-4."
        ]
    if config.learning_rate > 5e-3:
        return [f"learning rate {config.learning_rate:g} is far above LoRA's usual 1e-4 to 1e-3; expect divergence."]
    return []
