"""Answers from a causal language model: a batch at a time for scoring, or streamed for a person to read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from threading import Thread
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .models import Loaded


@torch.inference_mode()
def answers(
    loaded: Loaded,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    batch_size: int = 16,
    search: Mapping[str, Any] | None = None,
) -> Iterator[str]:
    """The answer to each prompt (token ids), in order. search: num_beams and the like for `generate`; greedy without.

    Prompts of like length share a batch, padded on the left, so that every answer starts at the same column.
    """
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    done: dict[int, str] = {}
    following = 0
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        done.update(
            zip(batch, _answer_batch(loaded, [prompts[i] for i in batch], max_new_tokens, search or {}), strict=True)
        )
        while following in done:
            yield done.pop(following)
            following += 1


def stream(
    loaded: Loaded, prompt: list[int], *, max_new_tokens: int, temperature: float = 0.0, top_p: float = 1.0
) -> Iterator[str]:
    """Pieces of the answer as they are produced. temperature 0 is greedy.

    Closing the iterator, or an interrupt while it waits, stops the generation.
    """
    from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

    stopped = False

    class Stopped(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
            return torch.full((input_ids.shape[0],), stopped, device=input_ids.device, dtype=torch.bool)

    streamer = TextIteratorStreamer(loaded.tokenizer, skip_prompt=True, skip_special_tokens=True)
    failure: list[BaseException] = []
    sampling = (
        {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature > 0 else {"do_sample": False}
    )

    def run() -> None:
        try:
            with torch.inference_mode():
                ids = torch.tensor([prompt], device=loaded.device)
                loaded.model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=max_new_tokens,
                    pad_token_id=loaded.tokenizer.pad_token_id,
                    streamer=streamer,
                    stopping_criteria=StoppingCriteriaList([Stopped()]),
                    **sampling,
                )
        except BaseException as error:  # handed to the reader, which would otherwise wait for ever
            failure.append(error)
            streamer.end()

    thread = Thread(target=run, daemon=True)
    thread.start()
    try:
        yield from streamer
    finally:
        stopped = True
        thread.join()
    if failure:
        raise failure[0]


def _answer_batch(
    loaded: Loaded, prompts: list[list[int]], max_new_tokens: int, search: Mapping[str, Any]
) -> list[str]:
    width = max(map(len, prompts))
    pad = loaded.tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=loaded.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=loaded.device)
    output = loaded.model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=pad,
        **search,
    )
    decoded: list[str] = loaded.tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
    return decoded
