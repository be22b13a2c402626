"""Answers from a causal language model: a batch at a time for scoring, or streamed for a person to read.

Only the caller's options decide the next token. From the model's generation_config.json only the end, beginning and
decoder-start tokens are used; its penalties, beams, lengths and forced tokens are ignored. An answer ends at each of
these: the configuration's end tokens, the tokenizer's, and the token that training puts after an answer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from queue import SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, Any

import torch

from ..core.errors import LoraError
from .data import Example
from .positions import positions
from .tokens import IGNORED, encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .models import Loaded

Within = Callable[[Sequence[int]], contextlib.AbstractContextManager[Any]]  # the indices of a batch → its context

_COLDEST = 1e-6  # a lower temperature means greedy: float32 cannot hold logits divided by it


def as_it_is(batch: Sequence[int]) -> contextlib.AbstractContextManager[Any]:
    """Every batch is computed with the model as it is."""
    return contextlib.nullcontext()


def room(loaded: Loaded, prompt: Sequence[int], wanted: int) -> int:
    """How many of `wanted` tokens an answer to this prompt can have. Raises ValueError if it can have none."""
    return _room(positions(loaded.model, loaded.tokenizer), prompt, wanted)


def _room(limit: int | None, prompt: Sequence[int], wanted: int) -> int:
    if limit is None:
        return wanted
    if len(prompt) >= limit:
        raise LoraError(f"the prompt has {len(prompt)} tokens, and this model has positions for {limit}: shorten it.")
    return min(wanted, limit - len(prompt))


@torch.inference_mode()
def answers(
    loaded: Loaded,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    batch_size: int = 16,
    search: Mapping[str, Any] | None = None,
    within: Within = as_it_is,
) -> Iterator[str]:
    """The answer to each prompt (token ids), in order. search: options of `generate` such as num_beams; None: greedy.
    within: the context in which the model runs for the prompts with these indices.

    Prompts of similar length share a batch, padded on the left, so that every answer starts at the same column. A
    prompt that leaves less room than `max_new_tokens` is answered alone, so that it does not shorten other answers.
    Raises ValueError for a prompt longer than the model's positions.
    """
    prompts = [_started(loaded, prompt) for prompt in prompts]
    limit = positions(loaded.model, loaded.tokenizer)
    rooms = [_room(limit, prompt, max_new_tokens) for prompt in prompts]
    done: dict[int, str] = {}
    following = 0
    for batch in _batches(prompts, rooms, max_new_tokens, batch_size):
        with within(batch):
            found = _answer_batch(loaded, [prompts[i] for i in batch], rooms[batch[0]], search or {})
        done.update(zip(batch, found, strict=True))
        while following in done:
            yield done.pop(following)
            following += 1


def stream(
    loaded: Loaded, prompt: list[int], *, max_new_tokens: int, temperature: float = 0.0, top_p: float = 1.0
) -> Iterator[str]:
    """Pieces of the answer as they are produced. temperature 0 is greedy.

    With temperature 0 the joined pieces are the answer that `answers` gives. Closing the iterator, or an interrupt
    while it waits, stops the generation. Raises ValueError for a prompt longer than the model's positions.
    """
    prompt = _started(loaded, prompt)
    limit = room(loaded, prompt, max_new_tokens)
    sampling: dict[str, Any] = {}
    if temperature >= _COLDEST:
        # top_k=0: by default transformers draws only from the 50 likeliest tokens
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    tokens = _Tokens()

    def run() -> None:
        try:
            with torch.inference_mode():
                _generate(loaded, [prompt], limit, {**sampling, "streamer": tokens, "stopping_criteria": [tokens.stop]})
        except BaseException as error:  # handed to the reader, which would otherwise wait for ever
            tokens.failure = error
        finally:
            tokens.end()

    thread = Thread(target=run, daemon=True)
    thread.start()
    try:
        yield from _pieces(loaded.tokenizer, tokens)
    finally:
        tokens.stopped = True
        thread.join()
    if tokens.failure is not None:
        raise tokens.failure


class _Tokens:
    """`generate`'s streamer: passes the tokens of one answer from the thread that makes them to the one that waits."""

    def __init__(self) -> None:
        self.stopped = False
        self.failure: BaseException | None = None
        self._queue: SimpleQueue[list[int] | None] = SimpleQueue()
        self._begun = False

    def put(self, value: torch.Tensor) -> None:
        if self._begun:  # the first tokens are the prompt
            self._queue.put(value.flatten().tolist())
        self._begun = True

    def end(self) -> None:
        self._queue.put(None)

    def stop(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self.stopped, device=input_ids.device, dtype=torch.bool)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._queue.get, None)


def _pieces(tokenizer: PreTrainedTokenizerBase, tokens: _Tokens) -> Iterator[str]:
    """The text that each token adds. A token that ends within a character waits until the character is complete."""
    ids: list[int] = []
    shown = ""
    for new in tokens:
        ids += new
        text = _text(tokenizer, ids)
        if not text.endswith("\ufffd") and text.startswith(shown):
            yield text[len(shown) :]
            shown = text
    yield _text(tokenizer, ids)[len(shown) :]


def _text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _batches(prompts: Sequence[list[int]], rooms: Sequence[int], wanted: int, size: int) -> Iterator[list[int]]:
    """The indices of the prompts that are answered together."""
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    together = [index for index in order if rooms[index] == wanted]
    yield from (together[start : start + size] for start in range(0, len(together), size))
    yield from ([index] for index in order if rooms[index] < wanted)


def _answer_batch(loaded: Loaded, prompts: list[list[int]], limit: int, search: Mapping[str, Any]) -> list[str]:
    width = max(map(len, prompts))
    output = _generate(loaded, prompts, limit, search)
    return [_text(loaded.tokenizer, row) for row in output[:, width:].tolist()]


def _generate(loaded: Loaded, prompts: list[list[int]], limit: int, options: Mapping[str, Any]) -> torch.Tensor:
    """The token ids of prompts and answers, padded on the left and on the right. options: for `generate`."""
    from transformers import GenerationConfig

    pad = loaded.tokenizer.pad_token_id
    if pad is None:
        pad = 0  # any id will do: padding is masked
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=loaded.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=loaded.device)
    own = loaded.model.generation_config
    bare = GenerationConfig(
        eos_token_id=end_tokens(loaded) or None,
        pad_token_id=pad,
        bos_token_id=None if own is None else own.bos_token_id,
        decoder_start_token_id=None if own is None else own.decoder_start_token_id,
    )
    loaded.model.generation_config = bare  # transformers takes missing options from here
    settings = {"max_new_tokens": limit, "do_sample": False, **options}
    try:
        output: torch.Tensor = loaded.model.generate(input_ids=ids, attention_mask=mask, **settings)
    finally:
        loaded.model.generation_config = own
    return output


def end_tokens(loaded: Loaded) -> list[int]:
    """The tokens that end an answer, sorted by id."""
    own = getattr(loaded.model.generation_config, "eos_token_id", None)
    ends = {*(own if isinstance(own, list) else [own]), loaded.tokenizer.eos_token_id}
    learnt = _learnt_end(loaded.tokenizer)
    return sorted({*ends, learnt} - {None})


def _learnt_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that training in the chat template puts after an answer; None without a template that takes answers."""
    from jinja2 import TemplateError

    if tokenizer.chat_template is None:
        return None
    with contextlib.suppress(ValueError, TemplateError):
        row = encode(Example("", prompt="a", completion="b"), tokenizer, system=None, chat=True)
        return next((label for label in reversed(row.labels) if label != IGNORED), None)
    return None


def _started(loaded: Loaded, prompt: Sequence[int]) -> list[int]:
    """The prompt; for an empty one, the BOS token. Raises ValueError if the tokenizer has no BOS token."""
    if prompt:
        return list(prompt)
    first = loaded.tokenizer.bos_token_id
    if first is None:
        raise LoraError("the prompt is empty, and this model's tokenizer has no token to begin with: give a prompt.")
    return [first]
