"""The merged model in memory: onto which base an adapter is folded, and how near the result is to base + adapter.

An adapter that was trained on a quantised base has two bases to be folded into: the original weights, and the quantised
ones as numbers (dequantised), which the adapter was trained beside. Neither gives quite what base + adapter gave: the
original weights are others, and the sum with the dequantised ones is rounded once more. So both are made and asked the
same held-out rows, and the nearer one is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from ..core.attach import detach, mergeable_layers, trained_whole
from ..core.dequantize import dequantize
from ..core.errors import LoraError
from ..core.quantised import is_quantised
from ..core.switching import merge
from .adapter_folder import base_and_adapter, beside
from .config import Quantize, TrainConfig
from .data import Example, read_data
from .generation import answers
from .models import Loaded, load_with_adapter
from .positions import longest_row
from .prepare import fields_of
from .settings import recorded
from .style import Style
from .task import Task, model_task
from .tokens import encode_all, encode_text, prompt_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Onto = Literal["original", "dequantised"]
_ROWS, _TOKENS, _NEW_TOKENS = 16, 512, 64


@dataclass(frozen=True)
class Difference:
    """Logits and answers of a merged model against base + adapter."""

    largest: float  # absolute, of a logit
    relative: float  # to the largest logit
    same_choice: float  # share of positions with the same likeliest token or class
    same_answers: float | None = None  # share of equal greedy answers; None if nothing was asked

    def __str__(self) -> str:
        said = (
            f"largest logit difference {self.largest:.3g} ({self.relative:.2g} of the largest logit), "
            f"same choice at {self.same_choice:.1%} of the positions"
        )
        return said if self.same_answers is None else f"{said}, {self.same_answers:.0%} of the greedy answers equal"

    @property
    def distance(self) -> tuple[float, float]:
        """What orders merged models: the share of other answers, then the logits."""
        return (0.0 if self.same_answers is None else 1 - self.same_answers, self.largest)


@dataclass(frozen=True)
class HeldOut:
    """Rows to compare models on, as token ids. source: where they come from. prompts: what can be answered."""

    source: str
    rows: Sequence[list[int]]
    prompts: Sequence[list[int]] = ()


class Reference:
    """What a model says to held-out rows: their logits, and its answers to their prompts."""

    def __init__(self, loaded: Loaded, heldout: HeldOut) -> None:
        self.heldout = heldout
        self._logits = [logits_of(loaded.model, row) for row in heldout.rows]
        self._answers = _answers(loaded, heldout)

    def difference(self, loaded: Loaded) -> Difference:
        largest = top = same = positions = 0.0
        for row, expected in zip(self.heldout.rows, self._logits, strict=True):
            found = logits_of(loaded.model, row)
            largest = max(largest, float((expected - found).abs().max()))
            top = max(top, float(expected.abs().max()))
            same += float((expected.argmax(-1) == found.argmax(-1)).sum())
            positions += expected[..., 0].numel()
        share = None
        if self._answers:
            equal = sum(map(str.__eq__, self._answers, _answers(loaded, self.heldout)))
            share = equal / len(self._answers)
        return Difference(largest, largest / max(top, 1e-12), same / positions, share)


@dataclass(frozen=True)
class MergedModel:
    """A plain model with the adapter in its weights. reference: what it is to say once it is written. tried: the bases
    of a quantised model, and how far each is from base + adapter. updates: how many the adapter has; unmoved: how many
    of them changed no number of their weight.
    """

    loaded: Loaded
    reference: Reference
    tried: dict[Onto, Difference]
    updates: int
    unmoved: int
    onto: Onto = "original"


def merged_model(
    model: str,
    adapter: str | None,
    *,
    dtype: str,
    quantize: Quantize,
    onto: Onto | None = None,
    data: str | None = None,
) -> MergedModel:
    """Load `model`, fold `adapter` into it, and compare with base + adapter as it was trained.

    quantize: how the base was quantised in training. onto: None takes the nearer one. data: rows to compare on; by
    default those that training held out for a quantised base, random tokens for a plain one.

    Raises LoraError if the base that `onto` names is not there, or if the merged model is the base model.
    """
    base, folder = base_and_adapter(model, adapter)
    assert folder is not None, "the caller has asked"
    trained = load_with_adapter(model, adapter, dtype=dtype, quantize=quantize)
    packed = any(is_quantised(module) for module in trained.model.modules())
    if onto == "dequantised" and not packed:
        raise LoraError(
            f"--onto dequantised: {model} is not quantised, and the adapter was not trained on such a base."
        )
    if onto == "original" and packed and quantize == "none":
        raise LoraError(
            f"--onto original: {model} is quantised in its files. Name the original model: --model ORIGINAL --adapter "
            f"{adapter or model}"
        )
    asks = packed or data is not None
    heldout = heldout_rows(trained, folder, data, model_task(base, folder)) if asks else random_rows(trained)
    reference = Reference(trained, heldout)
    tried: dict[Onto, Difference] = {}
    updates, whole = len(mergeable_layers(trained.model)), bool(trained_whole(trained.model)[0])
    unmoved: dict[Onto, int] = {}

    def original() -> Loaded:
        loaded = load_with_adapter(model, adapter, dtype=dtype)
        unmoved["original"] = bake_layers(loaded.model)
        tried["original"] = reference.difference(loaded)
        return loaded

    def dequantised() -> Loaded:
        dequantize(trained.model)
        unmoved["dequantised"] = bake_layers(trained.model)
        tried["dequantised"] = reference.difference(trained)
        return trained

    if not packed:
        still = bake_layers(trained.model)
        if still == updates and not whole:
            here = str(trained.model.dtype).removeprefix("torch.")
            raise LoraError(
                f"{folder} changes no weight of {base} in {here}: the merged model would be the base model. The "
                "adapter was not trained, or its updates are smaller than the last digit of the weights "
                "(--dtype float32 keeps them)."
            )
        return MergedModel(trained, reference, {}, updates, still)
    if onto is None and quantize != "none":
        original()  # only measured: it is loaded again if it is the nearer one
    loaded = original() if onto == "original" else dequantised()
    nearest = min(tried, key=lambda name: tried[name].distance)
    if onto is None and nearest == "original":
        loaded = original()
    return MergedModel(loaded, Reference(loaded, heldout), tried, updates, unmoved[nearest], nearest)


def bake_layers(model: PreTrainedModel) -> int:
    """Merge and detach one layer after the other, so that no more than one weight is held twice.

    Returns how many updates changed no number of their weight.
    """
    *others, last = mergeable_layers(model).values()
    unmoved = 0
    for layer in (*others, last):
        before = layer.own_weight
        merge(layer)
        unmoved += torch.equal(before, layer.own_weight)
        if layer is not last:
            detach(layer)
    detach(model)  # with a layer merged: a head trained whole keeps its trained values
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    if outputs is not None and inputs.weight is not outputs.weight:
        # Otherwise a reload would tie them again and undo the merge of one of the two.
        model.config.get_text_config().tie_word_embeddings = False
        model.config.tie_word_embeddings = False
    return unmoved


@torch.inference_mode()
def logits_of(model: PreTrainedModel, row: list[int]) -> torch.Tensor:
    """The logits for one row of token ids, float32, on the CPU."""
    ids = torch.tensor([row], device=model.device)
    logits: torch.Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return logits[0].float().cpu()


def random_rows(loaded: Loaded) -> HeldOut:
    """Four rows of random tokens."""
    vocabulary = min(loaded.model.config.get_text_config().vocab_size, len(loaded.tokenizer))
    length = longest_row(32, loaded.model, loaded.tokenizer)
    ids = torch.randint(0, vocabulary, (4, length), generator=torch.Generator().manual_seed(0))
    return HeldOut("random tokens", ids.tolist())


def heldout_rows(loaded: Loaded, adapter: str, data: str | None, task: Task) -> HeldOut:
    """The first rows that training held out, or those of the file `data`. Random tokens if there is neither."""
    settings = beside(adapter, "config.yaml")
    names = [name for name in TrainConfig.__dataclass_fields__ if name.endswith("_field")]
    found = {} if settings is None else recorded(TrainConfig, settings, [*names, "data", "holdout", "seed"])
    own = data or found.get("data")
    try:
        config = TrainConfig(model="", output_dir="", **{**found, "data": own or ""})
        rows = read_data(own or "", fields=fields_of(config), holdout=config.holdout, seed=config.seed, model=task)
    except (OSError, LoraError):
        if data is not None:
            raise
        return random_rows(loaded)  # the data that it was trained on is no longer there
    style = Style.recorded(adapter, loaded.tokenizer)
    examples = (rows.heldout[1] or rows.train)[:_ROWS]
    limit = longest_row(_TOKENS, loaded.model, loaded.tokenizer)
    if not task.answers:
        texts = [encode_text(example, loaded.tokenizer, limit)["input_ids"] for example in examples]
        return HeldOut(str(own), texts)
    encoded = encode_all(
        examples, loaded.tokenizer, max_length=limit, too_long="truncate", system=style.system, chat=style.chat
    )
    return HeldOut(str(own), [row.input_ids for row in encoded.rows], _prompts(loaded, examples, style, limit))


def _prompts(loaded: Loaded, examples: Sequence[Example], style: Style, limit: int) -> list[list[int]]:
    asked = [example for example in examples if example.text is None]
    prompts = [prompt_ids(example, loaded.tokenizer, system=style.system, chat=style.chat) for example in asked]
    return [prompt for prompt in prompts if len(prompt) + _NEW_TOKENS <= limit]


def _answers(loaded: Loaded, heldout: HeldOut) -> list[str]:
    return list(answers(loaded, list(heldout.prompts), max_new_tokens=_NEW_TOKENS)) if heldout.prompts else []
