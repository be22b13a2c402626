"""Before training: read and check every row, show one, and plan the run. No weight is loaded."""

from __future__ import annotations

import dataclasses
import heapq
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ..core.attach import attach
from ..core.errors import LoraError
from ..core.report import Report
from ..core.settings import LoRASettings
from .auto_settings import AutoSearch, auto_search
from .bars import progress
from .class_weights import class_weights
from .config import Quantize, TrainConfig
from .continuing import begin_with, in_names_of, planned, taken_over
from .data import Data, Example, read_data
from .fit import fitted
from .gradient_checkpointing import begin_checkpointing
from .labels import MULTI_LABEL
from .loss import Labelled, frozen_head, label_losses, labelled
from .models import best_device, has_fast_bfloat16, load_tokenizer, skeleton
from .own_run import OwnRun, Rows, most_tokens
from .packing import packed
from .plan import Plan, make_plan, processes
from .positions import check_vocabulary, longest_row
from .preflight import check_metric, check_reporters, exceeds_memory
from .quantize import heads, weight_bytes
from .rows import DataError
from .settings import UsageError
from .spool import Spool, picked, viewed
from .style import Style
from .sweep_settings import refuse_chosen, swept, unshared
from .task import in_model_order, model_task
from .tokens import Tokens, encode_all, encode_text
from .vocabulary import add_tokens, grow, trained_tables, trained_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Prepared:
    """A run whose data and settings were checked."""

    config: TrainConfig
    data: Data
    tokenizer: PreTrainedTokenizerBase
    style: Style
    train: Rows  # input_ids and labels (or label) of each row
    valid: Rows
    limit: int  # longest row in tokens: that of the settings, or the model's positions if fewer
    notes: tuple[str, ...]
    attached: Report
    plan: Plan
    general: tuple[Example, ...]  # the rows of --general-data
    weights: tuple[int, int]  # bytes of the base as it is loaded, and of the same with no layer quantised
    fit: tuple[str, ...]  # what --fit chose and why
    class_weights: tuple[float, ...] | None  # of each class in the loss; None: all count alike
    new_tokens: tuple[int, ...]  # the tokens whose rows are trained
    learners: Mapping[str, OwnRun]  # of each adapter, if rows name the one that learns them
    search: AutoSearch | None = None
    one_pass: bool = False  # whether several adapters can be trained in one batch

    @property
    def tokens(self) -> int:
        return _tokens(self.train)

    def settings_on(self, model: nn.Module, config: TrainConfig) -> LoRASettings:
        """What `config` asks `attach` for, on this run's model."""
        return lora_settings(config, model, self.new_tokens, new_head=self.data.task != "causal-lm")


def prepare(config: TrainConfig, begun: Mapping[str, Any] | None = None) -> Prepared:
    """Read and check all the data, and plan the run on a model without weights.

    begun: the settings of the run that this one goes on with, from which --fit takes what it chose then. Raises
    DataError listing every bad row, and ValueError for settings that do not fit the model or the data.
    """
    check_reporters(config.report_to or ())
    choices, search = swept(config), auto_search(config)
    given, (config, adapter) = config, taken_over(config)
    data = read_data(
        config.data,
        fields=fields_of(config),
        task=config.task,
        holdout=config.holdout,
        seed=config.seed,
        train_on=config.train_on,
        model=None if config.from_adapter is None else model_task(config.model, config.from_adapter),
        adapters=None,
    )
    if data.adapters:
        _refuse_learners(config)
    check_task(config, data)
    _refuse_float16(config, data)
    if data.labels and config.from_adapter is None:
        data = dataclasses.replace(data, labels=in_model_order(data.labels, config.model))
    weights_of_classes = class_weights(config.class_weights, data)
    general = _general(config, data)
    tokenizer = load_tokenizer(config.model)
    new_tokens = add_tokens(tokenizer, config.new_tokens)
    if adapter is not None and sorted(new_tokens) != trained_tokens(adapter):
        raise LoraError(
            f"--from-adapter {config.from_adapter}: the tokenizer of {config.model} has other numbers for "
            f"{', '.join(config.new_tokens)}, so the adapter was trained on another base."
        )
    style = Style.of_rows(data.train, tokenizer, plain=config.plain, system=config.system)
    dtype = weights_dtype(config, data)

    def laid_out(quantize: Quantize) -> PreTrainedModel:
        several = data.task == MULTI_LABEL
        made = skeleton(config.model, labels=labels_of(data), multi_label=several, dtype=dtype, quantize=quantize)
        grow(made, max(new_tokens, default=-1) + 1)
        return made

    with FakeTensorMode() as fake:
        model = laid_out(config.quantize)
        weights = weight_bytes(model)
    notes = list(data.notes)
    if weights_of_classes is not None:
        listed = (f"{label} {weight:.4g}" for label, weight in zip(data.labels, weights_of_classes, strict=True))
        notes.append(f"weights of the classes in the loss: {', '.join(listed)}")
    limit = longest_row(config.max_seq_length, model, tokenizer)
    if config.train_on != "all" and not {"messages", "conversations"} & set(data.shape.split(" | ")):
        raise LoraError(
            f"--train-on {config.train_on} chooses turns of conversations, and {config.data} holds {data.shape} rows."
        )
    rows = _causal_rows if data.task == "causal-lm" else _labelled_rows
    train, valid = rows(config, data, tokenizer, style, limit, notes)
    if not train:
        remedy = "shorten them, or cut them with --too-long truncate"
        if limit == config.max_seq_length:
            remedy = f"raise --max-seq-length {limit}"
        raise LoraError(f"no row of {config.data} is left to train on: all are over {limit} tokens; {remedy}.")
    notes += _new_tokens(config.new_tokens, new_tokens, train)
    check_vocabulary(itertools.chain(train, valid), model, tokenizer)
    check_metric(config, data, len(valid))
    if search and not valid:
        raise LoraError(
            f"--auto compares held-out losses, and {config.data} has no held-out rows; add a valid file, or --holdout "
            "above 0."
        )
    if data.adapters and data.task != "causal-lm":
        raise UsageError(
            "rows that name their adapter are for language models: a classifier's head is shared by all rows."
        )
    if (choices or search or data.adapters) and processes() > 1:
        what = "rows that name their adapter are" if data.adapters else "--auto is" if search else "--sweep is"
        raise UsageError(f"{what} for one process.")
    one_pass = data.task == "causal-lm" and not unshared(config)
    if search and not one_pass:
        search = dataclasses.replace(search, at_once=1)
    learners = {}
    for name in data.adapters:
        learners[name] = own_run = OwnRun(
            config, config.learning_rate, config.seed, _rows_of(train, name), _rows_of(valid, name)
        )
        if not own_run.train:
            raise LoraError(f"no row of {config.data} is left for {name}: all are over {limit} tokens.")
    if config.packing:
        if data.task != "causal-lm":
            raise LoraError("--packing is for language models: a classifier gives one answer for each text.")
        packs = packed(train, limit)
        full = _tokens(packs) / (len(packs) * limit)
        notes.append(f"{len(train)} rows in {len(packs)} packs of at most {limit} tokens, {full:.0%} full")
        train = packs
    from . import trainers  # noqa: F401  planned memory includes the libraries that training needs

    longest = _longest(train, config.batch_size)
    counts = max((len(own.train) for own in learners.values()), default=len(train)), _tokens(train)
    together = (search.at_once if search else len(choices) or len(learners)) if one_pass else 0
    largest = max(choices.values(), key=lambda own: own.rank, default=config)
    if search:
        largest = dataclasses.replace(config, rank=search.largest)
    if adapter is not None:
        adapter = in_names_of(model, adapter)

    def adapted(own: TrainConfig, model: PreTrainedModel) -> tuple[TrainConfig, Report]:
        if adapter is not None:
            return planned(own, model, adapter, given)
        # The init does not change shapes, but may double the work here (some decompose each weight).
        plain = dataclasses.replace(largest, init="kaiming")
        return own, attach_as(plain, model, new_tokens, new_head=data.task != "causal-lm")

    quantised = config.quantize
    with fake:
        config, attached = adapted(config, model)

    def plan_with(own: TrainConfig) -> Plan:
        nonlocal model, weights, attached, quantised
        batch = _largest_batch(own, data, longest[: own.batch_size], together)
        with fake:
            if own.quantize != quantised:  # all else is planned on the same model
                quantised = own.quantize
                model = laid_out(quantised)
                weights = weight_bytes(model)
                _, attached = adapted(own, model)
            plan = _plan(own, data, counts, model, _faked(batch, fake))
            return plan.with_adapters(model, max(together - 1, 0))

    said: tuple[str, ...] = ()
    if config.fit is None:
        plan = plan_with(config)
        while search and search.at_once > 1 and exceeds_memory(plan):
            together -= 1
            search = dataclasses.replace(search, at_once=together)
            plan = plan_with(config)
    else:
        config, plan, said = fitted(
            config,
            plan_with,
            given=given,
            can_checkpoint=model.supports_gradient_checkpointing,
            can_quantise=weights[0] == weights[1] and not _trains_weights(config, data),
            begun=begun,
        )
    return Prepared(
        config,
        data,
        tokenizer,
        style,
        train,
        valid,
        limit,
        tuple(notes),
        attached,
        plan,
        general,
        weights,
        said,
        weights_of_classes,
        new_tokens,
        learners,
        search,
        one_pass,
    )


def adapt(config: TrainConfig, model: nn.Module, new_tokens: Sequence[int], *, new_head: bool) -> None:
    """Adapt the model as the run begins: with new factors, or with those of an adapter.

    new_tokens, new_head: as for `attach_as`.
    """
    if config.from_adapter is not None:
        begin_with(config, model)
    else:
        attach_as(config, model, new_tokens, new_head=new_head)


def attach_as(config: TrainConfig, model: nn.Module, new_tokens: Sequence[int], *, new_head: bool) -> Report:
    """`attach` with a run's settings. new_tokens: tokens whose rows are trained. new_head: also train the modules
    beside the base model (a head) in full.
    """
    return attach(model, lora_settings(config, model, new_tokens, new_head=new_head))


def lora_settings(config: TrainConfig, model: nn.Module, new_tokens: Sequence[int], *, new_head: bool) -> LoRASettings:
    """The settings with which `attach_as` attaches."""
    whole = [*config.also_train, *(heads(model) if new_head else [])]
    rows = trained_tables(model, new_tokens)
    # The configuration's dtype is that of the base weights.
    return dataclasses.replace(LoRASettings.of(config), dtype=None, also_train=whole, trainable_tokens=rows)


def weights_dtype(config: TrainConfig, data: Data) -> str:
    """The dtype of the base weights. For "auto": bfloat16 if it is fast and all of them stay frozen, else float32."""
    if config.dtype != "auto":
        return config.dtype
    return "bfloat16" if has_fast_bfloat16(best_device()) and not _trains_weights(config, data) else "float32"


def _trains_weights(config: TrainConfig, data: Data) -> bool:
    """Whether weights of the base model's dtype are trained: a new head, modules in full, biases."""
    return data.task != "causal-lm" or bool(config.also_train) or config.bias != "none"


def _refuse_float16(config: TrainConfig, data: Data) -> None:
    """Raise ValueError for trained weights in float16. Small steps vanish there, and a loss scaler refuses them."""
    if config.dtype == "float16" and _trains_weights(config, data):
        what = "a new head" if data.task != "causal-lm" else "--also-train" if config.also_train else "--bias"
        raise LoraError(
            f"--dtype float16 with {what}: weights that are trained in full would be float16, which cannot hold an "
            "optimizer's small steps. Take --dtype bfloat16 or float32."
        )


def uses_autocast(config: TrainConfig, data: Data) -> bool:
    """Whether products of float32 weights are computed in bfloat16. With --dtype float32 they are not."""
    return config.dtype == "auto" and weights_dtype(config, data) == "float32" and has_fast_bfloat16(best_device())


def labels_of(data: Data) -> tuple[str, ...] | None:
    """The classes of a classifier (none for a regression), or None for a language model."""
    return None if data.task == "causal-lm" else data.labels


def fields_of(config: Any) -> dict[str, str]:
    """The file's keys that the user mapped to roles: --prompt-field and the like."""
    roles = ("messages", "prompt", "completion", "text", "label")
    return {role: value for role in roles if (value := getattr(config, f"{role}_field"))}


def check_task(config: Any, data: Data) -> None:
    """Raise ValueError if the data is of another task than the settings ask for."""
    if config.task not in ("auto", data.task):
        raise LoraError(
            f"--task {config.task} does not fit {config.data}, which holds {data.shape} rows ({data.task})."
        )


def _general(config: TrainConfig, data: Data) -> tuple[Example, ...]:
    """The rows of --general-data, at most --eval-samples. Raises ValueError for rows that are no plain text."""
    if config.general_data is None:
        return ()
    if data.task != "causal-lm":
        raise LoraError(f"--general-data: a model for {data.task} has no perplexity; leave it out.")
    found = read_data(config.general_data, holdout=0.0)
    if any(example.text is None or example.label is not None for example in found.train):
        raise LoraError(f"--general-data {config.general_data} holds {found.shape} rows; expected plain text.")
    if not config.eval_samples:
        raise LoraError("--general-data with --eval-samples 0 leaves no row to read.")
    return tuple(found.train[: config.eval_samples])


def _causal_rows(
    config: TrainConfig, data: Data, tokenizer: PreTrainedTokenizerBase, style: Style, limit: int, notes: list[str]
) -> tuple[Rows, Rows]:
    """The rows of train and valid. Raises DataError listing the bad rows of both."""
    problems: list[str] = []
    parts: list[Rows] = []
    dropped = truncated = 0
    said: list[str] = []
    for examples in (data.train, data.valid):
        try:
            encoded = encode_all(
                examples,
                tokenizer,
                max_length=limit,
                too_long=config.too_long,
                system=style.system,
                chat=style.chat,
                chosen=config.train_on != "all",
            )
        except DataError as error:
            problems += error.problems
            continue
        dropped += encoded.dropped
        truncated += encoded.truncated
        said += encoded.notes
        parts.append(viewed(encoded.rows, _row_of))
    if problems:
        raise DataError(problems)
    over = f"{_limit(config, limit)}, --too-long {config.too_long}"
    if dropped:
        notes.append(f"{dropped} rows over {over}: left out")
    if truncated:
        notes.append(f"{truncated} rows over {over}: cut")
    notes += dict.fromkeys(said)
    train, valid = parts
    return train, valid


def _row_of(row: Tokens) -> dict[str, Any]:
    own = {"input_ids": row.input_ids, "labels": row.labels}
    return own if row.adapter is None else {**own, "adapter": row.adapter}


def _rows_of(rows: Rows, adapter: str) -> Rows:
    """The rows that name this adapter."""
    places = [place for place, row in enumerate(rows) if row["adapter"] == adapter]
    return viewed(picked(rows, places), lambda row: {name: value for name, value in row.items() if name != "adapter"})


def _refuse_learners(config: TrainConfig) -> None:
    """Raise UsageError for settings that rows which name their adapters cannot have."""
    what = 'a row that names its adapter ("adapter": …)'
    if config.sweep is not None or config.auto is not None:
        flag = "--auto" if config.sweep is None else "--sweep"
        raise UsageError(f"{flag} trains every adapter on all rows, and {config.data} holds {what}; leave it out.")
    if config.general_data is not None:
        raise UsageError(f"--general-data is read by one adapter, and {config.data} holds {what}; leave it out.")
    if config.resume is not None:
        raise UsageError(f"a run with {what} has no checkpoints, so there is nothing to --resume.")
    refuse_chosen(config, what)
    if flags := unshared(config):
        raise UsageError(
            f"{what} is learnt in one batch with other rows, which is not possible with {flags}: leave that out."
        )


def _labelled_rows(
    config: TrainConfig, data: Data, tokenizer: PreTrainedTokenizerBase, style: Style, limit: int, notes: list[str]
) -> tuple[Rows, Rows]:
    """The rows of train and valid, each with its target."""
    full = 0

    def encoded(example: Example) -> dict[str, Any]:
        nonlocal full
        row = encode_text(example, tokenizer, limit)
        full += len(row["input_ids"]) == limit
        return {**row, "labels": target(example, data)}

    train, valid = (Spool(map(encoded, progress(part, "checking rows"))).settled() for part in (data.train, data.valid))
    if full:
        notes.append(f"{full} rows of {_limit(config, limit)} or more: what is beyond is cut")
    return train, valid


def target(example: Example, data: Data) -> int | float | list[float]:
    """What the loss compares with: the index of the class; 1.0 or 0.0 for each class (multi-label); or the number."""
    if isinstance(example.label, tuple):
        return [float(label in example.label) for label in data.labels]
    return data.labels.index(str(example.label)) if data.labels else float(example.label or 0.0)


def _new_tokens(texts: Sequence[str], tokens: Sequence[int], rows: Rows) -> list[str]:
    """Notes on the tokens that are added: their numbers, and which of them no row holds."""
    if not tokens:
        return []
    listed = ", ".join(f"{text} {token}" for text, token in zip(texts, tokens, strict=True))
    notes = [f"tokens whose rows are trained: {listed}"]
    missing = set(tokens)
    for row in rows:
        missing.difference_update(row["input_ids"])
        if not missing:
            return notes
    absent = ", ".join(text for text, token in zip(texts, tokens, strict=True) if token in missing)
    return [*notes, f"warning: no row holds {absent}, so nothing says what it means"]


def _limit(config: TrainConfig, limit: int) -> str:
    why = "--max-seq-length" if limit == config.max_seq_length else "all that the model has positions for"
    return f"{limit} tokens ({why})"


def _longest(rows: Rows, count: int) -> list[dict[str, Any]]:
    """The longest rows, the longest first."""
    places = enumerate(len(row["input_ids"]) for row in rows)
    largest = heapq.nlargest(count, places, key=lambda place: (place[1], place[0]))
    return [rows[index] for index, _ in largest]


def _largest_batch(config: TrainConfig, data: Data, longest: Rows, adapters: int) -> dict[str, Any]:
    """The largest batch that training can meet: the longest rows together, with their real labels.

    longest: as `_longest` returns them. adapters: of how many there may be rows in a batch; 0 for a run of one.
    """
    together = most_tokens(best_device()) // (len(longest) * len(longest[0]["input_ids"])) if adapters else 1
    longest = [*reversed(longest)] * int(min(max(together, 1), max(adapters, 1)))
    lengths = [len(row["input_ids"]) for row in longest]
    ids = torch.ones(len(longest), lengths[-1], dtype=torch.long)
    # Without padding, models skip the attention mask. With fake tensors they always make one, so the plan is a little
    # too large.
    batch: dict[str, Any] = {"input_ids": ids, "attention_mask": ids}
    if config.packing:
        batch = {"input_ids": ids, "position_ids": torch.arange(lengths[-1]).expand(len(longest), -1).contiguous()}
    if data.task != "causal-lm":
        return batch | {"labels": torch.tensor([row["labels"] for row in longest])}
    labels = [row["labels"] + [-100] * (lengths[-1] - len(row["labels"])) for row in longest]
    return batch | {"labelled": labelled(torch.tensor(labels))}


def _faked(batch: dict[str, Any], mode: FakeTensorMode) -> dict[str, Any]:
    """The batch as fake tensors on the device; called under `mode`."""

    def fake(tensor: Tensor) -> Tensor:
        return mode.from_tensor(tensor).to(best_device())

    return {
        name: fake(value) if isinstance(value, Tensor) else Labelled(*map(fake, vars(value).values()))
        for name, value in batch.items()
    }


def _plan(config: TrainConfig, data: Data, counts: tuple[int, int], model: Any, batch: dict[str, Any]) -> Plan:
    """counts: rows and tokens to train on."""
    if config.gradient_checkpointing:
        begin_checkpointing(model)
    model.train()
    where = batch.pop("labelled", None)

    def loss() -> Tensor:
        with torch.autocast(best_device().type, torch.bfloat16, enabled=uses_autocast(config, data)):
            if where is not None:
                return label_losses(where, model, batch, frozen_head(model)).sum()
            classified: Tensor = model(**batch).loss
            return classified

    return make_plan(model, loss, config, rows=counts[0], tokens=counts[1])


def _tokens(rows: Rows) -> int:
    return sum(len(row["input_ids"]) for row in rows)
